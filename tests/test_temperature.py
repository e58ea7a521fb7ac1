"""Last layers with their logits scaled: the curve over temperatures, the folded scale, and what results say of both."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from conftest import DigitsNetwork, digits, trained
from stored_grid import BASELINE_LAYERS, GUIDED_LAYERS, INJECT, STATISTICS, run_of, store
from textguard.analysis.files import load_cells, load_result
from textguard.analysis.results import write_results
from textguard.analysis.temperature import at_temperature
from textguard.errors import InvalidArtifact
from textguard.estimates.summary import Totals
from textguard.faults import Campaign, CampaignSettings, profile_ranges
from textguard.faults.exact import TEMPERATURES, flip_logits
from textguard.faults.profiling import largest_outputs
from textguard.schema.base import read
from textguard.schema.campaign import Rescaled, StoredCampaign
from textguard.schema.results import CellUnderDetector
from textguard.vision.classifiers import TextGuidedClassifier
from textguard.vision.folding import fold_scale

SETTINGS = CampaignSettings(enumerate_up_to=1, compare_detectors=["fixed:65536", "off"], injections_per_layer=1)
GUIDED = "d-resnet18-descriptions-0"


class Divided(nn.Module):
    """A classifier whose logits are divided by a number, which changes none of its predictions."""

    def __init__(self, classifier: nn.Module, divisor: float) -> None:
        super().__init__()
        self.classifier, self.factor = classifier, 1 / divisor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(images) * self.factor


@pytest.fixture(scope="module")
def guided() -> nn.Module:
    torch.manual_seed(0)
    images, labels = digits()
    directions = F.normalize(torch.randn(10, 16), dim=1)
    return trained(TextGuidedClassifier(DigitsNetwork(16), 10, 16, directions), images[:-200], labels[:-200])


@pytest.fixture(scope="module")
def loader(data) -> DataLoader:
    return DataLoader(TensorDataset(*data), batch_size=64)


def campaign(model: nn.Module, loader: DataLoader, **changes) -> Campaign:
    return Campaign(model, loader, replace(SETTINGS, **changes))


def direct(campaign: Campaign, detector: str, temperature: float) -> float:
    """The sum of DeltaLoss with another factor behind the last layer."""
    engine, total = campaign.engine, 0.0
    for start in range(0, len(campaign.eligible), 64):
        chosen = campaign.eligible[start : start + 64]
        images, labels = (torch.stack([campaign.loader.dataset[index][part] for index in chosen]) for part in (0, 1))
        outputs = []
        engine.observe(images, lambda _, output, here=outputs: here.append(output))
        limit = campaign.limits[detector][engine.sites[-1].layer]
        *_, delta_loss = flip_logits(engine, outputs[-1], engine.factor_behind_last() * temperature, labels, limit)
        total += float(delta_loss.double().sum())
    return total


def stored_curve(campaign: Campaign, detector: str) -> Rescaled:
    return Rescaled.model_validate_json(json.dumps(campaign.rescale_last_layer()[detector]))


def mean(totals: Totals) -> float:
    return float(totals.delta_loss.sum() / (totals.faults - totals.nonfinite).sum())


@pytest.mark.parametrize("text", ["fp32", "int(8)", "bfp(8,7,4)"])
@pytest.mark.parametrize("which", ["network", "guided"])
def test_the_curve_is_an_enumeration_with_another_factor(which, text, request, loader):
    found = campaign(request.getfixturevalue(which), loader, number_format=text)
    curves = found.rescale_last_layer()
    for name in ("profiled", "fixed:65536"):
        expected = [direct(found, name, temperature) for temperature in TEMPERATURES]
        np.testing.assert_allclose(curves[name]["delta_loss"], expected, rtol=1e-3)
        assert expected[0] < expected[12] / 10
        assert curves[name]["delta_loss"][12] == pytest.approx(sum(found.enumerate_layers()[name][-1].delta_loss), rel=1e-4)


def test_without_a_detector_the_faults_that_count_stay_the_same(network, loader):
    """Those above the largest number of fp32 at temperature 64 as well: DeltaLoss is then that of the largest logits."""
    found = campaign(network, loader)
    sums = found.rescale_last_layer()["off"]["delta_loss"]
    assert sums[12] == pytest.approx(direct(found, "off", 1.0), rel=1e-6)
    np.testing.assert_allclose(np.divide(sums, TEMPERATURES), sums[12], rtol=1e-6)


@pytest.mark.parametrize("which", ["network", "guided"])
def test_between_stored_temperatures_the_curve_is_within_1_percent(which, request, loader):
    found = campaign(request.getfixturevalue(which), loader)
    totals = found.enumerate_layers()
    for name in ("profiled", "fixed:65536"):
        known, curve = totals[name][-1], stored_curve(found, name)
        for low, high in pairwise(TEMPERATURES[2:-2]):
            between = math.sqrt(low * high)  # farthest from both
            assert at_temperature(known, curve, between).delta_loss.sum() == pytest.approx(
                direct(found, name, between), rel=0.01
            ), (name, between)
        assert at_temperature(known, curve, 1.0).delta_loss.tolist() == known.delta_loss.tolist()


def test_beyond_stored_temperatures_and_without_harm_nothing_is_said():
    totals = Totals("fc", 1, *(np.array([number]) for number in (9, 0, 0, 0, 0, 3.0)))
    curve = Rescaled(factor=1.0, temperatures=[0.5, 1.0, 2.0], delta_loss=[1.0, 3.0, 9.0])
    assert [at_temperature(totals, curve, t).delta_loss[0] for t in (0.5, 2.0)] == pytest.approx([1, 9])
    for wrong in (0.49, 2.01, math.nan, 0.0):
        assert np.isnan(at_temperature(totals, curve, wrong).delta_loss).all()
    harmless = Rescaled(factor=1.0, temperatures=[0.5, 1.0, 2.0], delta_loss=[0.0, 0.0, 0.0])
    assert np.isnan(at_temperature(replace(totals, delta_loss=np.zeros(1)), harmless, 1.0).delta_loss).all()


def test_a_constant_behind_a_classifier_is_no_gain_at_the_same_temperature(network, loader):
    plain, divided = campaign(network, loader), campaign(Divided(network, 4.7), loader)
    for name in ("profiled", "fixed:65536"):
        own, other = (one.enumerate_layers()[name][-1] for one in (plain, divided))
        assert mean(own) / mean(other) > 2
        assert mean(own) / mean(at_temperature(other, stored_curve(divided, name), 4.7)) == pytest.approx(1, rel=0.01)
        assert (own.mismatches == other.mismatches).all()


@pytest.mark.parametrize("text", ["fp32", "fp16", "int(4)", "bfp(8,7,4)"])
def test_a_folded_head_is_enumerated_as_the_deployed_classifier(text, guided, loader):
    own = campaign(guided, loader, number_format=text)
    deployed = campaign(fold_scale(guided), loader, number_format=text)
    assert deployed.engine.factor_behind_last() == 1
    assert deployed.eligible == own.eligible
    rescaled, expected = own.rescale_last_layer(), deployed.enumerate_layers()
    for name, (known,) in ((name, layers[-1:]) for name, layers in expected.items()):
        folded = Totals.from_json(rescaled[name]["folded"])
        for count in ("detected", "mismatches", "nonfinite", "masked"):
            # Values are rounded before and after they are scaled; the deployed classifier rounds them once. int(4) scales with
            # them, other formats round to other values.
            different = 0 if text == "int(4)" else 0.005 * known.faults[0]
            np.testing.assert_allclose(getattr(folded, count), getattr(known, count), atol=different)
        assert mean(folded) == pytest.approx(mean(known), rel=0.02)
    assert [one.get("folded") for one in deployed.rescale_last_layer().values()] == [None] * 3


def test_folding_changes_what_faults_hit_and_no_logit(guided, loader, data):
    before = {name: weight.clone() for name, weight in guided.state_dict().items()}
    folded = fold_scale(guided)
    torch.testing.assert_close(folded(data[0]), guided(data[0]))
    assert folded.logit_scale.item() == 0
    assert all(torch.equal(weight, before[name]) for name, weight in guided.state_dict().items())
    own, deployed = (largest_outputs(profile_ranges(model, loader)) for model in (guided, folded))
    scale = guided.logit_scale.exp().item()
    assert scale > 2
    assert deployed == pytest.approx({**own, "head": scale * own["head"]})


def test_classifiers_without_a_scale_are_not_copied(network):
    assert fold_scale(network) is network


def test_a_last_layer_that_is_sampled_or_has_more_behind_it_has_no_curve(network, loader):
    assert campaign(network, loader, enumerate_up_to=0).rescale_last_layer() == {}
    behind = nn.Sequential(network, nn.Linear(10, 10), nn.ReLU()).eval()
    assert campaign(behind, loader, enumerate_up_to=10**9).rescale_last_layer() == {}


# What stage results makes of it. Largest logits in tests/stored_grid.py: 3 of baselines, 12 x 4 of text-guided runs.


def rescale(key: str, slope: float, folded: float | None = None, **changes) -> None:
    """Give a stored campaign's last layer a curve of this slope, and its folded twin so many times its DeltaLoss."""
    file = Path("metrics/runs") / key / "campaign.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    temperatures = [2.0**power for power in range(-6, 7)]
    stored["rescaled"] = {}
    for name, layers in stored["exact"].items():
        known = sum(layers[-1]["delta_loss"])
        found = {"factor": 12.0, "temperatures": temperatures, "delta_loss": [known * t**slope for t in temperatures]}
        if folded:
            found["folded"] = {**layers[-1], "delta_loss": [folded * loss for loss in layers[-1]["delta_loss"]]}
        stored["rescaled"][name] = found | changes
    file.write_text(json.dumps(stored), encoding="utf-8")


