"""Tables 1, 2 and 3 in the paper's columns, holding only rows that were run, each number with its interval; and two more."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from textguard.artifacts import write_csv, write_text
from textguard.faults.statistics import Estimate
from textguard.report.results import read_estimate

PROPOSED = "descriptions"
INITIALISATIONS = {"random": "random", "template": "text, one template", PROPOSED: "text, class descriptions"}


Cell = dict[str, Any]
Columns = dict[str, Callable[[Cell], Any]]  # header -> its value in a row


@dataclass(frozen=True)
class Table:
    """caption, and rows of header -> value; a value is a text, a number with its unit in the header, or an Estimate."""

    name: str
    caption: str
    headers: list[str]
    rows: list[list[Any]]


def make_tables(cells: Sequence[Cell], runs: Mapping[str, Cell], main_dataset: str) -> list[Table]:
    """All tables: of cells (see textguard.report.results) and of runs, as metrics/cells.json and metrics/results/ hold them."""
    proposed = [cell for cell in cells if cell["variant"] == PROPOSED]
    interval = " and ".join(dict.fromkeys(f"{run['confidence']:.4g}" for run in runs.values()))
    note = (
        f"Brackets: intervals of confidence {interval}, over test images (accuracy, Top2Diff) or injections (improvements), "
        "over trainings where there are several; of one training, the spread between trainings is not in it. Exact: every "
        "fault was tried, or what was sampled does not show in 16 digits."
    )
    per_run = (
        "SDC: a changed class, or a loss that is not finite. DeltaLoss and rates are plain means over layers, but where "
        "neurons are named; FIT: failures in 10^9 hours, its upper bound where no SDC was seen. Brackets: intervals of "
        f"confidence {interval} over injections."
    )
    varied = [{**cell, **found, "detector": name} for cell in cells for name, found in cell["detectors"].items()]
    return [
        _table("table1", f"Backbones, baseline against text-guided. {note}", TABLE1, _of(proposed, main_dataset)),
        _table("table2", f"Data sets, baseline against text-guided. {note}", TABLE2, proposed),
        _table("table3", f"What the head starts from, each against the baseline. {note}", TABLE3, _ablated(cells)),
        _table("detectors", f"The same faults under each range detector. DeltaLoss in nats. {note}", DETECTORS, varied),
        _table("resilience", f"Every run. {per_run}", RESILIENCE, list(runs.values())),
    ]


def _estimate(*path: str, times: float = 1.0) -> Callable[[Cell], Estimate]:
    def read(cell: Cell) -> Estimate:
        for step in path:
            cell = cell[step]
        return read_estimate(cell).times(times)

    return read


DATASET: Columns = {"Dataset": lambda cell: cell["dataset"]}
BACKBONE: Columns = {"Backbone": lambda cell: cell["backbone"]}
INITIALISATION: Columns = {"Projection Initialization": lambda cell: INITIALISATIONS.get(cell["variant"], cell["variant"])}
ACCURACY: Columns = {
    "Acc. Baseline (%)": _estimate("top1_baseline", times=100),
    "Acc. Ours (%)": _estimate("top1", times=100),
}
COST: Columns = {
    "Additional Params (M)": lambda cell: cell["parameters"] / 1e6,
    "Additional FLOPs (M multiply-adds)": lambda cell: cell["multiply_adds"] / 1e6,
}
LAST_LAYER: Columns = {"Improvement in Reliability, Last Layer (x)": _estimate("last_layer")}
OVERALL: Columns = {"Improvement in Reliability, Overall (x)": _estimate("overall")}
VERDICT: Columns = {"Overall Verdict": lambda cell: cell["verdict"]["overall"]}
TOP2DIFF: Columns = {"Improvement in Top2Diff (points)": _estimate("top2diff", times=100)}
TRAININGS: Columns = {"Trainings": lambda cell: len(cell["seeds"])}

TABLE1 = BACKBONE | ACCURACY | COST | LAST_LAYER | OVERALL | VERDICT | TOP2DIFF | TRAININGS
TABLE2 = DATASET | BACKBONE | ACCURACY | LAST_LAYER | OVERALL | VERDICT | TOP2DIFF | TRAININGS
TABLE3 = (
    BACKBONE
    | INITIALISATION
    | LAST_LAYER
    | {"Improvement in Reliability, Across Backbone (x)": _estimate("overall")}
    | VERDICT
    | TRAININGS
)
DETECTORS: Columns = {
    "Dataset": lambda cell: cell["dataset"],
    "Backbone": lambda cell: cell["backbone"],
    "Variant": lambda cell: cell["variant"],
    "Detector": lambda cell: cell["detector"],
    "DeltaLoss Baseline": _estimate("overall_baseline"),
    "DeltaLoss Ours": _estimate("overall_guided"),
    "Overall (x)": _estimate("overall"),
    "Last Layer (x)": _estimate("last_layer"),
    "Non-finite Baseline (%)": _estimate("nonfinite_baseline", times=100),
    "Non-finite Ours (%)": _estimate("nonfinite_guided", times=100),
}
RESILIENCE: Columns = {
    "Run": lambda run: run["run"],
    "DeltaLoss (nats)": _estimate("overall", "delta_loss"),
    "DeltaLoss, by Neurons (nats)": _estimate("overall", "delta_loss_by_neurons"),
    "DeltaLoss, Last Layer (nats)": _estimate("last_layer", "delta_loss"),
    "Mismatches (%)": _estimate("overall", "mismatch", times=100),
    "SDC (%)": _estimate("overall", "sdc", times=100),
    "Non-finite (%)": _estimate("overall", "nonfinite", times=100),
    "FIT": _estimate("overall", "fit"),
}


def _of(cells: Sequence[Cell], dataset: str) -> list[Cell]:
    return [cell for cell in cells if cell["dataset"] == dataset]


def _ablated(cells: Sequence[Cell]) -> list[Cell]:
    """Those whose backbone was trained in more than one way on the same data."""
    places = [(cell["dataset"], cell["backbone"]) for cell in cells]
    return [cell for cell, place in zip(cells, places, strict=True) if places.count(place) > 1]


def _table(name: str, caption: str, columns: Columns, cells: Sequence[Cell]) -> Table:
    return Table(name, caption, list(columns), [[value(cell) for value in columns.values()] for cell in cells])


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
    """One row per row, full precision; an Estimate fills four columns."""
    records = []
    for row in table.rows:
        record: dict[str, Any] = {}
        for header, value in zip(table.headers, row, strict=True):
            if isinstance(value, Estimate):
                record |= {header: value.value, f"{header} low": value.low, f"{header} high": value.high}
                record[f"{header} n"] = value.n
            else:
                record[header] = value
        records.append(record)
    return pd.DataFrame(records, columns=None if records else table.headers)


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
