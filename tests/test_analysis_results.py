"""Estimates from stored records: of runs, of cells beside their baselines, and the grid's summary."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stored_grid import BASELINE_LAYERS, GUIDED_LAYERS, INJECT, INJECTIONS, INPUTS, STATISTICS, run_of, store
from textguard.analysis.breakdown import convergence, describe_layer, sums_by_bit
from textguard.analysis.files import load_cells, load_result
from textguard.analysis.results import write_results
from textguard.artifacts import write_json, write_parquet
from textguard.errors import InvalidArtifact, InvalidParameter
from textguard.params import StatisticsParams
from textguard.schema.base import Measured
from textguard.schema.results import MEASURES, ONE_TRAINING, PLACES, ByBit, Outcomes, UnderDetector


def test_every_number_of_a_run_has_an_interval(runs):
    run = load_result("d-resnet18-baseline-0")
    conv, last = run.layers
    assert (conv.method, conv.injections, conv.detected) == ("sampled", 200, 10)
    assert conv.delta_loss.low < conv.delta_loss.value < conv.delta_loss.high
    assert conv.delta_loss.value == pytest.approx(0.2, rel=0.3)
    assert conv.sdc.low < conv.sdc.value == 0.1 < conv.sdc.high
    assert (last.method, last.injections) == ("exact", 3200)
    assert last.delta_loss == Measured(3.0, 3.0, 3.0, 3200, 0.0)
    assert last.sdc.value == 0.2
    overall = run.overall
    assert overall.delta_loss.value == pytest.approx((conv.delta_loss.value + 3.0) / 2)
    assert run.by_neurons.delta_loss.value == pytest.approx((100 * conv.delta_loss.value + 10 * 3.0) / 110)
    assert run.by_neurons.sdc.value == pytest.approx((100 * 0.1 + 10 * 0.2) / 110)
    assert run.overall.fit.value == pytest.approx(run.by_neurons.sdc.value * 110 * 32 * 2e-5)
    assert (run.head, run.others.sdc) == (run.last_layer, conv.sdc)
    assert overall.sdc.value == pytest.approx(0.15)
    assert overall.sdc.low < 0.15 < overall.sdc.high
    assert run.top1.value == 0.97
    assert (run.largest_logit, load_result("d-resnet18-descriptions-0").largest_logit) == (3.0, 12 * 4.0)


def test_the_parts_of_a_sample_average_to_its_estimate(runs):
    run = load_result("d-resnet18-baseline-0")
    conv, last = run.layers
    assert len(run.top1.blocks) == len(conv.delta_loss.blocks) == len(conv.sdc.blocks) == 32
    assert np.mean(conv.delta_loss.blocks) == pytest.approx(conv.delta_loss.value, rel=0.05)
    assert last.delta_loss.blocks is None
    overall = np.array(run.overall.delta_loss.blocks)
    assert overall == pytest.approx((np.array(conv.delta_loss.blocks) + last.delta_loss.value) / 2, rel=1e-4)
    assert run.last_layer.delta_loss.blocks is None


def test_failures_in_time_come_from_bits_neurons_and_sdc(runs):
    run = load_result("d-resnet18-baseline-0")
    conv, last = run.layers
    assert conv.fit.value == pytest.approx(2e-5 * 32 * 100 * 0.1)
    assert last.fit.value == pytest.approx(2e-5 * 32 * 10 * 0.2)
    assert run.overall.fit.value == pytest.approx(conv.fit.value + last.fit.value)
    write_results(runs, StatisticsParams(0.99, 300, "goldeneye", "neurons", 2e-5, "multiply_adds"), INJECT)
    assert load_result("d-resnet18-baseline-0").layers[0].fit.value == pytest.approx(2 * conv.fit.value)


def test_a_layer_without_sdc_has_a_bound_for_its_failures(runs):
    file = Path("metrics/records/d-resnet18-baseline-0/injections.parquet")
    write_parquet(file, pd.read_parquet(file).assign(mismatch=False), {"inputs": INPUTS})
    write_results(runs, STATISTICS, INJECT)
    fit = load_result("d-resnet18-baseline-0").layers[0].fit
    assert math.isnan(fit.value)
    assert fit.high > 0


def test_the_last_layer_is_the_weighted_mean_of_latent_layer_and_head(runs):
    def last_layer(weights: str) -> float:
        write_results(runs, StatisticsParams(0.99, 300, "goldeneye", weights, 2e-5, "neurons"), INJECT)
        assert load_result("d-resnet18-baseline-0").last_layer.delta_loss.value == 3.0
        return load_result("d-resnet18-descriptions-0").last_layer.delta_loss.value

    latent = load_result("d-resnet18-descriptions-0").layers[1].delta_loss.value
    assert last_layer("neurons") == pytest.approx(0.9 * latent + 0.1 * 1.2)
    assert last_layer("equal") == pytest.approx((latent + 1.2) / 2)
    assert last_layer("head_only") == 1.2


def test_improvement_is_baseline_over_guided_with_interval_and_verdict(runs):
    baseline, guided = load_result("d-resnet18-baseline-0"), load_result("d-resnet18-descriptions-0")
    assert baseline.improvement is None
    found = guided.improvement
    expected = baseline.overall.delta_loss.value / guided.overall.delta_loss.value
    assert found.delta_loss.overall.value == pytest.approx(expected)
    assert found.delta_loss.overall.low < expected < found.delta_loss.overall.high
    assert found.delta_loss.head.value == pytest.approx(3.0 / 1.2)  # both are enumerated
    assert found.sdc.head == Measured(1.0, 1.0, 1.0, 3200)
    for measure, place in itertools.product(MEASURES, PLACES):
        ours, theirs = (getattr(getattr(run, place), measure).value for run in (guided, baseline))
        assert getattr(getattr(found, measure), place).value == pytest.approx(theirs / ours), (measure, place)
    assert found.top2diff.value == pytest.approx(0.05)
    by_layer = [layer.improvement for layer in guided.layers]
    assert by_layer[0].delta_loss.value == pytest.approx(2.0, rel=0.5)
    assert by_layer[0].sdc.value == pytest.approx(1.0)
    assert by_layer[1] is None  # the baseline has no latent layer
    assert by_layer[2].delta_loss == found.delta_loss.head  # its last layer does what the head does


def test_one_training_has_no_verdict_and_three_have(runs):
    (verdict,) = {cell.first.verdict.delta_loss.overall for cell in load_cells(runs)}
    assert verdict == ONE_TRAINING
    for seed in (1, 2):
        for variant, layers in (("baseline", BASELINE_LAYERS), ("descriptions", GUIDED_LAYERS)):
            key = f"d-resnet18-{variant}-{seed}"
            runs[key] = run_of("d", "resnet18", variant, seed)
            store(key, runs[key], layers, 97, 10 * seed)
    write_results(runs, STATISTICS, INJECT)
    template, descriptions = load_cells(runs)
    assert template.first.verdict.delta_loss.head == ONE_TRAINING
    verdicts = descriptions.first.verdict
    assert (verdicts.delta_loss.head, verdicts.sdc.head) == ("better", "not separable at 99%")
    assert [layer.layer for layer in descriptions.layers] == ["conv1", "head"]


def test_heads_are_compared_with_each_other(runs):
    """By the seeds that both have."""
    (found,) = load_cells(runs, contrasts=True)
    assert (found.variant, found.against, found.seeds) == ("descriptions", "template", [0])
    template, descriptions = (load_result(f"d-resnet18-{name}-0") for name in ("template", "descriptions"))
    ratio = found.first.improvement.delta_loss
    assert ratio.overall.value == pytest.approx(template.overall.delta_loss.value / descriptions.overall.delta_loss.value)
    assert ratio.overall.low < ratio.overall.value < ratio.overall.high
    assert ratio.head.value == 1.0
    assert [layer.layer for layer in found.layers] == ["conv1", "fc", "head"]
    assert found.top1_baseline.value == template.top1.value


def test_non_finite_losses_are_left_out_or_capped_and_never_forgotten(runs):
    def off(nonfinite: str) -> UnderDetector:
        write_results(runs, StatisticsParams(0.99, 300, nonfinite, "neurons", 2e-5, "neurons"), INJECT)
        return load_result("d-resnet18-baseline-0").detectors["off"]

    left_out, capped = off("goldeneye"), off("cap:50")
    assert left_out.nonfinite.value == capped.nonfinite.value == pytest.approx(0.05 / 2)  # 10 of 200, in one of 2 layers
    assert left_out.overall.sdc.value == capped.overall.sdc.value == pytest.approx((0.1 + 0.2) / 2)
    assert capped.overall.delta_loss.value > left_out.overall.delta_loss.value + 1
    for policy in ("cap", "cap:-1", "cap:x", "none"):
        with pytest.raises(InvalidParameter, match=r"nonfinite is .*; allowed: goldeneye, or cap:X"):
            off(policy)


def test_seeds_of_a_cell_share_a_row(runs, tmp_path):
    for seed in (1, 2):
        for variant, layers in (("baseline", BASELINE_LAYERS), ("descriptions", GUIDED_LAYERS)):
            key = f"d-resnet18-{variant}-s{seed}"
            runs[key] = run_of("d", "resnet18", variant, seed)
            store(key, runs[key], layers, 90 + seed, 10 + seed)
    write_results(runs, STATISTICS, INJECT)
    cells = load_cells(runs)
    assert [(cell.variant, cell.seeds) for cell in cells] == [("template", [0]), ("descriptions", [0, 1, 2])]
    top1 = cells[1].top1
    assert top1.value == pytest.approx((0.97 + 0.91 + 0.92) / 3)
    assert top1.low < 0.8
    overall = cells[1].first.improvement.delta_loss.overall
    assert overall.low < overall.value < overall.high


def test_the_summary_keeps_networks_apart(runs):
    """A second network that lacks a variant, and whose numbers are others, changes no number of the first."""
    before = json.loads(Path("metrics/summary.json").read_text(encoding="utf-8"))["d"]["resnet18"]
    for variant, layers in (("baseline", {"conv1": (100, 9.0), "fc": (10, 30.0)}), ("descriptions", GUIDED_LAYERS)):
        key = f"d-alexnet-{variant}-0"
        runs[key] = run_of("d", "alexnet", variant)
        store(key, runs[key], layers, 50)
    write_results(runs, STATISTICS, INJECT)
    summary = json.loads(Path("metrics/summary.json").read_text(encoding="utf-8"))
    assert {dataset: {name: list(lines) for name, lines in networks.items()} for dataset, networks in summary.items()} == {
        "d": {"resnet18": ["baseline", "template", "descriptions"], "alexnet": ["baseline", "descriptions"]},
        "e": {"alexnet": ["baseline"]},
    }
    assert summary["d"]["resnet18"] == before
    assert list(before["baseline"]) == list(summary["e"]["alexnet"]["baseline"]) == ["top1", "sdc", "mismatch", "dl"]
    assert list(before["template"]) == [*before["baseline"], "x_head", "x_last", "x_all", "x_sdc", "x_fit"]
    cells = {(cell.backbone, cell.variant): cell for cell in load_cells(runs)}
    for backbone, lines in summary["d"].items():
        line, cell = lines["descriptions"], cells[backbone, "descriptions"]
        losses, sdc = cell.first.improvement.delta_loss, cell.first.improvement.sdc
        numbers = [losses.head.value, losses.last_layer.value, losses.overall.value, sdc.overall.value, sdc.by_neurons.value]
        assert [line[name] for name in ("x_head", "x_last", "x_all", "x_sdc", "x_fit")] == pytest.approx(numbers, rel=1e-5)
    assert summary["d"]["alexnet"]["descriptions"]["x_last"] > 2 * before["descriptions"]["x_last"]


def test_the_summary_averages_over_seeds(runs):
    for seed, correct in ((1, 90), (2, 80)):
        key = f"e-alexnet-baseline-s{seed}"
        runs[key] = run_of("e", "alexnet", "baseline", seed)
        store(key, runs[key], {"conv1": (100, 0.2), "fc": (10, 1.0)}, correct, seed)
    write_results(runs, STATISTICS, INJECT)
    line = json.loads(Path("metrics/summary.json").read_text(encoding="utf-8"))["e"]["alexnet"]["baseline"]
    assert line["top1"] == pytest.approx((50 + 90 + 80) / 3)


def test_the_same_records_give_the_same_bytes(runs):
    files = [Path("metrics/summary.json"), Path("metrics/cells.json"), *Path("metrics/results").iterdir()]
    before = {file: file.read_bytes() for file in files}
    write_results(runs, STATISTICS, INJECT)
    assert {file: file.read_bytes() for file in files} == before


def test_a_layer_is_broken_down_by_bit_and_by_outcome(runs):
    conv, last = load_result("d-resnet18-baseline-0").layers
    assert conv.outcomes == Outcomes(masked=0.0, benign=0.9, sdc=0.1, nonfinite=0.0)
    assert last.outcomes == Outcomes(masked=0.05, benign=0.75, sdc=0.2, nonfinite=0.0)
    assert sum(conv.by_bit.n) == INJECTIONS
    pooled = np.nansum(np.array(conv.by_bit.n) * np.array(conv.by_bit.delta_loss, float)) / INJECTIONS
    assert pooled == pytest.approx(conv.delta_loss.value, rel=1e-4)
    assert last.by_bit == ByBit(n=[100] * 32, delta_loss=[3.0] * 32, sdc=[0.2] * 32)


def test_bits_that_were_hit_more_often_count_no_more():
    columns = ["index", "bit", "weight", "masked", "golden_loss", "faulty_loss", "mismatch"]
    rows = [(0, 0, 1.0, True, 0.0, 0.0, False), (1, 1, 0.5, False, 0.0, 2.0, True), (2, 1, 1.5, False, 0.0, math.inf, False)]
    sums = sums_by_bit(pd.DataFrame(rows, columns=columns), 3)
    outcomes, by_bit = describe_layer(sums, strata=0, guided=False)
    assert dict(outcomes) == pytest.approx({"masked": 1 / 3, "benign": 0, "sdc": 0.5 / 3, "nonfinite": 1.5 / 3}, abs=1e-6)
    assert by_bit.as_json() == {"n": [1, 2, 0], "delta_loss": [0.0, 2.0, None], "sdc": [0.0, 1.0, None]}
    outcomes, _ = describe_layer(sums.iloc[:2], strata=2, guided=False)
    assert outcomes == Outcomes(masked=0.5, benign=0.0, sdc=0.125, nonfinite=0.375)


def test_convergence_ends_at_the_sampled_layers_mean(runs):
    run = load_result("d-resnet18-baseline-0")
    assert [point.injections_per_layer for point in run.convergence] == [8, 16, 32, 64, 128, 200]
    last = run.convergence[-1]
    found = run.layers[0].delta_loss
    assert (last.value, last.low, last.high, last.n) == (found.value, found.low, found.high, found.n)


def test_guided_injections_tell_what_uniform_ones_would():
    draw = np.random.default_rng(0)
    harm = np.where(draw.random(1000) < 0.02, draw.exponential(2.0, 1000), 0.001)  # of all faults of a layer
    chance = 0.2 / 1000 + 0.8 * harm / harm.sum()
    rows = []
    for layer, count in (("conv", 4096), ("fc", 2048)):
        faults = draw.choice(1000, count, p=chance)
        columns = {"layer": layer, "index": range(count), "bit": 30, "weight": 1 / (1000 * chance[faults]), "golden_loss": 0.0}
        columns |= {"faulty_loss": harm[faults], "mismatch": False, "masked": False, "detected": False}
        rows.append(pd.DataFrame(columns))
    points = convergence(pd.concat(rows), {"conv": 1, "fc": 1}, "goldeneye", 0.99, guided=True)
    last = points[-1]
    assert last.uniform_error == pytest.approx(harm.std() * math.sqrt(1 / 4096 + 1 / 2048) / 2, rel=0.05)
    assert points[0].uniform_error == pytest.approx(harm.std() * math.sqrt(2 / 8) / 2, rel=0.05)
    uniform = convergence(pd.concat(rows), {"conv": 1, "fc": 1}, "goldeneye", 0.99)
    assert "uniform_error" not in uniform[-1].as_json()


def test_damaged_inputs_are_named(runs):
    for name, maker in (("evaluation.json", "evaluate"), ("campaign.json", "inject")):
        path = Path("metrics/runs/d-resnet18-baseline-0") / name
        whole = path.read_text(encoding="utf-8")
        for damage in ("{", "[]", "{}", '{"layers": [{"layer": "x"}]}', '{"layers": []}'):
            path.write_text(damage, encoding="utf-8")
            with pytest.raises(InvalidArtifact, match=rf"{name} is not what .*: stage '{maker}' writes it"):
                write_results(runs, STATISTICS, INJECT)
        path.write_text(whole, encoding="utf-8")


def test_a_campaign_of_another_variant_is_named(runs):
    """A text-guided classifier has two layers or more."""
    path = Path("metrics/runs/d-resnet18-descriptions-0/campaign.json")
    stored = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(stored | {"layers": stored["layers"][-1:]}), encoding="utf-8")
    with pytest.raises(InvalidArtifact, match=r"campaign\.json lacks layers; .*stage 'inject' writes it"):
        write_results(runs, STATISTICS, INJECT)


def test_a_layer_without_records_is_named(runs):
    file = Path("metrics/records/d-resnet18-baseline-0/injections.parquet")
    records = pd.read_parquet(file)
    write_parquet(file, records[records["layer"] != "conv1"], {"inputs": INPUTS})
    with pytest.raises(InvalidArtifact, match=r"injections\.parquet has no injections into layer 'conv1', which "):
        write_results(runs, STATISTICS, INJECT)


def test_layers_that_shared_images_are_not_taken_for_independent(runs):
    key = "d-resnet18-descriptions-0"  # it has two sampled layers

    def widths(images: str) -> tuple[float, ...]:
        for run in runs:
            file = Path(f"metrics/runs/{run}/campaign.json")
            stored = json.loads(file.read_text(encoding="utf-8"))
            stored["settings"]["images"] = images
            write_json(file, stored)
        write_results(runs, STATISTICS, replace(INJECT, images=images))
        found = load_result(key)
        estimates = (found.overall.delta_loss, found.improvement.delta_loss.overall, found.overall.sdc, found.convergence[-1])
        return tuple(estimate.high - estimate.low for estimate in estimates)

    file = Path(f"metrics/records/{key}/injections.parquet")
    records = pd.read_parquet(file)
    loss = np.random.default_rng(0).exponential(0.2, INJECTIONS).astype("float32")
    write_parquet(file, records.assign(faulty_loss=loss[records["index"]]), {"inputs": INPUTS})
    apart, shared = widths("uniform"), widths("shared")
    assert all(wide > 1.1 * narrow for wide, narrow in zip(shared, apart, strict=True))
