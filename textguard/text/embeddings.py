"""Class embeddings: the mean direction of what was said about each class, and the file that carries it to the classifier."""

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from textguard.artifacts import as_record, oddity, parse_json, read_pth, read_safetensors, reading, write_safetensors
from textguard.errors import InvalidArtifact, InvalidEmbeddings, printable
from textguard.text.row_map import read_row_map

UNIT_TOLERANCE = 1e-4
PROVENANCE = {"dataset": str, "encoder": str, "weights_sha256": str, "width": int, "texts": int, "shortened": int}
LARGEST_WIDTH = 65_536  # several times that of any text encoder


@dataclass(frozen=True)
class EmbeddingOptions:
    """How texts become class embeddings.

    unit_before, unit_after: normalise each text's vector before, and each class's mean after averaging. vectors: `encoder`,
    or what it is compared with, see `control`; seed: of those that are drawn. template_weight: of all templates in a class's
    mean, where there are templates beside descriptions.
    """

    unit_before: bool
    unit_after: bool
    vectors: str
    seed: int
    template_weight: float


@dataclass(frozen=True)
class ClassEmbeddings:
    """matrix: float32 [C, E] in label order, rows of length 1 if options.unit_after. The rest says where it comes from.

    width: E. texts: how many were averaged. shortened: how many of them were longer than the encoder's context.
    """

    matrix: Tensor
    dataset: str
    classes: tuple[str, ...]
    encoder: str
    weights_sha256: str
    width: int
    texts: int
    shortened: int
    options: EmbeddingOptions


def average_by_class(
    vectors: Tensor, owners: list[str], classes: list[str], options: EmbeddingOptions, templates: list[bool] | None = None
) -> Tensor:
    """Average the texts of each class, normalised before and after as the options say.

    vectors: float32 [N, E]; owners: the class of each of the N texts; templates: which of them share options.template_weight,
    the others share the rest; None: all count the same. Returns [C, E] in the order of `classes`. Raises InvalidEmbeddings
    for NaN, for zero vectors, and for a class without a text.
    """
    unit = _unit(vectors, "text")
    scaled = unit if options.unit_before else vectors
    means = []
    for name in classes:
        rows = [row for row, owner in enumerate(owners) if owner == name]  # D texts
        if not rows:
            raise InvalidEmbeddings(f"class {name!r} has no text")
        if templates is None:
            means.append(scaled[rows].mean(dim=0))
        else:
            means.append(_ensemble(scaled[rows], torch.tensor([templates[row] for row in rows]), options.template_weight, name))
    matrix_ce = torch.stack(means)
    unit_ce = _unit(matrix_ce, "class mean")
    return unit_ce if options.unit_after else matrix_ce


def _ensemble(vectors_de: Tensor, is_template: Tensor, template_weight: float, name: str) -> Tensor:
    if is_template.all() or not is_template.any():
        raise InvalidEmbeddings(f"class {name!r} has no {'description' if is_template.any() else 'template'}")
    descriptions_e, templates_e = vectors_de[~is_template].mean(dim=0), vectors_de[is_template].mean(dim=0)
    return (1 - template_weight) * descriptions_e + template_weight * templates_e


def control(matrix_ce: Tensor, vectors: str, seed: int) -> Tensor:
    """What class embeddings are compared with, to ask whether it is the meaning of the text that helps.

    encoder    the embeddings themselves
    shuffled   the same rows, each at another class's place
    random     unit vectors that mean nothing, drawn so that their mean pairwise cosine is that of the embeddings
    one_hot    class i has the i-th unit vector; needs C <= E
    matrix_ce: float32 [C, E]. Returns [C, E]. Raises InvalidEmbeddings.
    """
    return CONTROLS[vectors](matrix_ce, torch.Generator().manual_seed(seed))


def _shuffled(matrix_ce: Tensor, generator: torch.Generator) -> Tensor:
    places = torch.arange(len(matrix_ce))
    order = places
    while (order == places).any():  # a permutation that moves every row: e draws on average
        order = torch.randperm(len(matrix_ce), generator=generator)
    return matrix_ce[order]


