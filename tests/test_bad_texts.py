"""Bad input: questions, stored and published answers, language models and text features."""

import hashlib
import json
import os

import pytest
import torch

from bad_input_grid import EMBEDDINGS, QUESTIONS, WIDTH, says
from smoke_grid import TEXT
from textguard.artifacts import read_safetensors, write_safetensors
from textguard.errors import InvalidArtifact, InvalidParameter
from textguard.text.cache import StoredAnswer, answer_key, read_answers, to_line
from textguard.text.language_models import Network
from textguard.text.questions import PLAIN, ask
from textguard.text.responses import Sources, answer

TEMPLATES = {
    "other field": (["What is {name}?"], ["'What is {name}?'", "{class} or {a_class}"]),
    "no field": (["What is it?"], ["'What is it?'", "{class} or {a_class}"]),
    "open brace": (["What is {class?"], ["'What is {class?'", "is no template"]),
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
    os.mkfifo(grid.folder / "prompts" / "pipe.jsonl")
    grid.change("texts.descriptions.cache", [str(grid.folder / "prompts" / "pipe.jsonl")])
    says(grid.fails("responses", TEXT), "prompts/pipe.jsonl cannot be read (it is no regular file)", "params.yaml texts")


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
    "password in the URL": ({"base_url": "https://me:secret@host/v1"}, ["model.base_url", "holds a name or password"]),
    "key in the URL": ({"base_url": "https://host/v1?key=secret"}, ["model.base_url", "must end before '?'"]),
    "version in the URL": (
        {"base_url": "https://host/v1?api-version=1"},
        ["base_url", "another address without", "Azure"],
    ),
    "another scheme": ({"base_url": "ftp://host/v1"}, ["model.base_url", "begin with https:// or http://"]),
    "no scheme": ({"base_url": "host/v1"}, ["model.base_url", "begin with https:// or http://"]),
    "a blank in the URL": ({"base_url": "https://ho st/v1"}, ["model.base_url", "is no address"]),
    "a line's end in the URL": ({"base_url": "https://host/v1\n"}, ["model.base_url", "is no address"]),
    "other letters in the URL": ({"base_url": "https://höst/v1"}, ["model.base_url", "is no address"]),
    "no host": ({"base_url": "https:///v1"}, ["model.base_url", "is no address"]),
    "half a host": ({"base_url": "https://[::1/v1"}, ["model.base_url", "is no address"]),
    "no port": ({"base_url": "https://host:http/v1"}, ["model.base_url", "is no address"]),
    "no limit": ({"max_tokens": 0}, ["model.max_tokens", "greater than 0"]),
    "one stop": ({"stop": "x"}, ["model.stop", "valid array"]),
    "empty stop": ({"stop": [""]}, ["model.stop", "at least 1"]),
    "no name": ({"model": ""}, ["model.model", "at least 1"]),
    "unknown key": ({"top_p": 1.0}, ["unknown key", "model.top_p", "known: base_url, endpoint"]),
}


@pytest.mark.parametrize(("changes", "parts"), MODELS.values(), ids=MODELS)
def test_a_language_model_that_cannot_be_asked_is_refused(untouched, changes, parts):
    untouched.change("texts.descriptions.model", LANGUAGE_MODEL | changes)
    line = untouched.fails("check")
    says(line, "InvalidParameter", "texts.descriptions", "params.yaml", *parts)
    assert "secret" not in line


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


