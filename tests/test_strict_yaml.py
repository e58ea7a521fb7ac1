"""params.yaml is read as DVC reads it, or refused in one line that says where and why, in bounded time."""

import re
import time

import pytest
from dvc.exceptions import DvcException
from dvc.utils.serialize import parse_yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from textguard.strict_yaml import parse

TAKEN = {
    "numbers": ("a: 12\nb: -0\nc: +7\nd: 0x1F\ne: 1_000\n", {"a": 12, "b": 0, "c": 7, "d": 31, "e": 1000}),
    "fractions": (
        "a: 1e-05\nb: .5\nc: -.5\nd: 5.\ne: 1.5e+3\nf: 1e3\n",
        {"a": 1e-5, "b": 0.5, "c": -0.5, "d": 5.0, "e": 1500.0, "f": 1000.0},
    ),
    "words": (
        "a: off\nb: no\nc: true\nd: null\ne:\nf: ~\n",
        {"a": "off", "b": "no", "c": True, "d": None, "e": None, "f": None},
    ),
    "texts like times": ("a: 1:30\nb: 190:20:30\n", {"a": "1:30", "b": "190:20:30"}),
    "quoted": ("\"1e3\": '2024-01-01'\n'null': \"007\"\n", {"1e3": "2024-01-01", "null": "007"}),
    "names like words": ("no: 1\noff: 2\n1.2.3: 4\n", {"no": 1, "off": 2, "1.2.3": 4}),
    "lines": ("a: |\n  one\n  two\n", {"a": "one\ntwo\n"}),
    "an alias": ("a: &x {b: 1}\nc: *x\n", {"a": {"b": 1}, "c": {"b": 1}}),
    "a merged mapping": ("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}\n", {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}}),
    "two merged mappings": (
        "- &x {b: 1}\n- &y {b: 2, c: 3}\n- {<<: [*x, *y]}\n",
        [{"b": 1}, {"b": 2, "c": 3}, {"b": 1, "c": 3}],
    ),
    "nothing": ("", None),
}


@pytest.mark.parametrize(("text", "values"), TAKEN.values(), ids=TAKEN)
def test_what_everybody_reads_alike_is_taken(text, values):
    assert parse(text) == values
    assert parse_yaml(text, "params.yaml") == ({} if values is None else values)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
MERGED_BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
REFUSED = {
    "a date": ("a: 2024-01-01", "a in line 1 is 2024-01-01, a date"),
    "an impossible date": ("a: 2024-13-45", "a in line 1 is 2024-13-45, a date"),
    "a time": ("a: 2001-12-14t21:59:43.10-05:00", "a date"),
    "leading zeros": ("a: 007", "a in line 1 is 007; write the number without leading zeros"),
    "an octal number": ("a: 0o17", "0o17"),
    "a binary number": ("a: 0b11", "0b11"),
    "no digits": ("a: 0x_", "0x_"),
    "5,000 digits": (f"a: {'1' * 5000}", "a number of 5000 digits"),
    "5,000 digits of a fraction": (f"a: 0.{'1' * 5000}", "a number of 5002 digits"),
    "a date for a name": ("a: {2024-01-01: 1}", "a name in a in line 1 is '2024-01-01', no text"),
    "a number for a name": ("a: {1e3: 1}", "a name in a in line 1 is '1e3', no text"),
    "an integer for a name": ("007: 1", "a name in the file in line 1 is '007', no text"),
    "nothing for a name": ("null: 1", "'null', no text"),
    "true for a name": ("true: 1", "'true', no text"),
    "a list for a name": ("[a, b]: 1", "a list or mapping, no text"),
    "a name twice": ("a: 1\nb: 2\na: 3", "a is there twice, the second time in line 3"),
    "a name twice within": ("a: {b: {c: 1, 'c': 2}}", "a.b.c is there twice"),
    "a tag": ("a: !!int abc", "the tag 'tag:yaml.org,2002:int' is not taken: leave it out, and put texts in quotes in line 1"),
    "a tag of Python's": ("a: !!python/object/apply:os.system [ls]", "python/object/apply:os.system"),
    "a tag of nobody's": ("a: !x b", "the tag '!x'"),
    "a tag of a text": ("a: ! b", "the tag '!'"),
    "a tagged set": ("a: !!set {b, c}", "set"),
    "tagged bytes": ("a: !!binary aGVsbG8=", "binary"),
    "a directive": ("%YAML 1.1\n---\na: 1", "directives"),
    "two documents": ("a: 1\n---\na: 2", "single document"),
    "an unknown alias": ("a: *nowhere", "undefined alias 'nowhere' in line 1"),
    "an alias that holds itself": ("a: &x [*x]", "30 levels deep; an alias (*name) may not hold itself"),
    "a mapping that holds itself": ("a: &x {b: *x}", "may not hold itself"),
    "a merge with itself": ("a: &x {<<: *x}", "may not hold itself"),
    "a merge with a text": ("a: {<<: b}", "merges (<<) something else than a mapping"),
    "two merges": ("a: &x {b: 1}\nc:\n  <<: *x\n  <<: *x\n", "line 4 merges (<<) a second time in c"),
    "aliases of aliases": (BOMB, "more than 100,000 values"),
    "merges of merges": (MERGED_BOMB, "more than 100,000 values"),
    "nested lists": ("[" * 20_000, "more than 30 levels deep"),
    "nested mappings": ("{a: " * 900, "more than 30 levels deep"),
    "nested lines": ("".join(f"{' ' * i}a:\n" for i in range(200)), "more than 30 levels deep"),
    "a character that no text holds": ('a: "\\0"', "a in line 1 holds the character U+0000"),
    "an escape sequence": ('a: "\\e[2J"', "U+001B"),
    "half a character": ('a: "\\ud800"', "U+D800"),
    "a raw NUL": ("a: \0", "#x0000"),
    "an equals sign": ("a: =", "'=', which has a meaning of its own"),
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_readers_take_differently_or_without_end_is_refused(text, reason):
    started = time.process_time()
    with pytest.raises(ValueError, match=re.escape(reason)) as refused:
        parse(text)
    assert "\n" not in str(refused.value).strip()
    assert time.process_time() - started < 5


SCALARS = st.text(st.sampled_from("0123456789abeEfFoOxXnNtTyY+-._:~<= \"'"), min_size=1, max_size=8)
WORDS = st.sampled_from(
    ["true", "null", "1e3", "0x1f", "-.5", ".inf", "2024-01-01", "a b", "10", "08", "1_0", "9.", "''", "off"]
)
LINES = st.one_of(SCALARS, WORDS)


@settings(deadline=None, max_examples=300)
@given(LINES, LINES)
def test_what_is_taken_dvc_reads_alike(name, value):
    text = f"a:\n  {name}: {value}\n"
    try:
        ours = parse(text)
    except ValueError:
        return  # refused: DVC may take it, or not
    theirs = parse_yaml(text, "params.yaml")
    assert repr(ours) == repr(theirs)


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=40) | st.text(st.sampled_from("a: -[]{}&*!|>'\"%#,?\n\t0<"), max_size=40))
def test_any_text_is_read_or_refused_in_words(text):
    try:
        ours = parse(text)
    except ValueError:
        return
    try:
        theirs = parse_yaml(text, "params.yaml")
    except (DvcException, ValueError) as error:
        pytest.fail(f"DVC refuses what is taken here: {error}")
    assert repr(ours or {}) == repr(theirs or {})
