"""State the width of the text encoder: all that a randomly initialised text-guided head needs to know of it."""

from pathlib import Path

from textguard.artifacts import write_json
from textguard.params import ENCODER_FILE, Params
from textguard.text.encoders import encoder_width


def main(params: Params) -> None:
    write_json(Path(ENCODER_FILE), {"encoder": params.encoder, "width": encoder_width(params.encoder)})
