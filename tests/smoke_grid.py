"""The smoke grid in a checkout of its own, with the real `dvc`: what tests need to run it and to look at it."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

from dvc.utils.serialize import modify_yaml

GRID = Path("grids/smoke")
RUNS = ("digits-resnet18-baseline-0", "digits-resnet18-descriptions-0")
BASELINE, GUIDED = RUNS
TEXT = "digits-descriptions"


def environment(**more: str) -> dict[str, str]:
    """The environment for a stage or for dvc: this interpreter's scripts first."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return {**inherited, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **more}


def run(command: list[str], folder: Path, *, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder and return what it printed."""
    done = subprocess.run(command, cwd=folder, env=environment(**more), capture_output=True, encoding="utf-8", check=False)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def stages(*names: str) -> set[str]:
    """Stage names as dvc prints them; `inject` stands for the inject stage of every run."""
    expanded = set()
    for name in names:
        per_run = name in ("train", "evaluate", "ranges", "inject", "hardware", "closeup")
        expanded |= {f"{name}@{key}" for key in RUNS} if per_run else {name}
    return expanded


BEHIND_TRAINING = stages("evaluate", "ranges", "inject", "hardware", "closeup", "results", "tables", "figures", "report")
TEXTS = stages(f"prompts@{TEXT}", f"responses@{TEXT}", f"embeddings@{TEXT}", f"text_quality@{TEXT}")
ALL = stages("check", "data@digits", "heads@digits", "recipes", "train") | TEXTS | BEHIND_TRAINING


def ran(output: str) -> set[str]:
    """The stages that dvc says it ran."""
    return set(re.findall(r"Running stage '([^']+)'", output))


def repro(checkout: Path, *targets: str) -> tuple[set[str], str]:
    """Run the smoke grid, or what these stages need. Returns the stages that ran, and all output."""
    done = run(["dvc", "repro", *targets], checkout / GRID)
    return ran(done.stdout), done.stdout + done.stderr


def change(checkout: Path, key: str, value: object) -> None:
    """Set a value in the smoke grid's params.yaml as DVC does. key: "inject.seed", list positions as numbers."""
    with modify_yaml(str(checkout / GRID / "params.yaml")) as params:
        *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
        functools.reduce(lambda node, part: node[part], parents, params)[last] = value


def results(checkout: Path) -> dict[str, bytes]:
    """Every result file's bytes, by name. Times are no result."""
    folders = ("models", "metrics", "plots", "embeddings", "prompts", "data")
    files = [file for folder in folders for file in (checkout / GRID / folder).rglob("*") if file.is_file()]
    return {str(file.relative_to(checkout / GRID)): file.read_bytes() for file in files if file.name != "run.json"}
