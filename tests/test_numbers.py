"""Every number on README.md and docs/ is in a committed file, or tests/readme_numbers.yaml says why not."""

import re

import pytest
import yaml

import readme_numbers
from readme_numbers import REMEDY, complaints, load_list, look_at, numbers_of, pages

MOST_UNNOTICED = 0.05  # of changed digits: a number in a sentence that another table prints too


@pytest.mark.parametrize("name", pages())
def test_every_number_has_a_source(name):
    found = complaints(name, pages()[name])
    assert found == [], "\n".join([*found, REMEDY])


def test_every_entry_is_on_a_page_and_every_kind_is_used():
    known, texts = load_list(), pages()
    entries = [entry for part in ("derived", "stated", "exceptions", "debts") for entry in known[part]]
    assert {entry.get("page", "README.md") for entry in entries} <= set(texts)
    assert [kind for kind in known["kinds"] if not any(re.search(kind["pattern"], text) for text in texts.values())] == []


def changed(text, number):
    """The page with another last digit of the number."""
    mantissa, e, power = number.text.partition("e")
    other = f"{mantissa[:-1]}{(int(mantissa[-1]) + 1) % 10}{e}{power}"
    return text[: number.start] + other + text[number.end :]


def test_a_changed_digit_is_noticed():
    """Nearly everywhere."""
    numbers = [(name, number) for name, text in pages().items() for number in look_at(name, text).numbers][::4]
    unnoticed = [(name, number) for name, number in numbers if complaints(name, changed(pages()[name], number)) == []]
    assert len(unnoticed) <= MOST_UNNOTICED * len(numbers), unnoticed