def _random(matrix_ce: Tensor, generator: torch.Generator) -> Tensor:
    wanted = mean_cosine(matrix_ce)
    classes, width = matrix_ce.shape
    if width < 2:
        raise InvalidEmbeddings(f"random vectors need a width of 2 or more, not {width}")
    common_e = _unit(torch.randn(1, width, generator=generator, dtype=torch.float64), "random")
    drawn_ce = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    own_ce = _unit(drawn_ce - drawn_ce @ common_e.T * common_e, "random")
    # With a common part of length a, two rows have the cosine a^2 + (1 - a^2) * the cosine of their own parts.
    drawn = mean_cosine(own_ce)
    share = (wanted - drawn) / (1 - drawn)
    if share < 0:
        raise InvalidEmbeddings(f"no random vectors were found whose mean cosine is {wanted:.3f}; try another embedding.seed")
    return (share**0.5 * common_e + (1 - share) ** 0.5 * own_ce).float()


def _one_hot(matrix_ce: Tensor, generator: torch.Generator) -> Tensor:
    classes, width = matrix_ce.shape
    if classes > width:
        raise InvalidEmbeddings(
            f"one-hot vectors need a width of {classes} or more, the encoder's is {width}; change params.yaml encoder"
        )
    return torch.eye(classes, width)


CONTROLS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "encoder": lambda matrix_ce, generator: matrix_ce,
    "shuffled": _shuffled,
    "random": _random,
    "one_hot": _one_hot,
}


def mean_cosine(matrix_ce: Tensor) -> float:
    """The mean cosine over all pairs of different rows of [C, E]."""
    classes = len(matrix_ce)
    unit_ce = _unit(matrix_ce.double(), "class")
    return float((unit_ce.sum(dim=0).square().sum() - classes) / (classes * (classes - 1)))


def _unit(vectors: Tensor, what: str) -> Tensor:
    if not torch.isfinite(vectors).all():
        raise InvalidEmbeddings(f"a {what} vector holds NaN or infinity")
    length = vectors.norm(dim=1, keepdim=True)
    if (length < 1e-12).any():
        raise InvalidEmbeddings(f"a {what} vector is zero: it has no direction")
    return vectors / length


def save_class_embeddings(path: Path, embeddings: ClassEmbeddings) -> None:
    """Write the matrix with class names and provenance to one safetensors file."""
    described = {name: value for name, value in embeddings.__dict__.items() if name not in ("matrix", "options")}
    provenance = json.dumps(described | {"options": asdict(embeddings.options)})
    write_safetensors(path, {"class_embeddings": embeddings.matrix}, {"provenance": provenance})


def load_class_embeddings(path: Path, dataset: str, classes: list[str], made_by: str = "embeddings") -> ClassEmbeddings:
    """Read embeddings made for this data set and these classes, in this order, from a file that stage `made_by` writes.

    Raises InvalidArtifact for a damaged file, InvalidEmbeddings for one of another data set, another class order, a wrong
    shape, NaN, zero rows, or rows that are not of length 1 where they should be.
    """
    tensors, metadata = read_safetensors(path, made_by)
    try:
        matrix = tensors["class_embeddings"]
        described = parse_json(metadata["provenance"])
        options = as_record(described["options"], EmbeddingOptions)
        found = ClassEmbeddings(matrix, **{**described, "classes": tuple(described["classes"]), "options": options})
        if any(type(getattr(found, name)) is not kind for name, kind in PROVENANCE.items()):
            raise TypeError("a value of another type")
    except (KeyError, TypeError, AttributeError, InvalidArtifact, ValueError, RecursionError) as error:
        raise InvalidEmbeddings(f"{path} holds no class embeddings; stage {made_by!r} writes it") from error
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
    length = matrix.norm(dim=1)
    if (length < UNIT_TOLERANCE).any() or (options.unit_after and ((length - 1).abs() > UNIT_TOLERANCE).any()):
        raise InvalidEmbeddings(f"{path} has rows that are zero or not of length 1; {remedy}")
    return found


