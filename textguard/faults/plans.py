"""Fault plans: which bit of which neuron of which layer flips on which image, drawn before the model is touched."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from textguard.errors import CampaignMismatch, InvalidParameter
from textguard.faults.bits import FP32_BITS
from textguard.faults.graph import Site

PLAN_COLUMNS = ["layer", "index", "image", "neuron", "bit"]


def draw_plan(sites: Sequence[Site], images: Sequence[int], injections_per_layer: int, seed: int) -> pd.DataFrame:
    """Draw independent single-bit flips, uniformly over images, neurons and bits, for each layer.

    images: the positions of the eligible images in their split; drawn with replacement. neuron: index into the layer's
    flattened output for one image. A fault depends on (seed, position of its layer, its index) alone, so that two models
    whose layers correspond get corresponding faults, and more injections extend a plan.
    Returns one row per fault with PLAN_COLUMNS. Raises InvalidParameter.
    """
    if injections_per_layer < 1:
        raise InvalidParameter(f"params.yaml inject.injections_per_layer is {injections_per_layer}; at least 1 is needed")
    if not len(images):
        raise InvalidParameter("no image is eligible: the fault-free model classifies none correctly; train it longer")
    eligible = np.asarray(images, dtype=np.int64)
    layers = []
    for site in sites:
        uniform = _uniform(seed, site.position, injections_per_layer)
        layers.append(
            pd.DataFrame(
                {
                    "layer": site.layer,
                    "index": np.arange(injections_per_layer, dtype=np.int64),
                    "image": eligible[(uniform[:, 0] * len(eligible)).astype(np.int64)],
                    "neuron": (uniform[:, 1] * site.neurons).astype(np.int64),
                    "bit": (uniform[:, 2] * FP32_BITS).astype(np.int64),
                }
            )
        )
    return pd.concat(layers, ignore_index=True)


def check_plan(plan: pd.DataFrame, sites: Sequence[Site], images: int) -> None:
    """Raise CampaignMismatch unless every fault of a (loaded) plan exists in the model and the split of `images` images."""
    neurons = plan["layer"].map({site.layer: site.neurons for site in sites})
    if neurons.isna().any():
        raise CampaignMismatch(f"the plan names layer {plan['layer'][neurons.isna()].iloc[0]!r}, which the model does not have")
    ends = {"neuron": neurons, "image": images, "bit": FP32_BITS}
    for column, end in ends.items():
        inside = plan[column].between(0, end - 1)
        if not inside.all():
            raise CampaignMismatch(f"fault {plan[~inside].iloc[0].to_dict()} of the plan has a {column} that does not exist")


def _uniform(seed: int, position: int, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1), [count, 3]; row i depends on (seed, position, i) alone: Philox counts up from its key."""
    digest = hashlib.sha256(f"textguard plan {seed} {position}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16])).random_raw(count * 3).reshape(count, 3)
    return (words >> np.uint64(11)) * 2.0**-53
