"""Single faults that stay: in a stored value of the model, or at a neuron, for all images. What each does, and all together.

A transient fault happens in one inference; its outcome is that of one image. A persistent one is there for every image until
the memory is written again, so its outcome is a share of images: of changed predictions, of answers still right.
"""

import hashlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from textguard.artifacts import read_parquet, weights_mark, write_parquet
from textguard.errors import InvalidArtifact, InvalidParameter, Setting, UnsupportedModel
from textguard.estimates.statistics import CONFIDENCE, rate_estimate
from textguard.faults.checks import checked_name, folder_path, whole_number
from textguard.faults.damage import FaultModel, Operation
from textguard.faults.detectors import detector_limits
from textguard.faults.engines import make_engine
from textguard.faults.execution import check_settings
from textguard.faults.inputs import batches, positions, prepare
from textguard.faults.plans import bits_at
from textguard.faults.task import CLASSES, Task, make_task
from textguard.hardware.carriers import ROUNDING, Block, Carrier, Neurons, Replay, WholeModel
from textguard.hardware.stored import (
    as_format,
    damaged_values,
    one_per_fault,
    own_copy,
    round_stored,
    stored_tensors,
    tensors_of,
)
from textguard.runtime import progress, share_work, wait_for_all

StaysIn = Literal["stored", "neuron"]
ENGINES = ("replay", "whole")
FAULTS = 256  # per shard

_SUMS = ("images", "masked", "changed", "nonfinite", "correct", "lost", "gained", "finite", "delta", "square")
_ELIGIBLE = ("eligible", "eligible_changed", "eligible_finite", "eligible_delta", "eligible_square")
_OF_FAULTS = ["fault", *_SUMS, *_ELIGIBLE]
_OF_IMAGES = ["tensor", "image", "faults", "masked", "changed", "lost", "gained", "finite", "delta"]


@dataclass(frozen=True)
class PersistentResult:
    """What persistent faults did.

    Attributes
    ----------
    outcomes : pandas.DataFrame
        One row per fault, in the plan's order. `layer`, `index`, `neuron`, `bit` (the highest one) say which; `golden_value`
        and `faulty_value` what became of the stored value (NaN at neurons, where every image has its own). Then counts of
        images: `images`, all that were run; `masked`, whose logits move by no more than rounding, see ROUNDING; `changed`,
        whose prediction changes, or whose logits are not finite; `nonfinite`, these alone; `correct`, still right; `lost` and
        `gained`, right before and wrong now, and the other way round; `finite`, whose loss is finite. `delta_loss` is the mean
        |loss - golden loss| of these, in nats, and `square` the mean of its square. The same of eligible images, which the
        golden run has right, is in `eligible`, `eligible_changed`, `eligible_finite`, `eligible_delta_loss` and
        `eligible_square`; transient campaigns look at these.
    by_image : pandas.DataFrame
        One row per tensor and image, over the faults of this tensor: `layer`, `image`, `faults`, and sums like the above:
        `masked`, `changed`, `lost`, `gained`, `finite`, and `delta`.
    golden : pandas.DataFrame
        One row per image, without faults: `image`, `loss`, `correct` and `eligible`.
    stored_bits : dict of str to int
        Tensor, or layer, -> its stored bits, which is how likely a fault that strikes anywhere is in it.
    target : {"stored", "neuron"}
        Where the faults stayed.

    Examples
    --------
    >>> import pandas as pd
    >>> from textguard.hardware import PersistentResult
    >>> golden = pd.DataFrame({"image": [0, 1], "loss": 0.1, "correct": [True, False], "eligible": [True, False]})
    >>> result = PersistentResult(pd.DataFrame(), pd.DataFrame(), golden, {"fc.weight": 10240})
    >>> result.images, result.top1
    (2, 0.5)
    """

    outcomes: pd.DataFrame
    by_image: pd.DataFrame
    golden: pd.DataFrame
    stored_bits: Mapping[str, int]
    target: StaysIn = "stored"

    @property
    def images(self) -> int:
        """How many images there were."""
        return len(self.golden)

    @property
    def top1(self) -> float:
        """The share of images that the golden run has right."""
        return float(self.golden["correct"].mean())


