"""Tables 1, 2 and 3 beside the published numbers, each of ours with its interval; an audit of what is published; and more."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from textguard.analysis.files import load_cells, load_closeup, load_results
from textguard.params import Params, library_recipes
from textguard.report.published import Finding, Published, audit, differences, load_published
from textguard.report.recipe_table import Fields, recipe_table
from textguard.report.rendering import Table, show_number
from textguard.schema.closeup import Cam, CloseUp, NoCam, WorstShift
from textguard.schema.results import PROPOSED, Cell, CellUnderDetector, RunResult

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
    cells, runs = load_cells(params.runs), load_results(params.runs)
    sources = {key: dataset.source for key, dataset in params.datasets.items()}
    recipes = {name: {"recipe": trained.recipe, **asdict(trained)} for name, trained in params.backbones.items()}
    closeups = {key: load_closeup(key) for key in params.runs}
    return make_tables(cells, runs, params.main_dataset, sources, recipes, library_recipes(params), closeups)


def make_tables(
    cells: Sequence[Cell],
    runs: Mapping[str, RunResult],
    main_dataset: str,
    sources: Mapping[str, str],
    recipes: Mapping[str, Fields],
    library: Mapping[str, Fields],
    closeups: Mapping[str, CloseUp],
) -> list[Table]:
    """All tables: of cells, of runs and of close-ups.

    sources: data set -> where it comes from, which is how the published tables call it. recipes, library: see `recipe_table`.
    """
    proposed = [cell for cell in cells if cell.variant == PROPOSED]
    interval = " and ".join(dict.fromkeys(f"{run.confidence:.4g}" for run in runs.values()))
    note = (
        f"Brackets: intervals of confidence {interval}, over test images (accuracy, Top2Diff) or injections (improvements), "
        "over trainings where there are several; of one training, the spread between trainings is not in it. Exact: every "
        "fault was tried, or what was sampled does not show in 16 digits."
    )
    beside = (
        f"{note} Rows from paper (arXiv 2311.14062) and README are as published, without intervals, the README's only where it "
        "differs; on another data set or backbone they are not comparable."
    )
    per_run = (
        "SDC: a changed class, or a loss that is not finite. DeltaLoss and rates are plain means over layers, but where "
        "neurons are named; FIT: failures in 10^9 hours, its upper bound where no SDC was seen. Largest logit: in magnitude, "
        "over the training set; behind the detector 'profiled', a fault in the last layer makes none larger. Brackets: "
        f"intervals of confidence {interval} over injections, of top-1 over test images."
    )
    published = load_published()
    main = [cell for cell in proposed if cell.dataset == main_dataset]
    ablated = _ablated(cells)
    varied = [UnderDetector(cell, name, found) for cell in cells for name, found in cell.detectors.items()]

    def compared(name: str, what: str, columns: Compared, *choice: Any) -> Table:
        return Table(name, f"{what} {beside}", list(columns), _beside(columns, published, *choice))

    only_main = {main_dataset: sources[main_dataset]}
    return [
        compared("table1", "Backbones, baseline against text-guided.", TABLE1, "paper Table 1", "backbone", main, only_main),
        compared("table2", "Data sets, baseline against text-guided.", TABLE2, "paper Table 2", "dataset", proposed, sources),
        compared(
            "table3", "Starts of the head, each against the baseline.", TABLE3, "paper Table 3", "variant", ablated, sources
        ),
        _table("detectors", f"The same faults under each range detector. {HEADS} {note}", DETECTORS, varied),
        _table("resilience", f"Every run. {per_run}", RESILIENCE, list(runs.values())),
        _attention_table(closeups),
        _audit_table(audit(published)),
        recipe_table(recipes, library),
    ]


def _printed(column: str) -> Callable[[Published], Any]:
    return lambda row: row.numbers.get(column)


def _nothing(_: Published) -> None:
    """Of a column that published tables lack."""


def _initialisation(variant: str) -> str:
    return INITIALISATIONS.get(variant, variant)


PLACE: Compared = {
    "Dataset": (lambda cell: cell.dataset, lambda row: row.dataset),
    "Backbone": (lambda cell: cell.backbone, lambda row: row.backbone),
    "Source": (lambda _: "this grid", lambda row: row.source),
}
INITIALISATION: Compared = {
    "Projection Initialization": (lambda cell: _initialisation(cell.variant), lambda row: _initialisation(row.variant))
}
ACCURACY: Compared = {
    "Acc. Baseline (%)": (lambda cell: cell.top1_baseline.times(100), _printed("top1_baseline")),
    "Acc. Ours (%)": (lambda cell: cell.top1.times(100), _printed("top1")),
}
COST: Compared = {
    "Additional Params (M)": (lambda cell: cell.parameters / 1e6, _printed("parameters")),
    "Additional FLOPs (M multiply-adds)": (lambda cell: cell.multiply_adds / 1e6, _printed("multiply_adds")),
}
RELIABILITY: Compared = {
    "Improvement in Reliability, Last Layer (x)": (lambda cell: cell.last_layer, _printed("last_layer")),
    "Last Layer Verdict": (lambda cell: cell.verdict.last_layer, _nothing),
    "Improvement in Reliability, Overall (x)": (lambda cell: cell.overall, _printed("overall")),
    "Overall Verdict": (lambda cell: cell.verdict.overall, _nothing),
}
TOP2DIFF: Compared = {"Improvement in Top2Diff (points)": (lambda cell: cell.top2diff.times(100), _printed("top2diff"))}
TRAININGS: Compared = {"Trainings": (lambda cell: len(cell.seeds), _nothing)}

TABLE1 = PLACE | ACCURACY | COST | RELIABILITY | TOP2DIFF | TRAININGS
TABLE2 = {header: column for header, column in TABLE1.items() if header not in COST}
TABLE3 = PLACE | INITIALISATION | RELIABILITY | TRAININGS
HEADS = (
    "DeltaLoss in nats. Head alone: against the baseline's last layer. Same temperature: its logits are scaled behind the "
    "detector, so that the largest on training images is the baseline's, which changes no prediction. Scale folded: "
    "exp(logit_scale) is in the head's weights, as in deployment."
)
DETECTORS: Columns = {
    "Dataset": lambda row: row.cell.dataset,
    "Backbone": lambda row: row.cell.backbone,
    "Variant": lambda row: row.cell.variant,
    "Detector": lambda row: row.detector,
    "DeltaLoss Baseline": lambda row: row.found.overall_baseline,
    "DeltaLoss Ours": lambda row: row.found.overall_guided,
    "Overall (x)": lambda row: row.found.overall,
    "Last Layer (x)": lambda row: row.found.last_layer,
    "Head Alone (x)": lambda row: row.found.head,
    "Head Alone, Same Temperature (x)": lambda row: row.found.head_same_temperature,
    "Head Alone, Scale Folded (x)": lambda row: row.found.head_folded,
    "Non-finite Baseline (%)": lambda row: row.found.nonfinite_baseline.times(100),
    "Non-finite Ours (%)": lambda row: row.found.nonfinite_guided.times(100),
}
RESILIENCE: Columns = {
    "Run": lambda run: run.run,
    "Top-1 (%)": lambda run: run.top1.times(100),
    "DeltaLoss (nats)": lambda run: run.overall.delta_loss,
    "DeltaLoss, by Neurons (nats)": lambda run: run.overall.delta_loss_by_neurons,
    "DeltaLoss, Last Layer (nats)": lambda run: run.last_layer.delta_loss,
    "Mismatches (%)": lambda run: run.overall.mismatch.times(100),
    "SDC (%)": lambda run: run.overall.sdc.times(100),
    "Non-finite (%)": lambda run: run.overall.nonfinite.times(100),
    "FIT": lambda run: run.overall.fit,
    "Largest Logit": lambda run: show_number(run.largest_logit),
}


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
