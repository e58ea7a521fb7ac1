"""Tables 1, 2 and 3 in the paper's columns, holding only rows that were run, each number with its 99 % interval."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from textguard.artifacts import write_csv, write_text
from textguard.faults.statistics import Estimate
from textguard.report.results import Comparison, Result

PROPOSED = "descriptions"
INITIALISATIONS = {"random": "random", "template": "text, one template", PROPOSED: "text, class descriptions"}


@dataclass(frozen=True)
class Table:
    """caption, and rows of header -> value; a value is a text, a number with its unit in the header, or an Estimate."""

    name: str
    caption: str
    headers: list[str]
    rows: list[list[Any]]


def table1(comparisons: Sequence[Comparison], dataset: str) -> Table:
    """Accuracy, size and resilience per backbone, on the main data set."""
    rows = [
        [
            c.guided.run.backbone,
            _percent(c.baseline.top1),
            _percent(c.guided.top1),
            (c.guided.parameters - c.baseline.parameters) / 1e6,
            (c.guided.multiply_adds - c.baseline.multiply_adds) / 1e6,
            c.last_layer,
            c.overall,
            _percent(c.top2diff),
        ]
        for c in comparisons
        if c.guided.run.variant == PROPOSED and c.guided.run.dataset == dataset
    ]
    headers = [
        "Backbone",
        "Acc. Baseline (%)",
        "Acc. Ours (%)",
        "Additional Params (M)",
        "Additional FLOPs (M multiply-adds)",
        "Improvement in Reliability, Last Layer (x)",
        "Improvement in Reliability, Overall (x)",
        "Improvement in Top2Diff (points)",
    ]
    return Table("table1", f"Backbones on {dataset}, baseline against text-guided. {NOTE}", headers, rows)


def table2(comparisons: Sequence[Comparison]) -> Table:
    """Accuracy and resilience per data set and backbone."""
    rows = [
        [
            c.guided.run.dataset,
            c.guided.run.backbone,
            _percent(c.baseline.top1),
            _percent(c.guided.top1),
            c.last_layer,
            c.overall,
            _percent(c.top2diff),
        ]
        for c in comparisons
        if c.guided.run.variant == PROPOSED
    ]
    headers = [
        "Dataset",
        "Backbone",
        "Acc. Baseline (%)",
        "Acc. Ours (%)",
        "Improvement in Reliability, Last Layer (x)",
        "Improvement in Reliability, Overall (x)",
        "Improvement in Top2Diff (points)",
    ]
    return Table("table2", f"Data sets, baseline against text-guided. {NOTE}", headers, rows)


def table3(comparisons: Sequence[Comparison]) -> Table:
    """Resilience by what the head starts from, for backbones with more than one such variant."""
    variants: dict[tuple[str, str], set[str]] = {}
    for c in comparisons:
        variants.setdefault((c.guided.run.dataset, c.guided.run.backbone), set()).add(c.guided.run.variant)
    rows = [
        [c.guided.run.backbone, INITIALISATIONS.get(c.guided.run.variant, c.guided.run.variant), c.last_layer, c.overall]
        for c in comparisons
        if len(variants[c.guided.run.dataset, c.guided.run.backbone]) > 1
    ]
    headers = [
        "Backbone",
        "Projection Initialization",
        "Improvement in Reliability, Last Layer (x)",
        "Improvement in Reliability, Across Backbone (x)",
    ]
    return Table("table3", f"What the head starts from, each against the baseline. {NOTE}", headers, rows)


NOTE = (
    "Brackets: 99 % interval over test images (accuracy, Top2Diff) or injections (improvements); one training per row, "
    "so the spread between trainings is not in it."
)


def write_table(table: Table, folder: Path) -> None:
    """Write a table as Markdown, CSV (estimates spread over value, low, high, n) and LaTeX."""
    write_text(folder / f"{table.name}.md", as_markdown(table))
    write_csv(folder / f"{table.name}.csv", as_frame(table))
    write_text(folder / f"{table.name}.tex", as_latex(table))


def as_markdown(table: Table) -> str:
    """The table as GitHub Markdown, its caption below."""
    lines = [table.headers, ["---"] * len(table.headers), *_cells(table, _show_plain, _escape_markdown)]
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


def summary(
    results: Sequence[Result], comparisons: Sequence[Comparison], last_layer_weights: str
) -> dict[str, dict[str, float | None]]:
    """Run key -> its headline numbers, for `dvc metrics diff` and `dvc exp show`; accuracies in percent."""
    lines: dict[str, dict[str, float | None]] = {}
    for result in results:
        lines[result.key] = {
            "top1": _round(100 * result.top1.value),
            "top2diff": _round(100 * result.top2diff.value),
            "delta_loss": _round(result.overall.value),
            "last_layer": _round(result.last_layer(last_layer_weights).value),
            "mismatch": _round(100 * result.mismatch.value),
        }
    for c in comparisons:
        lines[c.guided.key] |= {"x_last": _round(c.last_layer.value), "x_overall": _round(c.overall.value)}
    return lines


def _round(number: float) -> float | None:
    return float(f"{number:.6g}") if math.isfinite(number) else None


def _percent(share: Estimate) -> Estimate:
    return Estimate(100 * share.value, 100 * share.low, 100 * share.high, share.n)


def _cells(table: Table, show: Callable[[Estimate], str], escape: Callable[[str], str]) -> list[list[str]]:
    def cell(value: Any) -> str:
        if isinstance(value, Estimate):
            return show(value)
        return f"{value:+.2f}" if isinstance(value, float) else escape(str(value))

    return [[cell(value) for value in row] for row in table.rows]


def _show_plain(estimate: Estimate) -> str:
    if not math.isfinite(estimate.value):
        return "undefined"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _show_latex(estimate: Estimate) -> str:
    return _show_plain(estimate).replace("[", "{[}").replace("]", "{]}")


def _escape_markdown(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    return "".join(f"\\{character}" if character in "\\|*_`[]" else character for character in escaped)


def _escape_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