def run_persistent(
    model: nn.Module,
    loader: DataLoader,
    plan: pd.DataFrame,
    *,
    target: StaysIn = "stored",
    operation: Operation = "flip",
    number_format: str = "fp32",
    detector: str = "off",
    profiled: Mapping[str, float] | None = None,
    kinds: Sequence[str] | None = None,
    engine: str = "replay",
    batch_size: int = 256,
    image_batch: int = 64,
    foresee: bool = True,
    stop: float | None = None,
    task: Task | str = CLASSES,
    shard_dir: str | os.PathLike[str] | None = None,
    label: str = "persist",
) -> PersistentResult:
    """Carry persistent faults out, each on all images of a loader.

    Parameters
    ----------
    model : torch.nn.Module
        The model, on the device to use. It stays as it is.
    loader : DataLoader
        Gives images and labels; all of them are run, those that the model has wrong too.
    plan : pandas.DataFrame
        As `draw_persistent` returns it. At neurons, `layer` is a site and `neuron` an index into its flattened output.
    target : {"stored", "neuron"}, default "stored"
        Whether faults stay in stored values, or at neurons: then the same bits of the same neuron are hit in every image.
    operation : {"flip", "stuck_at_0", "stuck_at_1"}, default "flip"
        What happens to the bits.
    number_format : str, default "fp32"
        How weights are stored; at neurons, also the outputs of layers. fp32 stands for what torch stores.
    detector : str, default "off"
        The range detector that damaged values pass: `off`, `fixed:X`, or `profiled`. For stored values the last is each
        tensor's largest magnitude.
    profiled : mapping of str to float, optional
        At neurons: layer -> the largest magnitude of its output, which some formats and detectors need.
    kinds : sequence of str, optional
        At neurons: the operations whose outputs are sites; by default convolutions and linear layers.
    engine : {"replay", "whole"}, default "replay"
        `replay` computes what a fault changes and what lies behind. `whole` is its slow twin: the value is damaged, all images
        are run, and it is put back. It takes the place of `replay` where a model cannot be traced, and says so on stderr.
    batch_size : int, default 256
        Inferences per forward pass.
    image_batch : int, default 64
        Images per golden run, whose values are all kept.
    foresee : bool, default True
        Whether `replay` takes gradients for inferences where a fault changes a layer's values by less than a 256th: of up to 16
        classes the logits, of more only whether these are masked. A fault's DeltaLoss then errs by some 1e-4 nats; its counts
        of images stay the same, but where two classes are as likely. Without it, all that is not bit-identical is run.
    stop : float, optional
        A fault ends after the batch of images behind which the 99 % interval of its share of changed predictions reaches no
        further than this to either side: harmless and hopeless faults soon, others later or never. Its outcome is then that
        of the images so far, the first ones in an order that is drawn once for all faults, and `images` says how many these
        are. Means stay honest; a fault that would have changed one prediction in a thousand may be taken for one that changes
        none. By default all images are run.
    task : Task or its name, default that of an ordinary classifier
        What batches and logits mean.
    shard_dir : str or path-like, optional
        Where finished shards are kept. The same call goes on behind them. The processes that `torchrun` starts share them.
    label : str, default "persist"
        Names the run in progress lines.

    Returns
    -------
    PersistentResult
        What each fault did. The same for any `batch_size` and any number of processes, but for the order of additions; with
        `stop`, it depends on `image_batch`.

    Raises
    ------
    CampaignMismatch
        The plan does not fit the model, or shard_dir holds shards of another run.
    InvalidParameter, UnknownName, UnsupportedModel
        An argument or the model is none that faults can be carried out in.

    Examples
    --------
    >>> import pandas as pd
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.hardware.persistent import run_persistent
    >>> model = nn.Linear(2, 2, bias=False)
    >>> model.weight.data = torch.eye(2)
    >>> images, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1, 0])
    >>> sign = pd.DataFrame({"layer": ["weight"], "index": [0], "neuron": [0], "bit": [31]})
    >>> result = run_persistent(model, DataLoader(TensorDataset(images, labels)), sign)
    >>> result.outcomes[["golden_value", "faulty_value", "images", "masked", "changed", "correct"]].iloc[0].tolist()
    [1.0, -1.0, 3.0, 1.0, 2.0, 1.0]
    """
    task, shard_dir = make_task(task), folder_path(Setting("shard_dir"), shard_dir)
    checked_name("target", target, get_args(StaysIn), Setting("target"))
    checked_name("engine", engine, ENGINES, Setting("engine"))
    batch_size = whole_number(Setting("batch_size"), batch_size, 1)
    image_batch = whole_number(Setting("image_batch"), image_batch, 1)
    if stop is not None and (isinstance(stop, bool) or not isinstance(stop, (int, float)) or not 0 < stop < 1):
        raise InvalidParameter(Setting("stop"), f" is {stop!r:.60}; it must be a half-width between 0 and 1, or None")
    fault_model = FaultModel("weight" if target == "stored" else "neuron", operation)
    read = positions(loader)
    given = model
    model, image = prepare(model, loader, task)
    make: Callable[..., tuple[Carrier, pd.DataFrame, Block, dict[str, int]]] = _stored_faults
    options: dict[str, Any] = {"foresee": foresee}
    if target == "neuron":
        make, options = _neuron_faults, {"profiled": profiled, **({"kinds": kinds} if kinds is not None else {})}
    carrier, faults, block, stored_bits = make(
        model, image, plan, fault_model, number_format, detector, engine, batch_size, **options
    )
    # Stopping needs images in random order; loaders often give them class by class.
    order = np.asarray(read) if stop is None else np.random.Generator(np.random.Philox(0)).permutation(np.asarray(read))
    parts = [part.tolist() for part in np.array_split(order, range(image_batch, len(order), image_batch))]
    rank, processes = share_work(shard_dir)
    if shard_dir:
        settings = {
            **{"engine": f"{type(carrier).__name__}, torch {torch.__version__}", "model": weights_mark(given)},
            **{"target": target, "operation": operation, "detector": detector},
            **{"number format": as_format(number_format).name, "stop": stop, "foresee": foresee},
            **{"plan": _digest(pd.util.hash_pandas_object(plan[list(faults.columns[:4])]).to_numpy())},
            **{"images": f"{len(read)}, {_digest(np.asarray(read))}, {_first_images(loader, read, task)}"},
            **{"images per shard": image_batch, **task.as_json()},
        }
        check_settings(shard_dir, settings, rank)
    run = _Run(carrier, block, faults, task, stop, shard_dir)
    golden = run.carry_out(loader, image.device, parts, rank, processes, label)
    of_faults, of_images = run.collect(processes)
    values = {"golden_value": block.golden.cpu().numpy(), "faulty_value": block.faulty.cpu().numpy()}
    outcomes = pd.concat([faults.drop(columns=["mask", "tensor"]).assign(**values), of_faults], axis=1)
    names = faults.drop_duplicates("tensor").set_index("tensor")["layer"]
    by_image = of_images.assign(layer=of_images["tensor"].map(names))[["layer", *_OF_IMAGES[1:]]]
    return PersistentResult(outcomes, by_image, golden, stored_bits, target)


