"""The regression gate: what is worse fails, what may be chance passes; its make target and what CI runs."""

import copy
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from pydantic import TypeAdapter

from conftest import REPOSITORY
from smoke_grid import run
from textguard.artifacts import write_csv, write_json, write_parquet
from textguard.faults.engines import ReplayEngine
from textguard.faults.exact import enumerate_layer
from textguard.faults.execution import run_campaign
from textguard.faults.plans import draw_plan
from textguard.faults.profiling import image_chances, loader_of, profile_ranges, top2diff
from textguard.params import GateParams, RunParams, StatisticsParams, load_gate_params
from textguard.report.gate import Run, compare_all, holm, judge, main, read_runs, sign_flip_p
from textguard.report.results import PLAN_KEYS, RESULTS_DIR, write_results

Z = 2.5758293035489004
TOLERANCES = GateParams(1.0, 10.0, 10.0, 10.0, 0.01)
LAYERS, INJECTIONS, IMAGES, BLOCKS = 12, 1024, 1024, 32
Metrics = dict[str, Any]


def sampled(values: np.ndarray) -> Metrics:
    """Mean of a sample, shape [N], with its 99 % interval and blocks."""
    half = Z * values.std(ddof=1) / math.sqrt(len(values))
    mean = values.mean()
    blocks = values.reshape(BLOCKS, -1).mean(axis=1).tolist()
    return {"value": mean, "low": mean - half, "high": mean + half, "n": len(values), "blocks": blocks}


def exact(value: float) -> Metrics:
    return {"value": value, "low": value, "high": value, "n": 10_000}


def metrics(
    losses: np.ndarray, right: np.ndarray, plan: str = "p0", images: str = "i0", variant: str = "descriptions"
) -> Metrics:
    """A run's metrics file. losses: DeltaLoss of every injection, [layers, N]. right: whether each image is, [images]."""
    overall = sampled(losses.mean(axis=0))
    overall["high"] = overall["value"] + math.hypot(*(m["high"] - m["value"] for m in map(sampled, losses))) / len(losses)
    overall["low"] = 2 * overall["value"] - overall["high"]
    gain, spread = 10 / overall["value"], math.exp(overall["high"] / overall["value"] - 1)
    improvement = {"value": gain, "low": gain / spread, "high": gain * spread, "n": losses.size}
    layers = [
        {"layer": f"conv{i}", "neurons": 64, "method": "sampled", "delta_loss": sampled(row), "sdc": sampled(row > 3)}
        for i, row in enumerate(losses)
    ]
    return {
        "run": "digits-resnet18-descriptions-s0",
        "dataset": "digits",
        "backbone": "resnet18",
        "variant": "descriptions",
        "seed": 0,
        "confidence": 0.99,
        "plan": {"mark": plan, "injections_per_layer": losses.shape[1]},
        "images": images,
        "top1": sampled(right.astype(float)),
        "overall": {"delta_loss": overall, "sdc": sampled((losses > 3).mean(axis=0)), "fit": None},
        "last_layer": {"delta_loss": exact(0.02)},
        "layers": layers,
        "improvement": {"baseline": "b", "last_layer": improvement, "overall": improvement, "verdict": "better"},
    }


def skewed(rng: np.random.Generator, share: float = 0.1, variation: float = 20.0) -> np.ndarray:
    """DeltaLoss of a campaign: lognormal for a share of the faults, otherwise 0; the mean is 1."""
    sigma = math.sqrt(math.log((variation**2 + 1) * share))
    values = np.exp(sigma * rng.standard_normal((LAYERS, INJECTIONS)) - sigma**2 / 2) / share
    return np.where(rng.random((LAYERS, INJECTIONS)) < share, values, 0)


def even(seed: int = 0) -> np.ndarray:
    """DeltaLoss of a campaign that needs few injections: mean 1, standard deviation 1."""
    return np.random.default_rng(seed).exponential(size=(LAYERS, INJECTIONS))


