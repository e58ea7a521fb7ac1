"""Estimate the effects that section `effects` asks for: of one variant against another, and of a design's factors."""

from textguard.analysis.effects import effects_of
from textguard.analysis.files import EFFECTS_FILE
from textguard.artifacts import write_json
from textguard.params import Params


def main(params: Params) -> None:
    wanted = params.effects.contrasts or params.effects.design
    write_json(EFFECTS_FILE, [found.as_json() for found in effects_of(params)] if wanted else [])
