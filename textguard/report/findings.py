"""What the grids say about the questions that the paper leaves open: python -m textguard.report.findings docs/findings.md.

Every number comes from a file that a stage wrote and that git keeps. An interval or a verdict chooses a sentence, never a value
alone. A question that no grid answers is listed as not answered.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from textguard.analysis.files import read_ranges, short_names
from textguard.analysis.mechanism import association, classifiers, layer_ranks, mean_over_kinds
from textguard.artifacts import write_text
from textguard.environment import run_command
from textguard.estimates.statistics import Estimate
from textguard.report.effect_tables import SPOKEN, Shown, shown_effects
from textguard.report.rendering import Judged, Table, as_markdown, show_estimate, show_number
from textguard.schema.base import Number, Stored, field, read
from textguard.schema.corruptions import ComparedCorruptions
from textguard.schema.effects import Effects
from textguard.schema.hardware import HardwareCell
from textguard.schema.results import BASELINE, PROPOSED, Cell, RunResult

BENCHMARKS = Path("benchmarks") / "results.json"
TEXT_CLASSIFIER = Path("examples") / "text_classifier.json"
# Name -> folder, and the command that makes its results.
STUDIES = {
    "demo": ".",
    "causes": "grids/causes",
    "factorial": "grids/factorial",
    "texts": "grids/texts",
    "cifar10": "grids/cifar10",
    "cifar10_resnet50": "grids/cifar10_resnet50",
    "fashion": "grids/fashion",
    "vit": "grids/vit",
    "faults": "grids/faults",
}


@dataclass(frozen=True)
class Study:
    """The results of one grid; all lists are empty where it was not run."""

    name: str
    folder: Path

    @property
    def command(self) -> str:
        """What makes the results anew."""
        return "make repro" if self.folder == Path() else f"make repro GRID={self.name}"

    @cached_property
    def results(self) -> list[RunResult]:
        """Every run."""
        return [read(file, "results", RunResult) for file in sorted((self.folder / "metrics" / "results").glob("*.json"))]

    @cached_property
    def cells(self) -> list[Cell]:
        """Every variant beside its baseline."""
        return self._listed("cells.json", list[Cell])

    @cached_property
    def contrasts(self) -> list[Cell]:
        """Pairs of other variants."""
        return self._listed("contrasts.json", list[Cell])

    @cached_property
    def other_faults(self) -> list[HardwareCell]:
        """Variants beside their baselines under the faults of section hardware."""
        return self._listed("hardware.json", list[HardwareCell])

    @cached_property
    def effects(self) -> list[Shown]:
        """Single changes, factors and interactions, of all networks."""
        return [shown for found in self._listed("effects.json", list[Effects], "effects") for shown in shown_effects(found)]

    @cached_property
    def corrupted(self) -> ComparedCorruptions:
        """How classifiers compare on corrupted images."""
        file = self.folder / "metrics" / "corruptions.json"
        empty = ComparedCorruptions(cells=[], classifiers=[], together=[])
        return read(file, "results", ComparedCorruptions) if file.exists() else empty

    def ranges(self, run: str) -> pd.DataFrame:
        """A run's value ranges: layer, max_abs."""
        table = read_ranges(self.folder / "metrics" / "runs" / run / "ranges.csv")
        return table.assign(layer=short_names(table["layer"].to_list()))

    def _listed(self, name: str, kind: type, made_by: str = "results") -> list:
        file = self.folder / "metrics" / name
        return read(file, made_by, kind) if file.exists() else []


class TextClassifier(Stored):
    """What examples/text_classifier.py leaves."""

    top1: dict[str, Number] = field("variant -> the mean over its trainings", "share")
    effects: Effects = field("what the variants do")


@dataclass(frozen=True)
class Finding:
    """A question, its answer in a sentence, what shows it (Markdown), the commands behind it, and how far it reaches."""

    question: str
    answer: str
    shown: str = ""
    commands: Sequence[str] = ()
    limits: str = ""


def unanswered(question: str, why: str = "no grid that asks it was run") -> Finding:
    """A question without an answer, which says so."""
    return Finding(question, f"Not answered here: {why}.")


