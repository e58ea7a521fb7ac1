"""Answers to questions about classes: from stored files, or from the template itself."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from textguard.artifacts import read_json_lines
from textguard.errors import InvalidArtifact, MissingAnswer, UnknownName
from textguard.text.questions import Question


@dataclass(frozen=True)
class Answer:
    """One answer to one question. provider: who gave it, in words that may be shown."""

    class_name: str
    question_id: str
    question: str
    sample: int
    answer: str
    provider: str


def replay(questions: list[Question], samples: int, files: list[Path]) -> list[Answer]:
    """Answer from stored files alone: JSON Lines with question, sample, answer and provider.

    Returns `samples` answers per question. Raises MissingAnswer that names class, question and files; InvalidArtifact.
    """
    stored: dict[tuple[str, int], dict] = {}
    for file in files:
        if not file.is_file():
            raise InvalidArtifact(f"{file} is missing; params.yaml texts.*.cache names it: correct that, or create the file")
        for number, row in enumerate(read_json_lines(file, ""), start=1):
            texts = [row.get(name) for name in ("question", "answer", "provider")]
            if not all(isinstance(text, str) and text.strip() for text in texts) or not isinstance(row.get("sample"), int):
                needed = "question, answer and provider (texts that are not empty) and sample (a whole number)"
                raise InvalidArtifact(f"{file} line {number} needs {needed}")
            stored[row["question"], row["sample"]] = row
    answers = []
    for question in questions:
        for sample in range(samples):
            row = stored.get((question.text, sample))
            if row is None:
                raise MissingAnswer(
                    f"class {question.class_name!r} has no stored answer {sample + 1} of {samples} to {question.text!r} in "
                    f"{', '.join(map(str, files)) or 'no file'}; add it there, or change params.yaml texts"
                )
            answers.append(
                Answer(question.class_name, question.id, question.text, sample, row["answer"].strip(), row["provider"])
            )
    return answers


def template(questions: list[Question], samples: int, files: list[Path]) -> list[Answer]:
    """No model at all: each filled template is its own answer, as in "a photo of a zero"."""
    return [Answer(q.class_name, q.id, q.text, 0, q.text, "template") for q in questions]


PROVIDERS: dict[str, Callable[[list[Question], int, list[Path]], list[Answer]]] = {"replay": replay, "template": template}


def answer(provider: str, questions: list[Question], samples: int, files: list[Path]) -> list[Answer]:
    """Have every question answered by the provider called `provider`. Raises UnknownName, MissingAnswer, InvalidArtifact."""
    if provider not in PROVIDERS:
        raise UnknownName("provider", provider, PROVIDERS, "params.yaml texts.*.provider")
    return PROVIDERS[provider](questions, samples, files)
