"""Write what the head of every variant starts from: no rows, a text's class embeddings, or what a treatment asks for."""

import shutil
from pathlib import Path

from torch import Tensor

from textguard.artifacts import read_classes
from textguard.errors import InvalidEmbeddings
from textguard.params import Params, TreatmentParams, embedding_file
from textguard.text.embeddings import ClassEmbeddings, load_class_embeddings, save_width
from textguard.text.encoders import encoder_width
from textguard.text.starts import start_rows


def main(params: Params, dataset: str) -> None:
    classes, folder = read_classes(Path("data") / dataset / "classes.json"), Path("models") / "heads" / dataset
    treatments = {variant: params.treatment(variant) for variant in params.variants}
    told = {treatment.text for treatment in treatments.values() if treatment.text}
    sources = {text: embedding_file(dataset, text) for text in sorted(told)}
    texts = {text: load_class_embeddings(file, dataset, classes) for text, file in sources.items()}
    starts = {
        variant: _start(
            treatment, classes, texts.get(treatment.text or ""), params.encoder, f"params.yaml treatments.{variant}"
        )
        for variant, treatment in treatments.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    for variant, (width, rows) in starts.items():
        file = folder / f"{variant}.safetensors"
        if variant in params.texts:
            shutil.copyfile(sources[variant], file)  # with where it comes from
        else:
            save_width(file, dataset, classes, width, rows)


def _start(
    treatment: TreatmentParams, classes: list[str], text: ClassEmbeddings | None, encoder: str, where: str
) -> tuple[int, Tensor | None]:
    """Width E of a head, 0 for none, and its first rows [C, E]; None for those that torch draws. Raises InvalidEmbeddings."""
    width = treatment.width
    if width is None:
        width = text.width if text else encoder_width(encoder)
    if treatment.start == "torch":
        return width, None
    try:
        rows = start_rows(treatment.start, len(classes), width, text.matrix if text else None, treatment.start_seed)
    except InvalidEmbeddings as error:
        raise InvalidEmbeddings(f"{where}: {error}") from error
    return width, rows
