"""The measured results of a grid's runs, as the stages before left them in metrics/runs/."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from textguard.artifacts import read_csv, read_json, reading
from textguard.errors import InvalidArtifact
from textguard.faults.statistics import Estimate, difference, ratio, weighted_mean
from textguard.params import RunParams

RUNS_DIR = Path("metrics") / "runs"
BASELINE = "baseline"
VARIANT_ORDER = (BASELINE, "random", "template", "descriptions")


@dataclass(frozen=True)
class Layer:
    """One layer's campaign. name: without the prefix that the text-guided classifier puts before its backbone's layers."""

    name: str
    neurons: int
    delta_loss: Estimate
    mismatch: Estimate


@dataclass(frozen=True)
class Result:
    """One run: what it is, what it reaches without faults, and what faults do to it. Rates and Top2Diff are shares, 0 to 1."""

    key: str
    run: RunParams
    top1: Estimate
    top2diff: Estimate
    parameters: int
    multiply_adds: int
    overall: Estimate
    mismatch: Estimate
    nonfinite: int
    layers: list[Layer]

    def last_layer(self, weights: str) -> Estimate:
        """DeltaLoss of the last layer; for a text-guided classifier the weighted mean of latent layer and head.

        weights: `neurons` (E and C: the chance that a random neuron fault lands there), `equal`, or `head_only`.
        """
        if self.run.variant == BASELINE or weights == "head_only":
            return self.layers[-1].delta_loss
        last_two = self.layers[-2:]
        shares = [layer.neurons for layer in last_two] if weights == "neurons" else [1, 1]
        return weighted_mean([layer.delta_loss for layer in last_two], shares)


@dataclass(frozen=True)
class Comparison:
    """A run beside the baseline of the same data set, backbone and seed. Improvements are baseline / run, above 1 is better."""

    baseline: Result
    guided: Result
    last_layer: Estimate
    overall: Estimate
    top2diff: Estimate


def load_result(key: str, run: RunParams) -> Result:
    """Read one run's evaluation.json and resilience.json. Raises InvalidArtifact."""
    evaluation_file, resilience_file = RUNS_DIR / key / "evaluation.json", RUNS_DIR / key / "resilience.json"
    evaluation, resilience = read_json(evaluation_file, "evaluate"), read_json(resilience_file, "inject")
    with reading(evaluation_file, "evaluate"):
        top1, top2diff = _estimate(evaluation["top1"]), _estimate(evaluation["top2diff"])
        parameters, multiply_adds = int(evaluation["parameters"]), int(evaluation["multiply_adds"])
    with reading(resilience_file, "inject"):
        layers = [
            Layer(
                layer["layer"].removeprefix("backbone."),
                int(layer["neurons"]),
                _estimate(layer["delta_loss"]),
                _estimate(layer["mismatch"]),
            )
            for layer in resilience["layers"]
        ]
        overall, mismatch = _estimate(resilience["overall_delta_loss"]), _estimate(resilience["overall_mismatch"])
        nonfinite = int(resilience["nonfinite"])
        if len(layers) < 1 + (run.variant != BASELINE):
            raise InvalidArtifact("lacks layers")
    return Result(key, run, top1, top2diff, parameters, multiply_adds, overall, mismatch, nonfinite, layers)


def load_ranges(key: str) -> pd.DataFrame:
    """Read one run's value ranges: layer (without prefix), max_abs, mean_abs, images. Raises InvalidArtifact."""
    table = read_csv(RUNS_DIR / key / "ranges.csv", "ranges", ["layer"], ["max_abs", "mean_abs", "images"])
    return table.assign(layer=table["layer"].str.removeprefix("backbone."))


def load_threshold_curve(key: str) -> pd.DataFrame:
    """Read one run's accuracy against Top2Diff threshold, both in percent. Raises InvalidArtifact."""
    return read_csv(RUNS_DIR / key / "thresholds.csv", "evaluate", [], ["threshold_percent", "accuracy_percent"])


def compare(results: list[Result], last_layer_weights: str) -> list[Comparison]:
    """Set every run that is no baseline beside its baseline, in the results' order; runs without one are left out."""
    baselines = {_cell(result): result for result in results if result.run.variant == BASELINE}
    comparisons = []
    for guided in results:
        baseline = baselines.get(_cell(guided))
        if guided.run.variant == BASELINE or baseline is None:
            continue
        comparisons.append(
            Comparison(
                baseline,
                guided,
                last_layer=ratio(baseline.last_layer(last_layer_weights), guided.last_layer(last_layer_weights)),
                overall=ratio(baseline.overall, guided.overall),
                top2diff=difference(guided.top2diff, baseline.top2diff),
            )
        )
    return comparisons


def _cell(result: Result) -> tuple[str, str, int]:
    return result.run.dataset, result.run.backbone, result.run.seed


def _estimate(stored: dict) -> Estimate:
    numbers = [float("nan") if stored[name] is None else float(stored[name]) for name in ("value", "low", "high")]
    return Estimate(*numbers, n=int(stored["n"]))
