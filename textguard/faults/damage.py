"""What faults do to stored values: which codes change, what they decode to, and what the range detector makes of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from textguard.errors import InvalidParameter, Setting
from textguard.faults.detectors import clamp_to_range
from textguard.faults.formats import Format
from textguard.faults.sites import Call, Site

Target = Literal["neuron", "weight", "metadata"]
Operation = Literal["flip", "stuck_at_0", "stuck_at_1"]


@dataclass(frozen=True)
class FaultModel:
    """What one injection is. It lasts for one inference on one image.

    target: a neuron (one value of a layer's output), a weight, or the metadata that the values of a block share (in formats
    that have it). operation: what happens to the bits. bits: how many different ones of a value. values: how many different
    neurons, weights or blocks of one layer.
    """

    target: Target = "neuron"
    operation: Operation = "flip"
    bits: int = 1
    values: int = 1


SINGLE_FLIP = FaultModel()


@dataclass(frozen=True)
class Faults:
    """N faults on a batch of images, which damage M >= N stored values.

    position: of the site; image: position in the batch; int64 [N]. limit: float32 [N], what the range detector lets pass.
    row: which fault damages the value, ascending; neuron: its place in one image's flattened output (in the flattened weights;
    among the blocks); mask: its damaged bits; int64 [M].
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
        """The faults `rows` (int64, ascending), and which of the M values are theirs."""
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
    """M damaged values: golden and faulty [M], before and after (behind the range detector; of metadata, the codes themselves);
    detected [M]. What has to be written for them: `written` [K] to place `neuron` [K] of fault `row` [K].
    """

    golden: Tensor
    faulty: Tensor
    detected: Tensor
    row: Tensor
    neuron: Tensor
    written: Tensor


class Storage:
    """How one layer's values are stored: a number format, and the largest magnitude that the layer was profiled to have."""

    def __init__(self, number_format: Format, limit: float, size: int, device: torch.device) -> None:
        self.format, self.size = number_format, size
        self.limit = torch.tensor(limit, dtype=torch.float32, device=device)

    def round(self, values: Tensor) -> Tensor:
        """What is left of values [B * size values in any shape] when they are stored, B images or one weight."""
        return self.format.round(values.reshape(-1, self.size), self.limit).reshape(values.shape)

    def damage(self, faults: Faults, read: Callable[[Tensor, Tensor], Tensor]) -> Damage:
        """Damage the values that `faults` name. read(row, neuron) returns golden values, as stored, float32 of neuron's
        shape.
        """
        model, row, neuron = faults.model, faults.row, faults.neuron
        if not self.format.shared_bits:
            golden = read(row, neuron)
            return self._damage_values(faults, golden, torch.zeros_like(neuron))
        if not self.format.block and model.target != "metadata":  # the layer's limit is all that its metadata needs
            golden = read(row, neuron)
            return self._damage_values(faults, golden, self.format.shared(golden[:, None], self.limit))
        block = self.format.block or self.size
        number = neuron if model.target == "metadata" else neuron // block
        places = number[:, None] * block + torch.arange(block, device=row.device)
        inside = places < self.size
        golden = read(row[:, None].expand_as(places), places.clamp(max=self.size - 1)) * inside
        shared = self.format.shared(golden, self.limit)
        if model.target != "metadata":
            return self._damage_values(faults, golden.gather(1, (neuron % block)[:, None])[:, 0], shared)
        damaged = operate(shared, faults.mask, model.operation)
        codes = self.format.encode(golden, self.limit, shared[:, None])
        values = self.format.decode(codes, self.limit, damaged[:, None])
        written, detected = clamp_to_range(values, faults.limit[row][:, None])
        each = row[:, None].expand_as(places)[inside]
        return Damage(shared.float(), damaged.float(), (detected & inside).any(dim=1), each, places[inside], written[inside])

    def _damage_values(self, faults: Faults, golden: Tensor, shared: Tensor) -> Damage:
        codes = operate(self.format.encode(golden, self.limit, shared), faults.mask, faults.model.operation)
        faulty, detected = clamp_to_range(self.format.decode(codes, self.limit, shared), faults.limit[faults.row])
        return Damage(golden, faulty, detected, faults.row, faults.neuron, faulty)