def of_cell(cell: Cell, measure: str, place: str = "overall") -> Judged:
    """A cell's ratio and verdict under the detector that counts."""
    return Judged(
        getattr(getattr(cell.first.improvement, measure), place), getattr(getattr(cell.first.verdict, measure), place)
    )


def cell_table(cells: Iterable[Cell], name: str) -> str:
    """Variants beside their baselines: top-1, SDC and DeltaLoss."""
    headers = ["Network, Variant", "Top-1 (%)", "SDC, All Layers (x)", "DeltaLoss, All Layers (x)", "Trainings"]
    rows = [
        [
            f"{cell.dataset}, {cell.backbone}, {cell.variant}",
            cell.top1.times(100),
            of_cell(cell, "sdc"),
            of_cell(cell, "delta_loss"),
            str(len(cell.seeds)),
        ]
        for cell in cells
    ]
    caption = "(x): the baseline's / its own, above 1 is better; 99 % intervals over trainings."
    return as_markdown(Table(name, caption, headers, rows))


def of_own_classifiers(studies: dict[str, Study]) -> list[Study]:
    """The grids but `faults`, whose classifiers are the demo's, and `texts`, which has a question of its own."""
    return [study for name, study in studies.items() if name not in ("faults", "texts")]


def causes(studies: dict[str, Study]) -> Finding:
    """Which single changes make a classifier more resilient?"""
    question = "What makes these classifiers resilient?"
    study = studies["causes"]
    if not study.effects:
        return unanswered(question)
    plain = [shown for shown in study.effects if shown.of.endswith(f" against {BASELINE}")]
    return Finding(
        question,
        f"Of {len(plain)} single changes of the plain classifier, {_told(plain)}. Less SDC: "
        f"{', '.join(_with_verdict(plain, 'sdc', 'better')) or 'none'}.",
        effect_table(study.effects, "causes"),
        [study.command],
        "One network on digits, three epochs, means over layers: weighed by neurons, hardly any change is told "
        "(effects.md). The temperature divides the last layer's weights, which changes no prediction; "
        "bit flips then meet smaller values. That a change is not told is no proof that it does nothing.",
    )


def factorial(studies: dict[str, Study]) -> Finding:
    """Which factors act, and which act on one another?"""
    question = "Which factors act, and which need each other?"
    study = studies["factorial"]
    main = [shown for shown in study.effects if shown.kind == "factor"]
    pairs = [shown for shown in study.effects if shown.kind == "interaction"]
    if not main:
        return unanswered(question)
    return Finding(
        question,
        f"Of {len(main)} factors, {_told(main)}. Of {len(pairs)} pairs of factors, {_together(pairs)}.",
        effect_table([*main, *(pair for pair in pairs if _is_told(pair))], "factorial")
        + "\nOf a pair: the first factor's effect where the second is high, over that where it is low; of top-1, their "
        "difference. Pairs of which nothing is told are left out.\n",
        [study.command],
        "One network on digits, three epochs, means over layers. A half fraction of a design with two levels of each factor: "
        "nothing is known between them or beyond. AdamW comes with its own learning rate and weight decay.",
    )


def _together(pairs: Sequence[Shown]) -> str:
    """How many pairs of changes do less, or more, together than each of them alone would come to."""
    said = []
    for measure, what in (("sdc", "SDC"), ("delta_loss", "DeltaLoss")):
        less, more = (len(_with_verdict(pairs, measure, verdict)) for verdict in ("worse", "better"))
        said.append(f"{less or 'none'} save{'s' * (less < 2)} less {what} together than apart, and {more or 'none'} more")
    return "; ".join(said)


def _told(found: Sequence[Shown]) -> str:
    """How many changes are told to do something, by SDC and by DeltaLoss."""
    said = []
    for measure, what in (("sdc", "SDC"), ("delta_loss", "DeltaLoss")):
        less, more = (len(_with_verdict(found, measure, verdict)) for verdict in ("better", "worse"))
        said.append(f"{less or 'none'} leave{'s' * (less < 2)} less {what} and {more or 'none'} more")
    return ", ".join(said)


