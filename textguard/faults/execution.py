"""Campaigns: eligible images, profiled ranges, per-injection records, shards that survive an interruption."""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from textguard.artifacts import read_json, read_parquet, write_json, write_parquet
from textguard.errors import CampaignMismatch, InvalidArtifact, InvalidParameter, UnknownName, UnsupportedModel
from textguard.faults.damage import SINGLE_FLIP, FaultModel, Faults
from textguard.faults.engines import Engine, ReplayEngine, WholeEngine
from textguard.faults.graph import TracedModel
from textguard.faults.mitigations import activations
from textguard.faults.plans import PLAN_COLUMNS, check_plan
from textguard.faults.sites import DEFAULT_KINDS
from textguard.runtime import join_processes, progress, wait_for_all

RECORD_COLUMNS = [
    *PLAN_COLUMNS,
    *("golden_value", "faulty_value", "detected", "masked", "golden_loss", "faulty_loss", "mismatch"),
]


RECORD_TYPES = dict(
    zip(
        RECORD_COLUMNS,
        ["str", *["int64"] * 4, "float64", *["float32"] * 2, *["bool"] * 2, *["float32"] * 2, "bool"],
        strict=True,
    )
)
IMAGES = ("uniform", "importance")


def no_records() -> pd.DataFrame:
    """The records of no injections."""
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in RECORD_TYPES.items()})


def loader_of(images: Tensor, labels: Tensor, batch_size: int) -> DataLoader:
    """A DataLoader of images [N, ...] and labels int64 [N] that lie in memory."""
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


def count_images(loader: DataLoader) -> int:
    """The number of images in the loader's data set. Raises InvalidParameter where it has no positions."""
    if isinstance(loader.dataset, IterableDataset):
        raise InvalidParameter("the DataLoader's data set must give images by their position (a map-style data set)")
    return len(loader.dataset)


