"""One call from a classifier and its data to the resilience of each layer, with intervals."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from torch import nn
from torch.utils.data import DataLoader

from textguard.faults.campaign import batches, device_of, eligible_images, profile_ranges, run_campaign, summarise
from textguard.faults.damage import SINGLE_FLIP, FaultModel, weight_limits
from textguard.faults.detectors import detector_limits
from textguard.faults.engines import make_engine
from textguard.faults.formats import parse_format
from textguard.faults.plans import draw_plan
from textguard.faults.sites import DEFAULT_KINDS


def assess(
    model: nn.Module,
    loader: DataLoader,
    *,
    injections_per_layer: int = 1000,
    seed: int = 0,
    detector: str = "profiled",
    number_format: str = "fp32",
    fault_model: FaultModel = SINGLE_FLIP,
    kinds: Sequence[str] = DEFAULT_KINDS,
    profile: DataLoader | None = None,
    engine: str = "replay",
    batch_size: int = 256,
    image_batch: int = 64,
    shard_dir: Path | None = None,
) -> pd.DataFrame:
    """Inject faults into every layer of a classifier and measure what they do to its predictions.

    model: any nn.Module from images [B, ...] to logits [B, C], on the device to use. loader: gives images and labels (a
    map-style data set; its order does not matter). profile: fault-free images from which the layers' ranges are taken; by
    default the same loader. batch_size: faults per forward pass. image_batch: images per golden run. shard_dir: a folder in
    which an interrupted campaign goes on.
    Returns one row per layer: layer, kind, neurons, injections, masked, detected, nonfinite (numbers of injections), and
    delta_loss and mismatch, each with its 99 % interval in _low and _high. Raises TextguardError.
    """
    stored = parse_format(number_format, "number_format")
    device = device_of(model)
    _, first, _ = next(batches(loader, device, [[0]]))
    ranges = profile_ranges(model, profile or loader, kinds)
    profiled = dict(zip(ranges["layer"], ranges["max_abs"], strict=True))
    runner = make_engine(
        engine, model, first[0], batch_size, kinds=kinds, number_format=stored, profiled=profiled, target=fault_model.target
    )
    known = weight_limits(model, runner.sites) if fault_model.target == "weight" else profiled
    limits = detector_limits(detector, [site.layer for site in runner.sites], known)
    plan = draw_plan(runner.sites, eligible_images(runner, loader), injections_per_layer, seed, fault_model, stored)
    records = run_campaign(runner, loader, plan, limits, image_batch=image_batch, fault_model=fault_model, shard_dir=shard_dir)
    kind = {site.layer: site.kind for site in runner.sites}
    return pd.DataFrame(
        {
            "layer": layer.layer,
            "kind": kind[layer.layer],
            **{name: getattr(layer, name) for name in ("neurons", "injections", "masked", "detected", "nonfinite")},
            **{
                f"{name}{suffix}": getattr(getattr(layer, name), field)
                for name in ("delta_loss", "mismatch")
                for suffix, field in (("", "value"), ("_low", "low"), ("_high", "high"))
            },
        }
        for layer in summarise(records, runner.sites)
    )
