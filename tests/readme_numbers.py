"""Where the numbers on README.md and docs/ come from: python tests/readme_numbers.py lists those that come from nowhere.

It prints them as entries for tests/readme_numbers.yaml, to be corrected and pasted there. With `--prune` it first takes out the
entries whose words are on no page any more.

A number counts as found where

- its line, or its row of a table, stands as it is in a file that a stage or a benchmark wrote (`WRITTEN`); or
- it has an interval beside it, `2.1 [1.9, 2.4]`, and all three numbers are one estimate of a committed file; or
- it has three digits or more, stands in a sentence, and is printed alike in a file that is made to be read (`READ`); or
- tests/readme_numbers.yaml says where it comes from, or why from nowhere.

Numbers of one or two digits are found in any pile of numbers, and so is any number among all of metrics/results. There, the
page's words have to be tied to a place in a file, by an entry of `derived`. What is compared is what the page prints, digit by
digit. Numbers that are spelled out ("three trainings") are not looked at, nor are those in code.
"""

import bisect
import functools
import itertools
import json
import math
import operator
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
LIST = REPOSITORY / "tests" / "readme_numbers.yaml"
# Pages quote these grids. The others' numbers would only hide mistakes; docs/findings.md, which quotes them too, is generated.
QUOTED = ("fashion", "faults", "smoke")
WRITTEN = ("metrics/tables/*.md", *(f"grids/{grid}/metrics/tables/*.md" for grid in QUOTED), "benchmarks/*.md")
READ = (*WRITTEN, "textguard/report/published.csv", "params.yaml", "grids/*/params.yaml")
ESTIMATES = ("metrics/**/*.json", *(f"grids/{grid}/metrics/**/*.json" for grid in QUOTED), "benchmarks/results.json")
ENOUGH_DIGITS = 3
LONG = 30  # characters of a line that nobody else writes by chance
NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?"
ALONE = re.compile(rf"(?<![\w.]){NUMBER}(?!\.\d|(?!x\b)\w)")  # also in "2.4x"
SIGNED = rf"[-+]*{NUMBER}"
INTERVAL = re.compile(rf"(?<![\w.-])({SIGNED}) \[({SIGNED}), ({SIGNED})\]")


@dataclass(frozen=True)
class Number:
    """A number on a page. start, end: its place in the page's text."""

    text: str
    start: int
    end: int

    @property
    def value(self) -> float:
        return float(self.text.replace(",", ""))

    @property
    def digits(self) -> int:
        """Significant digits, zeros at the end of whole numbers included."""
        return len(re.sub(r"e.*|[,.]", "", self.text).lstrip("0"))

    @property
    def half(self) -> float:
        """Half of the last digit's place."""
        mantissa, _, power = self.text.partition("e")
        return 0.5 * 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2])) * (1 + 1e-9)

    def is_about(self, value: float) -> bool:
        """Whether `value` rounds to what is printed, whatever its sign."""
        return abs(abs(value) - self.value) <= self.half

    def range_of(self, ascending: list, key: Callable[[Any], float] = float) -> list:
        """The part of a list, without signs, that rounds to what is printed."""
        first = bisect.bisect_left(ascending, self.value - self.half, key=key)
        return ascending[first : bisect.bisect_right(ascending, self.value + self.half, key=key)]


