"""Tables 1, 2 and 3 beside the published numbers, each of ours with its interval; an audit of what is published; and more."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from textguard.analysis.files import (
    load_cells,
    load_closeup,
    load_compared_corruptions,
    load_effects,
    load_hardware,
    load_hardware_cells,
    load_results,
)
from textguard.estimates.statistics import Estimate, few_injections
from textguard.params import Params, library_recipes
from textguard.report.corruption_tables import corruption_table, together_table
from textguard.report.effect_tables import effects_table
from textguard.report.hardware_tables import error_rate_table, fault_model_table, protection_table
from textguard.report.published import Finding, Published, audit, differences, load_published
from textguard.report.recipe_table import Fields, recipe_table, treatment_table
from textguard.report.rendering import Judged, Table, show_number
from textguard.report.variants import labelled
from textguard.schema.closeup import Cam, CloseUp, NoCam, WorstShift
from textguard.schema.results import (
    BASELINE,
    MEASURES,
    ONE_TRAINING,
    PLACES,
    PROPOSED,
    Cell,
    CellUnderDetector,
    Places,
    RunResult,
)

LARGEST = 10**9  # injections into a layer
INITIALISATIONS = {"random": "random", "template": "text, one template", PROPOSED: "text, class descriptions"}
# Header -> its value in a row.
Columns = dict[str, Callable[[Any], Any]]
# Header -> its value in a row of ours, and in a published one.
Compared = dict[str, tuple[Callable[[Cell], Any], Callable[[Published], Any]]]


@dataclass(frozen=True)
class UnderDetector:
    """A cell under one of its range detectors."""

    cell: Cell
    detector: str
    found: CellUnderDetector


def tables_of(params: Params) -> list[Table]:
    """All tables of the grid in the current folder, from its stored results. Raises InvalidArtifact."""
    cells = labelled(load_cells(params.runs), params.labels)
    contrasts = load_cells(params.runs, contrasts=True, treatments=params.treatments)
    found = load_results(params.runs)
    runs = dict(zip(found, labelled(found.values(), params.labels), strict=True))
    sources = {key: dataset.source for key, dataset in params.datasets.items()}
    recipes = {name: {"recipe": trained.recipe, **asdict(trained)} for name, trained in params.backbones.items()}
    library = library_recipes(params)
    treated = {name: treatment for name, treatment in params.treatments.items() if name in params.variants}
    for name, (variant, treatment) in itertools.product(params.backbones, treated.items()):
        if treatment.recipe:
            other = f"{name} ({params.labels[variant]})"
            recipes[other], library[other] = recipes[name] | treatment.recipe, library[name]
    closeups = {key: load_closeup(key) for key in params.looked_at}
    tables = make_tables(cells, contrasts, runs, params.main_dataset, sources, recipes, library, closeups)
    hardware, note = labelled(load_hardware_cells(params.runs), params.labels), _note(runs.values())
    corrupted = load_compared_corruptions(params.corrupted)
    others = [
        effects_table(load_effects(params)),
        treatment_table({params.labels[name]: treatment.differing for name, treatment in treated.items()}),
        fault_model_table(hardware, cells, note),
        error_rate_table(hardware, {key: load_hardware(key) for key in params.runs}, note),
        protection_table(hardware, note),
        corruption_table(corrupted, note),
        together_table(corrupted, _confidence(runs.values())),
    ]
    # A grid need not ask for effects, look at other faults, or at corrupted images.
    return [*tables, *(table for table in others if table.rows)]


def make_tables(
    cells: Sequence[Cell],
    contrasts: Sequence[Cell],
    runs: Mapping[str, RunResult],
    main_dataset: str,
    sources: Mapping[str, str],
    recipes: Mapping[str, Fields],
    library: Mapping[str, Fields],
    closeups: Mapping[str, CloseUp],
) -> list[Table]:
    """All tables: of cells, of runs and of close-ups.

    contrasts: text-guided cells beside other text-guided ones. sources: data set -> where it comes from, which is how the
    published tables call it. recipes, library: see `recipe_table`.
    """
    proposed = [cell for cell in cells if cell.variant == PROPOSED]
    interval, note = _confidence(runs.values()), f"{_note(runs.values())} Exact: every fault was tried.{_few(runs.values())}"
    ratios = (
        "(x): the baseline's / ours, above 1 is better. SDC: faults that change the class or leave a loss that is not finite; "
        "mismatches: changed classes among faults with a finite loss. All layers: the plain mean over layers, as in the paper; "
        "all neurons: layers weighed by their neurons, as FIT is; head alone: against the baseline's last layer."
    )
    beside = (
        f"{ratios} DeltaLoss of the last layer and of all layers is what the paper calls improvement in reliability; it weighs "
        f"latent layer and head by their neurons. {note} Rows from paper (arXiv 2311.14062) and README are as published, "
        "without intervals, the README's only where it differs; on another data set or backbone they are not comparable."
    )
    per_run = (
        "SDC: a changed class, or a loss that is not finite. DeltaLoss and rates are plain means over layers, but where "
        "neurons or the head are named; FIT: failures in 10^9 hours, its upper bound where no SDC was seen. Largest logit: in "
        "magnitude, over the training set; behind the detector 'profiled', a fault in the last layer makes none larger. "
        f"Brackets: intervals of confidence {interval} over injections, of top-1 over test images."
    )
    against = (
        f"The mean over the layers before the last one, and how many of them are better or worse than the baseline's. {ratios} "
        f"{note}"
    )
    left = (
        "Rows that compare one start with another have the latter in the baseline's place. Largest effect left: of all layers, "
        "the end of the interval that is farther from 1."
    )
    published = load_published()
    main = [cell for cell in proposed if cell.dataset == main_dataset]
    ablated = _ablated(cells)
    varied = [UnderDetector(cell, name, found) for cell in cells for name, found in cell.detectors.items()]
    measured = [(cell, measure, place) for cell in cells for measure in MEASURES for place in PLACES]

    def compared(name: str, what: str, columns: Compared, *choice: Any) -> Table:
        return Table(name, f"{what} {beside}", list(columns), _beside(columns, published, *choice))

    only_main = {main_dataset: sources[main_dataset]}
    table3 = compared(
        "table3", f"Starts of the head, each against the baseline. {left}", TABLE3, "paper Table 3", "variant", ablated, sources
    )
    table3.rows.extend([value(cell) for value, _ in TABLE3.values()] for cell in contrasts)
    return [
        compared("table1", "Backbones, baseline against text-guided.", TABLE1, "paper Table 1", "backbone", main, only_main),
        compared("table2", "Data sets, baseline against text-guided.", TABLE2, "paper Table 2", "dataset", proposed, sources),
        table3,
        _table(
            "measures",
            f"Three measures of what faults do. DeltaLoss in nats, rates in percent. {ratios} {note}",
            MEASURED,
            measured,
        ),
        _table("layers", against, LAYERS, cells),
        _table("detectors", f"The same faults under each range detector. {HEADS} {ratios} {note}", DETECTORS, varied),
        _table("resilience", f"Every run. {per_run}", RESILIENCE, list(runs.values())),
        _attention_table(closeups),
        _audit_table(audit(published)),
        recipe_table(recipes, library),
    ]


def _confidence(runs: Iterable[RunResult]) -> str:
    return " and ".join(dict.fromkeys(f"{run.confidence:.4g}" for run in runs))


def _note(runs: Iterable[RunResult]) -> str:
    """What brackets and verdicts are."""
    return (
        f"Brackets: intervals of confidence {_confidence(runs)}, over test images (accuracy, Top2Diff) or injections, over "
        f"trainings where there are several. A verdict is given where there are: {ONE_TRAINING}."
    )


def _few(runs: Iterable[RunResult]) -> str:
    """What to say of runs whose layers have fewer injections than their intervals hold for."""
    least: dict[str, int] = {}
    for run in runs:
        counts = [layer.injections for layer in run.layers if layer.method == "sampled"]
        least[run.plan.plan] = min([*counts, least.get(run.plan.plan, LARGEST)])
    return "".join(f" {said}" for plan, count in least.items() if (said := few_injections(count, plan)))


def _printed(column: str) -> Callable[[Published], Any]:
    return lambda row: row.numbers.get(column)


def _nothing(_: Published) -> None:
    """Of a column that published tables lack."""


def _initialisation(variant: str) -> str:
    return INITIALISATIONS.get(variant, variant)


def _start(cell: Cell) -> str:
    """What a cell's head starts from, and what it is compared with where that is not the baseline."""
    beside = "" if cell.against == BASELINE else f", against {_initialisation(cell.against)}"
    return f"{_initialisation(cell.variant)}{beside}"


