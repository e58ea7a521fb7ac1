"""What a model keeps in memory: every float tensor that an inference reads, and faults in single values of them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from textguard.errors import CampaignMismatch, Setting, UnsupportedModel, printable
from textguard.faults.checks import whole_number
from textguard.faults.copying import copy_model
from textguard.faults.damage import FaultModel, Faults, Operation, Storage
from textguard.faults.exported import evaluation
from textguard.faults.formats import FP32, NATIVE, Format, parse_format, stored_as
from textguard.faults.graph import unwrapped
from textguard.faults.plans import distinct, uniform_numbers
from textguard.faults.sites import INTEGERS, uncompiled
from textguard.faults.weights import matrices, weight_readers

PERSISTENT_COLUMNS = ["layer", "index", "neuron", "bit"]


@dataclass(frozen=True)
class StoredTensor:
    """A parameter or buffer that an inference reads.

    Attributes
    ----------
    name : str
        Its name in the model; of tied ones, the first.
    shape : tuple of int
        Its shape.
    dtype : str
        How torch stores it, such as "float32".
    readers : tuple of str
        The torch functions that read it in one inference, each once.
    product : bool
        Whether a product reads it and it has two dimensions or more, as weights do. Only such a tensor is stored in the number
        format that is asked for. Others stay in torch's type, as in quantised networks.

    Examples
    --------
    >>> from textguard.hardware import StoredTensor
    >>> weight = StoredTensor("fc.weight", (10, 32), "float32", ("linear",), product=True)
    >>> weight.values, weight.stored_as("int(8)").bits
    (320, 8)
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    readers: tuple[str, ...]
    product: bool

    @property
    def values(self) -> int:
        """How many values it holds."""
        return int(np.prod(self.shape, dtype=np.int64))

    def stored_as(self, number_format: Format | str = FP32) -> Format:
        """The format that its values are stored in. Raises InvalidParameter where the two do not fit."""
        asked = as_format(number_format) if self.product else FP32
        return stored_as(asked, self.dtype, f"tensor {self.name!r}")[0]


def as_format(number_format: Format | str) -> Format:
    """A number format, which may be given by its name. Raises InvalidParameter, UnknownName."""
    return number_format if isinstance(number_format, Format) else parse_format(number_format)


def stored_tensors(model: nn.Module, image: Tensor) -> list[StoredTensor]:
    """The parameters and buffers that an inference reads: weights, biases, norms' parameters and running statistics.

    They are floats, or the integers of quantised graphs.

    Parameters
    ----------
    model : torch.nn.Module
        From images [B, ...] to logits [B, C]; where the task has a `forward`, what `prepare` makes of it. It stays as it is.
    image : Tensor
        One image [...], on the model's device.

    Returns
    -------
    list of StoredTensor
        In the order in which they are first read; tied ones once.

    Raises
    ------
    UnsupportedModel
        The model reads no stored numbers, or stores them in a type without a known format.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from textguard.hardware.stored import stored_tensors
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    >>> for tensor in stored_tensors(model, torch.zeros(1, 4, 4))[:3]:
    ...     print(tensor.name, tensor.shape, tensor.readers, tensor.product)
    0.weight (2, 1, 3, 3) ('conv2d',) True
    0.bias (2,) ('conv2d',) False
    1.running_mean (2,) ('batch_norm',) False
    """
    model = own_copy(model)
    readers = weight_readers(model, image)
    products, tensors = set(matrices(readers)), tensors_of(model)
    found = []
    for name, functions in readers.items():
        tensor = tensors[name]
        # Of whole numbers, the weights of quantised graphs: what indices, counters and masks do when damaged is another matter.
        stored = tensor.is_floating_point() or (tensor.dtype in INTEGERS and any(map(_is_dequantised, functions)))
        if not stored or not tensor.numel():
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in NATIVE:
            raise UnsupportedModel(f"tensor {name!r} is {dtype}; bits of {', '.join(NATIVE)} are known")
        called = tuple(dict.fromkeys(function.__name__ for function in functions))
        found.append(StoredTensor(name, tuple(tensor.shape), dtype, called, name in products and tensor.ndim > 1))
    if not found:
        raise UnsupportedModel(f"{type(model).__name__} reads no stored float tensors, so there is nothing to damage")
    return found