def right(share: float = 0.95, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(IMAGES) < share


@pytest.fixture(scope="module")
def usual() -> Metrics:
    return metrics(even(), right())


@pytest.fixture
def gate(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Writes two runs (or two folders of them, by file name) to disk; returns how many numbers are worse, and the report."""

    def compare(base: Metrics, new: Metrics, tolerances: GateParams = TOLERANCES) -> tuple[int, str]:
        runs = []
        for side, content in (("base", base), ("new", new)):
            files = {"run.json": content} if "run" in content else content
            shutil.rmtree(tmp_path / side, ignore_errors=True)
            (tmp_path / side).mkdir()
            for name, text in files.items():
                (tmp_path / side / name).write_text(json.dumps(text))
            runs.append(read_runs(tmp_path / side))
        report, worse = judge(compare_all(*runs, tolerances), tolerances.significance)
        return worse, report

    return compare


def changed(base: Metrics, place: str, change: Callable[[Any], Any]) -> Metrics:
    """A copy with one thing changed; numbers in the place's path count list entries."""
    new = copy.deepcopy(base)
    *parents, last = [int(part) if part.isdecimal() else part for part in place.split(".")]
    section = new
    for part in parents:
        section = section[part]
    section[last] = change(section[last])
    return new


def scaled(factor: float) -> Callable[[Metrics], Metrics]:
    def scale(old: Metrics) -> Metrics:
        new = {name: factor * old[name] for name in ("value", "low", "high")}
        return {**old, **new} | ({"blocks": [factor * block for block in old["blocks"]]} if "blocks" in old else {})

    return scale


def row(report: str, quantity: str) -> list[str]:
    """The cells of a quantity's line."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines()]
    (cells,) = (cells for cells in lines if quantity in cells)
    return cells


def test_identical_runs_pass(gate, usual):
    worse, report = gate(usual, usual)
    assert worse == 0
    assert report.splitlines()[0].startswith("| Run | Quantity | Base | New |")
    assert row(report, "top-1")[-1] == row(report, "DeltaLoss, last layer")[-1] == "same"
    assert row(report, "DeltaLoss, other layers")[-1] == "12 same"
    assert "conv3" not in report
    (last,) = report.splitlines()[-1:]
    assert last.startswith("**PASS")
    assert last.endswith("**")
    assert "18 comparisons" in last
    assert "Holm" in last


QUANTITIES = {
    "top1": ("top1", 0.95, "top-1", "paired"),
    "overall": ("overall.delta_loss", 1.2, "DeltaLoss, overall", "paired"),
    "sdc": ("overall.sdc", 1.2, "SDC, overall", "paired"),
    "last layer": ("last_layer.delta_loss", 1.2, "DeltaLoss, last layer", "exact"),
    "one layer": ("layers.7.delta_loss", 1.2, "DeltaLoss, conv7", "paired"),
    "improvement of the last layer": ("improvement.last_layer", 0.7, "improvement, last layer", "unpaired"),
    "improvement": ("improvement.overall", 0.7, "improvement, overall", "unpaired"),
}


@pytest.mark.parametrize(("place", "factor", "quantity", "tested"), QUANTITIES.values(), ids=QUANTITIES)
def test_each_number_alone_fails_when_it_is_worse_and_passes_when_it_is_better(gate, usual, place, factor, quantity, tested):
    worse, report = gate(usual, changed(usual, place, scaled(factor)))
    assert worse == 1
    assert row(report, quantity)[5:] == [tested, row(report, quantity)[6], "worse"]
    assert report.splitlines()[-1].startswith("**FAIL: 1 worse")
    worse, report = gate(changed(usual, place, scaled(factor)), usual)
    assert worse == 0
    assert row(report, quantity)[-1] == "better"


@pytest.mark.parametrize(("place", "factor", "quantity"), [case[:3] for case in QUANTITIES.values()], ids=QUANTITIES)
def test_each_number_passes_within_its_tolerance(gate, usual, place, factor, quantity):
    within = 0.995 if quantity == "top-1" else 1.09 if factor > 1 else 0.905
    worse, report = gate(usual, changed(usual, place, scaled(within)))
    assert worse == 0
    assert quantity.endswith("conv7") or row(report, quantity)[-1] == "within tolerance"


WIDER = {
    "top1": (0.92, {"top1_points": 8.0}),
    "overall.delta_loss": (1.2, {"delta_loss_percent": 25.0}),
    "overall.sdc": (1.2, {"sdc_percent": 25.0}),
    "improvement.overall": (0.7, {"improvement_percent": 35.0}),
}


@pytest.mark.parametrize(("place", "factor", "tolerance"), [(place, *case) for place, case in WIDER.items()], ids=WIDER)
def test_each_tolerance_is_of_its_own_number(gate, usual, place, factor, tolerance):
    new = changed(usual, place, scaled(factor))
    assert gate(usual, new)[0] == 1
    assert gate(usual, new, replace(TOLERANCES, **tolerance))[0] == 0


def test_a_step_of_exactly_the_tolerance_passes(gate, usual):
    base, new = (changed(usual, "top1", lambda _, value=value: exact(value)) for value in (0.97, 0.96))
    assert 0.97 - 0.96 > 0.01
    assert row(gate(base, new)[1], "top-1")[-1] == "within tolerance"


def test_what_may_be_chance_passes(gate):
    rng = np.random.default_rng(0)
    base, new = metrics(skewed(rng), right()), metrics(1.2 * skewed(rng), right(), plan="p1")
    worse, report = gate(base, new)
    assert worse == 0
    assert "not separable" in row(report, "DeltaLoss, other layers")[-1]


def test_pairs_show_what_independent_samples_hide(gate):
    rng = np.random.default_rng(0)
    losses = skewed(rng)
    faults_in_common = metrics(losses, right()), metrics(1.3 * losses, right())
    assert gate(*faults_in_common)[0] > 0
    assert gate(faults_in_common[0], metrics(1.3 * losses, right(), plan="p1"))[0] == 0
    without = changed(faults_in_common[1], "overall.delta_loss", lambda old: {**old, "blocks": old["blocks"][:16]})
    assert row(gate(faults_in_common[0], without)[1], "DeltaLoss, overall")[5] == "unpaired"
    few = [changed(side, "overall.delta_loss", lambda old: {**old, "blocks": old["blocks"][:8]}) for side in faults_in_common]
    assert row(gate(*few)[1], "DeltaLoss, overall")[5] == "unpaired"


def test_top1_is_paired_by_images_not_by_faults(gate):
    before = right()
    after = before & (np.random.default_rng(1).random(IMAGES) > 0.025)
    base = metrics(even(), before)
    assert row(gate(base, metrics(even(), after, plan="p1"))[1], "top-1")[5::2] == ["paired", "worse"]
    assert row(gate(base, metrics(even(), after, images="i1"))[1], "top-1")[5::2] == ["unpaired", "not separable"]


def test_intervals_of_another_confidence_are_the_same_evidence(gate, usual):
    def narrower(old: Metrics) -> Metrics:
        share = 1.6448536269514722 / Z
        return {**old, **{side: old["value"] + share * (old[side] - old["value"]) for side in ("low", "high")}}

    new = changed(changed(usual, "overall.delta_loss", scaled(1.12)), "plan.mark", lambda _: "p1")
    at_90 = changed(changed(new, "overall.delta_loss", narrower), "confidence", lambda _: 0.9)
    p = [float(row(gate(usual, other)[1], "DeltaLoss, overall")[6]) for other in (new, at_90)]
    assert p[0] == p[1]


def test_the_more_is_compared_the_more_evidence_is_asked_for(gate, usual):
    """A p of 0.005 is significant at 0.01; among 17 more comparisons that are the same it is not."""

    def shifted(old: Metrics) -> Metrics:
        shift = 2.576 * math.hypot(*[(old["high"] - old["low"]) / (2 * Z)] * 2)
        return {**old, **{name: old[name] + shift for name in ("value", "low", "high")}, "blocks": None}

    new = changed(usual, "top1", shifted)  # the base is what is better
    assert row(gate(new, usual)[1], "top-1")[6:] == [f"{18 * 0.005:.2g}", "not separable"]
    assert gate(new, usual, GateParams(1.0, 10.0, 10.0, 10.0, 0.1))[0] == 1


def test_holm_adjusts_step_by_step():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.6, 0.7])) == pytest.approx([1, 1])
    assert len(holm(np.array([]))) == 0


@pytest.mark.parametrize("count", [0, 1, 2, 7, 12])
def test_sign_flips_are_all_counted(count):
    differences = np.random.default_rng(count).normal(size=count).round(1)
    sums = [np.dot(signs, differences) for signs in itertools.product((-1, 1), repeat=count)]
    assert sign_flip_p(differences) == np.mean(np.array(sums) >= differences.sum() - 1e-9)


def test_many_blocks_are_merged():
    assert sign_flip_p(np.ones(100)) == 0.5**25
    assert sign_flip_p(np.zeros(100)) == 1


def test_a_single_fault_is_no_evidence():
    assert sign_flip_p(np.eye(1, 32).ravel()) == 0.5


def test_from_zero_significance_alone_decides(gate, usual):
    base = changed(usual, "overall.sdc", lambda _: {"value": 0.0, "low": 0.0, "high": 0.002, "n": 12288})
    for share, verdict in ((0.01, "worse"), (0.0005, "not separable")):
        interval = {"value": share, "low": 0.7 * share, "high": 1.4 * share + 0.002, "n": 12288}
        worse, report = gate(base, changed(usual, "overall.sdc", lambda _, interval=interval: interval))
        assert row(report, "SDC, overall")[4:6] == ["", "unpaired"]
        assert (worse, row(report, "SDC, overall")[-1]) == (int(verdict == "worse"), verdict)
    zero = changed(usual, "last_layer.delta_loss", lambda _: exact(0.0))
    assert row(gate(zero, zero)[1], "DeltaLoss, last layer")[-1] == "same"
    assert row(gate(zero, usual)[1], "DeltaLoss, last layer")[-1] == "worse"


NOTHING = {"value": None, "low": None, "high": None, "n": 0}
INCOMPARABLE = {
    "top1": ("top1", NOTHING, "top-1"),
    "sdc": ("overall.sdc", NOTHING, "SDC, overall"),
    "last layer": ("last_layer.delta_loss", NOTHING, "DeltaLoss, last layer"),
    "layer": ("layers.3.delta_loss", NOTHING, "DeltaLoss, conv3"),
    "no interval": ("layers.3.delta_loss", {"value": 1.0, "low": None, "high": None, "n": 1}, "DeltaLoss, conv3"),
    "NaN": ("layers.3.delta_loss", {"value": math.nan, "low": math.inf, "high": 1.0, "n": 1}, "DeltaLoss, conv3"),
    "no width": ("last_layer.delta_loss", {"value": 1.0, "low": 2.0, "high": 2.0, "n": 1}, "DeltaLoss, last layer"),
    "improvement": ("improvement.overall", NOTHING, "improvement, overall"),
    "no improvement at all": ("improvement.overall", {"value": 0, "low": 0, "high": 1, "n": 9}, "improvement, overall"),
    "no baseline": ("improvement", None, "improvement"),
    "another baseline": ("improvement.baseline", "c", "improvement"),
}


@pytest.mark.parametrize(("place", "value", "quantity"), INCOMPARABLE.values(), ids=INCOMPARABLE)
def test_what_cannot_be_compared_is_said(gate, usual, place, value, quantity):
    other = changed(usual, place, lambda _: value)
    for base, new in ((usual, other), (other, usual)):
        worse, report = gate(base, new)
        assert worse == 0
        assert row(report, quantity)[-1] == "not comparable"
        assert "1 not comparable" in report.splitlines()[-1]


def test_blocks_with_nulls_are_left_to_the_intervals(gate, usual):
    other = changed(usual, "overall.delta_loss.blocks", lambda blocks: [None, *blocks[1:]])
    assert row(gate(usual, other)[1], "DeltaLoss, overall")[5] == "unpaired"


def test_a_baseline_has_no_improvement(gate, usual):
    baseline = changed(usual, "improvement", lambda _: None)
    worse, report = gate(baseline, baseline)
    assert worse == 0
    assert "improvement" not in report


def test_layers_that_one_side_lacks_are_listed(gate, usual):
    without = changed(usual, "layers", lambda layers: layers[:-2])
    for base, new, note in ((usual, without, "gone"), (without, usual, "new")):
        worse, report = gate(base, new)
        assert worse == 0
        assert row(report, "DeltaLoss, conv10")[-1] == row(report, "DeltaLoss, conv11")[-1] == note
        assert row(report, "DeltaLoss, other layers")[-1] == "10 same"


def test_folders_are_matched_by_file_name(gate, usual):
    bad = changed(usual, "last_layer.delta_loss", scaled(2))
    twin = changed(usual, "run", lambda _: "twin")
    only = {name: changed(usual, "run", lambda _, name=name: name) for name in ("old", "young")}
    base = {"a.json": usual, "b.json": twin, "old.json": only["old"], "summary.json": {"x": 1}, "list.json": ["run"]}
    worse, report = gate(base, {"a.json": bad, "b.json": twin, "young.json": only["young"]})
    assert worse == 1
    assert "36 comparisons" in report
    assert "| old | all |  |  |  |  |  | gone |" in report
    assert "| young | all |  |  |  |  |  | new |" in report
    assert "| twin | DeltaLoss, other layers |  |  |  |  |  | 12 same |" in report


def test_folders_with_nothing_in_common_pass(gate, usual):
    worse, report = gate({"a.json": usual}, {"b.json": usual})
    assert worse == 0
    assert "0 comparisons" in report


def test_campaigns_with_other_seeds_pass_though_their_numbers_differ():
    rng = np.random.default_rng(0)
    beyond, failed = 0, 0
    for _ in range(100):
        base, new = ({"": as_run(metrics(skewed(rng), right(), plan=str(rng.integers(2**60))))} for _ in range(2))
        comparisons = compare_all(base, new, TOLERANCES)
        beyond += any(c.worse_by > c.allowed for c in comparisons)
        failed += judge(comparisons, TOLERANCES.significance)[1] > 0
    assert beyond == 100
    assert failed <= 1


def test_models_that_differ_by_chance_pass_under_a_shared_plan():
    """Two models of equal resilience, with what a fault does to them alike but not the same."""
    rng = np.random.default_rng(1)
    failed = 0
    for _ in range(10):
        common = skewed(rng)
        base, new = ({"": as_run(metrics(common * rng.lognormal(sigma=1, size=common.shape), right()))} for _ in range(2))
        failed += judge(compare_all(base, new, TOLERANCES), TOLERANCES.significance)[1] > 0
    assert failed == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_layer_that_suffers_twice_as_much_fails(gate, seed):
    losses = skewed(np.random.default_rng(seed))
    doubled = losses.copy()
    doubled[4] *= 2
    worse, report = gate(metrics(losses, right()), metrics(doubled, right()))
    assert worse >= 1
    assert row(report, "DeltaLoss, conv4")[-1] == "worse"


def as_run(content: Metrics) -> Any:
    return TypeAdapter(Run).validate_json(json.dumps(content))


# Real campaigns on a trained network, through the files that the stages write

INJECTED = 2048  # per layer; of 512 into conv1, a doubled range changes 13: too few to judge by


class Campaigns:
    """Campaigns on one network, each as the stages `inject`, `evaluate` and `results` leave it in the current folder."""

    def __init__(self, network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.loader = loader_of(images, labels, 200)
        self.engine = ReplayEngine(network, images[0], 256)
        self.chances = image_chances(self.engine, self.loader)
        ranges = profile_ranges(network, self.loader)
        self.limits = dict(zip(ranges["layer"], ranges["max_abs"], strict=True))
        with torch.no_grad():
            logits = network(images)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        columns = {"label": labels, "prediction": logits.argmax(dim=1), "loss": loss, "top2diff": top2diff(logits)}
        self.predictions = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
        self.runs: dict[str, RunParams] = {}

    def add(self, name: str, seed: int, widened: str = "") -> None:
        """Inject by the plan of a seed: faults into each layer but the last, which is exact; one layer's range doubled."""
        *sites, last = self.engine.sites
        limits = {layer: limit * (1 + (layer == widened)) for layer, limit in self.limits.items()}
        plan = draw_plan(sites, self.chances, INJECTED, seed)
        records = run_campaign(self.engine, self.loader, plan, limits, image_batch=200)
        eligible = np.flatnonzero(self.chances).tolist()
        totals = enumerate_layer(self.engine, self.loader, eligible, last, limits[last.layer])
        out, records_out = Path("metrics/runs") / name, Path("metrics/records") / name
        write_parquet(records_out / "injections.parquet", records)
        write_parquet(records_out / "detectors.parquet", records.iloc[:0].assign(detector=""))
        write_parquet(records_out / "predictions.parquet", self.predictions)
        write_json(out / "evaluation.json", {"parameters": 1, "multiply_adds": 1, "scale": 1.0})
        ranges = pd.DataFrame({"layer": list(limits), "max_abs": limits.values(), "mean_abs": 0.0, "images": 1})
        write_csv(out / "ranges.csv", ranges)
        layers = [{key: getattr(site, key) for key in ("layer", "kind", "neurons", "multiply_adds")} for site in (*sites, last)]
        campaign = {"layers": layers, "bits": 32, "strata": 0, "eligible_images": len(eligible), "detectors": ["profiled"]}
        settings = dict.fromkeys(PLAN_KEYS, "the same") | {"seed": seed, "detector": "profiled"}
        known = {"exact": {"profiled": [totals.as_json()]}, "skipped": {}, "settings": settings}
        write_json(out / "campaign.json", campaign | known)
        self.runs[name] = RunParams("digits", "network", "baseline", "plain", 0, "x", None)

    def judge(self, base: str, new: str) -> tuple[str, int]:
        """What the gate says."""
        runs = (read_runs(RESULTS_DIR / f"{name}.json") for name in (base, new))
        return judge(compare_all(*runs, TOLERANCES), TOLERANCES.significance)


def test_real_campaigns_differ_by_their_seeds_and_pass_and_a_doubled_range_fails(network, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    campaigns = Campaigns(network, *data)
    for seed in range(101):
        campaigns.add(f"seed-{seed}", seed)
    for layer in campaigns.limits:
        campaigns.add(layer, 0, widened=layer)
    write_results(campaigns.runs, StatisticsParams(0.99, 200, "goldeneye", "neurons", 2e-5, "neurons"))

    pairs = [campaigns.judge(f"seed-{seed}", f"seed-{seed + 1}") for seed in range(100)]
    assert all("unpaired" in row(report, "DeltaLoss, overall") for report, _ in pairs)
    assert sum(worse > 0 for _, worse in pairs) <= 1
    for layer in campaigns.limits:
        report, worse = campaigns.judge("seed-0", layer)
        assert worse > 0, report
        assert row(report, f"DeltaLoss, {layer}")[-1] == "worse"
        report, worse = campaigns.judge(layer, "seed-0")
        assert worse == 0, report


# The command line


@pytest.fixture
def folder(tmp_path: Path, usual: Metrics) -> Path:
    """A folder with two runs' files, good.json and bad.json, and parameters of which only the gate's are sound."""
    (tmp_path / "good.json").write_text(json.dumps(usual))
    (tmp_path / "bad.json").write_text(json.dumps(changed(usual, "layers.2.delta_loss", scaled(2))))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"gate": asdict(TOLERANCES), "inject": "later"}))
    return tmp_path


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "textguard.report.gate", *arguments], folder, check=False, PYTHONPATH=str(REPOSITORY))


