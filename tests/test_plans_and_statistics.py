"""Fault plans, and the estimates from their records."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from textguard.errors import CampaignMismatch, InvalidParameter
from textguard.faults.damage import SINGLE_FLIP, FaultModel
from textguard.faults.formats import FP32, parse_format
from textguard.faults.plans import PLAN_COLUMNS, check_plan, draw_plan
from textguard.faults.sites import Site
from textguard.faults.statistics import (
    Estimate,
    difference,
    mean_estimate,
    rate_estimate,
    ratio,
    summarise_layer,
    weighted_mean,
)

SITES = [Site("a", "Conv2d", 0, (4, 5, 5), weights=24), Site("b", "Linear", 1, (10,), weights=1000)]
MODELS = [
    SINGLE_FLIP,
    FaultModel(bits=3),
    FaultModel(values=4),
    FaultModel(bits=2, values=2),
    FaultModel("weight", "stuck_at_1", bits=2),
]


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


@pytest.mark.parametrize("fault_model", MODELS, ids=str)
def test_a_fault_depends_on_seed_layer_and_index_alone(fault_model):
    def draw(sites=SITES, count=50, seed=1):
        return draw_plan(sites, range(7), count, seed, fault_model)

    plan = draw()
    pd.testing.assert_frame_equal(draw(), plan)
    longer = draw(count=80)
    pd.testing.assert_frame_equal(longer[longer["index"] < 50].reset_index(drop=True), plan)
    alone = draw(SITES[1:])
    pd.testing.assert_frame_equal(alone, plan[plan["layer"] == "b"].reset_index(drop=True))
    assert not draw(seed=2)[["image", "neuron", "bit"]].equals(plan[["image", "neuron", "bit"]])


def test_corresponding_layers_of_two_models_get_corresponding_faults():
    renamed = [Site(f"backbone.{site.layer}", site.kind, site.position, site.shape, site.weights) for site in SITES]
    pd.testing.assert_frame_equal(
        draw_plan(renamed, range(7), 50, seed=1).drop(columns="layer"),
        draw_plan(SITES, range(7), 50, seed=1).drop(columns="layer"),
    )
    small, large = (
        draw_plan([Site("a", "Linear", 0, (size,))], range(7), 500, seed=1)["neuron"] / size for size in (100, 1000)
    )
    assert (small - large).abs().max() < 0.01 + 1e-9


def drawn(fault_model, count=4000, number_format=FP32, images=(3, 5, 8), sites=SITES):
    """The plan's rows by layer and injection: {layer: array [count, values, bits, (image, neuron, bit)]}."""
    plan = draw_plan(sites, images, count, 0, fault_model, number_format)
    shape = (count, fault_model.values, fault_model.bits, 3)
    assert (plan["index"].to_numpy().reshape(len(sites), *shape[:3]) == np.arange(count)[:, None, None]).all()
    return {
        site.layer: plan[plan["layer"] == site.layer][["image", "neuron", "bit"]].to_numpy().reshape(shape) for site in sites
    }


def is_uniform(values, size):
    counts = np.bincount(values.reshape(-1), minlength=size)
    return len(counts) == size and stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize(("bits", "values"), [(1, 1), (4, 1), (1, 5), (3, 2), (32, 1), (1, 10), (2, 9)])
def test_an_injection_damages_different_bits_of_different_neurons_of_one_image(bits, values):
    for layer, faults in drawn(FaultModel(bits=bits, values=values)).items():
        image, neuron, bit = np.moveaxis(faults, 3, 0)
        assert (image == image[:, :1, :1]).all()
        assert (neuron == neuron[:, :, :1]).all()
        assert all(len(set(row)) == values for row in neuron[:, :, 0])
        assert all(len(set(row)) == bits for row in bit.reshape(-1, bits))
        # Of the first neuron and the last, and of each bit among the others, nothing is more likely.
        size = {"a": 100, "b": 10}[layer]
        assert is_uniform(neuron[:, 0, 0], size)
        assert is_uniform(neuron[:, -1, 0], size)
        assert is_uniform(bit[:, 0, 0], 32)
        assert is_uniform(bit[:, -1, -1], 32)


def test_every_pair_of_bits_is_equally_likely():
    pairs = drawn(FaultModel(bits=2), 40_000, parse_format("int(4)"))["a"][:, 0, :, 2]
    counts = np.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16).reshape(4, 4)
    assert counts.diagonal().sum() == 0
    assert stats.chisquare(counts[~np.eye(4, dtype=bool)]).pvalue > 1e-4


