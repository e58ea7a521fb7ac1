"""Encode the texts of one variant about one data set, and average them per class."""

import sys
from dataclasses import asdict
from pathlib import Path

import torch

from stages.texts import read_descriptions, rows_to_embed
from textguard.artifacts import read_classes, sha256_of_file, write_safetensors
from textguard.errors import InvalidParameter
from textguard.params import Params, embedding_file
from textguard.runtime import make_deterministic, pick_device
from textguard.text.embeddings import (
    ClassEmbeddings,
    EmbeddingOptions,
    average_by_class,
    control,
    load_text_features,
    save_class_embeddings,
)
from textguard.text.encoders import EncodedTexts, encode


def main(params: Params, key: str) -> None:
    texts = params.class_texts[key]
    wanted = texts.params
    classes = read_classes(Path("data") / texts.dataset / "classes.json")
    descriptions = read_descriptions(params, key, classes)
    kept = rows_to_embed(descriptions, wanted.drop)
    used = [descriptions[row] for row in kept]
    owners = [said.class_name for said in used]
    told = set(owners)
    silent = [name for name in classes if name not in told]
    if silent:
        where = f"params.yaml texts.{texts.variant}.drop and prompts/texts/{key}"
        raise InvalidParameter(f"class {silent[0]!r} has no text left (and {len(silent) - 1} more); see {where}")

    make_deterministic(0)
    if texts.features:
        features = Path(params.root) / texts.features
        row_map = Path(params.root) / texts.row_map if texts.row_map else None
        encoded = EncodedTexts(load_text_features(features, classes, row_map), sha256_of_file(features, ""), 0)
    else:
        encoded = encode(params.encoder, [said.text for said in used], pick_device())
    if len(kept) < len(descriptions):
        print(f"embeddings {key}: {len(descriptions) - len(kept)} of {len(descriptions)} texts left out", file=sys.stderr)
    if encoded.shortened:
        what = f"{encoded.shortened} of {len(kept)} texts are longer than the encoder reads, and were cut"
        print(f"embeddings {key}: {what}", file=sys.stderr)
    options = EmbeddingOptions(**asdict(wanted.embedding))
    templates = [said.provider == "template" for said in used] if wanted.templates else None
    matrix_ce = average_by_class(encoded.vectors, owners, classes, options, templates)
    matrix_ce = control(matrix_ce, options.vectors, options.seed)
    provenance = (texts.dataset, tuple(classes), params.encoder_of(key), encoded.weights_sha256, matrix_ce.shape[1], len(used))
    embeddings = ClassEmbeddings(matrix_ce, *provenance, encoded.shortened, options)
    file = embedding_file(texts.dataset, texts.variant)
    write_safetensors(file.with_suffix(".texts.safetensors"), {"vectors": encoded.vectors, "rows": torch.tensor(kept)})
    save_class_embeddings(file, embeddings)
