"""Comparisons of runs: what is worse is found, what may be chance is not; on made-up runs and on real campaigns."""

import itertools
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_ind

from gate_runs import (
    IMAGES,
    INJECTIONS,
    LAYERS,
    TOLERANCES,
    Metrics,
    as_run,
    changed,
    even,
    exact,
    metrics,
    report,
    right,
    row,
    scaled,
)
from stored_grid import INJECT, INPUTS, store_hardware
from textguard.analysis.files import RESULTS_DIR
from textguard.analysis.regression import QUANTITIES, Comparison, compare_all, compare_over_trainings, holm, sign_flip_p
from textguard.analysis.results import write_results
from textguard.artifacts import write_csv, write_json, write_parquet
from textguard.estimates.statistics import mean_estimate, rate_estimate
from textguard.faults.engines import ReplayEngine
from textguard.faults.exact import enumerate_layer
from textguard.faults.execution import run_campaign
from textguard.faults.plans import draw_plan
from textguard.faults.profiling import image_chances, loader_of, profile_ranges
from textguard.faults.task import top2diff
from textguard.params import GateParams, Run, StatisticsParams
from textguard.report.gate import read_runs
from textguard.schema.base import Measured


def skewed(rng: np.random.Generator, share: float = 0.1, variation: float = 20.0) -> np.ndarray:
    """DeltaLoss of a campaign: lognormal for a share of the faults, otherwise 0; the mean is 1."""
    sigma = math.sqrt(math.log((variation**2 + 1) * share))
    values = np.exp(sigma * rng.standard_normal((LAYERS, INJECTIONS)) - sigma**2 / 2) / share
    return np.where(rng.random((LAYERS, INJECTIONS)) < share, values, 0)


CASES = {
    "top1": ("top1", 0.95, "top-1", "paired"),
    "overall": ("overall.delta_loss", 1.2, "DeltaLoss, overall", "unpaired"),
    "sdc": ("overall.sdc", 1.2, "SDC, overall", "paired"),
    "last layer": ("last_layer.delta_loss", 1.2, "DeltaLoss, last layer", "exact"),
    "one layer": ("layers.7.delta_loss", 1.2, "DeltaLoss, conv7", "paired"),
    "SDC of the last layer": ("last_layer.sdc", 1.2, "SDC, last layer", "exact"),
    "mismatch": ("overall.mismatch", 1.2, "mismatch, overall", "paired"),
    "SDC of one layer": ("layers.7.sdc", 1.5, "SDC, conv7", "paired"),
}


@pytest.mark.parametrize(("place", "factor", "quantity", "tested"), CASES.values(), ids=CASES)
def test_each_number_alone_fails_when_it_is_worse_and_passes_when_it_is_better(gate, usual, place, factor, quantity, tested):
    worse, said = gate(usual, changed(usual, place, scaled(factor)))
    assert worse == 1
    assert row(said, quantity)[5:] == [tested, row(said, quantity)[6], "worse"]
    assert said.startswith("**FAIL: 1 of 35 comparisons is worse")
    worse, said = gate(changed(usual, place, scaled(factor)), usual)
    assert worse == 0
    assert row(said, quantity)[-1] == "better"


@pytest.mark.parametrize(("place", "factor", "quantity"), [case[:3] for case in CASES.values()], ids=CASES)
def test_each_number_passes_within_its_tolerance(gate, usual, place, factor, quantity):
    within = 0.995 if quantity == "top-1" else 1.09
    worse, said = gate(usual, changed(usual, place, scaled(within)))
    assert worse == 0
    assert quantity.endswith("conv7") or row(said, quantity)[-1] == "within tolerance"


