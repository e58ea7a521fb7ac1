"""Stages say how long they took, and metrics/run.json keeps it, whatever else writes at the same time."""

import json
import subprocess
import sys

import pytest

from conftest import REPOSITORY
from smoke_grid import ALL, GRID, environment, run
from textguard import timing
from textguard.schema.base import read
from textguard.schema.times import RunTimes
from textguard.timing import TIMES, keep, main, table, versions

ENTRY = {"seconds": 1.5, "device": "cpu", "processes": 1, "resumed": False}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def kept():
    return json.loads(TIMES.read_text(encoding="utf-8"))["stages"]


def test_times_are_added_and_those_of_stages_that_are_gone_go():
    keep("train@b", ENTRY, {"check", "train@b"})
    keep("check", ENTRY, {"check", "train@b"})
    assert list(kept()) == ["check", "train@b"]
    keep("check", ENTRY | {"seconds": 2.0}, {"check"})
    assert kept() == {"check": ENTRY | {"seconds": 2.0}}
    assert read(TIMES, "check", RunTimes).versions == versions()


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"versions": {}, "processors": 1, "stages": 5}', "\x00"])
def test_a_damaged_file_is_begun_anew(damage):
    TIMES.parent.mkdir()
    TIMES.write_text(damage, encoding="utf-8")
    keep("check", ENTRY, {"check"})
    assert kept() == {"check": ENTRY}


def test_times_of_another_environment_go(monkeypatch):
    keep("check", ENTRY, {"check", "recipes"})
    monkeypatch.setattr(timing, "versions", lambda: {"python": "4.0", "torch": "none", "torchvision": "none"})
    keep("recipes", ENTRY, {"check", "recipes"})
    assert kept() == {"recipes": ENTRY}


def test_stages_that_end_together_lose_no_time(folder):
    """Without the lock, a stage writes over what another one has written since it read the file."""
    names = [f"train@{number}" for number in range(4)]
    body = (
        "import sys\nfrom textguard.timing import keep\n"
        "for part in range(25):\n"
        f"    keep(f'{{sys.argv[1]}}-{{part}}', {ENTRY}, [f'{{name}}-{{part}}' for name in {names} for part in range(25)])\n"
    )
    command = [sys.executable, "-c", body]
    variables = environment(PYTHONPATH=str(REPOSITORY))
    processes = [subprocess.Popen([*command, name], cwd=folder, env=variables, stderr=subprocess.DEVNULL) for name in names]
    assert [process.wait() for process in processes] == [0] * 4
    assert len(kept()) == 100


def test_a_stage_that_ended_well_prints_its_time_and_keeps_it(untouched):
    done = untouched.start("recipes")
    assert (done.returncode, done.stderr) == (0, "")
    (entry,) = json.loads((untouched.folder / TIMES).read_text(encoding="utf-8"))["stages"].items()
    assert entry[0] == "recipes"
    assert 0 < entry[1]["seconds"] < 100
    assert done.stdout.splitlines()[-1] == f"recipes: {entry[1]['seconds']:.1f} s on cpu"
    read(untouched.folder / TIMES, "check", RunTimes)
    # One that fails leaves it as it was.
    before = (untouched.folder / TIMES).read_bytes()
    assert untouched.start("tables").returncode == 1
    assert (untouched.folder / TIMES).read_bytes() == before


def test_every_stage_of_a_finished_grid_is_timed_and_git_alone_knows_the_file(finished):
    grid = finished / GRID
    assert set(json.loads((grid / TIMES).read_text(encoding="utf-8"))["stages"]) == ALL
    listed = run(["git", "status", "--porcelain", "--untracked-files=all", "metrics"], grid).stdout
    assert f"{GRID.as_posix()}/{TIMES.as_posix()}" in listed
    assert "run.json" not in (grid / "dvc.lock").read_text(encoding="utf-8")


def test_processes_that_share_a_stage_keep_one_time(checkout):
    name = "evaluate@digits-resnet18-baseline-0"
    before = json.loads((checkout / GRID / TIMES).read_text(encoding="utf-8"))["stages"]
    done = run([sys.executable, "../../stages", *name.split("@")], checkout / GRID, TEXTGUARD_PROCESSES="2")
    assert done.stdout.count(f"{name.replace('@', ' ')}: ") == 1
    after = json.loads((checkout / GRID / TIMES).read_text(encoding="utf-8"))["stages"]
    assert (before.pop(name)["processes"], after.pop(name)["processes"]) == (1, 2)
    assert before == after


def test_times_that_cannot_be_kept_fail_no_stage(untouched):
    (untouched.folder / TIMES).mkdir(parents=True)
    code, (line,) = untouched.run("recipes")
    assert code == 0
    assert line.startswith("CannotWrite: metrics/run.json")


def test_the_table_sums_up_by_stage(capsys):
    names = {"train@a", "train@b", "check"}
    keep("train@a", ENTRY | {"seconds": 10.0}, names)
    keep("train@b", ENTRY | {"seconds": 30.0, "resumed": True}, names)
    keep("check", ENTRY, names)
    lines = table().splitlines()
    assert lines[2:5] == ["| train | 2 | 40 | 30 | b |", "| check | 1 | 1.5 | 1.5 | - |", "| all | 3 | 41.5 | | |"]
    assert "train@b" in lines[-1]
    assert main([]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert main(["more"]) == 2
    TIMES.unlink()
    assert main([]) == 1
    assert "metrics/run.json is missing" in capsys.readouterr().err