def _with_verdict(found: Sequence[Shown], measure: str, verdict: str) -> list[str]:
    return [shown.name for shown in found if shown.at(measure, "overall").verdict == verdict]


def _is_told(shown: Shown) -> bool:
    return any(shown.at(*place).verdict in ("better", "worse") for place in SPOKEN)


def effect_table(found: Iterable[Shown], name: str) -> str:
    """Changes and what they do to DeltaLoss, SDC and top-1."""
    rows = [
        [shown.name, *(Judged(shown.at(*at).effect, shown.at(*at).verdict) for at in SPOKEN), str(shown.effects[0].effect.n)]
        for shown in found
    ]
    headers = ["Change", "DeltaLoss, All Layers (x)", "SDC, All Layers (x)", "Top-1 (points)", "Trainings"]
    caption = "(x): so many times less with the change, above 1 is better; 99 % intervals over trainings, paired by seed."
    return as_markdown(Table(name, caption, headers, rows))


def text(studies: dict[str, Study]) -> Finding:
    """Does the text matter, beyond a head that starts at random?"""
    question = "Does better text give more resilience?"
    found = [
        (study, cell)
        for study in of_own_classifiers(studies)
        for cell in study.contrasts
        if cell.against == "random" and cell.variant in (PROPOSED, "cupl", "clip", "shuffled") and len(cell.seeds) > 2
    ]
    if not found:
        return unanswered(question)
    told, loss = (
        [cell for _, cell in found if of_cell(cell, measure).in_short in ("better", "worse")]
        for measure in ("sdc", "delta_loss")
    )
    headers = ["Grid: Network, Text", "Top-1 (%)", "Top-1, Random (%)", "SDC (x)", "DeltaLoss (x)"]
    headers += ["Largest Effect Left, SDC / DeltaLoss (x)", "Trainings"]
    rows = [
        [
            f"{study.name}: {cell.dataset}, {cell.backbone}, {cell.variant}",
            cell.top1.times(100),
            cell.top1_baseline.times(100),
            of_cell(cell, "sdc"),
            of_cell(cell, "delta_loss"),
            " / ".join(show_number(largest_left(of_cell(cell, name).estimate)) for name in ("sdc", "delta_loss")),
            str(len(cell.seeds)),
        ]
        for study, cell in found
    ]
    answer = (
        f"Set against a head that starts at random, a text changes SDC in {len(told)} and DeltaLoss in {len(loss)} of "
        f"{len(found)} comparisons beyond their 99 % intervals."
    )
    caption = (
        "(x): a random start's / the text's, above 1 the text is better; all layers; 99 % intervals over trainings. Largest "
        "effect left: the end of the interval that is farther from 1, in either direction."
    )
    return Finding(
        question,
        answer,
        as_markdown(Table("text", caption, headers, rows)),
        sorted({study.command for study, _ in found}),
        "Texts of other languages, longer ones, and those of today's large models were not tried. With more than ten classes, "
        "whose names mean more than digits, a text may do more.",
    )


def largest_left(ratio: Estimate) -> float:
    """The end of an interval of a ratio that is farther from 1, as a factor of at least 1."""
    return max(ratio.high, 1 / ratio.low if ratio.low else float("inf"))


def amount(studies: dict[str, Study]) -> Finding:
    """Do more questions, or more answers, give more?"""
    return _of_texts(
        studies["texts"],
        "Do more questions or more answers give more?",
        "starts, each set against a head that starts at random",
        "One network on ten digits. No answer is GPT-3's: SmolLM2-135M wrote those that carry its name, and the others were "
        "written for this repository. Ten questions were asked of SmolLM2 alone. All starts are set against the same trainings "
        "with a random start, so that what is told of one is likelier to be told of others.",
        against_chance=True,
    )


def language_model(studies: dict[str, Study]) -> Finding:
    """Does it matter how the language model is asked, and how large it is?"""
    return _of_texts(
        studies["texts"],
        "What do the language model's temperature and size do?",
        "changes of who answers the questions",
        "One language model, SmolLM2-135M-Instruct with 4-bit weights, on ten digits, of which it knows little. Most of its "
        "answers were cut at 60 tokens. Set against answers that were written for this repository, and are one whole sentence "
        "each, it stands for a small model: its size, training and the cut cannot be told apart. A large one was not asked.",
        against_chance=False,
    )


