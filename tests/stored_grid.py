"""A small grid's stored records, as the stages leave them in the current folder, and what its tests share."""

import io
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from textguard.artifacts import write_json, write_parquet
from textguard.estimates.statistics import mean_estimate, rate_estimate
from textguard.estimates.summary import Totals
from textguard.params import FaultParams, InjectParams, Run, StatisticsParams

STATISTICS = StatisticsParams(0.99, 300, "goldeneye", "neurons", 2e-5, "neurons")
INJECTIONS = 200
INJECT = InjectParams(
    engine="replay",
    format="fp32",
    detector="profiled",
    compare_detectors=["off"],
    mitigation="none",
    kinds=["Conv2d", "Linear"],
    faults=FaultParams("neuron", "flip", 1, 1, "value", [8, 8], "equal", "inference"),
    plan="uniform",
    images="uniform",
    injections_per_layer=INJECTIONS,
    pilot=64,
    stop_at="never",
    confidence=0.99,
    enumerate_up_to=1,
    batch_size=64,
    image_batch=8,
    seed=0,
)
INPUTS = "0123456789abcdef"
SETTINGS = {**asdict(INJECT), "inputs": INPUTS, "device": "cpu"}


def campaign_of(layers: dict[str, tuple[int, float]], exact_layer: str, seed: int) -> tuple[dict, pd.DataFrame, pd.DataFrame]:
    """What the stage inject leaves: layer -> (neurons, mean DeltaLoss); one layer is enumerated, without a spread."""
    draw = np.random.default_rng(seed)
    records = []
    for layer, (_, mean) in layers.items():
        if layer == exact_layer:
            continue
        loss = draw.exponential(mean, INJECTIONS).astype("float32")
        records.append(
            pd.DataFrame(
                {
                    **{
                        "layer": layer,
                        "index": range(INJECTIONS),
                        "image": 0,
                        "neuron": 0,
                        "bit": draw.integers(0, 32, INJECTIONS),
                    },
                    **{"weight": 1.0, "golden_value": 0.0, "faulty_value": 0.0, "detected": np.arange(INJECTIONS) < 10},
                    **{"masked": False, "golden_loss": 0.0, "faulty_loss": loss, "mismatch": np.arange(INJECTIONS) < 20},
                }
            )
        )
    together = pd.concat(records, ignore_index=True)
    changed = together[together["detected"]].assign(faulty_loss=math.nan, detector="off")
    neurons, mean = layers[exact_layer]
    totals = Totals(exact_layer, neurons, *(np.full(32, number) for number in (100, 5, 10, 20, 0)), np.full(32, 100 * mean))
    stored = {
        "layers": [
            {"layer": layer, "kind": "Linear", "neurons": neurons, "multiply_adds": 2 * neurons}
            for layer, (neurons, _) in layers.items()
        ],
        **{
            "bits": 32,
            "strata": 0,
            "eligible_images": 10,
            "detectors": ["profiled", "off"],
            "skipped": {},
            "settings": SETTINGS,
        },
        "exact": {name: [totals.as_json()] for name in ("profiled", "off")},
    }
    return stored, together, changed


def store(key: str, run: Run, layers: dict[str, tuple[int, float]], correct: int, seed: int = 0) -> None:
    """What the stages leave of one run of which `correct` of 100 images are predicted right; see `campaign_of`."""
    out, records_out = Path("metrics/runs") / key, Path("metrics/records") / key
    stored, records, changed = campaign_of(layers, list(layers)[-1], seed)
    write_json(out / "campaign.json", stored)
    write_parquet(records_out / "injections.parquet", records, {"inputs": INPUTS})
    write_parquet(records_out / "detectors.parquet", changed, {"inputs": INPUTS})
    guided = run.variant != "baseline"
    cost = {"parameters": 11_000_000 + 250_000 * guided, "multiply_adds": 40_000_000}
    rest = {"scale": 12.0 if guided else 1.0, "weights": key, "seed": run.seed, "device": "cpu"}
    top2diff = np.full(100, 0.95 if guided else 0.9)
    means = {"loss": mean_estimate(np.full(100, 0.1)).as_json(), "top2diff": mean_estimate(top2diff).as_json()}
    write_json(out / "evaluation.json", {"top1": rate_estimate(correct, 100).as_json(), **means, **cost, **rest})
    wrong = (np.arange(100) >= correct).astype(int)
    predictions = pd.DataFrame({"image": range(100), "label": 0, "prediction": wrong, "loss": 0.1, "top2diff": top2diff})
    write_parquet(records_out / "predictions.parquet", predictions)
    ranges = pd.DataFrame(
        {
            **{"layer": list(layers), "kind": "Conv2d", "neurons": 1, "max_abs": np.arange(len(layers)) + 2.0},
            **{"mean_abs": 0.5, "images": 50},
        }
    )
    ranges.to_csv(out / "ranges.csv", index=False)
    epochs = pd.DataFrame({"epoch": [1, 2], "loss": [2.0, 1.0], "accuracy": [0.5, 0.6], "learning_rate": 0.1})
    epochs.to_csv(out / "training.csv", index=False)
    curve = pd.DataFrame({"threshold_percent": range(41), "accuracy_percent": [100 - i for i in range(41)]})
    curve.to_csv(out / "thresholds.csv", index=False)
    store_closeup(key)
    store_hardware(key, float(guided))