def operate(codes: Tensor, mask: Tensor, operation: Operation) -> Tensor:
    """Flip, clear or set the bits of `mask` in each code; int64 [M]."""
    if operation == "flip":
        return codes ^ mask
    return codes | mask if operation == "stuck_at_1" else codes & ~mask


def damage_output(storage: Storage, output: Tensor, faults: Faults) -> Damage:
    """Damage a layer's output for N images, one per fault, in place. output: [N * rows, ...], as stored."""
    share = output if len(output) == len(faults.position) else output.unflatten(0, (len(faults.position), -1))

    def read(row: Tensor, neuron: Tensor) -> Tensor:
        return share[(row, *torch.unravel_index(neuron, share.shape[1:]))]

    damage = storage.damage(faults, read)
    share[(damage.row, *torch.unravel_index(damage.neuron, share.shape[1:]))] = damage.written
    return damage


def damage_weights(storage: Storage, call: Call, faults: Faults) -> tuple[Damage, Tensor]:
    """Repeat a call, for N images in its input, each with the weights as its fault leaves them.

    Returns the damage and the output. The weights are changed in place, one fault at a time, and restored bit for bit.
    """
    weight = call.weight
    damage = storage.damage(faults, lambda row, neuron: weight[torch.unravel_index(neuron, weight.shape)])
    output = call.output.clone()
    inputs, outputs = (tensor.unflatten(0, (len(faults.position), -1)) for tensor in (call.args[0], output))
    for number in range(len(faults.position)):
        here = damage.row == number
        places = torch.unravel_index(damage.neuron[here], weight.shape)
        kept = weight[places]
        try:
            weight[places] = damage.written[here]
            outputs[number] = call.func(inputs[number], *call.args[1:], **call.kwargs)
        finally:
            weight[places] = kept
    return damage, output


def make_storages(
    model: nn.Module, sites: Sequence[Site], number_format: Format, profiled: Mapping[str, float], target: Target
) -> tuple[list[Storage], list[Storage]]:
    """One Storage per site for what the faults hit, and one for its output. Rounds the model's weights to the format, in place.

    profiled: layer -> largest magnitude of its output. Raises InvalidParameter where the format or the target does not fit.
    """
    if target == "metadata" and not number_format.shared_bits:
        raise InvalidParameter(f"format {number_format.name} has no metadata; change ", Setting("fault_model.target"))
    parameters = dict(model.named_parameters())
    outputs, weights = [], []
    for site in sites:
        # fp32 stores any magnitude; other formats may need to know the largest.
        limit = profiled.get(site.layer, 0.0 if number_format.name == "fp32" else None)
        if limit is None:
            raise InvalidParameter(f"layer {site.layer!r} has no profiled range; profile the model first (stage 'ranges')")
        weight = parameters.get(site.parameter) if site.weights else None
        if weight is not None:
            storage = Storage(number_format, float(weight.detach().abs().max()), site.weights, weight.device)
            if number_format.name != "fp32":
                weight.data = storage.round(weight.data)
            weights.append(storage)
        elif target == "weight":
            raise InvalidParameter(f"layer {site.layer!r} has no weights; leave {site.kind} out of ", Setting("kinds"))
        outputs.append(Storage(number_format, limit, site.neurons, next(model.parameters()).device))
    return (weights if target == "weight" else outputs), outputs


def weight_limits(model: nn.Module, sites: Sequence[Site]) -> dict[str, float]:
    """The largest magnitude among each layer's weights: what a range detector for weights lets pass."""
    parameters = dict(model.named_parameters())
    return {
        site.layer: float(parameters[site.parameter].detach().abs().max()) for site in sites if site.parameter in parameters
    }
