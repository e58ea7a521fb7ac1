"""Class embeddings: the mean direction of what was said about each class, and the file that carries it to the classifier."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from textguard.artifacts import read_safetensors, write_safetensors
from textguard.errors import InvalidEmbeddings

UNIT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ClassEmbeddings:
    """matrix: float32 [C, E], rows of length 1, in label order. The rest says where it comes from; width is E."""

    matrix: Tensor
    dataset: str
    classes: tuple[str, ...]
    encoder: str
    weights_sha256: str
    width: int
    texts: int


def average_by_class(vectors: Tensor, owners: list[str], classes: list[str]) -> Tensor:
    """Normalise each text's vector, average per class, normalise the mean.

    vectors: float32 [N, E]; owners: the class of each of the N texts. Returns [C, E], rows of length 1, in the order of
    `classes`. Raises InvalidEmbeddings for NaN, for zero vectors, and for a class without a text.
    """
    unit = _unit(vectors, "text")
    means = []
    for name in classes:
        rows = [row for row, owner in enumerate(owners) if owner == name]  # D texts
        if not rows:
            raise InvalidEmbeddings(f"class {name!r} has no text")
        unit_de = unit[rows]
        means.append(unit_de.mean(dim=0))
    return _unit(torch.stack(means), "class mean")


def _unit(vectors: Tensor, what: str) -> Tensor:
    if not torch.isfinite(vectors).all():
        raise InvalidEmbeddings(f"a {what} vector holds NaN or infinity")
    length = vectors.norm(dim=1, keepdim=True)
    if (length < 1e-12).any():
        raise InvalidEmbeddings(f"a {what} vector is zero: it has no direction")
    return vectors / length


def save_class_embeddings(path: Path, embeddings: ClassEmbeddings) -> None:
    """Write the matrix with class names and provenance to one safetensors file."""
    described = {name: value for name, value in embeddings.__dict__.items() if name != "matrix"}
    write_safetensors(path, {"class_embeddings": embeddings.matrix}, {"provenance": json.dumps(described)})


def load_class_embeddings(path: Path, dataset: str, classes: list[str]) -> ClassEmbeddings:
    """Read embeddings made for this data set and these classes, in this order.

    Raises InvalidArtifact for a damaged file, InvalidEmbeddings for one of another data set, another class order, a wrong
    shape, NaN, or rows that are not of length 1.
    """
    tensors, metadata = read_safetensors(path, "embeddings")
    try:
        matrix = tensors["class_embeddings"]
        described = json.loads(metadata["provenance"])
        found = ClassEmbeddings(matrix, **{**described, "classes": tuple(described["classes"])})
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InvalidEmbeddings(f"{path} holds no class embeddings; stage 'embeddings' writes it") from error
    remedy = "delete it and run 'dvc repro'"
    if found.dataset != dataset:
        raise InvalidEmbeddings(f"{path} was made for data set {found.dataset!r}, not {dataset!r}; {remedy}")
    if found.classes != tuple(classes):
        differing = [f"{a!r} instead of {b!r}" for a, b in zip(found.classes, classes, strict=False) if a != b]
        detail = differing[0] if differing else f"{len(found.classes)} classes instead of {len(classes)}"
        raise InvalidEmbeddings(f"{path} has other classes or another order ({detail}); {remedy}")
    if matrix.dtype != torch.float32 or matrix.ndim != 2 or matrix.shape != (len(classes), found.width):
        expected = f"float32 {[len(classes), found.width]} as encoder {found.encoder} gives"
        raise InvalidEmbeddings(f"{path} has shape {list(matrix.shape)} {matrix.dtype}, expected {expected}; {remedy}")
    if not torch.isfinite(matrix).all():
        raise InvalidEmbeddings(f"{path} holds NaN or infinity; {remedy}")
    if ((matrix.norm(dim=1) - 1).abs() > UNIT_TOLERANCE).any():
        raise InvalidEmbeddings(f"{path} has rows that are zero or not of length 1; {remedy}")
    return found