def test_the_command_prints_the_table_and_its_exit_code_is_the_verdict(folder):
    done = start(folder, "good.json", "good.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("**PASS")
    done = start(folder, "good.json", "bad.json")
    assert (done.returncode, done.stderr) == (1, "")
    assert row(done.stdout, "DeltaLoss, conv2")[-1] == "worse"
    assert done.stdout.splitlines()[-1].startswith("**FAIL")


BAD_FILES = {
    "missing": (None, ["x.json is missing"]),
    "truncated": ('{"run": "a", ', ["x.json", "Invalid JSON"]),
    "empty": ("", ["x.json", "Invalid JSON"]),
    "not text": (b"\xff\xfe\x00", ["x.json", "Invalid JSON"]),
    "no run": ('{"x": 1}', ["x.json holds no run's metrics", "run: Field required"]),
    "a list": ("[]", ["x.json holds no run's metrics"]),
    "text for a number": (("top1.value", "high"), ["x.json", "top1.value", "valid number"]),
    "missing interval": (("top1", {"value": 1.0}), ["x.json", "top1.low: Field required"]),
    "confidence": (("confidence", 99), ["x.json", "confidence", "less than 1"]),
    "a layer": (("layers.3.delta_loss", 0.5), ["x.json", "layers.3.delta_loss"]),
}


@pytest.mark.parametrize(("content", "parts"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_line(folder, usual, content, parts, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    if isinstance(content, tuple):
        content = json.dumps(changed(usual, content[0], lambda _: content[1]))
    if content is not None:
        Path("x.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    for arguments in (["good.json", "x.json"], ["x.json", "good.json"]):
        one_line(main(arguments), capsys, "InvalidArtifact", *parts)


def one_line(code: int, capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    printed = capsys.readouterr()
    assert (code, printed.out, len(printed.err.splitlines())) == (2, "", 1), printed
    assert not [part for part in parts if part not in printed.err], printed.err


def test_bad_folders_are_one_line(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    Path("empty").mkdir()
    one_line(main(["empty", "empty"]), capsys, "InvalidArtifact: empty holds no run's metrics (*.json)")
    Path("mixed").mkdir()
    shutil.copy("good.json", "mixed")
    one_line(main(["mixed", "good.json"]), capsys, "mixed and good.json must be two files or two folders")
    Path("mixed/half.json").write_text("{")
    one_line(main(["mixed", "mixed"]), capsys, "mixed/half.json cannot be read")


BAD_COMMANDS = {
    "one file": (["good.json"], ["required: NEW", "usage: python -m textguard.report.gate"]),
    "unknown option": (["good.json", "good.json", "--alpha", "1"], ["--alpha"]),
    "no parameters": (["good.json", "good.json", "--params", "p.yaml"], ["p.yaml does not exist"]),
}


@pytest.mark.parametrize(("arguments", "parts"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_a_bad_command_is_one_line(folder, arguments, parts, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    one_line(main(arguments), capsys, "InvalidParameter", *parts)


def test_a_process_of_its_own_prints_the_line_and_nothing_else(folder):
    for arguments in (["good.json", "x.json"], []):
        done = start(folder, *arguments)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done


BAD_PARAMETERS = {
    "no section": ({"inject": {}}, ["'gate' is missing"]),
    "an empty file": (None, ["'gate' is missing"]),
    "missing": ({"gate": {"top1_points": 1}}, ["'gate.delta_loss_percent' is missing"]),
    "unknown": ({"gate": asdict(TOLERANCES) | {"alpha": 1}}, ["unknown key 'gate.alpha'", "known: delta_loss_percent"]),
    "text": ({"gate": asdict(TOLERANCES) | {"sdc_percent": "ten"}}, ['gate.sdc_percent is "ten"', "valid number"]),
    "negative": ({"gate": asdict(TOLERANCES) | {"top1_points": -1}}, ["gate.top1_points", "greater than or equal to 0"]),
    "all of it": ({"gate": asdict(TOLERANCES) | {"improvement_percent": 100}}, ["gate.improvement_percent", "less than 100"]),
    "no evidence": ({"gate": asdict(TOLERANCES) | {"significance": 1.0}}, ["gate.significance", "less than 1"]),
    "no numbers": ({"gate": []}, ["gate is []"]),
}


@pytest.mark.parametrize(("content", "parts"), BAD_PARAMETERS.values(), ids=BAD_PARAMETERS)
def test_bad_tolerances_are_one_line(folder, content, parts, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    Path("params.yaml").write_text(yaml.safe_dump(content))
    one_line(main(["good.json", "good.json"]), capsys, "InvalidParameter", "params.yaml", *parts)


def test_the_grids_have_the_same_tolerances():
    assert load_gate_params(REPOSITORY / "params.yaml") == TOLERANCES
    assert load_gate_params(REPOSITORY / "grids" / "smoke" / "params.yaml") == TOLERANCES


# Between revisions, and in CI


@pytest.fixture(scope="module")
def make_repository(make_checkout: Callable[[], Path]) -> Callable[[], Path]:
    """Checkouts in which make finds nothing to install."""

    def make() -> Path:
        folder = make_checkout()
        for name in ("Makefile", "pyproject.toml", "requirements.lock"):
            shutil.copy(REPOSITORY / name, folder / name)
        shutil.copytree(REPOSITORY / ".github", folder / ".github")
        (folder / ".venv").mkdir()
        (folder / ".venv" / ".ready").touch()
        return folder

    return make


@pytest.fixture(scope="module")
def revisions(make_repository: Callable[[], Path], usual: Metrics) -> Path:
    """A repository with one commit without results, one with them, and a working tree with a run that got worse."""
    folder = make_repository()
    commit(folder)
    put(folder, usual, 0.5)
    commit(folder)
    put(folder, changed(usual, "layers.2.delta_loss", scaled(2)), 0.7)
    return folder


def commit(folder: Path) -> None:
    run(["git", "add", "--all"], folder)
    run(["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "--message", "step"], folder)


def head(folder: Path) -> str:
    return run(["git", "rev-parse", "HEAD"], folder).stdout.strip()


def put(folder: Path, content: Metrics, delta_loss: float) -> None:
    results = folder / "metrics" / "results"
    results.mkdir(parents=True, exist_ok=True)
    (results / "a.json").write_text(json.dumps(content))
    (folder / "metrics" / "summary.json").write_text(json.dumps({"a": {"delta_loss": delta_loss}}))


@pytest.mark.parametrize("arguments", [[], ["BASE=HEAD"]])
def test_make_gate_compares_with_a_revision(revisions, arguments):
    done = run(["make", "gate", *arguments], revisions, check=False)
    assert done.returncode == 2  # as make says that something failed
    assert row(done.stdout, "DeltaLoss, conv2")[-1] == "worse"
    assert "Error 1" in done.stderr


@pytest.mark.parametrize("base", ["HEAD~1", "no-such-branch"])
def test_make_gate_names_a_revision_without_results(revisions, base):
    done = run(["make", "gate", f"BASE={base}"], revisions, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    line, _ = done.stderr.splitlines()
    assert line == f"{base} holds no metrics/results; name a revision that does: make gate BASE=origin/main"


def ci() -> Any:
    return yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())


def test_what_ci_posts_compares_two_runs_on_one_machine(make_repository, usual, tmp_path):
    """The scripts of job `demo`, with a demo of one file: what this machine makes of code.json."""
    folder = make_repository()
    scripts = {step["name"]: step["run"] for step in ci()["jobs"]["demo"]["steps"] if "run" in step}
    make = tmp_path / "make"
    make.write_text(f"""#!/bin/sh
test "$1" = repro || exec {shutil.which("make")} "$@"
mkdir -p plots metrics/results && cp code.json metrics/results/a.json
test -e results-of-the-base || cp summary.json metrics/summary.json
touch results-of-the-base dvc.lock plots/plot.png
""")
    make.chmod(0o755)
    worse = changed(usual, "layers.2.delta_loss", scaled(2))
    (folder / ".gitignore").open("a").write("/results-of-the-base\n")
    put(folder, worse, 0.1)  # by another machine
    (folder / "summary.json").write_text(json.dumps({"a": {"delta_loss": 0.5}}))
    for content in (usual, worse):
        (folder / "code.json").write_text(json.dumps(content))
        commit(folder)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GITHUB_ENV": str(tmp_path / "env"), "GITHUB_SHA": head(folder)}
    for name, code in (("Demo of the base", 0), ("Demo of this revision", 0), ("Compare the two", 2)):
        done = run(["bash", "-eo", "pipefail", "-c", scripts[name]], folder, check=False, **environment)
        assert done.returncode == code, done
        environment["BASE"] = (tmp_path / "env").read_text().strip().removeprefix("BASE=")
    assert head(folder) == environment["GITHUB_SHA"]
    report = (folder / "report.md").read_text()
    assert "a.delta_loss" not in report  # which the other machine's would differ by
    assert row(report, "DeltaLoss, conv2")[-1] == "worse"
    assert report.splitlines()[-1].startswith("**FAIL: 1 worse")


def test_ci_shows_what_changed_and_takes_a_base_without_results(revisions):
    done = run([".github/compare.sh", "HEAD"], revisions, check=False)
    assert done.returncode == 2
    assert row(done.stdout, "a.delta_loss")[2:4] == ["0.5", "0.7"]
    done = run([".github/compare.sh", "HEAD~1"], revisions)
    assert "nothing to compare" in done.stdout


def test_the_workflow_can_be_read_and_its_scripts_are_bash():
    workflow = ci()
    assert set(workflow[True]) == {"pull_request", "push"}  # YAML takes `on` for true
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    for step in steps:
        assert ("uses" in step) != ("run" in step)
        assert "uses" not in step or step["uses"].rpartition("@v")[2].isdecimal(), step
        assert "${{" not in step.get("run", ""), "pass it through env: what a branch is called must not become a command"
        run(["bash", "-n", "-c", step.get("run", "")], REPOSITORY)
    scripts = [step.get("run", "") for step in steps]
    for script in (".ci/run", ".github/compare.sh"):
        assert any(script in step for step in scripts)
        assert (REPOSITORY / script).stat().st_mode & 0o111
    assert scripts.index('.github/compare.sh "$BASE" > report.md') < len(scripts) - 1
    assert "cml comment create" in scripts[-1]
    assert steps[-1]["if"].startswith("${{ !cancelled()")
