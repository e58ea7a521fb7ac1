"""Estimates and their intervals: by hand, against other software, and by how often they hold."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from textguard.analysis.improvement import Draws, draw_layers, improvement, weigh
from textguard.errors import InvalidParameter
from textguard.estimates.statistics import (
    Estimate,
    Sample,
    average,
    combine,
    exact,
    few_injections,
    mean_estimate,
    mean_interval,
    over_trainings,
    paired_difference,
    planned_half_width,
    planned_injections,
    quantile,
    rate_estimate,
    rate_interval,
    sample_mean,
)
from textguard.estimates.summary import ROUNDING, LayerResult, Totals, cap_of, goldeneye_means, summarise, summarise_totals
from textguard.faults.sampling import Design, next_total, neyman_shares, spread_over_bits
from textguard.schema.results import MEASURES

BITS = 32
CONFIDENCES = [0.8, 0.95, 0.99, 0.999]


def normal(sample: Sample, confidence: float = 0.99) -> tuple[float, float]:
    """The interval that does without any of this: so many standard errors to either side."""
    half = stats.norm.ppf(0.5 + confidence / 2) * math.sqrt(sample.variance)
    return sample.value - half, sample.value + half


def test_a_samples_moments_are_those_computed_by_hand():
    first, second = np.array([1.0, 2.0, 6.0]), np.array([0.0, 4.0])
    found = sample_mean([first, second], [0.25, 0.75], [12.0, 8.0])
    # Means 3 and 2; squares 14 and 8 about them; cubes -8 - 1 + 27 and 0.
    assert found.value == pytest.approx(0.25 * 3 + 0.75 * 2)
    assert found.variance == pytest.approx(0.25**2 * 14 / 2 / 3 + 0.75**2 * 8 / 1 / 2)
    assert found.third == pytest.approx(0.25**3 * 18 / 3 / 3**2)
    assert found.n == 5
    # One more of 12 moves the first mean by 2.25 and the whole by 0.5625; one of 8 the second by 2 and the whole by 1.5.
    larger = sample_mean([first, np.array([0.0, 4.0, 8.0])], [0.25, 0.75], [0.0, 0.0])
    assert found.unseen[0] == pytest.approx(1.5)
    for name in ("value", "variance", "third"):
        assert getattr(found.with_unseen, name) == pytest.approx(getattr(larger, name))


def test_samples_combine_as_independent_ones_do():
    one, other = Sample(2.0, 0.5, 0.1, 10, (0.4, 0.2, 0.3)), Sample(3.0, 0.25, -0.2, 20, (0.3, 0.1, 0.6))
    found = combine([one, other], [2.0, -1.0])
    assert (found.value, found.variance, found.n) == (1.0, 4 * 0.5 + 0.25, 30)
    assert found.third == pytest.approx(8 * 0.1 + 0.2)
    assert found.unseen == pytest.approx((0.8, 0.8, 2.4))
    plain = average([one, other])
    assert (plain.value, plain.variance) == (2.5, pytest.approx(0.75 / 4))
    weighted = average([one, other], [30, 10])
    assert weighted.value == pytest.approx(2.25)
    assert weighted.variance == pytest.approx(0.75**2 * 0.5 + 0.25**2 * 0.25)
    assert weighted.unseen == pytest.approx((0.3, 0.75**2 * 0.2, 0.75**3 * 0.3))


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_of_a_large_symmetric_sample_the_interval_is_the_normal_one(confidence):
    half = np.random.default_rng(0).uniform(0, 1, 50_000)
    sample = sample_mean([np.append(half, 2 - half)], [1.0], [2.0])
    found, (low, high) = mean_interval(sample, confidence), normal(sample, confidence)
    assert found.low == pytest.approx(low, abs=0.01 * (high - low))
    assert found.high == pytest.approx(high, abs=0.02 * (high - low))
    assert found.value == pytest.approx(1.0)


def test_of_a_skewed_sample_the_interval_reaches_further_up_than_down():
    values = np.random.default_rng(1).lognormal(0, 1.5, 400)
    found = mean_estimate(values)
    low, high = normal(sample_mean([values], [1.0], [0.0]))
    assert found.high - found.value > 1.3 * (found.value - found.low)
    assert found.low > low
    assert found.high > high


def test_halls_transformation_is_what_he_published():
    values = np.random.default_rng(2).lognormal(0, 1, 300)
    skewness, z = stats.skew(values) / math.sqrt(300), stats.norm.ppf(0.995)
    # Hall's skewness is that of the mean, estimated with the same divisor as its standard error.
    skewness *= (299 / 300) ** 1.5
    statistic = 3 / skewness * (math.cbrt(1 + skewness * (z - skewness / 6)) - 1)
    expected = values.mean() - statistic * values.std(ddof=1) / math.sqrt(300)
    assert mean_estimate(values).low == pytest.approx(expected)
    # And the statistic's polynomial, T + s T^2 / 3 + s^2 T^3 / 27 + s / 6, gives the quantile back.
    assert statistic + skewness * statistic**2 / 3 + skewness**2 * statistic**3 / 27 + skewness / 6 == pytest.approx(z)


def test_what_is_exact_has_no_width_also_among_others():
    one, other = exact(0.25, 1000), exact(0.75, 3000)
    for sample, value in ((one, 0.25), (average([one, other]), 0.5), (average([one, other], [3, 1]), 0.375)):
        for interval in (mean_interval, rate_interval):
            found = interval(sample)
            assert (found.value, found.low, found.high) == (value, value, value)
    sampled = sample_mean([np.array([0.0, 1.0, 0.5, 0.7])], [1.0], [2.0])
    alone, diluted = mean_interval(sampled), mean_interval(average([sampled, one]))
    assert diluted.high - diluted.value == pytest.approx((alone.high - alone.value) / 2)
    assert normal(average([sampled, one]))[0] == pytest.approx(diluted.value + (normal(sampled)[0] - sampled.value) / 2)
    assert diluted.n == 1004


def test_of_nothing_nothing_is_known_and_of_one_no_interval():
    for estimate in (mean_estimate(np.array([])), rate_estimate(0, 0)):
        assert estimate.as_json() == {"value": None, "low": None, "high": None, "n": 0}
    assert mean_estimate(np.array([3.0])).as_json() == {"value": 3.0, "low": None, "high": None, "n": 1}


def test_the_mean_of_shares_is_a_share():
    shares = np.array([1.0] * 5 + [0.99])
    assert mean_estimate(shares).high > 2
    assert mean_estimate(shares, most=1.0).high == 1.0
    assert mean_estimate(shares[:1], most=1.0).as_json() == {"value": 1.0, "low": None, "high": None, "n": 1}


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_a_rate_has_wilsons_interval(confidence):
    for count in (1, 2, 7, 50, 400, 4096):
        for hits in {0, 1, 2, count // 3, count // 2, count - 1, count} - {-1}:
            if hits > count:
                continue
            expected = stats.binomtest(hits, count).proportion_ci(confidence, method="wilson")
            found = rate_estimate(hits, count, confidence)
            assert (found.value, found.n) == (hits / count, count)
            assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
            # The same trials as a sample of zeros and ones.
            trials = np.arange(count) < hits
            sampled = sample_mean([trials.astype(float)], [1.0], [1.0 if 2 * hits <= count else 0.0])
            again = rate_interval(sampled, confidence)
            assert (again.low, again.high) == pytest.approx((expected.low, expected.high), rel=0.01, abs=1e-12)


def test_a_stratified_rate_without_hits_is_bounded_by_its_worst_stratum():
    for counts in ([2] * 32, [9] * 31 + [700], [32] * 32, [5, 3000]):
        strata = [np.zeros(count) for count in counts]
        found = rate_interval(sample_mean(strata, [1 / len(counts)] * len(counts), [1.0] * len(counts)))
        assert (found.value, found.low) == (0.0, 0.0)
        worst = max(stats.binomtest(0, count).proportion_ci(0.99).high for count in counts) / len(counts)
        assert worst <= found.high < 1
        # Nor is it below that of a simple sample as large.
        assert found.high >= rate_estimate(0, sum(counts)).high


# --- Summaries of records


def records_of(strata, weights=None, layer="fc"):
    """Records with these losses beyond a golden one of 0.5, by bit."""
    bit = np.repeat(np.arange(len(strata)), [len(part) for part in strata])
    loss = np.concatenate([np.asarray(part, dtype=float) for part in strata])
    return pd.DataFrame(
        {
            "layer": layer,
            "index": np.arange(len(loss)),
            "bit": bit,
            "weight": np.ones(len(loss)) if weights is None else weights,
            "golden_loss": 0.5,
            "faulty_loss": 0.5 + loss,
            "detected": loss >= 1,
            "masked": loss == 0,
            "mismatch": loss > 0.4,
        }
    )


def test_a_summary_counts_non_finite_losses_as_its_policy_says():
    records = records_of([[0.0, 1.0, -0.5, math.nan, math.inf]])
    found = summarise(records, {"fc": 10})["fc"]
    assert (found.layer, found.neurons, found.method) == ("fc", 10, "sampled")
    assert (found.injections, found.nonfinite, found.detected, found.masked) == (5, 2, 2, 1)
    assert (found.delta_loss.value, found.delta_loss.n) == (pytest.approx(0.5), 3)
    assert (found.mismatch.value, found.mismatch.n) == (pytest.approx(1 / 3), 3)
    assert (found.sdc.value, found.sdc.n) == (pytest.approx(3 / 5), 5)
    assert found.broken.value == pytest.approx(2 / 5)
    capped = summarise(records, {"fc": 10}, nonfinite="cap:20")["fc"]
    assert (capped.delta_loss.value, capped.delta_loss.n) == (pytest.approx(41.5 / 5), 5)
    assert capped.sdc == found.sdc


@pytest.mark.parametrize("policy", ["cap", "cap:", "cap:0", "cap:-3", "cap:inf", "cap:nan", "zero", ""])
def test_an_unknown_policy_is_refused(policy):
    with pytest.raises(InvalidParameter, match=r"^argument nonfinite is .*allowed: goldeneye, or cap:X") as error:
        cap_of(policy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("nonfinite", ["goldeneye", "cap:7"])
def test_weighted_and_stratified_means_are_those_of_the_formula(bits, nonfinite):
    draw = np.random.default_rng(5)
    strata = [draw.lognormal(0, 1, count) for count in (5, 20, 11, 40)]
    for part in strata[1:]:
        part[draw.integers(0, len(part), 3)] = [math.nan, math.inf, math.nan]
    weight = draw.uniform(0.2, 2, 76)
    records = records_of(strata, weight).sample(frac=1, random_state=0)
    found = summarise(records, {"fc": 3}, bits, nonfinite)["fc"].delta_loss
    loss, bit = np.concatenate(strata), np.repeat(np.arange(4), (5, 20, 11, 40))
    counted = np.isfinite(loss) | (nonfinite != "goldeneye")
    loss = np.where(np.isfinite(loss), loss, 7.0)
    groups = [bit == b for b in range(4)] if bits else [np.ones(76, dtype=bool)]
    total = np.mean([(weight * counted * loss)[group].mean() for group in groups])
    known = np.mean([(weight * counted)[group].mean() for group in groups]) if nonfinite == "goldeneye" else 1.0
    assert found.value == pytest.approx(total / known)
    # A quotient's variance: that of its residuals, over the square of the denominator.
    rest = weight * counted * (loss - (total / known if nonfinite == "goldeneye" else 0.0))
    variance = sum((rest[group] / known / len(groups)).var(ddof=1) / group.sum() for group in groups)
    assert found.variance == pytest.approx(variance)
    assert found.n == counted.sum()


def test_the_error_of_a_quotient_is_that_of_repeated_campaigns():
    draw = np.random.default_rng(6)
    values, errors = [], []
    for _ in range(400):
        strata = [np.where(draw.random(60) < 0.3, math.nan, draw.exponential(2, 60)), draw.exponential(1, 40)]
        found = summarise(records_of(strata, draw.choice([0.5, 1.5], 100)), {"fc": 3}, 2)["fc"].delta_loss
        values.append(found.value)
        errors.append(found.variance)
    assert np.mean(values) == pytest.approx(0.7 / 1.7 * 2 + 1 / 1.7, rel=0.03)
    assert np.var(values) == pytest.approx(np.mean(errors), rel=0.25)


def test_rows_of_one_injection_count_once_and_any_detection_counts():
    once = records_of([[0.0, 0.3, 1.2, 0.0]])
    twice = pd.concat([once.assign(detected=False), once.assign(bit=3)], ignore_index=True)
    a, b = (summarise(records, {"fc": 1})["fc"] for records in (once, twice))
    assert (a.delta_loss, a.sdc, a.detected, a.injections) == (b.delta_loss, b.sdc, b.detected, b.injections)


def test_both_definitions_come_from_the_same_records():
    losses = [0.0, 1.0, 2.0, math.nan, math.nan, 3.0, 0.0, 0.0]
    records = records_of([losses]).assign(mismatch=[False, True, True, True, False, False, False, False])
    apart = records.assign(
        layer="other", faulty_loss=records["faulty_loss"].replace(3.5, math.inf), weight=[2.0] * 4 + [0.0] * 4
    )
    found = goldeneye_means(pd.concat([records, records, apart])).set_index("layer")
    assert list(found.index) == ["fc", "other"]
    assert found.loc["fc"].tolist() == [8, 2, 1.0, 3 / 8]  # DeltaLoss over 6, mismatches over 8
    ours = summarise(records, {"fc": 10})["fc"]
    assert (ours.delta_loss.value, ours.mismatch.value) == (pytest.approx(1.0), pytest.approx(2 / 6))
    # Weights count, and an infinite loss, which ours leaves out, stays in.
    assert found.loc["other", "mismatch"] == 6 / 8
    infinite = records.assign(faulty_loss=records["faulty_loss"].replace(3.5, math.inf))
    assert goldeneye_means(infinite)["delta_loss"].tolist() == [math.inf]
    assert summarise(infinite, {"fc": 10})["fc"].delta_loss.value == pytest.approx(3 / 5)
    assert math.isnan(goldeneye_means(records.assign(faulty_loss=math.nan)).loc[0, "delta_loss"])


def test_layers_come_in_the_order_asked_for_and_those_without_records_not():
    records = pd.concat([records_of([[0.0, 1.0]], layer=layer) for layer in ("b", "a")])
    assert list(summarise(records, {"a": 1, "c": 1, "b": 1})) == ["a", "b"]


@pytest.mark.parametrize(("nonfinite", "value", "n"), [("goldeneye", 12 / 6, 6), ("cap:4", (12 + 8) / 8, 8)])
def test_totals_of_all_faults_are_exact(nonfinite, value, n):
    totals = Totals("fc", 2, *(np.array(part) for part in ([4, 4], [1, 0], [0, 2], [1, 2], [0, 2], [5.0, 7.0])))
    found = summarise_totals(totals, nonfinite)
    assert (found.method, found.injections, found.nonfinite, found.detected) == ("exact", 8, 2, 2)
    assert mean_interval(found.delta_loss) == Estimate(value, value, value, n)
    assert rate_interval(found.sdc) == Estimate(5 / 8, 5 / 8, 5 / 8, 8)
    assert rate_interval(found.mismatch).value == 3 / 6
    stored = Totals.from_json(totals.as_json())
    assert all(np.array_equal(getattr(stored, name), getattr(totals, name)) for name in vars(totals))


# --- Planned sizes, trainings


@pytest.mark.parametrize(("confidence", "expected"), [(0.95, 9604), (0.99, 16588), (0.998, 23874)])
def test_planned_sizes_are_leveugles(confidence, expected):
    assert planned_injections(10**15, 0.01, confidence) == pytest.approx(expected, abs=1)
    assert planned_injections(10**15, 0.01, confidence) == math.ceil(quantile(confidence) ** 2 / 4 / 0.01**2 - 1e-6)


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("population", [100, 5_000, 10**6, 10**12])
def test_planned_sizes_and_half_widths_are_each_others_inverse(population, confidence):
    for half_width in (0.05, 0.01, 0.002):
        count = planned_injections(population, half_width, confidence)
        assert 1 <= count <= population
        assert planned_half_width(population, count, confidence) <= half_width * (1 + 1e-9)
        if count > 1:
            assert planned_half_width(population, count - 1, confidence) > half_width
    assert planned_half_width(population, population, confidence) == 0
    assert planned_half_width(population, population + 1, confidence) == 0


def test_sampled_parts_that_do_not_show_in_sixteen_digits_do_not_make_a_mean_exact():
    found = mean_interval(average([exact(4e34, 100), sample_mean([np.array([0.0, 1.0, 2.0])], [1.0], [4.0])]))
    assert found.low < found.value < found.high
    assert (found.low, found.high) == pytest.approx((2e34, 2e34))


# --- Rounding is not taken for damage


def campaign_of(**layers):
    """Records with these DeltaLosses by layer."""
    return pd.concat([records_of([np.asarray(losses)], layer=layer) for layer, losses in layers.items()])


def limits_of(**layers):
    found = summarise(campaign_of(**layers), dict.fromkeys(layers, 1))
    return {layer: mean_interval(result.delta_loss) for layer, result in found.items()}


def test_the_unseen_in_a_layer_that_saw_only_rounding_is_the_campaigns_worst():
    noise = np.abs(np.random.default_rng(0).normal(0, 1e-7, 64))
    assert limits_of(fc=noise)["fc"].as_json()["high"] is None  # Nothing has happened anywhere.
    assert limits_of(fc=noise, conv=[2.0] * 64)["fc"].high > 2 / 64
    few, enough = ([*noise[:-count], *[1e-3] * count] for count in (4, 5))
    assert limits_of(fc=few, conv=[2.0] * 64)["fc"].high > 2 / 64
    assert limits_of(fc=enough, conv=[2.0] * 64)["fc"].high < 1e-3
    # The worst of the campaign bounds it also where the layer's weights differ: as heavy as a fault is on average.
    weighted = campaign_of(fc=noise, conv=[2.0] * 64).assign(weight=[0.5, 1.5] * 64)
    assert summarise(weighted, {"fc": 1, "conv": 1})["fc"].most == pytest.approx(2 * 1.25)


def test_rounding_is_what_another_order_of_addition_makes_of_a_cross_entropy():
    draw = np.random.default_rng(0)
    features, head = draw.normal(0, 1, (2000, 512)).astype(np.float32), draw.normal(0, 0.6, (512, 10)).astype(np.float32)
    losses = []
    for order in (np.arange(512), draw.permutation(512)):
        logits = features[:, order] @ head[order]
        shifted = logits - logits.max(axis=1, keepdims=True)
        losses.append(np.log(np.exp(shifted).sum(axis=1)) - shifted[:, 0])
    differences = np.abs(losses[1] - losses[0])
    assert 32 < np.abs(logits).max() < 64
    assert np.median(differences) > 1e-7
    assert np.quantile(differences, 0.95) <= ROUNDING <= 2 * differences.max()


def test_intervals_hold_where_most_injections_do_nothing_but_round():
    draw, truth = np.random.default_rng(0), 5e-4 * math.exp(2)
    for count in (64, 1024, 4096):
        held = plain_held = 0
        for _ in range(100):
            losses = np.abs(draw.normal(0, 1e-6, count)) + (draw.random(count) < 5e-4) * draw.lognormal(0, 2, count)
            limits, alone = limits_of(fc=losses, conv=[20.0] * 64)["fc"], mean_estimate(losses)
            held += limits.low <= truth <= limits.high
            plain_held += alone.low <= truth <= alone.high
        assert held >= 97
        assert plain_held < 85


def test_few_injections_are_said_to_be_few():
    assert "1,024 uniform" in few_injections(1023, "uniform")
    assert "1,024 neyman" in few_injections(64, "neyman")
    assert "64 guided" in few_injections(63, "guided")
    assert few_injections(1024, "uniform") == few_injections(64, "guided") == ""


ANY, SHARE, POSITIVE = (-math.inf, math.inf), (0.0, 1.0), (0.0, math.inf)


def exactly(*values):
    return [Estimate(value, value, value, 5) for value in values]


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_the_interval_over_trainings_is_students(confidence):
    for values in ([1.0, 1.4], [0.2, 0.9, 0.4], [3.0, 2.0, 2.5, 2.1, 4.0]):
        error = np.std(values, ddof=1) / math.sqrt(len(values))
        expected = stats.t.interval(confidence, len(values) - 1, np.mean(values), error)
        found = over_trainings(exactly(*values), ANY, confidence)
        assert (found.low, found.high, found.n) == (*(pytest.approx(end) for end in expected), 5 * len(values))
        assert found.value == pytest.approx(np.mean(values))
        # What cannot be negative has the same interval as a logarithm.
        logs = over_trainings(exactly(*np.exp(values)), POSITIVE, confidence)
        assert np.log((logs.low, logs.value, logs.high)) == pytest.approx((found.low, found.value, found.high))


def test_injections_widen_an_interval_over_trainings_only_where_the_trainings_agree():
    apart = [Estimate(value, value - 0.1, value + 0.2, 5) for value in (1.0, 2.0, 3.0)]
    assert over_trainings(apart, ANY) == over_trainings(exactly(1.0, 2.0, 3.0), ANY)
    alike = over_trainings([Estimate(2.0, 1.9, 2.2, 5)] * 4, ANY)
    assert (alike.low, alike.high) == pytest.approx((2 - 0.1 / 2, 2 + 0.2 / 2))


def test_what_no_training_saw_keeps_its_bound_and_nothing_leaves_its_range():
    assert over_trainings([Estimate(0.0, 0.0, high, 5) for high in (0.1, 0.3, 0.2)], SHARE) == Estimate(0.0, 0.0, 0.3, 15)
    assert over_trainings(exactly(0.0, 0.0), SHARE) == Estimate(0.0, 0.0, 0.0, 10)
    some = over_trainings([Estimate(0.0, 0.0, 0.1, 5), Estimate(0.9, 0.8, 1.0, 5)], SHARE)
    assert (some.low, some.value, some.high) == (0.0, 0.45, 1.0)
    assert over_trainings(exactly(10.0, 20.0, 500.0), POSITIVE).low > 0
    assert over_trainings(exactly(0.0, 20.0, 500.0), POSITIVE).low == 0
    one = Estimate(0.5, math.nan, math.nan, 1)
    assert over_trainings([one], SHARE) is one


@pytest.mark.filterwarnings("error")
def test_open_limits_and_numbers_that_are_no_numbers_pass_over_trainings_without_a_warning():
    found = over_trainings([Estimate(2.0, 0.0, math.inf, 5), Estimate(2.0, 1.0, 3.0, 5)], POSITIVE)
    assert (found.low, found.high) == (0, math.inf)
    assert found.value == pytest.approx(2.0)
    assert over_trainings(exactly(1e-200, 1e200), POSITIVE).high == math.inf
    for lost in (math.nan, math.inf):
        assert math.isnan(over_trainings(exactly(2.0, lost), POSITIVE).value)


def test_a_difference_in_pairs_is_a_paired_t_tests():
    draw = np.random.default_rng(3)
    images = draw.uniform(0, 1, 500)
    mine, theirs = images + draw.normal(0.05, 0.02, 500), images
    for confidence in CONFIDENCES:
        found, expected = paired_difference(mine, theirs, confidence), stats.ttest_rel(mine, theirs)
        limits = expected.confidence_interval(confidence)
        assert (found.low, found.high) == pytest.approx((limits.low, limits.high))
        assert (found.value, found.n) == (pytest.approx(mine.mean() - theirs.mean()), 500)
    apart = mean_estimate(mine)
    assert apart.high - apart.low > 10 * (found.high - found.low)
    assert paired_difference(mine[:1], theirs[:1]).as_json() == {
        "value": mine[0] - theirs[0],
        "low": None,
        "high": None,
        "n": 1,
    }
    assert paired_difference(mine[:0], theirs[:0]).n == 0
    with pytest.raises(ValueError, match="as many"):
        paired_difference(mine, theirs[:-1])


# --- Coverage: populations with the shape of DeltaLoss


class Population:
    """DeltaLoss of all faults of a made-up layer: mostly 0, heavy-tailed, in the exponent's bits, worst on doubtful images.

    values [32, 2048]; chances: of each one's image, half even and half by doubt, as `image_chances` draws them.
    """

    def __init__(self, seed):
        draw, cells = np.random.default_rng(seed), 2048
        doubt = np.exp(draw.normal(0, 2.2, 256))
        image, bit = draw.integers(0, 256, (BITS, cells)), np.arange(BITS)[:, None]
        scale = np.select([bit == 30, bit == 31, bit >= 24], [30.0, 3.0, 10.0], 0.5 * 2.0 ** (bit - 23))
        hit = draw.random((BITS, cells)) < np.select([bit == 30, bit >= 24], [0.3, 0.25], 0.1)
        self.values = hit * scale * doubt[image] * np.exp(draw.normal(0, 1, (BITS, cells)))
        self.mean = self.values.mean()
        chances = (0.5 + 0.5 * doubt / doubt.mean())[image]
        by_bit = chances.cumsum(axis=1) / chances.sum(axis=1, keepdims=True)
        self._edges = (by_bit + bit).reshape(-1)
        self.weights = (chances.mean(axis=1, keepdims=True) / chances).reshape(-1)

    def by_bit(self, draw, counts):
        """So many of each bit, images by their chances: positions among all values."""
        bit = np.repeat(np.arange(BITS), counts)
        return np.searchsorted(self._edges, draw.random(len(bit)) + bit, side="right")

    def strata(self, draw, counts, values=None):
        """Weighted values of each bit."""
        chosen = self.by_bit(draw, counts)
        weighted = (self.values if values is None else values).reshape(-1)[chosen] * self.weights[chosen]
        return np.split(weighted, np.cumsum(counts)[:-1])


LAYERS = [Population(seed) for seed in (6, 0, 1)]
REPETITIONS = 2000
ENOUGH = 0.975
EVEN = np.full(BITS, 1 / BITS)


def test_the_populations_have_the_shape_of_those_that_were_measured():
    for population in LAYERS:
        values = population.values.reshape(-1)
        assert 18 < values.std() / values.mean() < 28
        assert 40 < stats.skew(values) < 90
        assert 0.8 < np.mean(values == 0) < 0.95
        spread = np.sort(population.values.std(axis=1))[::-1]
        assert 0.2 < spread[0] / spread.sum() < 0.8


@pytest.mark.parametrize("population", LAYERS, ids=["6", "0", "1"])
def test_a_uniform_plans_intervals_hold_where_normal_ones_do_not(population):
    draw, values = np.random.default_rng(7), population.values.reshape(-1)
    held = np.zeros(2)
    for _ in range(REPETITIONS):
        drawn = values[draw.integers(0, len(values), 4096)]
        sample = sample_mean([drawn], [1.0], [2 * drawn.max()])
        found, (low, high) = mean_interval(sample), normal(sample)
        held += [found.low <= population.mean <= found.high, low <= population.mean <= high]
    ours, plain = held / REPETITIONS
    assert ours >= ENOUGH
    assert plain < 0.95


def sampled(strata):
    """A layer's estimate from its strata, as `summarise` makes it."""
    return sample_mean(strata, EVEN, [2 * stratum.max() for stratum in strata])