def _stored_faults(
    model: nn.Module,
    image: Tensor,
    plan: pd.DataFrame,
    fault_model: FaultModel,
    number_format: str,
    detector: str,
    engine: str,
    batch_size: int,
    foresee: bool,
) -> tuple[Carrier, pd.DataFrame, Block, dict[str, int]]:
    """The carrier of faults in stored values, one row per fault, the same as tensors, and each tensor's stored bits."""
    tensors = {tensor.name: tensor for tensor in stored_tensors(model, image)}
    bits = {name: tensor.stored_as(number_format).bits for name, tensor in tensors.items()}
    faults = one_per_fault(plan, {name: (tensor.values, bits[name]) for name, tensor in tensors.items()})
    model = own_copy(model)
    storages, known = round_stored(model, list(tensors.values()), number_format), tensors_of(model)
    names = list(tensors)  # in the order of execution, so that faults of one shard start near to each other
    faults["tensor"] = faults["layer"].map({name: place for place, name in enumerate(names)})
    neuron, mask = (torch.tensor(faults[column].to_numpy(), device=image.device) for column in ("neuron", "mask"))
    golden, faulty = torch.empty(len(faults)), torch.empty(len(faults))
    largest = {name: float(known[name].detach().double().abs().max()) for name in names} if detector == "profiled" else {}
    # All stored integers are in the range that the model was quantised for.
    integers = [name for name in names if not known[name].is_floating_point()]
    limits = detector_limits(detector, names, largest) | dict.fromkeys(integers, math.inf)
    for name, rows in faults.groupby("layer").indices.items():
        found = damaged_values(storages[name], known[name], neuron[rows], mask[rows], fault_model.operation, limits[name])
        golden[rows], faulty[rows] = (values.float().cpu() for values in found)
    tensor = torch.tensor(faults["tensor"].to_numpy(), device=image.device)
    block = Block(tensor, neuron, mask, golden.to(image.device), faulty.to(image.device))
    carrier: Carrier = (
        WholeModel(model, names, batch_size)
        if engine == "whole"
        else _replay(model, image, names, batch_size, foresee * len(faults))
    )
    return carrier, faults, block, {name: tensors[name].values * bits[name] for name in names}


