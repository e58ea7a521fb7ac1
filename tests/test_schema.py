"""The models of the stages' JSON files: what is read, what is refused, and that files and reference are as they say."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY
from textguard.analysis.files import load_cells, load_closeup, load_result
from textguard.artifacts import write_json
from textguard.errors import InvalidArtifact
from textguard.schema.base import Measured, read
from textguard.schema.campaign import StoredCampaign
from textguard.schema.closeup import CloseUp, NoCam
from textguard.schema.document import document
from textguard.schema.evaluation import Evaluation
from textguard.schema.results import Cell, RunResult
from textguard.schema.texts import TextQuality

KINDS = {
    "metrics/runs/*/evaluation.json": Evaluation,
    "metrics/runs/*/campaign.json": StoredCampaign,
    "metrics/closeup/*.json": CloseUp,
    "metrics/texts/*.json": TextQuality,
    "metrics/results/*.json": RunResult,
    "metrics/cells.json": list[Cell],
}
RUN = "d-resnet18-descriptions-0"


@pytest.mark.parametrize("pattern", KINDS)
def test_files_in_git_are_read_and_written_as_they_are(pattern, tmp_path):
    files = [file for grid in (".", "grids/smoke", "grids/fashion") for file in (REPOSITORY / grid).glob(pattern)]
    assert files
    for file in files:
        content = read(file, "", KINDS[pattern])
        parts = [part.as_json() for part in content] if isinstance(content, list) else content.as_json()
        write_json(tmp_path / "again.json", parts)
        assert (tmp_path / "again.json").read_bytes() == file.read_bytes(), file


def test_the_reference_is_what_the_models_say():
    assert (REPOSITORY / "docs" / "outputs.md").read_text(encoding="utf-8") == document()


def rewrite(path: str, change: dict[str, Any]) -> None:
    """Replace some of a JSON object's entries, or drop those that are to become `...`."""
    content = json.loads(Path(path).read_text(encoding="utf-8")) | change
    Path(path).write_text(json.dumps({name: value for name, value in content.items() if value is not ...}), encoding="utf-8")


def test_keys_of_a_newer_version_are_ignored(runs):
    before = load_result(RUN)
    rewrite(f"metrics/results/{RUN}.json", {"from_the_future": {"x": 1}})
    assert load_result(RUN) == before


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"top1": ...}, "top1: Field required"),
        ({"top1": {"value": 1.0, "low": 1.0, "n": 3}}, "top1.high: Field required"),
        ({"seed": "0"}, "seed: Input should be a valid integer"),
        ({"improvement": {"baseline": "b"}}, "improvement.overall: Field required"),
        ({"layers": [{"layer": "x"}]}, "layers.0.kind: Field required"),
        ({"settings": {}}, "settings: Value error, seed is missing"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(runs, change, place):
    rewrite(f"metrics/results/{RUN}.json", change)
    with pytest.raises(InvalidArtifact) as caught:
        load_result(RUN)
    line = str(caught.value)
    assert line.startswith(f"metrics/results/{RUN}.json is not what docs/outputs.md describes ({place}")
    assert line.endswith("; delete it and run 'dvc repro': stage 'results' writes it")


@pytest.mark.parametrize("damage", [{}, {"verdict": {}}, {"head": {}}, {"detectors": {"profiled": {}}}])
def test_damaged_cells_are_named(runs, damage):
    path = Path("metrics/cells.json")
    cells = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps([cells[0] | damage] if damage else {}), encoding="utf-8")
    with pytest.raises(InvalidArtifact, match=r"cells\.json is not what .*stage 'results' writes it"):
        load_cells(runs)


@pytest.mark.parametrize("damage", ["[]", "{}", '{"cam": {}}'])
def test_a_damaged_closeup_is_named(runs, damage):
    Path(f"metrics/closeup/{RUN}.json").write_text(damage, encoding="utf-8")
    with pytest.raises(InvalidArtifact, match=rf"{RUN}\.json is not what .*stage 'closeup' writes it"):
        load_closeup(RUN)


def test_a_network_without_maps_says_why(runs):
    rewrite(f"metrics/closeup/{RUN}.json", {"cam": {"skipped": "no convolution"}})
    assert load_closeup(RUN).cam == NoCam(skipped="no convolution")
    assert load_closeup(RUN).as_json()["cam"] == {"skipped": "no convolution"}


def test_a_detector_without_its_exact_layers_is_refused(runs):
    path = f"metrics/runs/{RUN}/campaign.json"
    rewrite(path, {"detectors": ["profiled", "off", "fixed:1"]})
    with pytest.raises(InvalidArtifact, match=r"exact lacks the detector 'fixed:1'"):
        read(Path(path), "inject", StoredCampaign)


def test_numbers_that_json_lacks_become_null_and_are_read_as_nan(runs):
    unbounded = Measured(1.0, -math.inf, math.inf, 3, [1.0, math.nan])
    result = load_result(RUN).model_copy(update={"top1": unbounded})
    assert result.as_json()["top1"] == {"value": 1.0, "low": None, "high": None, "n": 3, "blocks": [1.0, None]}
    write_json(Path("again.json"), result.as_json())
    again = read(Path("again.json"), "", RunResult).top1
    assert again.value == 1.0
    assert all(math.isnan(number) for number in (again.low, again.high, again.blocks[1]))


def test_results_are_read_without_torch():
    code = "import sys, textguard.analysis.results, textguard.report.gate; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
