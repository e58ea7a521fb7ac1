"""How variants compare on corrupted images, and whether what stands faults stands corruption."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from textguard.analysis.files import compared_runs, load_corruptions
from textguard.analysis.improvement import across, verdict
from textguard.estimates.ranks import rank_correlation
from textguard.estimates.statistics import Estimate, over_trainings, ratio_of
from textguard.params import Run
from textguard.schema.base import Measured
from textguard.schema.corruptions import (
    POINTS,
    BothResiliences,
    ComparedCorruptions,
    CorruptionCell,
    CorruptionEffect,
    Corruptions,
    Together,
)
from textguard.schema.results import BASELINE, RunResult

# What is compared: kind, severity, measure.
Compared = tuple[str, int, str]
UNBOUNDED, SHARE = (0.0, math.inf), (0.0, 1.0)
WITHIN = {"top1": SHARE, "top2diff": SHARE, "sdc": SHARE, "loss": UNBOUNDED, "delta_loss": UNBOUNDED}
ALL = "all"


def compare_corruptions(runs: Mapping[str, Run], results: Mapping[str, RunResult], confidence: float) -> ComparedCorruptions:
    """The runs that were tested on corrupted images: one cell per variant that has a baseline. Raises InvalidArtifact.

    results: by the same keys, what the runs' own campaigns came to.
    """
    found = {key: load_corruptions(key) for key in runs}
    cells = []
    for (dataset, backbone, against, variant), pairs in compared_runs(runs).items():
        if against != BASELINE:
            continue
        baselines, own = ([dict(quantities(found[pair[side]])) for pair in pairs] for side in (0, 1))
        names = [name for name in own[0] if all(name in run for run in (*baselines, *own))]
        effects = [_compare(name, [run[name] for run in baselines], [run[name] for run in own], confidence) for name in names]
        seeds = [runs[key].seed for _, key in pairs]
        cells.append(CorruptionCell(dataset=dataset, backbone=backbone, variant=variant, seeds=seeds, effects=effects))
    classifiers = [
        BothResiliences(
            run=key,
            variant=run.variant,
            lost=found[key].lost,
            delta_loss=Measured.of(results[key].overall.delta_loss),
            sdc=Measured.of(results[key].overall.sdc),
        )
        for key, run in runs.items()
    ]
    return ComparedCorruptions(cells=cells, classifiers=classifiers, together=_together(runs, classifiers, confidence))


def quantities(run: Corruptions) -> Iterator[tuple[Compared, Measured]]:
    """All that runs are compared by. What faults do is there only where some were injected."""
    for images in run.conditions:
        place = (images.kind, images.severity)
        for measure in ("top1", "top2diff", "loss"):
            yield (*place, measure), getattr(images, measure)
        for measure in ("delta_loss", "sdc") if images.faults else ():
            yield (*place, measure), getattr(images.faults.overall, measure)


def difference_of(minuend: Estimate, subtrahend: Estimate) -> Estimate:
    """The difference of two independent estimates, whose distances from the ends of their intervals add up in quadrature.

    Both are on the same images, and what an image adds to both is not told from chance: the interval is too wide, if anything.
    """
    value = minuend.value - subtrahend.value
    low = value - math.hypot(minuend.value - minuend.low, subtrahend.high - subtrahend.value)
    high = value + math.hypot(minuend.high - minuend.value, subtrahend.value - subtrahend.low)
    return Estimate(value, low, high, min(minuend.n, subtrahend.n))


def _compare(name: Compared, baselines: Sequence[Measured], own: Sequence[Measured], confidence: float) -> CorruptionEffect:
    kind, severity, measure = name
    pairs = list(zip(baselines, own, strict=True))
    if measure in ("top1", "top2diff"):
        together = over_trainings([difference_of(ours, theirs).times(100) for theirs, ours in pairs], POINTS, confidence)
        said = verdict(_as_ratio(together), confidence, len(pairs))
    else:
        together = across([ratio_of(*pair) for pair in pairs], confidence)
        said = verdict(together, confidence, len(pairs))
    return CorruptionEffect(
        kind=kind,
        severity=severity,
        measure=measure,
        baseline=Measured.of(over_trainings(baselines, WITHIN[measure], confidence)),
        own=Measured.of(over_trainings(own, WITHIN[measure], confidence)),
        effect=Measured.of(together),
        verdict=said,
    )


def _as_ratio(difference: Estimate) -> Estimate:
    """A difference as verdicts take it: better above 1."""
    return Estimate(*(1 + number for number in (difference.value, difference.low, difference.high)), difference.n)


def _together(runs: Mapping[str, Run], classifiers: Sequence[BothResiliences], confidence: float) -> list[Together]:
    """Correlations on each data set, and on all where there are several."""
    datasets = list(dict.fromkeys(run.dataset for run in runs.values()))
    found = []
    for dataset in [*datasets, *([ALL] if len(datasets) > 1 else [])]:
        part = [both for both in classifiers if dataset in (ALL, runs[both.run].dataset)]
        lost = np.array([both.lost.value for both in part], dtype=float)
        for measure in ("delta_loss", "sdc"):
            damage = np.array([getattr(both, measure).value for both in part], dtype=float)
            correlation = Measured.of(rank_correlation(damage, lost, confidence))
            found.append(Together(dataset=dataset, measure=measure, correlation=correlation))
    return found
