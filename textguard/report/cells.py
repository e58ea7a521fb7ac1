"""The runs of a figure, in groups that differ in their seeds alone."""

from collections.abc import Iterable, Sequence
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
    return count_trainings(len(cell.results) for cell in cells)


def count_trainings(counts: Iterable[int]) -> str:
    """Numbers of trainings in words, for captions."""
    found = set(counts)
    least, most = min(found), max(found)
    return f"{least} to {most} trainings" if least < most else f"{most} training{'s' if most > 1 else ''}"
