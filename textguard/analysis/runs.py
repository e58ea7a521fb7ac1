"""What is estimated of one run by itself, from its campaign and its predictions on the test images."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pandas as pd

from textguard.analysis.breakdown import convergence, describe_layer, sums_by_bit, sums_of_totals
from textguard.analysis.campaigns import CampaignRecords, place_weights
from textguard.analysis.files import RECORDS_DIR, RUNS_DIR, load_ranges, short_names
from textguard.artifacts import fingerprint, reading
from textguard.errors import InvalidArtifact
from textguard.estimates.statistics import Estimate, mean_estimate, mean_interval, rate_estimate, rate_interval
from textguard.estimates.summary import LayerResult, mean_over_layers
from textguard.params import Run, StatisticsParams
from textguard.schema.base import Measured, read
from textguard.schema.campaign import PLAN_KEYS, Site
from textguard.schema.evaluation import Evaluation
from textguard.schema.records import read_columns
from textguard.schema.results import (
    BASELINE,
    MEASURES,
    PLACES,
    Convergence,
    Headline,
    Layer,
    Overall,
    Plan,
    RunResult,
    UnderDetector,
)

BLOCKS = 32  # parts of a sample whose means are kept, so that two campaigns with one plan can be compared in pairs
FEWEST_BLOCKS = 8


def describe_run(key: str, run: Run, campaign: CampaignRecords, statistics: StatisticsParams) -> RunResult:
    """All that is known of one run without its baseline. Raises InvalidArtifact."""
    evaluation, predictions = _load_evaluation(key, run)
    with reading(RUNS_DIR / key / "campaign.json", "inject"):
        if campaign.stored.eligible_images > len(predictions):
            raise InvalidArtifact(f"has more eligible images than the {len(predictions)} of the test set")
    correct = (predictions["label"] == predictions["prediction"]).to_numpy(float)
    largest = _largest_value(key, campaign.layers)
    return describe(key, run, campaign, statistics, evaluation, predictions.assign(correct=correct), largest)


def describe(
    key: str,
    run: Run,
    campaign: CampaignRecords,
    statistics: StatisticsParams,
    evaluation: Evaluation,
    predictions: pd.DataFrame,
    largest_value: float,
) -> RunResult:
    """The same from what is read. predictions: label, correct (1 or 0), loss and top2diff of each image.

    largest_value: the largest magnitude of the last layer's values over the training images.
    """
    confidence, stored, layers = statistics.confidence, campaign.stored, campaign.layers
    correct = predictions["correct"].to_numpy(float)
    weights = place_weights(layers, statistics.last_layer_weights, latent=campaign.latent)
    places = {place: headline(layers, weights[place], confidence) for place in PLACES}
    return RunResult(
        run=key,
        dataset=run.dataset,
        backbone=run.backbone,
        variant=run.variant,
        seed=run.seed,
        confidence=confidence,
        plan=_plan(campaign),
        images=fingerprint(labels=predictions["label"].tolist()),
        top1=_measured(rate_estimate(int(correct.sum()), len(correct), confidence), _blocks([correct], [1.0], np.nan)),
        loss=Measured.of(mean_estimate(predictions["loss"].to_numpy(float), confidence)),
        top2diff=Measured.of(mean_estimate(predictions["top2diff"].to_numpy(float), confidence, most=1.0)),
        parameters=evaluation.parameters,
        multiply_adds=evaluation.multiply_adds,
        scale=evaluation.scale,
        weights=evaluation.weights,
        # The detector `profiled` clamps to the profiled range: behind it, no fault in the last layer makes a larger logit.
        largest_logit=(1.0 if stored.settings.get("fold_scale") else evaluation.scale) * largest_value,
        **{name: found for name, found in places.items() if name != "overall"},
        overall=_overall(campaign, statistics, places["overall"]),
        convergence=_convergence(campaign, statistics),
        layers=_layers(campaign, statistics),
        detectors={
            name: UnderDetector(
                **{place: headline(found, weights[place], confidence, blocks=False) for place in PLACES},
                nonfinite=_rate(found, "broken", confidence),
            )
            for name, found in campaign.detectors.items()
        },
        improvement=None,
        skipped=stored.skipped,
        settings=stored.settings,
        statistics=asdict(statistics),
    )


def _load_evaluation(key: str, run: Run) -> tuple[Evaluation, pd.DataFrame]:
    """What stage evaluate says of a run, and its predictions, which say the same. Raises InvalidArtifact."""
    file, table = RUNS_DIR / key / "evaluation.json", RECORDS_DIR / key / "predictions.parquet"
    evaluation = read(file, "evaluate", Evaluation)
    with reading(file, "evaluate"):
        if evaluation.seed != run.seed or (run.variant == BASELINE and evaluation.scale != 1):
            raise InvalidArtifact(f"is not of run {key!r}")
    columns = ["image", "label", "prediction", "loss", "top2diff"]
    predictions = read_columns(table, "evaluate", columns, evaluation.top1.n)
    with reading(table, "evaluate"):
        means = {name: float(predictions[name].to_numpy(float).mean()) for name in ("loss", "top2diff") if len(predictions)}
        means["top1"] = float((predictions["label"] == predictions["prediction"]).to_numpy(float).mean()) if means else math.nan
        if len(predictions) != evaluation.top1.n or not means or (predictions["image"] != np.arange(len(predictions))).any():
            raise InvalidArtifact(f"must have one row for each of the {evaluation.top1.n} images, in their order")
        for name, mean in means.items():
            said = getattr(evaluation, name).value
            if not math.isclose(mean, said, rel_tol=1e-6, abs_tol=1e-9):
                raise InvalidArtifact(f"has a mean {name} of {mean:g}, and {file} says {said:g}")
    return evaluation, predictions


def _plan(campaign: CampaignRecords) -> Plan:
    settings = campaign.stored.settings
    injected = {"sampled": 0, "exact": 0}
    for layer in campaign.layers:
        injected[layer.method] += layer.injections
    return Plan(
        mark=fingerprint(**{name: settings[name] for name in PLAN_KEYS}),
        seed=settings["seed"],
        plan=settings["plan"],
        injections=injected["sampled"],
        enumerated=injected["exact"],
        eligible_images=campaign.stored.eligible_images,
        detector=settings["detector"],
    )


def _overall(campaign: CampaignRecords, statistics: StatisticsParams, means: Headline) -> Overall:
    layers, confidence = campaign.layers, statistics.confidence
    exposures = [_exposure(site, statistics) for site in campaign.stored.layers]
    network_fit = rate_interval(mean_over_layers(layers, "sdc", exposures), confidence)
    return Overall(
        **dict(means),
        nonfinite=_rate(layers, "broken", confidence),
        fit=_bounded(network_fit.times(sum(exposures) * (campaign.stored.bits * statistics.fit_per_bit))),
    )


def _layers(campaign: CampaignRecords, statistics: StatisticsParams) -> list[Layer]:
    stored, confidence = campaign.stored, statistics.confidence
    failures = stored.bits * statistics.fit_per_bit
    sums = {layer: sums_by_bit(part, stored.bits) for layer, part in campaign.records.groupby("layer", sort=False)}
    sums |= {layer.layer: sums_of_totals(layer) for layer in campaign.totals}
    described = []
    names = short_names([site.layer for site in stored.layers])
    for layer, site, name in zip(campaign.layers, stored.layers, names, strict=True):
        outcomes, by_bit = describe_layer(
            sums[layer.layer], stored.strata, layer.method == "sampled" and stored.settings["plan"] == "guided"
        )
        sdc = rate_interval(layer.sdc, confidence)
        blocks = {measure: _blocks(layer.strata.get(measure, ()), layer.shares, np.nan) for measure in MEASURES}
        described.append(
            Layer(
                layer=name,
                kind=site.kind,
                neurons=site.neurons,
                multiply_adds=site.multiply_adds,
                method=layer.method,
                injections=layer.injections,
                masked=layer.masked,
                detected=layer.detected,
                delta_loss=_measured(mean_interval(layer.delta_loss, confidence), blocks["delta_loss"]),
                mismatch=_measured(rate_interval(layer.mismatch, confidence), blocks["mismatch"]),
                sdc=_measured(sdc, blocks["sdc"]),
                nonfinite=Measured.of(rate_interval(layer.broken, confidence)),
                fit=_bounded(sdc.times(_exposure(site, statistics) * failures)),
                outcomes=outcomes,
                by_bit=by_bit,
            )
        )
    return described


def _largest_value(key: str, layers: Sequence[LayerResult]) -> float:
    """The largest magnitude of the last layer's values over the training images."""
    ranges = load_ranges(key).set_index("layer")["max_abs"]
    with reading(RUNS_DIR / key / "ranges.csv", "ranges"):
        if missing := [name for name in short_names([layer.layer for layer in layers]) if name not in ranges.index]:
            raise InvalidArtifact(f"lacks layer {missing[0]!r}")
        return float(ranges[short_names([layer.layer for layer in layers])[-1]])


