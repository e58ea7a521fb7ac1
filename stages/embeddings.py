"""Encode the texts of one variant and average them per class."""

import sys
from dataclasses import asdict
from pathlib import Path

import torch

from textguard.artifacts import read_classes, read_records, write_safetensors
from textguard.errors import InvalidParameter
from textguard.params import Params
from textguard.runtime import make_deterministic, pick_device
from textguard.text.answers import Description
from textguard.text.embeddings import ClassEmbeddings, EmbeddingOptions, average_by_class, control, save_class_embeddings
from textguard.text.encoders import encode


def main(params: Params, text: str) -> None:
    wanted = params.texts[text]
    classes = read_classes(Path("data") / wanted.dataset / "classes.json")
    descriptions = read_records(Path("prompts") / text / "responses.jsonl", "responses", Description)
    kept = [row for row, said in enumerate(descriptions) if not {"empty", *wanted.drop} & set(said.flags)]
    used = [descriptions[row] for row in kept]
    owners = [said.class_name for said in used]
    told = set(owners)
    silent = [name for name in classes if name not in told]
    if silent:
        where = f"params.yaml texts.{text}.drop and prompts/{text}"
        raise InvalidParameter(f"class {silent[0]!r} has no text left (and {len(silent) - 1} more); see {where}")

    make_deterministic(0)
    encoded = encode(params.encoder, [said.text for said in used], pick_device())
    if len(kept) < len(descriptions):
        print(f"embeddings {text}: {len(descriptions) - len(kept)} of {len(descriptions)} texts left out", file=sys.stderr)
    options = EmbeddingOptions(**asdict(wanted.embedding))
    templates = [said.provider == "template" for said in used] if wanted.templates else None
    matrix_ce = average_by_class(encoded.vectors, owners, classes, options, templates)
    matrix_ce = control(matrix_ce, options.vectors, options.seed)
    provenance = (wanted.dataset, tuple(classes), params.encoder, encoded.weights_sha256, matrix_ce.shape[1], len(used))
    embeddings = ClassEmbeddings(matrix_ce, *provenance, encoded.shortened, options)
    write_safetensors(
        Path("embeddings") / f"{text}.texts.safetensors", {"vectors": encoded.vectors, "rows": torch.tensor(kept)}
    )
    save_class_embeddings(Path("embeddings") / f"{text}.safetensors", embeddings)