def _largest_effect(cell: Cell, measure: str) -> str | None:
    """How many times better or worse a cell may be in the mean over layers, as far as its trainings say."""
    ratio = getattr(cell.first.improvement, measure).overall
    if len(cell.seeds) == 1 or not ratio.low > 0:
        return None
    return show_number(max(ratio.high, 1 / ratio.low))


PLACE: Compared = {
    "Dataset": (lambda cell: cell.dataset, lambda row: row.dataset),
    "Backbone": (lambda cell: cell.backbone, lambda row: row.backbone),
    "Source": (lambda _: "this grid", lambda row: row.source),
}
INITIALISATION: Compared = {"Projection Initialization": (_start, lambda row: _initialisation(row.variant))}
ACCURACY: Compared = {
    "Acc. Baseline (%)": (lambda cell: cell.top1_baseline.times(100), _printed("top1_baseline")),
    "Acc. Ours (%)": (lambda cell: cell.top1.times(100), _printed("top1")),
}
COST: Compared = {
    "Additional Params (M)": (lambda cell: cell.parameters / 1e6, _printed("parameters")),
    "Additional FLOPs (M multiply-adds)": (lambda cell: cell.multiply_adds / 1e6, _printed("multiply_adds")),
}


def judged(cell: CellUnderDetector, measure: str, place: str) -> Judged:
    """A ratio of a cell and its verdict."""
    ratio, said = (getattr(getattr(part, measure), place) for part in (cell.improvement, cell.verdict))
    return Judged(ratio, said)


