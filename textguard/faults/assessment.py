"""One call from a classifier and its data to the resilience of each layer, with intervals."""

import os
from collections.abc import Sequence

import pandas as pd
from torch import nn
from torch.utils.data import DataLoader

from textguard.estimates.statistics import mean_interval, rate_interval
from textguard.estimates.summary import LayerResult
from textguard.faults.campaign import Campaign, CampaignSettings
from textguard.faults.damage import FaultModel
from textguard.faults.profiling import largest_outputs, profile_ranges
from textguard.faults.sites import Site

USUAL = CampaignSettings()


def assess(
    model: nn.Module,
    loader: DataLoader,
    *,
    injections_per_layer: int = USUAL.injections_per_layer,
    seed: int = USUAL.seed,
    plan: str = USUAL.plan,
    images: str = USUAL.images,
    pilot: int = USUAL.pilot,
    stop_at: str = USUAL.stop_at,
    confidence: float = USUAL.confidence,
    enumerate_up_to: int = USUAL.enumerate_up_to,
    detector: str = USUAL.detector,
    number_format: str = USUAL.number_format,
    fault_model: FaultModel = USUAL.fault_model,
    kinds: Sequence[str] = USUAL.kinds,
    engine: str = USUAL.engine,
    batch_size: int = USUAL.batch_size,
    image_batch: int = USUAL.image_batch,
    noise: str = USUAL.noise,
    profile: DataLoader | None = None,
    shard_dir: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Inject faults into every layer of a classifier and measure what they do to its predictions.

    Parameters
    ----------
    model : torch.nn.Module
        From images [B, ...] to logits [B, C], on the device to use.
    loader : DataLoader
        Gives the images to inject on and their labels, from a map-style data set. Its order does not matter.
    injections_per_layer, seed, plan, images, pilot, stop_at, confidence, enumerate_up_to, detector, number_format, \
fault_model, kinds, engine, batch_size, image_batch, noise
        See `CampaignSettings`, which has the same defaults.
    profile : DataLoader, optional
        Gives the images from which the layers' ranges are taken; by default those of `loader`.
    shard_dir : str or path-like, optional
        A folder in which an interrupted assessment goes on.

    Returns
    -------
    pandas.DataFrame
        One row per layer, in order of execution: layer, kind, neurons, method (`sampled`, or `exact` where the layer was
        enumerated); injections, masked, detected, nonfinite (numbers of injections; under plan `guided`, which draws few
        faults that are masked, they say nothing of all faults); delta_loss (nats), mismatch and sdc (shares of all faults; see
        `LayerResult`), each with its interval in _low and _high.

    Raises
    ------
    TextguardError
        A setting is unknown, out of range, or does not fit the model or the data.

    References
    ----------
    Mahmoud et al., GoldenEye: A Platform for Evaluating Emerging Numerical Data Formats in DNN Accelerators, DSN 2022.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.faults import assess
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    >>> images = torch.rand(6, 1, 4, 4)
    >>> loader = DataLoader(TensorDataset(images, model(images).argmax(dim=1)), batch_size=3)
    >>> layers = assess(model, loader, injections_per_layer=20, enumerate_up_to=1)
    >>> print(layers[["layer", "kind", "neurons", "method", "injections"]])
      layer    kind  neurons   method  injections
    0     0  Conv2d        8  sampled          20
    1     3  Linear        3    exact         576
    """
    settings = CampaignSettings(
        injections_per_layer=injections_per_layer,
        seed=seed,
        plan=plan,
        images=images,
        pilot=pilot,
        stop_at=stop_at,
        confidence=confidence,
        enumerate_up_to=enumerate_up_to,
        detector=detector,
        number_format=number_format,
        fault_model=fault_model,
        kinds=kinds,
        engine=engine,
        batch_size=batch_size,
        image_batch=image_batch,
        noise=noise,
    )
    profiled = largest_outputs(profile_ranges(model, profile, settings.kinds)) if profile else None
    campaign = Campaign(model, loader, settings, profiled)
    layers = campaign.run(shard_dir).layers
    return pd.DataFrame(_row(site, layers[site.layer], settings.confidence) for site in campaign.engine.sites)


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
