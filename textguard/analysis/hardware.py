"""How variants compare under the faults of section `hardware`: each beside its baseline, over trainings."""

import math
from collections.abc import Iterator, Mapping, Sequence

from textguard.analysis.files import compared_runs, load_hardware
from textguard.analysis.improvement import across, verdict
from textguard.estimates.statistics import Estimate, over_trainings, ratio_of
from textguard.params import Run
from textguard.schema.base import Measured
from textguard.schema.hardware import Bargain, Bought, Curve, FaultRatio, Hardware, HardwareCell, Protected
from textguard.schema.results import BASELINE, MEASURES

# What is compared: faults or protection, measure, place, points of accuracy.
Compared = tuple[str, str, str, float | None]
UNBOUNDED, SHARE, POINTS = (0.0, math.inf), (0.0, 1.0), (-100.0, 100.0)
UNPROTECTED = "none"  # what protections, and mitigations, are compared with
POINTS_LOST = 10.0  # of top-1, at the bit error rate that protections are compared at


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
        sides = [[found[pair[side]] for pair in pairs] for side in (0, 1)]
        protected = [*_protections(*sides, confidence), *_mitigations(*sides, confidence)]
        cells.append(
            HardwareCell(dataset=dataset, backbone=backbone, variant=variant, seeds=seeds, ratios=ratios, protected=protected)
        )
    return cells


def _protections(baselines: Sequence[Hardware], own: Sequence[Hardware], confidence: float) -> Iterator[Protected]:
    """What protections of stored parameters cost and buy, where there are curves without one to compare with."""
    unprotected = [[curve for curve in run.curves if curve.protection == UNPROTECTED] for run in baselines]
    if not all(unprotected):
        return
    points = zip(*(of_run[0].points for of_run in unprotected), strict=True)
    lost = {at[0].rate: sum(point.accuracy.value for point in at) / len(at) for at in points}
    rate = next((rate for rate, mean in lost.items() if mean >= POINTS_LOST), max(lost))
    for name in [curve.protection for curve in baselines[0].curves if curve.protection != UNPROTECTED]:
        sides = [_protection(name, rate, runs, confidence) for runs in (baselines, own)]
        yield Protected(kind="protection", name=name, rate=rate, baseline=sides[0], own=sides[1])


def _protection(name: str, rate: float, runs: Sequence[Hardware], confidence: float) -> Bargain:
    curves = [{curve.protection: curve for curve in run.curves} for run in runs]
    pairs = [
        [next(point for point in of_run[which].points if point.rate == rate) for of_run in curves]
        for which in (UNPROTECTED, name)
    ]
    bought = [
        _bought(*([getattr(point, measure) for point in side] for side in pairs), within, confidence)
        for measure, within in (("changed", SHARE), ("delta_loss", UNBOUNDED))
    ]
    first = curves[0][name]
    gates = math.nan if first.gates is None else first.gates
    return Bargain(bits=first.bits, gates=gates, comparisons=0.0, sdc=bought[0], delta_loss=bought[1])


def _mitigations(baselines: Sequence[Hardware], own: Sequence[Hardware], confidence: float) -> Iterator[Protected]:
    """What mitigations of neurons cost and buy."""
    for name in [found.mitigation for found in baselines[0].mitigations if found.mitigation != UNPROTECTED]:
        sides = [_mitigation(name, runs, confidence) for runs in (baselines, own)]
        yield Protected(kind="mitigation", name=name, baseline=sides[0], own=sides[1])


def _mitigation(name: str, runs: Sequence[Hardware], confidence: float) -> Bargain:
    found = [{one.mitigation: one for one in run.mitigations} for run in runs]
    bought = [
        _bought(
            *([getattr(of_run[which].overall, measure) for of_run in found] for which in (UNPROTECTED, name)),
            within,
            confidence,
        )
        for measure, within in (("sdc", SHARE), ("delta_loss", UNBOUNDED))
    ]
    first = found[0][name]
    return Bargain(
        bits=first.bits,
        gates=0.0,
        comparisons=first.comparisons,
        top1_change=Measured.of(over_trainings([of_run[name].top1_change for of_run in found], POINTS, confidence)),
        sdc=bought[0],
        delta_loss=bought[1],
    )


def _bought(without: Sequence[Measured], under: Sequence[Measured], within: tuple[float, float], confidence: float) -> Bought:
    ratios = [ratio_of(*pair) for pair in zip(without, under, strict=True)]
    return Bought(
        without=_mean(without, within, confidence),
        under=_mean(under, within, confidence),
        ratio=Measured.of(across(ratios, confidence)),
    )


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


def mean_curve(curves: Sequence[Curve], confidence: float) -> list[tuple[float, Measured, Measured]]:
    """Of one protection in several trainings: each bit error rate, points of accuracy lost, share of changed predictions."""
    return [
        (
            points[0].rate,
            _mean([point.accuracy for point in points], POINTS, confidence),
            _mean([point.changed for point in points], SHARE, confidence),
        )
        for points in zip(*(curve.points for curve in curves), strict=True)
    ]


def _mean(trainings: Sequence[Measured], within: tuple[float, float], confidence: float) -> Measured:
    """Over trainings; where a rate was not reached in one of them, what it is above in all."""
    found = over_trainings(trainings, within, confidence)
    lows = [training.low for training in trainings]
    if math.isnan(found.value) and all(low > 0 for low in lows):
        found = Estimate(math.nan, min(lows), math.nan, found.n)
    return Measured.of(found)
