"""What faults do to stored values: which codes change, what they decode to, and what the range detector makes of it."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from textguard.errors import InvalidParameter, Setting
from textguard.faults.checks import checked_name, whole_number
from textguard.faults.detectors import clamp_to_range
from textguard.faults.formats import Format, stored_as
from textguard.faults.sites import Call, Site
from textguard.faults.weights import computed_weights, matrices, stored_weights

Target = Literal["neuron", "weight", "metadata"]
Operation = Literal["flip", "stuck_at_0", "stuck_at_1"]
Lasts = Literal["inference", "forever"]
Pattern = Literal["value", "adjacent", "channel", "row", "column", "block"]
AnyDamage = Literal["equal", "random"]
UNSHAPED = ("value", "adjacent")  # patterns whose every damaged value is drawn, and stands in the plan
USUAL_BLOCK = (8, 8)


@dataclass(frozen=True)
class FaultModel:
    """What one injection is.

    Parameters
    ----------
    target : {"neuron", "weight", "metadata"}
        What is damaged: neurons (values of a layer's output), weights, or the metadata that the values of a block share, in
        number formats that have it.
    operation : {"flip", "stuck_at_0", "stuck_at_1"}
        What happens to the bits.
    bits : int
        How many different bits of a value are damaged.
    values : int
        How many different neurons, weights or blocks of one layer are damaged.
    pattern : {"value", "adjacent", "channel", "row", "column", "block"}
        Which values and bits are damaged together. `value`: any. `adjacent`: the bits of a value lie side by side, as upsets of
        neighbouring cells do. The others damage all values of a region, one region per injection: all of one output channel; a
        row or column of one channel's map, or of a token matrix; the tile of outputs that an array computes at once. See
        `textguard.faults.patterns`.
    block : (int, int), default (8, 8)
        How many channels and places the tile of pattern `block` has. Other patterns leave it as it is.
    damage : {"equal", "random"}
        Whether the values of a region get the same bits damaged, or each its own.
    lasts : {"inference", "forever"}
        Whether it is gone after an inference on one image, or stays for all images. Campaigns are of the former;
        `textguard.hardware.run_persistent` carries out the latter.

    Raises
    ------
    UnknownName
        There is no such target, operation, pattern, damage or duration.
    InvalidParameter
        bits, values or block is no whole number, or below 1; or the pattern does not go with the rest.

    Examples
    --------
    >>> from textguard.faults import FaultModel
    >>> FaultModel()
    FaultModel(target='neuron', operation='flip', bits=1, values=1)
    >>> in_two_weights = FaultModel(target="weight", operation="stuck_at_1", values=2)
    >>> FaultModel(pattern="block", block=(16, 16), damage="random")
    FaultModel(target='neuron', operation='flip', bits=1, values=1, pattern='block', block=(16, 16), damage='random')
    """

    target: Target = "neuron"
    operation: Operation = "flip"
    bits: int = 1
    values: int = 1
    pattern: Pattern = "value"
    block: tuple[int, int] = USUAL_BLOCK
    damage: AnyDamage = "equal"
    lasts: Lasts = "inference"

    def __post_init__(self) -> None:
        names = {"target": Target, "operation": Operation, "pattern": Pattern, "damage": AnyDamage, "lasts": Lasts}
        for name, allowed in names.items():
            checked_name(name, getattr(self, name), get_args(allowed), Setting(f"fault_model.{name}"))
        for name in ("bits", "values"):
            object.__setattr__(self, name, whole_number(Setting(f"fault_model.{name}"), getattr(self, name), 1))
        sizes, block = self.block, Setting("fault_model.block")
        if not isinstance(sizes, list | tuple) or len(sizes) != 2:
            raise InvalidParameter(block, f" is {sizes!r:.60}; it must be two whole numbers: channels and places")
        sizes = tuple(whole_number(block, size, 1) for size in sizes)
        # What the pattern does not read makes no other fault model.
        object.__setattr__(self, "block", sizes if self.pattern == "block" else USUAL_BLOCK)
        self._check_pattern()

    def _check_pattern(self) -> None:
        if self.pattern == "adjacent" and self.bits < 2:
            raise InvalidParameter(Setting("fault_model.bits"), " is 1; pattern adjacent needs at least 2")
        if not self.shaped and self.damage != "equal":
            raise InvalidParameter(
                Setting("fault_model.damage"),
                f" is 'random'; it is of regions, and pattern {self.pattern} has none: take equal",
            )
        if self.shaped and self.values > 1:
            raise InvalidParameter(
                Setting("fault_model.values"),
                f" is {self.values}; pattern {self.pattern} hits one region per injection: take 1",
            )
        if self.shaped and self.target == "metadata":
            raise InvalidParameter(
                Setting("fault_model.pattern"), f" is {self.pattern!r}; metadata has no such shape: take value or adjacent"
            )

    def __repr__(self) -> str:
        return f"FaultModel({', '.join(f'{name}={value!r}' for name, value in self._told().items())})"

    @property
    def shaped(self) -> bool:
        """Whether all values of a region are damaged, of which a plan names the first."""
        return self.pattern not in UNSHAPED

    @property
    def words(self) -> str:
        """What one injection is, in words.

        Examples
        --------
        >>> from textguard.faults import FaultModel
        >>> FaultModel().words, FaultModel(pattern="block", operation="stuck_at_1").words
        ('flip, 1 bit(s) in 1 neuron(s)', 'stuck_at_1, 1 bit(s) in the neurons of a block of 8 x 8, equal in all')
        """
        if not self.shaped:
            beside = " side by side" if self.pattern == "adjacent" else ""
            return f"{self.operation}, {self.bits} bit(s){beside} in {self.values} {self.target}(s)"
        size = " of {} x {}".format(*self.block) if self.pattern == "block" else ""
        each = "equal in all" if self.damage == "equal" else "others in each"
        return f"{self.operation}, {self.bits} bit(s) in the {self.target}s of a {self.pattern}{size}, {each}"

    def _told(self) -> dict[str, Any]:
        unread = {"value": ("pattern", "block", "damage"), "adjacent": ("block", "damage"), "block": ()}
        left_out = {*unread.get(self.pattern, ("block",)), *(["lasts"] if self.lasts == "inference" else [])}
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def as_json(self) -> dict[str, Any]:
        """The fields that the pattern reads, and how long faults last where they stay. As before there were these, else."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._told().items()}


SINGLE_FLIP = FaultModel()


@dataclass(frozen=True)
class Faults:
    """N faults on a batch of images, which damage M >= N stored values.

    Attributes
    ----------
    model : FaultModel
        What each of them is.
    position : Tensor
        int64 [N], the position of each fault's site.
    image : Tensor
        int64 [N], the index of each fault's image in the batch.
    limit : Tensor
        float32 [N], the largest magnitude that the range detector lets pass.
    row : Tensor
        int64 [M], ascending: which of the N faults damages the value.
    neuron : Tensor
        int64 [M], the index of the damaged value in one image's flattened output, in the flattened weights, or among the
        blocks.
    mask : Tensor
        int64 [M], the value's damaged bits.
    """

    model: FaultModel
    position: Tensor
    image: Tensor
    limit: Tensor
    row: Tensor
    neuron: Tensor
    mask: Tensor

    @property
    def one_value_each(self) -> bool:
        """Whether each fault damages a single value."""
        return len(self.row) == len(self.position)

    def select(self, rows: Tensor) -> tuple["Faults", Tensor]:
        """Some of the faults.

        Parameters
        ----------
        rows : Tensor
            int64 [n], ascending: which of the N faults.

        Returns
        -------
        part : Faults
            These faults.
        values : Tensor
            int64 [m], which of the M values are theirs.
        """
        row, values = torch.arange(len(rows), device=rows.device), rows
        if not self.one_value_each:
            renumbered = torch.full_like(self.position, -1)
            renumbered[rows] = row
            row = renumbered[self.row]
            values = torch.where(row >= 0)[0]
            row = row[values]
        part = Faults(
            self.model,
            self.position[rows],
            self.image[rows],
            self.limit[rows],
            row,
            self.neuron[values],
            self.mask[values],
        )
        return part, values


@dataclass(frozen=True)
class Damage:
    """What faults did to M stored values, and what has to be written for it.

    Damaged neurons and weights are what has to be written: K = M. A damaged piece of metadata changes all values of its block.

    Attributes
    ----------
    golden, faulty : Tensor
        float32 [M], each value before the fault, and after it behind the range detector. Of metadata, the codes.
    detected : Tensor
        bool [M], whether the range detector replaced the value; of metadata, any value of the block.
    row, neuron, written : Tensor
        [K]: the number `written` (float32) belongs to index `neuron` (int64) of fault `row` (int64).
    """

    golden: Tensor
    faulty: Tensor
    detected: Tensor
    row: Tensor
    neuron: Tensor
    written: Tensor


class Storage:
    """How one layer's values are stored.

    Parameters
    ----------
    number_format : Format
        The format.
    limit : float
        The largest magnitude that the layer was profiled to have.
    size : int
        How many values one image's output, or the weights, have.
    device : torch.device
        Where the values lie.
    site : Site, optional
        The site whose output it is, where it is one.
    native : bool, default False
        Whether torch stores them in that format anyway, so that nothing has to be rounded.
    """

    def __init__(
        self,
        number_format: Format,
        limit: float,
        size: int,
        device: torch.device,
        site: Site | None = None,
        native: bool = False,
    ) -> None:
        self.format, self.size, self._site, self._native = number_format, size, site, native
        self.limit = torch.tensor(limit, dtype=torch.float32, device=device)

    def round(self, values: Tensor) -> Tensor:
        """What is left of values once they are stored.

        values: B * size of them in any shape, of B images or of one weight. Returns the same shape and type.
        """
        if self._native:
            return values
        if self._site is None or self._site.in_order:
            return self.format.round(values.reshape(-1, self.size), self.limit).reshape(values.shape)
        stored = values.clone()
        view = self.by_image(stored, values.numel() // self.size)
        view.copy_(self.format.round(view.flatten(1), self.limit).reshape(view.shape))
        return stored

    def by_image(self, output: Tensor, images: int) -> Tensor:
        """A view of the site's output with the images in dimension 0; see `Site.by_image`."""
        if self._site is not None and not self._site.in_order:
            return self._site.by_image(output, images)
        return output if len(output) == images else output.unflatten(0, (images, -1))

    def damage(self, faults: Faults, read: Callable[[Tensor, Tensor], Tensor]) -> Damage:
        """Damage the values that faults name.

        Parameters
        ----------
        faults : Faults
            N faults in M values.
        read : callable
            read(row, neuron) returns the golden values, as stored, at these indices: float32 of the indices' shape.

        Returns
        -------
        Damage
            What the faults did. Nothing is written.
        """
        model, row, neuron = faults.model, faults.row, faults.neuron
        if model.target != "metadata":
            golden, shared = self._read(row, neuron, read)
            codes = operate(self.format.encode(golden, self.limit, shared), faults.mask, model.operation)
            faulty, detected = clamp_to_range(self.format.decode(codes, self.limit, shared), faults.limit[row])
            return Damage(golden, faulty, detected, row, neuron, faulty)
        golden, neurons, inside = self._block_of(row, neuron, read)
        shared = self.format.shared(golden, self.limit)
        damaged = operate(shared, faults.mask, model.operation)
        codes = self.format.encode(golden, self.limit, shared[:, None])
        values = self.format.decode(codes, self.limit, damaged[:, None])
        written, detected = clamp_to_range(values, faults.limit[row][:, None])
        each = row[:, None].expand_as(neurons)[inside]
        return Damage(shared.float(), damaged.float(), (detected & inside).any(dim=1), each, neurons[inside], written[inside])

    def variants(
        self,
        neuron: Tensor,
        masks: Tensor,
        operation: Operation,
        limit: float,
        read: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Damage each of N values in V ways.

        neuron: int64 [N], as in Faults. masks: int64 [1 or N, V], damaged bits. limit: of the range detector. read: as for
        `damage`. Returns the golden values, float32 [N, 1], and the faulty ones behind the detector, float32 [N, V].
        """
        golden, shared = (part[:, None] for part in self._read(torch.arange(len(neuron), device=neuron.device), neuron, read))
        codes = operate(self.format.encode(golden, self.limit, shared), masks, operation)
        faulty = self.format.decode(codes, self.limit, shared.expand_as(codes))
        return golden, clamp_to_range(faulty, torch.tensor(limit, dtype=torch.float32, device=faulty.device))[0]

    def _read(self, row: Tensor, neuron: Tensor, read: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The golden values, float32 [M], and the metadata that each is stored under, int64 [M]."""
        if self.format.shared_bits and self.format.block:
            golden, _, _ = self._block_of(row, neuron // self.format.block, read)
            return golden.gather(1, (neuron % self.format.block)[:, None])[:, 0], self.format.shared(golden, self.limit)
        golden = read(row, neuron)
        # Without blocks, metadata follows from the layer's limit alone, so no other value has to be read.
        return golden, self.format.shared(golden[:, None], self.limit)

    def _block_of(self, row: Tensor, number: Tensor, read: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """M whole blocks [M, block]: the golden values, their indices, and which are inside, for the last may be shorter."""
        block = self.format.block or self.size
        neurons = number[:, None] * block + torch.arange(block, device=row.device)
        inside = neurons < self.size
        golden = read(row[:, None].expand_as(neurons), neurons.clamp(max=self.size - 1)) * inside
        return golden, neurons, inside


def operate(codes: Tensor, mask: Tensor, operation: Operation) -> Tensor:
    """Damage the bits of `mask` in each code.

    Parameters
    ----------
    codes : Tensor
        int64 [M].
    mask : Tensor
        int64 [M].
    operation : {"flip", "stuck_at_0", "stuck_at_1"}
        What happens to the bits.

    Returns
    -------
    Tensor
        int64 [M].

    Examples
    --------
    >>> import torch
    >>> from textguard.faults.damage import operate
    >>> flipped = operate(torch.tensor([0b1100]), torch.tensor([0b0101]), "flip")
    >>> f"{flipped.item():04b}"
    '1001'
    """
    if operation == "flip":
        return codes ^ mask
    return codes | mask if operation == "stuck_at_1" else codes & ~mask


def damage_output(storage: Storage, output: Tensor, faults: Faults) -> Damage:
    """Damage a layer's output for N images in place, one image per fault.

    Parameters
    ----------
    storage : Storage
        How the output is stored.
    output : Tensor
        [N * rows, ...], or with the images where the site has them, as stored.
    faults : Faults
        N faults.

    Returns
    -------
    Damage
        What the faults did.
    """
    by_image = storage.by_image(output, len(faults.position))

    def read(row: Tensor, neuron: Tensor) -> Tensor:
        return by_image[(row, *torch.unravel_index(neuron, by_image.shape[1:]))]

    damage = storage.damage(faults, read)
    by_image[(damage.row, *torch.unravel_index(damage.neuron, by_image.shape[1:]))] = damage.written.to(output.dtype)
    return damage


def damage_weights(storage: Storage, call: Call, faults: Faults) -> tuple[Damage, Tensor]:
    """Repeat a call once per fault, each time with the weights as that fault leaves them.

    The weights are changed in place for one fault at a time, and restored bit for bit.

    Parameters
    ----------
    storage : Storage
        How the weights are stored.
    call : Call
        The call, with N images in its input.
    faults : Faults
        N faults, one per image.

    Returns
    -------
    damage : Damage
        What the faults did.
    output : Tensor
        The call's output, each image's share under its own fault.
    """
    weight = call.weight
    damage = storage.damage(faults, lambda row, neuron: weight[torch.unravel_index(neuron, weight.shape)])
    output = call.output.clone()
    inputs, outputs = (tensor.unflatten(0, (len(faults.position), -1)) for tensor in (call.args[0], output))
    for number in range(len(faults.position)):
        with _damaged(weight, damage, number):
            outputs[number] = call.func(inputs[number], *call.args[1:], **call.kwargs)
    return damage, output


def damage_stored(storage: Storage, weight: Tensor, faults: Faults, infer: Callable[[int], Tensor]) -> tuple[Damage, Tensor]:
    """Repeat an inference once per fault, each time with the weights as that fault leaves them, whoever reads them.

    The slow way, for weights that are read more than once. They are restored bit for bit.

    Parameters
    ----------
    storage : Storage
        How the weights are stored.
    weight : Tensor
        The weights, as the model holds them.
    faults : Faults
        N faults, one per image.
    infer : callable
        infer(n) runs the image of fault n and returns its logits, [1, C].

    Returns
    -------
    damage : Damage
        What the faults did.
    logits : Tensor
        [N, C], each row under its own fault.
    """
    damage = storage.damage(faults, lambda row, neuron: weight[torch.unravel_index(neuron, weight.shape)])
    logits = []
    for number in range(len(faults.position)):
        with _damaged(weight, damage, number):
            logits.append(infer(number))
    return damage, torch.cat(logits)


@contextlib.contextmanager
def _damaged(weight: Tensor, damage: Damage, number: int) -> Iterator[None]:
    """A context in which fault `number` has changed the weights."""
    here = damage.row == number
    damaged = torch.unravel_index(damage.neuron[here], weight.shape)
    kept = weight[damaged]
    try:
        weight[damaged] = damage.written[here].to(weight.dtype)
        yield
    finally:
        weight[damaged] = kept


def make_storages(
    model: nn.Module, sites: Sequence[Site], number_format: Format, profiled: Mapping[str, float], target: Target
) -> tuple[list[Storage], list[Storage]]:
    """Say how each site's values are stored, and round the model's weights to the format in place.

    Parameters
    ----------
    model : nn.Module
        The model.
    sites : sequence of Site
        Its sites.
    number_format : Format
        The format.
    profiled : mapping of str to float
        Layer -> the largest magnitude of its output. fp32 does not need it.
    target : {"neuron", "weight", "metadata"}
        What faults hit.

    Returns
    -------
    targets : list of Storage
        For each site, of what the faults hit.
    outputs : list of Storage
        For each site, of its output.

    Raises
    ------
    InvalidParameter
        The format has no metadata, a layer has no weights, or a layer was not profiled.
    """
    if target == "metadata" and not number_format.shared_bits:
        raise InvalidParameter(f"format {number_format.name} has no metadata; change ", Setting("fault_model.target"))
    device = next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), torch.device("cpu"))
    outputs: list[Storage] = []
    weights: list[Storage] = []
    rounded: dict[int, Storage] = {}  # a weight that several sites read is rounded once
    for site, weight in zip(sites, stored_weights(model, sites), strict=True):
        if weight is not None:
            if id(weight) not in rounded:
                own, native = stored_as(number_format, site.weight_dtype, f"the weights of layer {site.layer!r}")
                storage = Storage(own, _largest(weight), site.weights, weight.device, native=native)
                weight.data = storage.round(weight.data)
                rounded[id(weight)] = storage
            weights.append(rounded[id(weight)])
        elif target == "weight" and site.weights:
            raise InvalidParameter(f"layer {site.layer!r} computes its weights; those it reads are not the stored ones")
        elif target == "weight":
            raise InvalidParameter(f"layer {site.layer!r} has no weights; leave {site.kind} out of ", Setting("kinds"))
        if target == "weight" and not site.in_order:
            raise InvalidParameter(f"layer {site.layer!r} has its batch in dimension {site.dimension}: its weights are not hit")
        own, native = stored_as(number_format, site.dtype, f"the output of layer {site.layer!r}")
        # fp32 stores any magnitude. Other formats may need to know the largest one.
        limit = profiled.get(site.layer, 0.0 if number_format.name == "fp32" else None)
        if limit is None:
            raise InvalidParameter(f"layer {site.layer!r} has no profiled range; profile the model first (stage 'ranges')")
        outputs.append(Storage(own, limit, site.neurons, device, site, native))
    return (weights if target == "weight" else outputs), outputs


def round_call(number_format: Format, call: Call) -> Tensor:
    """The output of a call, repeated with its weights rounded. For weights that the model computes, which nothing stores."""
    weight = call.weight
    rounded = _weight_storage(number_format, weight).round(weight)
    args, kwargs = tree_map(lambda leaf: rounded if leaf is weight else leaf, (call.args, call.kwargs))
    return call.func(*args, **kwargs)


def round_others(
    model: nn.Module, sites: Sequence[Site], number_format: Format, readers: Mapping[str, Sequence[Any]]
) -> list[tuple[str, str]]:
    """Round the weights that are no site's, such as those of attention and recurrent layers, to a number format, in place.

    Biases and other vectors, such as the weights of normalisation, stay as they are.

    Parameters
    ----------
    model : nn.Module
        The model.
    sites : sequence of Site
        Its sites, whose own weights `make_storages` has rounded.
    number_format : Format
        The format.
    readers : mapping of str to sequence of callable
        As `weight_readers` returns it.

    Returns
    -------
    list of (str, str)
        The other parameters and buffers of at least two dimensions that an inference reads, and who reads them.
    """
    tensors = {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}
    done = {id(weight) for weight in stored_weights(model, sites) if weight is not None}
    without = computed_weights(model, sites)
    computed = [site.layer for site in sites if site.position in without]
    left = []
    for name in readers:
        tensor = tensors.get(name)
        if tensor is None or tensor.ndim < 2 or not tensor.is_floating_point() or id(tensor) in done:
            continue
        if any(_belongs(name, layer) for layer in computed):  # what is made of it is rounded, in `round_call`
            continue
        if name in matrices(readers):
            tensor.data.copy_(_weight_storage(number_format, tensor).round(tensor.data))
        else:
            left.append((name, f"read by {', '.join(dict.fromkeys(reader.__name__ for reader in readers[name]))}"))
    return left


def _belongs(name: str, layer: str) -> bool:
    """Whether a parameter is one of those that a site's weights are computed from."""
    owner = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
    layer = layer.partition("#")[0]
    return owner in (layer, layer.rpartition(".")[0])  # a site without stored weights may be named `LAYER.conv2d`


def _weight_storage(number_format: Format, weight: Tensor) -> Storage:
    return Storage(number_format, float(weight.detach().abs().max()), weight.numel(), weight.device)


def weight_limits(model: nn.Module, sites: Sequence[Site]) -> dict[str, float]:
    """The largest magnitude among each layer's weights, which is what a range detector for weights lets pass.

    Parameters
    ----------
    model : nn.Module
        The model.
    sites : sequence of Site
        Its sites.

    Returns
    -------
    dict of str to float
        Layer -> magnitude, for the sites with weights.
    """
    found = zip(sites, stored_weights(model, sites), strict=True)
    return {site.layer: _largest(weight) for site, weight in found if weight is not None}


def _largest(weight: Tensor) -> float:
    return float(weight.detach().double().abs().max())  # in int8, -128 has no magnitude
