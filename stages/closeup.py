"""Look at one classifier under faults: Ablation-CAM before and after them, and the values of its last layer."""

import io
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from textguard.artifacts import read_csv, read_parquet, write_json, write_parquet
from textguard.closeup import (
    CamModel,
    OneFault,
    count_magnitudes,
    mean_over_images,
    one_fault,
    overlap,
    rank_correlation,
    worst_injection,
)
from textguard.errors import UnsupportedModel
from textguard.estimates.statistics import rate_estimate
from textguard.faults.damage import SINGLE_FLIP, FaultModel, Storage
from textguard.faults.detectors import detector_limits
from textguard.faults.engines import make_engine
from textguard.faults.formats import parse_format
from textguard.faults.mitigations import protect
from textguard.faults.plans import bits_of
from textguard.params import Params
from textguard.runtime import pick_device, progress
from textguard.vision.classifiers import load_classifier
from textguard.vision.datasets import data_root, load_split
from textguard.vision.transforms import EvaluationView, evaluation_view, image_loader

AT_ONCE = 8  # images
LOOKS = ["image", "label", "class", "state", "finite", "prediction", "predicted", "confidence", "map", "picture"]
State = tuple[Callable[[], AbstractContextManager[None]], OneFault | None]


def main(params: Params, key: str) -> None:
    run, inject, closeup = params.runs[key], params.inject, params.closeup
    dataset, folder = params.datasets[run.dataset], Path("metrics") / "runs" / key
    ranges = read_csv(folder / "ranges.csv", "ranges", ["layer"], ["max_abs"])
    bounds = read_csv(folder / "activations.csv", "ranges", ["activation"], ["low", "high"])
    records = read_parquet(
        Path("metrics") / "records" / key / "injections.parquet",
        "inject",
        ["layer", "index", "neuron", "bit", "golden_loss", "faulty_loss"],
    )
    model, spec = load_classifier(Path("models") / f"{key}.safetensors")
    split = load_split(Path("data") / run.dataset, "test", data_root(dataset.source, dataset.folder, Path(params.root)))
    view = evaluation_view(split, spec.image_size, spec.resize_size, spec.interpolation)
    image = view[0][0].to(pick_device())
    bounded = {name: (low, high) for name, low, high in bounds[["activation", "low", "high"]].itertuples(index=False)}
    model = protect(model.to(image.device), image, bounded, inject.mitigation)
    number_format, fault_model = parse_format(inject.format), FaultModel(**asdict(inject.faults))
    bits = bits_of(SINGLE_FLIP, number_format)
    profiled = dict(zip(ranges["layer"], ranges["max_abs"], strict=True))
    setting = {"kinds": inject.kinds, "number_format": number_format, "profiled": profiled}

    engine = make_engine(inject.engine, model, image, inject.batch_size, **setting)
    last = engine.sites[-1]
    limit = profiled[last.layer]
    storage = Storage(number_format, limit, last.neurons, image.device)
    values = count_magnitudes(engine, image_loader(view, inject.batch_size), storage, limit, bits)
    content: dict[str, Any] = {"last_layer": {"layer": last.layer, "profiled": limit, "images": len(view), **values}}

    try:
        cam = CamModel(model, image, **setting, smallest=closeup.smallest_map)
    except UnsupportedModel as error:
        looks, content["cam"] = pd.DataFrame(columns=LOOKS), {"skipped": str(error)}
    else:
        # The backbone's last layer and the head differ from variant to variant: only before them can faults be the same.
        without = sum(site.kind == "Linear" for site in cam.sites[-2 if spec.width else -1 :])
        weights = cam.draw_flips(closeup.weight_flips, without, bits, closeup.seed)
        worst = worst_injection(records)
        drawn = np.random.default_rng(closeup.seed).choice(len(view), min(closeup.images, len(view)), replace=False)
        states = _states(cam, weights, worst, fault_model, inject.detector, profiled)
        looks = _look(cam, view, np.sort(drawn).tolist(), states, inject.batch_size, f"closeup {key}")
        content["cam"] = {
            "layer": cam.place.name,
            "places": cam.place.side**2,
            "images": len(drawn),
            "detector": inject.detector,
            **_shifts(looks),
        }
        if not weights.empty:
            content["cam"]["weights"] |= {"flips": len(weights)}
        if not worst.empty:
            first = worst[["layer", "neuron", "bit", "golden_value", "faulty_value"]].iloc[0].to_dict()
            content["cam"]["worst"] |= {"target": fault_model.target, **first}
    write_parquet(Path("metrics") / "closeup" / f"{key}.parquet", looks)
    write_json(Path("metrics") / "closeup" / f"{key}.json", content)


