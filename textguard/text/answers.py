"""What was said about classes: the records that pass from stage to stage."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """One answer to one question, as it was given.

    provider: who gave it, in words that may be shown. model, finish_reason: see StoredAnswer; None where there was no model.
    """

    class_name: str
    question_id: str
    question: str
    sample: int
    answer: str
    provider: str
    model: str | None
    finish_reason: str | None


@dataclass(frozen=True)
class Description(Answer):
    """An answer with the text to embed, and what is wrong with it: some of cleaning.FLAGS."""

    text: str
    flags: list[str]
