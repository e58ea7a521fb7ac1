"""One call from a classifier and its data to the resilience of each layer, with intervals."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn
from torch.utils.data import DataLoader

from textguard.estimates.statistics import CONFIDENCE, mean_interval, rate_interval
from textguard.estimates.summary import LayerResult, summarise, summarise_totals
from textguard.faults.campaign import batches, device_of, image_chances, profile_ranges
from textguard.faults.damage import SINGLE_FLIP, FaultModel, weight_limits
from textguard.faults.detectors import detector_limits
from textguard.faults.engines import make_engine
from textguard.faults.exact import affordable, enumerate_layer
from textguard.faults.formats import parse_format
from textguard.faults.sampling import Design, run_design
from textguard.faults.sites import DEFAULT_KINDS, Site


def assess(
    model: nn.Module,
    loader: DataLoader,
    *,
    injections_per_layer: int = 1000,
    seed: int = 0,
    plan: str = "uniform",
    images: str = "uniform",
    pilot: int = 128,
    stop_at: str = "never",
    confidence: float = CONFIDENCE,
    enumerate_up_to: int = 0,
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
    map-style data set; its order does not matter). plan, injections_per_layer (at most), pilot, stop_at: see
    `textguard.faults.sampling.Design`; images: see `image_chances`; enumerate_up_to: see `textguard.faults.exact.affordable`.
    profile: fault-free images from which the layers' ranges are taken; by default the same loader. batch_size: faults per
    forward pass. image_batch: images per golden run. shard_dir: a folder in which an interrupted campaign goes on.
    Returns one row per layer: layer, kind, neurons, method (`sampled` or `exact`), injections, masked, detected, nonfinite
    (numbers of injections), and delta_loss, mismatch and sdc (see `LayerResult`), each with its interval in _low and _high.
    Raises TextguardError.
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
    chances = image_chances(runner, loader, images)
    eligible = np.flatnonzero(chances).tolist()
    known_sites = affordable(runner, len(eligible), fault_model, enumerate_up_to)
    results = {
        site.layer: summarise_totals(enumerate_layer(runner, loader, eligible, site, limits[site.layer]))
        for site in known_sites
    }
    sites = [site for site in runner.sites if site not in known_sites]
    design = Design(plan, injections_per_layer, pilot, stop_at, confidence, seed)
    if sites:
        records = run_design(
            runner,
            sites,
            loader,
            chances,
            limits,
            design,
            image_batch=image_batch,
            fault_model=fault_model,
            shard_dir=shard_dir,
        )
        results |= summarise(records, {site.layer: site.neurons for site in sites}, design.strata(fault_model, runner))
    return pd.DataFrame(_row(site, results[site.layer], confidence) for site in runner.sites)


def _row(site: Site, result: LayerResult, confidence: float) -> dict[str, str | int | float]:
    estimates = {
        "delta_loss": mean_interval(result.delta_loss, confidence),
        "mismatch": rate_interval(result.mismatch, confidence),
        "sdc": rate_interval(result.sdc, confidence),
    }
    return {
        "layer": site.layer,
        "kind": site.kind,
        "neurons": site.neurons,
        **{name: getattr(result, name) for name in ("method", "injections", "masked", "detected", "nonfinite")},
        **{
            f"{name}{suffix}": getattr(estimate, field)
            for name, estimate in estimates.items()
            for suffix, field in (("", "value"), ("_low", "low"), ("_high", "high"))
        },
    }