def _states(
    cam: CamModel,
    weights: pd.DataFrame,
    worst: pd.DataFrame,
    fault_model: FaultModel,
    detector: str,
    profiled: dict[str, float],
) -> dict[str, State]:
    """What is done to the classifier: its name, how to damage the weights, the fault in each inference."""

    def of_weights(weight: torch.Tensor) -> float:
        return detector_limits(detector, ["weights"], {"weights": float(weight.abs().max())})["weights"]

    states: dict[str, State] = {"golden": (nullcontext, None)}
    if not weights.empty:
        states["weights"] = (lambda: cam.flipped(weights, of_weights), None)
    if worst.empty:
        return states
    site = next(site for site in cam.sites if site.layer == worst["layer"].iloc[0])
    if fault_model.target == "weight":
        damaged = worst.groupby("neuron")["bit"].agg(lambda bits: int(np.left_shift(1, bits).sum()))
        flips = pd.DataFrame({"parameter": site.parameter, "place": damaged.index, "mask": damaged.to_numpy()})
        states["worst"] = (lambda: cam.flipped(flips, of_weights), None)
    else:
        limit = detector_limits(detector, [site.layer], profiled)[site.layer]
        states["worst"] = (nullcontext, one_fault(worst, fault_model, site.position, limit, cam.device))
    return states


def _look(
    cam: CamModel, view: EvaluationView, positions: list[int], states: dict[str, State], batch_size: int, label: str
) -> pd.DataFrame:
    """One row per image and state, with LOOKS: map is [side * side], picture a PNG of what the classifier sees, once."""
    rows = []
    with progress(total=len(positions) * len(states), label=label, unit="map") as bar:
        for start in range(0, len(positions), AT_ONCE):
            part = positions[start : start + AT_ONCE]
            images, labels = zip(*view.__getitems__(part), strict=True)
            images, labels = torch.stack(images).to(cam.device), torch.tensor(labels, device=cam.device)
            for state, (damaged, fault) in states.items():
                with damaged():
                    looks = cam.look(images, labels, batch_size, fault)
                best = looks.logits.softmax(dim=1).max(dim=1)
                for number, position in enumerate(part):
                    rows.append(
                        {
                            "image": position,
                            "label": int(labels[number]),
                            "class": view.split.classes[int(labels[number])],
                            "state": state,
                            "finite": bool(looks.logits[number].isfinite().all() and looks.maps[number].isfinite().all()),
                            "prediction": int(best.indices[number]),
                            "predicted": view.split.classes[int(best.indices[number])],
                            "confidence": float(best.values[number]),
                            "map": looks.maps[number].flatten().tolist(),
                            "picture": _png(view, images[number]) if state == "golden" else b"",
                        }
                    )
                bar.update(len(part))
    return pd.DataFrame(rows)[LOOKS]


def _png(view: EvaluationView, image: torch.Tensor) -> bytes:
    mean, std = (torch.tensor(values, device=image.device)[:, None, None] for values in (view.split.mean, view.split.std))
    pixels = (255 * (image * std + mean)).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def _shifts(looks: pd.DataFrame) -> dict[str, Any]:
    """How far the maps of each damaged state are from the golden ones, with intervals over images."""
    by_state = dict(iter(looks.groupby("state", sort=False)))
    golden = by_state.pop("golden")
    found = {}
    for state, faulty in by_state.items():
        pairs = [(np.array(before), np.array(after)) for before, after in zip(golden["map"], faulty["map"], strict=True)]
        same = (golden["prediction"].to_numpy() == faulty["prediction"].to_numpy()) & faulty["finite"].to_numpy()
        found[state] = {
            "finite": int(faulty["finite"].sum()),
            "rank_correlation": mean_over_images([rank_correlation(*pair) for pair in pairs]).as_json(),
            "overlap": mean_over_images([overlap(*pair) for pair in pairs]).as_json(),
            "changed": rate_estimate(int((~same).sum()), len(faulty)).as_json(),
        }
    return found
