"""How variants compare under the faults of section `hardware`: each beside its baseline, over trainings."""

import math
from collections.abc import Iterator, Mapping, Sequence

from textguard.analysis.files import compared_runs, load_hardware
from textguard.analysis.improvement import across, verdict
from textguard.estimates.statistics import Estimate, over_trainings, ratio_of
from textguard.params import Run
from textguard.schema.base import Measured
from textguard.schema.hardware import FaultRatio, Hardware, HardwareCell
from textguard.schema.results import BASELINE, MEASURES

# What is compared: faults or protection, measure, place, points of accuracy.
Compared = tuple[str, str, str, float | None]
UNBOUNDED, SHARE, POINTS = (0.0, math.inf), (0.0, 1.0), (-100.0, 100.0)


def compare_hardware(runs: Mapping[str, Run], confidence: float) -> list[HardwareCell]:
    """One cell per variant that has a baseline. Raises InvalidArtifact."""
    found = {key: load_hardware(key) for key in runs}
    cells = []
    for (dataset, backbone, against, variant), pairs in compared_runs(runs).items():
        if against != BASELINE:
            continue
        baselines, own = ([dict(quantities(found[pair[side]])) for pair in pairs] for side in (0, 1))
        ratios = [_compare(name, [run[name] for run in baselines], [run[name] for run in own], confidence) for name in own[0]]
        seeds = [runs[key].seed for _, key in pairs]
        cells.append(HardwareCell(dataset=dataset, backbone=backbone, variant=variant, seeds=seeds, ratios=ratios))
    return cells


def quantities(run: Hardware) -> Iterator[tuple[Compared, Measured]]:
    """All that runs are compared by."""
    for model in run.models:
        for place in ("overall", "by_values"):
            for measure in MEASURES:
                yield (model.name, measure, place, None), getattr(getattr(model, place), measure)
        if model.lost:
            yield (model.name, "accuracy", "overall", None), model.lost.accuracy
    for curve in run.curves:
        for losing in curve.losing:
            yield (curve.protection, "rate", "all", losing.points), losing.rate


def _compare(name: Compared, baselines: Sequence[Measured], own: Sequence[Measured], confidence: float) -> FaultRatio:
    faults, measure, place, points = name
    # A larger rate is better; of all others, a smaller number.
    above, below = (own, baselines) if measure == "rate" else (baselines, own)
    ratios = [ratio_of(*pair) for pair in zip(above, below, strict=True)]
    within = UNBOUNDED if measure == "delta_loss" else POINTS if measure == "accuracy" else SHARE
    together = across(ratios, confidence)
    return FaultRatio(
        faults=faults,
        measure=measure,
        place=place,
        baseline=_mean(baselines, within, confidence),
        own=_mean(own, within, confidence),
        ratio=Measured.of(together),
        verdict=verdict(together, confidence, len(ratios)),
        **({} if points is None else {"points": points}),
    )


def _mean(trainings: Sequence[Measured], within: tuple[float, float], confidence: float) -> Measured:
    """Over trainings; where a rate was not reached in one of them, what it is above in all."""
    found = over_trainings(trainings, within, confidence)
    lows = [training.low for training in trainings]
    if math.isnan(found.value) and all(low > 0 for low in lows):
        found = Estimate(math.nan, min(lows), math.nan, found.n)
    return Measured.of(found)