def test_strata_make_the_estimate_that_a_summary_of_records_makes():
    population, counts = LAYERS[0], 2 + np.arange(BITS)
    chosen = population.by_bit(np.random.default_rng(0), counts)
    values = np.split(population.values.reshape(-1)[chosen], np.cumsum(counts)[:-1])
    found = summarise(records_of(values, population.weights[chosen]), {"fc": 1}, BITS)["fc"]
    strata = population.strata(np.random.default_rng(0), counts)
    made = sampled(strata)
    for name in ("value", "variance", "third", "n"):
        assert getattr(found.delta_loss, name) == pytest.approx(getattr(made, name))
    assert found.delta_loss.unseen == pytest.approx(made.unseen)
    assert all(np.allclose(a, b) for a, b in zip(found.strata["delta_loss"], strata, strict=True))


def design_of(injections_per_layer, stop_at="never"):
    return Design("neyman", injections_per_layer, pilot=128, stop_at=stop_at, confidence=0.99, seed=0)


def campaign(draw, design):
    """The strata of the first layer after all rounds of a design, for which the other layers' pilots plan."""
    counts = spread_over_bits(design.pilot, EVEN, None)
    pilots = {str(place): population.strata(draw, counts) for place, population in enumerate(LAYERS)}
    shares = neyman_shares(pilots)["0"]
    strata, injections = pilots["0"], design.pilot
    while (wanted := next_total(SimpleNamespace(delta_loss=sampled(strata)), injections, design)) > injections:
        more = spread_over_bits(wanted, shares, counts)
        strata = [np.concatenate(pair) for pair in zip(strata, LAYERS[0].strata(draw, more - counts), strict=True)]
        counts, injections = more, wanted
    return strata