# Header -> measure and place of a ratio.
RATIOS = {
    "SDC, All Layers (x)": ("sdc", "overall"),
    "SDC, All Neurons (x)": ("sdc", "by_neurons"),
    "SDC, Head Alone (x)": ("sdc", "head"),
    "Mismatches, All Layers (x)": ("mismatch", "overall"),
    "DeltaLoss, Head Alone (x)": ("delta_loss", "head"),
    "DeltaLoss, Last Layer (x)": ("delta_loss", "last_layer"),
    "DeltaLoss, All Layers (x)": ("delta_loss", "overall"),
}
PUBLISHED = {"DeltaLoss, Last Layer (x)": "last_layer", "DeltaLoss, All Layers (x)": "overall"}
RELIABILITY: Compared = {
    header: (
        lambda cell, at=at: judged(cell.first, *at),
        _printed(PUBLISHED[header]) if header in PUBLISHED else _nothing,
    )
    for header, at in RATIOS.items()
}
EFFECTS: Compared = {
    f"Largest Effect Left, {name} (x)": (lambda cell, measure=measure: _largest_effect(cell, measure), _nothing)
    for measure, name in (("sdc", "SDC"), ("delta_loss", "DeltaLoss"))
}
TOP2DIFF: Compared = {"Improvement in Top2Diff (points)": (lambda cell: cell.top2diff.times(100), _printed("top2diff"))}
TRAININGS: Compared = {"Trainings": (lambda cell: len(cell.seeds), _nothing)}

