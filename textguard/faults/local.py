"""Faults that have not spread yet: compute only what they change, and take the rest from the golden run.

A flipped neuron is one channel of one pixel. Elementwise steps change no other pixel and no other channel. The next convolution
or linear layer adds the neuron's change times one slice of its weights to the golden output. From there on, the changed window
grows with every kernel.

A region of values, such as a channel or a row of it, starts as a window of its own.

This is incremental inference as in Nakandala et al. (Krypton), SIGMOD 2019, started from a single value.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from textguard.faults.detectors import Bound, ChannelBound
from textguard.faults.graph import ACTIVATIONS, TracedModel, Values
from textguard.faults.patterns import Window

# The largest share of a map that is still recomputed as a window. A window costs more per value than a whole map, because it
# has to be gathered and because its convolutions are small.
LARGEST_SHARE = 0.4

ELEMENTWISE = (*ACTIVATIONS, nn.Dropout, nn.Dropout2d, nn.Identity, Bound)
# Behind these a fault may have left no trace, because they send different inputs to the same output.
MASKING = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.MaxPool2d, Bound, ChannelBound)
MASKING += (torch.relu, "relu", F.relu, F.relu6, F.hardtanh, F.hardswish, F.max_pool2d)
ADDITIONS = (operator.add, torch.add)
PRODUCTS = (operator.mul, torch.mul)


@dataclass(frozen=True)
class Patch:
    """The window of a step's value in which N faulty runs may differ from the golden one.

    A value [B, F] without height and width counts as a map [B, F, 1, 1].

    Attributes
    ----------
    values : Tensor
        float32 [N, h, w, c], channels last. A prediction has c variants of a single channel instead.
    top, left : Tensor
        int64 [N], the window's first row and first column in the map.
    channel : Tensor or None
        int64 [N], the channel of a patch of a single one (c = 1). None for a patch of all channels.
    """

    values: Tensor
    top: Tensor
    left: Tensor
    channel: Tensor | None

    @property
    def one_channel(self) -> bool:
        """Whether it is of a single channel."""
        return self.channel is not None

    def of(self, rows: Tensor) -> "Patch":
        """The patch of some of the N faults; rows: int64 [n]."""
        channel = self.channel[rows] if self.channel is not None else None
        return Patch(self.values[rows], self.top[rows], self.left[rows], channel)


def as_map(value: Tensor) -> Tensor:
    """The value as a map [B, C, H, W]; where it is none, each of its numbers is a channel of its own: [B, F, 1, 1]."""
    if value.ndim == 4:
        return value
    return (value.flatten(1) if value.ndim > 1 else value[:, None])[:, :, None, None]


def neuron_patch(shape: tuple[int, ...], neuron: Tensor, values: Tensor) -> Patch:
    """The patch of single neurons.

    Parameters
    ----------
    shape : tuple of int
        (C, H, W) or (F,), one image's share of the layer's output.
    neuron : Tensor
        int64 [N], indices into the flattened output.
    values : Tensor
        float32 [N], the neurons' faulty values; [N, V] for V variants of each.

    Returns
    -------
    Patch
        Of one channel and one pixel.

    Examples
    --------
    >>> import torch
    >>> from textguard.faults.local import neuron_patch
    >>> patch = neuron_patch((2, 3, 4), torch.tensor([23]), torch.tensor([0.5]))
    >>> patch.channel.item(), patch.top.item(), patch.left.item()
    (1, 2, 3)
    """
    channel, top, left = torch.unravel_index(neuron, (*shape, 1, 1)[:3])
    return Patch(values.reshape(len(neuron), 1, 1, -1), top, left, channel)


def region_patch(golden: Tensor, image: Tensor, row: Tensor, neuron: Tensor, values: Tensor, window: Window) -> Patch:
    """The patch of N regions of a map, each with the golden values round it.

    Parameters
    ----------
    golden : Tensor
        float32 [B, C, H, W], or [B, F].
    image : Tensor
        int64 [N], the index of each fault's image in the batch.
    row, neuron : Tensor
        int64 [M]: which of the N faults damages a value, and its index in one image's flattened output.
    values : Tensor
        float32 [M], the faulty values.
    window : Window
        Of the regions.

    Returns
    -------
    Patch
        Of one channel where the regions are; else of all.

    Examples
    --------
    >>> import torch
    >>> from textguard.faults.local import region_patch
    >>> from textguard.faults.patterns import Window
    >>> golden, one = torch.zeros(1, 2, 3, 3), torch.zeros(1, dtype=torch.int64)
    >>> row, neuron = torch.zeros(2, dtype=torch.int64), torch.tensor([12, 13])  # of channel 1
    >>> patch = region_patch(golden, one, row, neuron, torch.tensor([5.0, 6.0]), Window(True, 1, 3))
    >>> patch.values.flatten().tolist(), patch.channel.item(), patch.top.item()
    ([5.0, 6.0, 0.0], 1, 1)
    """
    golden = as_map(golden)
    _, channels, height, width = golden.shape
    place = torch.unravel_index(neuron, (channels, height, width))
    channel, top, left = (torch.zeros_like(image).scatter_reduce(0, row, part, "amin", include_self=False) for part in place)
    top, left = top.clamp(max=height - window.height), left.clamp(max=width - window.width)
    shape = (1, window.height, window.width, 1 if window.one_channel else channels)
    patch = Patch(golden.new_empty(shape), top, left, channel if window.one_channel else None)
    found = read(golden, image, patch)
    found[row, place[1] - top[row], place[2] - left[row], 0 if window.one_channel else place[0]] = values
    return replace(patch, values=found)


def read(golden: Tensor, image: Tensor, patch: Patch, outside: float | None = None) -> Tensor:
    """The golden values in a patch's window.

    Parameters
    ----------
    golden : Tensor
        float32 [B, C, H, W].
    image : Tensor
        int64 [N], the index of each fault's image in the batch.
    patch : Patch
        Says where; its values are not read.
    outside : float, optional
        What stands beyond the map. It has to be given where the window may reach beyond.

    Returns
    -------
    Tensor
        float32, of the shape of the patch's values.
    """
    _, _, height, width = golden.shape
    rows = patch.top[:, None] + torch.arange(patch.values.shape[1], device=image.device)
    columns = patch.left[:, None] + torch.arange(patch.values.shape[2], device=image.device)
    if outside is not None:
        beyond = ((rows < 0) | (rows >= height))[:, :, None] | ((columns < 0) | (columns >= width))[:, None, :]
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    image, rows, columns = image[:, None, None], rows[:, :, None], columns[:, None, :]
    if patch.channel is not None:
        found = golden[image, patch.channel[:, None, None], rows, columns][..., None]
    else:
        found = golden.permute(0, 2, 3, 1)[image, rows, columns]
    return found.masked_fill_(beyond[..., None], outside) if outside is not None and beyond.any() else found


def paste(target: Patch, patch: Patch) -> None:
    """Write the values of a patch into those of another one, in place, as far as its window holds them."""
    height, width = target.values.shape[1:3]
    rows = (patch.top - target.top)[:, None] + torch.arange(patch.values.shape[1], device=patch.top.device)
    columns = (patch.left - target.left)[:, None] + torch.arange(patch.values.shape[2], device=patch.top.device)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    n, i, j = inside.nonzero(as_tuple=True)
    pixels = (n, rows[n, i], columns[n, j])
    if patch.one_channel and not target.one_channel:
        target.values[(*pixels, patch.channel[n])] = patch.values[n, i, j, 0]
    else:
        target.values[pixels] = patch.values[n, i, j]


def covers(patch: Patch, golden: Tensor) -> bool:
    """Whether the patch holds all of each fault's value; golden: [B, ...]."""
    shape = as_map(golden).shape[1:]
    return patch.values.shape[1:] == (*shape[1:], shape[0])


