"""The few numbers that `dvc metrics show` and `dvc metrics diff` print."""

import math
from collections.abc import Callable, Sequence

from textguard.estimates.statistics import Estimate
from textguard.schema.results import Cell, RunResult, Summary, SummaryLine


def summarise_grid(results: Sequence[RunResult], cells: Sequence[Cell]) -> Summary:
    """Means over the runs of each (data set, backbone, variant), and its improvements where it has a baseline.

    There are always three levels, also with one data set: `dvc metrics diff` compares numbers by their path
    (`digits.resnet18.descriptions.x_all`), so a grid that gains a data set keeps the names of those that it had.
    """
    improvements = {(cell.dataset, cell.backbone, cell.variant): cell for cell in cells}
    members: dict[tuple[str, str, str], list[RunResult]] = {}
    for result in results:
        members.setdefault((result.dataset, result.backbone, result.variant), []).append(result)
    summary: Summary = {}
    for place, runs in members.items():
        dataset, backbone, variant = place
        summary.setdefault(dataset, {}).setdefault(backbone, {})[variant] = _line(runs, improvements.get(place))
    return summary


def _line(runs: Sequence[RunResult], cell: Cell | None) -> SummaryLine:
    def mean(pick: Callable[[RunResult], Estimate]) -> float:
        return math.fsum(pick(run).value for run in runs) / len(runs)

    numbers = {
        "top1": 100 * mean(lambda run: run.top1),
        "sdc": 100 * mean(lambda run: run.overall.sdc),
        "mismatch": 100 * mean(lambda run: run.overall.mismatch),
        "dl": mean(lambda run: run.overall.delta_loss),
    }
    if cell:
        losses, sdc = cell.first.improvement.delta_loss, cell.first.improvement.sdc
        numbers |= {"x_head": losses.head.value, "x_last": losses.last_layer.value, "x_all": losses.overall.value}
        numbers |= {"x_sdc": sdc.overall.value, "x_fit": sdc.by_neurons.value}
    return SummaryLine(**{name: float(f"{number:.6g}") for name, number in numbers.items()})
