"""One page that shows a grid's results: a single HTML file that needs no network and no server."""

import math
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from textguard.analysis.files import (
    RESULTS_DIR,
    TEXTS_DIR,
    load_cells,
    load_compared_corruptions,
    load_effects,
    load_results,
    load_text_quality,
)
from textguard.analysis.regression import compare_all, judge
from textguard.artifacts import read_csv, read_json_lines, reading, write_text
from textguard.environment import run_command
from textguard.errors import InvalidArtifact, TextguardError
from textguard.params import ClassTexts, Params, load_params
from textguard.report.effect_tables import sentences
from textguard.report.gate import read_runs, verdict_table
from textguard.report.html import as_inline_picture, as_shown, element_id, fitting, render
from textguard.report.published import load_published
from textguard.report.rendering import PerTraining, Table, show_estimate
from textguard.report.tables import in_unit, judged, tables_of
from textguard.report.theme import element_key, place_name, variant_name
from textguard.report.variants import labelled
from textguard.schema.campaign import skip_reasons
from textguard.schema.effects import Effects
from textguard.schema.results import BASELINE, MEASURES, ONE_TRAINING, PLACES, Cell, RunResult

FIGURES_DIR = Path("plots") / "figures"
TABLES = {
    "table1": "Table 1: backbones",
    "table2": "Table 2: data sets",
    "table3": "Table 3: what the head starts from",
    "measures": "SDC, mismatches and DeltaLoss, side by side",
    "effects": "What one change does",
    "layers": "Layers before the last one",
    "detectors": "Range detectors",
    "fault_models": "Other faults, and where the ranking holds",
    "error_rates": "Bit errors that stay in the parameters' memory",
    "corruptions": "Corrupted images",
    "faults_and_corruptions": "Whether what stands faults stands corruption",
    "protections": "What protections and mitigations cost and buy",
    "resilience": "Resilience of every run",
    "attention": "Where the classifiers look, with faults",
    "audit": "What is published, against itself",
    "recipes": "Recipes",
    "treatments": "Treatments: what variants have otherwise",
}
FOLDED = ("audit", "recipes", "treatments")  # tables to look something up in; so are long ones
MOST_ROWS = 20  # of a table that is not folded
# Stem of a figure's file -> what it shows, in the order of the page.
FIGURES = {
    "architecture": "Architecture",
    "layers": "Layers beside the baseline's",
    "outcomes": "What faults do in each layer",
    "bits": "What faults do in each bit",
    "fault_models": "Other faults than those",
    "error_rates": "Bit errors that stay in the parameters' memory",
    "protection_cost": "SDC that computing layers twice covers, and what it costs",
    "accuracy_by_top2diff": "Accuracy against Top2Diff",
    "corruptions": "Accuracy on corrupted images",
    "convergence": "Convergence of the estimate",
    "last_layer": "Values of the last layer",
    "attention": "Where the classifiers look",
}
MOST_CLASSES = 20  # whose texts are shown
PARTS = [
    ("headline", "What came out"),
    ("effects", "What makes it resilient?"),
    ("run", "What was run"),
    ("tables", "Tables"),
    ("figures", "Figures"),
    ("runs", "Every run"),
    ("texts", "Texts"),
    ("repeat", "How to repeat this"),
    ("not-run", "What was not run"),
]
SHOWN = ("head", "overall", "by_neurons")  # places of the headline
ASKED = (("SDC over all layers", "sdc", "overall"), ("DeltaLoss", "delta_loss", "overall"), ("FIT", "sdc", "by_neurons"))
# Where answers are shown: ids and names.
FOREST, MEASURED = ("picture-improvement", "figure of improvements"), ("about-measures", "table of measures")
DETECTORS = ("about-detectors", "table of range detectors")
_DETECTORS = {"off": "Without a range detector"}  # -> how a sentence begins; of all others with their names


@dataclass(frozen=True)
class Revision:
    """The code that the page was made with: a commit in short, its date, and whether files differ from it."""

    commit: str
    date: str
    changed: bool

    def __str__(self) -> str:
        return f"{self.commit} of {self.date}{', with changes' if self.changed else ''}" if self.commit else "not in git"


