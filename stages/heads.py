"""State the width of the heads that no text tells anything: none for a baseline, the encoder's for a random start."""

from pathlib import Path

from textguard.artifacts import read_classes
from textguard.params import BASELINE, RANDOM, Params
from textguard.text.embeddings import save_width
from textguard.text.encoders import encoder_width


def main(params: Params, dataset: str) -> None:
    classes = read_classes(Path("data") / dataset / "classes.json")
    for variant, width in ((BASELINE, 0), (RANDOM, encoder_width(params.encoder))):
        save_width(Path("embeddings") / f"{dataset}-{variant}.safetensors", dataset, classes, width)
