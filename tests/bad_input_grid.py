"""A tiny grid to make mistakes in, for the tests of bad input (tests/test_bad_*.py).

A user's mistake ends in one line: what was found, what is allowed, where to change it. Exit code 1, nothing half-written.
Most cases run the command line inside this process, because a new interpreter takes seconds to import torch. What the operating
system refuses runs as users run it, in a process of its own. conftest.py loads this file as a plugin, so that all tests
share one finished grid.
"""

import functools
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dvc.utils.serialize import modify_yaml

from conftest import REPOSITORY, once
from smoke_grid import BASELINE, GRID, TEXT, environment
from textguard.artifacts import write_safetensors
from textguard.text.embeddings import ClassEmbeddings, EmbeddingOptions, save_class_embeddings

MODEL, RUN, RECORDS = f"models/{BASELINE}.safetensors", f"metrics/runs/{BASELINE}", f"metrics/records/{BASELINE}"
HEAD, GUIDED_HEAD = (f"models/heads/digits/{variant}.safetensors" for variant in ("baseline", "descriptions"))
EMBEDDINGS, QUESTIONS = "embeddings/digits/descriptions.safetensors", f"prompts/texts/{TEXT}/questions.jsonl"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WIDTH = 16  # of the class embeddings
REMOVED = object()


@dataclass(frozen=True)
class Grid:
    """A grid in a folder of its own, to make mistakes in."""

    folder: Path

    def change(self, place: str, value: Any) -> None:
        """Set one value of params.yaml as DVC does, or take it out (REMOVED). place: keys joined by dots, also absent ones."""
        *parents, last = place.split(".")
        with modify_yaml(str(self.folder / "params.yaml")) as params:
            section = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, params)
            section[last] = value
            if value is REMOVED:
                del section[last]

    def put(self, name: str, content: bytes | str) -> Path:
        """Replace a file; models are links to other grids' and must not be written to in place."""
        file = self.folder / name
        file.unlink(missing_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    def cut(self, name: str) -> Path:
        """Keep the first half of a file."""
        content = (self.folder / name).read_bytes()
        return self.put(name, content[: len(content) // 2])

    def files(self) -> dict[Path, tuple[int, int, int]]:
        """Every file but the partial results, with what changes when it is written."""
        found = {path: path.stat() for path in self.folder.rglob("*") if path.is_file()}
        assert not [path for path in found if path.suffix == ".tmp"]
        states = {path.relative_to(self.folder): (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in found.items()}
        return {path: state for path, state in states.items() if path.parts[0] != ".work"}

    def run(self, *arguments: str, **variables: str) -> tuple[int, list[str]]:
        """Do what `python stages ARGUMENTS` does. Returns the exit code and the lines on stderr."""
        stderr = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"TEXTGUARD_DEVICE": "cpu", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **variables}.items():
                patch.setenv(name, value)
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", ["stages", *arguments])
            patch.setattr(sys, "path", ["stages", *sys.path])
            patch.setattr(sys, "stderr", stderr)
            patch.setattr(signal, "signal", lambda *_: None)
            try:
                with pytest.raises(SystemExit) as ended:
                    runpy.run_path(str(REPOSITORY / "stages" / "__main__.py"), run_name="__main__")
            finally:
                torch.use_deterministic_algorithms(False)
        return ended.value.code, stderr.getvalue().splitlines()

    def fails(self, *arguments: str, **variables: str) -> str:
        """Run a stage that must end in one line before it writes anything. Returns the line."""
        before = self.files()
        code, lines = self.run(*arguments, **variables)
        assert (code, len(lines)) == (1, 1), (code, lines)
        assert self.files() == before
        return lines[0]

    def start(self, *arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run `python stages ARGUMENTS` in a process of its own."""
        command = [sys.executable, str(REPOSITORY / "stages"), *arguments]
        variables = environment(TEXTGUARD_DEVICE="cpu")
        return subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True, check=False, **settings)


def says(line: str, *parts: str) -> None:
    """The line holds all these parts."""
    missing = [part for part in parts if part not in line]
    assert not missing, f"{missing} not in: {line}"


def fails_in_one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the one line that a process ended with."""
    assert (done.returncode, done.stdout) == (1, ""), done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="session")
def finished_grid(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A tiny grid whose baseline went through every stage up to the results, for all processes. Nobody writes to it."""
    return once(tmp_path_factory, worker_id, "finished_tiny", lambda: _finish(smoke_grid(tmp_path_factory.mktemp("finished"))))


def _finish(grid: Grid) -> Path:
    small = {
        "datasets.digits.limit_train": 60,
        "datasets.digits.limit_test": 40,
        "backbones.resnet18.epochs": 1,
        "backbones.resnet18.warmup_epochs": 0,
        "backbones.resnet18.batch_size": 20,
        "inject.injections_per_layer": 4,
        "inject.image_batch": 2,
        "hardware.injections_per_layer": 2,
        "hardware.mitigations": ["learned"],
        "variants": ["baseline"],
    }
    for place, value in small.items():
        grid.change(place, value)
    stages = ["data digits", "heads digits", "recipes", f"prompts {TEXT}", f"responses {TEXT}"]
    stages += [f"{stage} {BASELINE}" for stage in ("train", "evaluate", "ranges", "inject", "hardware", "closeup")]
    for stage in [*stages, "results"]:
        code, lines = grid.run(*stage.split())
        assert code == 0, "\n".join(lines[-4:])
    grid.change("variants", ["baseline", "descriptions"])  # of which the second never ran
    for name in (EMBEDDINGS, GUIDED_HEAD):
        save_class_embeddings(grid.folder / name, embeddings())
    texts = {"vectors": torch.ones(20, WIDTH), "rows": torch.arange(20)}
    write_safetensors(grid.folder / "embeddings/digits/descriptions.texts.safetensors", texts)
    return grid.folder


@pytest.fixture
def grid(finished_grid: Path, tmp_path: Path) -> Grid:
    """The finished grid, to break. Its models are links, as they are large."""
    folder = tmp_path / "grid"
    shutil.copytree(finished_grid, folder, ignore=shutil.ignore_patterns(".work", "models"))
    shutil.copytree(finished_grid / "models", folder / "models", copy_function=os.link)
    return Grid(folder)


@pytest.fixture
def untouched(tmp_path: Path) -> Grid:
    """A grid of which nothing has run: all that the checks of params.yaml need."""
    return smoke_grid(tmp_path)


def smoke_grid(folder: Path) -> Grid:
    """A folder that holds nothing but the smoke grid's parameters."""
    shutil.copy(REPOSITORY / GRID / "params.yaml", folder)
    grid = Grid(folder)
    grid.change("root", str(REPOSITORY))
    return grid


def embeddings() -> ClassEmbeddings:
    """Class embeddings of the digits that mean nothing."""
    matrix = torch.nn.functional.normalize(torch.randn(len(DIGITS), WIDTH, generator=torch.Generator().manual_seed(0)))
    options = EmbeddingOptions(unit_before=True, unit_after=True, vectors="encoder", seed=0, template_weight=0.5)
    return ClassEmbeddings(matrix, "digits", tuple(DIGITS), "minilm", "0" * 64, WIDTH, 20, 0, options)
