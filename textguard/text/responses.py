"""Answers to questions about classes, from one of several providers.

replay    stored answers alone; a missing one is an error
openai    stored answers, and a language model for what is missing
import    published descriptions: JSON files, class name -> list of sentences
features  published text features: a .pth file with one vector per class, which no encoder needs to see; or, with a .json file
          beside it, the means of the rows that this maps to each class
template  no model: each filled template is its own answer
"""

import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from textguard.artifacts import read_json, reading, sha256_of_file
from textguard.errors import InvalidArtifact, InvalidParameter, MissingAnswer, UnknownName
from textguard.text.answers import Answer
from textguard.text.cache import Store, answer_key, open_log, read_answers
from textguard.text.language_models import CostEstimate, LanguageModel, Network, ask, estimate
from textguard.text.providers import FEATURES
from textguard.text.questions import Question
from textguard.text.row_map import read_row_map


@dataclass(frozen=True)
class Sources:
    """Where answers come from.

    samples: answers per question. files: stored answers or published descriptions, read in place. model: who gave or gives
    the answers, None for a person. log: the file that new answers are appended to. label: for progress.
    """

    samples: int
    files: list[Path]
    model: LanguageModel | None
    network: Network
    log: Path
    label: str


def replay(questions: list[Question], sources: Sources) -> list[Answer]:
    """Answer from stored files alone. Raises MissingAnswer that names class, question and files, or InvalidArtifact."""
    return _collect(questions, sources, read_answers(sources.files))


def ask_model(questions: list[Question], sources: Sources) -> list[Answer]:
    """Answer from stored files, and ask the model for what is missing. Raises what `ask` and `replay` raise."""
    model = _model(sources)
    with open_log(sources.log) as log:
        missing = _missing(questions, sources)
        if missing:
            ask(model, sources.network, missing, log, sources.label)
    return _collect(questions, sources, read_answers([*sources.files, sources.log]))


def estimate_model(questions: list[Question], sources: Sources) -> CostEstimate:
    """What `ask_model` would ask for now. Asks nothing."""
    return estimate(_model(sources), _missing(questions, sources))


def _model(sources: Sources) -> LanguageModel:
    if sources.model is None:
        raise InvalidParameter("provider 'openai' needs a language model; params.yaml texts.*.model is null")
    return sources.model


def _missing(questions: list[Question], sources: Sources) -> list[tuple[str, int]]:
    """The questions and samples that no file answers; each once, though several classes may ask it."""
    files = [*sources.files, sources.log] if sources.log.exists() else sources.files
    stored = read_answers(files).answers
    wanted = {_key(question, sample, sources): (question.text, sample) for question, sample in _asked(questions, sources)}
    return [asked for key, asked in wanted.items() if key not in stored]


def _asked(questions: list[Question], sources: Sources) -> Iterator[tuple[Question, int]]:
    return ((question, sample) for question in questions for sample in range(sources.samples))


def _key(question: Question, sample: int, sources: Sources) -> str:
    return answer_key(question.text, sample, sources.model.request() if sources.model else None)


def _collect(questions: list[Question], sources: Sources, store: Store) -> list[Answer]:
    answers = []
    for question, sample in _asked(questions, sources):
        stored = store.answers.get(_key(question, sample, sources))
        if stored is None:
            author = f" by {sources.model.model}" if sources.model else ""
            damaged = f", where lines are damaged: {', '.join(store.damaged[:3])}" if store.damaged else ""
            raise MissingAnswer(
                f"class {question.class_name!r} has no stored answer {sample + 1} of {sources.samples} to {question.text!r}"
                f"{author} in {_names(sources.files)}{damaged}; add it there, or change params.yaml texts"
            )
        given = stored.answer, stored.provider, stored.model, stored.finish_reason
        answers.append(Answer(question.class_name, question.id, question.text, sample, *given))
    for problem in store.damaged:
        print(f"{sources.label}: a stored answer is damaged, and left out: {problem}", file=sys.stderr)
    return answers