def read_revision() -> Revision:
    """What git says of the current folder; an empty revision where it says nothing."""
    commit = _git("log", "-1", "--format=%h %cs").split()
    if not commit:
        return Revision("", "", False)
    # What stages write is no change of what they were made with.
    return Revision(*commit, changed=bool(_git("status", "--porcelain", "--", "*.py", "*.yaml", "*.lock", ":!*dvc.lock")))


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", "-c", "log.showSignature=false", *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main(arguments: list[str]) -> int:
    """Write the grid's page beside another state of it: the folder of that state's results, its name, the page's file."""
    if len(arguments) != 3:
        print("usage: python -m textguard.report.page BASE_RESULTS NAME PAGE", file=sys.stderr)
        return 2
    try:
        base, name, page = Path(arguments[0]), arguments[1], Path(arguments[2])
        params = load_params()
        significance = params.gate.significance
        judgements = judge(compare_all(read_runs(base), read_runs(RESULTS_DIR), params.gate), significance)
        table = verdict_table(judgements, significance)
        write_page(page, params, read_revision(), (name, table))
    except TextguardError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def write_page(path: Path, params: Params, revision: Revision, compared: tuple[str, Table] | None = None) -> None:
    """Write the page of the grid in the current folder. Raises InvalidArtifact.

    compared: the name of another state of the grid, and the gate's table of both.
    """
    cells, runs = labelled(load_cells(params.runs), params.labels), load_results(params.runs)
    corrupted = load_compared_corruptions(params.corrupted)
    grid = "default" if params.root == "." else Path.cwd().name
    found, tables = load_effects(params), {table.name: table for table in tables_of(params)}
    parts = [part for part in PARTS if part[0] != "effects" or found]
    effects, figures = tables.pop("effects", None), _figures(runs, params)
    keys = {label: variant for variant, label in params.labels.items()}  # what tables call a variant -> its key
    shown = [
        (
            f"about-{element_id(table.name)}",
            TABLES.get(table.name, table.name),
            table.name in FOLDED or len(table.rows) > MOST_ROWS,
            _pieces(table, runs, keys),
        )
        for table in tables.values()
    ]
    content = render(
        "page.html",
        title=f"textguard: {grid} grid",
        parts=parts if compared is None else [parts[0], ("compared", "Compared"), *parts[1:]],
        inside={
            "tables": [(name, label) for name, label, _, _ in shown],
            "figures": [(group["id"], group["title"]) for group in figures],
        },
        answers=_answers_in_short(cells),
        matrix=_shown_matrix(cells, runs, keys),
        switches=_switches(cells),
        headline=[_headline(cell) for cell in cells],
        remarks=[*_remarks(cells, runs), *_not_shown(params)],
        headline_figures=[
            _picture("figures", FIGURES_DIR / name, title, f"picture-{name}")
            for name, title, drawn in (
                ("improvement", "Improvement over the baseline", cells),
                ("tradeoff", "Accuracy and resilience", cells),
                ("range_effect", "Largest logit and damage in the head", True),
                ("faults_and_corruptions", "Resilience to faults and to corruption", corrupted.classifiers),
            )
            if drawn
        ],
        compared={"label": compared[0], "table": as_shown(compared[1], f"{compared[0]} and now")} if compared else None,
        effects=[(place_name(each.dataset, each.backbone), sentences(each), _effects_picture(each)) for each in found],
        effects_table=as_shown(effects, TABLES["effects"]) if effects else None,
        facts=_facts(params, runs, grid, revision),
        tables=shown,
        figures=figures,
        runs=[_run(key, run, params) for key, run in runs.items()],
        texts=[_text(texts) for texts in params.class_texts.values()],
        commands=_commands(grid, revision),
        parameters=_parameters(params),
        not_run=_not_run(runs, {dataset.source for dataset in params.datasets.values()}),
    )
    write_text(path, content)


