"""Faults that have not spread yet: compute only what they change, and take the rest from the golden run.

A flipped neuron is a point: one channel of one pixel. Elementwise steps keep it a point, the next convolution or linear layer
adds its change times one slice of the weights to the golden output, and from there on the changed window grows with every
kernel. This is incremental inference as in Nakandala et al. (Krypton), SIGMOD 2019, started from a single value.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from textguard.faults.detectors import Bound
from textguard.faults.graph import ACTIVATIONS, TracedModel, Values

# Recomputing a window costs more per value than a whole map does: gathering it, and small convolutions.
LARGEST_SHARE = 0.4

ELEMENTWISE = (*ACTIVATIONS, nn.Dropout, nn.Dropout2d, nn.Identity, Bound)
# Behind these a fault may have left no trace: they send different inputs to the same output.
MASKING = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.MaxPool2d, Bound)
MASKING += (torch.relu, "relu", F.relu, F.relu6, F.hardtanh, F.hardswish, F.max_pool2d)
ADDITIONS = (operator.add, torch.add)
PRODUCTS = (operator.mul, torch.mul)


@dataclass(frozen=True)
class Patch:
    """The part of a step's value in which N faulty runs may differ from the golden one.

    values: [N, h, w, c], channels last. top, left: int64 [N], its first row and column in the map. channel: int64 [N] where it
    is of one channel (c = 1), None where it is of all. A value [B, F] without height and width counts as a map [B, F, 1, 1].
    """

    values: Tensor
    top: Tensor
    left: Tensor
    channel: Tensor | None

    @property
    def is_point(self) -> bool:
        """Whether it is of a single channel."""
        return self.channel is not None

    def of(self, rows: Tensor) -> "Patch":
        """The patch of some of the N faults."""
        channel = self.channel[rows] if self.channel is not None else None
        return Patch(self.values[rows], self.top[rows], self.left[rows], channel)


def as_map(value: Tensor) -> Tensor:
    """The value as a map, [B, C, H, W]."""
    return value[:, :, None, None] if value.ndim == 2 else value


def point(shape: tuple[int, ...], neuron: Tensor, values: Tensor) -> Patch:
    """The patch of single values [N] at places `neuron` [N] of maps with `shape` (C, H, W) or (F,)."""
    channel, top, left = torch.unravel_index(neuron, (*shape, 1, 1)[:3])
    return Patch(values.reshape(-1, 1, 1, 1), top, left, channel)


def read(golden: Tensor, image: Tensor, patch: Patch, outside: float = 0.0) -> Tensor:
    """The golden values of a patch's place, like its values; `outside` where it reaches beyond the map.

    golden: [B, C, H, W]; image: each fault's place in the batch, int64 [N].
    """
    _, _, height, width = golden.shape
    rows = patch.top[:, None] + torch.arange(patch.values.shape[1], device=image.device)
    columns = patch.left[:, None] + torch.arange(patch.values.shape[2], device=image.device)
    beyond = ((rows < 0) | (rows >= height))[:, :, None] | ((columns < 0) | (columns >= width))[:, None, :]
    rows, columns = rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    image = image[:, None, None]
    if patch.channel is not None:
        found = golden[image, patch.channel[:, None, None], rows, columns][..., None]
    else:
        found = golden.permute(0, 2, 3, 1)[image, rows, columns]
    return found.masked_fill_(beyond[..., None], outside) if beyond.any() else found


def paste(target: Patch, patch: Patch) -> None:
    """Write the values of a patch into those of another one, in place, where it holds their place."""
    height, width = target.values.shape[1:3]
    rows = (patch.top - target.top)[:, None] + torch.arange(patch.values.shape[1], device=patch.top.device)
    columns = (patch.left - target.left)[:, None] + torch.arange(patch.values.shape[2], device=patch.top.device)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    n, i, j = inside.nonzero(as_tuple=True)
    place = (n, rows[n, i], columns[n, j])
    if patch.is_point and not target.is_point:
        target.values[(*place, patch.channel[n])] = patch.values[n, i, j, 0]
    else:
        target.values[place] = patch.values[n, i, j]


def whole(patch: Patch, golden: Tensor, select: Callable[[], Tensor]) -> Tensor:
    """The whole values of N faulty runs, [N, ...]. golden: [B, ...]; select: gives a copy of it for the N images."""
    shape = as_map(golden).shape[1:]
    if patch.values.shape[1:] == (*shape[1:], shape[0]):
        return patch.values.permute(0, 3, 1, 2).reshape(-1, *golden.shape[1:])
    values, zero = select(), torch.zeros_like(patch.top)
    paste(Patch(as_map(values).permute(0, 2, 3, 1), zero, zero, None), patch)
    return values


class LocalSteps:
    """Carries patches through the steps of a traced model, where that is possible and pays."""

    def __init__(self, traced: TracedModel) -> None:
        self._traced = traced
        self._weights: dict[fx.Node, Tensor] = {}

    def masks(self, step: fx.Node) -> bool:
        """Whether a fault may leave no trace behind this step."""
        return self._traced.operation(step) in MASKING

    def spreads(self, step: fx.Node) -> bool:
        """Whether points leave this step as patches of all channels."""
        return self._traced.operation(step) in (nn.Conv2d, nn.Linear)

    def run(self, step: fx.Node, patches: dict[fx.Node, Patch], golden: Values, image: Tensor) -> Patch | None:
        """The patch of a step's value from those of its inputs, or None where the whole value has to be computed.

        golden: values of the golden run for the step and its inputs; image: int64 [N], each fault's place in their batch.
        """
        if not isinstance(golden[step], Tensor) or golden[step].ndim not in (2, 4):
            return None
        operation = self._traced.operation(step)
        changed = [read for read in step.all_input_nodes if read in patches]
        if operation in ADDITIONS:
            return self._add(step, patches, golden, image)
        if len(changed) > 1 or golden[changed[0]].ndim not in (2, 4):
            return None
        patch, source = patches[changed[0]], as_map(golden[changed[0]])
        if operation in ELEMENTWISE:
            return replace(patch, values=self._call(step, patch.values))
        if operation in PRODUCTS:
            return self._scale(step, patch, golden)
        rules: dict[object, Callable[..., Patch | None]] = {
            nn.BatchNorm2d: self._normalise,
            nn.Conv2d: self._convolve,
            nn.Linear: self._multiply,
            nn.MaxPool2d: self._pool,
            nn.Flatten: self._flatten,
            torch.flatten: self._flatten,
        }
        return rules[operation](step, patch, source, as_map(golden[step]), image) if operation in rules else None

    def _call(self, step: fx.Node, values: Tensor) -> Tensor:
        if step.op == "call_module":
            return self._traced.modules[step.target](values)
        if step.op == "call_method":
            return getattr(values, step.target)(*step.args[1:], **step.kwargs)
        return step.target(values, *step.args[1:], **step.kwargs)

    def _scale(self, step: fx.Node, patch: Patch, golden: Values) -> Patch | None:
        """A product with one number for all images, as the scale of the text-guided head's logits."""
        factors = [golden[arg] if isinstance(arg, fx.Node) else arg for arg in step.args]
        own = next(place for place, arg in enumerate(step.args) if isinstance(arg, fx.Node) and self._is_batch(arg))
        factor = factors[1 - own]
        if isinstance(factor, Tensor) and (factor.numel() > 1 or self._is_batch(step.args[1 - own])):
            return None
        return replace(patch, values=patch.values * factor)

    def _is_batch(self, step: object) -> bool:
        return isinstance(step, fx.Node) and self._traced.depends_on_images(step)

    def _add(self, step: fx.Node, patches: dict[fx.Node, Patch], golden: Values, image: Tensor) -> Patch | None:
        if step.kwargs or not all(self._is_batch(arg) and golden[arg].shape == golden[step].shape for arg in step.args):
            return None
        parts = [patches[arg] for arg in step.args if arg in patches]
        if (len(parts) > 1 and all(part.is_point for part in parts) and _same_place(*parts)) or len(parts) == 1:
            box = parts[0]
        else:
            box = _around(parts, golden[step])
        first, second = (self._side(golden[arg], patches.get(arg), box, image) for arg in step.args)
        return replace(box, values=first + second)

    @staticmethod
    def _side(golden: Tensor, patch: Patch | None, box: Patch, image: Tensor) -> Tensor:
        """One operand of an addition, in the place of `box`."""
        if patch is box:
            return patch.values
        side = replace(box, values=read(as_map(golden), image, box))
        if patch:
            paste(side, patch)
        return side.values

    def _normalise(self, step: fx.Node, patch: Patch, source: Tensor, target: Tensor, image: Tensor) -> Patch | None:
        norm = self._traced.modules[step.target]
        if norm.running_mean is None:
            return None
        factor = torch.rsqrt(norm.running_var + norm.eps)
        if norm.affine:
            factor = factor * norm.weight
        shift = (norm.bias if norm.affine else 0) - norm.running_mean * factor
        if patch.is_point:
            factor, shift = (vector[patch.channel][:, None, None, None] for vector in (factor, shift))
        return replace(patch, values=patch.values * factor + shift)

    def _multiply(self, step: fx.Node, patch: Patch, source: Tensor, target: Tensor, image: Tensor) -> Patch | None:
        """Linear: one changed input adds its change times one column of the weights."""
        if not patch.is_point or source.shape[2:] != (1, 1):
            return None
        if step not in self._weights:
            self._weights[step] = self._traced.modules[step.target].weight.detach().t().contiguous()
        change = patch.values[:, 0, 0] - read(source, image, patch)[:, 0, 0]
        values = target[image][:, None, None, :, 0, 0] + (change * self._weights[step][patch.channel])[:, None, None]
        return Patch(values, patch.top, patch.left, None)

    def _convolve(self, step: fx.Node, patch: Patch, source: Tensor, target: Tensor, image: Tensor) -> Patch | None:
        conv = self._traced.modules[step.target]
        depthwise = conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or (conv.groups > 1 and not depthwise):
            return None
        sides = [
            _reach(start, patch.values.shape[1 + axis], target.shape[2 + axis], conv, axis)
            for axis, start in enumerate((patch.top, patch.left))
        ]
        (top, rows), (left, columns) = sides
        if not patch.is_point and rows * columns > LARGEST_SHARE * target.shape[2] * target.shape[3]:
            return None
        # What the window of the output is made from, in a map that may reach into the padding.
        inputs = Patch(
            patch.values.new_zeros(
                len(image),
                *(
                    (size - 1) * conv.stride[a] + (conv.kernel_size[a] - 1) * conv.dilation[a] + 1
                    for a, size in enumerate((rows, columns))
                ),
                1 if patch.is_point else source.shape[1],
            ),
            top * conv.stride[0] - conv.padding[0],
            left * conv.stride[1] - conv.padding[1],
            patch.channel,
        )
        output = Patch(patch.values.new_empty(1, rows, columns, 1), top, left, patch.channel if depthwise else None)
        if not patch.is_point:
            inputs = replace(inputs, values=read(source, image, inputs))
            paste(inputs, patch)
            values = F.conv2d(
                inputs.values.permute(0, 3, 1, 2), conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups
            )
            return replace(output, values=values.permute(0, 2, 3, 1))
        paste(inputs, replace(patch, values=patch.values - read(source, image, patch)))
        changes = F.unfold(inputs.values.permute(0, 3, 1, 2), conv.kernel_size, conv.dilation, 0, conv.stride)
        if step not in self._weights:  # [input channel, kernel, output channel]
            self._weights[step] = (
                conv.weight.detach().flatten(2).permute(0 if depthwise else 1, 2, 1 if depthwise else 0).contiguous()
            )
        change = torch.bmm(changes.transpose(1, 2), self._weights[step][patch.channel])
        golden = read(target, image, output)
        return replace(output, values=golden + change.unflatten(1, (rows, columns)))

    def _pool(self, step: fx.Node, patch: Patch, source: Tensor, target: Tensor, image: Tensor) -> Patch | None:
        pool = self._traced.modules[step.target]
        if pool.ceil_mode or pool.return_indices:
            return None
        window = _Window(pool)
        top, rows = _reach(patch.top, patch.values.shape[1], target.shape[2], window, 0)
        left, columns = _reach(patch.left, patch.values.shape[2], target.shape[3], window, 1)
        size = [
            (count - 1) * window.stride[axis] + (window.kernel_size[axis] - 1) * window.dilation[axis] + 1
            for axis, count in enumerate((rows, columns))
        ]
        inputs = Patch(
            patch.values.new_empty(1, *size, 1),
            top * window.stride[0] - window.padding[0],
            left * window.stride[1] - window.padding[1],
            patch.channel,
        )
        inputs = replace(inputs, values=read(source, image, inputs, outside=-torch.inf))
        paste(inputs, patch)
        values = F.max_pool2d(inputs.values.permute(0, 3, 1, 2), window.kernel_size, window.stride, 0, window.dilation)
        return Patch(values.permute(0, 2, 3, 1), top, left, patch.channel)

    def _flatten(self, step: fx.Node, patch: Patch, source: Tensor, target: Tensor, image: Tensor) -> Patch | None:
        if not patch.is_point or target.shape[2:] != (1, 1) or patch.values.shape[1:3] != (1, 1):
            return None
        _, _, height, width = source.shape
        zero = torch.zeros_like(patch.top)
        return Patch(patch.values, zero, zero, (patch.channel * height + patch.top) * width + patch.left)


