"""A table and how it is written: Markdown, CSV and LaTeX, each estimate with its interval."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from textguard.artifacts import write_csv, write_text
from textguard.estimates.statistics import Estimate
from textguard.report.escaping import for_latex, for_markdown


@dataclass(frozen=True)
class Judged:
    """An estimate, and what its interval says: see `Verdict`."""

    estimate: Estimate
    verdict: str

    @property
    def in_short(self) -> str:
        """The verdict without its reason or confidence, which captions give."""
        return re.split(":| at ", self.verdict)[0]


@dataclass(frozen=True)
class PerTraining(Judged):
    """An estimate over trainings, what its interval says, and what each training gives by itself: seed -> value.

    limits: ends of the logarithmic axis on which they are drawn.
    """

    values: Mapping[int, float]
    limits: tuple[float, float]


@dataclass(frozen=True)
class Table:
    """caption, and rows of header -> value.

    A value is a text, a change in the unit of its header (float), a number as printed (Decimal), an Estimate, a Judged one, or
    None.
    """

    name: str
    caption: str
    headers: list[str]
    rows: list[list[Any]]


def write_table(table: Table, folder: Path) -> None:
    """Write a table as Markdown, CSV (estimates spread over value, low, high, n) and LaTeX."""
    write_text(folder / f"{table.name}.md", as_markdown(table))
    write_csv(folder / f"{table.name}.csv", as_frame(table))
    write_text(folder / f"{table.name}.tex", as_latex(table))


def as_markdown(table: Table) -> str:
    """The table as GitHub Markdown, its caption below."""
    lines = [[for_markdown(header) for header in table.headers], ["---"] * len(table.headers), *_cells(table, _as_markdown)]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{body}\n\n{table.caption}\n"


def as_frame(table: Table) -> pd.DataFrame:
    """One row per row, full precision; a column with an Estimate becomes four, of judged ones five."""
    frame = {}
    for header, *values in zip(table.headers, *table.rows, strict=True):
        sampled = [estimate_of(value) for value in values]
        frame[header] = [value if estimate is None else estimate.value for value, estimate in zip(values, sampled, strict=True)]
        if any(sampled):
            for name in ("low", "high", "n"):
                frame[f"{header} {name}"] = [getattr(value, name, None) for value in sampled]
        if any(isinstance(value, Judged) for value in values):
            frame[f"{header} verdict"] = [getattr(value, "verdict", None) for value in values]
    return pd.DataFrame(frame, dtype=object)  # or whole numbers beside empty cells would become 1.0


def as_latex(table: Table) -> str:
    """The table as a LaTeX `table` environment for the booktabs package."""
    head = " & ".join(for_latex(header) for header in table.headers)
    body = "".join(
        "    " + " & ".join(line) + r" \\" + "\n" for line in _cells(table, lambda value: for_latex(show_cell(value)))
    )
    return (
        "\\begin{table}\n  \\centering\n"
        f"  \\caption{{{for_latex(table.caption)}}}\n"
        f"  \\begin{{tabular}}{{{'l' * len(table.headers)}}}\n    \\toprule\n    {head} \\\\\n    \\midrule\n"
        f"{body}    \\bottomrule\n  \\end{{tabular}}\n\\end{{table}}\n"
    )


def estimate_of(value: Any) -> Estimate | None:
    """What a cell of a table estimates."""
    value = value.estimate if isinstance(value, Judged) else value
    return value if isinstance(value, Estimate) else None


def _cells(table: Table, show: Callable[[Any], str]) -> list[list[str]]:
    return [[show(value) for value in row] for row in table.rows]


def _as_markdown(value: Any) -> str:
    return for_markdown(value) if isinstance(value, str) else show_cell(value)


def show_cell(value: Any) -> str:
    """One value of a table as text; an Estimate with its interval."""
    if isinstance(value, Estimate):
        return show_estimate(value)
    if isinstance(value, Judged):
        return f"{show_estimate(value.estimate)} {value.in_short}"
    if value is None:
        return "-"
    return f"{value:+.2f}" if isinstance(value, float) else str(value)


def show_estimate(estimate: Estimate) -> str:
    """An estimate with three digits and its interval in brackets, or `(exact)`; of one without a value, its bound."""
    if not math.isfinite(estimate.value):
        if math.isfinite(estimate.high):
            return f"< {show_number(estimate.high)}"
        return f"> {show_number(estimate.low)}" if estimate.low > 0 else "undefined"
    if estimate.low == estimate.high:
        return f"{show_number(estimate.value)} (exact)"
    return f"{show_number(estimate.value)} [{show_number(estimate.low)}, {show_number(estimate.high)}]"


def show_number(number: float) -> str:
    """A number with three digits, or all that are before the point."""
    if not math.isfinite(number):
        return "unbounded"
    size = abs(number)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{number:.1e}"
    if size >= 100:
        return f"{number:,.0f}"
    return f"{number:#.3g}".removesuffix(".") if size else "0"
