"""A grid's results: one JSON file per run, comparisons per cell, and the few numbers that `dvc metrics diff` shows.

A cell is one (data set, backbone, variant); its runs differ in their seeds alone.
"""

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from textguard.artifacts import fingerprint, read_csv, read_json, read_parquet, reading, write_json
from textguard.errors import InvalidArtifact
from textguard.estimates.statistics import (
    Estimate,
    average,
    difference,
    mean_estimate,
    mean_interval,
    rate_estimate,
    rate_interval,
)
from textguard.estimates.summary import LayerResult, Totals, summarise, summarise_totals
from textguard.params import RunParams, StatisticsParams
from textguard.report.breakdown import convergence, describe_layer, sums_by_bit, sums_of_totals
from textguard.report.improvement import Draws, Improvement, across, draw_pairs, improvement, verdict, weigh

RUNS_DIR = Path("metrics") / "runs"
RECORDS_DIR = Path("metrics") / "records"
CLOSEUP_DIR = Path("metrics") / "closeup"
RESULTS_DIR = Path("metrics") / "results"
CELLS_FILE = Path("metrics") / "cells.json"
BASELINE = "baseline"
BLOCKS = 32  # parts of a sample whose means are kept, so that two campaigns with one plan can be compared in pairs
FEWEST_BLOCKS = 8
RECORDS = ["layer", "index", "bit", "weight", "detected", "masked", "golden_loss", "faulty_loss", "mismatch"]
# Of a run's campaign: what decides which faults it draws.
PLAN_KEYS = (
    "seed",
    "plan",
    "images",
    "injections_per_layer",
    "pilot",
    "stop_at",
    "faults",
    "format",
    "kinds",
    "enumerate_up_to",
)
# What a text-guided classifier can be better in, as `_compare` finds it.
IMPROVED = ("overall", "last_layer", "head")
# What tables and the page read of metrics/results/RUN.json.
RUN_FIELDS = (
    *("run", "dataset", "backbone", "variant", "seed", "confidence", "plan", "top1", "top2diff", "parameters", "multiply_adds"),
    *("scale", "largest_logit", "overall", "last_layer", "layers", "skipped", "settings"),
)


@dataclass(frozen=True)
class Campaign:
    """One run's faults. detectors: name -> its layers' results, in order of execution; the first is the one that counts.

    stored: campaign.json, as the stage inject wrote it. records, totals: of the first detector, as `summarise` and
    `summarise_totals` take them.
    """

    detectors: dict[str, list[LayerResult]]
    stored: dict[str, Any]
    records: pd.DataFrame
    totals: list[Totals]

    @property
    def layers(self) -> list[LayerResult]:
        """The results under the detector that counts."""
        return next(iter(self.detectors.values()))


def load_campaign(key: str, run: RunParams, statistics: StatisticsParams) -> Campaign:
    """Read one run's campaign.json and records. Raises InvalidArtifact, InvalidParameter."""
    file = RUNS_DIR / key / "campaign.json"
    stored = read_json(file, "inject")
    records = read_parquet(RECORDS_DIR / key / "injections.parquet", "inject", RECORDS)
    changed = read_parquet(RECORDS_DIR / key / "detectors.parquet", "inject", [*RECORDS, "detector"])
    with reading(file, "inject"):
        neurons = {layer["layer"]: int(layer["neurons"]) for layer in stored["layers"]}
        if len(neurons) < 1 + (run.variant != BASELINE):
            raise InvalidArtifact("lacks layers")
        totals = {name: [Totals.from_json(layer) for layer in stored["exact"][name]] for name in stored["detectors"]}
        strata, bits = int(stored["strata"]), int(stored["bits"])
        if not totals or bits < 1 or not set(PLAN_KEYS) <= stored["settings"].keys():
            raise InvalidArtifact("lacks detectors, bits or settings")
    detectors = {}
    for name, known in totals.items():
        under = _replace(records, changed[changed["detector"] == name])
        found = summarise(under, neurons, strata, statistics.nonfinite)
        found |= {layer.layer: summarise_totals(layer, statistics.nonfinite) for layer in known}
        missing = [layer for layer in neurons if layer not in found]
        if missing:
            raise InvalidArtifact(f"{file}: layer {missing[0]!r} has no records; run 'dvc repro': stage 'inject' writes them")
        detectors[name] = [found[layer] for layer in neurons]
    return Campaign(detectors, stored, records, next(iter(totals.values())))


