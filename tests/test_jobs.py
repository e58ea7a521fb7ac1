"""A grid with several stages at a time ends as one after the other would, also where a run fails."""

import itertools
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from dvc.utils.serialize import dumps_yaml, loads_yaml

from conftest import REPOSITORY
from textguard.jobs import _run
from textguard.quick_dvc import HEAD, replaced

STAGE = """import sys, time
from pathlib import Path
name, key = sys.argv[1:]
if key == Path("broken").read_text():
    sys.exit(f"{name} of {key} fails")
with open("began.log", "a") as log:
    log.write(f"{name} {key} {time.monotonic()}\\n")
time.sleep(0.5)
Path(f"{name}-{key}").write_text(key)
with open("ended.log", "a") as log:
    log.write(f"{name} {key} {time.monotonic()}\\n")
"""


@pytest.fixture
def grid(tmp_path, monkeypatch) -> Path:
    """A repository whose stages only sleep; its runs are two of the demo's."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], check=True)
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    del params["backbones"]["mobilenet_v2"]
    params |= {"variants": ["baseline", "template"], "seeds": [0], "texts": {"template": params["texts"]["template"]}}
    params["inject"]["compare_detectors"] = []
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    (tmp_path / "stage.py").write_text(STAGE, encoding="utf-8")
    (tmp_path / "broken").write_text("", encoding="utf-8")
    matrix = {name: f"${{{name}s}}" for name in ("dataset", "backbone", "variant", "seed")}

    def command(name: str, *deps: str) -> dict:
        return {"cmd": f"python stage.py {name} ${{key}}", "deps": list(deps), "outs": [f"{name}-${{key}}"]}

    def of_runs(name: str, *deps: str, seeds: object = "${seeds}") -> dict:
        return {"matrix": matrix | {"seed": seeds}, **command(name, "stage.py", *deps)}

    stages: dict = {
        name: {"cmd": f"python stage.py {name} all", "deps": deps, "outs": [f"{name}-all"]}
        for name, deps in {"heads": ["stage.py"], "recipes": ["stage.py"]}.items()
    }
    stages |= {
        "embeddings": {"matrix": {"dataset": "${datasets}", "text": "${texts}"}, **command("embeddings", "stage.py")},
        "train": of_runs("train", "heads-all", "recipes-all", "embeddings-digits-template"),
        "evaluate": of_runs("evaluate", "train-${key}"),
        "ranges": of_runs("ranges", "train-${key}"),
        "inject": of_runs("inject", "ranges-${key}"),
        "hardware": of_runs("hardware", "ranges-${key}"),
        "closeup": of_runs("closeup", "inject-${key}", seeds=["${seeds[0]}"]),
    }
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False), encoding="utf-8")
    return tmp_path


def jobs(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "textguard.jobs", *arguments], capture_output=True, encoding="utf-8", check=False, timeout=300
    )


def times(name: str) -> dict[str, float]:
    lines = [line.split() for line in Path(f"{name}.log").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len({tuple(line[:2]) for line in lines})  # none twice
    return {f"{stage} {key}": float(time) for stage, key, time in lines}


LOCK = (REPOSITORY / "grids" / "smoke" / "dvc.lock").read_text(encoding="utf-8")


def test_dvc_lock_has_the_bytes_that_dvc_gives_it():
    entries = loads_yaml(LOCK)["stages"]
    assert replaced(LOCK, entries.items()) == LOCK
    of = entries["figures"]
    changes = {
        "figures": of | {"params": {"params.yaml": {"a": 1e-6, "b": "off", "c": [], "d": "x y " * 40}}},
        "more": {"cmd": "ls"},
    }
    whole = loads_yaml(LOCK, typ="rt")
    whole["stages"].update(changes)
    assert replaced(LOCK, changes.items()) == dumps_yaml(whole) != LOCK


@pytest.mark.parametrize(
    "text",
    ["", LOCK.replace("\nstages", "\n# mine\nstages"), f"{LOCK}datasets: []\n", f"{HEAD}  'a b':\n    cmd: ls\n", LOCK[:-1]],
)
def test_what_dvc_did_not_write_is_left_to_dvc(text):
    assert replaced(text, [("a", {"cmd": "ls"})]) is None


def test_a_name_that_dvc_writes_in_another_way_is_left_to_dvc():
    assert replaced(HEAD, [("1", {"cmd": "ls"})]) is None


def up_to_date() -> bool:
    done = subprocess.run([sys.executable, "-m", "dvc", "status"], capture_output=True, encoding="utf-8", check=True)
    return "up to date" in done.stdout


def test_stages_of_several_runs_run_at_a_time(grid):
    done = jobs("2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert up_to_date()
    lock = Path("dvc.lock").read_text(encoding="utf-8")
    assert replaced(lock, loads_yaml(lock)["stages"].items()) == lock
    began, ended = times("began"), times("ended")
    overlapping = [
        (one, other)
        for one in began
        for other in began
        if one < other and began[one] < ended[other] and began[other] < ended[one]
    ]
    assert overlapping
    for key in ("digits-resnet18-baseline-0", "digits-resnet18-template-0"):
        order = ["train", "ranges", "inject", "closeup"]
        assert all(ended[f"{one} {key}"] <= began[f"{other} {key}"] for one, other in itertools.pairwise(order))
    assert "min left" in done.stdout


def test_a_run_that_fails_ends_it_and_what_is_done_stays_done(grid):
    Path("broken").write_text("digits-resnet18-template-0", encoding="utf-8")
    done = jobs("2")
    assert done.returncode
    assert "of digits-resnet18-template-0 fails" in done.stdout + done.stderr
    Path("broken").write_text("", encoding="utf-8")
    assert jobs("2").returncode == 0
    assert up_to_date()
    times("ended")  # none was run twice


def test_a_lock_that_another_holds_for_long_is_waited_for(grid):
    for name in ("heads-all", "recipes-all", "embeddings-digits-template"):
        Path(name).touch()
    hold = "from dvc.repo import Repo; import time\nwith Repo('.').lock:\n    print('held', flush=True); time.sleep(8)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, encoding="utf-8")
    assert holder.stdout.readline() == "held\n"
    stop = threading.Event()
    _run("digits-resnet18-baseline-0", stop)
    holder.wait()
    holder.stdout.close()
    assert not stop.is_set()
    assert Path("train-digits-resnet18-baseline-0").exists()


@pytest.mark.parametrize("wrong", [["0"], ["two"], ["1", "2"], ["65"]])
def test_another_number_of_jobs_is_refused(grid, wrong):
    done = jobs(*wrong)
    assert done.returncode == 1
    assert done.stderr.startswith(f"InvalidParameter: JOBS is {' '.join(wrong)!r}; it must be one number from 1 to 64")
