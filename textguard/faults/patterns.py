"""Faults with a shape: which values of a layer one injection damages together.

A plan names a region by one of its values, and the bits that are damaged there. All else follows from these, so that a plan
stays as small as one of single values.

Regions of a convolution's output [C, H, W] (of 1-d convolutions, H is 1; of 3-d ones, it is [C, D, H, W]):

- `channel`: all values of one channel,
- `row`: those of one channel that differ in the last dimension only,
- `column`: those of one channel that differ in the last dimension but one only,
- `block`: those of `block[0]` channels at `block[1]` places that follow each other in the flattened map. That is the tile of
  outputs that an array of as many rows and columns computes at once, if the convolution is a matrix product. Tiles at the ends
  are smaller.

The output of a linear layer, embedding or layer norm is a matrix [T, D] of T tokens, or places. A vector is one token. Each of
the D features is a channel:

- `channel`, `column`: one feature of all tokens, which of a vector is a single value,
- `row`: all features of one token,
- `block`: `block[0]` features of `block[1]` tokens.

Other operations are seen as convolutions where one image's share has 3 or more dimensions, and as linear layers elsewhere.

Regions of stored weights are those of one output channel (`channel`: a filter, or the weights of one feature), and in linear
layers those that read one input (`column`).

References
----------
Bolchini, Cassano, Miele and Toschi, Fast and Accurate Error Simulation for CNNs Against Soft Errors, IEEE Transactions on
Computers, 2022 (CLASSES): its error models, mined from NVBitFI's faults in threads and warps of GPUs, have patterns of rows,
columns, blocks and whole channels.

He, Balaprakash and Li, FIdelity: Efficient Resilience Analysis Framework for Deep Learning Accelerators, MICRO 2020: errors in
logic, modelled by what an accelerator reuses, and checked against simulations of NVDLA.

Ibe et al., Impact of Scaling on Neutron-Induced Soft Error in SRAMs From a 250 nm to a 22 nm Design Rule, IEEE Transactions on
Electron Devices, 2010: one nuclear reaction upsets several cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from textguard.errors import InvalidParameter, Setting
from textguard.faults.damage import FaultModel
from textguard.faults.sites import Site

CHANNEL_FIRST = ("Conv", "BatchNorm", "GroupNorm")
CHANNEL_LAST = ("Linear", "Bilinear", "Embedding", "LayerNorm", "Recurrent")


@dataclass(frozen=True)
class Regions:
    """How the values of a layer fall into regions of one pattern.

    Attributes
    ----------
    size : tuple of int
        The values as an array of four dimensions: channels, and three of places.
    strides : tuple of int
        How far apart neighbours of each dimension are in the flattened values.
    tile : tuple of int
        The size of a region, the first at index 0 of each dimension. Those at the end are cut off.

    Examples
    --------
    >>> from textguard.faults import FaultModel
    >>> from textguard.faults.patterns import regions_of
    >>> from textguard.faults.sites import Site
    >>> rows = regions_of(Site("conv", "Conv2d", 0, (2, 3, 4), 18), FaultModel(pattern="row"))
    >>> rows.count, rows.first([0, 5]).tolist()
    (6, [0, 20])
    >>> rows.values_of([22])
    (array([0, 0, 0, 0]), array([20, 21, 22, 23]))
    """

    size: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    tile: tuple[int, int, int, int]

    @property
    def _tiles(self) -> tuple[int, ...]:
        return tuple(-(-size // tile) for size, tile in zip(self.size, self.tile, strict=True))

    @property
    def count(self) -> int:
        """How many regions there are."""
        return prod(self._tiles)

    @property
    def largest(self) -> int:
        """How many values a whole region has."""
        return prod(map(min, self.tile, self.size))

    def first(self, number: Sequence[int] | np.ndarray) -> np.ndarray:
        """The first value of each of N regions, int64 [N], by their numbers, int [N] below `count`."""
        places = np.unravel_index(np.asarray(number, dtype=np.int64), self._tiles)
        return sum(place * tile * stride for place, tile, stride in zip(places, self.tile, self.strides, strict=True))

    def values_of(self, anchor: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All values of the regions that hold some values.

        Parameters
        ----------
        anchor : int [N]
            Indices of flattened values, one of each region.

        Returns
        -------
        row, value : ndarray
            int64 [M] each: region `row` of the N has the value with this index. Ascending, by row and then by value.
        """
        anchor = np.asarray(anchor, dtype=np.int64)[:, None, None, None, None]
        value, inside = np.zeros((1, 1, 1, 1, 1), dtype=np.int64), np.ones(1, dtype=bool)
        # The dimension whose neighbours are furthest apart comes first, so that values ascend.
        for axis, dimension in enumerate(np.argsort(self.strides, kind="stable")[::-1], 1):
            size, stride, tile = (part[dimension] for part in (self.size, self.strides, self.tile))
            steps = np.arange(min(tile, size)).reshape([-1 if number == axis else 1 for number in range(5)])
            place = anchor // stride % size // tile * tile + steps
            value, inside = value + place * stride, inside & (place < size)
        row, *_ = np.nonzero(np.broadcast_to(inside, value.shape))
        return row, value[np.broadcast_to(inside, value.shape)]


