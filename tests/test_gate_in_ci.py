"""The regression gate between revisions: its make target, and what CI runs."""

import json
import os
import shutil
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


@pytest.mark.parametrize("base", ["HEAD~1", "no-such-branch"])
def test_make_gate_names_a_revision_without_results(revisions, base):
    done = run(["make", "gate", f"BASE={base}"], revisions, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    line, _ = done.stderr.splitlines()
    assert line == f"{base} holds no ./metrics/results; name a revision that does: make gate BASE=origin/main"


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
    (folder / ".gitignore").open("a", encoding="utf-8").write("/results-of-the-base\n")
    put(folder, worse, 0.1)  # by another machine
    (folder / "summary.json").write_text(json.dumps({"a": {"delta_loss": 0.5}}), encoding="utf-8")
    for content in (usual, worse):
        (folder / "code.json").write_text(json.dumps(content), encoding="utf-8")
        commit(folder)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GITHUB_ENV": str(tmp_path / "env"), "GITHUB_SHA": head(folder)}
    for name, code in (("Demo of the base", 0), ("Demo of this revision", 0), ("Compare the two", 2)):
        done = run(["bash", "-eo", "pipefail", "-c", scripts[name]], folder, check=False, **environment)
        assert done.returncode == code, done
        environment["BASE"] = (tmp_path / "env").read_text(encoding="utf-8").strip().removeprefix("BASE=")
    assert head(folder) == environment["GITHUB_SHA"]
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "a.delta_loss" not in report  # which the other machine's would differ by
    assert row(report, "DeltaLoss, conv2")[-1] == "worse"
    assert report.splitlines()[-1].startswith("**FAIL: 1 worse")


def test_ci_shows_what_changed_and_takes_a_base_without_results(revisions):
    done = run([".github/compare.sh", "HEAD"], revisions, check=False)
    assert done.returncode == 2
    assert row(done.stdout, "a.delta_loss")[2:4] == ["0.5", "0.7"]
    done = run([".github/compare.sh", "HEAD~1"], revisions)
    assert "nothing to compare" in done.stdout