WIDER = {
    "top1": (0.92, {"top1_points": 8.0}),
    "overall.delta_loss": (1.2, {"delta_loss_percent": 25.0}),
    "overall.sdc": (1.2, {"sdc_percent": 25.0}),
    "overall.mismatch": (1.2, {"sdc_percent": 25.0}),
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
    worse, said = gate(base, new)
    assert worse == 0
    assert "not separable" in row(said, "other numbers of layers")[-1]


def test_pairs_show_what_independent_samples_hide(gate):
    rng = np.random.default_rng(0)
    losses = skewed(rng)
    faults_in_common = metrics(losses, right()), metrics(1.3 * losses, right())
    assert gate(*faults_in_common)[0] > 0
    apart = gate(faults_in_common[0], metrics(1.3 * losses, right(), plan="p1"))[1]
    assert row(apart, "DeltaLoss, overall")[5::2] == ["unpaired", "not separable"]
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


def test_intervals_are_no_evidence(gate, usual):
    """They hold what a sample may have missed: with them, four times the DeltaLoss in all layers would pass."""

    def wider(old: Metrics) -> Metrics:
        return {**old, "low": 0.0, "high": 100 * old["value"]}

    new = changed(changed(usual, "overall.delta_loss", scaled(1.12)), "plan.mark", lambda _: "p1")
    p = [row(gate(usual, other)[1], "DeltaLoss, overall")[6] for other in (new, changed(new, "overall.delta_loss", wider))]
    assert p[0] == p[1] != ""


@pytest.mark.parametrize("plan", ["p0", "p1"])
def test_a_layer_that_suffers_twice_as_much_from_other_faults_fails(gate, plan):
    """Pairs of unrelated faults tell little, and are not asked for: with another plan, it is found as well."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        base, new = (skewed(rng, share=0.6, variation=1.7) for _ in range(2))
        new[:4], new[5:] = base[:4], base[5:]
        new[4] *= 2
        assert row(gate(metrics(base, right()), metrics(new, right(), plan=plan))[1], "DeltaLoss, conv4")[5::2] == [
            "unpaired",
            "worse",
        ]


def test_all_layers_at_four_times_fail_under_another_plan(gate):
    rng = np.random.default_rng(0)
    base, new = metrics(skewed(rng, variation=5), right()), metrics(4 * skewed(rng, variation=5), right(), plan="p1")
    worse, said = gate(base, new)
    assert row(said, "DeltaLoss, overall")[5::2] == ["unpaired", "worse"]
    assert worse > 6


def test_layers_that_all_do_more_show_where_each_alone_does_not(gate):
    rng = np.random.default_rng(4)
    base, new = metrics(skewed(rng), right()), metrics(3 * skewed(rng), right(), plan="p1")
    worse, said = gate(base, new)
    assert row(said, "DeltaLoss, overall")[5::2] == ["unpaired", "not separable"]
    assert row(said, "DeltaLoss, all layers")[5::2] == ["layers", "worse"]
    assert worse >= 1
    for side in (base, new):
        side["settings"]["images"] = "shared"
    assert "all layers" not in gate(base, new)[1]  # which one image can make worse together


@pytest.mark.parametrize(("count", "verdict"), [(1024, "worse"), (4, "not separable")])
def test_samples_without_spread_prove_as_much_as_their_size(gate, usual, count, verdict):
    """Each fault of the one, none of the other: their own errors are 0."""
    none, each = ({"value": value, "low": 0.0, "high": 1.0, "n": count, "error": 0.0} for value in (0.0, 1.0))
    base, new = (changed(usual, "layers.3.sdc", lambda _, value=value: value) for value in (none, each))
    said = gate(base, changed(new, "plan.mark", lambda _: "p1"))[1]
    if verdict == "worse":
        assert row(said, "SDC, conv3")[5::2] == ["unpaired", "worse"]
    else:
        assert "SDC, conv3" not in said


def test_what_fp32_rounds_away_is_no_change(gate, usual):
    base, new = (changed(usual, "last_layer.delta_loss", lambda _, value=value: exact(value)) for value in (1e-8, 5e-7))
    assert row(gate(base, new)[1], "DeltaLoss, last layer")[-1] == "within tolerance"


def test_a_ratio_is_shown_and_never_judged(gate, usual):
    """A better baseline makes it smaller."""
    worse, said = gate(usual, changed(usual, "improvement.delta_loss.overall", scaled(0.1)))
    assert worse == 0
    assert row(said, "improvement of DeltaLoss, overall")[4:] == ["-90.0 %", "", "", "not judged"]
    worse, said = gate(usual, changed(usual, "improvement", lambda _: None))
    assert worse == 0
    assert row(said, "improvement of DeltaLoss, overall")[-1] == "not judged"


def over_trainings(base: list[float], new: list[float], error: float = 0.0) -> Comparison:
    quantity = next(quantity for quantity in QUANTITIES if quantity.name == "DeltaLoss, overall")
    sides = [[Measured(value, value, value, 9, error * value) for value in side] for side in (base, new)]
    return compare_over_trainings("cell", quantity, *sides, TOLERANCES)


def test_trainings_are_compared_by_welch_on_the_logarithms():
    rng = np.random.default_rng(0)
    base, new = np.exp(rng.normal(size=4)), np.exp(1 + 0.1 * rng.normal(size=3))
    found = over_trainings(base.tolist(), new.tolist())
    expected = ttest_ind(np.log(new), np.log(base), equal_var=False, alternative="greater")
    assert found.worse_by == pytest.approx(np.log(new).mean() - np.log(base).mean())
    assert found.p == pytest.approx(min(expected.pvalue, 1 - expected.pvalue))
    assert (found.base.value, found.new.value) == pytest.approx((np.exp(np.log(base).mean()), np.exp(np.log(new).mean())))


def test_trainings_that_happen_to_be_close_are_as_uncertain_as_their_samples():
    near, sampled = (over_trainings([1.0, 1.0001], [1.3, 1.3001], error) for error in (0.0, 0.2))
    assert near.p < 1e-5
    assert sampled.p > 0.05


def test_a_training_without_any_harm_has_no_logarithm():
    assert math.isnan(over_trainings([0.0, 1.0], [1.0, 2.0]).p)
    assert math.isnan(over_trainings([1.0, 1.0], [2.0, 2.0]).p)  # nothing tells their spread


def test_the_more_is_compared_the_more_evidence_is_asked_for(gate, usual):
    """A p of 0.005 is significant at 0.01; among 31 more comparisons that are the same it is not."""

    def shifted(old: Metrics) -> Metrics:
        shift = 2.576 * math.sqrt(2) * old["error"]
        return {**old, **{name: old[name] + shift for name in ("value", "low", "high")}, "blocks": None}

    new = changed(usual, "top1", shifted)  # the base is what is better
    assert row(gate(new, usual)[1], "top-1")[6:] == [f"{35 * 0.005:.2g}", "not separable"]
    assert gate(new, usual, GateParams(1.0, 10.0, 10.0, 0.2))[0] == 1


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
    base = changed(usual, "overall.sdc", lambda _: {"value": 0.0, "low": 0.0, "high": 0.002, "n": 12288, "error": 0.0})
    for share, verdict in ((0.01, "worse"), (0.0005, "not separable")):
        interval = {"value": share, "low": 0.7 * share, "high": 1.4 * share + 0.002, "n": 12288, "error": 0.0003}
        worse, said = gate(base, changed(usual, "overall.sdc", lambda _, interval=interval: interval))
        assert row(said, "SDC, overall")[4:6] == ["", "unpaired"]
        assert (worse, row(said, "SDC, overall")[-1]) == (int(verdict == "worse"), verdict)
    zero = changed(usual, "last_layer.delta_loss", lambda _: exact(0.0))
    assert row(gate(zero, zero)[1], "DeltaLoss, last layer")[-1] == "same"
    assert row(gate(zero, usual)[1], "DeltaLoss, last layer")[-1] == "worse"


NOTHING = {"value": None, "low": None, "high": None, "n": 0}
INCOMPARABLE = {
    "top1": ("top1", NOTHING, "top-1"),
    "sdc": ("overall.sdc", NOTHING, "SDC, overall"),
    "last layer": ("last_layer.delta_loss", NOTHING, "DeltaLoss, last layer"),
    "layer": ("layers.3.delta_loss", NOTHING, "DeltaLoss, conv3"),
    "no error": ("layers.3.delta_loss", {"value": 1.5, "low": 1.0, "high": 2.0, "n": 1}, "DeltaLoss, conv3"),
}


@pytest.mark.parametrize(("place", "value", "quantity"), INCOMPARABLE.values(), ids=INCOMPARABLE)
def test_what_cannot_be_compared_is_said(gate, usual, place, value, quantity):
    other = changed(usual, place, lambda _: value)
    for base, new in ((usual, other), (other, usual)):
        worse, said = gate(base, new)
        assert worse == 0
        assert row(said, quantity)[-1] == "not comparable"
        assert "1 not comparable" in said.splitlines()[0]


def test_blocks_with_nulls_are_left_to_the_intervals(gate, usual):
    other = changed(usual, "overall.delta_loss.blocks", lambda blocks: [None, *blocks[1:]])
    assert row(gate(usual, other)[1], "DeltaLoss, overall")[5] == "unpaired"


def test_campaigns_with_other_seeds_pass_though_their_numbers_differ():
    rng = np.random.default_rng(0)
    beyond, failed = 0, 0
    for _ in range(100):
        base, new = ({"": as_run(metrics(skewed(rng), right(), plan=str(rng.integers(2**60))))} for _ in range(2))
        comparisons = compare_all(base, new, TOLERANCES)
        beyond += any(c.worse_by > c.allowed for c in comparisons)
        failed += report(comparisons)[0] > 0
    assert beyond == 100
    assert failed <= 1


def test_models_that_differ_by_chance_pass_under_a_shared_plan():
    """Two models of equal resilience, with what a fault does to them alike but not the same."""
    rng = np.random.default_rng(1)
    failed = 0
    for _ in range(10):
        common = skewed(rng)
        base, new = ({"": as_run(metrics(common * rng.lognormal(sigma=1, size=common.shape), right()))} for _ in range(2))
        failed += report(compare_all(base, new, TOLERANCES))[0] > 0
    assert failed == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_layer_that_suffers_twice_as_much_fails(gate, seed):
    losses = skewed(np.random.default_rng(seed))
    doubled = losses.copy()
    doubled[4] *= 2
    worse, said = gate(metrics(losses, right()), metrics(doubled, right()))
    assert worse >= 1
    assert row(said, "DeltaLoss, conv4")[-1] == "worse"


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
        columns = {
            "image": torch.arange(len(labels)),
            "label": labels,
            "prediction": logits.argmax(dim=1),
            "loss": loss,
            "top2diff": top2diff(logits),
        }
        self.predictions = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
        self.run = Run("digits", "network", "baseline", 0)

    def add(self, name: str, seed: int, widened: str = "") -> None:
        """Inject by the plan of a seed: faults into each layer but the last, which is exact; one layer's range doubled."""
        inject = replace(INJECT, seed=seed, injections_per_layer=INJECTED, compare_detectors=[])
        *sites, last = self.engine.sites
        limits = {layer: limit * (1 + (layer == widened)) for layer, limit in self.limits.items()}
        plan = draw_plan(sites, self.chances, INJECTED, seed)
        records = run_campaign(self.engine, self.loader, plan, limits, image_batch=200)
        eligible = np.flatnonzero(self.chances).tolist()
        totals = enumerate_layer(self.engine, self.loader, eligible, last, limits[last.layer])
        out, records_out = Path("metrics/runs") / name, Path("metrics/records") / name
        write_parquet(records_out / "injections.parquet", records, {"inputs": INPUTS})
        write_parquet(records_out / "detectors.parquet", records.iloc[:0].assign(detector=""), {"inputs": INPUTS})
        write_parquet(records_out / "predictions.parquet", self.predictions)
        found, hits = self.predictions, self.predictions["label"] == self.predictions["prediction"]
        measured = {name: mean_estimate(found[name].to_numpy(float)).as_json() for name in ("loss", "top2diff")}
        measured |= {"top1": rate_estimate(int(hits.sum()), len(hits)).as_json()}
        measured |= {"parameters": 1, "multiply_adds": 1, "scale": 1.0, "weights": "w0"}
        write_json(out / "evaluation.json", measured | {"seed": 0, "device": "cpu"})
        ranges = pd.DataFrame({"layer": list(limits), "kind": "Conv2d", "neurons": 1, "max_abs": limits.values()})
        ranges = ranges.assign(mean_abs=0.0, images=1)
        write_csv(out / "ranges.csv", ranges)
        layers = [{key: getattr(site, key) for key in ("layer", "kind", "neurons", "multiply_adds")} for site in (*sites, last)]
        campaign = {"layers": layers, "bits": 32, "strata": 0, "eligible_images": len(eligible), "detectors": ["profiled"]}
        settings = {**asdict(inject), "inputs": INPUTS, "device": "cpu"}
        known = {"exact": {"profiled": [totals.as_json()]}, "skipped": {}, "settings": settings}
        write_json(out / "campaign.json", campaign | known)
        store_hardware(name)
        write_results({name: self.run}, StatisticsParams(0.99, 200, "goldeneye", "neurons", 2e-5, "neurons"), inject)

    def judge(self, base: str, new: str) -> tuple[int, str]:
        """How many numbers are worse, and what the gate prints."""
        return report(compare_all(*(read_runs(RESULTS_DIR / f"{name}.json") for name in (base, new)), TOLERANCES))


def test_real_campaigns_differ_by_their_seeds_and_pass_and_a_doubled_range_fails(network, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    campaigns = Campaigns(network, *data)
    for seed in range(101):
        campaigns.add(f"seed-{seed}", seed)
    for layer in campaigns.limits:
        campaigns.add(layer, 0, widened=layer)

    pairs = [campaigns.judge(f"seed-{seed}", f"seed-{seed + 1}") for seed in range(100)]
    assert all("unpaired" in row(said, "DeltaLoss, overall") for _, said in pairs)
    assert sum(worse > 0 for worse, _ in pairs) <= 1
    for layer in campaigns.limits:
        worse, said = campaigns.judge("seed-0", layer)
        assert worse > 0, said
        assert row(said, f"DeltaLoss, {layer}")[-1] == "worse"
        worse, said = campaigns.judge(layer, "seed-0")
        assert worse == 0, said