def _of_texts(study: Study, question: str, what: str, limits: str, *, against_chance: bool) -> Finding:
    """Texts that are set against a head that starts at random, or all others."""
    found = [shown for shown in study.effects if shown.of.endswith(" against random") == against_chance]
    if not found:
        return unanswered(question)
    return Finding(question, f"Of {len(found)} {what}, {_told(found)}.", effect_table(found, "texts"), [study.command], limits)


def mechanism(studies: dict[str, Study]) -> Finding:
    """Does resilience go with how far the scores go?"""
    question = "Is it how far the scores go?"
    found = classifiers({name: study.results for name, study in studies.items()})
    if found.empty:
        return unanswered(question)
    rows = []
    for effect, what in (
        ("head_delta_loss", "DeltaLoss, head alone"),
        ("delta_loss", "DeltaLoss, all layers"),
        ("head_sdc", "SDC, head alone"),
        ("sdc", "SDC, all layers"),
    ):
        values = association(found, "largest_logit", effect)
        columns = [values[name] for name in ("correlation", "correlation_within", "slope_within")]
        rows.append([what, *columns, str(columns[0].n)])
    loss, sdc = rows[0], rows[2]
    cells = [(study, cell) for study in of_own_classifiers(studies) for cell in study.cells if cell.variant == PROPOSED]
    left = [
        f"{show_estimate(cell.first.rescaled.same_temperature)} of "
        f"{show_estimate(cell.first.improvement.delta_loss.head)} ({study.name}: {cell.dataset}, {cell.backbone})"
        for study, cell in cells
        if cell.first.rescaled and len(cell.seeds) > 1
    ]
    answer = (
        f"Over {len(found)} classifiers, DeltaLoss of the head {_goes(loss[2])} the largest logit (correlation of logarithms "
        f"within networks {show_estimate(loss[2])}); SDC of the head {_goes(sdc[2])} it ({show_estimate(sdc[2])})."
    )
    caption = (
        "Correlation of the logarithm with that of the largest logit on training images, over all classifiers and within "
        "networks of one grid, and how many per cent more the damage is for one per cent more logit. Classifiers: those whose "
        "damage is not 0. 99 % intervals from resampling kinds of classifiers whole."
    )
    headers = ["Damage", "Correlation", "Within Networks", "Slope Within Networks", "Classifiers"]
    shown = as_markdown(Table("mechanism", caption, headers, rows))
    if left:
        shown += (
            "\nWith the head's logits scaled until the largest is the baseline's, which changes no prediction, of the gain in "
            f"DeltaLoss with descriptions there is left: {'; '.join(left)}.\n"
        )
    return Finding(
        question,
        answer,
        shown,
        ["cd docs && dvc repro"],
        "A correlation over classifiers does not say what makes what, and those of temperature 4.7 are baselines with their "
        "logits divided. The scaled heads say it, for DeltaLoss: there, nothing but a "
        "constant differs.",
    )


def _goes(correlation: Estimate) -> str:
    return "goes with" if correlation.low > 0 else "goes against" if correlation.high < 0 else "cannot be told to go with"


def layers(studies: dict[str, Study]) -> Finding:
    """Are the layers whose values go far the ones that faults hurt?"""
    question = "Do faults hurt most where values go far?"
    runs = {name: [(result, study.ranges(result.run)) for result in study.results] for name, study in studies.items()}
    found = layer_ranks(runs)
    if found.empty:
        return unanswered(question)
    rows = [
        [f"{name}: {dataset}, {backbone}", *(mean_over_kinds(own, measure) for measure in ("delta_loss", "sdc")), str(len(own))]
        for (name, dataset, backbone), own in found.groupby(["grid", "dataset", "backbone"], sort=False)
    ]
    loss, sdc = (mean_over_kinds(found, measure) for measure in ("delta_loss", "sdc"))
    caption = (
        "Mean over classifiers of the rank correlation, over a classifier's layers, of the largest absolute value without "
        "faults with what faults in the layer do. 99 % intervals from resampling kinds of classifiers whole: of few kinds too "
        "narrow, of two none."
    )
    return Finding(
        question,
        f"Over the layers of a classifier, DeltaLoss {_goes(loss)} the largest value (mean rank correlation "
        f"{show_estimate(loss)}), and SDC {_goes(sdc)} it ({show_estimate(sdc)}).",
        as_markdown(Table("layers", caption, ["Grid: Network", "DeltaLoss", "SDC", "Classifiers"], rows)),
        ["cd docs && dvc repro"],
        "Layers differ in more than their range: what comes behind them, and how many values they put out. Behind the range "
        "detector `profiled`, a fault is clamped to that range, so that some of the correlation is the detector's.",
    )


