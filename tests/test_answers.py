"""Answers: stored, published, cleaned and flagged."""

import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY
from stages.prompts import ask_all
from stages.responses import sources
from textguard.errors import CannotWrite, InvalidArtifact, InvalidParameter, MissingAnswer, UnknownName
from textguard.params import load_params
from textguard.text.answers import Answer, Description
from textguard.text.cache import StoredAnswer, answer_key, open_log, read_answers, to_line
from textguard.text.cleaning import clean, describe
from textguard.text.language_models import Network
from textguard.text.questions import PLAIN, Question
from textguard.text.questions import ask as ask_about
from textguard.text.responses import Sources, answer, normalised
from textguard.vision.datasets import read_source

CLASSES = {
    "digits": 10,
    "fashion_mnist": 10,
    "cifar10": 10,
    "stl10": 10,
}


def ask(classes: list[str], templates: list[str]) -> list[Question]:
    return ask_about(classes, templates, PLAIN, "here")


def stored(question: str, sample: int, text: str) -> StoredAnswer:
    """An answer that a person wrote."""
    key = answer_key(question, sample, None)
    return StoredAnswer(key, question, sample, "a test", None, None, None, None, None, None, text)


def write_answers(path: Path, rows: list[StoredAnswer]) -> Path:
    path.write_bytes(b"".join(to_line(row) for row in rows))
    return path


def given_by(*files: Path, samples: int = 1) -> Sources:
    return Sources(samples, list(files), None, Network(1, 1, 1, 1, None, None), Path("nowhere"), "test")


@pytest.mark.parametrize("dataset", CLASSES)
def test_the_shipped_answers_are_complete_and_say_who_wrote_them(dataset):
    store = read_answers([REPOSITORY / "prompts" / "cache" / f"{dataset}.jsonl"])
    assert store.damaged == []
    samples: dict[str, list[int]] = {}
    for key, row in store.answers.items():
        assert key == answer_key(row.question, row.sample, None)
        assert row.provider == "written for this repository, not by GPT-3"
        assert len(row.answer.split()) >= 8
        samples.setdefault(row.question, []).append(row.sample)
    assert len(samples) == CLASSES[dataset] * 5
    assert all(found == [0, 1, 2] for found in samples.values())
    assert len({row.answer for row in store.answers.values()}) == len(store.answers)


@pytest.mark.parametrize("grid", ["", "grids/smoke", "grids/causes", "grids/texts"])
def test_every_answer_that_a_grid_replays_is_shipped(grid, tmp_path, monkeypatch):
    params = load_params(REPOSITORY / grid / "params.yaml")
    monkeypatch.chdir(tmp_path)
    names = read_source("digits", None).classes
    (tmp_path / "data" / "digits").mkdir(parents=True)
    (tmp_path / "data" / "digits" / "classes.json").write_text(json.dumps(names), encoding="utf-8")
    replayed = {key: texts.params for key, texts in params.class_texts.items() if texts.params.provider == "replay"}
    assert replayed
    for key, wanted in replayed.items():
        asked = ask_all(params, key)
        answers = answer("replay", asked, sources(replace(params, root=str(REPOSITORY)), key))
        assert len(answers) == len(asked) * wanted.samples
        assert {one.model for one in answers} == {wanted.model.model if wanted.model else None}


def test_replayed_answers_keep_class_order_and_samples(tmp_path):
    questions = ask(["ship", "truck"], ["What is {a_class}?"])
    rows = [stored(asked.text, sample, f"{asked.class_name} {sample}") for sample in (1, 0) for asked in questions]
    file = write_answers(tmp_path / "cache.jsonl", rows)
    answers = answer("replay", questions, given_by(file, samples=2))
    assert [(given.class_name, given.answer) for given in answers] == [
        ("ship", "ship 0"),
        ("ship", "ship 1"),
        ("truck", "truck 0"),
        ("truck", "truck 1"),
    ]
    with pytest.raises(MissingAnswer, match=r"class 'ship' has no stored answer 3 of 3 to 'What is a ship\?'"):
        answer("replay", questions, given_by(file, samples=3))


