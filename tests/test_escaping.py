"""Foreign text in every kind of file: shown as it is written, never obeyed, and read back as it was."""

import csv
import shutil
import subprocess
import unicodedata

import pandas as pd
import pytest

from textguard.artifacts import read_csv, write_csv
from textguard.errors import InvalidArtifact
from textguard.estimates.statistics import Estimate
from textguard.report.escaping import LATEX_LETTERS, LATEX_SIGNS, for_latex, for_markdown, shortened, visible
from textguard.report.rendering import Table, as_latex, as_markdown, write_table

# What a spreadsheet would run, and what it gets instead.
FORMULAS = {
    "=cmd|' /C calc'!A0": "'=cmd|' /C calc'!A0",
    "+1": "'+1",
    "-5": "'-5",
    "@SUM(1)": "'@SUM(1)",
    "\t=1": "'\t=1",
    "\r=1": "'\r=1",
    "\n=1": "'\n=1",
    "'=1": "''=1",
    "''=1": "'''=1",
}
WORDS = ["NA", "N/A", "#N/A", "null", "None", "nan", "NaN", "inf", "007", "1e3", "True", "false", "0x10", "1_000", "2024-01-01"]
ODD = [" ", " a ", "'tis", "'", "a=b", "a,b", 'a"b', '"', "a\nb", "a\rb", "a\r\nb", "café", "猫", "\x00", "\x1b", "\ufeffa"]


@pytest.mark.parametrize("texts", [list(FORMULAS), WORDS, ODD, ["a\r=cmd"]], ids=["formulas", "words", "odd", "line end"])
def test_what_a_csv_file_says_is_what_was_written(tmp_path, texts):
    table = pd.DataFrame({"=class": texts, "number": range(0, -len(texts), -1), "share": -0.1})
    write_csv(tmp_path / "t.csv", table)
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["'=class", "number", "share"]
    assert [row[0] for row in rows] == [FORMULAS.get(text, text) for text in texts]
    assert [row[1:] for row in rows] == [[str(-place), "-0.1"] for place in range(len(texts))]
    write_csv(tmp_path / "t.csv", table.rename(columns={"=class": "class"}))
    found = read_csv(tmp_path / "t.csv", "stage", ["class"], ["number", "share"])
    assert found["class"].to_list() == texts
    assert found["number"].to_list() == table["number"].to_list()


def test_numbers_among_texts_stay_numbers(tmp_path):
    write_csv(tmp_path / "t.csv", pd.DataFrame({"a": [1, None, "=x", -2.5], "b": [1, None, 2, -3]}, dtype=object))
    assert (tmp_path / "t.csv").read_text(encoding="utf-8") == "a,b\n1,1\n,\n'=x,2\n-2.5,-3\n"


DAMAGED = {
    "nothing": ("", "cannot be read"),
    "another header": ("a;b\nx;1\n", "lacks the columns a, b"),
    "no number": ("a,b\nx,\n", "has a b that is no finite number"),
    "a word": ("a,b\nx,1\ny,NA\n", "Unable to parse string 'NA'"),
    "true": ("a,b\nx,True\n", "has a b that is no finite number"),
    "infinite": ("a,b\nx,1e999\n", "has a b that is no finite number"),
    "many digits": (f"a,b\nx,{'9' * 5000}\n", "cannot be read"),
    "too large": ("a,b\nx,1\ny,9\n", "has a b of 9; allowed: from 0 to 5"),
    "too small": ("a,b\nx,-0.5\n", "has a b of -0.5; allowed: from 0 to 5"),
    "a short row": ("b,a\n1\n", "has a row without its a"),
    "longer rows": ("a,b\nx,1,2\n", "has rows with more cells than its header"),
    "one longer row": ("a,b\nx,1\nx,1,2\n", "cannot be read"),
    "an open quote": ('a,b\n"x,1\n', "cannot be read"),
    "not UTF-8": (b"a,b\n\xe9,1\n", "cannot be read"),
}


