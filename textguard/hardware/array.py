"""A stuck bit in a processing element: which values of a layer it touches, and what that does to a classifier.

An array of R x C processing elements multiplies matrices tile by tile; a tile has the array's size. A convolution is a product
too: of its weights [channels, K], where K counts input channels and places of the kernel, and the unfolded image [K, places].
So is a linear layer: its tokens are the places, and a vector is one place. Every image is a product of its own. So is every
group of a grouped convolution, and a group of a depthwise one has a single channel.

- `output_stationary`: element (r, c) adds up the outputs of channels r, r + R, r + 2 R, ... of a group at the places c, c + C,
  c + 2 C, ... of the flattened map. A stuck bit of its accumulator is stuck in these outputs. The sum starts with the bias.
- `weight_stationary`: element (r, c) holds the weights r, r + R, ... of the K that belong to output channels c, c + C, ... of
  a group. A stuck bit of its register is stuck in these weights, for all places.

So an output-stationary array gives the rows to channels and the columns to places, a weight-stationary one the rows to what is
added up and the columns to channels. Elements beyond a small layer's product touch nothing in it: of vectors, only column 0
works in the first kind, of depthwise convolutions only row 0, or column 0 in the second kind.

References
----------
Chen, Emer and Sze, Eyeriss: A Spatial Architecture for Energy-Efficient Dataflow for Convolutional Neural Networks, ISCA 2016:
the names of the dataflows.

Zhang, Gu, Basu and Garg, Analyzing and Mitigating the Impact of Permanent Faults on a Systolic Array Based Neural Network
Accelerator, VTS 2018: accuracy drops although few elements are faulty.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from textguard.artifacts import read_parquet, weights_mark, write_parquet
from textguard.errors import CampaignMismatch, InvalidArtifact, InvalidParameter, Setting
from textguard.estimates.statistics import CONFIDENCE, Estimate, mean_estimate, rate_estimate, rate_interval, sample_mean
from textguard.faults.checks import checked_name, folder_path, whole_number
from textguard.faults.damage import FaultModel, Faults, Operation, damage_output
from textguard.faults.engines import WholeEngine
from textguard.faults.execution import check_settings
from textguard.faults.formats import parse_format
from textguard.faults.inputs import batches, positions, prepare
from textguard.faults.plans import bits_at, distinct, uniform_numbers
from textguard.faults.sites import DEFAULT_KINDS, Call, Calls, Site
from textguard.faults.task import CLASSES, Task, make_task
from textguard.faults.weights import stored_weights
from textguard.hardware.persistent import ROUNDING
from textguard.runtime import progress, share_work, wait_for_all

Dataflow = Literal["output_stationary", "weight_stationary"]
ALL = "all"  # in place of a layer: the fault is there in all of them, since all run on the array
FAULTS_PER_SHARD = 16
STUCK_COLUMNS = ["layer", "index", "neuron", "bit"]


@dataclass(frozen=True)
class Array:
    """An array of processing elements, and how matrix products are laid out on it.

    Parameters
    ----------
    rows, columns : int
        How many processing elements there are in each direction.
    mapping : {"output_stationary", "weight_stationary"}, default "output_stationary"
        What stays in an element while others pass by. See the module.

    Raises
    ------
    InvalidParameter
        rows or columns is no whole number, or below 1.
    UnknownName
        There is no such mapping.

    Examples
    --------
    >>> from textguard.faults.sites import Site
    >>> from textguard.hardware.array import Array
    >>> conv = Site("conv", "Conv2d", position=0, shape=(4, 2, 2), weights=4 * 9)
    >>> Array(2, 3).outputs(conv, element=1).tolist()  # row 0, column 1: channels 0 and 2, place 1
    [1, 9]
    >>> Array(2, 3, "weight_stationary").weights(conv, element=1).tolist()  # channel 1; every second of its 9 weights
    [9, 11, 13, 15, 17]
    """

    rows: int
    columns: int
    mapping: Dataflow = "output_stationary"

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            object.__setattr__(self, name, whole_number(Setting(name), getattr(self, name), 1))
        checked_name("mapping", self.mapping, get_args(Dataflow), Setting("mapping"))

    @property
    def elements(self) -> int:
        """How many processing elements there are. Element e is in row e // columns and column e % columns."""
        return self.rows * self.columns

    def outputs(self, site: Site, element: int, groups: int = 1) -> np.ndarray:
        """The outputs of a layer that an element computes, or, where weights stay in it, has a share in.

        Parameters
        ----------
        site : Site
            A convolution or linear layer.
        element : int
            Which of the elements.
        groups : int, default 1
            The convolution's groups.

        Returns
        -------
        ndarray
            int64 [n], ascending: indices into one image's flattened output.
        """
        channels, places, each = _product(site, groups)
        row, column = divmod(element, self.columns)
        if self.mapping == "output_stationary":
            channel, place = np.arange(row, channels // groups, self.rows), np.arange(column, places, self.columns)
        else:
            channel = np.arange(column, channels // groups, self.columns) if row < each else np.zeros(0, dtype=np.int64)
            place = np.arange(places)
        channel = (np.arange(groups)[:, None] * (channels // groups) + channel).reshape(-1, 1)
        index = channel * places + place if site.kind != "Linear" else place * channels + channel
        return np.sort(index.reshape(-1))

    def weights(self, site: Site, element: int, groups: int = 1) -> np.ndarray:
        """The weights of a layer that an element holds in turn, int64 [n], ascending: indices into the flattened weights.

        site, element, groups: as for `outputs`. Empty where outputs stay in the elements.
        """
        channels, _, each = _product(site, groups)
        row, column = divmod(element, self.columns)
        if self.mapping == "output_stationary":
            return np.zeros(0, dtype=np.int64)
        channel, weight = np.arange(column, channels // groups, self.columns), np.arange(row, each, self.rows)
        channel = (np.arange(groups)[:, None] * (channels // groups) + channel).reshape(-1, 1)
        return (channel * each + weight).reshape(-1)


def _product(site: Site, groups: int) -> tuple[int, int, int]:
    """A layer's output channels, places, and weights per output channel. Raises InvalidParameter where it is no product."""
    if site.kind not in DEFAULT_KINDS or not site.weights:
        raise InvalidParameter(
            Setting("kinds"),
            f" has {site.kind}; of it, as of layer {site.layer!r}, the array's part is not known: leave it out",
        )
    channels = site.shape[-1 if site.kind == "Linear" else 0]
    if channels % groups:
        raise InvalidParameter(Setting("groups"), f" is {groups}; layer {site.layer!r} has {channels} channels")
    return channels, site.neurons // channels, site.weights // channels


def draw_stuck(
    array: Array, count: int, seed: int, number_format: str = "fp32", bits: int = 1, layers: Sequence[str] = (ALL,)
) -> pd.DataFrame:
    """Draw stuck processing elements, uniformly over elements and bits.

    Parameters
    ----------
    array : Array
        The array.
    count : int
        How many faults. More of them extend a plan. A fault is the same element and bits in all `layers`.
    seed : int
        Of the draw.
    number_format : str, default "fp32"
        How the register stores values.
    bits : int, default 1
        How many different bits of the register are stuck.
    layers : sequence of str, default ("all",)
        Where the fault is: `all` stands for all layers at once, a layer's name for that layer alone.

    Returns
    -------
    DataFrame
        One row per stuck bit: layer, index, neuron (the element) and bit. `run_stuck` takes it.

    Raises
    ------
    InvalidParameter
        A number is none, or out of range.

    Examples
    --------
    >>> from textguard.hardware.array import Array, draw_stuck
    >>> draw_stuck(Array(8, 8), count=2, seed=0)
      layer  index  neuron  bit
    0   all      0      38    3
    1   all      1      36    4
    """
    count, bits = whole_number(Setting("count"), count, 1), whole_number(Setting("bits"), bits, 1)
    uniform = uniform_numbers(seed, "array", count, 1 + bits)
    element = distinct(uniform[:, :1], array.elements, "values")[:, 0]
    damaged = distinct(uniform[:, 1:], parse_format(number_format).bits, "bits")
    plan = {"index": np.arange(count).repeat(bits), "neuron": element.repeat(bits), "bit": damaged.reshape(-1)}
    return pd.concat([pd.DataFrame({"layer": layer, **plan}) for layer in layers], ignore_index=True)


def run_stuck(
    model: nn.Module,
    loader: DataLoader,
    array: Array,
    plan: pd.DataFrame,
    *,
    operation: Operation = "stuck_at_1",
    number_format: str = "fp32",
    profiled: Mapping[str, float] | None = None,
    limits: Mapping[str, float] | None = None,
    kinds: Sequence[str] = DEFAULT_KINDS,
    image_batch: int = 64,
    task: Task | str = CLASSES,
    shard_dir: str | os.PathLike[str] | None = None,
    label: str = "stuck",
) -> pd.DataFrame:
    """Run all images of a loader with each stuck processing element of a plan.

    Parameters
    ----------
    model : torch.nn.Module
        From images [B, ...] to logits, on the device to use. It is copied, and stays as it is.
    loader : DataLoader
        Gives images and labels, from a map-style data set. All are run, those that the model has wrong too.
    array : Array
        What the layers run on.
    plan : DataFrame
        As `draw_stuck` returns it.
    operation : {"stuck_at_0", "stuck_at_1", "flip"}, default "stuck_at_1"
        What the register's bits do. `flip` stands for an inverted one.
    number_format : str, default "fp32"
        How values are stored, in the registers too. fp32 stands for what torch stores.
    profiled : mapping of str to float, optional
        Layer -> the largest magnitude of its output, which some formats need.
    limits : mapping of str to float, optional
        Layer -> the largest magnitude that a range detector lets pass. By default there is none.
    kinds : sequence of str, default ("Conv1d", "Conv2d", "Conv3d", "Linear")
        The operations that run on the array, out of these.
    image_batch : int, default 64
        Images per inference. It changes no result.
    task : Task or its name, default that of an ordinary classifier
        What batches and logits mean.
    shard_dir : str or path-like, optional
        Where finished shards are kept. The same run, when it is made again, goes on behind them. The processes that `torchrun`
        starts share the shards through this folder.
    label : str, default "stuck"
        Names the run in progress lines.

    Returns
    -------
    DataFrame
        One row per fault, in the plan's order: `layer`, `index`, `neuron` (the element), `bit` (the highest one). `values`: the
        outputs of one image, or the weights, that the element touches. The others are those of `run_persistent`. Counts of
        images: `images`, all of them; `masked`, whose logits move by no more than rounding (ROUNDING of
        `textguard.hardware.persistent`); `changed`, whose prediction changes, or whose logits are not finite; `nonfinite`,
        these alone; `correct`, still right; `lost` and `gained`, right before and wrong now, and the other way round; `finite`,
        whose loss is finite. `delta_loss` is the mean |loss - golden loss| of these, in nats, and `square` the mean of its
        square. The same of images that the golden run has right: `eligible`, `eligible_changed`, `eligible_finite`,
        `eligible_delta_loss`, `eligible_square`.

    Raises
    ------
    CampaignMismatch
        The plan does not fit the array or the model, or shard_dir holds shards of another run.
    InvalidParameter
        An argument is out of range, a layer does not run on such an array, or several processes have no shard_dir to share.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.hardware.array import Array, run_stuck
    >>> model = nn.Linear(2, 2, bias=False)
    >>> model.weight.data = torch.eye(2)
    >>> images, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1, 0])
    >>> sign = pd.DataFrame({"layer": ["all"], "index": [0], "neuron": [0], "bit": [31]})
    >>> found = run_stuck(model, DataLoader(TensorDataset(images, labels)), Array(2, 1), sign)
    >>> found[["values", "images", "changed", "correct"]].iloc[0].tolist()  # output 0 is never positive: class 0 is lost
    [1, 3, 2, 1]
    """
    task, shard_dir = make_task(task), folder_path(Setting("shard_dir"), shard_dir)
    image_batch, read = whole_number(Setting("image_batch"), image_batch, 1), positions(loader)
    given = model
    model, image = prepare(model, loader, task)
    stuck = _Stuck(model, image, array, operation, number_format, profiled, limits, kinds)
    faults = stuck.faults_of(plan)
    shards = [faults.iloc[first : first + FAULTS_PER_SHARD] for first in range(0, len(faults), FAULTS_PER_SHARD)]
    rank, processes = share_work(shard_dir)
    if shard_dir:
        settings = {
            **{"engine": f"array, torch {torch.__version__}", "model": weights_mark(given)},
            **{"array": str(array), "operation": operation, "number format": number_format},
            **{"kinds of sites": ", ".join(kinds), "limits": str(dict(limits or {}))},
            **{"plan": _digest(pd.util.hash_pandas_object(plan[STUCK_COLUMNS], index=False).to_numpy())},
            **{"images": f"{len(read)}, {_digest(np.asarray(read))}", **task.as_json()},
        }
        check_settings(shard_dir, settings, rank)
    mine = {number: part for number, part in enumerate(shards) if number % processes == rank}
    found = {number: _load(shard_dir, number) for number in mine}
    parts = [list(read[first : first + image_batch]) for first in range(0, len(read), image_batch)]
    with progress(total=sum(len(part) for part in mine.values()) * len(read), label=label, unit="inference") as bar:
        for number, part in mine.items():
            if found[number] is None:
                found[number] = _run_shard(stuck, part, batches(loader, image.device, parts, task), task, bar.update)
                if shard_dir:
                    write_parquet(_file(shard_dir, number), found[number])
            else:
                bar.update(len(part) * len(read))
    if processes > 1:
        wait_for_all()
        found = {number: _load(shard_dir, number) for number in range(len(shards))}
    sums = pd.concat([found[number] for number in range(len(shards))], ignore_index=True)
    return _outcomes(faults, sums)


_SUMS = [
    *("images", "masked", "changed", "nonfinite", "correct", "lost", "gained", "finite", "delta_loss", "square"),
    *("eligible", "eligible_changed", "eligible_finite", "eligible_delta_loss", "eligible_square"),
]


def _run_shard(
    stuck: "_Stuck", faults: pd.DataFrame, loaded: Iterator[Any], task: Task, done: Callable[[int], Any]
) -> pd.DataFrame:
    """Sums over images, one row per fault: _SUMS."""
    sums = np.zeros((len(faults), len(_SUMS)))
    for part, images, labels in loaded:
        golden = stuck.infer(images, None)
        right = task.correct(golden, labels)
        eligible, loss = right & (task.certainty(golden) > 0), task.precise_loss(golden, labels)
        bound = ROUNDING * golden.reshape(len(part), -1).abs().amax(dim=1)
        for number, fault in enumerate(faults.itertuples(index=False)):
            logits = stuck.infer(images, fault)
            broken = ~logits.reshape(len(part), -1).isfinite().all(dim=1)
            same = (logits - golden).reshape(len(part), -1).abs().amax(dim=1) <= bound  # not where NaN
            changed = (task.differs(logits, golden) | broken) & ~same
            correct = torch.where(same, right, task.correct(logits, labels) & ~broken)
            delta = torch.where(same, 0.0, (task.precise_loss(logits, labels) - loss).abs())
            finite = delta.isfinite()
            delta = torch.where(finite, delta, 0.0)
            counts = [torch.ones_like(right), same, changed, broken, correct, right & ~correct, correct & ~right, finite]
            counts += [delta, delta**2, eligible, changed & eligible, finite & eligible, delta * eligible, delta**2 * eligible]
            sums[number] += [float(count.sum(dtype=torch.float64)) for count in counts]
            done(len(part))
    return pd.DataFrame(sums, columns=_SUMS)


def _outcomes(faults: pd.DataFrame, sums: pd.DataFrame) -> pd.DataFrame:
    """What `run_stuck` returns, from sums over images."""
    number = {"delta_loss": "finite", "square": "finite"}
    number |= {f"eligible_{name}": f"eligible_{of}" for name, of in number.items()}
    means = {
        name: np.divide(sums[name], sums[of], out=np.full(len(sums), np.nan), where=sums[of].to_numpy() > 0)
        for name, of in number.items()
    }
    found = pd.concat([faults.drop(columns="mask"), sums.drop(columns=list(means)).astype("int64")], axis=1).assign(**means)
    return found[[*STUCK_COLUMNS, "values", *_SUMS]]


def _file(folder: Path, number: int) -> Path:
    return folder / f"stuck-{number:05d}.parquet"


def _load(folder: Path | None, number: int) -> pd.DataFrame | None:
    """A finished shard, or None where it has to be run (again)."""
    if not folder or not _file(folder, number).exists():
        return None
    try:
        return read_parquet(_file(folder, number), "", _SUMS)
    except InvalidArtifact:
        return None


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


class _Stuck:
    """Runs a model on an array with a stuck element."""

    def __init__(
        self,
        model: nn.Module,
        image: Tensor,
        array: Array,
        operation: Operation,
        number_format: str,
        profiled: Mapping[str, float] | None,
        limits: Mapping[str, float] | None,
        kinds: Sequence[str],
    ) -> None:
        of_weights = array.mapping == "weight_stationary"
        self._array, self._model = array, FaultModel("weight" if of_weights else "neuron", operation)
        self._engine = WholeEngine(
            model,
            image,
            1,
            kinds=kinds,
            number_format=parse_format(number_format),
            profiled=profiled,
            target=self._model.target,
        )
        self._sites = {site.layer: site for site in self._engine.sites}
        self._weights = dict(zip(self._sites, stored_weights(self._engine.model, self._engine.sites), strict=True))
        self._groups = self._find_groups(image)
        self._limits = {layer: (limits or {}).get(layer, np.inf) for layer in self._sites}
        for site in self._sites.values():
            _product(site, self._groups[site.layer])

    @torch.inference_mode()
    def _find_groups(self, image: Tensor) -> dict[str, int]:
        """Layer -> groups of its convolution: how many times its inputs have more channels than a filter reads."""
        groups: dict[int, int] = {}

        def visit(call: Call) -> Tensor:
            weight, given = call.weight, call.args[0]
            if weight is not None and call.kind.startswith("Conv"):
                groups[id(weight)] = given.shape[given.ndim - weight.ndim + 1] // weight.shape[1]
            return call.output

        with Calls(visit):
            self._engine.model(image[None].clone())
        return {layer: groups.get(id(weight), 1) for layer, weight in self._weights.items()}

    def faults_of(self, plan: pd.DataFrame) -> pd.DataFrame:
        """One row per fault: STUCK_COLUMNS, mask, values. Raises CampaignMismatch."""
        if missing := [name for name in STUCK_COLUMNS if name not in plan]:
            raise CampaignMismatch(f"the plan lacks the columns {', '.join(missing)}; take those of draw_stuck")
        strange = set(plan["layer"]) - {ALL, *self._sites}
        if strange:
            raise CampaignMismatch(f"the plan names layer {sorted(strange)[0]!r}; allowed: all, {', '.join(self._sites)}")
        bits = min(bits_at(site, self._model, self._engine.number_format) for site in self._sites.values())
        for column, end in (("neuron", self._array.elements), ("bit", bits)):
            inside = plan[column].between(0, end - 1)
            if not inside.all():
                raise CampaignMismatch(
                    f"the plan has {column} {plan[column][~inside].iloc[0]}; there are {end}, counted from 0"
                )
        grouped = plan.groupby(["layer", "index"], sort=False)
        if (grouped["neuron"].nunique() > 1).any():
            raise CampaignMismatch("the plan has several elements in one fault; give each fault one")
        faults = grouped.agg(neuron=("neuron", "first"), bit=("bit", "max")).reset_index()
        mask = grouped["bit"].agg(lambda of_fault: int(np.bitwise_or.reduce(np.left_shift(1, of_fault.to_numpy()))))
        faults["mask"] = mask.to_numpy(np.int64)
        faults["values"] = [
            sum(len(self._touched(site, fault.neuron)) for site in self._where(fault.layer)) for fault in faults.itertuples()
        ]
        return faults

    def _where(self, layer: str) -> list[Site]:
        return list(self._sites.values()) if layer == ALL else [self._sites[layer]]

    def _touched(self, site: Site, element: int) -> np.ndarray:
        find = self._array.weights if self._model.target == "weight" else self._array.outputs
        return find(site, element, self._groups[site.layer])

    @torch.inference_mode()
    def infer(self, images: Tensor, fault: Any) -> Tensor:
        """The logits [B, ...] of images with a fault, a row of `faults_of`; without one for None."""
        if fault is None:
            return self._engine.observe(images)
        if self._model.target == "weight":
            with self._in_weights(fault):
                return self._engine.observe(images)
        where = {site.position: self._faults(site, fault, len(images), images.device) for site in self._where(fault.layer)}

        def see(position: int, output: Tensor) -> None:
            if position in where:
                damage_output(self._engine.storage(position), output, where[position])

        return self._engine.observe(images, see)

    def _faults(self, site: Site, fault: Any, images: int, device: torch.device) -> Faults:
        """The same damage in each of some images."""
        touched = torch.as_tensor(self._touched(site, fault.neuron), device=device)
        row = torch.arange(images, device=device)
        return Faults(
            self._model,
            torch.full_like(row, site.position),
            row,
            torch.full((images,), self._limits[site.layer], dtype=torch.float32, device=device),
            row.repeat_interleave(len(touched)),
            touched.repeat(images),
            torch.full((images * len(touched),), fault.mask, dtype=torch.int64, device=device),
        )

    @contextmanager
    def _in_weights(self, fault: Any) -> Iterator[None]:
        """A context in which the weights that an element holds are damaged; behind it they are what they were, bit for bit."""
        kept: list[tuple[Tensor, tuple[Tensor, ...], Tensor]] = []
        try:
            for site in self._where(fault.layer):
                weight = self._weights[site.layer]
                faults = self._faults(site, fault, 1, weight.device)

                def read(row: Tensor, neuron: Tensor, weight: Tensor = weight) -> Tensor:
                    return weight[torch.unravel_index(neuron, weight.shape)]

                damage = self._engine.storage(site.position).damage(faults, read)
                places = torch.unravel_index(damage.neuron, weight.shape)
                kept.append((weight, places, weight[places]))
                weight[places] = damage.written.to(weight.dtype)
            yield
        finally:
            for weight, places, values in reversed(kept):
                weight[places] = values


def summarise_stuck(outcomes: pd.DataFrame, confidence: float = CONFIDENCE) -> dict[str, Estimate]:
    """What a stuck element does in the mean, with intervals over faults; images are taken as they are.

    Parameters
    ----------
    outcomes : DataFrame
        As `run_stuck` returns it, of faults drawn uniformly.
    confidence : float, default 0.99
        Of the intervals.

    Returns
    -------
    dict of str to Estimate
        `accuracy_lost`, in points: images lost minus images gained, of 100, whose interval holds at least as often as said;
        `changed`, the share of images whose prediction changes; `delta_loss`, in nats, of faults that leave some image a finite
        loss; `critical` and `masked`, the shares of faults that change some prediction, or leave no trace in any.

    Examples
    --------
    >>> import pandas as pd
    >>> from textguard.hardware.array import summarise_stuck
    >>> outcomes = pd.DataFrame({
    ...     "images": 10, "masked": [10, 0], "changed": [0, 5], "lost": [0, 4], "gained": 0, "delta_loss": [0.0, 2.0]
    ... })
    >>> {name: found.value for name, found in summarise_stuck(outcomes).items()}
    {'accuracy_lost': 20.0, 'changed': 0.25, 'delta_loss': 1.0, 'critical': 0.5, 'masked': 0.5}
    """
    images, count = outcomes["images"].to_numpy(), len(outcomes)

    def share(name: str, confidence: float) -> Estimate:
        return rate_interval(sample_mean([outcomes[name].to_numpy() / images], [1.0], [1.0]), confidence)

    lost, gained = (share(name, (1 + confidence) / 2) for name in ("lost", "gained"))
    accuracy = Estimate(
        100 * (lost.value - gained.value), 100 * (lost.low - gained.high), 100 * (lost.high - gained.low), count
    )
    return {
        "accuracy_lost": accuracy,
        "changed": share("changed", confidence),
        "delta_loss": mean_estimate(outcomes["delta_loss"].dropna().to_numpy(), confidence),
        "critical": rate_estimate(int((outcomes["changed"] > 0).sum()), count, confidence),
        "masked": rate_estimate(int((outcomes["masked"] == images).sum()), count, confidence),
    }
