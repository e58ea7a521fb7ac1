"""The parts of README.md and docs/ that are made from other files: `python tests/docs_parts.py` writes them anew.

A part stands between `<!-- part: KIND ARGUMENTS -->` and `<!-- end of part -->`. The notebook is one page as a whole.
tests/test_docs.py compares.
"""

import ast
import contextlib
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
PART = re.compile(r"(<!-- part: (\w+)(?: ([^\n]*))? -->\n).*?(<!-- end of part -->\n)", flags=re.DOTALL)
TUTORIAL = REPOSITORY / "docs" / "own-classifier.md"
NOTEBOOK = TUTORIAL.with_suffix(".ipynb")
BLOCK = re.compile(r'^```(\w+)(?: title="(\S+)")?\n(.*?)^```$', flags=re.MULTILINE | re.DOTALL)
SAID_ON_THE_PAGE = f"The same page is [a notebook]({NOTEBOOK.name}) for Jupyter and Colab.\n\n"
INSTALL = "pip install 'textguard @ git+https://github.com/OWNER/REPOSITORY'"
# What a page leaves to its reader: a folder, and a shell that finds the kernel's own programs.
SET_UP = """
import os
import sys
import tempfile

os.chdir(tempfile.mkdtemp(prefix="textguard-"))  # all files of this notebook
os.mkdir("mypkg")
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
print(os.getcwd())
"""
# Sections of params.yaml whose keys are names that a user chooses.
NAMED = ("backbones", "datasets", "texts", "treatments")


def pages() -> list[Path]:
    """README.md and docs/."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def rewritten(text: str) -> str:
    """A page with every part as it has to be."""
    return PART.sub(lambda found: "\n".join([found[1], KINDS[found[2]](found[3] or ""), found[4]]), text)


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(arguments: str) -> str:
    """Some columns and rows of a table that a stage wrote: FILE; COLUMN | COLUMN; COLUMN=PATTERN & COLUMN=PATTERN."""
    file, columns, *conditions = arguments.split("; ")
    tables = re.findall(r"(?:^\|.*\n)+", (REPOSITORY / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    shown = columns.split(" | ")
    head, _, *lines = next(found for found in map(str.splitlines, tables) if set(shown) <= set(_cells(found[0])))
    rows = [dict(zip(_cells(head), _cells(line), strict=True)) for line in lines]
    wanted = [condition.split("=", 1) for condition in conditions[0].split(" & ")] if conditions else []
    kept = [row for row in rows if all(re.fullmatch(pattern, row[name].replace("\\", "")) for name, pattern in wanted)]
    return markdown(shown, ([row[name] for name in shown] for row in kept))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))]


def lines(arguments: str) -> str:
    """The lines of a file from the one that starts so to the next empty one, as a list: FILE; START."""
    file, start = arguments.split("; ")
    found = re.search(rf"^{re.escape(start)}(?:.+\n)+", (REPOSITORY / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return "".join(f"- {line}\n" for line in found[0].splitlines())


def parameters(file: str) -> str:
    """Every key of a YAML file, with its value there and its comment."""
    rows: dict[str, tuple[str, str]] = {}
    path: list[tuple[int, str]] = []
    for line in (REPOSITORY / file).read_text(encoding="utf-8").splitlines():
        found = re.fullmatch(r"( *)([\w.]+):(?: +(?!#)(.*?))?(?: +# ?(.*))?", line)
        if found is None:
            continue
        depth = len(found[1])
        path = [*(step for step in path if step[0] < depth), (depth, found[2])]
        names = [name for _, name in path]
        if names[0] in NAMED and len(names) > 1:
            names[1] = "*"
        value = f"`{found[3]}`" if found[3] else ""
        rows.setdefault(".".join(names), (value.replace("|", "\\|"), (found[4] or "").replace("|", "\\|")))
    # Below the top, what neither has a value nor says anything is a heading.
    shown = [(f"`{name}`", value, said) for name, (value, said) in rows.items() if value or said or "." not in name]
    return markdown(("parameter", f"in `{file}`", "meaning"), shown)


def stages(_: str) -> str:
    """The stages of dvc.yaml, with the first sentence of their scripts."""
    rows = []
    for name, stage in yaml.safe_load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"].items():
        said = ast.get_docstring(ast.parse((REPOSITORY / "stages" / f"{name}.py").read_text(encoding="utf-8")))
        keys = [*stage.get("matrix", [])]
        each = "run" if "seed" in keys else ", ".join(keys) or "grid"
        sections = dict.fromkeys(key.partition(".")[0] for key in stage.get("params", []) if isinstance(key, str))
        outs = [
            next(iter(out)) if isinstance(out, dict) else out for out in [*stage.get("outs", []), *stage.get("metrics", [])]
        ]
        written = ", ".join(f"`{re.sub(r'[$][{][^}]*[}](-[$][{][^}]*[}])*', 'KEY', out)}`" for out in outs)
        rows.append((f"`{name}`", each, " ".join(said.split("\n\n")[0].split()), _code(sections), written))
    return markdown(("stage", "one for each", "what it does", "sections of params.yaml", "writes"), rows)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def command(arguments: str) -> str:
    """What `textguard ARGUMENTS --help` prints."""
    from textguard.assessment.command import run

    printed = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="100"), contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        run([*arguments.split(), "--help"])
    return f"```text\n{printed.getvalue().rstrip()}\n```\n"


def targets(_: str) -> str:
    """The targets of the Makefile, with what it says of them."""
    found = re.findall(r"^([a-z]+):.*?## *(.*)$", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return markdown(("command", "what it does"), ((f"`make {name}`", said) for name, said in found))


KINDS = {"table": table, "lines": lines, "parameters": parameters, "stages": stages, "command": command, "targets": targets}


def notebook(page: str) -> str:
    """A page as a notebook (nbformat 4.5): Python, files with a title and shell lines are its cells, other blocks its text."""
    page, cells, end = page.replace(SAID_ON_THE_PAGE, ""), [], 0
    for found in BLOCK.finditer(page):
        language, file, content = found.groups()
        if file:
            code = [f"%%writefile {file}\n{content}"]
        elif content.strip() == INSTALL:
            code = [f"# Without the first two characters, this installs the library.\n# %{INSTALL}", SET_UP]
        elif language in ("python", "sh"):
            code = [content if language == "python" else f"%%bash\n{content}"]
        else:
            continue
        cells += [_cell("markdown", page[end : found.start()]), *(_cell("code", source) for source in code)]
        end = found.end()
    cells.append(_cell("markdown", page[end:]))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    found = {"cells": [cell for cell in cells if cell["source"]], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _cell(kind: str, source: str) -> dict[str, Any]:
    """A cell, called by its content: it keeps its name wherever it stands."""
    source = source.strip("\n")
    outputs = {"execution_count": None, "outputs": []} if kind == "code" else {}
    name = hashlib.sha256(source.encode()).hexdigest()[:8]
    return {"cell_type": kind, "id": name, "metadata": {}, **outputs, "source": source.splitlines(keepends=True)}


if __name__ == "__main__":
    for page in pages():
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")
    NOTEBOOK.write_text(notebook(TUTORIAL.read_text(encoding="utf-8")), encoding="utf-8")