@dataclass(frozen=True)
class Claim:
    """A sentence, and where the page shows it: ids and names of figures or tables."""

    text: str
    shown: Sequence[tuple[str, str]] = ()


def _answers_in_short(cells: Sequence[Cell]) -> list[Claim]:
    """Whether it is more resilient: verdicts under each range detector, counted."""
    said = []
    for detector in cells[0].detectors if cells else ():
        found = [cell.detectors[detector].verdict for cell in cells if detector in cell.detectors]
        counts = [
            f"{name} is {_counted(getattr(getattr(verdict, measure), place) for verdict in found)}"
            for name, measure, place in ASKED
        ]
        drawn = [FOREST] if detector == next(iter(cells[0].detectors)) else []
        text = (
            f"{_DETECTORS.get(detector, f'Behind the range detector {detector}')}, of {len(found)} "
            f"comparison{'s' * (len(found) != 1)} with a baseline: {'; '.join(counts)}."
        )
        said.append(Claim(text, [*drawn, DETECTORS]))
    return said


def _counted(verdicts: Iterable[str]) -> str:
    found = list(verdicts)
    better, worse = found.count("better"), found.count("worse")
    if not better + worse:
        return "told apart in none"
    return " and ".join(f"{words} in {count}" for words, count in (("lower", better), ("higher", worse)) if count)


def _shown_matrix(cells: Sequence[Cell], runs: Mapping[str, RunResult], keys: Mapping[str, str]) -> dict[str, Any]:
    """The matrix, whose rows find their marks in the figures. keys: what tables call a variant -> its key."""
    table = _matrix(cells, runs, keys)
    marks = [
        element_key(cell.dataset, cell.backbone, keys.get(cell.variant, cell.variant))
        for cell in cells
        for _ in range(len(cell.detectors) * len(SHOWN))
    ]
    return as_shown(table, "Every variant beside its baseline", marks, FOREST[0])


def _matrix(cells: Sequence[Cell], runs: Mapping[str, RunResult], keys: Mapping[str, str]) -> Table:
    """Every cell under every range detector, by measure, with what its faults are averaged over."""
    by_seed = {(run.dataset, run.backbone, run.variant, run.seed): run for run in runs.values()}

    def seeds(cell: Cell, detector: str, measure: str, place: str) -> dict[int, float]:
        found = {seed: by_seed[cell.dataset, cell.backbone, keys.get(cell.variant, cell.variant), seed] for seed in cell.seeds}
        improved = {seed: run.detectors[detector].improvement for seed, run in found.items() if detector in run.detectors}
        return {seed: getattr(getattr(each, measure), place).value for seed, each in improved.items() if each}

    def per_training(cell: Cell, *at: str) -> PerTraining:
        ratios = [judged(other.detectors[at[0]], *at[1:]).estimate.value for other in cells if at[0] in other.detectors]
        trained = [value for other in cells if at[0] in other.detectors for value in seeds(other, *at).values()]
        ratio = judged(cell.detectors[at[0]], *at[1:])
        return PerTraining(ratio.estimate, ratio.verdict, seeds(cell, *at), _strip_limits([*ratios, *trained]))

    rows = [
        [
            _cell_name(cell),
            len(cell.seeds),
            detector,
            PLACES[place],
            *(per_training(cell, detector, measure, place) for measure in ("sdc", "delta_loss", "mismatch")),
        ]
        for cell in cells
        for detector in cell.detectors
        for place in SHOWN
    ]
    several = {len(cell.seeds) > 1 for cell in cells}
    over = "injections" if several == {False} else "trainings"
    alone = ", or over injections where there is one training" if len(several) > 1 else ""
    caption = (
        f"So many times less than in the baseline, above 1 is better, with its interval over {over}{alone}. A strip has a "
        "logarithmic axis, the same below each other, and a line at 1; its bar is the interval as far as it fits, and each dot "
        "is one training. SDC: a fault changes the class, or leaves a loss that is not finite. DeltaLoss: by how much a fault "
        "changes the loss. Mismatch: the class changes among finite losses. Head alone: faults in the last layer; all layers: "
        "the plain mean over layers; all neurons: every neuron as likely as any other, as in hardware, so that its SDC ratio "
        "is that of FIT, the failures in 10^9 hours. A row that the pointer or the focus is on picks its marks out of the "
        "figures. A click on its name keeps them so; Escape lets them go."
    )
    headers = ["Network, Variant", "Trainings", "Detector", "Faults In", "SDC (x)", "DeltaLoss (x)", "Mismatch (x)"]
    return Table("matrix", caption, headers, rows)


