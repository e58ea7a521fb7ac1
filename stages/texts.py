"""What the stages of one text variant read: its questions and its answers, which must be those that params.yaml asks for."""

from pathlib import Path

from stages.prompts import ask_all, question_file
from textguard.artifacts import read_records, reading
from textguard.errors import InvalidArtifact
from textguard.params import Params
from textguard.text.answers import Description
from textguard.text.cleaning import FLAGS
from textguard.text.questions import Question


def read_questions(params: Params, key: str) -> list[Question]:
    """The questions of a text variant, as stage `prompts` wrote them. Raises InvalidArtifact where params.yaml asks others."""
    path = question_file(key)
    found, wanted = read_records(path, "prompts", Question), ask_all(params, key)
    with reading(path, "prompts"):
        if found != wanted:
            pairs = zip(found, wanted, strict=False)
            other = next((f"{one.text!r} of {one.class_name!r}" for one, right in pairs if one != right), "")
            what = other or f"{len(found)} instead of {len(wanted)}"
            raise InvalidArtifact(f"holds other questions than params.yaml asks about the classes ({what})")
    return found


def read_descriptions(params: Params, key: str, classes: list[str]) -> list[Description]:
    """The answers of a text variant and its templates, as stage `responses` wrote them.

    Raises InvalidArtifact for those of other classes, questions or samples, and for flags and texts that no answer has.
    """
    path, wanted = Path("prompts") / "texts" / key / "responses.jsonl", params.class_texts[key].params
    found = read_records(path, "responses", Description)
    samples = range(1 if wanted.provider in ("features", "template") else wanted.samples)
    questions = read_records(question_file(key), "prompts", Question)
    asked = [(one.class_name, one.id, one.text, sample) for one in questions for sample in samples]
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
