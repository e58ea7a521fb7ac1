"""Tables 1, 2 and 3 beside the published numbers, each of ours with its interval; an audit of what is published; and more."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd

from textguard.artifacts import write_csv, write_text
from textguard.estimates.statistics import Estimate
from textguard.params import Params, library_recipes
from textguard.report.published import Finding, Published, audit, differences, load_published
from textguard.report.results import load_cells, load_closeup, load_run, read_estimate

PROPOSED = "descriptions"
INITIALISATIONS = {"random": "random", "template": "text, one template", PROPOSED: "text, class descriptions"}


Cell = dict[str, Any]
Fields = Mapping[str, Any]
Columns = dict[str, Callable[[Cell], Any]]  # header -> its value in a row
# Header -> its value in a row of ours, and in a published one.
Compared = dict[str, tuple[Callable[[Cell], Any], Callable[[Published], Any]]]


@dataclass(frozen=True)
class Table:
    """caption, and rows of header -> value.

    A value is a text, a change in the unit of its header (float), a number as printed (Decimal), an Estimate, or None.
    """

    name: str
    caption: str
    headers: list[str]
    rows: list[list[Any]]


def tables_of(params: Params) -> list[Table]:
    """All tables of the grid in the current folder, from its stored results. Raises InvalidArtifact."""
    cells, runs = load_cells(params.runs), {key: load_run(key) for key in params.runs}
    sources = {key: dataset.source for key, dataset in params.datasets.items()}
    recipes = {run.recipe: asdict(params.recipes[run.recipe]) for run in params.runs.values()}
    closeups = {key: load_closeup(key) for key in params.runs}
    return make_tables(cells, runs, params.tables.main_dataset, sources, recipes, library_recipes(params), closeups)


def make_tables(
    cells: Sequence[Cell],
    runs: Mapping[str, Cell],
    main_dataset: str,
    sources: Mapping[str, str],
    recipes: Mapping[str, Fields],
    library: Mapping[str, Fields],
    closeups: Mapping[str, Cell],
) -> list[Table]:
    """All tables: of cells (see textguard.report.results), of runs and of looks at them, as metrics/cells.json,
    metrics/results/ and metrics/closeup/ hold them.

    sources: data set -> where it comes from, which is how the published tables call it. recipes: those in use, name -> all
    fields; library: the same as the library has them, before params.yaml overrides some.
    """
    proposed = [cell for cell in cells if cell["variant"] == PROPOSED]
    interval = " and ".join(dict.fromkeys(f"{run['confidence']:.4g}" for run in runs.values()))
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
    main = [cell for cell in proposed if cell["dataset"] == main_dataset]
    ablated = _ablated(cells)
    varied = [{**cell, **found, "detector": name} for cell in cells for name, found in cell["detectors"].items()]

    def compared(name: str, what: str, columns: Compared, *choice: Any) -> Table:
        return Table(name, f"{what} {beside}", list(columns), _beside(columns, published, *choice))

    only_main = {main_dataset: sources[main_dataset]}
    return [
        compared("table1", "Backbones, baseline against text-guided.", TABLE1, "paper Table 1", "backbone", main, only_main),
        compared("table2", "Data sets, baseline against text-guided.", TABLE2, "paper Table 2", "dataset", proposed, sources),
        compared(
            "table3", "Starts of the head, each against the baseline.", TABLE3, "paper Table 3", "variant", ablated, sources
        ),
        _table("detectors", f"The same faults under each range detector. DeltaLoss in nats. {note}", DETECTORS, varied),
        _table("resilience", f"Every run. {per_run}", RESILIENCE, list(runs.values())),
        _attention_table(closeups),
        _audit_table(audit(published)),
        _recipe_table(recipes, library),
    ]


def _estimate(*path: str, times: float = 1.0) -> Callable[[Cell], Estimate]:
    def read(cell: Cell) -> Estimate:
        for step in path:
            cell = cell[step]
        return read_estimate(cell).times(times)

    return read


def _printed(column: str) -> Callable[[Published], Any]:
    return lambda row: row.numbers.get(column)


def _verdict(part: str) -> tuple[Callable[[Cell], Any], Callable[[Published], Any]]:
    return lambda cell: cell["verdict"][part], lambda _: None


def _initialisation(variant: str) -> str:
    return INITIALISATIONS.get(variant, variant)


PLACE: Compared = {
    "Dataset": (lambda cell: cell["dataset"], lambda row: row.dataset),
    "Backbone": (lambda cell: cell["backbone"], lambda row: row.backbone),
    "Source": (lambda _: "this grid", lambda row: row.source),
}
INITIALISATION: Compared = {
    "Projection Initialization": (lambda cell: _initialisation(cell["variant"]), lambda row: _initialisation(row.variant))
}
ACCURACY: Compared = {
    "Acc. Baseline (%)": (_estimate("top1_baseline", times=100), _printed("top1_baseline")),
    "Acc. Ours (%)": (_estimate("top1", times=100), _printed("top1")),
}
COST: Compared = {
    "Additional Params (M)": (lambda cell: cell["parameters"] / 1e6, _printed("parameters")),
    "Additional FLOPs (M multiply-adds)": (lambda cell: cell["multiply_adds"] / 1e6, _printed("multiply_adds")),
}
RELIABILITY: Compared = {
    "Improvement in Reliability, Last Layer (x)": (_estimate("last_layer"), _printed("last_layer")),
    "Last Layer Verdict": _verdict("last_layer"),
    "Improvement in Reliability, Overall (x)": (_estimate("overall"), _printed("overall")),
    "Overall Verdict": _verdict("overall"),
}
TOP2DIFF: Compared = {"Improvement in Top2Diff (points)": (_estimate("top2diff", times=100), _printed("top2diff"))}
TRAININGS: Compared = {"Trainings": (lambda cell: len(cell["seeds"]), lambda _: None)}

TABLE1 = PLACE | ACCURACY | COST | RELIABILITY | TOP2DIFF | TRAININGS
TABLE2 = {header: column for header, column in TABLE1.items() if header not in COST}
TABLE3 = PLACE | INITIALISATION | RELIABILITY | TRAININGS
DETECTORS: Columns = {
    "Dataset": lambda cell: cell["dataset"],
    "Backbone": lambda cell: cell["backbone"],
    "Variant": lambda cell: cell["variant"],
    "Detector": lambda cell: cell["detector"],
    "DeltaLoss Baseline": _estimate("overall_baseline"),
    "DeltaLoss Ours": _estimate("overall_guided"),
    "Overall (x)": _estimate("overall"),
    "Last Layer (x)": _estimate("last_layer"),
    "Head Alone (x)": _estimate("head"),
    "Non-finite Baseline (%)": _estimate("nonfinite_baseline", times=100),
    "Non-finite Ours (%)": _estimate("nonfinite_guided", times=100),
}
RESILIENCE: Columns = {
    "Run": lambda run: run["run"],
    "Top-1 (%)": _estimate("top1", times=100),
    "DeltaLoss (nats)": _estimate("overall", "delta_loss"),
    "DeltaLoss, by Neurons (nats)": _estimate("overall", "delta_loss_by_neurons"),
    "DeltaLoss, Last Layer (nats)": _estimate("last_layer", "delta_loss"),
    "Mismatches (%)": _estimate("overall", "mismatch", times=100),
    "SDC (%)": _estimate("overall", "sdc", times=100),
    "Non-finite (%)": _estimate("overall", "nonfinite", times=100),
    "FIT": _estimate("overall", "fit"),
    "Largest Logit": lambda run: _digits(run["largest_logit"]),
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

    A grid with a data set of the published table shows all of its rows, and which of them were not run. Any other shows those
    that share with a row of ours what the table varies.
    """
    printed = [row for row in published if row.place == place]
    same_data = any(row.dataset in sources.values() for row in printed)
    if not same_data:
        printed = [row for row in printed if getattr(row, varies) in {cell[varies] for cell in own}]

    def belongs(cell: Cell, row: Published) -> bool:
        fits = not same_data or sources[cell["dataset"]] == row.dataset
        return fits and (cell["backbone"], cell["variant"]) == (row.backbone, row.variant)

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
    places = [(cell["dataset"], cell["backbone"]) for cell in cells]
    return [cell for cell, place in zip(cells, places, strict=True) if places.count(place) > 1]