def test_a_template_answers_itself():
    questions = ask(["zero"], ["a photo of a {class}"])
    assert [given.answer for given in answer("template", questions, given_by())] == ["a photo of a zero"]
    with pytest.raises(UnknownName, match="features, import, openai, replay, template"):
        answer("gpt-3", questions, given_by())


def test_wherever_a_writer_is_stopped_the_next_one_mends_the_tail_and_loses_nothing(tmp_path):
    first, second, third = (stored("Why?", sample, "Because: crème\u2028brûlée") for sample in range(3))
    path = tmp_path / "answers.jsonl"
    whole = to_line(first) + to_line(second)
    for length in range(len(to_line(first)), len(whole) + 1):
        path.write_bytes(whole[:length])
        with open_log(path) as log:
            log.append(third)
        kept = [first, second, third] if length >= len(whole) - 1 else [first, third]
        store = read_answers([path])
        assert (list(store.answers.values()), store.damaged) == (kept, [])


def test_a_damaged_line_is_found_and_costs_no_other(tmp_path):
    rows = [stored("Why?", sample, "Because") for sample in range(3)]
    lines = [to_line(row) for row in rows]
    path = tmp_path / "answers.jsonl"
    for position in range(len(lines[1]) - 1):
        damaged = bytearray(lines[1])
        damaged[position] ^= 1 << position % 8
        path.write_bytes(lines[0] + bytes(damaged) + lines[2])
        store = read_answers([path])
        # A damaged blank between two fields changes nothing; a byte that became a line's end cuts it in two.
        assert [row for row in store.answers.values() if row.sample != 1] == [rows[0], rows[2]]
        assert store.answers.get(rows[1].key) in (None, rows[1])
        assert all(f"{path} line " in problem for problem in store.damaged)
        assert bool(store.damaged) == (rows[1].key not in store.answers)


def test_several_writers_lose_nothing(tmp_path):
    path = tmp_path / "live" / "answers.jsonl"
    script = (
        "import sys, pathlib, concurrent.futures as futures\n"
        "from textguard.text.cache import StoredAnswer, answer_key, open_log\n"
        "who, nobody = sys.argv[1], [None] * 6\n"
        "def stored(n): return StoredAnswer(answer_key(who, n, None), who, n, who, *nobody, who * n)\n"
        "with open_log(pathlib.Path(sys.argv[2])) as log, futures.ThreadPoolExecutor(8) as threads:\n"
        "    list(threads.map(lambda n: log.append(stored(n)), range(100)))\n"
    )
    command = [sys.executable, "-c", script]
    writers = [subprocess.Popen([*command, name, path], cwd=REPOSITORY, stderr=subprocess.PIPE) for name in ("a", "b", "c")]
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    store = read_answers([path])
    assert store.damaged == []
    assert {(row.question, row.sample) for row in store.answers.values()} == {(w, n) for w in "abc" for n in range(100)}


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    with open_log(path) as log:
        log.append(stored("Why?", 0, "Because"))
        log._file = FullDisk(log._file)
        with pytest.raises(CannotWrite, match="No space left"):
            log.append(stored("Why?", 1, "Because"))
    assert path.read_bytes() == to_line(stored("Why?", 0, "Because"))


