"""Ways to carry persistent faults out: the whole model each time, what lies behind the fault, or an engine's neurons.

All of them look at one batch of images at a time, first without faults, and then with each of a block of faults.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from textguard.faults.damage import FaultModel, Faults
from textguard.faults.engines import Engine
from textguard.faults.graph import TracedModel, Values
from textguard.faults.local import ADDITIONS, ELEMENTWISE
from textguard.faults.suffix import shortcuts
from textguard.hardware.stored import tensors_of

MOST_VALUES = 1 << 24  # of changed channels that are held at a time
# Of the largest golden logit of an image: what adding up in another order changes in fp32. Logits that move less are masked.
ROUNDING = 2.0**-17
SPARE = 4.0  # how far below that a move has to be foreseen, since random sums may tell too little of it
# Of a value's largest number: smaller changes are foreseen. On ResNet-20 the DeltaLoss of a fault then errs by 1e-4 nats at
# most, and by 1.5 % where it is above 1e-5.
SMALL = 2.0**-8
FEW_CLASSES = 16  # whose gradients are all computed; of more, those of PROBES random sums are
PROBES = 8
MOST_PROBED = 1 << 27  # numbers that are kept of them: half a gigabyte
WORTH = 128  # faults from which on the gradients cost less than they save

_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# What changes a channel without a look at the others.
_BY_CHANNEL = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)


@dataclass(frozen=True)
class Block:
    """N persistent faults.

    tensor: int64 [N], which of the carrier's tensors, or sites, each fault is in. neuron, mask: int64 [N], the value and its
    damaged bits. golden, faulty: float [N], the stored value before and after; of neurons, these differ from image to image.
    """

    tensor: Tensor
    neuron: Tensor
    mask: Tensor
    golden: Tensor
    faulty: Tensor

    def of(self, rows: Tensor) -> "Block":
        """Some of the faults; rows: int64 [n]."""
        return Block(self.tensor[rows], self.neuron[rows], self.mask[rows], self.golden[rows], self.faulty[rows])


class Carrier(Protocol):
    """Carries faults out on a batch of images: `start` runs it without faults, and every `run` then means this batch."""

    def start(self, images: Tensor) -> Tensor:
        """images: [B, ...]. Returns the golden logits [B, C]."""
        ...

    def run(self, block: Block) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Carry the faults out on all images of the batch.

        Yields, piece by piece and in any order, pairs that may differ from the golden run: which fault and which image, int64
        [n], and the logits [n, C]. Pairs that are never yielded are masked.
        """
        ...


class WholeModel:
    """The loop that users write: the value is damaged in place, all images are run, and the value is put back."""

    def __init__(self, model: nn.Module, names: Sequence[str], batch_size: int) -> None:
        known = tensors_of(model)
        self._model, self._batch_size = model, batch_size
        self._tensors = [known[name] for name in names]

    @torch.inference_mode()
    def start(self, images: Tensor) -> Tensor:
        """See `Carrier.start`."""
        self._images = images
        return self._infer()

    @torch.inference_mode()
    def run(self, block: Block) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """See `Carrier.run`."""
        image = torch.arange(len(self._images), device=self._images.device)
        for number, tensor in enumerate(block.tensor.tolist()):
            with Damaged(self._tensors[tensor], block, number):
                yield torch.full_like(image, number), image, self._infer()

    def _infer(self) -> Tensor:
        return torch.cat([self._model(some.clone()) for some in self._images.split(self._batch_size)])


class Damaged:
    """A context in which one fault of a block has changed its tensor, in place. Afterwards it is as before, bit for bit."""

    def __init__(self, tensor: Tensor, block: Block, number: int) -> None:
        self._tensor, self._value = tensor.data, block.faulty[number]
        self._place = tuple(int(one) for one in torch.unravel_index(block.neuron[number], tensor.shape))

    def __enter__(self) -> None:
        self._kept = self._tensor[self._place].clone()
        self._tensor[self._place] = self._value.to(self._tensor.dtype)

    def __exit__(self, *_: object) -> None:
        self._tensor[self._place] = self._kept


