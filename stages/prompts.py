"""Ask every question of one text variant about every class of one data set."""

from dataclasses import asdict
from pathlib import Path

from textguard.artifacts import read_classes, write_json_lines
from textguard.params import Params
from textguard.text.questions import Question, Wording, ask


def main(params: Params, key: str) -> None:
    write_json_lines(question_file(key), [asdict(question) for question in ask_all(params, key)])


def ask_all(params: Params, key: str) -> list[Question]:
    """Every question of a text variant about every class of its data set."""
    texts = params.class_texts[key]
    dataset, wanted = params.datasets[texts.dataset], texts.params
    classes = read_classes(Path("data") / texts.dataset / "classes.json")
    templates = wanted.questions[: wanted.limit_questions or None]
    wording = Wording(dataset.context, dataset.phrases)
    return ask(classes, templates, wording, f"params.yaml texts.{texts.variant}.questions")


def question_file(key: str) -> Path:
    """Where the questions of a text variant lie."""
    return Path("prompts") / "texts" / key / "questions.jsonl"