def _convergence(campaign: CampaignRecords, statistics: StatisticsParams) -> list[Convergence]:
    """How DeltaLoss settled; nothing where the first injections decided which others were made."""
    if campaign.stored.strata or campaign.stored.settings["stop_at"] != "never":
        return []
    neurons = {layer.layer: layer.neurons for layer in campaign.layers}
    guided, shared = campaign.stored.settings["plan"] == "guided", campaign.stored.settings["images"] == "shared"
    return convergence(campaign.records, neurons, statistics.nonfinite, statistics.confidence, guided, shared)


def headline(layers: Sequence[LayerResult], weights: Sequence[float], confidence: float, blocks: bool = True) -> Headline:
    """Weighted means over layers; nothing where no layer counts. blocks: of these too, if all sampled layers have as many."""
    counted = [(layer, weight / sum(weights)) for layer, weight in zip(layers, weights, strict=True) if weight]
    if not counted:
        return Headline(**{measure: Measured(math.nan, math.nan, math.nan, 0) for measure in MEASURES})
    kept, shares = zip(*counted, strict=True)

    def mean(measure: str) -> Measured:
        interval = mean_interval if measure == "delta_loss" else rate_interval
        estimate = interval(mean_over_layers(kept, measure, shares), confidence)
        if not blocks:
            return Measured.of(estimate)
        parts = [
            share * _blocks(layer.strata.get(measure, ()), layer.shares, getattr(layer, measure).value)
            for layer, share in counted
        ]
        return _measured(estimate, _sum(parts))

    return Headline(**{measure: mean(measure) for measure in MEASURES})