def load_text_features(path: Path, classes: list[str], row_map: Path | None = None) -> Tensor:
    """Published class embeddings: a .pth file that holds one float tensor [C, E], its rows in the order of `classes`.

    ImageNet's are in the order of its WNIDs, as the class list is. The file does not name its classes: only their number can be
    checked. row_map: where the file has other classes, the rows whose mean stands for each of `classes`; see `read_row_map`.
    Returns float32 [C, E], rows normalised. Raises InvalidArtifact, InvalidEmbeddings.
    """
    matrix = read_pth(path)
    rows = read_row_map(row_map, classes) if row_map else None
    if isinstance(matrix, Tensor) and (odd := oddity(matrix)):
        raise InvalidEmbeddings(f"{path} holds {odd.rstrip(',')}; dense floats are needed; change params.yaml texts.*.cache")
    if (
        not isinstance(matrix, Tensor)
        or not matrix.is_floating_point()
        or matrix.ndim != 2
        or (len(matrix) != len(classes) and not rows)
    ):
        found = f"{list(matrix.shape)} {matrix.dtype}" if isinstance(matrix, Tensor) else type(matrix).__name__
        raise InvalidEmbeddings(
            f"{path} holds {found}; one tensor [{len(classes)}, E] of floats is needed, a row per class in the order of "
            "classes.json, or beside it a .json file that maps classes to rows; change params.yaml texts.*.cache"
        )
    if rows and (most := max(itertools.chain(*rows))) >= len(matrix):
        raise InvalidEmbeddings(f"{row_map} names row {most}, and {path} has rows 0 to {len(matrix) - 1}")
    try:
        matrix = _unit(matrix.float(), "class")
        return _unit(torch.stack([matrix[own].mean(dim=0) for own in rows]), "class") if rows else matrix
    except InvalidEmbeddings as error:
        raise InvalidEmbeddings(f"{path}: {error}; change params.yaml texts.*.cache") from error


def save_width(path: Path, dataset: str, classes: list[str], width: int, rows: Tensor | None = None) -> None:
    """Write what a head that is no text's starts from: its width E, 0 for none, its classes, and its rows where it has some.

    rows: float32 [C, E], the head's first weights; None for those that torch draws.
    """
    tensors = {} if rows is None else {"class_embeddings": rows}
    write_safetensors(path, tensors, {"head": json.dumps({"dataset": dataset, "classes": classes, "width": width})})


def load_head(
    path: Path, dataset: str, classes: list[str], start: str, *, latent: bool = True, encoder: str = ""
) -> tuple[int, Tensor | None]:
    """Width E and first weights of a head for this data set and these classes, as stage `heads` writes them.

    start: what the file must hold: `text`, class embeddings; `rows`, others; `torch`, a width alone, which is 0 unless latent.
    encoder: which class embeddings must come from, where that is known. Returns (0, None) for no head behind a latent layer,
    (E, None) for one that torch starts, (E, float32 [C, E]) for one that starts from rows. Raises InvalidArtifact,
    InvalidEmbeddings.
    """
    tensors, metadata = read_safetensors(path, "heads")
    if start == "text" and "head" not in metadata:
        found = load_class_embeddings(path, dataset, classes, "heads")
        if encoder and found.encoder != encoder:
            said = f"{path} comes from encoder {printable(found.encoder, 100)!r}, and params.yaml names {encoder!r}"
            raise InvalidEmbeddings(f"{said}; delete it and run 'dvc repro'")
        return found.width, found.matrix
    least, most = (1, LARGEST_WIDTH) if latent else (0, 0)
    with reading(path, "heads"):
        if "head" not in metadata:
            raise InvalidArtifact("does not state the width of a head")
        stated = parse_json(metadata["head"])
        if (stated["dataset"], stated["classes"]) != (dataset, classes):
            raise InvalidArtifact(f"was made for other classes, of data set {stated['dataset']!r}")
        if start == "text":
            raise InvalidArtifact("states the width of a head, and holds no class embeddings to start it from")
        width = stated["width"]
        if type(width) is not int or not least <= width <= most:
            raise InvalidArtifact(
                f"states the width {printable(str(width), 60)}; it must be a whole number from {least} to {most}"
            )
        if start == "torch":
            return width, None
        rows = tensors.get("class_embeddings")
        if rows is None or rows.dtype != torch.float32 or rows.shape != (len(classes), width) or not torch.isfinite(rows).all():
            raise InvalidArtifact(f"holds no {len(classes)} finite float32 rows of {width} numbers to start a head from")
        return width, rows
