"""The workflows on GitHub: what runs a pull request's code may write nothing, and what may write runs none of it.

`make lint` has zizmor look for the general mistakes; here is what this project means to keep.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import textguard
from conftest import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").iterdir())
CI = REPOSITORY / ".github" / "workflows" / "ci.yml"
# Values that others choose: titles, names of branches, texts. As part of a script they would be commands.
FOREIGN = re.compile(r"github\.(event|head_ref|ref_name|ref|actor)\b")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_hash(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert len(lines) == sum("uses" in step for step in steps(path))
    for line in lines:
        assert re.fullmatch(r" *- uses: [\w.-]+/[\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line), line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_job_reads_the_code_or_writes_and_never_both(path):
    workflow = read(path)
    events = set(workflow[True])  # YAML takes `on` for true
    assert events <= {
        "pull_request",
        "push",
        "schedule",
        "workflow_dispatch",
    }  # pull_request_target and workflow_run have the rights of the base
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        writes = "write" in str(job.get("permissions", ""))
        checkouts = [step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@")]
        assert writes != bool(checkouts)
        assert all(step["with"]["persist-credentials"] is False for step in checkouts)
        secret = "secrets." in str(job) or "github.token" in str(job)
        assert writes or not secret


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_scripts_are_bash_and_hold_nothing_that_others_choose(path):
    for step in steps(path):
        assert ("uses" in step) != ("run" in step)
        assert "${{" not in step.get("run", ""), "pass it through env: what a branch is called must not become a command"
        subprocess.run(["bash", "-n", "-c", step.get("run", "")], check=True)
        for value in step.get("env", {}).values():
            assert not FOREIGN.search(str(value)) or value == "${{ github.event.pull_request.number }}"


RELEASE = CI.with_name("release.yml")
NOTES = REPOSITORY / ".github" / "notes.sh"


def test_a_release_is_what_was_checked_and_needs_no_token():
    jobs = read(RELEASE)["jobs"]
    scripts = [step["run"] for step in jobs["build"]["steps"] if "run" in step]
    assert [script for script in scripts if script in (".ci/run", "make dist")] == [".ci/run", "make dist"]
    assert (jobs["publish"]["needs"], jobs["release"]["needs"]) == ("build", "publish")
    assert jobs["publish"]["permissions"] == {"attestations": "write", "id-token": "write"}
    assert "secrets." not in RELEASE.read_text(encoding="utf-8")
    assert not any(
        "cache" in step.get("with", {}) for step in steps(RELEASE)
    )  # what another workflow left must not be published


def test_the_notes_of_a_release_are_its_section_and_its_links_lead_to_the_tag():
    said = subprocess.run([NOTES, textguard.__version__, "ADDRESS"], check=True, capture_output=True, encoding="utf-8").stdout
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    section = re.split(r"^(?:## |\[)", changelog.partition(f"## [{textguard.__version__}] - ")[2], flags=re.MULTILINE)[0]
    assert said.replace("ADDRESS/", "").strip() == section.partition("\n")[2].strip()
    links = re.findall(r"\]\(([^)]*)\)", said)
    assert links
    for link in links:
        address, _, path = link.partition("/")
        assert address == "ADDRESS"
        assert (REPOSITORY / path).exists()


def test_a_version_without_notes_is_not_released():
    found = subprocess.run([NOTES, "99.0", "ADDRESS"], check=False, capture_output=True, encoding="utf-8")
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == "CHANGELOG.md has no section '## [99.0] - DATE'\n"


def test_the_readme_on_pypi_links_to_files_of_the_tag(tmp_path):
    (tmp_path / ".github").mkdir()
    for file in (Path("README.md"), Path(".github/readme.sh")):
        shutil.copy(REPOSITORY / file, tmp_path / file)
    subprocess.run([tmp_path / ".github" / "readme.sh", "https://host/OWNER/REPO", "v1"], check=True)
    before, after = (
        re.findall(r"(!?)\[[^][]*\]\(([^)]*)\)", (place / "README.md").read_text(encoding="utf-8"))
        for place in (REPOSITORY, tmp_path)
    )
    for (image, old), (_, new) in zip(before, after, strict=True):
        shown = "raw" if image else "blob"
        path = old.removeprefix("../../") if old.startswith("../../") else f"{shown}/v1/{old}"
        assert new == (old if "://" in old else f"https://host/OWNER/REPO/{path}")


def test_ci_runs_the_projects_own_scripts():
    for script in (".ci/run", ".github/compare.sh"):
        assert any(script in step.get("run", "") for step in steps(CI))
        assert (REPOSITORY / script).stat().st_mode & 0o111


def test_the_comment_comes_last_and_whether_the_gate_passed_or_not():
    jobs = read(CI)["jobs"]
    assert jobs["comment"]["needs"] == "demo"
    assert jobs["comment"]["if"].startswith("${{ !cancelled() && needs.demo.outputs.report != ''")
    scripts = [step.get("run", "") for step in jobs["demo"]["steps"]]
    assert '.github/compare.sh "$BASE" > report.md' in scripts
    report, *_ = [step for step in jobs["demo"]["steps"] if step.get("id") == "report"]
    assert report["with"]["path"] == "report.md"
    assert report["if"].startswith("${{ !cancelled()")


def posted(folder: Path, report: bytes) -> str:
    """What job `comment` would post of a report, with a stand-in for gh."""
    (step,) = [step for step in steps(CI) if "gh pr comment" in step.get("run", "")]
    (folder / "report.md").write_bytes(report)
    (folder / "gh").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > arguments\n', encoding="utf-8")
    (folder / "gh").chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "NUMBER": "7", "REPOSITORY": "a/b", "SPACE": step["env"]["SPACE"]}
    command = ["bash", "-eo", "pipefail", "-c", step["run"]]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    arguments = (folder / "arguments").read_text(encoding="utf-8").split()
    assert arguments == ["pr", "comment", "7", "--repo", "a/b", "--body-file", "comment.md"]
    return (folder / "comment.md").read_bytes().decode("utf-8")


@pytest.mark.parametrize(
    ("hostile", "never"),
    [
        ("@someone and a@example.org", "@[a-z]"),
        ("&commat;someone &#64;someone", "&[a-z#]"),
        ("closes #12, a/b#3, GH-4", "#[0-9]|GH-[0-9]"),
        ("[text](http://example.org) ![image](http://example.org/a.png)", r"\]\("),
        ("[text][a]\n\n[a]: http://example.org", r"\]\[|\]:|://[a-z]"),
        ("http://example.org https://example.org www.example.org", r"://[a-z]|www\.[a-z]"),
        ("<img src=x><a href=y><!-- --><script>", "<[a-z!/]"),
    ],
)
def test_what_the_comment_shows_names_links_and_loads_nothing(tmp_path, hostile, never):
    assert re.search(never, hostile)
    shown = posted(tmp_path, hostile.encode())
    assert not re.search(never, shown)
    assert shown.replace("\u200b", "") == hostile


def test_a_report_of_the_gate_is_posted_as_it_is(tmp_path):
    table = "| layer | base | new |\n| --- | --- | --- |\n| conv1 | 0.1 [0.0, 0.2] | a\\_b |\n"
    report = f"## Demo, before and after\n\n{table}\n**FAIL: 1 worse**\n"
    assert posted(tmp_path, report.encode()) == report


@pytest.mark.parametrize("report", [b"@" * 10**6, "\u00e9".encode() * 10**6, b"\xff\x00\r\n" * 10**5, b""])
def test_a_comment_is_text_of_a_length_that_github_takes(tmp_path, report):
    shown = posted(tmp_path, report)
    assert len(shown) < 65_536
    assert not {"\0", "\r"} & set(shown)
    assert ("(cut: the whole report is in the summary)" in shown) == (len(report) > 30_000)