def published(questions: list[Question], sources: Sources) -> list[Answer]:
    """The first `samples` sentences that each class has in the files: JSON, class name -> list of sentences.

    Class names match when they differ in case, accents, spaces or punctuation only. The sentences answer no question of ours:
    the one question that `questions` must hold per class says what they are. Raises MissingAnswer, InvalidArtifact.
    """
    if len({question.class_name for question in questions}) < len(questions):
        raise InvalidParameter("provider 'import' takes one question, which says what the sentences are; see params.yaml texts")
    names: dict[str, str] = {}
    for question in questions:
        alike = names.setdefault(normalised(question.class_name), question.class_name)
        if alike != question.class_name:
            raise InvalidParameter(
                f"provider 'import' cannot tell class {alike!r} from {question.class_name!r}, which differ in case, accents, "
                "spaces or punctuation only; rename one of them, or change params.yaml texts.*.provider"
            )
    found: dict[str, list[str]] = {}
    for file in sources.files:
        for name, given in _read_published(file).items():
            if normalised(name) in found:
                raise InvalidArtifact(f"{file} names class {name!r} again; keep one")
            found[normalised(name)] = given
    sentences = {q.class_name: found.get(normalised(q.class_name), [])[: sources.samples] for q in questions}
    short = [f"{name!r} ({len(given)})" for name, given in sentences.items() if len(given) < sources.samples]
    if short:
        listed = ", ".join(short[:10]) + (f" and {len(short) - 10} more" if len(short) > 10 else "")
        raise MissingAnswer(
            f"{_names(sources.files)}: {len(short)} of {len(questions)} classes have fewer than {sources.samples} sentences: "
            f"{listed}; change params.yaml texts.*.cache or texts.*.samples"
        )
    provider = f"published in {_names([Path(file.name) for file in sources.files])}"
    return [
        Answer(question.class_name, question.id, question.text, sample, sentence, provider, None, None)
        for question in questions
        for sample, sentence in enumerate(sentences[question.class_name])
    ]


def _names(files: list[Path]) -> str:
    return ", ".join(map(str, files)) or "no file"


def normalised(class_name: str) -> str:
    """A class name for comparison: "Crème_brûlée" and "creme brulee" are one."""
    letters = unicodedata.normalize("NFKD", class_name).casefold()
    return " ".join(re.findall(r"[^\W_]+", "".join(letter for letter in letters if not unicodedata.combining(letter))))


def _read_published(file: Path) -> dict[str, list[str]]:
    descriptions = read_json(file, "")
    with reading(file, ""):
        if not isinstance(descriptions, dict):
            raise InvalidArtifact("must be a JSON object: class name -> list of sentences")
        for name, sentences in descriptions.items():
            if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
                raise InvalidArtifact(f"must give class {name!r} a list of sentences, not {json.dumps(sentences)[:60]}")
    return descriptions


def text_features(questions: list[Question], sources: Sources) -> list[Answer]:
    """Which rows of the .pth file stand for each class, in the order of the classes; the SHA-256 tells files apart.

    The vectors answer no question of ours: the one question that `questions` must hold per class says what they are. Raises
    InvalidParameter, InvalidArtifact.
    """
    if len({question.class_name for question in questions}) < len(questions) or len(sources.files) not in (1, 2):
        raise InvalidParameter(
            "provider 'features' takes one question, which says what the vectors are, and one .pth file in cache, with or "
            "without a .json file that maps classes to its rows; see params.yaml texts"
        )
    file, *row_map = sources.files
    digest = sha256_of_file(file, "")
    owned = [[row] for row in range(len(questions))]
    if row_map:
        owned = read_row_map(row_map[0], [question.class_name for question in questions])
    named = (f"row{'s' * bool(row_map)} {', '.join(map(str, rows))} of {file.name}, {digest}" for rows in owned)
    rows = zip(questions, named, strict=True)
    return [Answer(q.class_name, q.id, q.text, 0, row, f"published in {file.name}", None, None) for q, row in rows]


def self_answered(questions: list[Question]) -> list[Answer]:
    """No model at all: each filled template is its own answer, as in "a photo of a zero"."""
    return [Answer(q.class_name, q.id, q.text, 0, q.text, "template", None, None) for q in questions]


PROVIDERS: dict[str, Callable[[list[Question], Sources], list[Answer]]] = {
    "replay": replay,
    "openai": ask_model,
    "import": published,
    FEATURES: text_features,
    "template": lambda questions, sources: self_answered(questions),
}


def answer(provider: str, questions: list[Question], sources: Sources) -> list[Answer]:
    """Have every question answered by the provider called `provider`. Raises UnknownName, and what that one raises."""
    if provider not in PROVIDERS:
        raise UnknownName("provider", provider, PROVIDERS, "params.yaml texts.*.provider")
    return PROVIDERS[provider](questions, sources)