def whole(patch: Patch, golden: Tensor) -> Tensor:
    """The whole values of N faulty runs, [N, ...], from a patch that covers them; golden: [B, ...]."""
    return patch.values.permute(0, 3, 1, 2).reshape(-1, *golden.shape[1:])


def paste_whole(values: Tensor, patch: Patch) -> None:
    """Write a patch into the values of N runs, [N, ...], in place."""
    zero = torch.zeros_like(patch.top)
    paste(Patch(as_map(values).permute(0, 2, 3, 1), zero, zero, None), patch)


@dataclass(frozen=True)
class LocalFaults:
    """N faults that have not spread far.

    Attributes
    ----------
    rows : Tensor
        int64 [N], which of the faults that the engine runs they are.
    image : Tensor
        int64 [N], the index of each fault's image in the batch of the golden run.
    patches : dict of fx.Node to Patch
        Step -> what they changed in its value, for the values that later steps read.
    """

    rows: Tensor
    image: Tensor
    patches: dict[fx.Node, Patch]

    def of(self, rows: Tensor) -> "LocalFaults":
        """Some of the faults; rows: int64 [n]."""
        patches = {step: patch.of(rows) for step, patch in self.patches.items()}
        return LocalFaults(self.rows[rows], self.image[rows], patches)

    def split(self, size: int) -> list["LocalFaults"]:
        """All of the faults, in groups of at most `size`."""
        if len(self.rows) <= size:
            return [self]
        return [self.of(chunk) for chunk in torch.arange(len(self.rows), device=self.rows.device).split(size)]

    def differ(self, golden: Values) -> Tensor:
        """Which faults differ in any bit from the golden run, bool [N]. So NaN may equal NaN, and 0 is not -0."""
        differs = torch.zeros_like(self.image, dtype=torch.bool)
        for step, patch in self.patches.items():
            twin = read(as_map(golden[step]), self.image, patch)
            differs |= (patch.values.contiguous().view(torch.int32) != twin.view(torch.int32)).flatten(1).any(dim=1)
        return differs