def test_a_neyman_plans_intervals_hold():
    draw, design, truth = np.random.default_rng(8), design_of(1024), LAYERS[0].mean
    found = []
    for _ in range(REPETITIONS):
        sample = sampled(campaign(draw, design))
        assert sample.n == 1024
        interval = mean_interval(sample)
        found.append((interval.low <= truth <= interval.high, sample.value, (interval.high - interval.low) / 2))
    held, values, halves = np.array(found).T
    assert held.mean() >= ENOUGH
    assert values.mean() == pytest.approx(truth, abs=4 * values.std() / math.sqrt(REPETITIONS))
    # With a quarter of the injections, it is the narrower one.
    population = LAYERS[0].values.reshape(-1)
    uniform = [mean_estimate(population[draw.integers(0, len(population), 4096)]) for _ in range(100)]
    assert np.median(halves) < 0.8 * np.median([(part.high - part.low) / 2 for part in uniform])


def test_sequentially_stopped_intervals_hold():
    draw, design, truth = np.random.default_rng(9), design_of(8192, "50%"), LAYERS[0].mean
    held, stopped = 0, 0
    for _ in range(REPETITIONS):
        sample = sampled(campaign(draw, design))
        interval = mean_interval(sample)
        held += interval.low <= truth <= interval.high
        if sample.n < design.injections_per_layer:
            stopped += 1
            assert (interval.high - interval.low) / 2 <= 0.5 * interval.value
    assert held / REPETITIONS >= ENOUGH
    assert stopped / REPETITIONS > 0.4