def test_results_hold_the_head_at_the_baselines_temperature_and_folded(runs):
    write_results(runs, STATISTICS, INJECT)
    assert load_result(GUIDED).detectors["off"].rescaled is None
    assert "rescaled" not in Path(f"metrics/results/{GUIDED}.json").read_text(encoding="utf-8")

    rescale(GUIDED, slope=1.5, folded=5.0)
    write_results(runs, STATISTICS, INJECT)
    baseline, result = load_result("d-resnet18-baseline-0"), load_result(GUIDED)
    assert (baseline.largest_logit, result.largest_logit) == (3.0, 48.0)
    (cell,) = (cell for cell in load_cells(runs) if cell.variant == "descriptions")
    for found in (result.detectors["off"], cell.detectors["off"]):
        assert found.improvement.delta_loss.head.value == pytest.approx(3.0 / 1.2)
        assert found.rescaled.same_temperature.value == pytest.approx(3.0 / (1.2 * (3 / 48) ** 1.5))
        assert found.rescaled.folded.value == pytest.approx(3.0 / (5 * 1.2))
        assert found.rescaled.same_temperature.exact
    (other,) = (cell for cell in load_cells(runs) if cell.variant == "template")
    assert other.detectors["off"].rescaled is None


def test_a_folded_campaign_has_the_logits_in_its_ranges(runs):
    file = Path("metrics/runs") / GUIDED / "campaign.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    stored["settings"]["fold_scale"] = True
    file.write_text(json.dumps(stored), encoding="utf-8")
    write_results(runs, STATISTICS, INJECT)
    assert load_result(GUIDED).largest_logit == 4.0
    assert load_result(GUIDED).scale == 12.0