@dataclass
class Page:
    """A page, and where each of its numbers comes from. problems: what is wrong with the list of sources."""

    name: str
    text: str
    numbers: list[Number]
    sources: dict[Number, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def lost(self) -> list[Number]:
        return [number for number in self.numbers if number not in self.sources]

    def line(self, number: Number) -> int:
        return self.text.count("\n", 0, number.start) + 1

    def sentence(self, number: Number) -> str:
        """The words around a number, enough for an entry of the list."""
        start = max(self.text.rfind(end, 0, number.start) + len(end) for end in (". ", ".\n", "\n\n", "\n- ", "\n| "))
        ends = [self.text.find(end, number.end) for end in (". ", ".\n", "\n\n", "\n- ", "|\n")]
        return " ".join(self.text[start : min(end for end in [*ends, len(self.text)] if end >= 0)].split())


# Committed files


def files(*patterns: str) -> list[Path]:
    """Files of the repository, without those of the smoke grid, whose numbers mean nothing."""
    found = (file for pattern in patterns for file in REPOSITORY.glob(pattern) if file.is_file())
    return sorted(file for file in found if "smoke" not in file.relative_to(REPOSITORY).parts)


@functools.cache
def load(name: str) -> Any:
    """The content of a JSON or YAML file of the repository."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else yaml.safe_load(text)


def leaves(content: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested lists and objects, with its path, but for blocks of samples and single bits."""
    if isinstance(content, dict | list):
        for key, part in content.items() if isinstance(content, dict) else enumerate(content):
            if key not in ("blocks", "by_bit"):
                yield from leaves(part, f"{path}.{key}".lstrip("."))
    elif isinstance(content, int | float) and not isinstance(content, bool) and math.isfinite(content):
        yield path, content


def objects(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict):
        yield content
    for part in content.values() if isinstance(content, dict) else content if isinstance(content, list) else []:
        yield from objects(part)


@functools.cache
def printed() -> set[str]:
    """All numbers of the files that are made to be read, as they stand there but for commas."""
    texts = [file.read_text(encoding="utf-8") for file in files(*READ)]
    return {match[0].replace(",", "") for text in texts for match in ALONE.finditer(text)}


@functools.cache
def estimates() -> list[tuple[float, float, float]]:
    """(value, low, high) of all estimates, without signs, ascending."""
    found = set()
    for file in files(*ESTIMATES):
        for part in objects(load(str(file.relative_to(REPOSITORY)))):
            three = [part.get(name) for name in ("value", "low", "high")]
            if all(isinstance(number, int | float) for number in three):
                found.update((tuple(three), tuple(100 * number for number in three)))
    for file in files(*WRITTEN):
        for match in INTERVAL.finditer(file.read_text(encoding="utf-8")):
            found.add(tuple(float(part.replace(",", "")) for part in match.groups()))
    return sorted(tuple(map(abs, three)) for three in found)


def cells(line: str) -> list[str]:
    return [cell.strip().replace("\\", "") for cell in line.strip().strip("|").split(" | ")]


def rows(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of the line, the row's cells by column) of all Markdown tables."""
    header: list[str] = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells(line)
        elif not set(line) <= set("|-: "):
            yield number, dict(zip(header, cells(line), strict=False))


@functools.cache
def written() -> tuple[str, list[dict[str, str]]]:
    """What stages and benchmarks wrote, and the rows of the tables in it."""
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files(*WRITTEN))
    return text, [row for _, row in rows(text)]


# What expressions of the list are made of


def at(place: str) -> Any:
    r"""A number of a committed JSON or YAML file, or an array where `*` stands for all files, or entries of a list or object.

    place: FILE:PATH, as "metrics/results/RUN.json:layers.*.delta_loss.value"; FILE may be a name that the list gives one.
    Behind `*`, entries that lack the rest of the path are left out. `\.` is a dot in a name. null is NaN.
    """
    file, _, path = place.partition(":")
    file = load_list()["files"].get(file, file)
    many = "*" in file
    found = [load(name.relative_to(REPOSITORY).as_posix()) for name in files(file)] if many else [load(file)]
    for step in re.split(r"(?<!\\)\.", path):
        key = step.replace("\\.", ".")
        if key == "*":
            found, many = [entry for part in found for entry in (part.values() if isinstance(part, dict) else part)], True
        elif many:
            found = [part[key] for part in found if isinstance(part, dict) and key in part]
        else:
            found = [part[int(key) if isinstance(part, list) else key] for part in found]
    values = [math.nan if value is None else value for value in found]
    return np.array(values) if many else values[0]


def column(file: str, name: str, **where: str) -> Any:
    """The first number in each cell of a column of a committed CSV table. where: column=value, which rows; `_` is a blank."""
    table = pd.read_csv(REPOSITORY / load_list()["files"].get(file, file), dtype=str, keep_default_na=False)
    for key, wanted in where.items():
        table = table[table[key.replace("_", " ")] == wanted]
    return np.array([float(re.search(SIGNED, cell)[0].replace(",", "")) for cell in table[name]])


def spread(array: Any) -> list[float]:
    """Median, least and largest."""
    return [np.median(array), np.min(array), np.max(array)]


def count(condition: Any) -> int:
    return int(np.sum(condition))


FUNCTIONS = {"at": at, "column": column, "count": count, "min": np.min, "max": np.max, "median": np.median, "mean": np.mean}
FUNCTIONS |= {"sum": np.sum, "len": len, "abs": np.abs, "log10": np.log10, "spread": spread}


def evaluate(expression: str) -> list[float]:
    """The numbers that an expression of the list gives. It is code of this repository, and runs as such."""
    return np.ravel(eval(str(expression), {"__builtins__": {}}, FUNCTIONS)).astype(float).tolist()


@functools.cache
def load_list() -> dict[str, Any]:
    """The list, whose parts may be empty."""
    parts = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    return {name: part or ({} if name in ("generated", "files") else []) for name, part in parts.items()}


# Pages


def blanked(text: str, pattern: str) -> str:
    """The text with what matches the pattern replaced by blanks; places stay."""
    return re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.MULTILINE)


