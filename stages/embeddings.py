"""Encode the answers of one text variant and average them per class."""

from pathlib import Path

from textguard.artifacts import read_classes, read_records
from textguard.params import Params
from textguard.runtime import pick_device
from textguard.text.answers import Description
from textguard.text.embeddings import ClassEmbeddings, average_by_class, save_class_embeddings
from textguard.text.encoders import encode


def main(params: Params, text: str) -> None:
    dataset = params.texts[text].dataset
    classes = read_classes(Path("data") / dataset / "classes.json")
    answers = read_records(Path("prompts") / text / "responses.jsonl", "responses", Description)
    encoded = encode(params.encoder, [answer.text for answer in answers], pick_device())
    matrix_ce = average_by_class(encoded.vectors, [answer.class_name for answer in answers], classes)
    embeddings = ClassEmbeddings(
        matrix_ce, dataset, tuple(classes), params.encoder, encoded.weights_sha256, matrix_ce.shape[1], len(answers)
    )
    save_class_embeddings(Path("embeddings") / f"{text}.safetensors", embeddings)
