"""Ask every question of one text variant about every class."""

from dataclasses import asdict
from pathlib import Path

from textguard.artifacts import read_classes, write_json_lines
from textguard.params import Params
from textguard.text.questions import Wording, ask


def main(params: Params, text: str) -> None:
    wanted = params.texts[text]
    classes = read_classes(Path("data") / wanted.dataset / "classes.json")
    templates = wanted.questions[: wanted.limit_questions or None]
    questions = ask(classes, templates, Wording(wanted.context, wanted.phrases), f"params.yaml texts.{text}.questions")
    write_json_lines(Path("prompts") / text / "questions.jsonl", [asdict(question) for question in questions])
