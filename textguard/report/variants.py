"""The runs of a figure, in groups that differ in their seeds alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from textguard.report.theme import Style, element_key
from textguard.schema.hardware import HardwareCell
from textguard.schema.results import Cell, RunResult

Named = TypeVar("Named", Cell, RunResult, HardwareCell)


@dataclass(frozen=True)
class Variant:
    """One variant of a backbone on a data set: its runs differ in their seeds alone. each: what captions call one of them."""

    key: str
    style: Style
    results: Sequence[RunResult]
    each: str = "training"

    @property
    def element(self) -> str:
        """What its marks are named by."""
        return element_key(self.results[0].dataset, self.results[0].backbone, self.key)


def trainings(variants: Sequence[Variant]) -> str:
    """How many trainings are behind a point, for captions."""
    return count_trainings((len(variant.results) for variant in variants), variants[0].each)


def count_trainings(counts: Iterable[int], each: str = "training") -> str:
    """Numbers of trainings in words, for captions."""
    found = set(counts)
    least, most = min(found), max(found)
    return f"{least} to {most} {each}s" if least < most else f"{most} {each}{'s' if most > 1 else ''}"


def labelled(results: Iterable[Named], labels: Mapping[str, str]) -> list[Named]:
    """The same results, where variants that have a label are called by it."""
    return [result.model_copy(update={"variant": labels.get(result.variant, result.variant)}) for result in results]
