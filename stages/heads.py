"""Write what the head of every variant starts from: no rows, a text's class embeddings, or what a treatment asks for."""

import shutil
from pathlib import Path

from torch import Tensor

from textguard.artifacts import read_classes
from textguard.errors import InvalidEmbeddings
from textguard.params import Params
from textguard.text.embeddings import load_class_embeddings, save_width
from textguard.text.encoders import encoder_width
from textguard.text.starts import start_rows


def main(params: Params, dataset: str) -> None:
    classes = read_classes(Path("data") / dataset / "classes.json")
    folder = Path("models") / "heads" / dataset
    folder.mkdir(parents=True, exist_ok=True)
    for variant in params.variants:
        file = folder / f"{variant}.safetensors"
        if variant in params.texts:
            _copy(embedded(dataset, variant), file, dataset, classes)
        else:
            _save(params, variant, file, dataset, classes)


def embedded(dataset: str, text: str) -> Path:
    """The file of a text's class embeddings."""
    return Path("embeddings") / f"{dataset}-{text}.safetensors"


def _copy(source: Path, file: Path, dataset: str, classes: list[str]) -> None:
    load_class_embeddings(source, dataset, classes)
    shutil.copyfile(source, file)


def _save(params: Params, variant: str, file: Path, dataset: str, classes: list[str]) -> None:
    treatment, rows = params.treatment(variant), None
    text = load_class_embeddings(embedded(dataset, treatment.text), dataset, classes) if treatment.text else None
    width = treatment.width
    if width is None:
        width = text.width if text else encoder_width(params.encoder)
    if treatment.start != "torch":
        rows = _rows(treatment.start, classes, width, text.matrix if text else None, treatment.start_seed, variant)
    save_width(file, dataset, classes, width, rows)


def _rows(start: str, classes: list[str], width: int, text: Tensor | None, seed: int, variant: str) -> Tensor:
    try:
        return start_rows(start, len(classes), width, text, seed)
    except InvalidEmbeddings as error:
        raise InvalidEmbeddings(f"params.yaml treatments.{variant}: {error}") from error
