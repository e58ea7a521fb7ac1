"""Stage `check` comes before all others: nothing that params.yaml holds gets into a command before it was checked."""

import re
from pathlib import Path

import pytest
from dvc.repo import Repo
from dvc.utils.serialize import modify_yaml
from networkx import DiGraph, descendants

from conftest import REPOSITORY, copy_checkout
from smoke_grid import GRID, run
from stages.check import CONTENT, OUT

QUOTED = ["a$(touch PWN)", "b`touch PWN`", 'c";touch PWN;"', "d;touch PWN", "e\ntouch PWN\n", "f$PWN || touch PWN"]
UNQUOTED = "g';touch PWN;'"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke grid, with data sets whose names are commands."""
    checkout = tmp_path_factory.mktemp("hostile")
    copy_checkout(checkout, "smoke")
    run(["git", "init", "--quiet"], checkout)
    with modify_yaml(str(checkout / GRID / "params.yaml")) as params:
        params["variants"] = ["baseline"]
        for name in (*QUOTED, UNQUOTED):
            params["datasets"][name] = dict(params["datasets"]["digits"])
    return checkout / GRID


@pytest.fixture(scope="module")
def graph(hostile: Path) -> DiGraph:
    """Its stages, each with an arrow to what it depends on."""
    with Repo(str(hostile)) as repo:
        return repo.index.graph


def test_every_stage_comes_behind_check(graph):
    (check,) = (stage for stage in graph if stage.name == "check")
    behind = descendants(graph.reverse(), check)
    assert {stage.name for stage in graph} - {stage.name for stage in behind} == {"check"}


@pytest.mark.parametrize("target", [[], ["--keep-going"], [f"data@{UNQUOTED}"]])
def test_no_name_runs_as_a_command(hostile, target):
    done = run(["dvc", "repro", *target], hostile, check=False)
    assert done.returncode
    assert re.findall(r"Running stage '([^']+)'", done.stdout) == ["check"]
    assert 'InvalidParameter: a name in datasets is "a$(touch PWN)"' in done.stderr
    assert not list(hostile.rglob("PWN*"))
    assert not (hostile / OUT).exists()


@pytest.mark.parametrize("name", QUOTED)
def test_quotes_keep_a_name_together_where_the_check_is_left_out(hostile, graph, name):
    """With `dvc repro --single-item`, in a repository that holds the file of an earlier check."""
    (stage,) = (stage for stage in graph if stage.name == f"data@{name}")
    done = run(["sh", "-c", stage.cmd.replace("python", "printf '%s|'", 1)], hostile)
    assert done.stdout == f"../../stages|data|{name}|"
    assert not list(hostile.rglob("PWN*"))


def test_the_check_leaves_one_file_that_is_always_the_same(untouched):
    assert untouched.run("check") == (0, [])
    file = untouched.folder / OUT
    written = file.stat().st_mtime_ns
    assert file.read_bytes() == CONTENT.encode()
    untouched.change("inject.seed", 1)
    assert untouched.run("check") == (0, [])
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (CONTENT.encode(), written)


def test_every_command_quotes_what_params_yaml_holds():
    commands = re.findall(r"cmd: (.*)", (REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))
    for command in commands:
        assert "$" not in re.sub(r"'\$\{(root\}/stages|key\})'", "", command), command
