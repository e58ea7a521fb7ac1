"""Say and show how good the class embeddings of one text variant are."""

from pathlib import Path

import numpy as np

from textguard.artifacts import read_classes, read_records, read_safetensors, reading, write_csv
from textguard.errors import InvalidArtifact
from textguard.params import Params
from textguard.report.text_figures import draw_projection, draw_similarity
from textguard.schema.base import write
from textguard.schema.texts import TextQuality
from textguard.text.answers import Description
from textguard.text.embeddings import load_class_embeddings
from textguard.text.quality import measure_quality, principal_components, unit_means


def main(params: Params, text: str) -> None:
    dataset = params.class_texts[text].dataset
    classes = read_classes(Path("data") / dataset / "classes.json")
    embeddings = load_class_embeddings(Path("embeddings") / f"{text}.safetensors", dataset, classes)
    descriptions = read_records(Path("prompts") / text / "responses.jsonl", "responses", Description)
    path = Path("embeddings") / f"{text}.texts.safetensors"
    tensors, _ = read_safetensors(path, "embeddings")
    with reading(path, "embeddings"):
        rows, vectors_ne = tensors["rows"].numpy(), tensors["vectors"].numpy()
        if len(rows) != len(vectors_ne) or len(rows) != embeddings.texts or rows.max() >= len(descriptions):
            raise InvalidArtifact("holds other texts than the class embeddings")

    quality = measure_quality(classes, embeddings.matrix.numpy(), descriptions, rows, vectors_ne)
    owners = np.array([classes.index(descriptions[row].class_name) for row in rows])
    points_n2, means_c2, shown = principal_components(*unit_means(vectors_ne, owners, len(classes)))
    figures, dpi = Path("plots") / "texts" / text, params.figures.dpi
    draw_similarity(quality.similarity, classes, f"{text}: class embeddings", figures / "similarity", dpi)
    draw_projection(points_n2, owners, means_c2, classes, shown, f"{text}: texts", figures / "projection", dpi)
    metrics = Path("metrics") / "texts"
    write_csv(metrics / f"{text}.csv", quality.per_class)
    said = {"encoder": embeddings.encoder, "shortened": embeddings.shortened}
    write(metrics / f"{text}.json", TextQuality, quality.summary | said)