def _replay(model: nn.Module, image: Tensor, names: Sequence[str], batch_size: int, faults: int) -> Carrier:
    try:
        return Replay(model, image, names, batch_size, faults)
    except UnsupportedModel as reason:
        print(f"engine 'replay' cannot be used, going on with 'whole', which is slower: {reason}", file=sys.stderr, flush=True)
        return WholeModel(model, names, batch_size)


def _neuron_faults(
    model: nn.Module,
    image: Tensor,
    plan: pd.DataFrame,
    fault_model: FaultModel,
    number_format: str,
    detector: str,
    engine: str,
    batch_size: int,
    **options: Any,
) -> tuple[Carrier, pd.DataFrame, Block, dict[str, int]]:
    """The same for faults that stay at neurons."""
    form = as_format(number_format)
    made = make_engine(engine, model, image, batch_size, number_format=form, **options)
    sizes = {site.layer: (site.neurons, bits_at(site, fault_model, form)) for site in made.sites}
    faults = one_per_fault(plan, sizes)
    faults["tensor"] = faults["layer"].map({site.layer: site.position for site in made.sites})
    tensor, neuron, mask = (torch.tensor(faults[name].to_numpy(), device=image.device) for name in ("tensor", "neuron", "mask"))
    unknown = torch.full(neuron.shape, torch.nan, device=image.device)
    stored_bits = {name: values * bits for name, (values, bits) in sizes.items()}
    limits = list(detector_limits(detector, list(sizes), options.get("profiled") or {}).values())
    limit = torch.tensor(limits, dtype=torch.float32, device=image.device)
    return Neurons(made, fault_model, limit), faults, Block(tensor, neuron, mask, unknown, unknown), stored_bits