def networks(studies: dict[str, Study]) -> Finding:
    """Does what holds for the paper's networks hold for others?"""
    question = "Does it carry over to other networks and data?"
    names = ("demo", "fashion", "cifar10", "cifar10_resnet50", "vit")
    cells = [cell for name in names for cell in studies[name].cells if cell.variant != "template"]
    if not cells:
        return unanswered(question)
    better, worse = ([cell for cell in cells if of_cell(cell, "sdc").in_short == verdict] for verdict in ("better", "worse"))
    answer = (
        f"Of {len(cells)} pairs of a network and a way to train it, SDC over all layers is told better than the baseline's in "
        f"{len(better)} and worse in {len(worse)}."
    )
    return Finding(
        question,
        answer,
        cell_table(cells, "networks"),
        [studies[name].command for name in names if studies[name].cells],
        "Images, data sets and trainings are small: nothing here says what the networks do on ImageNet after 300 epochs. "
        "Where a way to train also predicts more images right, as ResNet-18's heads do on CIFAR-10, SDC may be less for that.",
    )


def other_faults(studies: dict[str, Study]) -> Finding:
    """Where does the ranking of the variants flip?"""
    question = "Where does the ranking of the variants flip under other faults?"
    study = studies["faults"]
    cells = [cell for cell in study.other_faults if cell.variant == PROPOSED]
    ratios = [one for cell in cells for one in cell.ratios if one.place == "overall" and one.measure in ("sdc", "delta_loss")]
    if not ratios:
        return unanswered(question)
    names = list(dict.fromkeys(one.faults for one in ratios))
    by_name = {(one.faults, one.measure): one for one in ratios}
    counts = {
        measure: {
            verdict: [one.faults for one in ratios if one.measure == measure and one.verdict == verdict]
            for verdict in ("better", "worse")
        }
        for measure in ("sdc", "delta_loss")
    }
    answer = (
        f"Of {len(names)} kinds of faults, descriptions are told better than the baseline by SDC in "
        f"{len(counts['sdc']['better'])} and by DeltaLoss in {len(counts['delta_loss']['better'])}; they are told worse in "
        f"{len(counts['sdc']['worse'])} and {len(counts['delta_loss']['worse'])}."
    )
    rows = [
        [
            name.replace("_", " "),
            *(Judged(one.ratio, one.verdict) for one in (by_name[name, "sdc"], by_name[name, "delta_loss"])),
        ]
        for name in names
    ]
    caption = (
        "(x): the baseline's / with descriptions, above 1 is better; 99 % intervals over "
        f"{len(cells[0].seeds)} trainings. See faults.md."
    )
    return Finding(
        question,
        answer,
        as_markdown(Table("faults", caption, ["Faults", "SDC (x)", "DeltaLoss (x)"], rows)),
        [study.command],
        "One network on an easy data set, and few trainings.",
    )