def test_temperatures_too_far_apart_are_null(runs):
    rescale(GUIDED, slope=1.0)
    file = Path("metrics/runs") / GUIDED / "ranges.csv"
    file.write_text(file.read_text(encoding="utf-8").replace(",4.0,", ",400.0,"), encoding="utf-8")
    write_results(runs, STATISTICS, INJECT)
    assert math.isnan(load_result(GUIDED).detectors["profiled"].rescaled.same_temperature.value)


def test_over_trainings_a_cell_has_what_all_of_them_have(runs):
    keys = [GUIDED]
    for seed in (1, 2):
        for variant, layers in (("baseline", BASELINE_LAYERS), ("descriptions", GUIDED_LAYERS)):
            key = f"d-resnet18-{variant}-{seed}"
            runs[key] = run_of("d", "resnet18", variant, seed)
            store(key, runs[key], layers, 97, seed)
        keys.append(key)

    def found() -> CellUnderDetector:
        write_results(runs, STATISTICS, INJECT)
        (cell,) = (cell for cell in load_cells(runs) if cell.variant == "descriptions")
        return cell.detectors["profiled"]

    for slope, key in zip((1.0, 1.5, 0.5), keys, strict=True):
        assert found().rescaled is None
        rescale(key, slope)
    same = found().rescaled.same_temperature
    assert same.value == pytest.approx(3.0 / (1.2 * (3 / 48)))  # the geometric mean
    assert same.low < same.value < same.high
    assert found().rescaled.folded is None
    ranges = Path("metrics/runs") / GUIDED / "ranges.csv"
    ranges.write_text(ranges.read_text(encoding="utf-8").replace(",4.0,", ",400.0,"), encoding="utf-8")
    assert math.isnan(found().rescaled.same_temperature.value)


IMPOSSIBLE = {
    "fewer sums": ({"delta_loss": [1.0]}, "must be as many"),
    "no 1": ({"temperatures": [1.1 * 2.0**power for power in range(-6, 7)]}, "must be above 0 and ascend, and hold 1"),
    "0": ({"temperatures": [float(number) for number in range(13)]}, "must be above 0 and ascend, and hold 1"),
    "descending": ({"temperatures": [2.0**-power for power in range(-6, 7)]}, "must be above 0 and ascend, and hold 1"),
    "negative": ({"delta_loss": [-1.0] * 13}, "greater than or equal to 0"),
    "another campaign": ({"delta_loss": [1.0] * 13}, "rescaled.profiled has another DeltaLoss at temperature 1"),
    "a key too many": ({"bias": 1.0}, "no such key"),
}


@pytest.mark.parametrize(("changes", "said"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_curves_that_cannot_be_are_refused(runs, changes, said):
    rescale(GUIDED, slope=1.0, **changes)
    with pytest.raises(InvalidArtifact) as caught:
        read(Path("metrics/runs") / GUIDED / "campaign.json", "inject", StoredCampaign)
    assert said in str(caught.value)


@pytest.mark.parametrize("place", ["folded", "detector", "layer"])
def test_curves_of_other_layers_and_detectors_are_refused(runs, place):
    rescale(GUIDED, slope=1.0, folded=2.0)
    file = Path("metrics/runs") / GUIDED / "campaign.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    if place == "folded":
        stored["rescaled"]["profiled"]["folded"]["layer"] = "backbone.fc"
    elif place == "detector":
        del stored["rescaled"]["off"]
    else:
        stored["exact"] = {name: [] for name in stored["exact"]}
    file.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(InvalidArtifact, match=r"rescaled"):
        read(file, "inject", StoredCampaign)