def _rate(layers: Sequence[LayerResult], name: str, confidence: float) -> Measured:
    """The plain mean of a rate over layers."""
    return Measured.of(rate_interval(mean_over_layers(layers, name), confidence))


def _sum(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of all layers' blocks. An exact layer has one number; empty where sampled layers differ in how many they have."""
    return sum(parts, np.zeros(1)) if len({len(part) for part in parts} - {1}) <= 1 else np.zeros(0)


def _measured(estimate: Estimate, blocks: np.ndarray) -> Measured:
    """The estimate, with the means of its sample's parts where there are enough."""
    numbers = [float(f"{block:.6g}") for block in blocks]
    return Measured.of(estimate, numbers if len(numbers) >= FEWEST_BLOCKS else None)


def _blocks(strata: Sequence[np.ndarray], shares: Sequence[float], value: float) -> np.ndarray:
    """Means of equal parts of a sample, [K]: part j holds observations j, j + K, ... of each stratum. [value] if exact."""
    if not strata:
        return np.array([value])
    count = min([BLOCKS, *(len(stratum) for stratum in strata)])
    pairs = list(zip(shares, strata, strict=True))
    return np.array([sum(share * stratum[part::count].mean() for share, stratum in pairs) for part in range(count)])


def _exposure(site: Site, statistics: StatisticsParams) -> int:
    """How many values a layer's faults can hit. Raises InvalidArtifact where that is not known."""
    exposure = getattr(site, statistics.fit_exposure)
    if exposure is None:
        raise InvalidArtifact(
            f"the multiply-adds of a {site.kind} like {site.layer!r} are not known; "
            "set params.yaml statistics.fit_exposure to neurons"
        )
    return exposure


def _bounded(estimate: Estimate) -> Measured:
    """An estimated rate of failures; where none was seen, its upper bound and no value."""
    seen = not estimate.value == 0 < estimate.high
    return Measured.of(replace(estimate, value=estimate.value if seen else np.nan))
