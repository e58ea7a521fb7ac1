"""The runs of a figure, in groups that differ in their seeds alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from textguard.report.results import Result


@dataclass(frozen=True)
class Cell:
    """One variant of a backbone on a data set: its runs differ in their seeds alone. colour: #rrggbb, everywhere the same."""

    variant: str
    colour: str
    results: Sequence[Result]


def trainings(cells: Sequence[Cell]) -> str:
    """How many trainings are behind a point, for captions."""
    counts = sorted({len(cell.results) for cell in cells})
    return (
        f"{counts[0]} training{'s' if counts[-1] > 1 else ''}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} trainings"
    )
