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
    files = [
        file for grid in (".", "grids/smoke", "grids/fashion", "grids/faults") for file in (REPOSITORY / grid).glob(pattern)
    ]
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


def put(content: Any, place: str, value: Any) -> Any:
    """Set one entry of a JSON document; `...` takes it out. place: keys joined by dots, numbers count list entries."""
    *parents, last = [int(part) if part.isdecimal() else part for part in place.split(".")]
    section = content
    for part in parents:
        section = section[part]
    if value is ...:
        del section[last]
    else:
        section[last] = value
    return content


IMPOSSIBLE_RESULTS = {
    "a key of another version": ("from_the_future", 1, "from_the_future: no such key"),
    "such a key further in": ("top1.spread", 1, "top1.spread: no such key"),
    "share above 1": ("top1", {"value": 5.0, "low": 4.0, "high": 6.0, "n": 3}, "top1 is 5, not from 0 to 1"),
    "share below 0": ("overall.sdc", {"value": -1.0, "low": -2.0, "high": 0.0, "n": 3}, "sdc is -1, not from 0 to 1"),
    "negative DeltaLoss": ("layers.0.delta_loss", {"value": -1.0, "low": -1.0, "high": -1.0, "n": 3}, "layers.0"),
    "negative error": ("top1", {"value": 0.5, "low": 0.4, "high": 0.6, "n": 3, "error": -0.1}, "error is -0.1, below 0"),
    "interval upside down": ("top1", {"value": 0.5, "low": 0.9, "high": 0.1, "n": 3}, "value 0.5 is not between"),
    "value outside": ("layers.0.sdc.value", 0.9, "value 0.9 is not between low"),
    "other blocks": ("top1.blocks", [1e-6] * 32, "top1: Value error, value 0.97 is not the mean of its blocks"),
    "text in blocks": ("top1.blocks.0", "1", "top1.blocks.0: Input should be a valid number"),
    "negative count": ("top1.n", -1, "top1.n: Input should be greater than or equal to 0"),
    "a count of 30 digits": ("parameters", 10**30, "parameters: Input should be less than"),
    "true for a count": ("parameters", True, "parameters: Input should be a valid integer"),
    "confidence too near 1": ("confidence", 0.9999999999999999, "confidence: Input should be less than or equal to 0.9999"),
    "confidence too small": ("confidence", 1e-300, "confidence: Input should be greater than or equal to 0.5"),
    "no layer": ("layers", [], "layers: List should have at least 1 item"),
    "more masked than injected": ("layers.0.masked", 201, "layers.0: Value error, masked and detected are some"),
    "bits that do not add up": ("layers.0.by_bit.n.0", 1000, "layers.0: Value error, by_bit.n adds up to"),
    "a bit too few": ("layers.0.by_bit.sdc", [0.0], "n, delta_loss and sdc must have one entry per bit"),
    "outcomes that do not add up": ("layers.0.outcomes.benign", 0.1, "layers.0.outcomes: Value error, the four add up"),
    "convergence upside down": ("convergence.0.low", 1e9, "convergence.0"),
    "another sum of injections": ("plan.injections", 7, "plan.injections is 7, and the sampled layers have 400"),
    "method": ("layers.0.method", "guessed", "layers.0.method: Input should be 'sampled' or 'exact'"),
    "another detector first": ("plan.detector", "off", "detectors begins with 'profiled'"),
    "control characters": ("run", "a\x1b[2J", "run: Value error, it must be text without control characters"),
    "another run": ("run", "d-resnet18-template-0", "is of run 'd-resnet18-template-0'"),
}