class Neurons:
    """Faults that stay at a neuron: an engine carries each of them out on every image."""

    def __init__(self, engine: Engine, fault_model: FaultModel, limits: Tensor) -> None:
        """limits: float32 [sites], the largest magnitude that the range detector lets pass."""
        self._engine, self._model, self._limits = engine, fault_model, limits

    def start(self, images: Tensor) -> Tensor:
        """See `Carrier.start`."""
        self._images = images
        return self._engine.observe(images)

    @torch.inference_mode()
    def run(self, block: Block) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """See `Carrier.run`."""
        images, faults = len(self._images), len(block.neuron)
        fault = torch.arange(faults, device=block.neuron.device).repeat_interleave(images)
        image = torch.arange(images, device=fault.device).repeat(faults)
        position = block.tensor[fault]
        row = torch.arange(len(fault), device=fault.device)
        pairs = Faults(self._model, position, image, self._limits[position], row, block.neuron[fault], block.mask[fault])
        outcomes = self._engine.run(self._images, pairs)
        left = torch.where(~outcomes.masked)[0]
        if len(left):
            yield fault[left], image[left], outcomes.logits[left]


class Replay:
    """One golden run per batch of images; each fault computes its own channel, and all behind it.

    A fault in a convolution, a linear layer or a norm changes one channel of its output: by its change times one shifted
    channel of the input, by a constant, or by another factor and shift. Steps that look at each channel alone are followed for
    this channel only. Pairs of fault and image that are then bit-identical to the golden run end there, and so do those with a
    change so small that gradients tell what it does. For the others the golden values that the rest of the network reads are
    copied, `batch_size` pairs at a time, and the rest runs with the replay engine's shortcuts. A tensor with another reader, or
    several, is damaged in place, and all runs from its first reader on; one that the trace does not hold runs whole.

    Raises UnsupportedModel where the model cannot be traced.
    """

    def __init__(self, model: nn.Module, image: Tensor, names: Sequence[str], batch_size: int, faults: int) -> None:
        self._faults = faults
        with torch.inference_mode(False):
            for weight in model.parameters():
                if weight.ndim == 4:  # faster on CPUs and GPUs alike
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        self._traced, self._batch_size = TracedModel(model, image), batch_size
        for weight in self._traced.model.parameters():
            weight.requires_grad_(False)  # gradients are of activations
        floats = [tensor for tensor in tensors_of(self._traced.model).values() if tensor.is_floating_point()]
        # Shortcuts add up in another order, which shows where values have few digits.
        self._shortcuts = shortcuts(self._traced) if all(one.dtype == torch.float32 for one in floats) else {}
        self._whole = WholeModel(model, names, batch_size)
        known = tensors_of(self._traced.model)
        self._tensors = [known.get(name) for name in names]
        self._readers = [self._readers_of(tensor) for tensor in self._tensors]
        self._place = [self._place_of(*found) for found in zip(self._tensors, self._readers, strict=True)]

    def _readers_of(self, tensor: Tensor | None) -> list[int]:
        """The indices of the steps that read a tensor, themselves or in their module."""
        if tensor is None:
            return []

        def reads(step: fx.Node) -> bool:
            if step.op == "call_module":
                return any(one is tensor for one in tensors_of(self._traced.modules[step.target]).values())
            return step.op == "get_attr" and self._traced.call(step, (), {}) is tensor

        return [index for index, step in enumerate(self._traced.steps) if reads(step)]

    def _place_of(self, tensor: Tensor | None, readers: list[int]) -> str:
        """What a tensor is to the only step that reads it, if that is one whose channels are known; else nothing."""
        if len(readers) != 1:
            return ""
        step, traced = self._traced.steps[readers[0]], self._traced
        if step.op != "call_module" or not traced.is_plain(step) or not traced.batch_first(step):
            return ""
        module = traced.modules[step.target]
        names = [name for name, own in tensors_of(module).items() if own is tensor]
        plain = type(module) in (*_CONVOLUTIONS, nn.Linear, nn.LayerNorm, *_NORMS)
        if not plain or len(names) != 1 or "." in names[0]:
            return ""
        if (type(module) is nn.LayerNorm and len(module.normalized_shape) > 1) or (
            type(module) in _NORMS and module.running_mean is None
        ):
            return ""
        dimensions = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}.get(type(module))
        return names[0] if dimensions in (None, len(traced.shapes[step]) + 1) else ""

    @torch.inference_mode()
    def start(self, images: Tensor) -> Tensor:
        """See `Carrier.start`."""
        self._whole.start(images)
        self._count, self._probed = len(images), None
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        self._images = images
        self._golden = self._traced.inputs(images)
        for index, step in enumerate(self._traced.steps):
            if step not in self._golden:
                self._golden[step] = self._traced.run_step(index, self._golden)
        return self._golden[self._traced.steps[-1]]

    @torch.inference_mode()
    def run(self, block: Block) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """See `Carrier.run`."""
        for number in block.tensor.unique().tolist():
            rows = torch.where(block.tensor == number)[0]
            if self._place[number] and self._by_image(self._traced.steps[self._readers[number][0]]):
                yield from self._by_channel(number, block, rows)
            elif self._readers[number]:
                yield from self._from_reader(number, block, rows)
            else:
                for fault, image, logits in self._whole.run(block.of(rows)):
                    yield rows[fault], image, logits

    def _by_image(self, step: fx.Node) -> bool:
        """Whether a step's value has a row for each image, and no windows of images."""
        return self._traced.batch_first(step) and len(self._golden[step]) == self._count

    def _from_reader(self, number: int, block: Block, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """One fault after another, with the tensor damaged in place, from its first reader on."""
        traced, start = self._traced, self._readers[number][0]
        image = torch.arange(self._count, device=rows.device)
        for row in rows.tolist():
            with Damaged(self._tensors[number], block, row):
                values = {step: self._golden[step] for step in traced.live(self._golden, start)}
                # Without the constants behind `start`, which may be made of the tensor.
                for index, step in enumerate(traced.steps[start:], start):
                    values[step] = traced.run_step(index, values)
                    traced.release(index, values)
            yield torch.full_like(image, row), image, values[traced.steps[-1]]

    def _by_channel(self, number: int, block: Block, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Faults of one tensor that change one channel each."""
        index = self._readers[number][0]
        step = self._traced.steps[index]
        output, dim = self._golden[step], self._channels(step)
        size = max(1, MOST_VALUES * output.shape[dim] // output.numel())
        for some in rows.split(size):
            changed, channel = self._changed(number, index, block.of(some))
            yield from self._follow(index, changed, channel, dim, some)

    def _channels(self, step: fx.Node) -> int:
        """The dimension of the channels of what a module gives: the last one of features, the first behind images of maps."""
        features = isinstance(self._traced.modules[step.target], (nn.Linear, nn.LayerNorm))
        return self._golden[step].ndim - 1 if features else 1

    def _changed(self, number: int, index: int, block: Block) -> tuple[Tensor, Tensor]:
        """What N faults of a tensor make of their channels, in the place of all channels; and which ones, int64 [N]."""
        step, name, tensor = self._traced.steps[index], self._place[number], self._tensors[number]
        module, x, y = self._traced.modules[step.target], self._golden[step.args[0]], self._golden[step]
        places = torch.unravel_index(block.neuron, tensor.shape)
        channel, dim = places[0], self._channels(step)
        faulty = block.faulty.to(tensor.dtype)
        if isinstance(module, (nn.LayerNorm, *_NORMS)):
            own = {
                part: vector.index_select(0, channel)
                for part, vector in tensors_of(module).items()
                if vector.is_floating_point()
            }
            own[name] = faulty
            if isinstance(module, nn.LayerNorm):
                found = F.layer_norm(x, module.normalized_shape, None, None, module.eps).index_select(dim, channel)
                return found * own["weight"] + own.get("bias", 0), channel
            statistics = (own["running_mean"], own["running_var"], own.get("weight"), own.get("bias"))
            return F.batch_norm(x.index_select(dim, channel), *statistics, eps=module.eps), channel
        change = faulty - block.golden.to(tensor.dtype)
        golden = y.index_select(dim, channel)
        if name == "bias":
            return golden + (change if dim == y.ndim - 1 else change.view(-1, *[1] * (y.ndim - 2))), channel
        if isinstance(module, nn.Linear):
            return golden + x.index_select(x.ndim - 1, places[1]) * change, channel
        # Each fault is a group of its own, with one input channel and a kernel that holds its change alone.
        inputs = x.index_select(1, channel // (module.out_channels // module.groups) * tensor.shape[1] + places[1])
        kernel = torch.zeros(len(channel), 1, *tensor.shape[2:], dtype=tensor.dtype, device=tensor.device)
        kernel[(torch.arange(len(channel), device=tensor.device), 0, *places[2:])] = change
        padding = module.padding
        if module.padding_mode != "zeros":
            inputs = F.pad(inputs, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        convolve = _CONVOLUTIONS[type(module)]
        return golden + convolve(inputs, kernel, None, module.stride, padding, module.dilation, len(channel)), channel

    def _follow(
        self, index: int, changed: Tensor, channel: Tensor, dim: int, rows: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """From the faulty channels behind step `index` to the logits. dim: of channels. rows: int64 [N], the faults."""
        patches, start = self._chain(index, changed, channel, dim)
        left = self._differ(patches, channel, dim)
        if left.any():
            known, moves = self._foreseen(patches, channel, dim)
            image, fault = (left & known).nonzero().unbind(1)
            if moves is not None and len(image):
                yield rows[fault], image, self._golden[self._traced.steps[-1]][image] + moves[image, fault]
            left &= ~known
        for some in left.nonzero().split(self._batch_size) if left.any() else ():
            image, fault = some.unbind(1)
            logits = self._finish(self._copies(patches, channel, dim, image, fault, start), start)
            yield rows[fault], image, logits

    def _chain(self, index: int, changed: Tensor, channel: Tensor, dim: int) -> tuple[Values, int]:
        """Follow faulty channels as far as each is looked at alone.

        Returns those that later steps read, and the index of the first step that looks at other channels too.
        """
        traced = self._traced
        patches, start = {traced.steps[index]: changed}, index + 1
        for start in range(index + 1, len(traced.steps)):
            step = traced.steps[start]
            if any(source in patches for source in step.all_input_nodes):
                value = self._step(step, patches, channel, dim)
                if value is None:
                    break
                patches[step] = value
        return {step: value for step, value in patches.items() if traced.last_reader.get(step, -1) >= start}, start

    def _foreseen(self, patches: Values, channel: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
        """The pairs of image and fault, bool [B, N], whose logits gradients tell; and by what these move, [B, N, C].

        Small changes of a step's value move the logits in proportion to them, so that no inference is needed. Of many classes,
        random sums tell only which logits move by less than rounding: these are masked, and None stands for their moves. Where
        several changed values are read later, gradients do not tell.
        """
        found = torch.zeros(self._count, len(channel), dtype=torch.bool, device=channel.device)
        if self._probed is None:
            self._probed = self._probe()
        gradients = self._probed.gradients
        if len(patches) > 1 or not gradients.keys() >= patches.keys():
            return found, None
        ((step, value),) = patches.items()
        golden = self._golden[step]
        change = _by_fault(value - golden.index_select(dim, channel), dim)
        small = change.abs().amax(dim=2) <= SMALL * golden.flatten(1).abs().amax(dim=1, keepdim=True)  # not where NaN
        moves = change.new_zeros(self._count, len(channel), gradients[step].shape[2])
        for fault in torch.where(small.any(dim=0))[0].tolist():
            moves[:, fault] = torch.bmm(gradients[step][channel[fault]], change[:, fault, :, None])[:, :, 0]
        if self._probed.exact:
            return small, moves
        return small & (SPARE * moves.norm(dim=2) <= self._probed.bound[:, None]), None

    @torch.inference_mode(False)
    def _probe(self) -> "_Probed":
        """Gradients at the ends of all chains, where that is worth it."""
        traced, logits = self._traced, self._golden[self._traced.steps[-1]]
        bound = ROUNDING * logits.reshape(len(logits), -1).abs().amax(dim=1).clone()
        if self._faults < WORTH or not self._shortcuts or logits.ndim != 2 or not self._images.is_floating_point():
            return _Probed({}, bound, True)
        classes, draw = logits.shape[1], torch.Generator().manual_seed(0)
        exact = classes <= FEW_CLASSES
        probes = torch.eye(classes) if exact else torch.randn(PROBES, classes, generator=draw) / PROBES**0.5
        ends: dict[fx.Node, int] = {}
        room = MOST_PROBED
        for index in sorted({readers[0] for readers, place in zip(self._readers, self._place, strict=True) if place}):
            value = self._golden[traced.steps[index]]
            dim, first = self._channels(traced.steps[index]), torch.zeros(1, dtype=torch.int64, device=logits.device)
            patches, _ = self._chain(index, value.index_select(dim, first), first, dim)
            for step in patches if len(patches) == 1 else ():
                numbers = self._golden[step].numel() * len(probes)
                if step not in ends and numbers <= room:
                    room -= numbers
                    ends[step] = dim
        # By channel, so that those of one are in one place: [channels, B, probes, -1].
        found = {
            step: torch.empty(
                value.shape[dim], len(value), len(probes), value[0].numel() // value.shape[dim], device=value.device
            )
            for step, dim in ends.items()
            for value in [self._golden[step]]
        }
        with torch.enable_grad():
            values = traced.inputs(self._images.clone().requires_grad_())
            for index, step in enumerate(traced.steps):
                if step not in values:
                    values[step] = traced.run_step(index, values)
            wanted, result = [values[step] for step in ends], values[traced.steps[-1]]
            for number, probe in enumerate(probes.to(logits.device)):
                towards = probe.expand_as(logits)
                gradients = torch.autograd.grad(result, wanted, towards, retain_graph=True, allow_unused=True)
                for (step, dim), gradient in zip(ends.items(), gradients, strict=True):
                    if gradient is None:
                        found.pop(step, None)
                    else:
                        found[step][:, :, number] = _by_fault(gradient, dim).transpose(0, 1)
        return _Probed(found, bound, exact)

    def _differ(self, patches: Values, channel: Tensor, dim: int) -> Tensor:
        """The pairs of image and fault, bool [B, N], in which something that is still read differs in any bit."""
        found = torch.zeros(self._count, len(channel), dtype=torch.bool, device=channel.device)
        for step, value in patches.items():
            twin = self._golden[step].index_select(dim, channel)
            same = _bits(value.contiguous()) == _bits(twin.contiguous())
            found |= ~_by_fault(same, dim).all(dim=2)
        return found

    def _step(self, step: fx.Node, patches: Values, channel: Tensor, dim: int) -> Tensor | None:
        """What a step makes of the faulty channels alone; None where it looks at others too."""
        traced, golden = self._traced, self._golden[step]
        if not isinstance(golden, Tensor) or golden.ndim < 2 or not self._by_image(step):
            return None
        operation = traced.operation(step)
        if operation in ADDITIONS:
            parts = [arg for arg in step.args if isinstance(arg, fx.Node) and traced.depends_on_images(arg)]
            if step.kwargs or len(step.args) != 2 or len(parts) != 2:
                return None
            if any(self._golden[arg].shape != golden.shape or not self._by_image(arg) for arg in parts):
                return None
            sides = (patches[arg] if arg in patches else self._golden[arg].index_select(dim, channel) for arg in parts)
            return operator.add(*sides)
        if not traced.is_plain(step):
            return None
        value, source = patches[step.args[0]], self._golden[step.args[0]]
        if operation in ELEMENTWISE and golden.shape == source.shape:
            return traced.call(step, (value, *step.args[1:]), step.kwargs)
        if operation in _BY_CHANNEL and golden.ndim == 4 and dim == 1 and golden.shape[1] == source.shape[1]:
            found = traced.call(step, (value, *step.args[1:]), step.kwargs)
            return found if isinstance(found, Tensor) else None
        if operation in _NORMS and dim == 1 and traced.modules[step.target].running_mean is not None:
            norm = traced.modules[step.target]
            vectors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            own = (vector if vector is None else vector.index_select(0, channel) for vector in vectors)
            return F.batch_norm(value, *own, eps=norm.eps)
        return None

    def _copies(self, patches: Values, channel: Tensor, dim: int, image: Tensor, fault: Tensor, start: int) -> Values:
        """What the steps from `start` on read, for pairs of image and fault."""
        values: dict[fx.Node, Any] = {}
        pair = torch.arange(len(image), device=image.device)
        for step in self._traced.live(self._golden, start):
            values[step] = self._traced.select(step, self._golden[step], image)
            if step in patches:
                patch = patches[step]
                values[step].movedim(dim, 1)[pair, channel[fault]] = patch.movedim(dim, 1)[image, fault]
        return values

    def _finish(self, values: Values, start: int) -> Tensor:
        """Run from step `start` to the logits."""
        traced = self._traced
        values = traced.constants | values
        for index, step in enumerate(traced.steps[start:], start):
            if step not in values:
                end, run = self._shortcuts.get(step, (step, None))
                values[end] = run(values[step.args[0]]) if run else traced.run_step(index, values)
            traced.release(index, values)
        return values[traced.steps[-1]]


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Probed:
    """What moves the logits of a batch of images.

    gradients: step -> float32 [channels, B, K, -1], of each class's logit, or of K random sums of many, scaled so that the
    length of what moves them is that of what moves the logits. bound: float32 [B], the largest move that is masked.
    exact: whether they are those of each class.
    """

    gradients: dict[fx.Node, Tensor]
    bound: Tensor
    exact: bool


def _by_fault(value: Tensor, dim: int) -> Tensor:
    """Faulty channels, which lie in dimension `dim`, as [B, N, -1]."""
    return value.movedim(dim, 1).reshape(len(value), value.shape[dim], -1)


def _bits(value: Tensor) -> Tensor:
    return value.view(_INTEGERS[value.element_size()])