def test_all_of_a_layers_neurons_can_be_damaged_and_no_more():
    every = drawn(FaultModel(values=10), 100, sites=SITES[1:])["b"]
    assert (np.sort(every[:, :, 0, 1], axis=1) == np.arange(10)).all()
    with pytest.raises(InvalidParameter, match=r"inject.faults.values is 11; there are 10"):
        drawn(FaultModel(values=11))
    with pytest.raises(InvalidParameter, match=r"inject.faults.bits is 33; there are 32"):
        drawn(FaultModel(bits=33))
    with pytest.raises(InvalidParameter, match=r"inject.faults.bits is 9; there are 8"):
        drawn(FaultModel(bits=9), number_format=parse_format("int(8)"))


def test_what_there_is_to_hit_depends_on_target_and_format():
    weights = drawn(FaultModel("weight"))
    assert is_uniform(weights["a"][..., 1], 24)
    assert weights["b"][..., 1].max() > 900
    assert is_uniform(drawn(SINGLE_FLIP, number_format=parse_format("fp16"))["a"][..., 2], 16)
    # 100 values in blocks of 16 make 7, the last one short; 10 make one; each has an exponent of 5 bits.
    blocks = drawn(FaultModel("metadata"), number_format=parse_format("bfp(5,7,16)"))
    assert is_uniform(blocks["a"][..., 1], 7)
    assert set(blocks["b"][..., 1].flat) == {0}
    assert is_uniform(blocks["a"][..., 2], 5)
    assert is_uniform(drawn(SINGLE_FLIP, number_format=parse_format("bfp(5,7,16)"))["a"][..., 2], 8)
    # A layer's values share one bias of 8 bits.
    bias = drawn(FaultModel("metadata"), number_format=parse_format("adaptivfloat(4,3)"))
    assert set(bias["a"][..., 1].flat) == {0}
    assert is_uniform(bias["a"][..., 2], 8)
    with pytest.raises(InvalidParameter, match=r"values is 2; there are 1"):
        drawn(FaultModel("metadata", values=2), number_format=parse_format("adaptivfloat(4,3)"))


def test_a_plan_needs_injections_and_images():
    for count in (0, -3):
        with pytest.raises(InvalidParameter, match="at least 1"):
            draw_plan(SITES, [1], count, seed=0)
    with pytest.raises(InvalidParameter, match="no image is eligible"):
        draw_plan(SITES, [], 5, seed=0)


@pytest.mark.parametrize(
    ("fault_model", "number_format", "ends"),
    [
        (SINGLE_FLIP, "fp32", {"neuron": 10, "image": 7, "bit": 32}),
        (FaultModel(bits=2, values=3), "int(8)", {"neuron": 10, "image": 7, "bit": 8}),
        (FaultModel("weight"), "fp16", {"neuron": 1000, "image": 7, "bit": 16}),
        (FaultModel("metadata"), "bfp(5,7,4)", {"neuron": 3, "image": 7, "bit": 5}),
        (FaultModel("metadata"), "adaptivfloat(4,3)", {"neuron": 1, "image": 7, "bit": 8}),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(fault_model, number_format, ends):
    stored = parse_format(number_format)
    plan = draw_plan(SITES, range(7), 20, 0, fault_model, stored)
    check_plan(plan, SITES, 7, fault_model, stored)
    last = plan.index[-1]  # a fault of layer b
    for column, end in ends.items():
        for value, fits in ((0, True), (end - 1, True), (end, False), (-1, False)):
            changed = plan.copy()
            changed.loc[last, column] = value
            if fits:
                check_plan(changed, SITES, 7, fault_model, stored)
            else:
                with pytest.raises(CampaignMismatch, match=f"has a {column} that does not exist"):
                    check_plan(changed, SITES, 7, fault_model, stored)
    with pytest.raises(CampaignMismatch, match="layer 'a', which the model does not have"):
        check_plan(plan, SITES[1:], 7, fault_model, stored)


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
            "masked": [True, False, False, False, False],
        }
    )
    result = summarise_layer(records, neurons=10)
    assert (result.layer, result.neurons) == ("fc", 10)
    assert (result.injections, result.nonfinite, result.detected, result.masked) == (5, 2, 2, 1)
    assert result.delta_loss.value == pytest.approx(0.5)
    assert result.delta_loss.n == 3
    assert result.mismatch.value == pytest.approx(1 / 3)
