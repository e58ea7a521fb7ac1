"""Fault plans: which bit of which neuron of which layer flips on which image, drawn before the model is touched."""

import hashlib
from collections.abc import Mapping, Sequence
from numbers import Integral

import numpy as np
import pandas as pd

from textguard.errors import CampaignMismatch, InvalidParameter, Setting
from textguard.faults.checks import whole_number
from textguard.faults.damage import SINGLE_FLIP, FaultModel
from textguard.faults.formats import FP32, Format, stored_as
from textguard.faults.patterns import regions_of
from textguard.faults.sites import Site

PLAN_COLUMNS = ["layer", "index", "image", "neuron", "bit", "weight"]
DRAWN_COLUMNS = ["layer", "index", "image"]  # of these, what predictions have no part in: it is the same on all machines
FAULT_COLUMNS = ["layer", "index", "neuron", "mask"]  # what says which values a region's injection damages
SHARED = "all layers"  # the stream of images that all layers are hit on
TRIES = 32  # candidate images that each injection draws at once
Count = int | np.ndarray  # a layer's injections; or those of each bit, int [bits]


def draw_plan(
    sites: Sequence[Site],
    chances: np.ndarray,
    counts: int | Mapping[str, Count],
    seed: int,
    fault_model: FaultModel = SINGLE_FLIP,
    number_format: Format = FP32,
    share_images: bool = False,
) -> pd.DataFrame:
    """Draw independent injections for each layer.

    The neuron is uniform over the layer, or over its regions where the fault model has a shape. The bit is uniform as well,
    unless `counts` says how many injections each bit gets. The image is drawn by its chance.

    A fault depends only on the seed, its layer's position, its index within the layer and, where `counts` sets the bit, on its
    bit; its image also depends on the chances. So a larger count extends a plan, and two models whose layers correspond get
    corresponding faults. These are on the same image, unless it is eligible for one of the models only.

    Parameters
    ----------
    sites : sequence of Site
        The layers to draw faults for.
    chances : ndarray
        float [N], each image's chance to be drawn, relative to the other images of the split. 0 where it is not eligible. See
        `image_chances`.
    counts : int, or mapping of str to int or ndarray
        Injections per layer, or layer -> its injections, or layer -> its injections of each bit, int [bits].
    seed : int
        The seed of all draws.
    fault_model : FaultModel
        What one injection damages.
    number_format : Format
        How values are stored, which says how many bits there are.
    share_images : bool
        Whether injections of the same index hit the same image in all layers. Layers then are not independent of each other;
        see `textguard.estimates.summary.mean_over_layers`.

    Returns
    -------
    DataFrame
        One row per damaged bit, with PLAN_COLUMNS. The rows of one injection share `layer` and `index`. `neuron` is an index
        into what faults of this target hit: one image's flattened output, the flattened weights, or the blocks that share
        metadata. Of a region it is the first value; see `damaged_values` for the others. `weight` is what an injection counts
        for: averages with these weights are over all eligible images alike.

    Raises
    ------
    InvalidParameter
        A count is below 1; no image is eligible; an injection damages more values or bits than there are; a layer has no such
        regions; or the plan is by bit, and an injection damages several bits or values.

    Examples
    --------
    >>> import numpy as np
    >>> from textguard.faults import draw_plan
    >>> from textguard.faults.sites import Site
    >>> sites = [Site("fc", "Linear", position=0, shape=(10,), weights=320)]
    >>> draw_plan(sites, chances=np.array([1.0, 0.0, 1.0]), counts=3, seed=0)
      layer  index  image  neuron  bit  weight
    0    fc      0      2       7   11     1.0
    1    fc      1      2       1   30     1.0
    2    fc      2      0       3   23     1.0
    """
    if not isinstance(counts, Mapping):
        counts = dict.fromkeys((site.layer for site in sites), whole_number(Setting("injections_per_layer"), counts, 1))
    if not (chances > 0).any():
        raise InvalidParameter("no image is eligible: the fault-free model classifies none correctly; train it longer")
    drawn = []
    for site in sites:
        count = counts[site.layer]
        if isinstance(count, Integral):
            drawn.append(_draw(site, chances, int(count), seed, fault_model, number_format, share_images))
            continue
        if (fault_model.bits, fault_model.values) != (1, 1):
            raise InvalidParameter(Setting("plan"), ": only faults of one bit in one value can be planned by bit")
        drawn += [
            _draw(site, chances, int(of_bit), seed, fault_model, number_format, share_images, bit)
            for bit, of_bit in enumerate(count)
            if of_bit
        ]
    return pd.DataFrame({name: np.concatenate([part[name] for part in drawn]) for name in PLAN_COLUMNS})