def row(**changes) -> bytes:
    """A stored answer to the first question, with a checksum that is right."""
    question = "What does the handwritten digit zero look like?"
    fields = {"sample": 0, "provider": "a test", "request": None, "model": None, "time": None, "input_tokens": None}
    fields |= {"output_tokens": None, "finish_reason": None, "answer": "Round and white."}
    fields = {"key": answer_key(question, 0, None), "question": question} | fields | changes
    checked = json.dumps(fields, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return json.dumps(fields | {"checksum": hashlib.sha256(checked).hexdigest()[:16]}).encode()


OTHER = answer_key("What does the handwritten digit one look like?", 0, None)
WRONG_ROWS = {
    "a number for an answer": (row(answer=5), "has a wrong answer"),
    "a list for an answer": (row(answer=["Round."]), "has a wrong answer"),
    "no answer": (row(answer=None), "has a wrong answer"),
    "a list for a key": (row(key=["a"]), "has a wrong key"),
    "a number for a key": (row(key=5), "has a wrong key"),
    "a number for a provider": (row(provider=5), "has a wrong provider"),
    "a number for a finish reason": (row(finish_reason=5), "has a wrong finish_reason"),
    "a text for tokens": (row(input_tokens="5"), "has a wrong input_tokens"),
    "a number for a request": (row(request=5), "has a wrong request"),
    "true for a sample": (row(sample=True), "has a wrong sample"),
    "the key of another question": (row(key=OTHER), "belongs to another question"),
    "another sample": (row(sample=1), "belongs to another question, sample or request"),
    "another request": (row(request={"model": "m"}), "belongs to another question, sample or request"),
    "half a character": (row(answer="\ud83d"), "half of a character"),
    "a name twice": (row().replace(b'"sample": 0', b'"sample": 0, "sample": 0'), "holds 'sample' twice"),
    "deep": (b"[" * 100_000, "too deep"),
    "a number of 5,000 digits": (row().replace(b'"sample": 0', b'"sample": ' + b"9" * 5000), "(Exceeds the limit"),
    "nothing": (b"", "is no JSON"),
    "NUL": (b"\0" * 9, "is no JSON"),
}


@pytest.mark.parametrize(("line", "reason"), WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_a_stored_answer_that_is_none_costs_no_other(tmp_path, line, reason):
    file = tmp_path / "answers.jsonl"
    file.write_bytes(line + b"\n" + row() + b"\n")
    store = read_answers([file])
    assert [given.answer for given in store.answers.values()] == ["Round and white."]
    (damaged,) = store.damaged
    assert damaged.startswith(f"{file} line 1 (")
    assert reason in damaged


def test_a_byte_order_mark_costs_no_answer(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + row())
    assert (len(read_answers([file]).answers), read_answers([file]).damaged) == (1, [])


def edited(grid, name: str, number: int, **changes) -> None:
    """Change fields of one line of a file that a stage wrote."""
    lines = [json.loads(line) for line in (grid.folder / name).read_text(encoding="utf-8").splitlines()]
    lines[number] |= changes
    grid.put(name, "".join(json.dumps(line) + "\n" for line in lines))


WRONG_QUESTIONS = {
    "a number for a class": ({"class_name": 7}, ["line 1 has a wrong class_name"]),
    "a number for a text": ({"text": 5}, ["line 1 has a wrong text"]),
    "another class": ({"class_name": "ten"}, ["other questions than params.yaml asks", "'ten'"]),
    "another text": ({"text": "What is it?"}, ["other questions than params.yaml asks", "'What is it?'"]),
    "half a character": ({"text": "\ud83d"}, ["line 1 is no JSON", "half of a character"]),
}


@pytest.mark.parametrize(("changes", "parts"), WRONG_QUESTIONS.values(), ids=WRONG_QUESTIONS)
def test_questions_that_nobody_asks_are_refused(grid, changes, parts):
    edited(grid, QUESTIONS, 0, **changes)
    says(grid.fails("responses", TEXT), "InvalidArtifact", QUESTIONS, "'prompts'", *parts)


def test_fewer_questions_than_params_yaml_asks_are_refused(grid):
    lines = (grid.folder / QUESTIONS).read_text(encoding="utf-8").splitlines()
    grid.put(QUESTIONS, "\n".join(lines[:-1]) + "\n")
    says(grid.fails("responses", TEXT), "InvalidArtifact", QUESTIONS, "19 instead of 20")


RESPONSES = f"prompts/texts/{TEXT}/responses.jsonl"
WRONG_RESPONSES = {
    "an unknown class": ({"class_name": "ten"}, ["line 1 is of class 'ten'"]),
    "a list for a class": ({"class_name": ["zero"]}, ["line 1 has a wrong class_name"]),
    "another class": ({"class_name": "one"}, ["line 1 answers another question"]),
    "another question": ({"question": "Why?"}, ["line 1 answers another question"]),
    "another sample": ({"sample": 1}, ["line 1 answers another question"]),
    "no flags": ({"flags": None}, ["line 1 has a wrong flags"]),
    "a text for flags": ({"flags": "cut"}, ["line 1 has a wrong flags"]),
    "an unknown flag": ({"flags": ["bad"]}, ["the flag 'bad'", "known: empty, duplicate"]),
    "a number for a text": ({"text": 5}, ["line 1 has a wrong text"]),
    "an empty text": ({"text": " "}, ["line 1 has no text, and is not flagged as empty"]),
}


@pytest.mark.parametrize(("changes", "parts"), WRONG_RESPONSES.values(), ids=WRONG_RESPONSES)
def test_answers_to_other_questions_are_refused(grid, changes, parts):
    edited(grid, RESPONSES, 0, **changes)
    for stage in ("embeddings", "text_quality"):
        says(grid.fails(stage, TEXT), "InvalidArtifact", RESPONSES, "'responses'", *parts)


def test_answers_of_another_variant_are_refused(grid):
    lines = (grid.folder / RESPONSES).read_text(encoding="utf-8").splitlines()
    grid.put(RESPONSES, "\n".join(lines[::2]) + "\n")
    says(
        grid.fails("embeddings", TEXT), RESPONSES, "holds 10 texts instead of 20 answers and 0 templates for each of 10 classes"
    )


ROWS, VECTORS = torch.arange(20), torch.ones(20, WIDTH)
WRONG_VECTORS = {
    "NaN": (ROWS, VECTORS * float("nan"), "a vector that is zero, or has NaN"),
    "infinity": (ROWS, VECTORS * float("inf"), "a vector that is zero, or has NaN"),
    "zeros": (ROWS, VECTORS * 0, "a vector that is zero, or has NaN"),
    "no vectors": (ROWS, VECTORS[:0], "has vectors of shape [0, 16]"),
    "another width": (ROWS, VECTORS[:, :9], "has vectors of shape [20, 9]"),
    "flat": (ROWS, VECTORS[:, 0], "has vectors of shape [20]"),
    "whole numbers": (ROWS, VECTORS.long(), "torch.int64, expected float32"),
    "negative rows": (ROWS - 1, VECTORS, "other texts"),
    "rows beyond the answers": (ROWS + 1, VECTORS, "other texts"),
    "a row twice": (ROWS.clamp(max=5), VECTORS, "other texts"),
    "rows that are no whole numbers": (ROWS.float(), VECTORS, "other texts"),
    "one row": (torch.tensor(0), VECTORS, "other texts"),
    "no rows": (ROWS[:0], VECTORS, "other texts"),
}


@pytest.mark.parametrize(("rows", "vectors", "part"), WRONG_VECTORS.values(), ids=WRONG_VECTORS)
def test_vectors_of_other_texts_are_refused(grid, rows, vectors, part):
    file = "embeddings/digits/descriptions.texts.safetensors"
    (grid.folder / file).unlink()
    write_safetensors(grid.folder / file, {"rows": rows, "vectors": vectors})
    says(grid.fails("text_quality", TEXT), "InvalidArtifact", file, "'embeddings'", part)


@pytest.mark.parametrize(
    ("place", "value"), [("encoder", "open_clip:ViT-B-32:openai"), ("texts.descriptions.embedding", {"vectors": "shuffled"})]
)
def test_embeddings_made_in_another_way_are_refused(grid, place, value):
    grid.change(place, value)
    says(grid.fails("text_quality", TEXT), "InvalidEmbeddings", EMBEDDINGS, "made with encoder minilm", "params.yaml")


def imported(tmp_path, classes: list[str], content: str) -> None:
    """Have a file of published descriptions answer for some classes."""
    file = tmp_path / "published.json"
    file.write_text(content, encoding="utf-8")
    asked = ask(classes, ["A published description of {class}"], PLAIN, "here")
    answer("import", asked, Sources(1, [file], None, Network(1, 1, 1, 1, None, None), tmp_path / "none", "test"))


def test_two_classes_that_published_descriptions_cannot_tell_apart_are_named(tmp_path):
    with pytest.raises(InvalidParameter, match=r"cannot tell class 'C' from 'C\+\+'"):
        imported(tmp_path, ["C", "C++"], json.dumps({"C": ["A letter."]}))


WRONG_DESCRIPTIONS = {
    "deep": ("[" * 100_000, "too deep"),
    "half a character": ('{"zero": ["\\ud83d"]}', "half of a character"),
    "a class twice": ('{"zero": ["a"], "zero": ["b"]}', "twice"),
    "a byte order mark": ("\ufeff{}", "BOM"),
    "numbers": ('{"zero": [1]}', "a list of sentences"),
}


@pytest.mark.parametrize(("content", "part"), WRONG_DESCRIPTIONS.values(), ids=WRONG_DESCRIPTIONS)
def test_published_descriptions_that_cannot_be_read_are_one_line(tmp_path, content, part):
    with pytest.raises(InvalidArtifact, match=part) as caught:
        imported(tmp_path, ["zero"], content)
    assert "\n" not in str(caught.value)


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
    grid, responses, seen = told_by_features, f"prompts/texts/{TEXT}/responses.jsonl", set()
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