def in_batches(parts: list[LocalFaults], size: int) -> Iterator[list[LocalFaults]]:
    """All the faults, in lists that hold at most `size` of them together."""
    batch: list[LocalFaults] = []
    for part in (piece for whole_part in parts for piece in whole_part.split(size)):
        if batch and sum(len(one.rows) for one in batch) + len(part.rows) > size:
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


class LocalSteps:
    """Carries patches through the steps of a traced model, where that is possible and pays."""

    def __init__(self, traced: TracedModel) -> None:
        self._traced = traced
        self._weights: dict[fx.Node, Tensor] = {}
        self._scales: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def advance(self, faults: LocalFaults, index: int, golden: Values, batch_size: int) -> list[tuple[LocalFaults, int | None]]:
        """Follow the golden run, which has just done one step.

        Parameters
        ----------
        faults : LocalFaults
            The faults so far.
        index : int
            Index of the step.
        golden : dict of fx.Node to Any
            The golden values of the step and of those that it reads.
        batch_size : int
            The size of the largest group that may spread to all channels.

        Returns
        -------
        list of (LocalFaults, int or None)
            The faults that left a trace, in groups. The number is the index of the step from which on all has to be computed
            for them, None while they are local.
        """
        step = self._traced.steps[index]
        operation = self._traced.operation(step)
        if not any(source in faults.patches for source in step.all_input_nodes):
            return [(faults, None)]
        if operation in (nn.Conv2d, nn.Linear) and len(faults.rows) > batch_size:
            return [done for part in faults.split(batch_size) for done in self.advance(part, index, golden, batch_size)]
        patch = self.run(step, faults.patches, golden, faults.image)
        if patch is None:
            return [(faults, index)]
        patches = {**faults.patches, step: patch}
        needed = {read: patch for read, patch in patches.items() if self._traced.last_reader.get(read, -1) > index}
        faults = replace(faults, patches=needed)
        if operation in MASKING and patch.one_channel:
            left = faults.differ(golden).nonzero()[:, 0]
            if len(left) < len(faults.rows):
                return [(faults.of(left), None)] if len(left) else []
        height, width = as_map(golden[step]).shape[2:]
        wide = not patch.one_channel and patch.values.shape[1] * patch.values.shape[2] > LARGEST_SHARE * height * width
        return [(faults, index + 1 if wide else None)]

    def run(self, step: fx.Node, patches: dict[fx.Node, Patch], golden: Values, image: Tensor) -> Patch | None:
        """The patch of a step's value, from the patches of its inputs.

        Parameters
        ----------
        step : fx.Node
            The step.
        patches : dict of fx.Node to Patch
            What the faults changed so far.
        golden : dict of fx.Node to Any
            The golden values of the step and of its inputs.
        image : Tensor
            int64 [N], the index of each fault's image in the batch of the golden run.

        Returns
        -------
        Patch or None
            None where the whole value has to be computed.
        """
        if not isinstance(golden[step], Tensor) or not all(map(self._traced.batch_first, (step, *step.all_input_nodes))):
            return None
        operation = self._traced.operation(step)
        if operation in ADDITIONS:
            return self._add(step, patches, golden, image)
        if operation in PRODUCTS:
            return self._scale(step, patches, golden)
        if not self._traced.is_plain(step):
            return None
        (changed,) = step.all_input_nodes
        patch, source = patches[changed], as_map(golden[changed])
        if operation in ELEMENTWISE:
            return replace(patch, values=self._traced.call(step, (patch.values, *step.args[1:]), step.kwargs))
        rules: dict[object, Callable[..., Patch | None]] = {
            nn.BatchNorm2d: self._normalise,
            ChannelBound: self._bound,
            nn.Conv2d: self._convolve,
            nn.Linear: self._multiply,
            nn.MaxPool2d: self._pool,
            nn.Flatten: self._flatten,
            torch.flatten: self._flatten,
        }
        return rules[operation](step, patch, source, as_map(golden[step]), image) if operation in rules else None

    def _scale(self, step: fx.Node, patches: dict[fx.Node, Patch], golden: Values) -> Patch | None:
        """A product with one number for all images, such as the scale of the text-guided head's logits."""
        if step.kwargs or len(step.args) != 2:
            return None
        own, other = step.args if step.args[0] in patches else reversed(step.args)
        factor = self._traced.constants.get(other) if isinstance(other, fx.Node) else other
        if factor is None or (isinstance(factor, Tensor) and factor.numel() > 1):
            return None
        return replace(patches[own], values=patches[own].values * factor)

    def _is_batch(self, step: object) -> bool:
        """Whether an operand is a step whose value depends on the images."""
        return isinstance(step, fx.Node) and self._traced.depends_on_images(step)

    def _add(self, step: fx.Node, patches: dict[fx.Node, Patch], golden: Values, image: Tensor) -> Patch | None:
        """A sum of two values of one shape."""
        if (
            step.kwargs
            or len(step.args) != 2
            or not all(self._is_batch(arg) and golden[arg].shape == golden[step].shape for arg in step.args)
        ):
            return None
        parts = [patches[arg] for arg in step.args if arg in patches]
        if (len(parts) > 1 and all(part.one_channel for part in parts) and _same_window(*parts)) or len(parts) == 1:
            box = parts[0]
        else:
            box = _around(parts, golden[step])
        first, second = (self._side(golden[arg], patches.get(arg), box, image) for arg in step.args)
        return replace(box, values=first + second)

    @staticmethod
    def _side(golden: Tensor, patch: Patch | None, box: Patch, image: Tensor) -> Tensor:
        """The values of one operand of an addition, in the window of `box`."""
        if patch is box:
            return patch.values
        side = replace(box, values=read(as_map(golden), image, box))
        if patch:
            paste(side, patch)
        return side.values

    def _normalise(self, step: fx.Node, patch: Patch, source: Tensor, target: Tensor, image: Tensor) -> Patch | None:
        """BatchNorm as a product and a sum per channel."""
        norm = self._traced.modules[step.target]
        if norm.running_mean is None:
            return None
        if step not in self._scales:
            factor = torch.rsqrt(norm.running_var + norm.eps)
            if norm.affine:
                factor = factor * norm.weight
            self._scales[step] = factor, (norm.bias if norm.affine else 0) - norm.running_mean * factor
        factor, shift = self._scales[step]
        if patch.one_channel:
            factor, shift = (vector[patch.channel][:, None, None, None] for vector in (factor, shift))
        return replace(patch, values=patch.values * factor + shift)

    def _bound(self, step: fx.Node, patch: Patch, source: Tensor, target: Tensor, image: Tensor) -> Patch | None:
        """Learned thresholds, one per channel."""
        bound = self._traced.modules[step.target]
        if source.shape[1] != len(bound.high):  # tokens: each of their numbers is a channel of its own here
            return None
        high = bound.high[patch.channel][:, None, None, None] if patch.one_channel else bound.high
        return replace(patch, values=bound.passed(patch.values, high))

    def _multiply(self, step: fx.Node, patch: Patch, source: Tensor, target: Tensor, image: Tensor) -> Patch | None:
        """Linear: one changed input adds its change times one column of the weights."""
        if not patch.one_channel or len(self._traced.shapes[step]) != 1:
            return None
        if step not in self._weights:
            self._weights[step] = self._traced.modules[step.target].weight.detach().t().contiguous()
        change = patch.values[:, 0, 0] - read(source, image, patch)[:, 0, 0]
        values = target[image][:, None, None, :, 0, 0] + (change * self._weights[step][patch.channel])[:, None, None]
        return Patch(values, patch.top, patch.left, None)

    def _convolve(self, step: fx.Node, patch: Patch, source: Tensor, target: Tensor, image: Tensor) -> Patch | None:
        """Convolution: one channel adds its change times a slice of the weights; all channels are convolved as a small map."""
        conv = self._traced.modules[step.target]
        depthwise = conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or (conv.groups > 1 and not depthwise):
            return None
        kernel = _Kernel(conv)
        output, inputs = _windows(patch, target, kernel)
        rows, columns = output.values.shape[1:3]
        if not patch.one_channel and rows * columns > LARGEST_SHARE * target.shape[2] * target.shape[3]:
            return None
        output = replace(output, channel=patch.channel if depthwise else None)
        if not patch.one_channel:
            inputs = replace(inputs, values=read(source, image, inputs, outside=0.0))
            paste(inputs, patch)
            values = F.conv2d(
                inputs.values.permute(0, 3, 1, 2), conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups
            )
            return replace(output, values=values.permute(0, 2, 3, 1))
        change, scale = patch.values - read(source, image, patch), None
        if change.shape[3] > 1 and change.shape[1:3] == (1, 1):  # what changes of one place do is in proportion to them
            change, scale = torch.ones_like(change[..., :1]), change[:, 0]
        variants = change.shape[3]
        inputs = replace(inputs, values=change.new_zeros(len(image), *inputs.values.shape[1:3], variants))
        paste(inputs, replace(patch, values=change))
        # [N, outputs, kernel]. Not by F.unfold, which copies image by image.
        changes = inputs.values.movedim(3, 1).flatten(0, 1)
        for axis in (0, 1):
            changes = changes.unfold(1 + axis, kernel.reach[axis], kernel.stride[axis])[..., :: kernel.dilation[axis]]
        changes = changes.flatten(3).flatten(1, 2)
        if step not in self._weights:  # [input channel, kernel, output channel]
            self._weights[step] = (
                conv.weight.detach().flatten(2).permute(0 if depthwise else 1, 2, 1 if depthwise else 0).contiguous()
            )
        golden, weights = read(target, image, output).flatten(1, 2), self._weights[step][patch.channel]
        if variants > 1:  # [N, variants * outputs, kernel]: the variants of a fault share its weights
            changed = torch.bmm(changes.unflatten(0, (-1, variants)).flatten(1, 2), weights).unflatten(1, (variants, -1))
            values = golden + changed[..., 0].movedim(1, 2)
        elif scale is not None:
            values = golden + torch.bmm(changes, weights) * scale
        else:
            values = torch.baddbmm(golden, changes, weights)
        return replace(output, values=values.unflatten(1, (rows, columns)))

    def _pool(self, step: fx.Node, patch: Patch, source: Tensor, target: Tensor, image: Tensor) -> Patch | None:
        """Max pooling of the window, with the golden values round it."""
        pool = self._traced.modules[step.target]
        if pool.return_indices:
            return None
        kernel = _Kernel(pool)
        output, inputs = _windows(patch, target, kernel)
        inputs = replace(inputs, values=read(source, image, inputs, outside=-torch.inf))
        if patch.one_channel:
            inputs = replace(inputs, values=inputs.values.repeat(1, 1, 1, patch.values.shape[3]))
        paste(inputs, patch)
        values = F.max_pool2d(inputs.values.permute(0, 3, 1, 2), kernel.size, kernel.stride, 0, kernel.dilation)
        return replace(output, values=values.permute(0, 2, 3, 1))

    def _flatten(self, step: fx.Node, patch: Patch, source: Tensor, target: Tensor, image: Tensor) -> Patch | None:
        """Flattening: a single neuron stays one, at another index."""
        images, channels, height, width = source.shape
        if (
            not patch.one_channel
            or target.shape[:2] != (images, channels * height * width)
            or patch.values.shape[1:3] != (1, 1)
        ):
            return None
        zero = torch.zeros_like(patch.top)
        return Patch(patch.values, zero, zero, (patch.channel * height + patch.top) * width + patch.left)