def _is_dequantised(function: Callable) -> bool:
    return function.__name__.startswith("dequantize_per_")


def own_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, with the layers' own names, whose weights can be changed. Raises UnsupportedModel."""
    return uncompiled(evaluation(copy_model(unwrapped(model))))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or buffer, under all of its names."""
    return {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}


def draw_persistent(
    tensors: Sequence[StoredTensor],
    count: int | Mapping[str, int],
    seed: int,
    number_format: Format | str = FP32,
    bits: int = 1,
) -> pd.DataFrame:
    """Draw persistent faults for each tensor: values and bits are uniform, so the same fault may be drawn twice.

    A fault depends only on the seed, its tensor's name and its index: a larger count extends a plan.

    Parameters
    ----------
    tensors : sequence of StoredTensor
        As `stored_tensors` returns them, all or some.
    count : int, or mapping of str to int
        Faults per tensor, or tensor -> its faults.
    seed : int
        The seed of all draws.
    number_format : Format or str, default fp32
        How weights are stored. fp32 stands for the values as torch stores them.
    bits : int, default 1
        How many different bits of its value a fault damages.

    Returns
    -------
    pandas.DataFrame
        One row per damaged bit, with PERSISTENT_COLUMNS: `layer`, the tensor's name; `index`, of the fault within it; `neuron`,
        the value's index in the flattened tensor; and `bit`, 0 the lowest.

    Raises
    ------
    InvalidParameter
        A count or `bits` is below 1, or a tensor cannot be stored in the format, or its values have fewer bits.

    Examples
    --------
    >>> from textguard.hardware.stored import StoredTensor, draw_persistent
    >>> draw_persistent([StoredTensor("fc.weight", (10, 32), "float32", ("linear",), True)], count=2, seed=0)
           layer  index  neuron  bit
    0  fc.weight      0     133   17
    1  fc.weight      1     131   14
    """
    bits = whole_number(Setting("bits"), bits, 1)
    parts = []
    for tensor in tensors:
        of_tensor = count.get(tensor.name, 0) if isinstance(count, Mapping) else count
        number = whole_number(Setting("count"), of_tensor, 0 if isinstance(count, Mapping) else 1)
        uniform = uniform_numbers(seed, f"stored {tensor.name}", number, 1 + bits)
        damaged = distinct(uniform[:, 1:], tensor.stored_as(number_format).bits, "bits")
        neuron = (uniform[:, 0] * tensor.values).astype(np.int64)
        columns = {"layer": tensor.name, "index": np.arange(number).repeat(bits), "neuron": neuron.repeat(bits)}
        parts.append(pd.DataFrame({**columns, "bit": damaged.reshape(-1)}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=PERSISTENT_COLUMNS)


def one_per_fault(plan: pd.DataFrame, sizes: Mapping[str, tuple[int, int]]) -> pd.DataFrame:
    """A checked plan with one row per fault, in the order of the plan.

    plan: with PERSISTENT_COLUMNS. sizes: name -> how many values it has, and bits of each. The result has `mask` beside them,
    the damaged bits; `bit` is the highest of these. Raises CampaignMismatch.
    """
    missing = [column for column in PERSISTENT_COLUMNS if column not in plan]
    if missing:
        raise CampaignMismatch(f"the plan lacks the columns {', '.join(missing)}; needed: {', '.join(PERSISTENT_COLUMNS)}")
    if not len(plan):
        raise CampaignMismatch("the plan has no faults; draw at least one")
    for name in plan["layer"].unique():
        if name not in sizes:
            raise CampaignMismatch(
                f"the plan names {printable(repr(name), 80)}, which no inference reads; there are {_some(sizes)}"
            )
    for place, column in enumerate(("neuron", "bit")):
        if plan[column].dtype.kind not in "iu":
            raise CampaignMismatch(f"the plan's column {column} holds {plan[column].dtype}; whole numbers are needed")
        end = plan["layer"].map({name: size[place] for name, size in sizes.items()})
        outside = ~plan[column].between(0, end - 1)
        if outside.any():
            row, most = plan[outside].iloc[0], int(end[outside].iloc[0]) - 1
            raise CampaignMismatch(
                f"the plan hits {column} {row[column]} of {row['layer']!r}, which has {column}s from 0 to {most}"
            )
    groups = plan.groupby(["layer", "index"], sort=False)
    if (groups["neuron"].nunique() > 1).any():
        raise CampaignMismatch("a fault of the plan damages several values; a persistent fault is in one value")
    faults = groups.agg(neuron=("neuron", "first"), bit=("bit", "max")).reset_index()
    mask = np.zeros(len(faults), dtype=np.int64)
    np.bitwise_or.at(mask, groups.ngroup().to_numpy(), np.left_shift(1, plan["bit"].to_numpy(dtype=np.int64)))
    return faults.assign(mask=mask)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")


def round_stored(model: nn.Module, tensors: Sequence[StoredTensor], number_format: Format | str = FP32) -> dict[str, Storage]:
    """Round a model's weights to a number format in place, and say how each of its tensors is stored.

    Only what a product reads is rounded, see `StoredTensor`. Activations are not: the format is the memory's.

    Parameters
    ----------
    model : torch.nn.Module
        The model, a copy of the user's.
    tensors : sequence of StoredTensor
        Its tensors.
    number_format : Format or str, default fp32
        How weights are stored.

    Returns
    -------
    dict of str to Storage
        Name -> how its values are stored.

    Raises
    ------
    InvalidParameter
        A tensor is not float32, and the format is another than its own.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from textguard.hardware.stored import round_stored, stored_tensors
    >>> model = nn.Linear(1, 1)
    >>> model.weight.data.fill_(0.1)
    tensor([[0.1000]])
    >>> storages = round_stored(model, stored_tensors(model, torch.zeros(1)), "bf16")
    >>> round(model.weight.item(), 6), storages["weight"].format.bits, storages["bias"].format.bits
    (0.100098, 16, 32)
    """
    known, storages = tensors_of(model), {}
    for tensor in tensors:
        values = known[tensor.name].data
        asked = as_format(number_format) if tensor.product else FP32
        own, native = stored_as(asked, tensor.dtype, f"tensor {tensor.name!r}")
        limit = float(values.abs().max())
        storages[tensor.name] = Storage(own, limit, tensor.values, values.device, native=native)
        values.copy_(storages[tensor.name].round(values))
    return storages


def damaged_values(
    storage: Storage,
    values: Tensor,
    neuron: Tensor,
    mask: Tensor,
    operation: Operation = "flip",
    limit: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """What faults make of stored values, one value each. Nothing is written.

    Parameters
    ----------
    storage : Storage
        How the tensor is stored.
    values : Tensor
        The tensor, of any shape.
    neuron : Tensor
        int64 [N], indices into the flattened tensor.
    mask : Tensor
        int64 [N], the damaged bits.
    operation : {"flip", "stuck_at_0", "stuck_at_1"}
        What happens to the bits.
    limit : float, optional
        The largest magnitude that the range detector lets pass; by default there is none.

    Returns
    -------
    golden, faulty : Tensor
        float [N], each value before and after.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from textguard.hardware.stored import damaged_values, round_stored, stored_tensors
    >>> model = nn.Linear(1, 1, bias=False)
    >>> model.weight.data.fill_(1.0)
    tensor([[1.]])
    >>> storages = round_stored(model, stored_tensors(model, torch.zeros(1)))
    >>> damaged_values(storages["weight"], model.weight, torch.tensor([0, 0]), torch.tensor([1 << 31, 1 << 23]))
    (tensor([1., 1.]), tensor([-1.0000,  0.5000]))
    """
    count, zero = len(neuron), torch.zeros_like(neuron)
    limits = torch.full((count,), limit, device=neuron.device)
    row = torch.arange(count, device=neuron.device)
    faults = Faults(FaultModel("weight", operation), zero, zero, limits, row, neuron, mask)
    flat = values.detach().reshape(-1)
    damage = storage.damage(faults, lambda _, place: flat[place])
    return damage.golden, damage.faulty