def _table(name: str, caption: str, columns: Columns, cells: Sequence[Cell]) -> Table:
    return Table(name, caption, list(columns), [[value(cell) for value in columns.values()] for cell in cells])


def _audit_table(findings: Sequence[Finding]) -> Table:
    caption = (
        "What is published, against itself: tables that disagree, and claims beside what their table gives. A claim agrees "
        "where it is within half a unit of its last digit. Difference: said - other."
    )
    headers = ["What", "Said Where", "Said", "Other Place", "Other", "Difference", "Remark"]
    return Table("audit", caption, headers, [list(asdict(finding).values()) for finding in findings])


# Field -> the field and its values under which it is used.
USED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "momentum": ("optimizer", ("sgd",)),
    "betas": ("optimizer", ("adamw",)),
    "eps": ("optimizer", ("adamw",)),
    "step_epochs": ("schedule", ("step", "exponential")),
    "gamma": ("schedule", ("step", "exponential")),
    "min_learning_rate": ("schedule", ("cosine",)),
    "ema_decay": ("ema", (True,)),
    "ema_steps": ("ema", (True,)),
    "crop_scale": ("crop", ("random_resized",)),
    "crop_padding": ("crop", ("padded",)),
}
ZERO_IS_OFF = ("label_smoothing", "mixup", "cutmix", "clip_norm", "drop_path", "flip", "random_erasing", "warmup_epochs")
OFF = {**dict.fromkeys(ZERO_IS_OFF, 0), "repeated_augmentation": 1}


