"""What editors, containers and GitHub read is there, can be read, and names what exists."""

import json
import re
import tomllib

import pytest
import yaml

import textguard
from conftest import REPOSITORY

MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
LOCK = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8")
CALLED = re.compile(r"\bmake ([a-z]+)")


@pytest.mark.parametrize(
    "file", ["Dockerfile", ".devcontainer/devcontainer.json", ".vscode/tasks.json", ".github/pull_request_template.md"]
)
def test_only_targets_of_make_are_called_that_it_has(file):
    called = set(CALLED.findall((REPOSITORY / file).read_text(encoding="utf-8")))
    assert called
    assert called <= TARGETS


def test_containers_have_a_python_that_ci_tests():
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    tested = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    docker = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    development = json.loads((REPOSITORY / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert re.search(r"^FROM python:([\d.]+)-slim$", docker, re.MULTILINE)[1] in tested
    assert development["image"].rpartition(":")[2] in tested


def test_no_container_runs_as_root():
    lines = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER user"]
    assert lines.index("USER user") < next(number for number, line in enumerate(lines) if line.startswith("RUN make setup"))


def test_an_image_leaves_out_what_is_made_anew():
    """Each line of .dockerignore but the patterns for all folders is something that git ignores."""
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    git = (REPOSITORY / ".gitignore").read_text(encoding="utf-8") + (REPOSITORY / ".dvc" / ".gitignore").read_text(
        encoding="utf-8"
    )
    for line in ignored:
        if line and not line.startswith(("#", "**")):
            assert line.rpartition("/")[2] in git or line.strip("/") in git, line


def test_hooks_run_locked_tools():
    (hooks,) = (
        repo["hooks"] for repo in yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    )
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks}
    packages = {"ruff": "ruff", "lint-imports": "import-linter"}
    assert tools == set(packages)
    for package in packages.values():
        assert re.search(rf"^{package}==", LOCK, re.MULTILINE)


@pytest.mark.parametrize("name", ["bug", "results", "feature"])
def test_issue_forms_are_as_github_reads_them(name):
    form = yaml.safe_load((REPOSITORY / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    assert form.keys() == {"name", "description", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_recommended_extensions_are_those_of_the_container():
    own = json.loads((REPOSITORY / ".vscode" / "extensions.json").read_text(encoding="utf-8"))["recommendations"]
    container = json.loads((REPOSITORY / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert own == container["customizations"]["vscode"]["extensions"]


def test_the_version_and_its_date_are_the_same_everywhere():
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.search(r"^## \[(\d[^]]*)\] - (\S+)$", changelog, re.MULTILINE).groups()
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], str(citation["date-released"])) == (version, date)
    assert textguard.__version__ == version
    assert re.search(rf"^\[{re.escape(version)}\]: https://.*/v{re.escape(version)}$", changelog, re.MULTILINE)
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "textguard.__version__"}
