"""Campaigns: eligible images, per-injection records, shards that survive an interruption."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textguard.artifacts import read_parquet, write_parquet
from textguard.errors import InvalidArtifact
from textguard.faults.engines import Engine, Faults
from textguard.faults.graph import Site, TracedModel
from textguard.faults.plans import PLAN_COLUMNS, check_plan
from textguard.faults.statistics import LayerResult, summarise_layer
from textguard.runtime import progress

RECORD_COLUMNS = [*PLAN_COLUMNS, "golden_value", "faulty_value", "detected", "golden_loss", "faulty_loss", "mismatch"]


def top2diff(logits: Tensor) -> Tensor:
    """Difference of the two largest softmax probabilities. logits: [N, C], C >= 2. Returns [N], 0 to 1."""
    first, second = logits.softmax(dim=1).topk(2, dim=1).values.unbind(dim=1)
    return first - second


@torch.inference_mode()
def eligible_images(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> list[int]:
    """Positions of the images that the fault-free model classifies correctly with Top2Diff > 0.

    images: [N, ...]; labels: int64 [N].
    """
    model.eval()
    eligible = []
    for rows in torch.arange(len(images)).split(batch_size):
        logits = model(images[rows])
        correct = (logits.argmax(dim=1) == labels[rows]) & (top2diff(logits) > 0)
        eligible += rows[correct.cpu()].tolist()
    return eligible


@torch.inference_mode()
def profile_ranges(model: nn.Module, images: Tensor, batch_size: int) -> pd.DataFrame:
    """Each layer's largest and mean absolute output over all images.

    images: [N, ...]. Returns one row per site: layer, kind, neurons, max_abs, mean_abs.
    """
    traced = TracedModel(model, images[0])
    largest = {site.layer: 0.0 for site in traced.sites.values()}
    total = dict(largest)
    for batch in images.split(batch_size):
        values = traced.inputs(batch)
        for index in traced.walk(values):
            site = traced.sites.get(index)
            if site:
                magnitude = values[traced.steps[index]].abs()
                largest[site.layer] = max(largest[site.layer], float(magnitude.max()))
                total[site.layer] += float(magnitude.sum(dtype=torch.float64))
    return pd.DataFrame(
        {
            "layer": site.layer,
            "kind": site.kind,
            "neurons": site.neurons,
            "max_abs": largest[site.layer],
            "mean_abs": total[site.layer] / (site.neurons * len(images)),
        }
        for site in traced.sites.values()
    )


def run_campaign(
    engine: Engine,
    images: Tensor,
    labels: Tensor,
    plan: pd.DataFrame,
    limits: Mapping[str, float],
    *,
    image_batch: int,
    shard_dir: Path | None = None,
    label: str = "inject",
) -> pd.DataFrame:
    """Carry out a fault plan and record what each fault did.

    images: [N, ...]; labels: int64 [N], both on the engine's device; the plan's images are positions in them. limits: layer ->
    largest magnitude that the range detector lets pass. image_batch: images per golden run and per shard. shard_dir: where
    finished shards are kept, and taken from when the campaign is run again; the caller names it after all inputs.
    Returns one row per fault, in the plan's order, with RECORD_COLUMNS. Raises CampaignMismatch.
    """
    check_plan(plan, engine.sites, len(images))
    ordered = plan.sort_values(["image"], kind="stable")
    batches = np.array_split(np.unique(ordered["image"]), range(image_batch, plan["image"].nunique(), image_batch))
    found = len(list(shard_dir.glob("shard-*.parquet"))) if shard_dir else 0
    if found:
        print(f"{label}: going on after {found} of {len(batches)} shards", file=sys.stderr, flush=True)
    records = []
    with progress(total=len(plan), label=label, unit="inj") as bar:
        for number, batch in enumerate(batches):
            faults = ordered[ordered["image"].isin(batch)]
            shard = shard_dir / f"shard-{number:05d}.parquet" if shard_dir else None
            part = _load_shard(shard)
            if part is None:
                part = _run_shard(engine, images, labels, faults, limits)
                if shard:
                    write_parquet(shard, part)
            records.append(part.set_index(faults.index))
            bar.update(len(faults))
    return pd.concat(records).loc[plan.index]


def _load_shard(shard: Path | None) -> pd.DataFrame | None:
    """A finished shard, or None where it has to be run (again)."""
    if not shard or not shard.exists():
        return None
    try:
        return read_parquet(shard, "inject", RECORD_COLUMNS)
    except InvalidArtifact:
        return None


def _run_shard(
    engine: Engine, images: Tensor, labels: Tensor, faults: pd.DataFrame, limits: Mapping[str, float]
) -> pd.DataFrame:
    numbers, place = np.unique(faults["image"], return_inverse=True)
    batch = torch.from_numpy(numbers)
    positions = {site.layer: site.position for site in engine.sites}

    def column(values: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(np.asarray(values), dtype=dtype, device=images.device)

    outcomes = engine.run(
        images[batch],
        Faults(
            position=column(faults["layer"].map(positions)),
            image=column(place),
            neuron=column(faults["neuron"]),
            bit=column(faults["bit"]),
            limit=column(faults["layer"].map(limits), torch.float32),
        ),
    )
    targets, image = labels[batch], column(place)
    golden_loss = F.cross_entropy(outcomes.golden_logits, targets, reduction="none")
    golden_class = outcomes.golden_logits.argmax(dim=1)
    found = {
        "golden_value": outcomes.golden_value,
        "faulty_value": outcomes.faulty_value,
        "detected": outcomes.detected,
        "golden_loss": golden_loss[image],
        "faulty_loss": F.cross_entropy(outcomes.logits, targets[image], reduction="none"),
        "mismatch": outcomes.logits.argmax(dim=1) != golden_class[image],
    }
    return faults[PLAN_COLUMNS].reset_index(drop=True).assign(**{name: value.cpu().numpy() for name, value in found.items()})


def summarise(records: pd.DataFrame, sites: Sequence[Site]) -> list[LayerResult]:
    """One LayerResult per site that has records, in order of execution."""
    by_layer = dict(list(records.groupby("layer", sort=False)))
    return [summarise_layer(by_layer[site.layer], site.neurons) for site in sites if site.layer in by_layer]
