"""Fault plans: which faults on which images, and what each counts for."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from textguard.errors import CampaignMismatch, InvalidParameter
from textguard.faults.damage import SINGLE_FLIP, FaultModel
from textguard.faults.formats import FP32, parse_format
from textguard.faults.plans import PLAN_COLUMNS, check_plan, draw_plan
from textguard.faults.sites import Site

SITES = [Site("a", "Conv2d", 0, (4, 5, 5), weights=24), Site("b", "Linear", 1, (10,), weights=1000)]
MODELS = [
    SINGLE_FLIP,
    FaultModel(bits=3),
    FaultModel(values=4),
    FaultModel(bits=2, values=2),
    FaultModel("weight", "stuck_at_1", bits=2),
    FaultModel(bits=2, values=2, pattern="adjacent"),
    FaultModel(bits=2, pattern="block", block=(2, 3)),
]
SEVEN = np.ones(7)


def among(*images, count=9):
    """The same chance for some images of a split, none for the others."""
    return np.isin(np.arange(count), images).astype(float)


def test_a_plan_is_uniform_over_images_neurons_and_bits():
    plan = draw_plan(SITES, among(3, 5, 8), 20_000, seed=0)
    assert (plan["weight"] == 1).all()
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
        return draw_plan(sites, SEVEN, count, seed, fault_model)

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
        draw_plan(renamed, SEVEN, 50, seed=1).drop(columns="layer"),
        draw_plan(SITES, SEVEN, 50, seed=1).drop(columns="layer"),
    )
    small, large = (draw_plan([Site("a", "Linear", 0, (size,))], SEVEN, 500, seed=1)["neuron"] / size for size in (100, 1000))
    assert (small - large).abs().max() < 0.01 + 1e-9


def drawn(fault_model, count=4000, number_format=FP32, sites=SITES):
    """The plan's rows by layer and injection: {layer: array [count, values, bits, (image, neuron, bit)]}."""
    plan = draw_plan(sites, among(3, 5, 8), count, 0, fault_model, number_format)
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
    with pytest.raises(InvalidParameter, match=r"fault_model\.values is 11; there are 10"):
        drawn(FaultModel(values=11))
    with pytest.raises(InvalidParameter, match=r"fault_model\.bits is 33; there are 32"):
        drawn(FaultModel(bits=33))
    with pytest.raises(InvalidParameter, match=r"fault_model\.bits is 9; there are 8"):
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
            draw_plan(SITES, SEVEN, count, seed=0)
    with pytest.raises(InvalidParameter, match="no image is eligible"):
        draw_plan(SITES, np.zeros(7), 5, seed=0)


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
    plan = draw_plan(SITES, SEVEN, 20, 0, fault_model, stored)
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
    for weight in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(CampaignMismatch, match="weights that are not above 0"):
            check_plan(plan.assign(weight=weight), SITES, 7, fault_model, stored)
    with pytest.raises(CampaignMismatch, match="layer 'a', which the model does not have"):
        check_plan(plan, SITES[1:], 7, fault_model, stored)


# As `image_chances` gives them for `importance`: half even, half by doubt; some images are not eligible.
DOUBT = np.where(np.arange(40) % 5 == 2, 0.0, np.random.default_rng(0).lognormal(-4, 2, 40))
CHANCES = (DOUBT > 0) * (0.5 + 0.5 * DOUBT / DOUBT[DOUBT > 0].mean())