def _replace(records: pd.DataFrame, changed: pd.DataFrame) -> pd.DataFrame:
    """The records under another detector: those of the injections that it changes are in `changed`."""
    names = ["layer", "index"]
    again = pd.MultiIndex.from_frame(records[names]).isin(pd.MultiIndex.from_frame(changed[names]))
    return pd.concat([records[~again], changed[RECORDS]], ignore_index=True)


def last_layer_weights(run: RunParams, layers: Sequence[LayerResult], weights: str) -> list[float]:
    """What each layer counts in "the last layer": for a text-guided classifier, latent layer and head make one.

    weights: `neurons` (E and C: the chance that a random neuron fault lands there), `equal`, or `head_only`.
    """
    counts = [0.0] * len(layers)
    counts[-1] = 1.0
    if run.variant != BASELINE and weights != "head_only":
        counts[-2:] = [float(layer.neurons) for layer in layers[-2:]] if weights == "neurons" else [1.0, 1.0]
    return counts


def write_results(runs: Mapping[str, RunParams], statistics: StatisticsParams) -> None:
    """Write metrics/results/RUN.json for every run, metrics/cells.json, and metrics/summary.json.

    Raises InvalidArtifact, InvalidParameter.
    """
    campaigns, described = {}, {}
    for key, run in runs.items():
        campaigns[key] = load_campaign(key, run, statistics)
        described[key] = _describe(key, run, campaigns[key], statistics)
    baselines = {(run.dataset, run.backbone, run.seed): key for key, run in runs.items() if run.variant == BASELINE}
    cells: dict[tuple[str, str, str], list[tuple[str, str, dict[str, dict[str, Improvement]]]]] = {}
    for key, run in runs.items():
        baseline = baselines.get((run.dataset, run.backbone, run.seed))
        if run.variant == BASELINE or baseline is None:
            continue
        found, layers = _compare(runs[baseline], campaigns[baseline], run, campaigns[key], statistics)
        _note_improvement(described[key], described[baseline], found, layers, statistics.confidence)
        cells.setdefault((run.dataset, run.backbone, run.variant), []).append((baseline, key, found))
    for key, content in described.items():
        write_json(RESULTS_DIR / f"{key}.json", content)
    described_cells = [_describe_cell(name, pairs, described, statistics) for name, pairs in cells.items()]
    write_json(CELLS_FILE, described_cells)
    write_json(Path("metrics") / "summary.json", _summary(described, described_cells))


