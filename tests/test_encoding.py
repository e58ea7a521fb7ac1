"""Text is UTF-8 whatever the locale: every call that reads or writes text says so."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPENS_BYTES = {"Image", "gzip", "tarfile", "zipfile", "webbrowser", "os", "pq"}  # modules whose `open` is not a text file's


def sources() -> list[Path]:
    """Every Python file that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, check=True, encoding="utf-8"
    )
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def without_encoding(source: str) -> list[int]:
    """The lines of calls whose text would be in the locale's encoding."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and _is_unspecified(node)]


def _is_unspecified(call: ast.Call) -> bool:
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    method = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = call.func.value.id if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) else ""
    if "encoding" in named or None in named:  # None: **options, which no reader of the source can judge
        return False
    if method == "read_text":
        return not call.args
    if method == "write_text" and owner != "artifacts":
        return isinstance(call.func, ast.Attribute) and len(call.args) < 2
    if method == "open" and owner not in OPENS_BYTES:
        positional = call.args[0 if isinstance(call.func, ast.Attribute) else 1 :]
        mode = named.get("mode", positional[0] if positional else ast.Constant("r"))
        return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))
    is_text = isinstance(named.get("text"), ast.Constant) and named["text"].value
    return method in ("run", "Popen", "check_output", "check_call") and bool(is_text)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("path.read_text()", True),
        ("(root / name).read_text()", True),
        ('path.read_text(encoding="utf-8")', False),
        ('path.read_text("utf-8")', False),
        ("path.write_text(text)", True),
        ('path.write_text(text, "utf-8")', False),
        ("write_text(path, text)", False),
        ("path.open()", True),
        ('path.open("w")', True),
        ('path.open("rb+")', False),
        ("open(path)", True),
        ('open(path, "wb")', False),
        ('open(path, mode="a", encoding="utf-8")', False),
        ("Image.open(path)", False),
        ("subprocess.run(command, text=True)", True),
        ('subprocess.run(command, encoding="utf-8")', False),
        ("subprocess.run(command)", False),
    ],
)
def test_the_rule_finds_what_it_forbids(source, found):
    assert bool(without_encoding(source)) is found


def test_every_text_has_an_encoding():
    bad = [f"{path.relative_to(ROOT)}:{line}" for path in sources() for line in without_encoding(path.read_text("utf-8"))]

    assert not bad