def batches(
    loader: DataLoader, device: torch.device, parts: Sequence[Sequence[int]] | None = None
) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
    """Positions, images [B, ...] and labels [B], on the device: of `parts`, else of the whole data set in its order.

    The loader's data set, number of workers and way to collate are used, not its order: positions are those in its data set.
    """
    count, size = count_images(loader), loader.batch_size or 1
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)] if parts is None else parts
    chosen = DataLoader(
        loader.dataset,
        batch_sampler=parts,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn if loader.batch_sampler else None,  # without batches, it would not stack
        pin_memory=device.type == "cuda",
    )
    for part, (images, labels) in zip(parts, chosen, strict=True):
        yield part, images.to(device, non_blocking=True), torch.as_tensor(labels).to(device, non_blocking=True)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters lie."""
    return next(model.parameters()).device


def top2diff(logits: Tensor) -> Tensor:
    """Difference of the two largest softmax probabilities. logits: [N, C], C >= 2. Returns [N], 0 to 1."""
    first, second = logits.softmax(dim=1).topk(2, dim=1).values.unbind(dim=1)
    return first - second


def image_chances(engine: Engine, loader: DataLoader, images: str = "uniform") -> np.ndarray:
    """How likely each image of the loader's data set is to be drawn for an injection, relative to the others, float [N].

    0 for those that the fault-free model classifies wrongly or with Top2Diff = 0: they are not eligible. `uniform`: 1 for all
    others. `importance`: half of that, and half in proportion to 1 - p(label): a small change of the logits changes the loss
    most where the model is least certain. It pays in layers whose faults do little, not in the last ones; no injection weighs
    more than about 2. Raises UnknownName.
    """
    if images not in IMAGES:
        raise UnknownName("way to draw images", images, IMAGES, "params.yaml inject.images")
    chances, doubt = np.zeros(count_images(loader)), np.zeros(count_images(loader))
    for part, pictures, labels in batches(loader, engine.device):
        logits = engine.observe(pictures)
        correct = (logits.argmax(dim=1) == labels) & (top2diff(logits) > 0)
        chances[part] = correct.cpu().numpy()
        loss = F.cross_entropy(logits.double(), labels, reduction="none")
        doubt[part] = (-torch.expm1(-loss)).clamp(min=0).cpu().numpy()
    doubt *= chances
    if images == "uniform" or not doubt.sum():
        return chances
    # Rounded, so that what batch sizes do to the last digits of logits changes no plan.
    return chances * ((1 + doubt * (chances.sum() / doubt.sum())) / 2).round(2)


def eligible_images(engine: Engine, loader: DataLoader) -> list[int]:
    """Positions of the images that the fault-free model classifies correctly with Top2Diff > 0."""
    return np.flatnonzero(image_chances(engine, loader)).tolist()


@torch.inference_mode()
def profile_ranges(model: nn.Module, loader: DataLoader, kinds: Sequence[str] = DEFAULT_KINDS) -> pd.DataFrame:
    """Each site's largest and mean absolute output over all images of the loader's data set.

    Returns one row per site: layer, kind, neurons, max_abs, mean_abs.
    """
    device = device_of(model)
    _, first, _ = next(batches(loader, device, [[0]]))
    try:
        engine: Engine = ReplayEngine(model, first[0], 1, kinds=kinds)
    except UnsupportedModel:  # the campaign says so
        engine = WholeEngine(model, first[0], 1, kinds=kinds)
    largest, total = np.zeros(len(engine.sites)), np.zeros(len(engine.sites))
    count = 0

    def see(position: int, output: Tensor) -> None:
        magnitude = output.abs()
        largest[position] = max(largest[position], float(magnitude.max()))
        total[position] += float(magnitude.sum(dtype=torch.float64))

    for part, images, _ in batches(loader, device):
        engine.observe(images, see)
        count += len(part)
    return pd.DataFrame(
        {
            "layer": site.layer,
            "kind": site.kind,
            "neurons": site.neurons,
            "max_abs": largest[site.position],
            "mean_abs": total[site.position] / (site.neurons * count),
        }
        for site in engine.sites
    )


@torch.inference_mode()
def profile_activations(model: nn.Module, loader: DataLoader) -> pd.DataFrame:
    """The lowest and highest output of each activation function, for mitigations: columns activation, low, high.

    Raises UnsupportedModel where the model cannot be traced.
    """
    device = device_of(model)
    _, first, _ = next(batches(loader, device, [[0]]))
    traced = TracedModel(model, first[0])
    names = activations(traced)
    low, high = dict.fromkeys(names.values(), np.inf), dict.fromkeys(names.values(), -np.inf)
    for _, images, _ in batches(loader, device):
        values = traced.inputs(images)
        for index in traced.walk(values):
            if index in names:
                name, value = names[index], values[traced.steps[index]]
                low[name], high[name] = min(low[name], float(value.min())), max(high[name], float(value.max()))
    return pd.DataFrame({"activation": list(low), "low": list(low.values()), "high": list(high.values())})


def run_campaign(
    engine: Engine,
    loader: DataLoader,
    plan: pd.DataFrame,
    limits: Mapping[str, float],
    *,
    image_batch: int,
    fault_model: FaultModel = SINGLE_FLIP,
    shard_dir: Path | None = None,
    label: str = "inject",
) -> pd.DataFrame:
    """Carry out a fault plan and record what each fault did.

    loader: gives images and labels by their position in its data set, which is what the plan's images are. limits: layer ->
    largest magnitude that the range detector lets pass. image_batch: images per golden run and per shard. shard_dir: where
    finished shards are kept, and taken from when the campaign is run again. Started by `torchrun`, the processes share the
    shards through shard_dir, which all of them must reach; each returns when all are done.
    Returns one row per row of the plan, in its order, with RECORD_COLUMNS. Raises CampaignMismatch, also when shard_dir holds
    shards of another campaign.
    """
    check_plan(plan, engine.sites, count_images(loader), fault_model, engine.number_format)
    ordered = plan.reset_index(drop=True).sort_values(["image"], kind="stable")
    numbers = np.unique(ordered["image"])
    parts = [part.tolist() for part in np.array_split(numbers, range(image_batch, len(numbers), image_batch))]
    rank, processes = join_processes()
    if processes > 1 and not shard_dir:
        raise InvalidParameter("several processes need a shard_dir to share their results")
    if shard_dir:
        _check_settings(shard_dir, _settings(engine, loader, plan, limits, image_batch, fault_model), rank)
    mine = {number: part for number, part in enumerate(parts) if number % processes == rank}
    records = {number: _load_shard(_shard(shard_dir, number)) for number in mine}
    missing = {number: part for number, part in mine.items() if records[number] is None}
    if len(missing) < len(mine):
        print(f"{label}: going on after {len(mine) - len(missing)} of {len(mine)} shards", file=sys.stderr, flush=True)
    rows = dict(enumerate(np.split(ordered.index, np.searchsorted(ordered["image"], [part[0] for part in parts[1:]]))))
    with progress(total=sum(len(rows[number]) for number in mine), label=label, unit="inj") as bar:
        bar.update(sum(len(rows[number]) for number in mine.keys() - missing.keys()))
        loaded = batches(loader, engine.device, list(missing.values()))
        for number, (part, images, labels) in zip(missing, loaded, strict=True):
            faults = ordered.loc[rows[number]]
            records[number] = _run_shard(engine, part, images, labels, faults, limits, fault_model)
            if shard_dir:
                write_parquet(_shard(shard_dir, number), records[number])
            bar.update(len(faults))
    if processes > 1:
        wait_for_all()
        records = {number: read_parquet(_shard(shard_dir, number), "inject", RECORD_COLUMNS) for number in rows}
    found = pd.concat([records[number].set_index(rows[number]) for number in rows])
    return found.sort_index().set_axis(plan.index)


def measure_pace(
    engine: Engine,
    loader: DataLoader,
    plan: pd.DataFrame,
    limits: Mapping[str, float],
    *,
    images: int = 8,
    injections: int = 256,
    fault_model: FaultModel = SINGLE_FLIP,
) -> float:
    """Roughly how many injections of a plan the engine does per second, from a few of them whose outcomes are thrown away."""
    chosen = np.unique(plan["image"])[:images]
    rows = plan[plan["image"].isin(chosen)].drop_duplicates(["layer", "index"])
    rows = rows.iloc[:: max(1, len(rows) // injections)]
    (part, pictures, labels), *_ = batches(loader, engine.device, [chosen.tolist()])
    for _ in range(2):  # the first time warms up
        start = time.perf_counter()
        _run_shard(engine, part, pictures, labels, rows, limits, fault_model)
    return len(rows) / (time.perf_counter() - start)


def _shard(shard_dir: Path | None, number: int) -> Path | None:
    return shard_dir / f"shard-{number:05d}.parquet" if shard_dir else None


def _load_shard(shard: Path | None) -> pd.DataFrame | None:
    """A finished shard, or None where it has to be run (again)."""
    if not shard or not shard.exists():
        return None
    try:
        return read_parquet(shard, "inject", RECORD_COLUMNS)
    except InvalidArtifact:
        return None


def _settings(
    engine: Engine,
    loader: DataLoader,
    plan: pd.DataFrame,
    limits: Mapping[str, float],
    image_batch: int,
    fault_model: FaultModel,
) -> dict[str, str | int]:
    """What the records of a campaign depend on; the number of processes and of faults per batch do not belong to it."""

    def digest(*parts: bytes) -> str:
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    _, images, labels = next(batches(loader, torch.device("cpu"), [range(min(8, count_images(loader)))]))
    return {
        **engine.settings,
        **{f"fault {name}": value for name, value in vars(fault_model).items()},
        "plan": digest(pd.util.hash_pandas_object(plan).to_numpy().tobytes()),
        "detector limits": digest(json.dumps(dict(limits), sort_keys=True).encode()),
        "images": f"{len(loader.dataset)}, {digest(images.numpy().tobytes(), labels.numpy().tobytes())}",
        "images per shard": image_batch,
    }


def _check_settings(shard_dir: Path, settings: dict[str, str | int], rank: int) -> None:
    """Note the settings beside the shards. Raises CampaignMismatch when shards with other settings lie there."""
    file = shard_dir / "campaign.json"
    if file.exists():
        before = read_json(file, "")
        names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if names:
            differences = "; ".join(f"{name} was {before.get(name)}, now {settings.get(name)}" for name in names)
            raise CampaignMismatch(f"{shard_dir} holds shards of another campaign: {differences}; delete it or name another")
    elif rank == 0:
        write_json(file, settings)


def _run_shard(
    engine: Engine,
    part: Sequence[int],
    images: Tensor,
    labels: Tensor,
    faults: pd.DataFrame,
    limits: Mapping[str, float],
    fault_model: FaultModel,
) -> pd.DataFrame:
    def column(values: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(np.asarray(values), dtype=dtype, device=images.device)

    positions = {site.layer: site.position for site in engine.sites}
    # A fault is all rows with the same layer and index, a damaged value those of them with the same neuron.
    faults = faults.reset_index(drop=True)
    fault = faults.groupby(["layer", "index"], sort=False).ngroup().to_numpy()
    value = faults.groupby(["layer", "index", "neuron"], sort=False).ngroup().to_numpy()
    first_fault, first_value = np.unique(fault, return_index=True)[1], np.unique(value, return_index=True)[1]
    mask = np.zeros(len(first_value), dtype=np.int64)
    np.bitwise_or.at(mask, value, np.left_shift(1, faults["bit"].to_numpy()))
    heads = faults.iloc[first_fault]
    image = column(np.searchsorted(part, heads["image"]))
    outcomes = engine.run(
        images,
        Faults(
            model=fault_model,
            position=column(heads["layer"].map(positions)),
            image=image,
            limit=column(heads["layer"].map(limits), torch.float32),
            row=column(fault[first_value]),
            neuron=column(faults["neuron"].iloc[first_value]),
            mask=column(mask),
        ),
    )
    golden_loss = F.cross_entropy(outcomes.golden_logits, labels, reduction="none")
    golden_class = outcomes.golden_logits.argmax(dim=1)
    by_value = {
        "golden_value": outcomes.golden_value,
        "faulty_value": outcomes.faulty_value,
        "detected": outcomes.detected,
    }
    by_fault = {
        "masked": outcomes.masked,
        "golden_loss": golden_loss[image],
        "faulty_loss": F.cross_entropy(outcomes.logits, labels[image], reduction="none"),
        "mismatch": outcomes.logits.argmax(dim=1) != golden_class[image],
    }
    found = {name: tensor.cpu().numpy()[value] for name, tensor in by_value.items()}
    found |= {name: tensor.cpu().numpy()[fault] for name, tensor in by_fault.items()}
    return faults[PLAN_COLUMNS].assign(**found)