def as_result(values):
    return LayerResult(
        "",
        1,
        "sampled",
        0,
        0,
        0,
        0,
        exact(values.mean(), len(values)),
        *[exact(0.0, 0)] * 3,
        np.ones(1),
        {name: [values] for name in MEASURES},
    )


def test_improvements_intervals_hold():
    count, resamples = 4096, 1000
    draw, values = np.random.default_rng(10), LAYERS[0].values.reshape(-1)
    guided = 0.6 * values * np.exp(draw.normal(0, 1, len(values)))
    truth = values.mean() / guided.mean()
    chosen = draw.integers(0, len(values), (REPETITIONS, count))
    # A bootstrap mean is a product with how often each injection was drawn: which `draw_layers` draws alike for every sample.
    rows = np.random.default_rng([0, 1, 0]).integers(0, count, (resamples, count)) + count * np.arange(resamples)[:, None]
    together = np.bincount(rows.reshape(-1), minlength=resamples * count).reshape(resamples, count) / count
    pairs = []
    for population in (values, guided):
        drawn = population[chosen]
        generator = np.random.default_rng([0, 0])
        plain, unseen_times = together @ drawn.T, generator.binomial(count + 1, 1 / (count + 1), resamples)[:, None]
        unseen = (plain * (count + 1 - unseen_times) + unseen_times * 2 * drawn.max(axis=1)) / (count + 1)
        pairs.append([Draws(*parts, count) for parts in zip(drawn.mean(axis=1), plain.T, unseen.T, strict=True)])
    for place in range(3):
        for mine, population in zip(pairs, (values, guided), strict=True):
            (theirs,) = draw_layers({"d": [as_result(population[chosen[place]])]}, resamples, 0)["d"]["delta_loss"]
            assert np.allclose(mine[place].plain, theirs.plain)
            assert np.allclose(mine[place].unseen, theirs.unseen)
            assert np.allclose(weigh([theirs], [3.0]).unseen, theirs.unseen)

    def coverage(pairs):
        estimates = [improvement(*pair, 0.99) for pair in zip(*pairs, strict=True)]
        return np.mean([estimate.low <= truth <= estimate.high for estimate in estimates])

    assert coverage(pairs) >= ENOUGH
    assert coverage([[replace(draws, unseen=draws.plain) for draws in side] for side in pairs]) < 0.97