def _describe(key: str, run: RunParams, campaign: Campaign, statistics: StatisticsParams) -> dict[str, Any]:
    """All that is known of one run by itself."""
    evaluation_file, predictions_file = RUNS_DIR / key / "evaluation.json", RECORDS_DIR / key / "predictions.parquet"
    evaluation = read_json(evaluation_file, "evaluate")
    predictions = read_parquet(predictions_file, "evaluate", ["label", "prediction", "loss", "top2diff"])
    with reading(evaluation_file, "evaluate"):
        cost = {name: int(evaluation[name]) for name in ("parameters", "multiply_adds")}
        scale = float(evaluation["scale"])
    confidence, stored, layers = statistics.confidence, campaign.stored, campaign.layers
    correct = (predictions["label"] == predictions["prediction"]).to_numpy(float)
    top1 = _with(rate_estimate(int(correct.sum()), len(correct), confidence), _blocks([correct], [1.0], np.nan))
    weights = last_layer_weights(run, layers, statistics.last_layer_weights)
    exposures = [_exposure(layer, statistics) for layer in stored["layers"]]
    failures = stored["bits"] * statistics.fit_per_bit
    sums = {layer: sums_by_bit(part, stored["bits"]) for layer, part in campaign.records.groupby("layer", sort=False)}
    sums |= {layer.layer: sums_of_totals(layer) for layer in campaign.totals}
    described = [
        {
            "layer": layer.layer.removeprefix("backbone."),
            **{name: site[name] for name in ("kind", "neurons", "multiply_adds")},
            **{name: getattr(layer, name) for name in ("method", "injections", "masked", "detected")},
            "delta_loss": _with(mean_interval(layer.delta_loss, confidence), _blocks(layer.strata, layer.shares, np.nan)),
            "mismatch": rate_interval(layer.mismatch, confidence).as_json(),
            "sdc": _with(rate_interval(layer.sdc, confidence), _blocks(layer.sdc_strata, layer.shares, np.nan)),
            "nonfinite": rate_interval(layer.broken, confidence).as_json(),
            "fit": _bounded(rate_interval(layer.sdc, confidence).times(exposure * failures)),
            **describe_layer(sums[layer.layer], stored["strata"]),
        }
        for layer, site, exposure in zip(layers, stored["layers"], exposures, strict=True)
    ]
    by_neurons = average([layer.delta_loss for layer in layers], [layer.neurons for layer in layers])
    network_fit = rate_interval(average([layer.sdc for layer in layers], exposures), confidence)
    return {
        "run": key,
        **{name: getattr(run, name) for name in ("dataset", "backbone", "variant", "seed")},
        "confidence": confidence,
        "plan": {
            "mark": fingerprint(**{name: stored["settings"][name] for name in PLAN_KEYS}),
            "seed": stored["settings"]["seed"],
            "plan": stored["settings"]["plan"],
            "injections": sum(layer.injections for layer in layers if layer.method == "sampled"),
            "enumerated": sum(layer.injections for layer in layers if layer.method == "exact"),
            "eligible_images": stored["eligible_images"],
            "detector": stored["settings"]["detector"],
        },
        "images": fingerprint(labels=predictions["label"].tolist()),
        "top1": top1,
        "loss": mean_estimate(predictions["loss"].to_numpy(float), confidence).as_json(),
        "top2diff": mean_estimate(predictions["top2diff"].to_numpy(float), confidence).as_json(),
        **cost,
        "scale": scale,
        # In magnitude, over the training set: as far as a fault in the last layer can take one behind the detector `profiled`.
        "largest_logit": scale * _largest_value(key, layers[-1].layer),
        "overall": {
            **_headline(layers, [1.0] * len(layers), confidence),
            "mismatch": rate_interval(average([layer.mismatch for layer in layers]), confidence).as_json(),
            "nonfinite": rate_interval(average([layer.broken for layer in layers]), confidence).as_json(),
            "delta_loss_by_neurons": mean_interval(by_neurons, confidence).as_json(),
            "fit": _bounded(network_fit.times(sum(exposures) * failures)),
        },
        "last_layer": _headline(layers, weights, confidence),
        "convergence": _convergence(campaign, statistics),
        "layers": described,
        "detectors": {
            name: {
                "overall": _headline(found, [1.0] * len(found), confidence),
                "last_layer": _headline(found, weights, confidence),
                "nonfinite": rate_interval(average([layer.broken for layer in found]), confidence).as_json(),
            }
            for name, found in campaign.detectors.items()
        },
        "improvement": None,
        "skipped": stored["skipped"],
        "settings": stored["settings"],
        "statistics": asdict(statistics),
    }


def _largest_value(key: str, layer: str) -> float:
    ranges = load_ranges(key).set_index("layer")["max_abs"]
    with reading(RUNS_DIR / key / "ranges.csv", "ranges"):
        return float(ranges[layer.removeprefix("backbone.")])


def _convergence(campaign: Campaign, statistics: StatisticsParams) -> list[dict[str, Any]]:
    """How DeltaLoss settled; nothing where injections were planned by what the first of them did."""
    if campaign.stored["strata"] or campaign.stored["settings"]["stop_at"] != "never":
        return []
    neurons = {layer.layer: layer.neurons for layer in campaign.layers}
    return convergence(campaign.records, neurons, statistics.nonfinite, statistics.confidence)


