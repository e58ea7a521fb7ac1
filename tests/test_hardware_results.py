"""Runs compared under the faults of section hardware, and what tables, figures and the page make of it."""

import json
import math
from pathlib import Path

import pytest

from textguard.analysis.files import load_hardware
from textguard.analysis.hardware import compare_hardware, quantities
from textguard.estimates.statistics import Estimate, ratio_of
from textguard.report.hardware_tables import protection_table, ranking
from textguard.report.rendering import show_estimate


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value, low, high, 10)


def test_a_ratio_adds_distances_in_quadrature():
    found = ratio_of(estimate(8, 4, 16), estimate(2, 1, 4))
    far = math.exp(math.hypot(math.log(2), math.log(2)))
    assert (found.value, found.low, found.high) == pytest.approx((4, 4 / far, 4 * far))
    # The ends that matter for the lower end are the numerator's lower and the denominator's upper.
    assert ratio_of(estimate(8, 4, 8), estimate(2, 2, 2)).low == pytest.approx(2)
    assert ratio_of(estimate(8, 8, 8), estimate(2, 2, 4)).low == pytest.approx(2)
    assert ratio_of(estimate(8, 8, 8), estimate(2, 1, 2)).high == pytest.approx(8)


def test_a_ratio_knows_what_has_no_end():
    assert ratio_of(estimate(8, 0, 16), estimate(2, 1, 4)).low == 0
    assert ratio_of(estimate(8, 4, math.nan), estimate(2, 1, 4)).high == math.inf
    assert math.isnan(ratio_of(estimate(0, 0, 1), estimate(2, 1, 4)).value)


def test_what_faults_do_is_compared_with_the_baseline(runs):
    cells = {cell.variant: cell for cell in compare_hardware(runs, 0.99)}
    assert list(cells) == ["template", "descriptions"]  # the baseline of data set e has no partner
    found = {(ratio.faults, ratio.measure, ratio.place, ratio.points): ratio for ratio in cells["descriptions"].ratios}
    assert found["two_bits", "delta_loss", "overall", None].ratio.value == pytest.approx(2)
    assert found["two_bits", "delta_loss", "overall", None].verdict.startswith("1 training")
    assert found["weight_for_good", "accuracy", "overall", None].ratio.value == pytest.approx(1)
    # The text-guided classifier stands twice the rate: that is better, though its number is larger.
    rate = found["none", "rate", "all", 5.0]
    assert rate.ratio.value == pytest.approx(2)
    assert rate.own.value == pytest.approx(2 * rate.baseline.value)
    assert ("secded(64)", "rate", "all", 1.0) in found


def test_what_protects_is_set_beside_the_classifier_without_it(runs):
    (cell,) = (cell for cell in compare_hardware(runs, 0.99) if cell.variant == "descriptions")
    code, ranger = cell.protected
    assert (code.kind, code.name, code.baseline.bits, code.baseline.comparisons) == ("protection", "secded(64)", 1.125, 0)
    assert code.baseline.gates == pytest.approx(125)
    assert code.rate == 1e-4  # the first at which the baseline loses ten points
    for bought, without in ((code.baseline.sdc, 0.5), (code.own.delta_loss, 3.0)):
        assert (bought.without.value, bought.under.value) == pytest.approx((without, without / 10))
        assert bought.ratio.value == pytest.approx(10)
    assert (ranger.kind, ranger.name, ranger.rate, ranger.own.comparisons) == ("mitigation", "ranger", None, 2e5)
    assert ranger.baseline.sdc.ratio.value == pytest.approx(4)
    assert ranger.own.sdc.ratio.value == pytest.approx(8)
    assert ranger.own.delta_loss.ratio.low < 8 < ranger.own.delta_loss.ratio.high
    table = protection_table(compare_hardware(runs, 0.99), "")
    rows = [row[2:5] for row in table.rows if row[:2] == ["d", cell.backbone]]
    variants = ["baseline", "template", "descriptions"]
    assert rows == [
        *(["secded(64)", variant, "parameters"] for variant in variants),
        *(["ranger", variant, "neurons"] for variant in variants),
    ]


def test_protections_are_not_compared_without_an_unprotected_memory(runs):
    for key in runs:
        path = Path(f"metrics/hardware/{key}.json")
        content = json.loads(path.read_text(encoding="utf-8"))
        content["curves"], content["mitigations"] = content["curves"][1:], []
        path.write_text(json.dumps(content), encoding="utf-8")
    assert not any(cell.protected for cell in compare_hardware(runs, 0.99))


def test_every_quantity_has_a_name_of_its_own(runs):
    run = load_hardware(next(iter(runs)))
    names = [name for name, _ in quantities(run)]
    assert len(set(names)) == len(names) == 2 * 6 + 1 + 4


@pytest.mark.parametrize(
    ("usual", "other", "said"),
    [
        ("better", "better", "the same"),
        ("worse", "better", "reversed"),
        ("better", "worse", "reversed"),
        ("not separable at 99%", "not separable at 99%", "not told"),
        ("better", "not separable at 99%", "not told"),
    ],
)
def test_a_ranking_is_reversed_only_where_both_verdicts_are_firm(usual, other, said):
    assert ranking(usual, other) == said


def test_a_rate_that_was_not_reached_has_a_bound(runs):
    for key in runs:
        path = Path(f"metrics/hardware/{key}.json")
        content = json.loads(path.read_text(encoding="utf-8"))
        content["curves"][0]["losing"][0]["rate"] |= {"value": None, "high": None, "low": 2e-7}
        path.write_text(json.dumps(content), encoding="utf-8")
    (rate,) = (ratio for ratio in compare_hardware(runs, 0.99)[-1].ratios if (ratio.faults, ratio.points) == ("none", 1.0))
    assert show_estimate(rate.own) == "> 2.0e-07"
    assert rate.verdict == "nothing to compare"
