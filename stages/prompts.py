"""Ask every question of one text variant about every class."""

from dataclasses import asdict
from pathlib import Path

from textguard.artifacts import write_json_lines
from textguard.params import Params
from textguard.text.questions import ask
from textguard.vision.datasets import load_classes


def main(params: Params, text: str) -> None:
    classes = load_classes(Path("data") / params.texts[text].dataset)
    questions = ask(classes, params.texts[text].questions, f"params.yaml texts.{text}.questions")
    write_json_lines(Path("prompts") / text / "questions.jsonl", [asdict(question) for question in questions])