class _Kernel:
    """The geometry of a convolution or pooling layer, each number for both axes."""

    def __init__(self, layer: nn.Conv2d | nn.MaxPool2d) -> None:
        numbers = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        self.size, self.stride, self.padding, self.dilation = ((n, n) if isinstance(n, int) else n for n in numbers)
        self.reach = tuple((size - 1) * step + 1 for size, step in zip(self.size, self.dilation, strict=True))


def _windows(patch: Patch, target: Tensor, kernel: _Kernel) -> tuple[Patch, Patch]:
    """The window of a layer's output [B, C, H, W] that a patch of its input reaches, and that of the input which this one sees.

    Both are as large for one fault as for another. Near a border they therefore hold some outputs that the patch does not
    reach. The input's window may reach into the padding. Of the values of both, only height and width are set yet.
    """
    tops, lefts, sizes, input_sizes = [], [], [], []
    for axis, (starts, start) in enumerate(((tops, patch.top), (lefts, patch.left))):
        stride, padding, reach = kernel.stride[axis], kernel.padding[axis], kernel.reach[axis]
        count = min((patch.values.shape[1 + axis] + reach - 2) // stride + 1, target.shape[2 + axis])
        first = torch.div(start + padding - reach + stride, stride, rounding_mode="floor")  # rounded up to a whole output
        first = first.clamp(0, target.shape[2 + axis] - count)
        starts += [first, first * stride - padding]
        sizes.append(count)
        input_sizes.append((count - 1) * stride + reach)
    empty = patch.values.new_empty
    return (
        Patch(empty(1, *sizes, 1), tops[0], lefts[0], patch.channel),
        Patch(empty(1, *input_sizes, 1), tops[1], lefts[1], patch.channel),
    )


def _same_window(a: Patch, b: Patch) -> bool:
    """Whether two patches of a single channel have the same windows and channels."""
    return a.values.shape == b.values.shape and all(
        torch.equal(x, y) for x, y in ((a.top, b.top), (a.left, b.left), (a.channel, b.channel))
    )


def _around(parts: list[Patch], golden: Tensor) -> Patch:
    """A patch of all channels whose window holds all the parts. Of its values, only height and width are set yet."""
    height, width = as_map(golden).shape[2:]
    top = torch.stack([part.top for part in parts]).amin(dim=0)
    left = torch.stack([part.left for part in parts]).amin(dim=0)
    bottom = torch.stack([part.top + part.values.shape[1] for part in parts]).amax(dim=0)
    right = torch.stack([part.left + part.values.shape[2] for part in parts]).amax(dim=0)
    rows, columns = int((bottom - top).max()), int((right - left).max())
    values = parts[0].values.new_empty(1, rows, columns, 1)
    return Patch(values, top.clamp(max=height - rows), left.clamp(max=width - columns), None)
