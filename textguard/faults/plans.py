"""Fault plans: which bit of which neuron of which layer flips on which image, drawn before the model is touched."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from textguard.errors import CampaignMismatch, InvalidParameter
from textguard.faults.damage import SINGLE_FLIP, FaultModel
from textguard.faults.formats import FP32, Format
from textguard.faults.sites import Site

PLAN_COLUMNS = ["layer", "index", "image", "neuron", "bit"]


def draw_plan(
    sites: Sequence[Site],
    images: Sequence[int],
    injections_per_layer: int,
    seed: int,
    fault_model: FaultModel = SINGLE_FLIP,
    number_format: Format = FP32,
) -> pd.DataFrame:
    """Draw independent injections, uniformly over images, places and bits, for each layer.

    images: the positions of the eligible images in their split; drawn with replacement. A fault depends on (seed, position of
    its layer, its index) alone, so that two models whose layers correspond get corresponding faults, and more injections
    extend a plan. Returns one row per damaged bit with PLAN_COLUMNS; the rows of one injection share layer and index. neuron:
    the place in the layer's flattened output for one image (in its flattened weights; among the blocks that share metadata).
    Raises InvalidParameter.
    """
    if injections_per_layer < 1:
        raise InvalidParameter(f"params.yaml inject.injections_per_layer is {injections_per_layer}; at least 1 is needed")
    if not len(images):
        raise InvalidParameter("no image is eligible: the fault-free model classifies none correctly; train it longer")
    eligible = np.asarray(images, dtype=np.int64)
    values, bits = fault_model.values, fault_model.bits
    layers = []
    for site in sites:
        uniform = _uniform(seed, site.position, injections_per_layer, 1 + values * (1 + bits))
        places = _distinct(uniform[:, 1 : 1 + values], _places(site, fault_model, number_format), "values")
        drawn = uniform[:, 1 + values :].reshape(-1, bits)
        damaged = _distinct(drawn, _bits(fault_model, number_format), "bits")
        index = np.arange(injections_per_layer, dtype=np.int64)
        layers.append(
            pd.DataFrame(
                {
                    "layer": site.layer,
                    "index": index.repeat(values * bits),
                    "image": eligible[(uniform[:, 0] * len(eligible)).astype(np.int64)].repeat(values * bits),
                    "neuron": places.reshape(-1).repeat(bits),
                    "bit": damaged.reshape(-1),
                }
            )
        )
    return pd.concat(layers, ignore_index=True)


def check_plan(plan: pd.DataFrame, sites: Sequence[Site], images: int, fault_model: FaultModel, number_format: Format) -> None:
    """Raise CampaignMismatch unless every fault of a (loaded) plan exists in the model and the split of `images` images."""
    places = plan["layer"].map({site.layer: _places(site, fault_model, number_format) for site in sites})
    if places.isna().any():
        raise CampaignMismatch(f"the plan names layer {plan['layer'][places.isna()].iloc[0]!r}, which the model does not have")
    ends = {"neuron": places, "image": images, "bit": _bits(fault_model, number_format)}
    for column, end in ends.items():
        inside = plan[column].between(0, end - 1)
        if not inside.all():
            raise CampaignMismatch(f"fault {plan[~inside].iloc[0].to_dict()} of the plan has a {column} that does not exist")


def _places(site: Site, fault_model: FaultModel, number_format: Format) -> int:
    """How many places of a layer a fault can hit."""
    if fault_model.target == "weight":
        return site.weights
    if fault_model.target == "metadata":
        return -(-site.neurons // number_format.block) if number_format.block else 1
    return site.neurons


def _bits(fault_model: FaultModel, number_format: Format) -> int:
    return number_format.shared_bits if fault_model.target == "metadata" else number_format.bits


def _distinct(uniform: np.ndarray, size: int, what: str) -> np.ndarray:
    """Different integers below `size` in each row, uniformly, from uniform numbers in [0, 1), [N, k]."""
    count = uniform.shape[1]
    if count > size:
        raise InvalidParameter(f"params.yaml inject.faults.{what} is {count}; there are {size} to choose from")
    drawn = np.zeros(uniform.shape, dtype=np.int64)
    for column in range(count):
        chosen = (uniform[:, column] * (size - column)).astype(np.int64)
        # Counted among those not drawn yet: step over each that is.
        for earlier in np.sort(drawn[:, :column], axis=1).T:
            chosen += chosen >= earlier
        drawn[:, column] = chosen
    return drawn


def _uniform(seed: int, position: int, count: int, width: int) -> np.ndarray:
    """Uniform numbers in [0, 1), [count, width]; row i depends on (seed, position, i) alone: Philox counts up from its key."""
    digest = hashlib.sha256(f"textguard plan {seed} {position}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16])).random_raw(count * width).reshape(count, width)
    return (words >> np.uint64(11)) * 2.0**-53