def store_hardware(key: str, guided: float = 0.0) -> None:
    """What stage hardware leaves: one kind of faults, which does half as much to a text-guided classifier, and two curves."""

    def near(value: float) -> dict[str, float]:
        return {"value": value, "low": 0.9 * value, "high": 1.1 * value, "n": 64}

    def headline(value: float) -> dict[str, dict[str, float]]:
        return {"delta_loss": near(value), "sdc": near(value / 4), "mismatch": near(value / 5)}

    means = headline(0.2 / (1 + guided))
    lost = {"accuracy": near(1.5), "critical": near(0.2), "harmless": near(0.5)}
    faults = {**asdict(INJECT.faults)}
    models = [
        {"name": name, "faults": faults, "injections": 64, "places": 4, "overall": means, "by_values": means, **rest}
        for name, rest in (("two_bits", {}), ("weight_for_good", {"lost": lost}))
    ]
    point = {"rate": 1e-5, "memories": 8, "flips": 90.0, "accuracy": near(2.0), "delta_loss": near(0.1), "changed": near(0.03)}
    point |= {"corrected": 0.0, "detected": 0.0, "silent": 90.0}

    def points_of(bits: float) -> list[dict]:
        """At the higher rate twelve points are lost, and a protection leaves a tenth of it all."""
        left = 1.0 if bits == 1 else 0.1
        return [
            point,
            point | {"rate": 1e-4, "accuracy": near(12 * left), "delta_loss": near(3 * left), "changed": near(0.5 * left)},
        ]

    losing = [{"points": points, "rate": near(1e-6 * points * (1 + guided))} for points in (1.0, 5.0)]
    curves = [
        {"protection": name, "bits": bits, "gates": 1e3 * (bits - 1), "points": points_of(bits), "losing": losing}
        for name, bits in (("none", 1.0), ("secded(64)", 1.125))
    ]
    # A mitigation leaves a quarter of what faults do; of a guided classifier, an eighth.
    mitigations = [
        {
            **{"mitigation": name, "comparisons": comparisons, "bits": bits, "top1_change": near(0.0)},
            **{"injections": 64, "places": 4, "overall": means, "by_values": means},
        }
        for name, comparisons, bits, means in (
            ("none", 0.0, 1.0, headline(0.8)),
            ("ranger", 2e5, 1.001, headline(0.2 / (1 + guided))),
        )
    ]
    content = {"confidence": 0.99, "images": 100, "models": models, "mitigations": mitigations, "curves": curves}
    write_json(Path(f"metrics/hardware/{key}.json"), content)


