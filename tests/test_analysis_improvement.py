"""Ratios of DeltaLoss and their intervals."""

import math
from dataclasses import replace

import numpy as np
import pytest

from textguard.analysis.improvement import Draws, across, draw_layers, improvement, verdict, weigh
from textguard.estimates.statistics import Estimate, exact, sample_mean
from textguard.estimates.summary import LayerResult, rate_sample
from textguard.schema.results import NO_VERDICT, ONE_TRAINING


def layer_result(values: np.ndarray | float, shared: bool = False) -> LayerResult:
    if isinstance(values, float):
        mean, shares, strata = exact(values, 100), np.zeros(0), {}
    else:
        mean, shares = sample_mean([values], [1.0], [2 * values.max()]), np.ones(1)
        strata = {name: [values] for name in ("delta_loss", "mismatch", "sdc", "broken")}
    return LayerResult("x", 1, "sampled", 100, 0, 0, 0, mean, mean, mean, mean, shares, strata, shared=shared)


def draw_pairs(*sides: list[LayerResult], resamples: int, seed: int) -> list[list[Draws]]:
    return [draw_layers({"d": layers}, resamples, seed)["d"]["delta_loss"] for layers in sides]


def test_shared_injections_narrow_an_improvement():
    draw = np.random.default_rng(0)
    base = draw.exponential(1.0, 2000)
    widths = []
    for other in (base * 0.5 + draw.exponential(0.01, 2000), draw.permutation(base) * 0.5 + draw.exponential(0.01, 2000)):
        pairs = draw_pairs([layer_result(base)], [layer_result(other)], resamples=500, seed=1)
        found = improvement(pairs[0][0], pairs[1][0], 0.99)
        assert found.low < 2 < found.high
        widths.append(math.log(found.high / found.low))
    assert widths[0] < widths[1] / 2


def test_exact_layers_give_exact_improvements():
    pairs = draw_pairs([layer_result(3.0), layer_result(1.0)], [layer_result(1.0), layer_result(0.5)], resamples=200, seed=1)
    found = improvement(weigh(pairs[0], [1, 1]), weigh(pairs[1], [1, 1]), 0.99)
    assert found == Estimate(pytest.approx(4 / 1.5), pytest.approx(4 / 1.5), pytest.approx(4 / 1.5), 200)
    assert [verdict(found, 0.99, trainings) for trainings in (1, 3)] == [ONE_TRAINING, "better"]
    nothing = improvement(pairs[0][0], draw_pairs([layer_result(0.0)], resamples=200, seed=1)[0][0], 0.99)
    assert math.isnan(nothing.value)
    assert verdict(nothing, 0.99, 3) == NO_VERDICT


def test_several_trainings_widen_an_improvement():
    draw = np.random.default_rng(0)
    found = []
    for factor in (2.0, 4.0, 8.0):
        base, guided = draw.exponential(factor, 3000), draw.exponential(1.0, 3000)
        pairs = draw_pairs([layer_result(base)], [layer_result(guided)], resamples=300, seed=1)
        found.append(improvement(pairs[0][0], pairs[1][0], 0.99))
    assert across(found[:1], 0.99) == found[0]
    together = across(found, 0.99)
    assert together.value == pytest.approx(4.0, rel=0.1)
    assert together.low < 2
    assert together.high > 8
    assert verdict(together, 0.99, 3) == "not separable at 99%"


@pytest.mark.filterwarnings("error")
def test_resamples_without_harm_on_either_side_leave_an_interval_open_without_a_warning():
    harm = np.zeros(16)
    harm[0] = 1.0
    base, guided = draw_pairs([layer_result(harm)], [layer_result(0.5 * harm)], resamples=200, seed=0)
    found = improvement(base[0], guided[0], 0.99)
    assert found.value == 2
    assert (found.low, found.high) == (0, math.inf)


@pytest.mark.filterwarnings("error")
def test_sampled_layers_that_do_not_show_in_sixteen_digits_do_not_make_an_exact_improvement():
    sampled = layer_result(np.random.default_rng(0).exponential(1.0, 100))
    pairs = draw_pairs([layer_result(4e34), sampled], [layer_result(2e34), sampled], resamples=200, seed=1)
    found = improvement(weigh(pairs[0], [1, 1]), weigh(pairs[1], [1, 1]), 0.99)
    assert found.low < found.value < found.high
    assert (found.low, found.high) == pytest.approx((2.0, 2.0))
    # Layers that do not count leave it exact.
    alone = improvement(weigh(pairs[0], [1, 0]), weigh(pairs[1], [1, 0]), 0.99)
    assert alone.low == alone.value == alone.high == 2


def test_a_side_that_has_only_seen_rounding_leaves_the_improvement_open():
    draw = np.random.default_rng(0)
    noise, harm = np.abs(draw.normal(0, 1e-7, 64)), draw.exponential(1.0, 64)
    pairs = draw_pairs([layer_result(harm)], [replace(layer_result(noise), most=10.0)], resamples=200, seed=1)
    found = improvement(pairs[0][0], pairs[1][0], 0.99)
    assert found.value > 1e6
    assert found.low < 10


@pytest.mark.parametrize("hits", [0, 10])
def test_a_ratio_of_rates_allows_for_one_more_hit(hits):
    """Whose weight is that of the heaviest one; without any, what the interval of the rate takes it to be."""

    def layer(count: int) -> LayerResult:
        values = np.zeros(200)
        values[:count] = 0.5
        return replace(layer_result(values), sdc=rate_sample([values], [1.0], [np.full(200, 0.5)]))

    few, many = (draw_layers({"d": [layer(count)]}, 400, 0)["d"]["sdc"][0] for count in (hits, 30))
    assert few.unseen.mean() - few.plain.mean() == pytest.approx((0.5 if hits else 1.0) / 201, rel=0.3)
    found = improvement(many, few, 0.99)
    assert math.isnan(found.value) == (not hits)
    if hits:
        assert found.value == pytest.approx(3)
        assert 1 < found.low < 3 < found.high


def test_places_without_a_layer_have_no_ratio():
    (draws,) = draw_pairs([layer_result(3.0)], resamples=10, seed=0)
    assert math.isnan(improvement(weigh(draws, [0.0]), weigh(draws, [1.0]), 0.99).value)


def test_draws_of_one_classifier_do_not_depend_on_others():
    """Or a run's ratio would change with the grid that it is part of."""
    harm = np.random.default_rng(0).exponential(size=64)
    alone = draw_layers({"d": [layer_result(harm)]}, 50, 0)["d"]["delta_loss"][0]
    beside = draw_layers({"d": [layer_result(harm), layer_result(2 * harm)]}, 50, 0)["d"]["delta_loss"]
    assert np.array_equal(alone.plain, beside[0].plain)
    assert abs(np.corrcoef(beside[0].plain, beside[1].plain)[0, 1]) < 0.5  # layers are drawn apart, unless they share images