def _strip_limits(ratios: Iterable[float]) -> tuple[float, float]:
    """Ends of an axis that has room for these and for 1."""
    shown = [ratio for ratio in ratios if 0 < ratio < math.inf]
    return min([1 / 1.5, *shown]) / 1.1, max([1.5, *shown]) * 1.1


def _pieces(table: Table, runs: Mapping[str, RunResult], keys: Mapping[str, str]) -> list[dict[str, Any]]:
    """A table in parts that fit the page, whose rows find their marks in the figures where they are of one variant."""
    columns = dict(zip(table.headers, zip(*table.rows, strict=True), strict=bool(table.rows)))
    marks: Sequence[str] = ()
    if {"Dataset", "Backbone", "Variant"} <= columns.keys():
        subjects = zip(*(columns[name] for name in ("Dataset", "Backbone", "Variant")), strict=True)
        marks = [element_key(dataset, backbone, keys.get(variant, variant)) for dataset, backbone, variant in subjects]
    elif "Run" in columns:
        found = [runs[key] for key in columns["Run"]]
        marks = [element_key(run.dataset, run.backbone, run.variant) for run in found]
    pieces = [as_shown(part, TABLES.get(table.name, table.name), marks) for part in fitting(table)]
    return [{**piece, "note": pieces[-1]["note"]} for piece in pieces]


def _switches(cells: Sequence[Cell]) -> list[tuple[str, int, list[str]]]:
    """What leaves only some rows of the matrix: a name, the column, and its values, of which the first is shown at first."""
    detectors = list(dict.fromkeys(detector for cell in cells for detector in cell.detectors))
    places = [PLACES[place] for place in SHOWN]
    return [("Detector", 2, detectors), ("Faults in", 3, [PLACES["overall"], *(p for p in places if p != PLACES["overall"])])]


def _headline(cell: Cell) -> dict[str, Any]:
    """A cell's measures as a table, and what is said above it."""
    found, name = cell.first, _cell_name(cell)
    rows = [
        [
            f"{MEASURES[measure]}, {PLACES[place]} ({'nats' if measure == 'delta_loss' else '%'})",
            *(in_unit(part, measure, place) for part in (found.baseline, found.own)),
            judged(found, measure, place),
        ]
        for measure in MEASURES
        for place in SHOWN
    ]
    headers = ["What faults do", "Baseline", "The variant", "Baseline / the variant (x)"]
    table = Table(f"headline-{cell.dataset}-{cell.backbone}-{cell.variant}", "", headers, rows)
    return {
        "name": name,
        "trainings": len(cell.seeds),
        "top1": show_estimate(cell.top1.times(100)),
        "top1_baseline": show_estimate(cell.top1_baseline.times(100)),
        "table": as_shown(table, name),
    }


def _cell_name(cell: Cell) -> str:
    return f"{place_name(cell.dataset, cell.backbone)} with {variant_name(cell.variant)}"