@pytest.mark.parametrize("by_bit", [False, True])
def test_images_are_drawn_by_their_chances_and_weigh_the_inverse(by_bit):
    count = 40_000
    counts = {"a": np.full(32, count // 32)} if by_bit else count
    plan = draw_plan(SITES[:1], CHANCES, counts, seed=3)
    drawn_images = np.bincount(plan["image"], minlength=len(CHANCES))
    eligible = CHANCES > 0
    assert not drawn_images[~eligible].any()
    expected = CHANCES[eligible] / CHANCES.sum() * count
    assert stats.chisquare(drawn_images[eligible], expected).pvalue > 1e-4
    assert plan["weight"].to_numpy() == pytest.approx(CHANCES[eligible].mean() / CHANCES[plan["image"]])
    # Weighted, every eligible image counts alike: as often as in a plan that draws them so.
    weighted = np.bincount(plan["image"], plan["weight"], minlength=len(CHANCES))[eligible]
    error = np.sqrt(expected) * CHANCES[eligible].mean() / CHANCES[eligible]
    assert (np.abs(weighted - count / eligible.sum()) < 4 * error).all()
    assert plan["weight"].mean() == pytest.approx(1, abs=4 * plan["weight"].std() / count**0.5)
    assert plan["weight"].max() <= 2


def test_a_plans_chances_are_relative():
    pd.testing.assert_frame_equal(draw_plan(SITES, CHANCES, 100, seed=3), draw_plan(SITES, 8 * CHANCES, 100, seed=3))


def test_a_single_eligible_image_among_many_is_found():
    assert set(draw_plan(SITES, among(4321, count=5000), 30, seed=0)["image"]) == {4321}


def test_by_bit_every_bit_gets_its_number_of_injections_and_more_extend_them():
    few = {"a": np.arange(32) % 7, "b": np.full(32, 3)}
    plan = draw_plan(SITES, CHANCES, few, seed=1)
    assert list(plan.columns) == PLAN_COLUMNS
    for layer, counts in few.items():
        assert (np.bincount(plan.loc[plan["layer"] == layer, "bit"], minlength=32) == counts).all()
    assert not plan.duplicated(["layer", "index"]).any()
    more = draw_plan(SITES, CHANCES, {layer: counts + np.arange(32) for layer, counts in few.items()}, seed=1)
    names = ["layer", "index"]
    extended = more.set_index(names).loc[pd.MultiIndex.from_frame(plan[names])].reset_index()
    pd.testing.assert_frame_equal(extended[PLAN_COLUMNS], plan)


def test_by_bit_places_are_uniform_and_bits_independent():
    plan = draw_plan(SITES, among(3, 5, 8), {"a": np.full(32, 500), "b": np.full(32, 500)}, seed=5)
    for layer, size in (("a", 100), ("b", 10)):
        faults = plan[plan["layer"] == layer]
        assert is_uniform(faults["neuron"].to_numpy(), size)
        neurons = faults["neuron"].to_numpy().reshape(32, 500)
        between = np.corrcoef(neurons)[~np.eye(32, dtype=bool)]
        assert np.abs(between).max() < 0.25
        assert stats.chisquare(np.bincount(faults["image"])[[3, 5, 8]]).pvalue > 1e-4


def test_an_injections_of_a_bit_do_not_depend_on_those_of_other_bits():
    alone = np.zeros(32, dtype=int)
    alone[30] = 40
    together = draw_plan(SITES[:1], CHANCES, {"a": np.full(32, 40)}, seed=1)
    expected = together[together["bit"] == 30].reset_index(drop=True)
    pd.testing.assert_frame_equal(draw_plan(SITES[:1], CHANCES, {"a": alone}, seed=1), expected)


@pytest.mark.parametrize("fault_model", [FaultModel(bits=2), FaultModel(values=2)], ids=str)
def test_faults_of_several_bits_cannot_be_planned_by_bit(fault_model):
    with pytest.raises(InvalidParameter, match=r"argument plan: only faults of one bit in one value") as error:
        draw_plan(SITES, SEVEN, {site.layer: np.full(32, 2) for site in SITES}, 0, fault_model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("by_bit", [False, True])
def test_two_models_share_the_faults_on_images_that_both_classify_correctly(by_bit):
    counts = {"a": np.full(32, 100)} if by_bit else {"a": 3200}
    wider = Site("a", "Conv2d", 0, (8, 10, 10), weights=24)
    one, other = np.ones(50), np.ones(50)
    one[[7, 30]], other[[7, 12]] = 0, 0
    first, second = draw_plan(SITES[:1], one, counts, seed=2), draw_plan([wider], other, counts, seed=2)
    assert (first[["index", "bit"]] == second[["index", "bit"]]).all(axis=None)
    assert (first["neuron"] / 100 - second["neuron"] / 800).abs().max() < 0.01 + 1e-9
    same = first["image"] == second["image"]
    differing = first["image"].eq(12) | second["image"].eq(30)
    assert (same | differing).all()
    assert same.mean() > 0.93
    assert not (first["image"].isin([7, 30]) | second["image"].isin([7, 12])).any()


def test_slightly_different_chances_leave_most_images_in_place():
    changed = CHANCES * (1 + 0.02 * np.sin(np.arange(len(CHANCES))))
    first, second = (draw_plan(SITES[:1], chances, 4000, seed=2)["image"] for chances in (CHANCES, changed))
    assert (first == second).mean() > 0.9
