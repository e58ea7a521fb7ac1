"""The regression gate between revisions: its make target, and what CI runs."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import REPOSITORY
from gate_runs import Metrics, changed, row, scaled
from smoke_grid import run


@pytest.fixture(scope="module")
def make_repository(make_checkout: Callable[[], Path]) -> Callable[[], Path]:
    """Checkouts in which make finds nothing to install."""

    def make() -> Path:
        folder = make_checkout()
        for name in ("Makefile", "pyproject.toml", "requirements.lock"):
            shutil.copy(REPOSITORY / name, folder / name)
        shutil.copytree(REPOSITORY / ".github", folder / ".github")
        (folder / ".venv").mkdir()
        (folder / ".venv" / ".ready").touch()
        return folder

    return make


@pytest.fixture(scope="module")
def revisions(make_repository: Callable[[], Path], usual: Metrics) -> Path:
    """A repository with one commit without results, one with them, and a working tree with a run that got worse."""
    folder = make_repository()
    commit(folder)
    put(folder, usual, 0.5)
    commit(folder)
    put(folder, changed(usual, "layers.2.delta_loss", scaled(2)), 0.7)
    return folder


def commit(folder: Path) -> None:
    run(["git", "add", "--all"], folder)
    run(["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "--message", "step"], folder)


def head(folder: Path) -> str:
    return run(["git", "rev-parse", "HEAD"], folder).stdout.strip()


def put(folder: Path, content: Metrics, delta_loss: float) -> None:
    results = folder / "metrics" / "results"
    results.mkdir(parents=True, exist_ok=True)
    (results / "a.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "metrics" / "summary.json").write_text(json.dumps({"a": {"delta_loss": delta_loss}}), encoding="utf-8")


@pytest.mark.parametrize("arguments", [[], ["BASE=HEAD"]])
def test_make_gate_compares_with_a_revision(revisions, arguments):
    done = run(["make", "gate", *arguments], revisions, check=False)
    assert done.returncode == 2  # as make says that something failed
    assert row(done.stdout, "DeltaLoss, conv2")[-1] == "worse"
    assert "Error 1" in done.stderr


def refused(folder: Path, base: str, target: str = "gate", **more: str) -> str:
    """What make says of a base that it cannot compare with, before its own "Error 2"."""
    done = run(["make", target, f"BASE={base}"], folder, check=False, **more)
    assert (done.returncode, done.stdout) == (2, "")
    line, _ = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("target", ["gate", "report"])
def test_make_names_a_revision_without_results(revisions, target):
    expected = f"HEAD~1 holds no ./metrics/results; name a revision that does: make {target} BASE=origin/main"
    assert refused(revisions, "HEAD~1", target) == expected


def test_make_gate_says_why_git_does_not_know_a_revision(revisions, make_repository, tmp_path):
    expected = "no-such-branch cannot be read: fatal: Not a valid object name no-such-branch^{commit}"
    assert refused(revisions, "no-such-branch") == expected
    other = refused(revisions, "HEAD", GIT_TEST_ASSUME_DIFFERENT_OWNER="1")
    assert other.startswith("HEAD cannot be read: fatal: detected dubious ownership in repository at")
    assert "safe.directory" in other
    run(["git", "clone", "--quiet", "--depth=1", revisions.as_uri(), str(tmp_path / "shallow")], tmp_path)
    (tmp_path / "shallow" / ".venv").mkdir(exist_ok=True)
    (tmp_path / "shallow" / ".venv" / ".ready").touch()
    line = refused(tmp_path / "shallow", "HEAD~1")
    assert line.startswith("HEAD~1 cannot be read: fatal: ")
    assert line.endswith("; this clone is shallow: git fetch --unshallow")
    unborn = make_repository()
    assert refused(unborn, "HEAD") == "HEAD cannot be read: fatal: Not a valid object name HEAD^{commit}"
    shutil.rmtree(unborn / ".git")
    assert "HEAD cannot be read: fatal: not a git repository" in refused(unborn, "HEAD")


def test_make_gate_in_a_folder_of_a_larger_repository(revisions, tmp_path):
    inner = tmp_path / "all" / "textguard"
    shutil.copytree(revisions, inner, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    run(["git", "init", "--quiet"], inner.parent)
    commit(inner.parent)
    done = run(["make", "gate"], inner)
    assert done.stdout.startswith("**PASS")


@pytest.mark.parametrize(
    "value", ["HEAD'; touch F; '", "$(shell touch F)", "$$(touch F)", "`touch F`", "a;touch F", 'a"b', "(", "a,b", "a\\b", "é"]
)
@pytest.mark.parametrize("name", ["BASE", "GRID"])
def test_make_reads_no_argument_as_code(revisions, name, value):
    for arguments, more in (([f"{name}={value}"], {}), ([], {name: value})):
        done = run(["make", "gate", *arguments], revisions, check=False, **more)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"*** {name} must be" in done.stderr
    assert not (revisions / "F").exists()


@pytest.mark.parametrize("grid", ["../x", "%", "none"])
def test_make_names_the_grids_that_there_are(revisions, grid):
    done = run(["make", "plan", f"GRID={grid}"], revisions, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "GRID must be the name of a folder in grids/" in done.stderr or "grids: smoke" in done.stderr


def test_a_checkout_has_the_same_bytes_whatever_git_does_with_line_ends(tmp_path):
    listed = run(["git", "ls-files", "-co", "--exclude-standard"], REPOSITORY).stdout.splitlines()
    kinds = {Path(name).suffix: name for name in listed if (REPOSITORY / name).is_file()}
    origin = tmp_path / "origin"
    origin.mkdir()
    run(["git", "init", "--quiet"], origin)
    shutil.copy(REPOSITORY / ".gitattributes", origin)
    for name in kinds.values():
        (origin / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, origin / name)
    (origin / "text.pdf").write_bytes(b"%PDF-1.4\r\nonly text\r\n")
    run(["git", "add", "--all", "--force"], origin)
    commit(origin)
    run(
        ["git", "clone", "--quiet", "-c", "core.autocrlf=true", "-c", "core.eol=crlf", str(origin), str(tmp_path / "clone")],
        tmp_path,
    )
    for name in (*kinds.values(), "text.pdf"):
        assert (tmp_path / "clone" / name).read_bytes() == (origin / name).read_bytes(), name


def ci() -> Any:
    return yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))


def test_what_ci_posts_compares_two_runs_on_one_machine(make_repository, usual, tmp_path):
    """The scripts of job `demo`, with a demo of one file: what this machine makes of code.json."""
    folder = make_repository()
    scripts = {step["name"]: step["run"] for step in ci()["jobs"]["demo"]["steps"] if "run" in step}
    make = tmp_path / "make"
    make.write_text(
        f"""#!/bin/sh
