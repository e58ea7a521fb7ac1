"""Ask every question of one text variant about every class of one data set."""

from dataclasses import asdict
from pathlib import Path

from textguard.artifacts import read_classes, write_json_lines
from textguard.params import Params
from textguard.text.questions import Wording, ask


def main(params: Params, key: str) -> None:
    texts = params.class_texts[key]
    dataset, wanted = params.datasets[texts.dataset], texts.params
    classes = read_classes(Path("data") / texts.dataset / "classes.json")
    templates = wanted.questions[: wanted.limit_questions or None]
    wording = Wording(dataset.context, dataset.phrases)
    questions = ask(classes, templates, wording, f"params.yaml texts.{texts.variant}.questions")
    write_json_lines(Path("prompts") / key / "questions.jsonl", [asdict(question) for question in questions])