@pytest.mark.parametrize("rate", [0.0005, 0.001, 0.003, 0.01, 0.05, 0.3])
def test_a_uniform_plans_rates_hold(rate):
    # Not by repetition: of every number of hits the chance is known.
    hits = np.arange(stats.binom.isf(1e-12, 4096, rate) + 1).astype(int)
    held = [found.low <= rate <= found.high for found in (rate_estimate(int(number), 4096) for number in hits)]
    assert stats.binom.pmf(hits, 4096, rate) @ held >= ENOUGH


@pytest.mark.parametrize("rate", [0.0005, 0.003, 0.05, 0.3])
def test_a_stratified_plans_rates_hold(rate):
    population, draw = LAYERS[0], np.random.default_rng(11)
    # The largest changes, where these are few, so that hits come from few bits and images; else any.
    severity = population.values if rate < 0.1 else draw.random(population.values.shape)
    hits = severity >= np.quantile(severity, 1 - rate)
    assert hits.mean() == pytest.approx(rate, rel=0.02)
    spread = population.values.std(axis=1)
    counts = spread_over_bits(1024, 0.3 * EVEN + 0.7 * spread / spread.sum(), None)
    held = 0
    for _ in range(REPETITIONS):
        found = rate_interval(sample_mean(population.strata(draw, counts, hits), EVEN, [2.0] * BITS))
        held += found.low <= hits.mean() <= found.high
    assert held / REPETITIONS >= ENOUGH


def test_an_estimate_holds_the_error_of_its_sampling_alone():
    values = np.random.default_rng(0).exponential(size=400)
    error = values.std(ddof=1) / 20
    found = mean_estimate(values)
    assert found.error == pytest.approx(error)
    assert found.high - found.value > 2.576 * error  # the interval also holds what was not seen
    assert found.times(-100).error == pytest.approx(100 * error)
    assert rate_estimate(5, 400).error == pytest.approx(math.sqrt(5 * 395 / 400**3))
    assert rate_estimate(0, 400).error == 0
    hits = np.repeat([1.0, 0.0], [5, 395])
    assert rate_interval(sample_mean([hits], [1.0], [1.0])).error == pytest.approx(hits.std(ddof=1) / 20)
    assert mean_interval(exact(0.5, 9)).error == 0
    for unknown in (mean_estimate(np.array([1.0])), mean_estimate(np.array([])), rate_estimate(0, 0)):
        assert math.isnan(unknown.error)
        assert "error" not in unknown.as_json()
    assert found.as_json()["error"] == found.error