def _draw(
    site: Site,
    chances: np.ndarray,
    count: int,
    seed: int,
    fault_model: FaultModel,
    number_format: Format,
    share_images: bool,
    bit: int | None = None,
) -> dict[str, np.ndarray]:
    """The injections of one layer, by column; with `bit`, all of them in that bit."""
    values, bits, all_bits = fault_model.values, fault_model.bits, bits_at(site, fault_model, number_format)
    of_bit = "" if bit is None else f" bit {bit}"
    stream = f"{site.position}{of_bit}"
    uniform = uniform_numbers(seed, stream, count, values * (1 + bits))
    if fault_model.shaped:
        regions = regions_of(site, fault_model)
        neurons = regions.first(distinct(uniform[:, :1], regions.count, "values")[:, 0])
    else:
        neurons = distinct(uniform[:, :values], count_targets(site, fault_model, number_format), "values")
    index = np.arange(count, dtype=np.int64)
    if bit is None:
        damaged = draw_bits(uniform[:, values:].reshape(-1, bits), all_bits, fault_model).reshape(-1)
    else:
        damaged, index = np.full(count, bit, dtype=np.int64), index * all_bits + bit
    image = draw_images(chances, seed, f"{SHARED}{of_bit}" if share_images else stream, count)
    weight = chances[chances > 0].mean() / chances[image]
    return {
        "layer": np.full(count * values * bits, site.layer, dtype=object),
        "index": index.repeat(values * bits),
        "image": image.repeat(values * bits),
        "neuron": neurons.reshape(-1).repeat(bits),
        "bit": damaged,
        "weight": weight.repeat(values * bits),
    }


def draw_images(chances: np.ndarray, seed: int, stream: str, count: int) -> np.ndarray:
    """The image of each injection, int64 [count], drawn by rejection sampling.

    Image i is accepted with probability chances[i] / max(chances). Every injection has a random sequence of candidate images of
    its own and takes the first that is accepted. So two models whose chances differ for a few images share all other images,
    and their campaigns can be compared injection by injection.
    """
    accepted = chances / chances.max()
    image, missing, block = np.empty(count, dtype=np.int64), np.arange(count), 0
    while len(missing):
        uniform = uniform_numbers(seed, f"{stream} images {block}", count, 2 * TRIES)[missing]
        candidates = (uniform[:, :TRIES] * len(chances)).astype(np.int64)
        taken = uniform[:, TRIES:] < accepted[candidates]
        found = taken.any(axis=1)
        image[missing[found]] = candidates[found, taken[found].argmax(axis=1)]
        missing, block = missing[~found], block + 1
    return image