class _Run:
    """Faults on batches of images, in shards of one batch and FAULTS faults."""

    def __init__(
        self, carrier: Carrier, block: Block, faults: pd.DataFrame, task: Task, stop: float | None, shard_dir: Path | None
    ) -> None:
        self._carrier, self._block, self._task, self._stop, self._folder = carrier, block, task, stop, shard_dir
        order = np.argsort(faults["tensor"].to_numpy(), kind="stable")
        self._blocks = np.array_split(order, range(FAULTS, len(order), FAULTS))
        self._tensor = faults["tensor"].to_numpy()
        self._active = np.ones(len(faults), dtype=bool)
        self._sums = np.zeros((len(faults), len(_OF_FAULTS) - 1))
        self._images: list[pd.DataFrame] = []
        self._batches = 0

    def carry_out(
        self, loader: DataLoader, device: torch.device, parts: list[list[int]], rank: int, processes: int, label: str
    ) -> pd.DataFrame:
        """Run this process's share of the faults. Returns the golden run, by image."""
        mine = [number for number in range(len(self._blocks)) if number % processes == rank]
        total = sum(len(self._blocks[number]) for number in mine) * sum(map(len, parts))
        self._batches, found = len(parts), []
        with progress(total=total, label=label, unit="inference") as bar:
            loaded = batches(loader, device, parts, self._task)
            for place, (part, images, labels) in enumerate(loaded):
                golden = _Golden(self._carrier.start(images), labels, self._task)
                found.append(golden.table(part))
                for number in mine:
                    self._do(number, place, golden, np.asarray(part), labels)
                    bar.update(len(self._blocks[number]) * len(part))
        if processes > 1:
            wait_for_all()
        return pd.concat(found).sort_values("image", ignore_index=True)

    def _do(self, number: int, place: int, golden: "_Golden", part: np.ndarray, labels: Tensor) -> None:
        """One shard, run or loaded."""
        faults = self._blocks[number][self._active[self._blocks[number]]]
        if not len(faults):
            return
        found = self._load(number, place)
        if found is None:
            block = self._block.of(torch.as_tensor(faults, device=self._block.neuron.device))
            found = self._look(block, faults, golden, part, labels)
            if self._folder:
                for name, table in zip(("images", "faults"), reversed(found), strict=True):  # that of faults tells it is whole
                    write_parquet(self._file(name, number, place), table)
        self._take(*found)

    def _file(self, what: str, number: int, place: int) -> Path:
        return self._folder / f"{what}-{place:05d}-{number:05d}.parquet"

    def _load(self, number: int, place: int) -> tuple[pd.DataFrame, pd.DataFrame] | None:
        if not self._folder or not self._file("faults", number, place).exists():
            return None
        try:
            of_faults = read_parquet(self._file("faults", number, place), "", _OF_FAULTS)
            return of_faults, read_parquet(self._file("images", number, place), "", _OF_IMAGES)
        except InvalidArtifact:
            return None

    def _take(self, of_faults: pd.DataFrame, of_images: pd.DataFrame) -> None:
        rows = of_faults["fault"].to_numpy()
        self._sums[rows] += of_faults[_OF_FAULTS[1:]].to_numpy()
        self._images.append(of_images)
        if self._stop is not None:
            for row in rows:
                images, changed = int(self._sums[row, 0]), int(self._sums[row, 2])
                held = rate_estimate(changed, images, CONFIDENCE)
                self._active[row] = max(held.high - held.value, held.value - held.low) > self._stop

    def _look(
        self, block: Block, faults: np.ndarray, golden: "_Golden", part: np.ndarray, labels: Tensor
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Carry a block of faults out. Returns sums by fault, and by tensor and image."""
        shape, device = (len(faults), len(part)), labels.device
        delta = torch.zeros(shape, dtype=torch.float64, device=device)
        masked = torch.ones(shape, dtype=torch.bool, device=device)
        changed, nonfinite, wrong, right = (torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(4))
        for fault, image, logits in self._carrier.run(block):
            seen = golden.compare(logits, image, labels)
            pairs = (fault, image)
            masked[pairs], changed[pairs], nonfinite[pairs], delta[pairs] = (
                seen.masked,
                seen.changed,
                seen.nonfinite,
                seen.delta,
            )
            wrong[pairs], right[pairs] = golden.correct[image] & ~seen.correct, ~golden.correct[image] & seen.correct
        finite = delta.isfinite()
        delta = torch.where(finite, delta, 0.0)
        able = golden.eligible
        sums = {
            **{"images": torch.full((len(faults),), len(part)), "masked": masked.sum(1), "changed": changed.sum(1)},
            **{
                "nonfinite": nonfinite.sum(1),
                "correct": ((golden.correct & ~wrong) | right).sum(1),
                "lost": wrong.sum(1),
                "gained": right.sum(1),
                "finite": finite.sum(1),
            },
            **{"delta": delta.sum(1), "square": (delta**2).sum(1), "eligible": able.sum().expand(len(faults))},
            **{"eligible_changed": (changed & able).sum(1), "eligible_finite": (finite & able).sum(1)},
            **{"eligible_delta": (delta * able).sum(1), "eligible_square": (delta**2 * able).sum(1)},
        }
        of_faults = pd.DataFrame({"fault": faults, **{name: value.cpu().numpy() for name, value in sums.items()}})
        tensors, place = np.unique(self._tensor[faults], return_inverse=True)
        groups = torch.as_tensor(place, device=device)
        by_pair = {"masked": masked, "changed": changed, "lost": wrong, "gained": right, "finite": finite, "delta": delta}
        columns = {
            name: torch.zeros(len(tensors), len(part), dtype=torch.float64, device=device).index_add_(0, groups, value.double())
            for name, value in by_pair.items()
        }
        of_images = pd.DataFrame(
            {
                **{"tensor": tensors.repeat(len(part)), "image": np.tile(part, len(tensors))},
                **{"faults": np.bincount(place).repeat(len(part))},
                **{name: value.flatten().cpu().numpy() for name, value in columns.items()},
            }
        )
        return of_faults, of_images

    def collect(self, processes: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """What all processes found: by fault, in the plan's order, and by tensor and image."""
        if processes > 1:
            self._sums[:] = 0
            self._images, self._active[:] = [], True
            for place in range(self._batches):
                for number in range(len(self._blocks)):
                    found = self._load(number, place)
                    if found is not None:
                        self._take(*found)
        table = pd.DataFrame(self._sums, columns=_OF_FAULTS[1:])
        counts = [name for name in table if name.removeprefix("eligible_") not in ("delta", "square")]
        table = table.astype(dict.fromkeys(counts, "int64"))
        for prefix in ("", "eligible_"):
            finite = table[f"{prefix}finite"].replace(0, np.nan)
            table[f"{prefix}delta_loss"] = table.pop(f"{prefix}delta") / finite
            table[f"{prefix}square"] = table.pop(f"{prefix}square") / finite
        images = pd.concat(self._images).groupby(["tensor", "image"], as_index=False).sum()
        return table, images.astype(dict.fromkeys(("masked", "changed", "lost", "gained", "finite"), "int64"))


@dataclass(frozen=True)
class _Seen:
    """What faults did to n pairs of fault and image."""

    masked: Tensor
    changed: Tensor
    nonfinite: Tensor
    correct: Tensor
    delta: Tensor


class _Golden:
    """A batch of images without faults, which faulty inferences are compared with."""

    def __init__(self, logits: Tensor, labels: Tensor, task: Task) -> None:
        self._task, self._logits = task, logits.float()
        self._loss = task.precise_loss(self._logits, labels)
        self.correct = task.correct(self._logits, labels)
        self.eligible = self.correct & (task.certainty(self._logits) > 0)
        self._bound = ROUNDING * self._logits.reshape(len(logits), -1).abs().amax(dim=1)

    def table(self, part: Sequence[int]) -> pd.DataFrame:
        """One row per image."""
        columns = {"loss": self._loss, "correct": self.correct, "eligible": self.eligible}
        return pd.DataFrame({"image": part, **{name: value.cpu().numpy() for name, value in columns.items()}})

    def compare(self, logits: Tensor, image: Tensor, labels: Tensor) -> _Seen:
        """Logits [n, ...] of faulty inferences on images [n]."""
        logits, golden = logits.float(), self._logits[image]
        moved = (logits - golden).reshape(len(image), -1).abs().amax(dim=1)
        masked = moved <= self._bound[image]  # not where NaN
        nonfinite = ~logits.reshape(len(image), -1).isfinite().all(dim=1)
        changed = (self._task.differs(logits, golden) | nonfinite) & ~masked
        correct = torch.where(masked, self.correct[image], self._task.correct(logits, labels[image]) & ~nonfinite)
        delta = (self._task.precise_loss(logits, labels[image]) - self._loss[image]).abs()
        return _Seen(masked, changed, nonfinite, correct, torch.where(masked, 0.0, delta))


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def _first_images(loader: DataLoader, read: Sequence[int], task: Task) -> str:
    ((_, *first),) = batches(loader, torch.device("cpu"), [list(read[:8])], task)
    return "-".join(_digest(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) for tensor in first)