test "$1" = repro || exec {shutil.which("make")} "$@"
mkdir -p plots metrics/results && cp code.json metrics/results/a.json
test -e results-of-the-base || cp summary.json metrics/summary.json
touch results-of-the-base dvc.lock plots/plot.png
""",
        encoding="utf-8",
    )
    make.chmod(0o755)
    worse = changed(usual, "layers.2.delta_loss", scaled(2))
    ignored = folder / ".gitignore"
    ignored.write_text(ignored.read_text(encoding="utf-8") + "/results-of-the-base\n", encoding="utf-8")
    put(folder, worse, 0.1)  # by another machine
    (folder / "summary.json").write_text(json.dumps({"a": {"delta_loss": 0.5}}), encoding="utf-8")
    for content in (usual, worse):
        (folder / "code.json").write_text(json.dumps(content), encoding="utf-8")
        commit(folder)
    programs = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": programs, "GITHUB_ENV": str(tmp_path / "env"), "GITHUB_SHA": head(folder)}
    for name, code in (("Demo of the base", 0), ("Demo of this revision", 0), ("Compare the two", 2)):
        done = run(["bash", "-eo", "pipefail", "-c", scripts[name]], folder, check=False, **environment)
        assert done.returncode == code, done
        environment["BASE"] = (tmp_path / "env").read_text(encoding="utf-8").strip().removeprefix("BASE=")
    assert head(folder) == environment["GITHUB_SHA"]
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "a.delta_loss" not in report  # which the other machine's would differ by
    assert row(report, "DeltaLoss, conv2")[-1] == "worse"
    assert "\n**FAIL: 1 of 35 comparisons is worse" in report


def test_ci_shows_what_changed_and_takes_a_base_without_results(revisions):
    done = run([".github/compare.sh", "HEAD"], revisions, check=False)
    assert done.returncode == 2
    assert row(done.stdout, "a.delta_loss")[2:4] == ["0.5", "0.7"]
    done = run([".github/compare.sh", "HEAD~1"], revisions)
    assert "nothing to compare" in done.stdout
