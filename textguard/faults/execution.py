"""Carrying out a fault plan: per-injection records, in shards that survive an interruption and that processes share."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from textguard.artifacts import read_json, read_parquet, write_json, write_parquet
from textguard.errors import CampaignMismatch, InvalidArtifact, Setting
from textguard.faults.checks import folder_path, whole_number
from textguard.faults.damage import SINGLE_FLIP, FaultModel, Faults
from textguard.faults.engines import Engine
from textguard.faults.inputs import batches, count_images, positions
from textguard.faults.patterns import values_held
from textguard.faults.plans import FAULT_COLUMNS, PLAN_COLUMNS, check_plan, damaged_values
from textguard.faults.task import CLASSES, Task, make_task
from textguard.runtime import progress, share_work, wait_for_all

VALUES_AT_ONCE = 2**21  # that faults with a shape damage together in one run of the engine
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


def no_records() -> pd.DataFrame:
    """The records of no injections."""
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in RECORD_TYPES.items()})


def run_campaign(
    engine: Engine,
    loader: DataLoader,
    plan: pd.DataFrame,
    limits: Mapping[str, float],
    *,
    image_batch: int,
    fault_model: FaultModel = SINGLE_FLIP,
    shard_dir: str | os.PathLike[str] | None = None,
    label: str = "inject",
    same: Sequence[str] = PLAN_COLUMNS,
    task: Task | str = CLASSES,
) -> pd.DataFrame:
    """Carry out a fault plan and record what each fault did.

    Parameters
    ----------
    engine : Engine
        Runs the model with faults; see `make_engine`.
    loader : DataLoader
        Gives images and labels by their position in its map-style data set, which is what the plan's images are.
    plan : pandas.DataFrame
        As `draw_plan` returns it: one row per damaged bit.
    limits : mapping of str to float
        Layer -> largest magnitude that the range detector lets pass.
    image_batch : int
        Images per golden run, and per shard.
    fault_model : FaultModel, default one flipped bit of one neuron
        What the plan was drawn for.
    shard_dir : str or path-like, optional
        Where finished shards are kept. The same campaign, when it is run again, goes on behind them. The processes that
        `torchrun` starts share the shards through this folder, which all of them must reach.
    label : str, default "inject"
        Names the campaign in progress lines.
    same : sequence of str, default all
        The plan's columns that have to be the same for a campaign to go on. What a shard holds counts, whatever the others
        say: predictions may take another fault where a processor adds up in another order.
    task : Task or its name, default that of an ordinary classifier
        What batches and logits mean.

    Returns
    -------
    pandas.DataFrame
        One row per row of the plan, in its order, with RECORD_COLUMNS. Each process gets all of them. Where the fault model
        damages a region, golden_value and faulty_value are those of the value that the plan names, and detected says whether
        the detector replaced any.

    Raises
    ------
    CampaignMismatch
        The plan does not fit the model or the data, or shard_dir holds shards of another campaign.
    InvalidParameter
        Several processes have no shard_dir to share, or the loader does not give what the task needs.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.faults import draw_plan, make_engine, run_campaign
    >>> model = nn.Linear(2, 2, bias=False)
    >>> model.weight.data = torch.eye(2)
    >>> images, labels = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 0])
    >>> engine = make_engine("replay", model, images[0], batch_size=8)
    >>> plan = draw_plan(engine.sites, np.ones(2), 4, seed=0)
    >>> limits = {site.layer: 3.0 for site in engine.sites}
    >>> records = run_campaign(engine, DataLoader(TensorDataset(images, labels)), plan, limits, image_batch=2)
    >>> len(records), bool((records["faulty_value"].abs() <= 3).all())
    (4, True)
    """
    image_batch, shard_dir = whole_number(Setting("image_batch"), image_batch, 1), folder_path(Setting("shard_dir"), shard_dir)
    task, read = make_task(task), positions(loader)
    check_plan(plan, engine.sites, count_images(loader), fault_model, engine.number_format)
    unread = plan.loc[~plan["image"].isin(read), "image"]
    if len(unread):
        raise CampaignMismatch(
            f"the plan hits image {unread.iloc[0]}, which the loader's sampler leaves out; draw it for the same loader"
        )
    ordered = plan.reset_index(drop=True).sort_values(["image"], kind="stable")
    numbers = np.unique(ordered["image"])
    parts = [part.tolist() for part in np.array_split(numbers, range(image_batch, len(numbers), image_batch))]
    rank, processes = share_work(shard_dir)
    if shard_dir:
        check_settings(shard_dir, _settings(engine, loader, plan[list(same)], limits, image_batch, fault_model, task), rank)
    mine = {number: part for number, part in enumerate(parts) if number % processes == rank}
    records = {number: _load_shard(_shard(shard_dir, number)) for number in mine}
    missing = {number: part for number, part in mine.items() if records[number] is None}
    if len(missing) < len(mine):
        print(f"{label}: going on after {len(mine) - len(missing)} of {len(mine)} shards", file=sys.stderr, flush=True)
    rows = dict(enumerate(np.split(ordered.index, np.searchsorted(ordered["image"], [part[0] for part in parts[1:]]))))
    with progress(total=sum(len(rows[number]) for number in mine), label=label, unit="inj") as bar:
        bar.update(sum(len(rows[number]) for number in mine.keys() - missing.keys()))
        loaded = batches(loader, engine.device, list(missing.values()), task)
        for number, (part, images, labels) in zip(missing, loaded, strict=True):
            faults = ordered.loc[rows[number]]
            records[number] = _run_shard(engine, part, images, labels, faults, limits, fault_model, task)
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
    task: Task = CLASSES,
) -> float:
    """Roughly how many injections of a plan the engine does per second, from a few of them whose outcomes are thrown away."""
    chosen = np.unique(plan["image"])[:images]
    rows = plan[plan["image"].isin(chosen)].drop_duplicates(["layer", "index"])
    rows = rows.iloc[:: max(1, len(rows) // injections)]
    (part, pictures, labels), *_ = batches(loader, engine.device, [chosen.tolist()], task)
    for _ in range(2):  # the first time warms up
        start = time.perf_counter()
        _run_shard(engine, part, pictures, labels, rows, limits, fault_model, task)
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
    task: Task,
) -> dict[str, str | int]:
    """What the records of a campaign depend on; the number of processes and of faults per batch do not belong to it."""

    def digest(*parts: bytes) -> str:
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    read, count = positions(loader), count_images(loader)
    ((_, *first),) = batches(loader, torch.device("cpu"), [read[:8]], task)
    some = "" if len(read) == count else f"{digest(np.array(read).tobytes())}, {len(read)} of "
    return {
        **engine.settings,
        **{f"fault {name}": value for name, value in fault_model.as_json().items()},
        "plan": digest(pd.util.hash_pandas_object(plan).to_numpy().tobytes()),
        "detector limits": digest(json.dumps(dict(limits), sort_keys=True).encode()),
        "images": f"{some}{count}, {digest(*(_bytes(tensor) for tensor in first))}",
        "images per shard": image_batch,
        **task.as_json(),
    }


def _bytes(tensor: Tensor) -> bytes:
    """What a tensor on the CPU holds, of whatever type; numpy has no bf16."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check_settings(shard_dir: Path, settings: dict[str, str | int], rank: int) -> None:
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
    task: Task,
) -> pd.DataFrame:
    """The records of one shard's faults, by their order. part: the images' positions in the data set."""
    faults = faults.reset_index(drop=True)
    # A fault is all rows with the same layer and index.
    fault = faults.groupby(["layer", "index"], sort=False).ngroup().to_numpy()
    if not fault_model.shaped:
        return _run_faults(engine, part, images, labels, faults, fault, limits, fault_model, task)
    sizes = {site.layer: values_held(site, fault_model) for site in engine.sites}
    before = np.cumsum(faults["layer"].iloc[np.unique(fault, return_index=True)[1]].map(sizes).to_numpy())
    group = (before // VALUES_AT_ONCE)[fault]
    found = []
    for number in np.unique(group):
        own = faults[group == number]
        again = np.unique(fault[group == number], return_inverse=True)[1]
        records = _run_faults(engine, part, images, labels, own.reset_index(drop=True), again, limits, fault_model, task)
        found.append(records.set_axis(own.index))
    return pd.concat(found).sort_index()


def _run_faults(
    engine: Engine,
    part: Sequence[int],
    images: Tensor,
    labels: Tensor,
    faults: pd.DataFrame,
    fault: np.ndarray,
    limits: Mapping[str, float],
    fault_model: FaultModel,
    task: Task,
) -> pd.DataFrame:
    """The records of faults that go through the engine together. fault: int [rows], which of them a row is of, ascending by
    its first row.
    """

    def column(values: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(np.asarray(values), dtype=dtype, device=images.device)

    sites = {site.layer: site for site in engine.sites}
    # A damaged value is all rows of a fault with the same neuron.
    value = faults.groupby(["layer", "index", "neuron"], sort=False).ngroup().to_numpy()
    first_fault, first_value = np.unique(fault, return_index=True)[1], np.unique(value, return_index=True)[1]
    mask = np.zeros(len(first_value), dtype=np.int64)
    np.bitwise_or.at(mask, value, np.left_shift(1, faults["bit"].to_numpy()))
    heads = faults.iloc[first_fault]
    row, neuron = fault[first_value], faults["neuron"].to_numpy()[first_value]
    if fault_model.shaped:
        row, neuron, mask = damaged_values(heads.assign(mask=mask)[FAULT_COLUMNS], sites, fault_model, engine.number_format)
    image = column(np.searchsorted(part, heads["image"]))
    outcomes = engine.run(
        images,
        Faults(
            model=fault_model,
            position=column(heads["layer"].map({layer: site.position for layer, site in sites.items()})),
            image=image,
            limit=column(heads["layer"].map(limits), torch.float32),
            row=column(row),
            neuron=column(neuron),
            mask=column(mask),
        ),
    )
    by_value = {
        name: tensor.cpu().numpy()
        for name, tensor in (
            ("golden_value", outcomes.golden_value),
            ("faulty_value", outcomes.faulty_value),
            ("detected", outcomes.detected),
        )
    }
    if fault_model.shaped:  # of a region: the value that the plan names, and whether any was detected
        named = neuron == heads["neuron"].to_numpy()[row]
        detected = np.bincount(row, by_value["detected"], len(heads)) > 0
        by_value = {name: values[named] for name, values in by_value.items()} | {"detected": detected}
        value = fault
    by_fault = {
        "masked": outcomes.masked,
        "golden_loss": task.loss(outcomes.golden_logits, labels)[image],
        "faulty_loss": task.loss(outcomes.logits, labels[image]),
        "mismatch": task.differs(outcomes.logits, outcomes.golden_logits[image]),
    }
    found = {name: values[value] for name, values in by_value.items()}
    found |= {name: tensor.cpu().numpy()[fault] for name, tensor in by_fault.items()}
    return faults[PLAN_COLUMNS].assign(**found)