def regions_of(site: Site, model: FaultModel) -> Regions:
    """The regions of a layer's output, or of its weights, for a fault model with a shape.

    Parameters
    ----------
    site : Site
        The layer.
    model : FaultModel
        Its pattern is `channel`, `row`, `column` or `block`.

    Returns
    -------
    Regions
        Where they lie.

    Raises
    ------
    InvalidParameter
        The layer's weights have no such regions.
    """
    if model.target == "weight":
        return _of_weights(site, model)
    if site.kind.startswith(CHANNEL_FIRST) or (len(site.shape) > 2 and site.kind not in CHANNEL_LAST):
        channels, *places = site.shape
        depth, height, width = (prod(places[:-2]), *[1, 1, *places][-2:])
        if model.pattern == "block":
            depth, height, width = 1, 1, prod(places)
        size, strides = (channels, depth, height, width), (depth * height * width, height * width, width, 1)
        tile = {
            "channel": (1, depth, height, width),
            "row": (1, 1, 1, width),
            "column": (1, 1, height, 1),
            "block": (model.block[0], 1, 1, model.block[1]),
        }[model.pattern]
        return Regions(size, strides, tile)
    *places, channels = site.shape or (1,)
    tokens = prod(places)
    across, along = (1, 1, 1, tokens), (channels, 1, 1, 1)
    blocks = (model.block[0], 1, 1, model.block[1])
    tile = {"channel": across, "column": across, "row": along, "block": blocks}[model.pattern]
    return Regions((channels, 1, 1, tokens), (1, channels * tokens, channels * tokens, channels), tile)


@dataclass(frozen=True)
class Window:
    """The smallest window that holds any region of a map [C, H, W], put in the right place. A vector is a map of 1 x 1 places.

    one_channel: whether each region lies in a single channel. height, width: of the window.
    """

    one_channel: bool
    height: int
    width: int


def window_of(site: Site, model: FaultModel) -> Window | None:
    """The window of a layer's regions; None where its output is neither a map with the channel first nor a vector.

    Examples
    --------
    >>> from textguard.faults import FaultModel
    >>> from textguard.faults.patterns import window_of
    >>> from textguard.faults.sites import Site
    >>> window_of(Site("conv", "Conv2d", 0, (16, 8, 8), 432), FaultModel(pattern="block", block=(8, 12)))
    Window(one_channel=False, height=2, width=8)
    """
    regions = regions_of(site, model)
    channels, _, *size = (min(part) for part in zip(regions.tile, regions.size, strict=True))
    if len(site.shape) == 1:
        return Window(channels == 1, 1, 1)
    if len(site.shape) != 3 or regions.strides[0] == 1:
        return None
    _, height, width = site.shape
    if model.pattern != "block":
        return Window(channels == 1, *size)
    first = np.arange(0, height * width, model.block[1])
    last = np.minimum(first + model.block[1], height * width) - 1
    rows = int((last // width - first // width).max()) + 1
    return Window(channels == 1, rows, width if rows > 1 else min(model.block[1], width))


def values_held(site: Site, model: FaultModel) -> int:
    """How many values an injection into a region needs in memory, at most: its own, or those of its window."""
    largest, window = regions_of(site, model).largest, window_of(site, model) if model.target == "neuron" else None
    if window is None or window.one_channel:
        return largest
    return max(largest, site.shape[0] * window.height * window.width)


def _of_weights(site: Site, model: FaultModel) -> Regions:
    """The regions of weights [output channels, ...]."""
    linear = site.kind == "Linear"
    if not linear and site.kind not in ("Conv1d", "Conv2d", "Conv3d"):
        raise InvalidParameter(
            Setting("fault_model.pattern"),
            f" is {model.pattern!r}; the weights of {site.kind}, as of layer {site.layer!r}, have no known shape: take "
            "value or adjacent, or hit neurons",
        )
    allowed = ("channel", "column") if linear else ("channel",)
    if model.pattern not in allowed:
        raise InvalidParameter(
            Setting("fault_model.pattern"),
            f" is {model.pattern!r}; weights of {site.kind}, as of layer {site.layer!r}, take value, adjacent, "
            f"{', '.join(allowed)}",
        )
    channels = site.shape[-1 if linear else 0]
    each = site.weights // channels
    tile = (1, 1, 1, each) if model.pattern == "channel" else (channels, 1, 1, 1)
    return Regions((channels, 1, 1, each), (each, each, each, 1), tile)
