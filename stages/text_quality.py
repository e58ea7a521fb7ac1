"""Say and show how good the class embeddings of one text variant are."""

from dataclasses import asdict
from pathlib import Path

import torch

from stages.texts import read_descriptions, rows_to_embed
from textguard.artifacts import read_classes, read_safetensors, reading, write_csv
from textguard.errors import InvalidArtifact, InvalidEmbeddings
from textguard.params import Params, embedding_file
from textguard.report.text_figures import draw_similarity
from textguard.schema.base import write
from textguard.schema.texts import TextQuality
from textguard.text.embeddings import ClassEmbeddings, EmbeddingOptions, load_class_embeddings
from textguard.text.quality import measure_quality


def main(params: Params, text: str) -> None:
    dataset, variant = params.class_texts[text].dataset, params.class_texts[text].variant
    classes = read_classes(Path("data") / dataset / "classes.json")
    embeddings = load_class_embeddings(embedding_file(dataset, variant), dataset, classes)
    _check_origin(embeddings, params, text)
    descriptions = read_descriptions(params, text, classes)
    kept = rows_to_embed(descriptions, params.class_texts[text].params.drop)
    path = embedding_file(dataset, variant).with_suffix(".texts.safetensors")
    tensors, _ = read_safetensors(path, "embeddings")
    with reading(path, "embeddings"):
        rows, vectors = tensors["rows"], tensors["vectors"]
        if rows.dtype != torch.int64 or rows.tolist() != kept or len(kept) != embeddings.texts:
            raise InvalidArtifact("holds other texts than the class embeddings and the answers")
        if vectors.dtype != torch.float32 or vectors.shape != (len(kept), embeddings.width):
            expected = f"float32 {[len(kept), embeddings.width]}"
            raise InvalidArtifact(f"has vectors of shape {list(vectors.shape)} {vectors.dtype}, expected {expected}")
        if not torch.isfinite(vectors).all() or (vectors.norm(dim=1) < 1e-12).any():
            raise InvalidArtifact("holds a vector that is zero, or has NaN or infinity in it")
    rows, vectors_ne = rows.numpy(), vectors.numpy()

    quality = measure_quality(classes, embeddings.matrix.numpy(), descriptions, rows, vectors_ne)
    draw_similarity(quality.similarity, classes, text, Path("plots") / "texts" / text / "similarity", params.figures.dpi)
    metrics = Path("metrics") / "texts"
    write_csv(metrics / f"{text}.csv", quality.per_class)
    said = {"encoder": embeddings.encoder, "shortened": embeddings.shortened}
    write(metrics / f"{text}.json", TextQuality, quality.summary | said)


def _check_origin(embeddings: ClassEmbeddings, params: Params, text: str) -> None:
    """Raise InvalidEmbeddings where they were made with another encoder, or in another way, than params.yaml says."""
    texts = params.class_texts[text]
    encoder = f"features:{Path(texts.features).name}" if texts.features else params.encoder
    if (embeddings.encoder, embeddings.options) != (encoder, EmbeddingOptions(**asdict(texts.params.embedding))):
        raise InvalidEmbeddings(
            f"{embedding_file(texts.dataset, texts.variant)} was made with encoder {embeddings.encoder} and "
            f"{embeddings.options}, not as params.yaml says; run 'dvc repro'"
        )