def check_plan(plan: pd.DataFrame, sites: Sequence[Site], images: int, fault_model: FaultModel, number_format: Format) -> None:
    """Check that a plan, which may come from a file, fits the model and the split.

    Parameters
    ----------
    plan : DataFrame
        As `draw_plan` returns it.
    sites : sequence of Site
        The sites of the model.
    images : int
        How many images the split has.
    fault_model : FaultModel
        What one injection damages.
    number_format : Format
        How values are stored.

    Raises
    ------
    CampaignMismatch
        The plan names a layer, neuron, image or bit that does not exist, has a weight that is not above 0, or names several
        values of one region.
    InvalidParameter
        A layer has no regions of the fault model's pattern.
    """
    targets = plan["layer"].map({site.layer: count_targets(site, fault_model, number_format) for site in sites})
    if targets.isna().any():
        raise CampaignMismatch(f"the plan names layer {plan['layer'][targets.isna()].iloc[0]!r}, which the model does not have")
    bits = plan["layer"].map({site.layer: bits_at(site, fault_model, number_format) for site in sites})
    ends = {"neuron": targets, "image": images, "bit": bits}
    for column, end in ends.items():
        inside = plan[column].between(0, end - 1)
        if not inside.all():
            raise CampaignMismatch(f"fault {plan[~inside].iloc[0].to_dict()} of the plan has a {column} that does not exist")
    if fault_model.shaped:
        for site in sites:
            regions_of(site, fault_model)
        several = plan.groupby(["layer", "index"], sort=False)["neuron"].nunique() > 1
        if several.any():
            layer, index = several.index[several][0]
            raise CampaignMismatch(
                f"the plan has several neurons in injection {index} into layer {layer!r}; of pattern {fault_model.pattern}, "
                "a plan names one value of the region"
            )
    if not (np.isfinite(plan["weight"]) & (plan["weight"] > 0)).all():
        raise CampaignMismatch("the plan has weights that are not above 0")