class _Window:
    """A pooling layer's numbers as pairs, as a convolution has them."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        pairs = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        self.kernel_size, self.stride, self.padding, self.dilation = ((p, p) if isinstance(p, int) else p for p in pairs)


def _reach(start: Tensor, size: int, target: int, window: nn.Conv2d | _Window, axis: int) -> tuple[Tensor, int]:
    """Along one axis: the first output that sees any of `size` inputs from `start`, and how many outputs to compute.

    The same number for all faults; outputs beside the affected ones are computed with them, where a map's border is near.
    """
    stride, padding = window.stride[axis], window.padding[axis]
    kernel = (window.kernel_size[axis] - 1) * window.dilation[axis] + 1
    count = min((size + kernel - 2) // stride + 1, target)
    first = torch.div(start + padding - kernel + stride, stride, rounding_mode="floor")  # rounded up to a whole output
    return first.clamp(0, target - count), count


def _same_place(a: Patch, b: Patch) -> bool:
    return a.values.shape == b.values.shape and all(
        torch.equal(x, y) for x, y in ((a.top, b.top), (a.left, b.left), (a.channel, b.channel))
    )


def _around(parts: list[Patch], golden: Tensor) -> Patch:
    """A patch of all channels, its values not yet read, that holds all the parts."""
    height, width = as_map(golden).shape[2:]
    top = torch.stack([part.top for part in parts]).amin(dim=0)
    left = torch.stack([part.left for part in parts]).amin(dim=0)
    bottom = torch.stack([part.top + part.values.shape[1] for part in parts]).amax(dim=0)
    right = torch.stack([part.left + part.values.shape[2] for part in parts]).amax(dim=0)
    rows, columns = int((bottom - top).max()), int((right - left).max())
    values = parts[0].values.new_empty(1, rows, columns, 1)
    return Patch(values, top.clamp(max=height - rows), left.clamp(max=width - columns), None)
