"""Ask every question of one text variant about every class."""

from dataclasses import asdict
from pathlib import Path

from textguard.artifacts import read_classes, write_json_lines
from textguard.params import Params
from textguard.text.questions import ask


def main(params: Params, text: str) -> None:
    classes = read_classes(Path("data") / params.texts[text].dataset / "classes.json")
    questions = ask(classes, params.texts[text].questions, f"params.yaml texts.{text}.questions")
    write_json_lines(Path("prompts") / text / "questions.jsonl", [asdict(question) for question in questions])