def damaged_values(
    faults: pd.DataFrame, sites: Mapping[str, Site], fault_model: FaultModel, number_format: Format
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All values that injections into regions damage.

    Parameters
    ----------
    faults : DataFrame
        One row per injection: layer, index, neuron (any value of the region) and mask (the bits that the plan names).
    sites : mapping of str to Site
        Layer -> its site.
    fault_model : FaultModel
        What one injection is; it has a shape.
    number_format : Format
        How values are stored.

    Returns
    -------
    row, neuron, mask : ndarray
        int64 [M], ascending by row: which injection damages which value, and its damaged bits. With damage `random`, only the
        plan's value has the plan's bits. Those of the others depend on the layer's position and the injection's index, neuron
        and bits, which in turn depend on the seed.

    Examples
    --------
    >>> import pandas as pd
    >>> from textguard.faults import FaultModel, parse_format
    >>> from textguard.faults.plans import FAULT_COLUMNS, damaged_values
    >>> from textguard.faults.sites import Site
    >>> site, faults = Site("conv", "Conv2d", 0, (2, 2, 3), 18), pd.DataFrame([("conv", 0, 3, 4)], columns=FAULT_COLUMNS)
    >>> [part.tolist() for part in damaged_values(faults, {"conv": site}, FaultModel(pattern="row"), parse_format("fp32"))]
    [[0, 0, 0], [3, 4, 5], [4, 4, 4]]
    """
    rows, neurons, masks = [], [], []
    for layer, part in faults.reset_index(drop=True).groupby("layer", sort=False):
        anchor, site = part["neuron"].to_numpy(), sites[layer]
        row, neuron = regions_of(site, fault_model).values_of(anchor)
        mask = part["mask"].to_numpy(np.int64)[row]
        if fault_model.damage == "random":
            bits = bits_at(site, fault_model, number_format)
            mask = np.where(neuron == anchor[row], mask, _random_masks(part, row, site, fault_model, bits))
        rows, neurons, masks = [*rows, part.index.to_numpy()[row]], [*neurons, neuron], [*masks, mask]
    row, neuron, mask = (np.concatenate(parts) for parts in (rows, neurons, masks))
    order = np.argsort(row, kind="stable")
    return row[order], neuron[order], mask[order]


def _random_masks(faults: pd.DataFrame, row: np.ndarray, site: Site, fault_model: FaultModel, bits: int) -> np.ndarray:
    """Each value's own damaged bits, of `bits`, int64 [M]. row: int64 [M], ascending: its injection."""
    named = faults[["index", "neuron", "mask"]].itertuples(index=False, name=None)
    uniform = [
        uniform_numbers(0, f"{site.position} region {index} {neuron} {mask}", count, fault_model.bits)
        for (index, neuron, mask), count in zip(named, np.bincount(row, minlength=len(faults)), strict=True)
    ]
    return np.left_shift(np.int64(1), draw_bits(np.concatenate(uniform), bits, fault_model)).sum(axis=1)


def draw_bits(uniform: np.ndarray, bits: int, fault_model: FaultModel) -> np.ndarray:
    """The damaged bits of N values, int64 [N, k], out of `bits`, from uniform numbers in [0, 1), float [N, k]."""
    if fault_model.pattern != "adjacent":
        return distinct(uniform, bits, "bits")
    count = uniform.shape[1]
    if count > bits:
        raise InvalidParameter(Setting("fault_model.bits"), f" is {count}; there are {bits} to choose from")
    return (uniform[:, :1] * (bits - count + 1)).astype(np.int64) + np.arange(count)


def count_targets(site: Site, fault_model: FaultModel, number_format: Format) -> int:
    """How many different values of a layer (neurons, weights or blocks) a fault can hit."""
    if fault_model.target == "weight":
        return site.weights
    if fault_model.target == "metadata":
        return -(-site.neurons // number_format.block) if number_format.block else 1
    return site.neurons


def bits_of(fault_model: FaultModel, number_format: Format) -> int:
    """How many bits a value that faults hit is stored in.

    Parameters
    ----------
    fault_model : FaultModel
        Its target is a neuron, a weight or a block's metadata.
    number_format : Format
        How neurons and weights are stored.

    Returns
    -------
    int
        The number of stored bits; a plan's bits lie below it.

    Examples
    --------
    >>> from textguard.faults import FaultModel, parse_format
    >>> from textguard.faults.plans import bits_of
    >>> bits_of(FaultModel(), parse_format("fp16"))
    16
    >>> bits_of(FaultModel(target="metadata"), parse_format("bfp(5,7,16)"))
    5
    """
    return number_format.shared_bits if fault_model.target == "metadata" else number_format.bits


def bits_at(site: Site, fault_model: FaultModel, number_format: Format) -> int:
    """The same at one site, whose values are stored as torch stores them where the format is fp32.

    Examples
    --------
    >>> from textguard.faults import FaultModel, parse_format
    >>> from textguard.faults.plans import bits_at
    >>> from textguard.faults.sites import Site
    >>> bits_at(Site("fc", "Linear", 0, (10,), 320, dtype="bfloat16"), FaultModel(), parse_format("fp32"))
    16
    """
    dtype = site.weight_dtype if fault_model.target == "weight" else site.dtype
    return bits_of(fault_model, stored_as(number_format, dtype, f"layer {site.layer!r}")[0])


def distinct(uniform: np.ndarray, size: int, what: str) -> np.ndarray:
    """Integers below `size`, uniformly and all different within a row, from uniform numbers in [0, 1), float [N, k]."""
    count = uniform.shape[1]
    if count > size:
        raise InvalidParameter(Setting(f"fault_model.{what}"), f" is {count}; there are {size} to choose from")
    drawn = np.zeros(uniform.shape, dtype=np.int64)
    for column in range(count):
        chosen = (uniform[:, column] * (size - column)).astype(np.int64)
        # So far `chosen` counts only the integers that are not drawn yet. Stepping over each drawn one makes it the integer.
        for earlier in np.sort(drawn[:, :column], axis=1).T:
            chosen += chosen >= earlier
        drawn[:, column] = chosen
    return drawn


def uniform_numbers(seed: int, stream: str, count: int, width: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float [count, width].

    Row i depends only on (seed, stream, i), because Philox counts up from its key.
    """
    digest = hashlib.sha256(f"textguard plan {seed} {stream}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16])).random_raw(count * width).reshape(count, width)
    return (words >> np.uint64(11)) * 2.0**-53
