"""Figures of a whole grid: their numbers are those of the results, and their titles say no more than these."""

import re
from dataclasses import replace

import pytest

from conftest import REPOSITORY
from textguard.analysis.files import load_cells, load_results
from textguard.estimates.statistics import Estimate
from textguard.params import load_params
from textguard.report.drawing import draw
from textguard.report.figures import group
from textguard.report.grid_figures import _range_effect_in_words, draw_improvement, draw_tradeoff
from textguard.report.hardware_figures import _half_in_words, draw_protection_cost
from textguard.report.theme import styles


@pytest.fixture
def demo(monkeypatch):
    """The committed results of the demo: parameters, results and cells."""
    monkeypatch.chdir(REPOSITORY)
    params = load_params()
    return params, load_results(params.runs), load_cells(params.runs)


def test_the_tradeoff_is_between_trainings_of_one_seed(demo):
    params, results, cells = demo
    variants = [variant for variants in group(list(results.values()), params).values() for variant in variants]
    figure, numbers = draw_tradeoff(variants, cells)
    assert len(numbers) == sum(result.variant != "baseline" for result in results.values())
    for row in numbers.itertuples():
        own = results[row.run]
        baseline = results[own.improvement.baseline]
        assert (baseline.seed, baseline.backbone) == (own.seed, own.backbone)
        assert row.top1_points == pytest.approx(100 * (own.top1.value - baseline.top1.value))
        assert row.delta_loss_ratio == own.improvement.delta_loss.overall.value
    told = sum(cell.first.verdict.delta_loss.overall == "better" for cell in cells)
    assert f"DeltaLoss over all layers is lower in {told} of {len(cells)} comparisons" in figure.get_label()
    own = re.findall('data-mark="digits resnet18 descriptions"><title>(.*?)<', draw(figure, "svg", 60).decode())
    seeds = numbers[(numbers["variant"] == "descriptions") & (numbers["backbone"] == "resnet18")]["seed"]
    assert [said.partition(":")[0] for said in own] == [f"descriptions, seed {seed}" for seed in seeds] + ["descriptions"] * 3


def test_the_improvement_shows_three_measures_of_each_network_and_what_is_published(demo):
    params, _, cells = demo
    look = styles(params.variants, {})
    figure, numbers = draw_improvement(cells, look, ["descriptions"])
    assert len(numbers) == len(draw_improvement(cells, look)[1]), "numbers of all variants, drawn or not"
    own, published = figure.axes
    assert own.get_xlim() == published.get_xlim() == (0.1, 1000)
    names = [label.get_text() for label in own.get_yticklabels()]
    assert sorted(names) == sorted(
        [f"{name}, descriptions" for name in ("SDC", "DeltaLoss", "FIT")] * 2
        + ["ResNet-18 on digits, 3 trainings", "MobileNet-V2 on digits, 3 trainings"]
    )
    assert {text.get_text() for text in published.texts} == {"ratio", "2.87", "1.91", "3.92", "2.43"}


def test_one_training_gives_no_verdict(demo):
    params, _, cells = demo
    one = cells[0].model_copy(update={"seeds": [0]})
    said = "1 training: differences between trainings are not in this interval"
    verdicts = {
        name: getattr(one.first.verdict, name).model_copy(update=dict.fromkeys(("overall", "by_neurons"), said))
        for name in ("sdc", "delta_loss")
    }
    first = one.first.model_copy(update={"verdict": one.first.verdict.model_copy(update=verdicts)})
    one = one.model_copy(update={"detectors": {"profiled": first}})
    figure, _ = draw_improvement([one], styles(params.variants, {}))
    assert figure.get_label().count("has no verdict from 1 training") == 3
    assert "lower" not in figure.get_label()


@pytest.mark.parametrize(
    ("loss", "sdc", "said"),
    [
        ((0.9, 0.8, 1.0), (0.8, 0.4, 0.9), "DeltaLoss and SDC of the head go with the largest logit"),
        (
            (0.9, 0.8, 1.0),
            (0.2, -0.7, 0.8),
            "DeltaLoss of the head goes with the largest logit, and SDC cannot be told to go with",
        ),
        ((-0.9, -1.0, -0.8), (0.2, -0.7, 0.8), "DeltaLoss of the head goes against the largest logit"),
        ((0.9, float("nan"), float("nan")), (0.9, float("nan"), float("nan")), "cannot be told from these 24 classifiers"),
    ],
)
def test_a_correlation_is_told_by_its_interval(loss, sdc, said):
    assert said in _range_effect_in_words(Estimate(*loss, 24), Estimate(*sdc, 24))


def test_what_half_of_sdc_costs_is_said_from_the_lowest_to_the_highest_training(demo):
    params, results, _ = demo
    variants = group([result for result in results.values() if result.backbone == "resnet18"], params)["digits", "resnet18"]
    figure, numbers = draw_protection_cost(variants, "ResNet-18 on digits")
    costs = numbers[numbers["covered"] >= 50].groupby("run")["cost"].min()
    assert len(costs) == 12
    words = f"{costs.min():.2g} to {costs.max():.2g} % of the multiply-adds, in 12 trainings"
    assert figure.get_label() == f"ResNet-18 on digits: half of SDC is in layers with {words}"
    alone = [replace(variant, results=variant.results[:1]) for variant in variants]
    assert "of a single training is chosen on its own faults: optimistic" in " ".join(
        draw_protection_cost(alone, "t")[0].get_supxlabel().split()
    )
    assert _half_in_words([]) == "no SDC was seen"