def _attention_table(closeups: Mapping[str, Cell]) -> Table:
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
    for key, cam in ((key, closeup["cam"]) for key, closeup in closeups.items()):
        for state in ("weights", "worst"):
            if state not in cam:
                continue
            found = cam[state]
            faults = (
                f"{found['flips']:,} weight bits"
                if state == "weights"
                else f"{found['layer'].removeprefix('backbone.')}, {found['target']} {found['neuron']}, bit {found['bit']}"
            )
            shifts = [read_estimate(found[name]) for name in ("rank_correlation", "overlap")]
            changed = read_estimate(found["changed"]).times(100)
            side = round(cam["places"] ** 0.5)
            where = f"{cam['layer'].removeprefix('backbone.')}, {side} x {side}"
            rows.append([key, faults, *shifts, changed, f"{found['finite']} of {cam['images']}", where])
        if "skipped" in cam:
            rows.append([key, cam["skipped"], *[None] * (len(headers) - 2)])
    caption = (
        "Where the classifiers look (Ablation-CAM for the true class) with faults, against where they look without: Spearman's "
        "rank correlation of the maps, and intersection over union of the quarters of places that speak most for the class; 1 "
        "is no change. Weight bits are flipped at once, the same in all variants, before their last layers. The other fault is "
        "the one with the largest DeltaLoss in the run's own campaign, here on every image. Faults pass the campaign's "
        "range detector; maps that are not finite count 0. Brackets: intervals of confidence 0.99 over images; unbounded where "
        "all images give the same, which says nothing of others."
    )
    return Table("attention", caption, headers, rows)


def _recipe_table(recipes: Mapping[str, Fields], library: Mapping[str, Fields]) -> Table:
    names = dict.fromkeys(name for fields in recipes.values() for name in fields)
    rows = [[name, *(_show_setting(name, recipes[key], library.get(key, {})) for key in recipes)] for name in names]
    caption = (
        "How the classifiers were trained: one column per recipe in use. In brackets, what stands in the library's recipe and "
        "params.yaml overrides. -: without effect in this recipe."
    )
    return Table("recipes", caption, ["Field", *recipes], rows)


def _show_setting(name: str, fields: Fields, library: Fields) -> str | None:
    """A field's value, beside that of the library where it is another; None where the field is absent or without effect."""
    condition, values = USED.get(name, (name, (fields.get(name),)))
    if name not in fields or fields.get(condition, values[0]) not in values:
        return None
    shown = _setting(name, fields[name])
    before = _setting(name, library[name]) if name in library else shown
    return shown if shown == before else f"{shown} (library: {before})"


