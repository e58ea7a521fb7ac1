"""One campaign from its settings to its result, and what is left of it when it is interrupted."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from textguard.artifacts import read_json
from textguard.assessment import assess
from textguard.errors import CampaignMismatch, UnknownName
from textguard.estimates.summary import Totals, replace_records
from textguard.faults import Campaign, CampaignSettings, FaultModel, profile_ranges
from textguard.faults import campaign as campaign_module
from textguard.faults.execution import RECORD_COLUMNS
from textguard.faults.profiling import largest_outputs

SETTINGS = CampaignSettings(
    injections_per_layer=40, seed=3, enumerate_up_to=1, compare_detectors=["off", "profiled", "fixed:2"], image_batch=3
)


def assert_same_totals(some: dict[str, list[Totals]], others: dict[str, list[Totals]]) -> None:
    assert {name: [layer.as_json() for layer in found] for name, found in some.items()} == {
        name: [layer.as_json() for layer in found] for name, found in others.items()
    }


def test_a_campaign_samples_what_it_cannot_enumerate_under_every_detector(resnet, loader):
    campaign = Campaign(resnet, loader, SETTINGS)
    assert [site.layer for site in campaign.sampled] == ["stem.0", "conv1", "conv2"]
    assert [site.layer for site in campaign.enumerated] == ["fc"]
    assert campaign.eligible == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    result = campaign.run()
    assert list(result.layers) == ["stem.0", "conv1", "conv2", "fc"]
    assert [layer.method for layer in result.layers.values()] == ["sampled"] * 3 + ["exact"]
    assert list(result.records.columns) == RECORD_COLUMNS
    assert list(result.changes) == ["off", "fixed:2"]
    assert list(result.totals) == ["profiled", "off", "fixed:2"]
    for name, changed in result.changes.items():
        alone = Campaign(resnet, loader, replace(SETTINGS, detector=name, compare_detectors=())).run()
        order = ["layer", "index"]
        together = replace_records(result.records, changed).sort_values(order, ignore_index=True)
        expected = alone.records.sort_values(order, ignore_index=True)
        pd.testing.assert_frame_equal(together, expected, rtol=1e-3, atol=1e-5)
        assert_same_totals({name: result.totals[name]}, alone.totals)


def test_a_campaigns_result_is_what_assess_tables(resnet, loader):
    result = Campaign(resnet, loader, SETTINGS).run()
    options = {name: value for name, value in vars(SETTINGS).items() if name != "compare_detectors"}
    table = assess(resnet, loader, **options).table.set_index("layer")
    for layer, found in result.layers.items():
        assert table.loc[layer, "delta_loss"] == found.delta_loss.value
        assert table.loc[layer, "injections"] == found.injections


def test_ranges_come_from_the_loader_unless_they_are_given(resnet, loader):
    profiled = largest_outputs(profile_ranges(resnet, loader))
    assert Campaign(resnet, loader, SETTINGS).limits["profiled"] == profiled
    doubled = {layer: 2 * limit for layer, limit in profiled.items()}
    limits = Campaign(resnet, loader, SETTINGS, doubled).limits
    assert limits == {"profiled": doubled, "off": dict.fromkeys(doubled, math.inf), "fixed:2": dict.fromkeys(doubled, 2.0)}


def test_faults_in_weights_are_limited_by_the_largest_weight(resnet, loader):
    campaign = Campaign(resnet, loader, CampaignSettings(fault_model=FaultModel(target="weight")))
    weights = {site.layer: resnet.get_submodule(site.layer).weight for site in campaign.engine.sites}
    assert campaign.limits["profiled"] == {layer: float(weight.detach().abs().max()) for layer, weight in weights.items()}


def test_an_interrupted_campaign_goes_on_with_the_layers_that_are_left(resnet, loader, tmp_path, monkeypatch):
    undisturbed = Campaign(resnet, loader, SETTINGS)
    records, changes = undisturbed.sample_layers()
    totals, rescaled = undisturbed.enumerate_layers(), undisturbed.rescale_last_layer()

    def stop_at_the_second(*arguments, enumerate_layer=campaign_module.enumerate_layer, **options):
        if list(tmp_path.glob("exact-*.json")):
            raise KeyboardInterrupt
        return enumerate_layer(*arguments, **options)

    monkeypatch.setattr(campaign_module, "enumerate_layer", stop_at_the_second)
    first = Campaign(resnet, loader, SETTINGS)
    first.sample_layers(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        first.enumerate_layers(tmp_path)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"round-0", "detector-0", "detector-1", "exact-0-3.json"}

    second = Campaign(resnet, loader, SETTINGS)
    monkeypatch.setattr(second.engine, "run", None)  # nothing is left to inject
    monkeypatch.setattr("textguard.faults.sampling.measure_pace", lambda *_, **__: 1.0)
    again, changed = second.sample_layers(tmp_path)
    pd.testing.assert_frame_equal(again, records)
    assert changed.keys() == changes.keys()
    for name, part in changes.items():
        pd.testing.assert_frame_equal(changed[name], part)
    assert_same_totals(second.enumerate_layers(tmp_path), totals)
    # What was taken from a file has the types of what was not, so that the same bytes are written of it.
    assert second.rescale_last_layer(tmp_path) == rescaled
    monkeypatch.setattr(campaign_module, "rescale_last_layer", None)  # a second time, it is taken from its file
    again = second.enumerate_layers(tmp_path), second.rescale_last_layer(tmp_path)
    assert second.as_json(*again) == undisturbed.as_json(totals, rescaled)
    assert read_json(tmp_path / "exact-0-3.json", "") == totals["profiled"][0].as_json()


def test_shards_of_a_campaign_with_other_settings_are_refused(resnet, loader, tmp_path):
    settings = replace(SETTINGS, compare_detectors=())
    Campaign(resnet, loader, settings).run(tmp_path)
    with pytest.raises(CampaignMismatch, match="plan was"):
        Campaign(resnet, loader, replace(settings, seed=4)).run(tmp_path)


def test_a_campaign_of_enumerated_layers_alone_has_no_records(resnet, loader):
    result = Campaign(resnet, loader, replace(SETTINGS, kinds=["Linear"])).run()
    assert list(result.layers) == ["fc"]
    assert result.records.empty
    assert all(part.empty for part in result.changes.values())


def test_settings_are_checked_before_images_are_looked_at(resnet, loader, monkeypatch):
    monkeypatch.setattr(campaign_module, "look", None)
    profiled = largest_outputs(profile_ranges(resnet, loader))
    for wrong in ({"plan": "even"}, {"compare_detectors": ["tmr"]}, {"number_format": "fp12"}, {"engine": "hooks"}):
        with pytest.raises(UnknownName, match=next(iter(wrong)).removeprefix("compare_").removesuffix("s")):
            Campaign(resnet, loader, replace(SETTINGS, **wrong), profiled)


def test_a_pace_is_measured_on_images_that_need_not_be_eligible(resnet, loader):
    campaign = Campaign(resnet, loader, SETTINGS)
    runs, run = [], campaign.engine.run
    campaign.engine.run = lambda images, faults: runs.append(faults) or run(images, faults)
    assert campaign.pace(injections_per_layer=2, sites=campaign.engine.sites[:1]) > 0
    assert [faults.position.unique().tolist() for faults in runs] == [[0], [0]]  # the first time warms up
    assert "chances" not in vars(campaign)
    campaign.chances = np.zeros(12)
    assert campaign.pace() > 0
