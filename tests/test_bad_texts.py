"""Bad input: questions, stored and published answers, language models and text features."""

import json

import pytest
import torch

from bad_input_grid import EMBEDDINGS, QUESTIONS, WIDTH, says
from smoke_grid import TEXT
from textguard.artifacts import read_safetensors
from textguard.text.cache import StoredAnswer, answer_key, to_line

TEMPLATES = {
    "other field": (["What is {name}?"], ["'What is {name}?'", "{class} or {a_class}"]),
    "no field": (["What is it?"], ["'What is it?'", "{class} or {a_class}"]),
    "open brace": (["What is {class?"], ["'What is {class?'", "is no template"]),
    "twice": (["{class}?", "{class}?"], ["the same question twice"]),
    "number format": (["What is {class:d}?"], ["'What is {class:d}?'"]),
    "conversion": (["What is {class!z}?"], ["'What is {class!z}?'"]),
}


@pytest.mark.parametrize(("questions", "parts"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_question_that_cannot_be_asked_is_named(grid, questions, parts):
    grid.change("texts.descriptions.questions", questions)
    says(grid.fails("prompts", TEXT), "params.yaml texts.descriptions.questions", *parts)


def test_a_class_without_an_answer_is_named_with_its_question(grid):
    grid.change("texts.descriptions.questions", ["Where does {a_class} live?"])
    assert grid.run("prompts", TEXT)[0] == 0
    line = grid.fails("responses", TEXT)
    says(line, "MissingAnswer", "class 'zero'", "'Where does a zero live?'", "prompts/cache/digits.jsonl", "params.yaml texts")


def test_more_samples_than_answers_are_named(grid):
    grid.change("texts.descriptions.samples", 99)
    says(grid.fails("responses", TEXT), "MissingAnswer", "class 'zero'", "of 99", "params.yaml texts")


def stored(question: str, text: str) -> bytes:
    """A line of a file of stored answers: the first answer of a person to a question."""
    return to_line(StoredAnswer(answer_key(question, 0, None), question, 0, "a test", None, None, None, None, None, None, text))


CACHES = {
    "half a line": (lambda line: line[:40], "is no JSON"),
    "no object": (lambda line: b"[1]\n", "is no stored answer"),
    "other fields": (lambda line: b'{"question": "What?"}\n', "is no stored answer"),
    "a changed letter": (lambda line: line.replace(b"Round", b"Found"), "its checksum does not match"),
    "no text": (lambda line: b"\xff\xfe" + line, "is no JSON"),
}


@pytest.mark.parametrize(("spoil", "reason"), CACHES.values(), ids=CACHES)
def test_a_damaged_answer_is_named_with_file_and_line(grid, spoil, reason):
    questions = [json.loads(line)["text"] for line in (grid.folder / QUESTIONS).read_text(encoding="utf-8").splitlines()]
    lines = [stored(question, "Round and white.") for question in questions]
    file = grid.put("answers.jsonl", b"".join([*lines[1:], spoil(lines[0])]))
    grid.change("texts.descriptions.cache", [str(file)])
    says(grid.fails("responses", TEXT), "MissingAnswer", repr(questions[0]), f"{file} line {len(lines)} ({reason})")


def test_a_missing_answers_file_is_named_with_the_parameter(grid):
    grid.change("texts.descriptions.cache", ["prompts/cache/none.jsonl"])
    says(grid.fails("responses", TEXT), "prompts/cache/none.jsonl is missing", "params.yaml texts")


def test_an_answer_with_a_line_separator_can_be_read_again(grid):
    questions = [json.loads(line)["text"] for line in (grid.folder / QUESTIONS).read_text(encoding="utf-8").splitlines()]
    file = grid.put("answers.jsonl", b"".join(stored(question, "One.\u2028Two.") for question in questions))
    grid.change("texts.descriptions.cache", [str(file)])
    grid.change("encoder", "nobody")
    assert grid.run("responses", TEXT)[0] == 0
    says(grid.fails("embeddings", TEXT), "encoder 'nobody'")


PUBLISHED = {
    "no JSON": ("{", ["cannot be read", "JSONDecodeError"]),
    "a list": ("[]", ["must be a JSON object"]),
    "no lists": ('{"zero": "round"}', ["'zero' a list of sentences"]),
    "missing classes": (
        '{"Zero": ["Round."]}',
        ["9 of 10 classes have fewer than 1 sent", "'one' (0)", "texts.*.samples"],
    ),
}


@pytest.mark.parametrize(("content", "parts"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_descriptions_that_are_none_are_named(grid, content, parts):
    grid.change("texts.descriptions.provider", "import")
    grid.change("texts.descriptions.questions", ["A published description of the digit {class}."])
    assert grid.run("prompts", TEXT)[0] == 0
    file = grid.put("published.json", content)
    grid.change("texts.descriptions.cache", [str(file)])
    says(grid.fails("responses", TEXT), str(file), *parts)


LANGUAGE_MODEL = {
    "endpoint": "responses",
    "base_url": "http://127.0.0.1:9/v1",
    "model": "m",
    "system": None,
    "temperature": None,
    "max_tokens": 10,
    "stop": [],
    "seed": None,
}


MODELS = {
    "endpoint": ({"endpoint": "chat"}, ["model.endpoint", '"chat"', "'chat.completions'"]),
    "password in the URL": ({"base_url": "https://me:secret@host/v1"}, ["model.base_url"]),
    "key in the URL": ({"base_url": "https://host/v1?key=secret"}, ["model.base_url"]),
    "no limit": ({"max_tokens": 0}, ["model.max_tokens", "greater than 0"]),
    "one stop": ({"stop": "x"}, ["model.stop", "valid array"]),
    "empty stop": ({"stop": [""]}, ["model.stop", "at least 1"]),
    "no name": ({"model": ""}, ["model.model", "at least 1"]),
    "unknown key": ({"top_p": 1.0}, ["unknown key", "model.top_p", "known: base_url, endpoint"]),
}


@pytest.mark.parametrize(("changes", "parts"), MODELS.values(), ids=MODELS)
def test_a_language_model_that_cannot_be_asked_is_refused(untouched, changes, parts):
    untouched.change("texts.descriptions.model", LANGUAGE_MODEL | changes)
    says(untouched.fails("check"), "InvalidParameter", "texts.descriptions", "params.yaml", *parts)


def test_a_class_that_loses_all_its_texts_is_named(grid):
    questions = [json.loads(line)["text"] for line in (grid.folder / QUESTIONS).read_text(encoding="utf-8").splitlines()]
    file = grid.put("answers.jsonl", b"".join(stored(question, "Round.") for question in questions))
    grid.change("texts.descriptions.cache", [str(file)])
    grid.change("texts.descriptions.drop", ["too_short"])
    assert grid.run("responses", TEXT)[0] == 0
    before = grid.files()
    code, lines = grid.run("embeddings", TEXT)
    assert code == 1
    says(lines[-1], "class 'zero' has no text left", "params.yaml texts.descriptions.drop")
    assert grid.files() == before


def test_a_language_model_that_lacks_something_is_named(grid):
    grid.change("texts.descriptions.provider", "openai")
    says(grid.fails("responses", TEXT), "'openai' needs a language model", "params.yaml texts")
    grid.change("texts.descriptions.model", {**LANGUAGE_MODEL, "seed": 1})
    says(grid.fails("responses", TEXT), "responses takes no seed", "params.yaml texts")


DAMAGED_LINES = {
    "no JSON": ('{"id": "1"', ["line 2 is no JSON"]),
    "no object": ("7", ["line 2 is no JSON object"]),
    "other fields": ('{"id": "1"}', ["line 2 must have class_name, id, text"]),
    "no text": (b"\xff\xfe", ["cannot be read", "UnicodeDecodeError"]),
}


@pytest.mark.parametrize(("line", "parts"), DAMAGED_LINES.values(), ids=DAMAGED_LINES)
def test_damaged_questions_are_named_with_the_line(grid, line, parts):
    first, *_ = (grid.folder / QUESTIONS).read_bytes().splitlines()
    grid.put(QUESTIONS, first + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    says(grid.fails("responses", TEXT), "InvalidArtifact", QUESTIONS, "'prompts'", *parts)


@pytest.fixture
def told_by_features(grid):
    """The grid, whose descriptions are the vectors of a file, features.pth, and their questions."""
    grid.change("texts.descriptions", {"provider": "features", "questions": ["A published description of {a_class}."]})
    grid.change("texts.descriptions.cache", [str(grid.folder / "features.pth")])
    torch.save(3 * torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(1)), grid.folder / "features.pth")
    assert grid.run("prompts", TEXT) == (0, [])
    return grid


def test_class_embeddings_are_the_rows_of_the_features_and_follow_their_file(told_by_features):
    grid, responses, seen = told_by_features, f"prompts/{TEXT}/responses.jsonl", set()
    for factor in (1, -1):
        features = factor * torch.load(grid.folder / "features.pth")
        torch.save(features, grid.folder / "features.pth")
        for stage in ("responses", "embeddings"):
            assert grid.run(stage, TEXT) == (0, [])
        tensors, _ = read_safetensors(grid.folder / EMBEDDINGS, "embeddings")
        torch.testing.assert_close(tensors["class_embeddings"], torch.nn.functional.normalize(features))
        seen.add((grid.folder / responses).read_bytes())
    assert len(seen) == 2  # so that DVC runs what is behind them


FEATURES = {
    "too few rows": (lambda file: torch.save(torch.ones(9, WIDTH), file), "InvalidEmbeddings", ["holds [9, 16] torch.float32"]),
    "a dictionary": (lambda file: torch.save({"zero": torch.ones(WIDTH)}, file), "InvalidEmbeddings", ["holds dict"]),
    "zeros": (lambda file: torch.save(torch.zeros(10, WIDTH), file), "InvalidEmbeddings", ["vector is zero"]),
    "a text": (
        lambda file: file.write_text("zero,0.1,0.2\n", encoding="utf-8"),
        "InvalidArtifact",
        ["is damaged, or holds other things"],
    ),
}


@pytest.mark.parametrize(("write", "error", "parts"), FEATURES.values(), ids=FEATURES)
def test_text_features_that_are_none_are_named(told_by_features, write, error, parts):
    file = told_by_features.folder / "features.pth"
    write(file)
    assert told_by_features.run("responses", TEXT) == (0, [])
    says(told_by_features.fails("embeddings", TEXT), error, str(file), *parts)


def test_missing_text_features_are_named(told_by_features):
    (told_by_features.folder / "features.pth").unlink()
    says(told_by_features.fails("responses", TEXT), "InvalidArtifact", "features.pth is missing", "name another one")


@pytest.mark.parametrize("files", [[], ["a.pth", "b.pth"]])
def test_text_features_are_one_file(told_by_features, files):
    told_by_features.change("texts.descriptions.cache", files)
    says(told_by_features.fails("check"), "InvalidParameter", "texts.descriptions.cache", "one .pth file")


def test_text_features_answer_one_question_and_stand_alone(told_by_features):
    told_by_features.change("texts.descriptions.templates", ["a photo of a {class}"])
    says(told_by_features.fails("check"), "InvalidParameter", "texts.descriptions.templates", "'features'")
    told_by_features.change("texts.descriptions.templates", [])
    told_by_features.change("texts.descriptions.questions", ["What is {a_class}?", "Who is {a_class}?"])
    assert told_by_features.run("prompts", TEXT) == (0, [])
    says(told_by_features.fails("responses", TEXT), "InvalidParameter", "takes one question", "params.yaml texts")
