"""Runs' metrics files for the gate's tests, made of the DeltaLoss of every injection."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from textguard.analysis.regression import Comparison, judge
from textguard.params import GateParams
from textguard.report.gate import failures, verdict_markdown
from textguard.schema.campaign import PLAN_KEYS
from textguard.schema.results import MEASURES, PLACES, RunResult

QUANTILE_99 = 2.5758293035489004  # of the normal distribution, for a two-sided interval
TOLERANCES = GateParams(1.0, 10.0, 10.0, 10.0, 0.01)
LAYERS, INJECTIONS, IMAGES, BLOCKS = 12, 1024, 1024, 32
Metrics = dict[str, Any]


def sampled(values: np.ndarray) -> Metrics:
    """Mean of a sample, shape [N], with its 99 % interval and blocks."""
    half = QUANTILE_99 * values.std(ddof=1) / math.sqrt(len(values))
    mean = values.mean()
    blocks = values.reshape(BLOCKS, -1).mean(axis=1).tolist()
    return {"value": mean, "low": mean - half, "high": mean + half, "n": len(values), "blocks": blocks}


def exact(value: float) -> Metrics:
    return {"value": value, "low": value, "high": value, "n": 10_000}


def metrics(losses: np.ndarray, right: np.ndarray, plan: str = "p0", images: str = "i0") -> Metrics:
    """A run's metrics file. losses: DeltaLoss of every injection, [layers, N]. right: whether each image is, [images]."""
    overall = sampled(losses.mean(axis=0))
    overall["high"] = overall["value"] + math.hypot(*(m["high"] - m["value"] for m in map(sampled, losses))) / len(losses)
    overall["low"] = 2 * overall["value"] - overall["high"]
    gain, spread = 10 / overall["value"], math.exp(overall["high"] / overall["value"] - 1)
    improvement = {"value": gain, "low": gain / spread, "high": gain * spread, "n": losses.size}
    sdc = sampled((losses > 3).mean(axis=0))
    means, last = {"delta_loss": overall, "sdc": sdc, "mismatch": sdc}, dict.fromkeys(MEASURES, exact(0.01))
    ratios = dict.fromkeys(PLACES, improvement)
    return {
        "run": "digits-resnet18-descriptions-0",
        "dataset": "digits",
        "backbone": "resnet18",
        "variant": "descriptions",
        "seed": 0,
        "confidence": 0.99,
        "plan": {
            **{"mark": plan, "seed": 0, "plan": "uniform", "injections": losses.size, "enumerated": 0},
            **{"eligible_images": len(right), "detector": "profiled"},
        },
        "images": images,
        "top1": sampled(right.astype(float)),
        "loss": exact(0.1),
        "top2diff": exact(0.9),
        "parameters": 1,
        "multiply_adds": 1,
        "scale": 10.0,
        "largest_logit": 12.0,
        "head": last,
        "last_layer": last,
        "others": means,
        "overall": means | {"nonfinite": exact(0.0), "fit": exact(1.0)},
        "by_neurons": means,
        "convergence": [],
        "layers": [_layer(f"conv{number}", row) for number, row in enumerate(losses)],
        "detectors": {},
        "improvement": {
            "baseline": "b",
            **dict.fromkeys(MEASURES, ratios),
            "top2diff": exact(0.0),
        },
        "skipped": {},
        "settings": dict.fromkeys((*PLAN_KEYS, "detector", "inputs", "device"), "the same"),
        "statistics": {},
    }


def _layer(name: str, losses: np.ndarray) -> Metrics:
    return {
        **{"layer": name, "kind": "Conv2d", "neurons": 64, "multiply_adds": 64, "method": "sampled"},
        **{"injections": len(losses), "masked": 0, "detected": 0},
        **{"delta_loss": sampled(losses), "mismatch": exact(0.0), "sdc": sampled(losses > 3), "nonfinite": exact(0.0)},
        **{"fit": exact(1.0), "outcomes": {"masked": 0.0, "benign": 1.0, "sdc": 0.0, "nonfinite": 0.0}},
        **{"by_bit": {"n": [len(losses)], "delta_loss": [1.0], "sdc": [0.0]}},
    }


def even(seed: int = 0) -> np.ndarray:
    """DeltaLoss of a campaign that needs few injections: mean 1, standard deviation 1."""
    return np.random.default_rng(seed).exponential(size=(LAYERS, INJECTIONS))


def right(share: float = 0.95, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(IMAGES) < share


def changed(base: Metrics, place: str, change: Callable[[Any], Any]) -> Metrics:
    """A copy with one thing changed; numbers in the place's path count list entries."""
    new = copy.deepcopy(base)
    *parents, last = [int(part) if part.isdecimal() else part for part in place.split(".")]
    section = new
    for part in parents:
        section = section[part]
    section[last] = change(section[last])
    return new


def scaled(factor: float) -> Callable[[Metrics], Metrics]:
    def scale(old: Metrics) -> Metrics:
        new = {name: factor * old[name] for name in ("value", "low", "high")}
        return {**old, **new} | ({"blocks": [factor * block for block in old["blocks"]]} if "blocks" in old else {})

    return scale


def row(report: str, quantity: str) -> list[str]:
    """The cells of a quantity's line."""
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in report.splitlines()]
    (cells,) = (cells for cells in lines if quantity in cells)
    return cells


def report(comparisons: list[Comparison], tolerances: GateParams = TOLERANCES) -> tuple[int, str]:
    """How many numbers are worse, and what the gate prints."""
    judgements = judge(comparisons, tolerances.significance)
    return failures(judgements), verdict_markdown(judgements, tolerances.significance)


def as_run(content: Metrics) -> RunResult:
    """A metrics file's content as it is read."""
    return RunResult.model_validate_json(json.dumps(content))