TABLE1 = PLACE | ACCURACY | COST | RELIABILITY | TOP2DIFF | TRAININGS
TABLE2 = {header: column for header, column in TABLE1.items() if header not in COST}
TABLE3 = PLACE | INITIALISATION | RELIABILITY | EFFECTS | TRAININGS
HEADS = (
    "DeltaLoss in nats. Same temperature: the head's logits are scaled behind the detector, so that the largest on training "
    "images is the baseline's. Scale folded: exp(logit_scale) is in the head's weights, as in deployment. Neither changes a "
    "prediction."
)
MEASURED: Columns = {
    "Dataset": lambda row: row[0].dataset,
    "Backbone": lambda row: row[0].backbone,
    "Variant": lambda row: row[0].variant,
    "Measure": lambda row: MEASURES[row[1]],
    "Where": lambda row: PLACES[row[2]],
    "Baseline": lambda row: in_unit(row[0].first.baseline, *row[1:]),
    "Ours": lambda row: in_unit(row[0].first.own, *row[1:]),
    "Baseline / Ours (x)": lambda row: judged(row[0].first, *row[1:]),
    "Trainings": lambda row: len(row[0].seeds),
}
LAYERS: Columns = {
    "Dataset": lambda cell: cell.dataset,
    "Backbone": lambda cell: cell.backbone,
    "Variant": lambda cell: cell.variant,
    "SDC, Layers Before the Last (x)": lambda cell: judged(cell.first, "sdc", "others"),
    "DeltaLoss, Layers Before the Last (x)": lambda cell: judged(cell.first, "delta_loss", "others"),
    "Layers": lambda cell: len(cell.layers) - 1,
    **{
        f"{said}, {name}": lambda cell, said=said, measure=measure: _count(cell, measure, said)
        for measure, name in (("sdc", "SDC"), ("delta_loss", "DeltaLoss"))
        for said in ("Better", "Worse")
    },
    "Trainings": lambda cell: len(cell.seeds),
}
DETECTORS: Columns = {
    "Dataset": lambda row: row.cell.dataset,
    "Backbone": lambda row: row.cell.backbone,
    "Variant": lambda row: row.cell.variant,
    "Detector": lambda row: row.detector,
    "SDC Baseline (%)": lambda row: row.found.baseline.overall.sdc.times(100),
    "SDC Ours (%)": lambda row: row.found.own.overall.sdc.times(100),
    "DeltaLoss Baseline": lambda row: row.found.baseline.overall.delta_loss,
    "DeltaLoss Ours": lambda row: row.found.own.overall.delta_loss,
    **{header: lambda row, at=at: judged(row.found, *at) for header, at in RATIOS.items()},
    "DeltaLoss, Head Alone, Same Temperature (x)": lambda row: row.found.rescaled and row.found.rescaled.same_temperature,
    "DeltaLoss, Head Alone, Scale Folded (x)": lambda row: row.found.rescaled and row.found.rescaled.folded,
    "Non-finite Baseline (%)": lambda row: row.found.baseline.nonfinite.times(100),
    "Non-finite Ours (%)": lambda row: row.found.own.nonfinite.times(100),
}
RESILIENCE: Columns = {
    "Run": lambda run: run.run,
    "Top-1 (%)": lambda run: run.top1.times(100),
    "SDC (%)": lambda run: run.overall.sdc.times(100),
    "SDC, All Neurons (%)": lambda run: run.by_neurons.sdc.times(100),
    "SDC, Head Alone (%)": lambda run: run.head.sdc.times(100),
    "Mismatches (%)": lambda run: run.overall.mismatch.times(100),
    "Non-finite (%)": lambda run: run.overall.nonfinite.times(100),
    "FIT": lambda run: run.overall.fit,
    "DeltaLoss (nats)": lambda run: run.overall.delta_loss,
    "DeltaLoss, All Neurons (nats)": lambda run: run.by_neurons.delta_loss,
    "DeltaLoss, Head Alone (nats)": lambda run: run.head.delta_loss,
    "DeltaLoss, Last Layer (nats)": lambda run: run.last_layer.delta_loss,
    "Largest Logit": lambda run: show_number(run.largest_logit),
}


def in_unit(places: Places, measure: str, place: str) -> Estimate:
    """A measure as tables print it: rates in percent."""
    found = getattr(getattr(places, place), measure)
    return found if measure == "delta_loss" else found.times(100)


def _count(cell: Cell, measure: str, said: str) -> int | None:
    """How many layers before the last one are better or worse; unknown of one training."""
    if len(cell.seeds) == 1:
        return None
    return sum(getattr(layer.verdict, measure) == said.lower() for layer in cell.layers[:-1])


