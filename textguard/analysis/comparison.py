"""Text-guided runs beside their baselines: one pair of runs, and the cells that several trainings make.

A cell is one (data set, backbone, variant); its runs differ in their seeds alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from textguard.analysis.campaigns import CampaignRecords, last_layer_weights
from textguard.analysis.improvement import Draws, Ratio, across, draw_pairs, improvement, verdict, weigh
from textguard.analysis.temperature import rescaled_heads
from textguard.estimates.statistics import Estimate, difference
from textguard.params import Run, StatisticsParams
from textguard.schema.base import Measured
from textguard.schema.results import (
    Cell,
    CellUnderDetector,
    Improved,
    Improvement,
    RunResult,
    UnderDetector,
    Verdicts,
)


@dataclass(frozen=True)
class Ratios:
    """DeltaLoss of a baseline / that of a text-guided run.

    head: the text-guided head alone against the baseline's last layer, however `last_layer` weighs head and latent layer.
    head_same_temperature, head_folded: that head as `rescaled_heads` has it, or None where it has not.
    """

    overall: Ratio
    last_layer: Ratio
    head: Ratio
    head_same_temperature: Ratio | None = None
    head_folded: Ratio | None = None

    def as_improved(self) -> Improved:
        """The estimates alone."""
        return Improved(**{name: Measured.of(ratio.estimate) for name, ratio in vars(self).items() if ratio})


@dataclass(frozen=True)
class Comparison:
    """A run beside its baseline. detectors: by name, the one that counts first; layers: the latter's, in order."""

    detectors: dict[str, Ratios]
    layers: list[Estimate]


def compare(
    baseline_run: Run,
    baseline: CampaignRecords,
    run: Run,
    guided: CampaignRecords,
    statistics: StatisticsParams,
    temperature: float,
) -> Comparison:
    """Improvements under every detector that both campaigns have, and by layer under the one that counts.

    temperature: what makes the guided run's largest logit that of the baseline.
    """
    shared = [name for name in guided.detectors if name in baseline.detectors]
    drawn = {
        name: draw_pairs(baseline.detectors[name], guided.detectors[name], statistics.bootstrap, seed=0) for name in shared
    }

    def ratios(name: str) -> Ratios:
        pairs = list(zip((baseline_run, run), (baseline.detectors[name], guided.detectors[name]), drawn[name], strict=True))

        def last(weights: str) -> Ratio:
            return _ratio([(draws, last_layer_weights(who, layers, weights)) for who, layers, draws in pairs], statistics)

        heads = rescaled_heads(guided, name, temperature, statistics.nonfinite)
        _, rescaled = draw_pairs([], list(heads.values()), statistics.bootstrap, seed=0)
        return Ratios(
            overall=_ratio([(draws, [1.0] * len(draws)) for _, _, draws in pairs], statistics),
            last_layer=last(statistics.last_layer_weights),
            head=last("head_only"),
            **{
                other: improvement(drawn[name][0][-1], draws, statistics.confidence)
                for other, draws in zip(heads, rescaled, strict=True)
            },
        )

    first = zip(*drawn[shared[0]], strict=False) if shared else ()
    return Comparison(
        {name: ratios(name) for name in shared}, [improvement(*pair, statistics.confidence).estimate for pair in first]
    )


def _ratio(weighted: Sequence[tuple[Sequence[Draws], Sequence[float]]], statistics: StatisticsParams) -> Ratio:
    """The improvement of weighted means over layers. weighted: draws and weights of the baseline, then of the guided run."""
    return improvement(*(weigh(draws, weights) for draws, weights in weighted), statistics.confidence)


def with_improvement(result: RunResult, baseline: RunResult, compared: Comparison) -> RunResult:
    """A run's results, with how they compare to its baseline's."""
    first = next(iter(compared.detectors.values()))
    layers = [
        layer.model_copy(update={"improvement": Measured.of(estimate)})
        for layer, estimate in zip(result.layers, compared.layers, strict=False)
    ]
    detectors: dict[str, UnderDetector] = dict(result.detectors)
    for name, ratios in compared.detectors.items():
        detectors[name] = detectors[name].model_copy(update={"improvement": ratios.as_improved()})
    counted = {"overall": first.overall, "last_layer": first.last_layer, "head": first.head}
    own = Improvement(
        baseline=baseline.run,
        **{name: Measured.of(ratio.estimate) for name, ratio in counted.items()},
        top2diff=Measured.of(difference(result.top2diff, baseline.top2diff)),
        verdict=_verdicts({name: ratio.estimate for name, ratio in counted.items()}, result.confidence),
    )
    return result.model_copy(
        update={"improvement": own, "layers": layers + result.layers[len(layers) :], "detectors": detectors}
    )


def _verdicts(estimates: dict[str, Estimate], confidence: float) -> Verdicts:
    return Verdicts(**{name: verdict(estimate, confidence) for name, estimate in estimates.items()})


def describe_cell(baselines: Sequence[RunResult], guided: Sequence[RunResult], compared: Sequence[Comparison]) -> Cell:
    """One cell's trainings beside their baselines: means over trainings, with intervals over these where there are several."""
    one, confidence = guided[0], guided[0].confidence

    def mean(results: Sequence[RunResult], pick: Callable[[RunResult], Estimate]) -> Measured:
        return Measured.of(_mean_over_trainings([pick(result) for result in results], confidence))

    def under(name: str) -> CellUnderDetector:
        found = [vars(comparison.detectors[name]) for comparison in compared]
        parts = [part for part in found[0] if all(ratios[part] for ratios in found)]
        improved = {part: Measured.of(across([ratios[part] for ratios in found], confidence)) for part in parts}
        return CellUnderDetector(
            **improved,
            overall_baseline=mean(baselines, lambda result: result.detectors[name].overall.delta_loss),
            overall_guided=mean(guided, lambda result: result.detectors[name].overall.delta_loss),
            last_layer_baseline=mean(baselines, lambda result: result.detectors[name].last_layer.delta_loss),
            last_layer_guided=mean(guided, lambda result: result.detectors[name].last_layer.delta_loss),
            nonfinite_baseline=mean(baselines, lambda result: result.detectors[name].nonfinite),
            nonfinite_guided=mean(guided, lambda result: result.detectors[name].nonfinite),
        )

    detectors = {name: under(name) for name in compared[0].detectors}
    first = next(iter(detectors.values()))
    improved = {"overall": first.overall, "last_layer": first.last_layer, "head": first.head}
    return Cell(
        dataset=one.dataset,
        backbone=one.backbone,
        variant=one.variant,
        seeds=[result.seed for result in guided],
        top1_baseline=mean(baselines, lambda result: result.top1),
        top1=mean(guided, lambda result: result.top1),
        parameters=one.parameters - baselines[0].parameters,
        multiply_adds=one.multiply_adds - baselines[0].multiply_adds,
        **improved,
        verdict=_verdicts(improved, confidence),
        top2diff=mean(guided, lambda result: result.improvement.top2diff),
        detectors=detectors,
    )


def _mean_over_trainings(estimates: Sequence[Estimate], confidence: float) -> Estimate:
    """The estimate of one training; of several their mean, with Student's interval over trainings."""
    if len(estimates) == 1:
        return estimates[0]
    values, count = np.array([estimate.value for estimate in estimates]), len(estimates)
    half = float(stdtrit(count - 1, 0.5 + confidence / 2) * values.std(ddof=1)) / math.sqrt(count)
    mean = float(values.mean())
    return Estimate(mean, mean - half, mean + half, sum(estimate.n for estimate in estimates))