def protected(studies: dict[str, Study]) -> Finding:
    """Which mitigation pays, and on which model?"""
    question = "Which mitigation pays, and on which model?"
    study = studies["faults"]
    found = [
        (one, cell)
        for cell in study.other_faults
        for one in cell.protected
        if one.kind == "mitigation" and cell.variant == PROPOSED
    ]
    if not found:
        return unanswered(question)
    helps = {side: [one.name for one, _ in found if getattr(one, side).sdc.ratio.low > 1] for side in ("baseline", "own")}
    answer = (
        f"Of {len(found)} mitigations of neurons, those that leave less SDC beyond their 99 % intervals are: on the baseline "
        f"{_listed(helps['baseline'])}; with descriptions {_listed(helps['own'])}."
    )
    headers = ["Mitigation", "On", "Top-1 Added (points)", "Comparisons (M per image)", "SDC (x)", "DeltaLoss (x)"]
    rows = [
        [
            one.name.replace("_", " "),
            variant,
            bargain.top1_change,
            f"{bargain.comparisons / 1e6:.3g}",
            bargain.sdc.ratio,
            bargain.delta_loss.ratio,
        ]
        for one, cell in found
        for variant, bargain in ((BASELINE, one.baseline), (cell.variant, one.own))
    ]
    caption = (
        "(x): without / with the mitigation, above 1 it helps; single bit flips without a range detector, plain mean over "
        f"layers, {len(found[0][1].seeds)} trainings. Top-1 added: points, without any fault."
    )
    return Finding(
        question,
        answer,
        as_markdown(Table("mitigations", caption, headers, rows)),
        [study.command],
        "One network on an easy data set. Both sides meet the same faults, and intervals take them for others, so they are "
        "rather too wide. Where DeltaLoss without a mitigation reaches 10^30 nats, its ratio says that values overflow.",
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in names) or "none"


def corruption(studies: dict[str, Study]) -> Finding:
    """Do classifiers that stand faults stand corrupted images?"""
    question = "Does what stands faults stand corrupted images?"
    found = [(name, one) for name, study in studies.items() for one in study.corrupted.together if one.dataset != "all"]
    if not found:
        return unanswered(question)
    said = {"delta_loss": "DeltaLoss", "sdc": "SDC"}
    rows = [[f"{name}: {one.dataset}", said[one.measure], one.correlation, str(one.correlation.n)] for name, one in found]
    answer = "; ".join(
        f"in {name}, {said[one.measure]} {_goes(one.correlation)} the points of top-1 that a corruption costs "
        f"({show_estimate(one.correlation)})"
        for name, one in found
    )
    caption = (
        "Spearman's rank correlation over classifiers, of what faults do on clean images with the points of top-1 that a "
        "corruption costs: above 0, what stands one stands the other. Corruptions: noise, blur, contrast, brightness and JPEG "
        "at five severities. The 99 % intervals are too narrow, because they take trainings of one recipe for independent."
    )
    names = dict.fromkeys(name for name, _ in found)
    return Finding(
        question,
        f"{answer[0].upper()}{answer[1:]}.",
        as_markdown(Table("corruption", caption, ["Grid: Data Set", "What Faults Do", "Correlation", "Classifiers"], rows)),
        [studies[name].command for name in names],
        "A correlation over classifiers of one network each. It says nothing of one classifier under both at once; metrics/"
        "tables/corruptions.md of grid vit does.",
    )


def cost(measured: dict[str, Any] | None) -> Finding:
    """What training, inference and memory cost more. measured: by `python -m benchmarks guidance`; None without it."""
    question = "What does text guidance cost?"
    if not measured:
        return unanswered(question, "benchmark `guidance` was not run")
    headers = ["Network", "Training Step (x)", "Inference of 1 (x)", "Inference of 64 (x)", "Memory, Training (x)"]
    rows = [
        [
            name,
            *(_spread(own[what]["ratio"]) for what in ("training", "inference_1", "inference_64")),
            f"{own['training_mb']['random'] / own['training_mb']['baseline']:.3f}",
        ]
        for name, own in measured.items()
    ]
    steps = [own["training"]["ratio"][0] for own in measured.values()]
    single = [own["inference_1"]["ratio"][0] for own in measured.values()]
    caption = "(x): text-guided / baseline, the median of alternating rounds, and their lowest and highest in brackets."
    return Finding(
        question,
        f"A training step takes {min(steps):.2f} to {max(steps):.2f} times as long as the baseline's, and the inference of one "
        f"image {min(single):.2f} to {max(single):.2f} times.",
        as_markdown(Table("cost", caption, headers, rows)),
        ["python -m benchmarks guidance"],
        "Measured on one processor, with E = 512 and a head that starts at random; texts change no time. Asking a language "
        "model, once for each class, is not counted.",
    )