def _headline(layers: Sequence[LayerResult], weights: Sequence[float], confidence: float) -> dict[str, Any]:
    """Weighted means over layers, and of their blocks where all sampled ones have as many."""
    shares = [weight / sum(weights) for weight in weights]
    blocks: dict[str, list[np.ndarray]] = {"delta_loss": [], "sdc": []}
    for layer, share in zip(layers, shares, strict=True):
        if share:
            blocks["delta_loss"].append(share * _blocks(layer.strata, layer.shares, layer.delta_loss.value))
            blocks["sdc"].append(share * _blocks(layer.sdc_strata, layer.shares, layer.sdc.value))
    sums = {name: _sum(parts) for name, parts in blocks.items()}
    return {
        "delta_loss": _with(
            mean_interval(average([layer.delta_loss for layer in layers], weights), confidence), sums["delta_loss"]
        ),
        "sdc": _with(rate_interval(average([layer.sdc for layer in layers], weights), confidence), sums["sdc"]),
    }


def _sum(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Of exact layers, one number each, and of sampled ones; nothing where these have different numbers of blocks."""
    return sum(parts, np.zeros(1)) if len({len(part) for part in parts} - {1}) <= 1 else np.zeros(0)


def _with(estimate: Estimate, blocks: np.ndarray) -> dict[str, Any]:
    """The estimate, with the means of its sample's parts where there are enough."""
    numbers = [float(f"{block:.6g}") for block in blocks]
    return estimate.as_json() | ({"blocks": numbers} if len(numbers) >= FEWEST_BLOCKS else {})


def _blocks(strata: Sequence[np.ndarray], shares: Sequence[float], value: float) -> np.ndarray:
    """Means of equal parts of a sample, [K]: part j holds observations j, j + K, ... of each stratum. [value] if exact."""
    if not strata:
        return np.array([value])
    count = min([BLOCKS, *(len(stratum) for stratum in strata)])
    pairs = list(zip(shares, strata, strict=True))
    return np.array([sum(share * stratum[part::count].mean() for share, stratum in pairs) for part in range(count)])


def _exposure(site: Mapping[str, Any], statistics: StatisticsParams) -> int:
    """How many values a layer's faults can hit. Raises InvalidArtifact where that is not known."""
    if site[statistics.fit_exposure] is None:
        raise InvalidArtifact(
            f"the multiply-adds of a {site['kind']} like {site['layer']!r} are not known; "
            "set params.yaml statistics.fit_exposure to neurons"
        )
    return int(site[statistics.fit_exposure])


def _bounded(estimate: Estimate) -> dict[str, Any]:
    """An estimated rate of failures; where none was seen, its upper bound and no value."""
    return estimate.as_json() | ({"value": None} if estimate.value == 0 < estimate.high else {})


def _compare(
    baseline_run: RunParams, baseline: Campaign, run: RunParams, guided: Campaign, statistics: StatisticsParams
) -> tuple[dict[str, dict[str, Improvement]], list[Estimate | None]]:
    """Detector -> improvement of `overall`, `last_layer` and `head`; and each layer's, under the detector that counts.

    head: the text-guided head alone against the baseline's last layer, however `last_layer` weighs head and latent layer.
    """
    found: dict[str, dict[str, Improvement]] = {}
    by_layer: list[Estimate | None] = []
    for name in guided.detectors:
        if name not in baseline.detectors:
            continue
        layers = baseline.detectors[name], guided.detectors[name]
        drawn = draw_pairs(*layers, statistics.bootstrap, seed=0)

        def between(weights: Sequence[Sequence[float]], drawn: tuple[list[Draws], list[Draws]] = drawn) -> Improvement:
            return improvement(
                *(weigh(draws, counts) for draws, counts in zip(drawn, weights, strict=True)), statistics.confidence
            )

        def last(weights: str, layers: tuple[list[LayerResult], list[LayerResult]] = layers) -> list[list[float]]:
            return [last_layer_weights(who, part, weights) for who, part in zip((baseline_run, run), layers, strict=True)]

        found[name] = {
            "overall": between([[1.0] * len(part) for part in layers]),
            "last_layer": between(last(statistics.last_layer_weights)),
            "head": between(last("head_only")),
        }
        if not by_layer:
            by_layer = [improvement(*pair, statistics.confidence).estimate for pair in zip(*drawn, strict=False)]
    return found, by_layer


def _note_improvement(
    content: dict[str, Any],
    baseline: dict[str, Any],
    found: dict[str, dict[str, Improvement]],
    layers: Sequence[Estimate | None],
    confidence: float,
) -> None:
    first = next(iter(found.values()))
    content["improvement"] = {
        "baseline": baseline["run"],
        **{name: part.estimate.as_json() for name, part in first.items()},
        "top2diff": difference(read_estimate(content["top2diff"]), read_estimate(baseline["top2diff"])).as_json(),
        "verdict": {name: verdict(part.estimate, confidence) for name, part in first.items()},
    }
    for layer, estimate in zip(content["layers"], layers, strict=False):
        layer["improvement"] = estimate.as_json() if estimate else None
    for name, parts in found.items():
        content["detectors"][name]["improvement"] = {part: value.estimate.as_json() for part, value in parts.items()}


def _describe_cell(
    name: tuple[str, str, str],
    pairs: Sequence[tuple[str, str, dict[str, dict[str, Improvement]]]],
    described: Mapping[str, dict[str, Any]],
    statistics: StatisticsParams,
) -> dict[str, Any]:
    """A cell beside its baselines: means over trainings where there are several, with intervals over these."""
    guided, baselines = [described[key] for _, key, _ in pairs], [described[key] for key, _, _ in pairs]
    confidence = statistics.confidence

    def mean(parts: Sequence[dict[str, Any]], *path: str) -> Estimate:
        return _mean_over_trainings([_follow(part, path) for part in parts], confidence)

    improvements = {
        detector: {part: across([found[detector][part] for _, _, found in pairs], confidence) for part in parts}
        for detector, parts in pairs[0][2].items()
    }
    first = next(iter(improvements.values()))
    return {
        **dict(zip(("dataset", "backbone", "variant"), name, strict=True)),
        "seeds": [part["seed"] for part in guided],
        "top1_baseline": mean(baselines, "top1").as_json(),
        "top1": mean(guided, "top1").as_json(),
        **{extra: guided[0][extra] - baselines[0][extra] for extra in ("parameters", "multiply_adds")},
        **{part: estimate.as_json() for part, estimate in first.items()},
        "verdict": {part: verdict(estimate, confidence) for part, estimate in first.items()},
        "top2diff": mean(guided, "improvement", "top2diff").as_json(),
        "detectors": {
            detector: {
                **{part: estimate.as_json() for part, estimate in parts.items()},
                **{
                    f"{part}_{who}": mean(members, "detectors", detector, part, "delta_loss").as_json()
                    for part in ("overall", "last_layer")
                    for who, members in (("baseline", baselines), ("guided", guided))
                },
                "nonfinite_baseline": mean(baselines, "detectors", detector, "nonfinite").as_json(),
                "nonfinite_guided": mean(guided, "detectors", detector, "nonfinite").as_json(),
            }
            for detector, parts in improvements.items()
        },
    }


def _follow(content: dict[str, Any], path: Sequence[str]) -> Estimate:
    for step in path:
        content = content[step]
    return read_estimate(content)


def _mean_over_trainings(estimates: Sequence[Estimate], confidence: float) -> Estimate:
    """The estimate of one training; of several their mean, with Student's interval over trainings."""
    if len(estimates) == 1:
        return estimates[0]
    values, count = np.array([estimate.value for estimate in estimates]), len(estimates)
    half = float(stdtrit(count - 1, 0.5 + confidence / 2) * values.std(ddof=1)) / math.sqrt(count)
    mean = float(values.mean())
    return Estimate(mean, mean - half, mean + half, sum(estimate.n for estimate in estimates))


def _summary(described: Mapping[str, dict[str, Any]], cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Variant -> means over its runs: top1 and sdc in percent, dl (DeltaLoss) in nats; x_last, x_all: geometric means."""
    lines: dict[str, dict[str, float | None]] = {}
    for variant in dict.fromkeys(content["variant"] for content in described.values()):
        runs = [content for content in described.values() if content["variant"] == variant]
        line = {
            "top1": 100 * _mean(content["top1"] for content in runs),
            "sdc": 100 * _mean(content["overall"]["sdc"] for content in runs),
            "dl": _mean(content["overall"]["delta_loss"] for content in runs),
        }
        own = [cell for cell in cells if cell["variant"] == variant]
        for name, part in (("x_last", "last_layer"), ("x_all", "overall")):
            values = [read_estimate(cell[part]).value for cell in own]
            if values:
                line[name] = math.exp(float(np.mean(np.log(values))))
        lines[variant] = {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in line.items()}
    return lines


def _mean(stored: Iterator[dict[str, Any]]) -> float:
    return float(np.mean([read_estimate(part).value for part in stored]))


def read_estimate(stored: Mapping[str, Any]) -> Estimate:
    """What `Estimate.as_json` returned. Raises KeyError, TypeError, ValueError for anything else."""
    numbers = [float("nan") if stored[name] is None else float(stored[name]) for name in ("value", "low", "high")]
    return Estimate(*numbers, n=int(stored["n"]))


@dataclass(frozen=True)
class Layer:
    """One layer of a run. name: without the prefix that the text-guided classifier puts before its backbone's layers.

    outcomes, by_bit: see textguard.report.breakdown.describe_layer.
    """

    name: str
    exact: bool
    injections: int
    delta_loss: Estimate
    outcomes: dict[str, float]
    by_bit: dict[str, list]


@dataclass(frozen=True)
class Result:
    """What figures show of one run. Rates are shares, 0 to 1. overall: DeltaLoss, nats."""

    key: str
    run: RunParams
    top1: Estimate
    overall: Estimate
    layers: list[Layer]
    convergence: list[dict[str, Any]]


def load_result(key: str, run: RunParams) -> Result:
    """Read metrics/results/RUN.json. Raises InvalidArtifact."""
    file = RESULTS_DIR / f"{key}.json"
    stored = read_json(file, "results")
    with reading(file, "results"):
        layers = [
            Layer(
                layer["layer"],
                layer["method"] == "exact",
                int(layer["injections"]),
                read_estimate(layer["delta_loss"]),
                {name: float(share) for name, share in layer["outcomes"].items()},
                {name: list(numbers) for name, numbers in layer["by_bit"].items()},
            )
            for layer in stored["layers"]
        ]
        top1, overall = read_estimate(stored["top1"]), read_estimate(stored["overall"]["delta_loss"])
        return Result(key, run, top1, overall, layers, list(stored["convergence"]))


def load_cells(runs: Mapping[str, RunParams]) -> list[dict[str, Any]]:
    """Read metrics/cells.json, the cells of these runs. Raises InvalidArtifact."""
    wanted = {(run.dataset, run.backbone, run.variant) for run in runs.values()}
    stored = read_json(CELLS_FILE, "results")
    with reading(CELLS_FILE, "results"):
        if not isinstance(stored, list):
            raise InvalidArtifact("is no list of cells")
        cells = [cell for cell in stored if (cell["dataset"], cell["backbone"], cell["variant"]) in wanted]
        for cell in cells:
            for part in IMPROVED:
                operator.getitem(cell["verdict"], part)
                for numbers in (cell, *cell["detectors"].values()):
                    read_estimate(numbers[part])
        return cells


def load_run(key: str) -> dict[str, Any]:
    """Read metrics/results/RUN.json whole. Raises InvalidArtifact."""
    return read_json(RESULTS_DIR / f"{key}.json", "results", RUN_FIELDS)


def load_ranges(key: str) -> pd.DataFrame:
    """Read one run's value ranges: layer (without prefix), max_abs, mean_abs, images. Raises InvalidArtifact."""
    table = read_csv(RUNS_DIR / key / "ranges.csv", "ranges", ["layer"], ["max_abs", "mean_abs", "images"])
    return table.assign(layer=table["layer"].str.removeprefix("backbone."))


def load_threshold_curve(key: str) -> pd.DataFrame:
    """Read one run's accuracy against Top2Diff threshold, both in percent. Raises InvalidArtifact."""
    return read_csv(RUNS_DIR / key / "thresholds.csv", "evaluate", [], ["threshold_percent", "accuracy_percent"])


def load_closeup(key: str) -> dict[str, Any]:
    """Read metrics/closeup/RUN.json whole. Raises InvalidArtifact."""
    return read_json(CLOSEUP_DIR / f"{key}.json", "closeup", ("last_layer", "cam"))


def load_looks(key: str) -> pd.DataFrame:
    """Read what stage closeup saw: one row per image and state, see stages/closeup.py. Raises InvalidArtifact."""
    columns = ["image", "label", "class", "state", "finite", "prediction", "predicted", "confidence", "map", "picture"]
    return read_parquet(CLOSEUP_DIR / f"{key}.parquet", "closeup", columns)