@pytest.mark.parametrize(("content", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_csv_file_is_named(tmp_path, content, said):
    file = tmp_path / "t.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidArtifact) as error:
        read_csv(file, "stage", ["a"], ["b"], {"b": (0, 5)})
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("delete it and run 'dvc repro': stage 'stage' writes it")


@pytest.mark.parametrize(
    "content", ["\ufeffa,b\nx,1\n", "a,b\r\nx,1\r\n", "b,a,c\n1,x,\n"], ids=["BOM", "CRLF", "another column"]
)
def test_what_is_whole_is_read(tmp_path, content):
    (tmp_path / "t.csv").write_text(content, encoding="utf-8", newline="")
    assert read_csv(tmp_path / "t.csv", "stage", ["a"], ["b"])[["a", "b"]].to_numpy().tolist() == [["x", 1]]


def test_what_cannot_be_seen_is_spelled_out():
    assert visible("a\x00\x1b[31m\u202eb\ud800\u2028\x85\ufffe") == r"a\x00\x1b[31m\u202eb\ud800\u2028\x85\ufffe"
    for plain in ("café", "猫", "\U0001f600", "two\nlines\t", "a\u200db", "non-breaking\u00a0blank"):
        assert visible(plain) == plain
    assert shortened("a\r\nb\nc\td", 60) == "a b c d"
    assert shortened("x" * 10_000, 10) == "x" * 9 + "…"
    controls = set(map(chr, range(0x20))) - set("\t\n\r")  # which XML 1.0 has no place for, as for the others
    for character in (*controls, "\ud800", "\udfff", "\ufffe", "\uffff"):
        assert character not in visible(character)


MARKDOWN = {
    "a|b": r"a\|b",
    "a*b_c": r"a\*b\_c",
    "[x](y)": r"\[x\](y)",
    "<b>&amp;": "&lt;b>&amp;amp;",
    "a\nb": "a b",
    "@team": "`@team`",
    "#1": "`#1`",
    "GH-1": "`GH-1`",
    "$x$": "`$x$`",
    "~~x~~": "`~~x~~`",
    "https://x.example": "`https://x.example`",
    "WWW.x.example": "`WWW.x.example`",
    ":smile:": "`:smile:`",
    "@a|b": r"`@a\|b`",
    "@`a``": "``` @`a`` ```",
    "@\x07\nb": r"`@\x07 b`",
}


@pytest.mark.parametrize(("text", "written"), MARKDOWN.items())
def test_markdown_makes_nothing_of_foreign_text(text, written):
    assert for_markdown(text) == written
    line, *_ = as_markdown(Table("t", "c", [text], [])).splitlines()
    assert line == f"| {written} |"


LATEX = {
    "a_b & 5 % $x$ {#}": r"a\_b \& 5 \% \$x\$ \{\#\}",
    "\\input{x}~^`": r"\textbackslash{}input\{x\}\textasciitilde{}\textasciicircum{}\textasciigrave{}",
    "<|>": r"\textless{}\textbar{}\textgreater{}",
    "[x] *": "{[}x{]} {*}",
    "a---b": "a-{}-{}-b",
    "a\nb\x07": r"a b\textbackslash{}x07",
    "café Łódź “x”": "café Łódź “x”",
    "猫Ж": "U+732BU+0416",
}


@pytest.mark.parametrize(("text", "written"), LATEX.items())
def test_latex_makes_nothing_of_foreign_text(text, written):
    assert for_latex(text) == written


def test_pdflatex_takes_every_text(tmp_path):
    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex: install texlive-latex-base to run this test")
    texts = [*MARKDOWN, *LATEX, *FORMULAS, *WORDS, *ODD, "\ud800"]
    texts += ["".join(sorted(LATEX_SIGNS)), "".join(sorted(LATEX_LETTERS)), "".join(map(chr, range(0x20, 0x7F)))]
    table = as_latex(Table("t", texts[0], ["name", "x"], [[text, Estimate(float("nan"), 0, 0.25, 1)] for text in texts]))
    rules = "".join(rf"\let\{name}\hline" for name in ("toprule", "midrule", "bottomrule"))  # booktabs is not in the base
    head = r"\documentclass{article}\usepackage[utf8]{inputenc}\usepackage[T1]{fontenc}"
    (tmp_path / "t.tex").write_text(f"{head}{rules}\\begin{{document}}\n{table}\\end{{document}}\n", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-draftmode", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]


def test_every_letter_that_latex_files_hold_is_a_letter():
    assert {unicodedata.category(letter)[0] for letter in LATEX_LETTERS} == {"L"}


def test_a_table_of_foreign_texts_is_the_same_in_every_format(tmp_path):
    texts = [*MARKDOWN, *LATEX, *FORMULAS]
    write_table(Table("t", "c", ["name", "x"], [[text, Estimate(1.0, 1.0, 1.0, 1)] for text in texts]), tmp_path)
    markdown = (tmp_path / "t.md").read_text(encoding="utf-8")
    assert markdown.count("\n") == 2 + len(texts) + 2
    assert read_csv(tmp_path / "t.csv", "tables", ["name"], ["x"])["name"].to_list() == texts
    latex = (tmp_path / "t.tex").read_text(encoding="utf-8")
    assert sum(line.endswith(r"\\") for line in latex.splitlines()) == 1 + len(texts)