def _remarks(cells: Sequence[Cell], runs: Mapping[str, RunResult]) -> list[Claim]:
    confidence = ", ".join(dict.fromkeys(f"{100 * run.confidence:g} %" for run in runs.values()))
    remarks = [
        Claim(
            f"Brackets are intervals of confidence {confidence}; “exact” means that every fault was tried. "
            "A verdict is “better” or “worse” only where the interval leaves 1 out."
        )
    ]
    if any(len(cell.seeds) == 1 for cell in cells):
        remarks.append(Claim(f"Rows with one training have no verdict: {ONE_TRAINING}."))
    fewer = [cell for cell in cells if cell.first.verdict.delta_loss.head == "better"]
    said = (
        ("worse", "DeltaLoss of the head got smaller, and yet a fault in any neuron changes the class more often, in"),
        (
            "not separable",
            "DeltaLoss of the head got smaller. That a fault in any neuron changes the class less often is not shown for",
        ),
    )
    for verdict, words in said:
        if found := [_cell_name(cell) for cell in fewer if cell.first.verdict.sdc.by_neurons.startswith(verdict)]:
            remarks.append(Claim(f"{words} {'; '.join(found)}. Nearly all neurons are in other layers.", [FOREST, MEASURED]))
    changed = [
        _cell_name(cell)
        for cell in cells
        if {"better", "worse"} <= {found.verdict.delta_loss.overall for found in cell.detectors.values()}
    ]
    if changed:
        remarks.append(
            Claim(
                "The range detector decides whether DeltaLoss, in the mean over all layers, got better or worse for "
                f"{'; '.join(changed)}.",
                [DETECTORS],
            )
        )
    return remarks


def _not_shown(params: Params) -> list[Claim]:
    """What the figures leave out."""
    remarks, shown = [], ", ".join(variant_name(variant, params.labels) for variant in params.drawn)
    if len(params.drawn) < len(params.variants):
        remarks.append(
            Claim(
                f"Figures that tell variants apart show {len(params.drawn)} of the {len(params.variants)}: {shown}. "
                "Tables hold all; figures.shown of params.yaml names those that are drawn."
            )
        )
    if not params.closeup.images:
        remarks.append(Claim("Where the classifiers look is not shown: closeup.images of params.yaml is 0."))
    return remarks


def _effects_picture(found: Effects) -> dict[str, Any]:
    stem = f"effects-{found.dataset}-{found.backbone}"
    title = f"What one change does, {place_name(found.dataset, found.backbone)}"
    return _picture("figures", FIGURES_DIR / stem, title, f"picture-{stem}")


def _facts(params: Params, runs: Mapping[str, RunResult], grid: str, revision: Revision) -> list[tuple[str, str]]:
    inject, faults = params.inject, params.inject.faults
    shape = "" if faults.pattern == "value" else f", pattern {faults.pattern}"
    sampled = sum(run.plan.injections for run in runs.values())
    enumerated = sum(run.plan.enumerated for run in runs.values())
    plans = ", ".join(dict.fromkeys(run.plan.plan for run in runs.values()))
    return [
        ("Grid", f"{grid}: {len(runs)} trainings of {', '.join(dict.fromkeys(run.backbone for run in runs.values()))}"),
        ("Data", ", ".join(dict.fromkeys(run.dataset for run in runs.values()))),
        ("Code", str(revision)),
        ("Device", "; ".join(dict.fromkeys(run.settings["device"] for run in runs.values()))),
        ("Faults", f"{faults.operation}, {faults.bits} bit(s) in {faults.values} {faults.target}(s){shape}, {inject.format}"),
        ("Campaigns", f"plan {plans}, seed {inject.seed}: {sampled:,} injections, and {enumerated:,} faults enumerated"),
        ("Detectors", ", ".join(dict.fromkeys([inject.detector, *inject.compare_detectors]))),
        ("Text encoder", params.encoder),
    ]


def _not_drawn(params: Params, dataset: str) -> set[str]:
    """Figures of what the grid does not look at, or not on this data set."""
    hardware = params.hardware
    drawn = {
        "fault_models": hardware.models and BASELINE in params.variants and len(params.variants) > 1,
        "error_rates": hardware.rates and hardware.protections,
        "corruptions": dataset in params.corruptions.datasets,
        "attention": params.closeup.images,
        "architecture": set(params.drawn) - set(params.treatments),
    }
    return {name for name, asked in drawn.items() if not asked}


