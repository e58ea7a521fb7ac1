"""README.md and docs/: short enough, made from what they tell of, and with no link or name that leads nowhere."""

import json
import re

import pytest
import yaml

import docs_parts
from conftest import REPOSITORY

PAGES = {page.relative_to(REPOSITORY).as_posix(): page.read_text(encoding="utf-8") for page in docs_parts.pages()}
README = PAGES["README.md"]
LINK = re.compile(r"!?\[(?:[^\]]|\](?=\())*?\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", flags=re.MULTILINE)
ON_GITHUB = "../../actions/"  # beside the files of a repository


def test_the_readme_is_read_in_five_minutes():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert len(README.encode()) <= 9000
    assert max(map(len, lines)) <= 160
    assert max(line.count("|") for line in lines if line.startswith("|")) <= 6  # five columns


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if docs_parts.PART.search(text)])
def test_parts_are_as_their_sources_have_them(name):
    assert PAGES[name] == docs_parts.rewritten(PAGES[name]), "run 'python tests/docs_parts.py'"


def test_the_notebook_is_its_page_as_jupyter_reads_it():
    written = docs_parts.NOTEBOOK.read_text(encoding="utf-8")
    assert written == docs_parts.notebook(PAGES["docs/own-classifier.md"]), "run 'python tests/docs_parts.py'"
    assert docs_parts.SAID_ON_THE_PAGE in PAGES["docs/own-classifier.md"]
    found = json.loads(written)
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in found["cells"]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w-]{1,64}", name) for name in names)


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"^```[\s\S]*?^```|`[^`\n]*`", "`code`", text, flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    words = (re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", found).lower() for found in HEADING.findall(text))
    return {re.sub(r"[^\w\- ]", "", each).strip().replace(" ", "-") for each in words}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    for target in LINK.findall(prose(PAGES[name])):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith(ON_GITHUB):
            continue
        file = ((REPOSITORY / name).parent / path).resolve() if path else REPOSITORY / name
        assert file.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{name} links to {target}"


def test_every_page_is_reached_from_the_home_page_and_the_site():
    pages = {name.removeprefix("docs/") for name in PAGES} - {"README.md"}
    assert {target.partition("#")[0] for target in LINK.findall(PAGES["docs/index.md"])} >= pages - {"index.md"}
    listed = re.findall(r"([\w-]+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(listed) == sorted(pages)


def test_every_grid_is_listed():
    grids = {path.parent.name for path in (REPOSITORY / "grids").glob("*/params.yaml")}
    assert set(re.findall(r"^\| `(\w+)` \|", PAGES["docs/grids.md"], flags=re.MULTILINE)) == grids


def test_every_variable_of_the_environment_is_listed():
    """Those that the project names itself; `TEXTGUARD_WORD` is a word's own, of some page."""
    code = "".join(
        path.read_text(encoding="utf-8") for folder in ("textguard", "stages") for path in (REPOSITORY / folder).rglob("*.py")
    )
    read = set(re.findall(r'"((?:TEXTGUARD|OPENAI)_[A-Z_]+)"', code))
    assert read <= set(re.findall(r"[A-Z]+(?:_[A-Z]+)+", PAGES["docs/environment.md"])), read


def test_every_benchmark_is_listed():
    from benchmarks.__main__ import MEASURES

    assert set(MEASURES) <= set(re.findall(r"`(\w+)`", PAGES["docs/engine.md"].partition("## Benchmarks")[2]))


def test_terms_are_in_order_and_known():
    terms = HEADING.findall(PAGES["docs/glossary.md"])[1:]
    assert terms == sorted(terms, key=str.lower)
    assert {"DeltaLoss", "SDC", "FIT", "Top2Diff", "Golden run", "Masked", "Fault site", "Mismatch"} <= set(terms)


def test_examples_of_params_yaml_name_what_there_is():
    """Keys of the YAML in docs/ that a section of params.yaml is shown by."""
    sections = set(yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8")))
    shown = re.findall(r"^    (\w+):$", PAGES["docs/treatments.md"] + PAGES["docs/weights.md"], flags=re.MULTILINE)
    assert {"treatments", "effects", "corruptions", "weights"} <= set(shown) <= sections