FILES = {
    "metrics/tables/t.md": "| Run | DL (nats) | SDC (%) | n |\n| --- | --- | --- | --- |\n| a | 0.25 [0.2, 0.3] | 1.23 | 7 |\n",
    "metrics/results/a.json": '{"sdc": {"value": 0.0123, "low": 0.01, "high": 0.02}, "layers": [{"x": 2}, {"x": 8}, {"y": 1}]}',
    "stages/x.py": "LIMIT = 8\n",
}
EMPTY = {"generated": {}, "files": {}, "kinds": [], "derived": [], "stated": [], "exceptions": [], "debts": []}


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Judges a page of a small repository, by a list with these entries."""
    cached = ("load", "printed", "estimates", "written", "places", "load_list")
    monkeypatch.setattr(readme_numbers, "REPOSITORY", tmp_path)
    monkeypatch.setattr(readme_numbers, "LIST", tmp_path / "list.yaml")
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")

    def complaints_of(text, **entries):
        for name in cached:
            getattr(readme_numbers, name).cache_clear()
        entries = {part: [{"page": "p.md"} | entry for entry in found] for part, found in entries.items()}
        (tmp_path / "list.yaml").write_text(yaml.safe_dump(EMPTY | entries), encoding="utf-8")
        return complaints("p.md", text)

    yield complaints_of
    for name in cached:
        getattr(readme_numbers, name).cache_clear()


def test_a_row_is_found_whole_or_not_at_all(judge):
    head = "| Run | SDC (%) | n |\n| --- | --- | --- |\n"
    assert judge(head + "| a | 1.23 | 7 |\n") == []
    for row in ("| a | 1.24 | 7 |", "| a | 1.23 | 8 |", "| b | 1.23 | 7 |"):
        assert len(judge(head + row + "\n")) == 2, row


def test_an_interval_is_one_estimate(judge):
    assert judge("It is 1.23 [1.00, 2.00] percent, or 0.25 [0.2, 0.3] nats.") == []
    assert len(judge("It is 1.23 [1.00, 0.30] percent.")) == 3


@pytest.mark.parametrize(("text", "sourceless"), [("1.23 percent", []), ("1.2 percent", ["1.2"]), ("1.24x", ["1.24"])])
def test_a_number_in_a_sentence_needs_three_digits_and_a_file_that_prints_it(judge, text, sourceless):
    assert [line.split()[1] for line in judge(f"One\nIt is {text}.")] == sourceless


def test_a_complaint_says_where(judge):
    assert judge("One.\n\nTwo is\n5 here. Not 1.23.") == ["p.md:4: 5 has no source, in 'Two is 5 here'"]


def test_numbers_are_computed_from_files(judge):
    entry = {"words": "2 to 8 times, 4.0", "numbers": ['at("metrics/results/a.json:layers.*.x")', "8 / 2"]}
    assert judge("It is 2 to 8\ntimes, 4.0 more.", derived=[entry]) == []
    assert "p.md says no longer '2 to 8 times, 4.0'" in judge("It is 2 to 9 times, 4.0.", derived=[entry])[0]
    (line,) = judge("It is 2 to 8 times, 4.0 more.", derived=[entry | {"numbers": [*entry["numbers"][:1], "8 / 3"]}])
    assert line.startswith("p.md:1 says 4.0 in '2 to 8 times, 4.0', and it is 2.66667: 8 / 3")
    assert "computes 2 for it" in judge("It is 2 to 8 times, 4.0.", derived=[entry | {"numbers": entry["numbers"][:1]}])[0]
    for wrong in ('at("metrics/results/a.json:no.way")', 'open("list.yaml")', "1 +"):
        assert "cannot be computed" in judge("It is 2 to 8 times, 4.0.", derived=[entry | {"numbers": [wrong]}])[0]


def test_files_have_to_hold_what_is_stated(judge):
    entry = {"words": "at most 8 of", "file": "stages/x.py", "holds": "LIMIT = 8"}
    assert judge("There are at most 8 of them.", stated=[entry]) == []
    assert "holds no longer" in judge("There are at most 8 of them.", stated=[entry | {"holds": "LIMIT = 9"}])[0]


def test_an_entry_that_is_not_needed_is_refused(judge):
    entry = {"words": "only five", "reason": "none"}
    assert "says no longer" in judge("There are six.", exceptions=[entry])[0]
    assert "has no number" in judge("There are only five.", exceptions=[entry])[0]


def test_code_and_addresses_hold_no_numbers():
    text = "A 1 `b 2` [c](d/3) https://e/4\n\n    f 5\n    g 6\n\n```\nh 7\n```\n| i | 8.5 |\nResNet-18, v2, 4xx, 9."
    assert [number.text for number in numbers_of(text, [])] == ["1", "8.5", "18", "9"]


def test_what_is_missing_is_printed_as_an_entry_and_stale_ones_go(judge, tmp_path, monkeypatch, capsys):
    text = "One sentence.\nDamage is 2 to\n8 times as large as before. The rest is 7.\n"
    (tmp_path / "p.md").write_text(text, encoding="utf-8")
    monkeypatch.setattr(readme_numbers, "pages", lambda: {"p.md": (tmp_path / "p.md").read_text(encoding="utf-8")})
    judge("")
    entries = "".join(f"  - words: {words}\n    page: p.md\n    reason: none\n" for words in ("The rest is 7", "The rest is 6"))
    listed = tmp_path / "list.yaml"
    empty = listed.read_text(encoding="utf-8")
    listed.write_text(empty.replace("exceptions: []\n", f"exceptions:\n{entries}\n# More\n"), encoding="utf-8")
    readme_numbers.load_list.cache_clear()
    assert readme_numbers.main(["--prune"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("1 entries taken out of list.yaml\n\np.md:2: 2, 8\n")
    (entry,) = yaml.safe_load(printed[printed.index("  - words") : printed.rindex("\n\n")])
    assert entry["words"] == "Damage is 2 to 8 times"
    assert [readme_numbers.evaluate(number) for number in entry["numbers"]] == [[2.0], [8.0]]
    kept = yaml.safe_load(listed.read_text(encoding="utf-8"))
    assert [known["words"] for known in kept["exceptions"]] == ["The rest is 7"]
    assert judge("Damage is 2 to 8 times. It is 1.23 percent.", derived=[entry | {"page": "p.md"}]) == []
    assert readme_numbers.main(["--all"]) == 2