class FullDisk:
    """A file of which only half of what is written arrives."""

    def __init__(self, file: FileIO) -> None:
        self._file = file

    def write(self, line: bytes) -> int:
        return self._file.write(line[: len(line) // 2])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_published_descriptions_are_matched_by_their_normalised_names(tmp_path):
    file = tmp_path / "published.json"
    file.write_text(
        json.dumps({"Crème_Brûlée": ["Sweet.", "Brown.", "Soft."], "ice-cream": ["Cold.", "White."], "rice": []}),
        encoding="utf-8",
    )
    questions = ask(["creme brulee", "Ice Cream"], ["Published descriptions of {a_class}"])
    answers = answer("import", questions, given_by(file, samples=2))
    assert [(given.class_name, given.answer, given.provider) for given in answers] == [
        ("creme brulee", "Sweet.", "published in published.json"),
        ("creme brulee", "Brown.", "published in published.json"),
        ("Ice Cream", "Cold.", "published in published.json"),
        ("Ice Cream", "White.", "published in published.json"),
    ]
    with pytest.raises(MissingAnswer, match=r"1 of 2 classes have fewer than 3 sentences: 'Ice Cream' \(2\)"):
        answer("import", questions, given_by(file, samples=3))
    with pytest.raises(MissingAnswer, match=r"'tea' \(0\), 'milk' \(0\)"):
        answer("import", ask(["tea", "milk"], ["{class}"]), given_by(file))
    with pytest.raises(InvalidParameter, match="takes one question"):
        answer("import", ask(["tea"], ["{class}", "a {class}"]), given_by(file))
    for content, message in (("[]", "JSON object"), ('{"tea": "hot"}', "'tea' a list"), ('{"a b": [], "A_b": []}', "again")):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(InvalidArtifact, match=message):
            answer("import", ask(["tea"], ["{class}"]), given_by(file))


@pytest.mark.parametrize(("name", "classes", "sentences"), [("cifar10", 10, 30), ("cifar100", 100, 40), ("food", 101, 30)])
def test_descriptions_published_for_other_data_sets_can_be_imported(name, classes, sentences):
    file = REPOSITORY.parent / "shared" / "data" / "cupl" / f"{name}.json"
    if not file.is_file():
        pytest.skip("the published descriptions are not here")
    names = [normalised(name).upper() for name in json.loads(file.read_text(encoding="utf-8"))]
    answers = answer("import", ask(names, ["Published descriptions of {a_class}"]), given_by(file, samples=sentences))
    assert len(names) == classes
    assert len(answers) == classes * sentences
    flags = Counter(flag for described in describe(answers) for flag in described.flags)
    assert flags["not_english"] + flags["too_short"] + flags["empty"] < 0.02 * len(answers)


def described(text: str, class_name: str = "ship", **changes: Any) -> Description:
    fields = {"question_id": "", "question": "", "sample": 0, "provider": "a test", "model": None, "finish_reason": "stop"}
    return describe([Answer(**{"class_name": class_name, "answer": text, **fields, **changes})])[0]


CLEANED = {
    "  A ship\n  floats.\t": "A ship floats.",
    "- A ship floats.": "A ship floats.",
    "* It floats.\n* It sails.": "It floats. It sails.",
    "1. A ship floats.\n2) It sails.": "A ship floats. It sails.",
    '"A ship floats."': "A ship floats.",
    "“A ship, a “big” one, floats.”": "“A ship, a “big” one, floats.”",
    "Sure! Here is a description of a ship: It floats.": "It floats.",
    'Certainly, here\'s a caption for the photo: "A ship at sea."': "A ship at sea.",
    "As an AI language model, I see that a ship floats.": "I see that a ship floats.",
    "Caption: A ship at sea": "A ship at sea",
    "A ship shipâ€™s hull and crÃ¨me.": "A ship ship’s hull and crème.",
    "A ship\x00 \x1b[31mfloats\u2028on.": "A ship [31mfloats on.",
    "Here is where a ship floats.": "Here is where a ship floats.",
    "A ship is 3. No more - no less.": "A ship is 3. No more - no less.",
    "<script>alert('a ship')</script>": "<script>alert('a ship')</script>",
    "<think>\nhm\n</think>\n\nA ship is long.": "A ship is long.",
    "<thinking>- a <think>b</think> c</thinking>A ship <Think>d</Think>floats.": "A ship floats.",
    "The user wants a ship.\n</think>\nA ship is wide.": "A ship is wide.",
    "[THINK]hm[/THINK]A ship is high.": "A ship is high.",
    "I think> a ship < is small.": "I think> a ship < is small.",
    "A ship sails. <think>Or does": "A ship sails.",
    "**Ships** are round.": "Ships are round.",
    "*A ship* is blue, __very__ _blue_.": "A ship is blue, very blue.",
    "***Ships*** and **ships *of* old**.": "Ships and ships of old.",
    "- **Hull:** A ship's **long** hull.\n- *Mast:* high": "Hull: A ship's long hull. Mast: high",
    "# Ship\nIt is grey.\n### Hull ###": "Ship It is grey. Hull ###",
    "A *5 and 3 * 4 * 5 and 2**3**4.": "A *5 and 3 * 4 * 5 and 2**3**4.",
    "-A ship\n-a boat\n*a raft\n*A plank": "A ship a boat a raft A plank",
    "snake_case_name and _ blank _ and #1 ship": "snake_case_name and _ blank _ and #1 ship",
    "•A ship\n·A boat": "A ship A boat",
    "A ship\n---\nA boat\n***\n* * *\nA raft": "A ship A boat A raft",
}


@pytest.mark.parametrize(("raw", "text"), CLEANED.items(), ids=CLEANED.values())
def test_answers_are_cleaned_and_kept_raw_beside(raw, text):
    cleaned = described(raw)
    assert (cleaned.text, cleaned.answer) == (text, raw)
    assert clean(text) == text


FLAGGED = {
    "A ship is a very large boat.": [],
    "Large ships float on the sea.": [],
    "It floats on the sea.": [],
    "They are made of steel and wood.": [],
    "": ["empty"],
    " .\n": ["empty"],
    "A ship.": ["too_short"],
    "A horse has four legs and a long tail.": ["unnamed"],
    "Ein ship hat einen langen Rumpf und viele Masten.": ["not_english"],
    "I'm sorry, but I can't describe a ship in words.": ["refused"],
}


@pytest.mark.parametrize(("text", "flags"), FLAGGED.items(), ids=FLAGGED)
def test_what_looks_wrong_is_flagged(text, flags):
    assert described(text).flags == flags


@pytest.mark.parametrize("text", ["<think>\nA ship", "A ship is a very large boat. <think>But", "<think><think>a</think> ship"])
def test_an_answer_that_ends_while_the_model_thinks_was_cut(text):
    assert "cut" in described(text).flags
    assert "cut" not in described(f"{text} is</think></think>A ship is a very large boat.").flags


def test_templates_stand_for_themselves():
    for text in ("3. Liga", "- A *ship*", "# <think>", '"Sure: a ship"'):
        assert described(text, provider="template").text == text
    assert described("a\tphoto  of crÃ¨me\n", provider="template").text == "a photo of crème"


ENDLESS = ["**a ", "<think>", "</think>", "_a ", "*", "_", "- ", "# ", "'", "Sure! ", "\n ", "1. ", "* a\n", "*a* ", "- 1. "]


@pytest.mark.parametrize("part", ENDLESS)
def test_cleaning_takes_time_in_proportion_to_the_answer(part):
    started = time.process_time()
    clean(part * (50_000 // len(part)))
    assert time.process_time() - started < 5


def test_finish_reasons_and_duplicates_are_flagged():
    text = "A ship is a very large boat"
    assert described(text, finish_reason="length").flags == ["cut"]
    assert described(text, finish_reason="refusal").flags == ["refused"]
    assert described("", finish_reason="content_filter").flags == ["empty", "filtered"]
    same = [described(text), described(f" {text.upper()}!"), described(text, class_name="large boat")]
    again = describe(Answer(**{name: getattr(row, name) for name in Answer.__dataclass_fields__}) for row in same)
    assert [row.flags for row in again] == [[], ["duplicate"], []]


@pytest.mark.parametrize(
    ("class_name", "text"),
    [
        ("butterfly", "Most butterflies have four wings that are bright."),
        ("aquarium fish", "A fish like this one swims in a tank."),
        ("bus", "Buses are large vehicles with many seats."),
        ("churros", "A churro is fried dough with sugar on it."),
        ("8", "An 8 consists of two loops above each other."),
        ("T-shirt", "A shirt with short sleeves, and no buttons."),
    ],
)
def test_a_class_is_named_by_any_word_of_its_name(class_name, text):
    assert described(text, class_name).flags == []
