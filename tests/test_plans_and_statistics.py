"""Fault plans, and the estimates from their records."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from textguard.errors import InvalidParameter
from textguard.faults.graph import Site
from textguard.faults.plans import PLAN_COLUMNS, draw_plan
from textguard.faults.statistics import (
    Estimate,
    difference,
    mean_estimate,
    rate_estimate,
    ratio,
    summarise_layer,
    weighted_mean,
)

SITES = [Site("a", "Conv2d", 0, (4, 5, 5)), Site("b", "Linear", 1, (10,))]


def test_a_plan_is_uniform_over_images_neurons_and_bits():
    plan = draw_plan(SITES, [3, 5, 8], 20_000, seed=0)
    assert list(plan.columns) == PLAN_COLUMNS
    assert plan.groupby("layer").size().to_dict() == {"a": 20_000, "b": 20_000}
    for layer, neurons in (("a", 100), ("b", 10)):
        faults = plan[plan["layer"] == layer]
        assert set(faults["image"]) == {3, 5, 8}
        for column, values in (("neuron", neurons), ("bit", 32), ("image", 9)):
            counts = np.bincount(faults[column], minlength=values)
            assert len(counts) == values
            assert stats.chisquare(counts[counts > 0]).pvalue > 1e-4
    a, b = (plan[plan["layer"] == layer] for layer in "ab")
    assert abs(np.corrcoef(a["bit"], b["bit"])[0, 1]) < 0.03
    assert abs(np.corrcoef(a["bit"], a["neuron"])[0, 1]) < 0.03


def test_a_fault_depends_on_seed_layer_and_index_alone():
    plan = draw_plan(SITES, range(7), 50, seed=1)
    pd.testing.assert_frame_equal(draw_plan(SITES, range(7), 50, seed=1), plan)
    longer = draw_plan(SITES, range(7), 80, seed=1)
    pd.testing.assert_frame_equal(longer[longer["index"] < 50].reset_index(drop=True), plan)
    alone = draw_plan(SITES[1:], range(7), 50, seed=1)
    pd.testing.assert_frame_equal(alone, plan[plan["layer"] == "b"].reset_index(drop=True))
    assert not draw_plan(SITES, range(7), 50, seed=2).equals(plan)


def test_a_plan_needs_injections_and_images():
    for count in (0, -3):
        with pytest.raises(InvalidParameter, match="at least 1"):
            draw_plan(SITES, [1], count, seed=0)
    with pytest.raises(InvalidParameter, match="no image is eligible"):
        draw_plan(SITES, [], 5, seed=0)


def test_a_mean_has_the_papers_interval():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    estimate = mean_estimate(values)
    half = 2.576 * math.sqrt(((values - 4) ** 2).sum() / 3) / 2
    assert estimate == Estimate(4.0, pytest.approx(4 - half), pytest.approx(4 + half), 4)
    assert mean_estimate(np.array([])).as_json() == {"value": None, "low": None, "high": None, "n": 0}


def test_a_rate_has_wilsons_interval():
    for hits, count in ((0, 50), (3, 50), (50, 50), (12, 4096)):
        expected = stats.binomtest(hits, count).proportion_ci(0.99, method="wilson")
        estimate = rate_estimate(hits, count)
        assert estimate.value == hits / count
        assert estimate.low == pytest.approx(expected.low, abs=2e-5)
        assert estimate.high == pytest.approx(expected.high, abs=2e-5)
    assert math.isnan(rate_estimate(0, 0).value)


def test_weighted_means_ratios_and_differences():
    a, b = Estimate(2.0, 1.0, 3.0, 10), Estimate(4.0, 2.0, 6.0, 20)
    assert weighted_mean([a, b], [3, 1]) == Estimate(2.5, 2.5 - math.hypot(0.75, 0.5), 2.5 + math.hypot(0.75, 0.5), 30)
    quotient = ratio(b, a)
    assert quotient.value == 2.0
    assert quotient.high == pytest.approx(2 * math.exp(math.hypot(0.5, 0.5)))
    assert quotient.low * quotient.high == pytest.approx(4.0)
    assert difference(b, a) == Estimate(2.0, 2.0 - math.hypot(1, 2), 2.0 + math.hypot(1, 2), 10)
    assert math.isnan(ratio(a, Estimate(0.0, 0.0, 0.0, 5)).value)


def test_intervals_cover_the_truth():
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(500):
        numerator, denominator = draw.normal(3, 1, 400), draw.normal(1, 0.5, 400)
        estimate = ratio(mean_estimate(numerator), mean_estimate(denominator))
        inside += estimate.low <= 3 <= estimate.high
    assert inside >= 485  # 99 % of 500 is 495


def test_a_layers_summary_leaves_non_finite_losses_out_and_counts_them():
    records = pd.DataFrame(
        {
            "layer": "fc",
            "golden_loss": [0.5, 0.5, 0.5, 0.5, 0.5],
            "faulty_loss": [0.5, 1.5, 0.0, math.nan, math.inf],
            "mismatch": [False, True, False, True, True],
            "detected": [False, True, True, False, False],
        }
    )
    result = summarise_layer(records, neurons=10)
    assert (result.injections, result.nonfinite, result.detected) == (5, 2, 2)
    assert result.delta_loss.value == pytest.approx(0.5)
    assert result.delta_loss.n == 3
    assert result.mismatch.value == pytest.approx(1 / 3)