def _beside(
    columns: Compared,
    published: Sequence[Published],
    place: str,
    varies: str,
    own: Sequence[Cell],
    sources: Mapping[str, str],
) -> list[list[Any]]:
    """Rows of ours, and below each the published one at `place` about the same backbone and variant.

    varies: the field in which the rows of the published table differ. A grid that has a data set of that table shows all its
    rows, and marks those that were not run. A grid on other data sets shows only those published rows whose value of `varies`
    a row of ours has too.
    """
    printed = [row for row in published if row.place == place]
    same_data = any(row.dataset in sources.values() for row in printed)
    if not same_data:
        printed = [row for row in printed if getattr(row, varies) in {getattr(cell, varies) for cell in own}]

    def belongs(cell: Cell, row: Published) -> bool:
        fits = not same_data or sources[cell.dataset] == row.dataset
        return fits and (cell.backbone, cell.variant) == (row.backbone, row.variant)

    def ours(cells: Sequence[Cell]) -> list[list[Any]]:
        return [[value(cell) for value, _ in columns.values()] for cell in cells]

    def theirs(row: Published) -> list[Any]:
        return [value(row) for _, value in columns.values()]

    rows = ours([cell for cell in own if not any(belongs(cell, row) for row in printed)])
    for row in printed:
        found = ours([cell for cell in own if belongs(cell, row)])
        if same_data and not found:
            found = [theirs(replace(row, source="not run", numbers={}))]
        others = [
            other
            for other in published
            if other.source != row.source and other.subject == row.subject and differences(other, published)[1]
        ]
        rows += [*found, theirs(row), *map(theirs, others)]
    return rows


def _ablated(cells: Sequence[Cell]) -> list[Cell]:
    """Those whose backbone was trained in more than one way on the same data."""
    places = [(cell.dataset, cell.backbone) for cell in cells]
    return [cell for cell, place in zip(cells, places, strict=True) if places.count(place) > 1]


def _table(name: str, caption: str, columns: Columns, rows: Sequence[Any]) -> Table:
    return Table(name, caption, list(columns), [[value(row) for value in columns.values()] for row in rows])


def _audit_table(findings: Sequence[Finding]) -> Table:
    caption = (
        "What is published, against itself: tables that disagree, and claims beside what their table gives. A claim agrees "
        "where it is within half a unit of its last digit. Difference: said - other."
    )
    headers = ["What", "Said Where", "Said", "Other Place", "Other", "Difference", "Remark"]
    return Table("audit", caption, headers, [list(asdict(finding).values()) for finding in findings])


def _attention_table(closeups: Mapping[str, CloseUp]) -> Table:
    headers = [
        "Run",
        "Faults",
        "Rank Correlation",
        "Overlap",
        "Other Class or Not Finite (%)",
        "Finite Maps",
        "Maps of",
    ]
    rows = []
    for key, cam in ((key, closeup.cam) for key, closeup in closeups.items()):
        if isinstance(cam, NoCam):
            rows.append([key, cam.skipped, *[None] * (len(headers) - 2)])
            continue
        side = round(cam.places**0.5)
        where = f"{cam.layer.removeprefix('backbone.')}, {side} x {side}"
        for shift, faults in (
            (cam.weights, f"{cam.weights.flips:,} weight bits" if cam.weights else ""),
            (cam.worst, _show_fault(cam.worst) if cam.worst else ""),
        ):
            if shift:
                shown = [shift.rank_correlation, shift.overlap, shift.changed.times(100)]
                rows.append([key, faults, *shown, f"{shift.finite} of {cam.images}", where])
    confidence = " and ".join(
        dict.fromkeys(f"{closeup.cam.confidence:.4g}" for closeup in closeups.values() if isinstance(closeup.cam, Cam))
    )
    caption = (
        "Where the classifiers look (Ablation-CAM for the true class) with faults, against where they look without: Spearman's "
        "rank correlation of the maps, and intersection over union of the quarters of places that speak most for the class; 1 "
        "is no change. Weight bits are flipped at once, the same in all variants, before their last layers. The other fault is "
        "the one with the largest DeltaLoss in the run's own campaign, here on every image. Faults pass the campaign's "
        f"range detector; maps that are not finite count 0. Brackets: intervals of confidence {confidence or '-'} over images; "
        "unbounded where all images give the same, which says nothing of others."
    )
    return Table("attention", caption, headers, rows)


def _show_fault(worst: WorstShift) -> str:
    return f"{worst.layer.removeprefix('backbone.')}, {worst.target} {worst.neuron}, bit {worst.bit}"