def _figures(runs: Mapping[str, RunResult], params: Params) -> list[dict[str, Any]]:
    groups = []
    for dataset, backbone in dict.fromkeys((run.dataset, run.backbone) for run in runs.values()):
        stem, place = f"{dataset}-{backbone}", place_name(dataset, backbone)
        pictures = [
            _picture("figures", FIGURES_DIR / f"{name}-{stem}", f"{title}, {place}", f"picture-{name}-{stem}")
            for name, title in FIGURES.items()
            if name not in _not_drawn(params, dataset)
        ]
        groups.append({"id": element_id(f"figures-{stem}"), "title": place, "pictures": pictures})
    return groups


def _picture(made_by: str, stem: Path, title: str, name: str) -> dict[str, Any]:
    """A figure as the template takes it. Raises InvalidArtifact."""
    file = stem.with_name(f"{stem.name}.svg")
    with reading(file, made_by):
        return as_inline_picture(file.read_bytes(), title, name, str(stem.with_name(f"{stem.name}.csv")))


def _run(key: str, run: RunResult, params: Params) -> dict[str, Any]:
    facts = [
        ("Parameters", f"{run.parameters:,}"),
        ("Multiply-adds per image", f"{run.multiply_adds:,}"),
        ("Top2Diff", show_estimate(run.top2diff)),
        ("DeltaLoss, head alone", f"{show_estimate(run.head.delta_loss)} nats"),
        ("DeltaLoss, last layer", f"{show_estimate(run.last_layer.delta_loss)} nats"),
        ("DeltaLoss, all neurons", f"{show_estimate(run.by_neurons.delta_loss)} nats"),
        ("SDC, head alone", f"{show_estimate(run.head.sdc.times(100))} %"),
        ("SDC, all neurons", f"{show_estimate(run.by_neurons.sdc.times(100))} %"),
        ("FIT", show_estimate(run.overall.fit)),
        ("Largest logit, scale", f"{run.largest_logit:.3g}, {run.scale:.3g}"),
        ("Images", f"{run.plan.eligible_images:,} predicted right without faults"),
        ("Recipe, seed", f"{params.backbones[run.backbone].recipe}, {run.seed}"),
        ("Fingerprint", run.settings["inputs"]),
    ]
    return {
        "key": key,
        "id": element_id(f"run-{key}"),
        "top1": show_estimate(run.top1.times(100)),
        "overall": show_estimate(run.overall.delta_loss),
        "sdc": show_estimate(run.overall.sdc.times(100)),
        "facts": facts,
        "layers": as_shown(_layers(run), f"Layers of {key}"),
        "command": f"dvc repro inject@{key}",
    }


def _layers(run: RunResult) -> Table:
    headers = ["Layer", "Kind", "Neurons", "Faults", "DeltaLoss (nats)", "SDC (%)", "Masked (%)"]
    rows = [
        [
            layer.layer,
            layer.kind,
            layer.neurons,
            layer.injections,
            layer.delta_loss,
            layer.sdc.times(100),
            f"{100 * layer.outcomes.masked:.1f}",
        ]
        for layer in run.layers
    ]
    if run.variant != BASELINE:
        headers += ["DeltaLoss, baseline / own (x)", "SDC, baseline / own (x)"]
        rows = [
            [*row, *([found.delta_loss, found.sdc] if (found := layer.improvement) else ["no such layer"] * 2)]
            for row, layer in zip(rows, run.layers, strict=True)
        ]
    return Table(f"layers-{run.run}", "In order of execution.", headers, rows)


def _text(texts: ClassTexts) -> dict[str, Any]:
    key, text = texts.key, texts.params
    answers, quality = _answers(Path("prompts") / "texts" / key / "responses.jsonl"), load_text_quality(key)
    said: dict[str, list[str]] = {}
    for answer in answers:
        said.setdefault(answer["class_name"], []).append(answer["text"])
    providers = dict.fromkeys(" ".join(filter(None, (answer["provider"], answer["model"]))) for answer in answers)
    pictures = Path("plots/texts") / key
    return {
        "key": key,
        "id": element_id(f"text-{key}"),
        "facts": [
            ("Answered by", "; ".join(providers)),
            ("Questions", " / ".join(text.questions[: text.limit_questions or None])),
            (
                "Texts",
                f"{quality.answers:,}, of which {quality.embedded:,} were embedded, for {quality.classes:,} classes",
            ),
            ("Mean cosine of two classes", f"{quality.mean_pairwise_cosine:.3f}"),
            ("Encoder", quality.encoder),
        ],
        "pictures": [_picture("text_quality", pictures / "similarity", f"Similarity of classes, {key}", f"similarity-{key}")],
        "classes": as_shown(_classes(key, quality.classes), f"Classes of {key}"),
        "said": list(said.items())[:MOST_CLASSES],
        "said_note": f"{min(len(said), MOST_CLASSES)} of {len(said)} classes",
    }