def _setting(name: str, value: Any) -> str:
    if value is None:
        return "as weight_decay" if name.endswith("_weight_decay") else "the network's own"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in OFF and value == OFF[name]:
        return "off"
    if isinstance(value, float):
        return f"{Decimal(str(value)):f}"  # 0.00004, not 4e-05
    return ", ".join(_setting("", part) for part in value) if isinstance(value, list | tuple) else str(value)


def write_table(table: Table, folder: Path) -> None:
    """Write a table as Markdown, CSV (estimates spread over value, low, high, n) and LaTeX."""
    write_text(folder / f"{table.name}.md", as_markdown(table))
    write_csv(folder / f"{table.name}.csv", as_frame(table))
    write_text(folder / f"{table.name}.tex", as_latex(table))


def as_markdown(table: Table) -> str:
    """The table as GitHub Markdown, its caption below."""
    lines = [table.headers, ["---"] * len(table.headers), *_cells(table, show_estimate, _escape_markdown)]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{body}\n\n{table.caption}\n"


def as_frame(table: Table) -> pd.DataFrame:
    """One row per row, full precision; a column with an Estimate becomes four."""
    frame = {}
    for header, *values in zip(table.headers, *table.rows, strict=True):
        sampled = [value if isinstance(value, Estimate) else None for value in values]
        frame[header] = [value.value if isinstance(value, Estimate) else value for value in values]
        if any(sampled):
            for name in ("low", "high", "n"):
                frame[f"{header} {name}"] = [getattr(value, name, None) for value in sampled]
    return pd.DataFrame(frame, dtype=object)  # or whole numbers beside empty cells would become 1.0


def as_latex(table: Table) -> str:
    """The table as a LaTeX `table` environment for the booktabs package."""
    head = " & ".join(_escape_latex(header) for header in table.headers)
    body = "".join("    " + " & ".join(line) + r" \\" + "\n" for line in _cells(table, _show_latex, _escape_latex))
    return (
        "\\begin{table}\n  \\centering\n"
        f"  \\caption{{{_escape_latex(table.caption)}}}\n"
        f"  \\begin{{tabular}}{{{'l' * len(table.headers)}}}\n    \\toprule\n    {head} \\\\\n    \\midrule\n"
        f"{body}    \\bottomrule\n  \\end{{tabular}}\n\\end{{table}}\n"
    )


def _cells(table: Table, show: Callable[[Estimate], str], escape: Callable[[str], str]) -> list[list[str]]:
    return [[show_cell(value, show, escape) for value in row] for row in table.rows]


def show_cell(value: Any, show: Callable[[Estimate], str] | None = None, escape: Callable[[str], str] = str) -> str:
    """One value of a table as text; an Estimate with its interval."""
    if isinstance(value, Estimate):
        return (show or show_estimate)(value)
    if value is None:
        return "-"
    return f"{value:+.2f}" if isinstance(value, float) else escape(str(value))


def show_estimate(estimate: Estimate) -> str:
    """An estimate with three digits and its interval in brackets, or `(exact)`."""
    if not math.isfinite(estimate.value):
        return f"< {_digits(estimate.high)}" if math.isfinite(estimate.high) else "undefined"
    if estimate.low == estimate.high:
        return f"{_digits(estimate.value)} (exact)"
    return f"{_digits(estimate.value)} [{_digits(estimate.low)}, {_digits(estimate.high)}]"


def _digits(number: float) -> str:
    """A number with three digits, or all that are before the point."""
    if not math.isfinite(number):
        return "unbounded"
    size = abs(number)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{number:.1e}"
    if size >= 100:
        return f"{number:,.0f}"
    return f"{number:#.3g}".removesuffix(".") if size else "0"


def _show_latex(estimate: Estimate) -> str:
    return show_estimate(estimate).replace("[", "{[}").replace("]", "{]}")


def _escape_markdown(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    return "".join(f"\\{character}" if character in "\\|*_`[]" else character for character in escaped)


def _escape_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
