"""Tables and figures from stored metrics."""

import csv
import json
from pathlib import Path

import pandas as pd
import pytest

from textguard.errors import InvalidArtifact
from textguard.faults.statistics import Estimate, ratio
from textguard.params import FiguresParams, RunParams
from textguard.report.figures import write_figures
from textguard.report.results import compare, load_result
from textguard.report.tables import Table, as_latex, as_markdown, summary, table1, table2, table3, write_table

COLOURS = {"baseline": "#d55e00", "random": "#7f7f7f", "template": "#56b4e9", "descriptions": "#0072b2"}


def estimate(value: float, n: int = 100) -> dict:
    return {"value": value, "low": value * 0.9, "high": value * 1.1, "n": n}


def layer(name: str, neurons: int, delta_loss: float) -> dict:
    return {"layer": name, "neurons": neurons, "delta_loss": estimate(delta_loss), "mismatch": estimate(delta_loss / 10)}


def store(key: str, run: RunParams, top1: float, overall: float, layers: list[dict]) -> None:
    folder = Path("metrics/runs") / key
    folder.mkdir(parents=True)
    evaluation = {"top1": estimate(top1), "top2diff": estimate(0.9), "parameters": 11_000_000, "multiply_adds": 40_000_000}
    if run.variant != "baseline":
        evaluation["parameters"] += 250_000
        evaluation["top2diff"] = estimate(0.95)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    resilience = {"overall_delta_loss": estimate(overall), "overall_mismatch": estimate(0.01), "nonfinite": 0, "layers": layers}
    (folder / "resilience.json").write_text(json.dumps(resilience))
    names = [entry["layer"] for entry in layers]
    ranges = pd.DataFrame({"layer": names, "kind": "Conv2d", "neurons": 1, "max_abs": 2.0, "mean_abs": 0.5, "images": 50})
    ranges.to_csv(folder / "ranges.csv", index=False)
    curve = pd.DataFrame({"threshold_percent": range(41), "accuracy_percent": [100 - i for i in range(41)]})
    curve.to_csv(folder / "thresholds.csv", index=False)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A baseline and two text-guided runs of one backbone, and a baseline without a partner."""
    monkeypatch.chdir(tmp_path)
    runs = {}
    guided = [layer("backbone.conv1", 100, 0.1), layer("backbone.fc", 90, 0.2), layer("head", 10, 1.2)]
    for variant, layers in (
        ("baseline", [layer("conv1", 100, 0.2), layer("fc", 10, 3.0)]),
        ("template", guided),
        ("descriptions", guided),
    ):
        key = f"d-resnet18-{variant}-s0"
        runs[key] = RunParams("d", "resnet18", variant, "r", 0, "x")
        store(key, runs[key], 0.97, 1.6 if variant == "baseline" else 0.5, layers)
    runs["e-alexnet-baseline-s0"] = RunParams("e", "alexnet", "baseline", "r", 0, "x")
    store("e-alexnet-baseline-s0", runs["e-alexnet-baseline-s0"], 0.5, 1.0, [layer("fc", 10, 1.0)])
    return [load_result(key, run) for key, run in runs.items()]


def test_the_last_layer_is_the_weighted_mean_of_latent_layer_and_head(results):
    baseline, _, guided, _ = results
    assert [entry.name for entry in guided.layers] == ["conv1", "fc", "head"]
    assert baseline.last_layer("neurons").value == 3.0
    assert guided.last_layer("neurons").value == pytest.approx(0.9 * 0.2 + 0.1 * 1.2)
    assert guided.last_layer("equal").value == pytest.approx(0.7)
    assert guided.last_layer("head_only").value == 1.2


def test_improvement_is_baseline_over_guided_with_an_interval(results):
    comparisons = compare(results, "neurons")
    assert [c.guided.run.variant for c in comparisons] == ["template", "descriptions"]
    best = comparisons[1]
    assert best.last_layer == ratio(best.baseline.last_layer("neurons"), best.guided.last_layer("neurons"))
    assert best.last_layer.value == pytest.approx(3.0 / 0.3)
    assert best.overall.value == pytest.approx(3.2)
    assert best.overall.low < 3.2 < best.overall.high
    assert best.top2diff.value == pytest.approx(0.05)


def test_tables_hold_the_rows_that_were_run(results):
    comparisons = compare(results, "neurons")
    first, second, third = table1(comparisons, "d"), table2(comparisons), table3(comparisons)
    assert [row[0] for row in first.rows] == ["resnet18"]
    assert first.rows[0][3] == pytest.approx(0.25)
    assert table1(comparisons, "e").rows == []
    assert [row[:2] for row in second.rows] == [["d", "resnet18"]]
    assert [row[1] for row in third.rows] == ["text, one template", "text, class descriptions"]


def test_tables_are_written_in_three_formats(results, tmp_path):
    write_table(table1(compare(results, "neurons"), "d"), tmp_path)
    markdown = (tmp_path / "table1.md").read_text()
    assert "| resnet18 | 97.00 [87.30, 106.70] | 97.00 [87.30, 106.70] | +0.25 |" in markdown
    with (tmp_path / "table1.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["Improvement in Reliability, Last Layer (x)"]) == pytest.approx(10)
    assert row["Acc. Ours (%) n"] == "100"
    latex = (tmp_path / "table1.tex").read_text()
    assert r"Acc. Ours (\%)" in latex
    assert latex.count(r"\begin{") == latex.count(r"\end{") == 2


def test_empty_tables_and_odd_texts_are_written_safely(tmp_path):
    table = Table("odd", "100 % of a_b", ["name", "x"], [["<b>|`a_1`\\", Estimate(float("nan"), 0, 0, 0)]])
    assert r"&lt;b>\|\`a\_1\`\\" in as_markdown(table)
    assert "undefined" in as_markdown(table)
    assert r"a\_1" in as_latex(table)
    assert r"100 \% of a\_b" in as_latex(table)
    write_table(Table("empty", "none", ["a", "b"], []), tmp_path)
    assert (tmp_path / "empty.csv").read_text() == "a,b\n"


def test_the_summary_has_one_short_line_per_run(results):
    lines = summary(results, compare(results, "neurons"), "neurons")
    assert list(lines) == [result.key for result in results]
    assert lines["d-resnet18-descriptions-s0"]["x_last"] == 10.0
    assert lines["d-resnet18-descriptions-s0"]["top1"] == 97.0
    assert "x_last" not in lines["d-resnet18-baseline-s0"]


def test_figures_come_with_their_numbers_and_the_same_bytes_each_time(results, tmp_path):
    for folder in ("a", "b"):
        write_figures(results, FiguresParams(COLOURS, 60), tmp_path / folder)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 2 * 3 * 3
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    numbers = pd.read_csv(tmp_path / "a" / "delta_loss-d-resnet18.csv")
    assert numbers.groupby("variant").size().to_dict() == {"baseline": 2, "template": 3, "descriptions": 3}
    assert (tmp_path / "a" / "value_ranges-d-resnet18.png").read_bytes().startswith(b"\x89PNG")


def test_damaged_metrics_are_named(results):
    path = Path("metrics/runs/d-resnet18-baseline-s0/evaluation.json")
    run = results[0].run
    for damage in ("{", "[]", "{}", '{"top1": {"value": "x"}}'):
        path.write_text(damage)
        with pytest.raises(InvalidArtifact, match=r"evaluation\.json cannot be read"):
            load_result("d-resnet18-baseline-s0", run)
