"""How good class embeddings are, in numbers: how far classes lie apart, and how much their texts differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from textguard.text.answers import Description
from textguard.text.cleaning import FLAGS


@dataclass(frozen=True)
class Quality:
    """similarity: cosines of class embeddings, [C, C]. per_class: a row per class. summary: what a metrics file holds."""

    similarity: np.ndarray
    per_class: pd.DataFrame
    summary: dict[str, Any]


def measure_quality(
    classes: Sequence[str], matrix_ce: np.ndarray, descriptions: Sequence[Description], rows: np.ndarray, vectors_ne: np.ndarray
) -> Quality:
    """Measure the quality of class embeddings [C, E] and of the texts behind them.

    descriptions: all answers; rows: those that were embedded, as vectors [N, E]. Per class:
    nearest_wrong, cosine: the class whose embedding is most similar, and how similar it is.
    spread: mean cosine distance of its texts from their mean direction; 0 where all texts have the same direction.
    strays: texts that are more similar to another class's texts than to the other texts of their own class.
    off_class: strays that do not name their class.
    Flags are counted over all answers, whether they were embedded or not.
    """
    similarity = cosines(matrix_ce)
    others = similarity - 2 * np.eye(len(classes))
    nearest = others.argmax(axis=1)
    owners = np.array([classes.index(descriptions[row].class_name) for row in rows])
    unit = _unit(vectors_ne)
    means = np.stack([unit[owners == index].mean(axis=0) for index in range(len(classes))])
    stray = _strays(unit, means, owners)
    unnamed = np.array(["unnamed" in descriptions[row].flags for row in rows])
    said_of: dict[str, list[Description]] = {name: [] for name in classes}
    for said in descriptions:
        said_of[said.class_name].append(said)
    table = []
    for index, (name, said) in enumerate(said_of.items()):
        mine = owners == index
        table.append(
            {
                "class": name,
                "answers": len(said),
                "embedded": mine.sum(),
                "words": np.mean([len(one.text.split()) for one in said]),
                "spread": 1 - np.linalg.norm(means[index]),
                "nearest_wrong": classes[nearest[index]],
                "cosine": others[index, nearest[index]],
                "strays": stray[mine].sum(),
                "off_class": (stray & unnamed)[mine].sum(),
                **{flag: sum(flag in one.flags for one in said) for flag in FLAGS},
            }
        )
    per_class = pd.DataFrame(table)
    off_diagonal = similarity[~np.eye(len(classes), dtype=bool)]
    closest = int(per_class["cosine"].argmax())
    counts = ["answers", "embedded", "strays", "off_class", *FLAGS]
    summary = {
        "classes": len(classes),
        "mean_pairwise_cosine": float(off_diagonal.mean()),
        "largest_cosine": float(off_diagonal.max()),
        "closest_classes": [classes[closest], str(per_class["nearest_wrong"][closest])],
        "mean_spread": float(per_class["spread"].mean()),
        **{name: int(per_class[name].sum()) for name in counts},
    }
    return Quality(similarity, per_class, summary)


def cosines(matrix_ce: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of rows of [C, E], as float64 [C, C]."""
    unit = _unit(matrix_ce)
    return unit @ unit.T


def _strays(unit_ne: np.ndarray, means_ce: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Which texts are more similar to another class's mean than to the mean of the other texts of their own class."""
    counts = np.bincount(owners)[owners]
    rest = means_ce[owners] * counts[:, None] - unit_ne  # zero where a class has one text, which is no stray
    own = (unit_ne * rest).sum(axis=1) / np.maximum(np.linalg.norm(rest, axis=1), 1e-12)
    cosine = unit_ne @ _unit(means_ce).T
    cosine[np.arange(len(owners)), owners] = -np.inf
    return (counts > 1) & (cosine.max(axis=1) > own)


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