def numbers_of(text: str, kinds: list[dict[str, str]]) -> list[Number]:
    """The numbers of a page but those of code, links, what tests/docs_parts.py makes, and the kinds that are no findings."""
    text = blanked(text, r"<!-- part: [\s\S]*?<!-- end of part -->")
    text = blanked(text, r"^```[\s\S]*?^```|(?<=\n\n)(?: {4}.*\n+)+|`[^`\n]*`|\]\([^)\n]*\)|https?://\S+")
    for kind in kinds:
        text = blanked(text, kind["pattern"])
    return [Number(match[0], match.start(), match.end()) for match in ALONE.finditer(text)]


def look_at(name: str, text: str) -> Page:
    """Find the source of every number of a page."""
    known = load_list()
    page = Page(name, text, numbers_of(text, known["kinds"]))
    _from_list(page, known)
    everything, table = written()
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    by_line: dict[int, list[Number]] = {}
    for number in page.numbers:
        by_line.setdefault(bisect.bisect_right(starts, number.start) - 1, []).append(number)
    shown = dict(rows(text))
    for place, found in by_line.items():
        line = text[starts[place] :].partition("\n")[0].strip().removeprefix("- ")
        as_written = len(line) >= LONG and line in everything
        if as_written or (place in shown and any(shown[place].items() <= row.items() for row in table)):
            for number in found:
                page.sources.setdefault(number, "a file that a stage or a benchmark wrote")
    beside = set()
    for match in INTERVAL.finditer(text):
        three = [number for number in page.numbers if match.start() <= number.start < match.end()]
        beside.update(three)
        if len(three) == 3 and _is_estimate(three):
            for number in three:
                page.sources.setdefault(number, "an estimate")
    for number in page.lost():
        if number.digits < ENOUGH_DIGITS or number in beside or page.line(number) - 1 in shown:
            continue
        if number.text.replace(",", "") in printed():
            page.sources[number] = "a file that is made to be read"
    return page


def _from_list(page: Page, known: dict[str, Any]) -> None:
    """Take the sources that the list names; say where the list and the page, or a file, do not agree."""
    for entry in [*known["derived"], *known["stated"], *known["exceptions"], *known["debts"]]:
        if entry.get("page", "README.md") != page.name:
            continue
        words = entry["words"]
        matches = said(words, page.text)
        if not matches:
            page.problems.append(f"{page.name} says no longer {words!r}: take it out of {LIST.name}, or correct it")
            continue
        for match in matches:
            covered = [number for number in page.numbers if match.start() <= number.start and number.end <= match.end()]
            if not covered:
                page.problems.append(f"{words!r} has no number that needs a source: take it out of {LIST.name}")
            for number, source in zip(covered, _sources(page, entry, covered), strict=True):
                page.sources[number] = source


def said(words: str, text: str) -> list[re.Match[str]]:
    """Where a page says something, however its lines break."""
    return list(re.finditer(r"\s+".join(map(re.escape, words.split())), text))


def _sources(page: Page, entry: dict[str, Any], covered: list[Number]) -> list[str]:
    words = entry["words"]
    if reason := entry.get("reason", entry.get("cure")):
        return [reason] * len(covered)
    if "file" in entry:
        if entry["holds"] not in (REPOSITORY / entry["file"]).read_text(encoding="utf-8"):
            page.problems.append(f"{entry['file']} holds no longer {entry['holds']!r}, from which {page.name} has {words!r}")
        return [entry["file"]] * len(covered)
    values = []
    for expression in entry["numbers"]:
        try:
            values += [(value, str(expression)) for value in evaluate(expression)]
        except Exception as error:  # whatever is wrong with it, the list is to be mended
            page.problems.append(f"{expression} cannot be computed ({type(error).__name__}: {error}), for {words!r}")
            return [""] * len(covered)
    if len(values) != len(covered):
        shown = ", ".join(number.text for number in covered)
        page.problems.append(f"{words!r} has {len(covered)} numbers ({shown}), and {LIST.name} computes {len(values)} for it")
        return [""] * len(covered)
    for number, (value, expression) in zip(covered, values, strict=True):
        if not number.is_about(value):
            line = page.line(number)
            page.problems.append(f"{page.name}:{line} says {number.text} in {words!r}, and it is {value:.6g}: {expression}")
    return [expression for _, expression in values]


def _is_estimate(three: list[Number]) -> bool:
    alike = three[0].range_of(estimates(), key=operator.itemgetter(0))
    return any(all(n.is_about(v) for n, v in zip(three, estimate, strict=True)) for estimate in alike)