def store_closeup(key: str) -> None:
    """What stage closeup leaves: two images under two kinds of faults, the second of which leaves nothing finite.

    Flipped weights change the second image's class, and of each map two places in their order: 0.8 by rank.
    """
    powers = list(range(-40, 39))
    shares = [float(power == 0) for power in powers]
    last = {"layer": "fc", "profiled": 2.0, "images": 50, "powers": powers, "golden": shares}
    last["faulty"] = [0.99 * share for share in shares]
    found = {name: {"value": 0.5, "low": 0.4, "high": 0.6, "n": 2} for name in ("rank_correlation", "overlap", "changed")}
    cam = {"layer": "conv1", "places": 4, "images": 2, "detector": "off", "weights": {**found, "flips": 2000, "finite": 2}}
    cam["weights"]["rank_correlation"] = {"value": 0.8, "low": None, "high": None, "n": 2}
    cam["worst"] = {**found, "finite": 0, "target": "neuron", "layer": "conv1", "neuron": 7, "bit": 30}
    cam["worst"]["rank_correlation"] = {"value": 0.0, "low": None, "high": None, "n": 2}
    cam["worst"] |= {"golden_value": 1.0, "faulty_value": -1.0, "changed": {"value": 1.0, "low": 0.4, "high": 1.0, "n": 2}}
    write_json(Path(f"metrics/closeup/{key}.json"), {"last_layer": {**last, "beyond": 0.1, "not_finite": 0.01}, "cam": cam})
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 90, 90)).save(file, "png")
    maps = {"golden": [0.0, -1.0, 2.0, 1.0], "weights": [0.0, -1.0, 1.0, 2.0], "worst": [math.nan] * 4}
    looks = pd.DataFrame(
        {
            **{"image": image, "label": 0, "class": "<b>$x", "state": state, "finite": state != "worst"},
            "prediction": image * (state != "weights"),
            **{"predicted": "a very long class", "confidence": 0.5, "map": maps[state]},
            **{"picture": file.getvalue() if state == "golden" else b""},
        }
        for image in (0, 1)
        for state in ("golden", "weights", "worst")
    )
    write_parquet(Path(f"metrics/looks/{key}.parquet"), looks)


BASELINE_LAYERS = {"conv1": (100, 0.2), "fc": (10, 3.0)}
GUIDED_LAYERS = {"backbone.conv1": (100, 0.1), "backbone.fc": (90, 0.2), "head": (10, 1.2)}


def run_of(dataset: str, backbone: str, variant: str, seed: int = 0) -> Run:
    """A run's parameters."""
    return Run(dataset, backbone, variant, seed)


def store_grid() -> dict[str, Run]:
    """Store a baseline and two text-guided runs of one backbone, and a baseline without a partner."""
    runs = {}
    for seed, variant in enumerate(("baseline", "template", "descriptions")):
        key = f"d-resnet18-{variant}-0"
        runs[key] = run_of("d", "resnet18", variant)
        store(key, runs[key], BASELINE_LAYERS if variant == "baseline" else GUIDED_LAYERS, 97, seed)
    runs["e-alexnet-baseline-0"] = run_of("e", "alexnet", "baseline")
    store("e-alexnet-baseline-0", runs["e-alexnet-baseline-0"], {"conv1": (100, 0.2), "fc": (10, 1.0)}, 50)
    return runs


def store_text_quality(key: str, answers: int, embedded: int, encoder: str = "minilm") -> None:
    """What stage text_quality leaves of one text variant."""
    cosines = dict.fromkeys(("mean_pairwise_cosine", "largest_cosine", "mean_spread"), 0.5)
    counts = ("strays", "off_class", "empty", "duplicate", "too_short", "unnamed", "not_english", "cut", "filtered", "refused")
    texts = {"classes": 10, "closest_classes": ["one", "two"], "answers": answers, "embedded": embedded}
    write_json(
        Path(f"metrics/texts/{key}.json"), texts | cosines | dict.fromkeys(counts, 0) | {"encoder": encoder, "shortened": 0}
    )


def store_corruptions(key: str, guided: bool, lost: float) -> None:
    """What stage corruptions leaves: noise costs a baseline half of its accuracy, and a text-guided classifier a quarter."""

    def near(value: float) -> dict[str, float]:
        return {"value": value, "low": 0.9 * value, "high": 1.1 * value, "n": 100}

    def on_images(kind: str, severity: int, top1: float) -> dict:
        return {"kind": kind, "severity": severity, "top1": near(top1), "loss": near(1 - top1), "top2diff": near(top1 / 2)}

    damage = 0.2 / (1 + guided)
    overall = {"delta_loss": near(damage), "sdc": near(damage / 4), "mismatch": near(damage / 5)}
    faults = {"images": 80, "injections": 64, "overall": overall}
    conditions = [on_images("clean", 0, 0.8) | {"faults": faults}]
    conditions += [on_images("noise", severity, 0.8 - 0.1 * severity / (1 + guided)) for severity in (1, 4)]
    conditions[-1]["faults"] = faults
    content = {"confidence": 0.99, "images": 100, "conditions": conditions, "lost": near(lost)}
    write_json(Path(f"metrics/corruptions/{key}.json"), content)