def texts_classified(measured: TextClassifier | None) -> Finding:
    """Does the same head do as much for a classifier of texts? measured: None where none was trained."""
    question = "Does a classifier of texts gain?"
    if not measured:
        return unanswered(question, "none was trained")
    shown = list(shown_effects(measured.effects))
    plain = [one for one in shown if one.of.endswith(f" against {BASELINE}")]
    return Finding(
        question,
        f"Of {len(plain)} changes of a small transformer that classifies sentences, {_told(plain)}.",
        effect_table(shown, "text_classifier"),
        ["python examples/text_classifier.py examples/text_classifier.json"],
        "Two layers of attention over vectors of MiniLM; eight classes, Python packages by a sentence of their documentation; "
        f"{100 * measured.top1[BASELINE]:.0f} % predicted right by the baseline. The sentences are those of the versions in "
        "requirements.lock: others give other numbers.",
    )


def _spread(ratio: Sequence[float]) -> str:
    middle, low, high = ratio
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


QUESTIONS: tuple[Callable[[dict[str, Study]], Finding], ...] = (
    causes,
    factorial,
    text,
    amount,
    language_model,
    networks,
    mechanism,
    layers,
    other_faults,
    protected,
    corruption,
)


# What a sceptic of the paper asks for, and where it is answered.
SCEPTIC = (
    ("SDC and mismatches beside DeltaLoss", "every table of every grid"),
    ("a baseline at the same temperature", "cooled in grid causes; column Same Temperature of detectors.md"),
    ("a baseline with label smoothing, with a penalty, with AdamW", "smoothed, penalised, adamw in grid causes"),
    ("five trainings, with intervals over them", "grid causes"),
    ("a latent layer without normalisation, and fixed scales", "bottleneck_384, fixed_14, fixed_50 in grid causes"),
    ("a random start as the baseline of what is said of texts", "contrasts with random, in every grid that has it"),
    ("the head alone, because the paper's weighting hangs on C", "columns Head Alone"),
    ("the range detector, named", "detectors.md of every grid"),
    ("ImageNet, at the paper's size", "not answered here: grids table1 to table3 are there, and were not run"),
)


def main(arguments: list[str]) -> int:
    """Write the page to the one file that is named. Returns the exit code."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    times = json.loads(BENCHMARKS.read_text(encoding="utf-8")).get("guidance", {}).get("times")
    texts = read(TEXT_CLASSIFIER, "", TextClassifier) if TEXT_CLASSIFIER.exists() else None
    studies = {name: Study(name, Path(folder)) for name, folder in STUDIES.items()}
    write_text(Path(arguments[0]), page(studies, times, texts))
    return 0


def page(studies: dict[str, Study], times: dict[str, Any] | None = None, texts: TextClassifier | None = None) -> str:
    """docs/findings.md. times: ratios of benchmark `guidance`, by network. texts: what examples/text_classifier.py found."""
    findings = [*(ask(studies) for ask in QUESTIONS), texts_classified(texts), cost(times)]
    parts = [
        "# Findings",
        "What the grids of this repository say about the questions that the paper leaves open. The numbers are computed from "
        "the committed results by `cd docs && dvc repro`. [Definitions](definitions.md) says what is counted, "
        "and [faults](faults.md) what is injected.",
    ]
    for finding in findings:
        parts += [f"## {finding.question}", f"**{finding.answer}**"]
        parts += [finding.shown.strip()] if finding.shown else []
        parts += [f"Made by: {', '.join(f'`{command}`' for command in finding.commands)}."] if finding.commands else []
        parts += [f"Limits: {finding.limits}"] if finding.limits else []
    asked = Table(
        "sceptic", "", ["What A Sceptic Of The Paper Asks For", "Where It Is Answered"], [list(row) for row in SCEPTIC]
    )
    parts += ["## For a sceptic of the paper", as_markdown(asked).strip()]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(run_command(main, 0))