@pytest.mark.parametrize(("place", "value", "said"), IMPOSSIBLE_RESULTS.values(), ids=IMPOSSIBLE_RESULTS)
def test_results_that_cannot_be_are_refused(runs, place, value, said):
    path = Path(f"metrics/results/{RUN}.json")
    path.write_text(json.dumps(put(json.loads(path.read_text(encoding="utf-8")), place, value)), encoding="utf-8")
    with pytest.raises(InvalidArtifact) as caught:
        load_result(RUN)
    line = str(caught.value)
    assert said in line
    assert line.startswith(f"metrics/results/{RUN}.json is ")
    assert line.endswith("; delete it and run 'dvc repro': stage 'results' writes it")
    assert "\n" not in line


def test_a_layer_of_that_name_twice_is_refused(runs):
    content = json.loads(Path(f"metrics/results/{RUN}.json").read_text(encoding="utf-8"))
    rewrite(f"metrics/results/{RUN}.json", put(content, "layers.1.layer", content["layers"][0]["layer"]))
    with pytest.raises(InvalidArtifact, match="layers holds 'conv1' twice"):
        load_result(RUN)


# What JSON's readers differ in: (text that is replaced, its replacement, what is said)
ODD_JSON = {
    "a key twice": ('"seed": 0', '"seed": 1, "seed": 0', "it holds 'seed' twice"),
    "such a key further in": ('"n": 100', '"n": 1, "n": 100', "it holds 'n' twice"),
    "NaN": ('"scale": 12.0', '"scale": NaN', "scale"),
    "NaN where null may be": ('"value": 0.97', '"value": NaN', "it holds NaN, which is no finite number"),
    "infinity": ('"value": 0.97', '"value": -Infinity', "it holds -Infinity, which is no finite number"),
    "too large a number": ('"value": 0.97', '"value": 1e999', "it holds 1e999, which is no finite number"),
    "5000 digits": ('"seed": 0', '"seed": ' + "9" * 5000, "Invalid JSON: number out of range"),
    "deep lists": ('"statistics": {', '"statistics": {"x": ' + "[" * 100_000 + "]" * 100_000 + ", ", "Invalid JSON"),
    "byte order mark": ("{", "\ufeff{", "Invalid JSON"),
    "no JSON": ("{", "", "Invalid JSON"),
    "half a character": ('"seed": 0', '"seed": "\\ud800"', "Invalid JSON"),
}


@pytest.mark.parametrize(("old", "new", "said"), ODD_JSON.values(), ids=ODD_JSON)
def test_json_that_readers_differ_in_is_refused(runs, old, new, said):
    path = Path(f"metrics/results/{RUN}.json")
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InvalidArtifact) as caught:
        load_result(RUN)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "stage 'results' writes it" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"top1": ...}, "top1: Field required"),
        ({"top1": {"value": 1.0, "low": 1.0, "n": 3}}, "top1.high: Field required"),
        ({"seed": "0"}, "seed: Input should be a valid integer"),
        ({"improvement": {"baseline": "b"}}, "improvement.delta_loss: Field required"),
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


@pytest.mark.parametrize(
    "damage", [{}, {"against": ""}, {"detectors": {}}, {"detectors": {"profiled": {}}}, {"verdict": "great"}]
)
def test_damaged_cells_are_named(runs, damage):
    path = Path("metrics/cells.json")
    cells = json.loads(path.read_text(encoding="utf-8"))
    if "verdict" in damage:
        damage = {"detectors": cells[0]["detectors"]}
        damage["detectors"]["profiled"]["verdict"]["sdc"]["head"] = "great"
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
    unbounded = Measured(1.0, -math.inf, math.inf, 3, math.nan, [1.0, math.nan])
    result = load_result(RUN).model_copy(update={"top1": unbounded})
    assert result.as_json()["top1"] == {"value": 1.0, "low": None, "high": None, "n": 3, "blocks": [1.0, None]}
    write_json(Path("again.json"), result.as_json())
    again = read(Path("again.json"), "", RunResult).top1
    assert again.value == 1.0
    assert all(math.isnan(number) for number in (again.low, again.high, again.blocks[1]))


def test_results_are_read_without_torch():
    code = "import sys, textguard.analysis.results, textguard.report.gate; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