@functools.cache
def places() -> list[tuple[float, str]]:
    """All numbers of committed JSON files, ascending, each with where it is."""
    found = []
    for file in files(*ESTIMATES):
        name = str(file.relative_to(REPOSITORY))
        found += [(abs(value), f"{name}:{path}") for path, value in leaves(load(name))]
    return sorted(found)


def candidates(number: Number, sentence: str) -> list[str]:
    """Up to three expressions that give such a number, those first whose names the sentence has."""
    named = set(re.findall(r"[a-z]\w+", sentence.lower().replace("-", "")))
    found = []
    for scale in (1, 100):
        about = [place for _, place in number.range_of(places(), key=lambda pair, scale=scale: scale * pair[0])]
        # Words that path and sentence share; among equals, what lies least deep.
        found += [
            (len(named & set(re.split(r"[-/.:_]", place.lower()))) - 0.3 * place.count("."), scale, place) for place in about
        ]
    best = sorted(found, key=lambda entry: -entry[0])[:3]
    return [("100 * " if scale == 100 else "") + f'at("{place}")' for _, scale, place in best]


def stub(page: Page, lost: list[Number]) -> str:
    """An entry for the list that covers some numbers of one sentence, with what gives such numbers as a comment."""
    before = re.search(r"(?:\S+[ \n]+){0,2}\S*$", page.text[: lost[0].start])[0]
    after = re.match(r"[^\s|]*(?:[ \n]+[^\s|]+)?", page.text[lost[-1].end :])[0]
    words = " ".join((before + page.text[lost[0].start : lost[-1].end] + after).split())
    lines = [f"  - words: {json.dumps(words, ensure_ascii=False)}", "    numbers:"]
    for number in page.numbers:
        if lost[0].start <= number.start <= lost[-1].start:
            first, *others = [*candidates(number, page.sentence(number)), "?"]
            lines.append(f"      - {first}  # {number.text}" + "".join(f"; {other}" for other in others if other != "?"))
    head = "" if page.name == "README.md" else f"    page: {page.name}\n"
    return f"{page.name}:{page.line(lost[0])}: {', '.join(number.text for number in lost)}\n{lines[0]}\n{head}" + "\n".join(
        lines[1:]
    )


def prune() -> int:
    """Take the entries out of the list whose words are on no page any more. Returns how many."""
    texts, kept, gone = pages(), [], 0
    for block in re.split(r"(?m)^(?=  - |\S|$)", LIST.read_text(encoding="utf-8")):
        entry = (yaml.safe_load(block) or [{}])[0] if block.startswith("  - ") else {}
        stale = "words" in entry and not said(entry["words"], texts[entry.get("page", "README.md")])
        gone += stale
        kept += [] if stale else [block]
    LIST.write_text("".join(kept), encoding="utf-8")
    load_list.cache_clear()
    return gone


def pages() -> dict[str, str]:
    """README.md and docs/ but what is printed from the code: name -> text."""
    found = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    names = [file.relative_to(REPOSITORY).as_posix() for file in found]
    return {name: (REPOSITORY / name).read_text(encoding="utf-8") for name in names if name not in load_list()["generated"]}


def complaints(name: str, text: str) -> list[str]:
    """What is wrong with the numbers of a page, one line each."""
    page = look_at(name, text)
    return page.problems + [
        f"{name}:{page.line(number)}: {number.text} has no source, in {page.sentence(number)!r}" for number in page.lost()
    ]


REMEDY = """Correct the page, or tie its words to their source in tests/readme_numbers.yaml: `derived` (computed from a
committed file), `stated` (a committed file holds it), `exceptions` (none should, and why) or `debts` (one should). `make
numbers` lists the numbers without a source, as entries for that file."""


def main(arguments: list[str]) -> int:
    """Print every number without a source, as entries for the list. Returns the exit code."""
    if arguments not in ([], ["--prune"]):
        print("usage: python tests/readme_numbers.py [--prune]", file=sys.stderr)
        return 2
    if arguments:
        print(f"{prune()} entries taken out of {LIST.name}")
    wrong = 0
    for name, text in pages().items():
        page = look_at(name, text)
        wrong += len(page.problems) + len(page.lost())
        for problem in page.problems:
            print(problem)
        for _, lost in itertools.groupby(page.lost(), key=page.sentence):
            print("\n" + stub(page, list(lost)))
    for debt in load_list()["debts"]:
        print(f"\nno source, {debt.get('page', 'README.md')}: {debt['words']}\n    cure: {debt['cure']}")
    print(f"\n{wrong} to mend" if wrong else "\nevery other number has a source")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