def _answers(path: Path) -> list[dict[str, Any]]:
    """What was said, as far as the page shows it. Raises InvalidArtifact."""
    answers = read_json_lines(path, "responses")
    with reading(path, "responses"):
        for number, answer in enumerate(answers, start=1):
            texts = [answer.get(name) for name in ("class_name", "text", "provider")]
            if not all(isinstance(text, str) for text in texts) or not isinstance(answer.get("model", 0), str | None):
                raise InvalidArtifact(f"line {number} must have texts as class_name, text and provider, and a model or null")
    return answers


def _classes(key: str, count: int) -> Table:
    """What is known of every class. Raises InvalidArtifact."""
    path, columns = TEXTS_DIR / f"{key}.csv", ["class", "answers", "embedded", "words", "spread", "nearest_wrong", "cosine"]
    bounds = dict.fromkeys(("answers", "embedded", "words"), (0.0, math.inf))
    bounds |= {"spread": (-1e-6, 1 + 1e-6), "cosine": (-1 - 1e-6, 1 + 1e-6)}  # but for rounding
    classes = read_csv(path, "text_quality", ["class", "nearest_wrong"], list(bounds), bounds)
    with reading(path, "text_quality"):
        if len(classes) != count or not classes["class"].is_unique:
            raise InvalidArtifact(f"does not have one row for each of the {count} classes that {key}.json counts")
    rows = [[_short(value) for value in row] for row in classes[columns].itertuples(index=False)]
    note = "Spread: mean cosine distance of a text to its class's mean; cosine: to the nearest wrong class."
    return Table(f"classes-{key}", note, [name.replace("_", " ") for name in columns], rows)


def _short(value: Any) -> Any:
    return f"{value:.3f}" if isinstance(value, float) else (value if isinstance(value, str) else int(value))


def _commands(grid: str, revision: Revision) -> str:
    lines = ["make setup && . .venv/bin/activate"]
    if revision.commit:
        lines.insert(
            0, f"git checkout {revision.commit}" + ("   # and the changes that were not committed" if revision.changed else "")
        )
    where = [] if grid == "default" else [f"cd grids/{shlex.quote(grid)}"]
    return "\n".join([*lines, *where, "dvc repro dvc.yaml"])


def _parameters(params: Params) -> str:
    """What the results depend on, as params.yaml has it."""
    sections = asdict(params)
    del sections["network"], sections["gate"]
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)


def _not_run(runs: Mapping[str, RunResult], sources: set[str]) -> list[str]:
    published = [row for row in load_published() if row.source == "paper"]
    lines = []
    for what, of_paper, here in (
        ("data sets", {row.dataset for row in published}, sources),
        ("backbones", {row.backbone for row in published}, {run.backbone for run in runs.values()}),
    ):
        if missing := sorted(of_paper - here):
            lines.append(
                f"Of the paper's {len(of_paper)} {what}: {', '.join(missing)}. This grid's params.yaml does not name them."
            )
    if all(run.variant == BASELINE for run in runs.values()):
        lines.append("Any text-guided classifier.")
    skipped = dict.fromkeys(pair for run in runs.values() for pair in run.skipped.items())
    lines += [f"Not hit by faults: {reason}." for reason in skip_reasons(skipped)]
    return lines or ["Nothing of what the paper ran is missing."]


if __name__ == "__main__":
    sys.exit(run_command(main, 2))
