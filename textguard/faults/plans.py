"""Fault plans: which bit of which neuron of which layer flips on which image, drawn before the model is touched."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from textguard.errors import CampaignMismatch, InvalidParameter, Setting
from textguard.faults.damage import SINGLE_FLIP, FaultModel
from textguard.faults.formats import FP32, Format
from textguard.faults.sites import Site

PLAN_COLUMNS = ["layer", "index", "image", "neuron", "bit", "weight"]
TRIES = 32  # images looked at at once


Count = int | np.ndarray  # of a layer's injections; or of those of each bit


def draw_plan(
    sites: Sequence[Site],
    chances: np.ndarray,
    counts: int | Mapping[str, Count],
    seed: int,
    fault_model: FaultModel = SINGLE_FLIP,
    number_format: Format = FP32,
) -> pd.DataFrame:
    """Draw independent injections for each layer, uniformly over places, and over bits or as many of each bit as `counts` says.

    chances: float [N], how likely each image of the split is to be drawn, relative to the others; 0 for those that are not
    eligible (see `image_chances`). counts: injections per layer; or layer -> injections, or -> injections of each bit, int
    [bits].
    A fault depends on (seed, position of its layer, its index, and its bit where `counts` sets it) alone, and its image on the
    chances: more injections extend a plan, and two models whose layers correspond get corresponding faults, on the same image
    unless it is eligible for one of them only.
    Returns one row per damaged bit with PLAN_COLUMNS; the rows of one injection share layer and index. neuron: the place in the
    layer's flattened output for one image (in its flattened weights; among the blocks that share metadata). weight: what an
    injection counts for, so that averages are over eligible images alike, however likely they were to be drawn.
    Raises InvalidParameter.
    """
    if isinstance(counts, int) and counts < 1:
        raise InvalidParameter(Setting("injections_per_layer"), f" is {counts}; at least 1 is needed")
    if not (chances > 0).any():
        raise InvalidParameter("no image is eligible: the fault-free model classifies none correctly; train it longer")
    drawn = []
    for site in sites:
        count = counts if isinstance(counts, int) else counts[site.layer]
        if isinstance(count, int):
            drawn.append(_draw(site, chances, count, seed, fault_model, number_format))
            continue
        if (fault_model.bits, fault_model.values) != (1, 1):
            raise InvalidParameter(Setting("plan"), ": only faults of one bit in one value can be planned by bit")
        drawn += [
            _draw(site, chances, int(of_bit), seed, fault_model, number_format, bit)
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
    bit: int | None = None,
) -> dict[str, np.ndarray]:
    """The injections of one layer by column; of one bit where it is given."""
    values, bits, all_bits = fault_model.values, fault_model.bits, bits_of(fault_model, number_format)
    stream = f"{site.position}" if bit is None else f"{site.position} bit {bit}"
    uniform = _uniform(seed, stream, count, values * (1 + bits))
    places = _distinct(uniform[:, :values], _places(site, fault_model, number_format), "values")
    index = np.arange(count, dtype=np.int64)
    if bit is None:
        damaged = _distinct(uniform[:, values:].reshape(-1, bits), all_bits, "bits").reshape(-1)
    else:
        damaged, index = np.full(count, bit, dtype=np.int64), index * all_bits + bit
    image = _draw_images(chances, seed, stream, count)
    weight = chances[chances > 0].mean() / chances[image]
    return {
        "layer": np.full(count * values * bits, site.layer, dtype=object),
        "index": index.repeat(values * bits),
        "image": image.repeat(values * bits),
        "neuron": places.reshape(-1).repeat(bits),
        "bit": damaged,
        "weight": weight.repeat(values * bits),
    }


def _draw_images(chances: np.ndarray, seed: int, stream: str, count: int) -> np.ndarray:
    """Images by their chances: each injection takes the first of a random sequence of its own that it does not reject.

    So two models that differ in a few chances share all other images, which makes their campaigns comparable pair by pair.
    """
    accepted = chances / chances.max()
    image, missing, block = np.empty(count, dtype=np.int64), np.arange(count), 0
    while len(missing):
        uniform = _uniform(seed, f"{stream} images {block}", count, 2 * TRIES)[missing]
        candidates = (uniform[:, :TRIES] * len(chances)).astype(np.int64)
        taken = uniform[:, TRIES:] < accepted[candidates]
        found = taken.any(axis=1)
        image[missing[found]] = candidates[found, taken[found].argmax(axis=1)]
        missing, block = missing[~found], block + 1
    return image


def check_plan(plan: pd.DataFrame, sites: Sequence[Site], images: int, fault_model: FaultModel, number_format: Format) -> None:
    """Raise CampaignMismatch unless every fault of a (loaded) plan exists in the model and the split of `images` images."""
    places = plan["layer"].map({site.layer: _places(site, fault_model, number_format) for site in sites})
    if places.isna().any():
        raise CampaignMismatch(f"the plan names layer {plan['layer'][places.isna()].iloc[0]!r}, which the model does not have")
    ends = {"neuron": places, "image": images, "bit": bits_of(fault_model, number_format)}
    for column, end in ends.items():
        inside = plan[column].between(0, end - 1)
        if not inside.all():
            raise CampaignMismatch(f"fault {plan[~inside].iloc[0].to_dict()} of the plan has a {column} that does not exist")
    if not (np.isfinite(plan["weight"]) & (plan["weight"] > 0)).all():
        raise CampaignMismatch("the plan has weights that are not above 0")


def _places(site: Site, fault_model: FaultModel, number_format: Format) -> int:
    """How many places of a layer a fault can hit."""
    if fault_model.target == "weight":
        return site.weights
    if fault_model.target == "metadata":
        return -(-site.neurons // number_format.block) if number_format.block else 1
    return site.neurons


def bits_of(fault_model: FaultModel, number_format: Format) -> int:
    """How many bits what a fault hits is stored in."""
    return number_format.shared_bits if fault_model.target == "metadata" else number_format.bits


def _distinct(uniform: np.ndarray, size: int, what: str) -> np.ndarray:
    """Different integers below `size` in each row, uniformly, from uniform numbers in [0, 1), [N, k]."""
    count = uniform.shape[1]
    if count > size:
        raise InvalidParameter(Setting(f"fault_model.{what}"), f" is {count}; there are {size} to choose from")
    drawn = np.zeros(uniform.shape, dtype=np.int64)
    for column in range(count):
        chosen = (uniform[:, column] * (size - column)).astype(np.int64)
        # Counted among those not drawn yet: step over each that is.
        for earlier in np.sort(drawn[:, :column], axis=1).T:
            chosen += chosen >= earlier
        drawn[:, column] = chosen
    return drawn


def _uniform(seed: int, stream: str, count: int, width: int) -> np.ndarray:
    """Uniform numbers in [0, 1), [count, width]; row i depends on (seed, stream, i) alone: Philox counts up from its key."""
    digest = hashlib.sha256(f"textguard plan {seed} {stream}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16])).random_raw(count * width).reshape(count, width)
    return (words >> np.uint64(11)) * 2.0**-53
