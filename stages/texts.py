"""What the stages of one text variant read: its questions and its answers, which must be those that params.yaml asks for."""

from pathlib import Path

from textguard.artifacts import read_classes, read_records, reading
from textguard.errors import InvalidArtifact
from textguard.params import Params
from textguard.text.answers import Description
from textguard.text.cleaning import FLAGS
from textguard.text.questions import Question, Wording, ask


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
    return Path("prompts") / key / "questions.jsonl"


def read_questions(params: Params, key: str) -> list[Question]:
    """The questions of a text variant, as stage `prompts` wrote them. Raises InvalidArtifact where params.yaml asks others."""
    path = question_file(key)
    found, wanted = read_records(path, "prompts", Question), ask_all(params, key)
    with reading(path, "prompts"):
        if found != wanted:
            pairs = zip(found, wanted, strict=False)
            other = next((f"{one.text!r} of {one.class_name!r}" for one, right in pairs if one != right), "")
            what = other or f"{len(found)} instead of {len(wanted)}"
            raise InvalidArtifact(
                f"holds other questions than params.yaml and data set {key.rpartition('-')[0]} ask for ({what})"
            )
    return found


def read_descriptions(params: Params, key: str, classes: list[str]) -> list[Description]:
    """The answers of a text variant and its templates, as stage `responses` wrote them.

    Raises InvalidArtifact for those of other classes, questions or samples, and for flags and texts that no answer has.
    """
    path, wanted = Path("prompts") / key / "responses.jsonl", params.class_texts[key].params
    found = read_records(path, "responses", Description)
    samples = 1 if wanted.provider in ("features", "template") else wanted.samples
    asked = [
        (q.class_name, q.id, q.text, n) for q in read_records(question_file(key), "prompts", Question) for n in range(samples)
    ]
    with reading(path, "responses"):
        if len(found) != len(asked) + len(classes) * len(wanted.templates):
            expected = f"{len(asked)} answers and {len(wanted.templates)} templates for each of {len(classes)} classes"
            raise InvalidArtifact(f"holds {len(found)} texts instead of {expected}")
        for number, said in enumerate(found, start=1):
            if said.class_name not in classes:
                raise InvalidArtifact(f"line {number} is of class {said.class_name!r}, which data/*/classes.json does not hold")
            given = said.class_name, said.question_id, said.question, said.sample
            if given != asked[number - 1] if number <= len(asked) else said.provider != "template":
                raise InvalidArtifact(f"line {number} answers another question than questions.jsonl asks there")
            if unknown := [flag for flag in said.flags if flag not in FLAGS]:
                raise InvalidArtifact(f"line {number} has the flag {unknown[0]!r}; known: {', '.join(FLAGS)}")
            if not said.text.strip() and "empty" not in said.flags:
                raise InvalidArtifact(f"line {number} has no text, and is not flagged as empty")
    return found


def rows_to_embed(descriptions: list[Description], drop: list[str]) -> list[int]:
    """Which texts are embedded: those that are not empty and have no flag that is to be dropped."""
    return [row for row, said in enumerate(descriptions) if not {"empty", *drop} & set(said.flags)]
