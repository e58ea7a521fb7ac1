"""Campaigns: the same records however they are run, shards that survive an interruption, processes that share the work."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from conftest import REPOSITORY
from smoke_grid import environment
from textguard.artifacts import read_json, read_parquet, write_parquet
from textguard.errors import CampaignMismatch, InvalidParameter
from textguard.estimates.statistics import mean_interval
from textguard.estimates.summary import replace_records, summarise
from textguard.faults.damage import SINGLE_FLIP, FaultModel
from textguard.faults.detectors import detector_limits
from textguard.faults.engines import make_engine
from textguard.faults.execution import RECORD_COLUMNS, run_campaign
from textguard.faults.formats import FP32, parse_format
from textguard.faults.plans import PLAN_COLUMNS, draw_plan
from textguard.faults.profiling import eligible_images, image_chances, loader_of, profile_activations, profile_ranges, top2diff
from textguard.faults.sampling import Design, rerun_changed, run_design

# What must agree exactly; golden values and losses may differ by roundings, for engines and batch sizes add up in other orders.
EXACT = [*PLAN_COLUMNS, "detected", "mismatch"]
CLOSE = {"rtol": 1e-3, "atol": 1e-5}
TARGETS = {"bits": FaultModel(bits=2), "values": FaultModel(values=2), "both": FaultModel(bits=3, values=2)}


@pytest.fixture
def labels(resnet, images) -> torch.Tensor:
    """What the model says of the images, but for two where it is wrong."""
    found = resnet(images).argmax(dim=1)
    found[[2, 7]] = (found[[2, 7]] + 1) % 4
    return found


@pytest.fixture
def loader(images, labels) -> DataLoader:
    return loader_of(images, labels, 5)


class Campaign:
    """A campaign on the small residual network, and what can be changed about it."""

    def __init__(self, model, loader, **changes):
        self.model, self.loader = model, loader
        self.name, self.batch_size, self.image_batch = "replay", 16, 3
        self.fault_model, self.number_format = SINGLE_FLIP, FP32
        # A little more than was profiled: at just the largest logit, a detected fault would tie with it.
        self.seed, self.per_layer, self.shard_dir, self.scale = 4, 20, None, 1.01
        self.images, self.design = "uniform", Design("neyman", 200, 64, "never", 0.99, 4)
        for name, value in changes.items():
            assert hasattr(self, name)
            setattr(self, name, value)
        ranges = profile_ranges(model, loader)
        self.profiled = dict(zip(ranges["layer"], ranges["max_abs"], strict=True))
        self.limits = {layer: limit * self.scale for layer, limit in self.profiled.items()}
        self.engine = make_engine(
            self.name,
            model,
            loader.dataset[0][0],
            self.batch_size,
            number_format=self.number_format,
            profiled=self.profiled,
            target=self.fault_model.target,
        )
        self.chances = image_chances(self.engine, loader, self.images)
        self.plan = draw_plan(self.engine.sites, self.chances, self.per_layer, self.seed, self.fault_model, self.number_format)
        self.neurons = {site.layer: site.neurons for site in self.engine.sites}

    def run(self, plan=None) -> pd.DataFrame:
        return run_campaign(
            self.engine,
            self.loader,
            self.plan if plan is None else plan,
            self.limits,
            image_batch=self.image_batch,
            fault_model=self.fault_model,
            shard_dir=self.shard_dir,
        )

    def run_design(self) -> pd.DataFrame:
        return run_design(
            self.engine,
            self.engine.sites,
            self.loader,
            self.chances,
            self.limits,
            self.design,
            image_batch=self.image_batch,
            fault_model=self.fault_model,
            shard_dir=self.shard_dir,
        )


def count_runs(engine, fail_at=None) -> list[int]:
    """The number of faults in each of an engine's runs from now on; the run with number `fail_at` is interrupted."""
    runs, run = [], engine.run

    def count_and_run(images, faults):
        if len(runs) == fail_at:
            raise KeyboardInterrupt
        runs.append(len(faults.position))
        return run(images, faults)

    engine.run = count_and_run
    return runs


def assert_same_records(a: pd.DataFrame, b: pd.DataFrame):
    assert list(a.columns) == list(b.columns) == RECORD_COLUMNS
    pd.testing.assert_frame_equal(a[EXACT], b[EXACT])
    inexact = [column for column in RECORD_COLUMNS if column not in (*EXACT, "masked")]
    pd.testing.assert_frame_equal(a[inexact], b[inexact], **CLOSE)
    for records in (a, b):
        hidden = records[records["masked"]]
        assert (hidden["faulty_loss"] == hidden["golden_loss"]).all()
        assert not hidden["mismatch"].any()


# The same records, however they are made.


@pytest.mark.parametrize("fault_model", [SINGLE_FLIP, *TARGETS.values()], ids=str)
def test_a_campaign_gives_the_same_records_for_any_batching_and_all_engines(resnet, loader, fault_model):
    reference = Campaign(resnet, loader, name="pytorchfi", fault_model=fault_model).run()
    assert len(reference) == 4 * 20 * fault_model.values * fault_model.bits
    assert 0 < reference["detected"].mean() < 1
    assert 0 < reference["mismatch"].mean() < 1
    batchings = [("replay", 1, 1), ("replay", 5, 7), ("replay", 100, 1000), ("whole", 100, 4), ("whole", 2, 1000)]
    for name, image_batch, batch_size in batchings:
        changes = {"name": name, "image_batch": image_batch, "batch_size": batch_size, "fault_model": fault_model}
        assert_same_records(Campaign(resnet, loader, **changes).run(), reference)


@pytest.mark.parametrize("fault_model", [SINGLE_FLIP, TARGETS["both"]], ids=str)
def test_records_come_in_the_order_of_the_plan_and_do_not_depend_on_it(resnet, loader, fault_model):
    campaign = Campaign(resnet, loader, fault_model=fault_model)
    reference = campaign.run()
    pd.testing.assert_frame_equal(reference[PLAN_COLUMNS], campaign.plan)
    shuffled = campaign.plan.sample(frac=1, random_state=0)
    records = campaign.run(shuffled)
    pd.testing.assert_frame_equal(records[PLAN_COLUMNS], shuffled)
    assert_same_records(records.sort_index(), reference)
    # Half of the injections, and an index that counts nothing.
    part = campaign.plan[campaign.plan["index"] % 2 == 0]
    assert_same_records(campaign.run(part), reference.loc[part.index])
    unnamed = part.set_index(np.zeros(len(part), dtype=np.int64))
    assert_same_records(campaign.run(unnamed).reset_index(drop=True), reference.loc[part.index].reset_index(drop=True))


def test_all_engines_replay_a_saved_plan(resnet, loader, tmp_path):
    campaign = Campaign(resnet, loader)
    write_parquet(tmp_path / "plan.parquet", campaign.plan)
    plan = read_parquet(tmp_path / "plan.parquet", "inject", PLAN_COLUMNS)
    pd.testing.assert_frame_equal(plan, campaign.plan)
    reference = campaign.run()
    for name in ("replay", "whole", "pytorchfi"):
        assert_same_records(Campaign(resnet, loader, name=name).run(plan), reference)


def test_records_are_what_a_damaged_network_does(resnet, images, labels, loader):
    campaign = Campaign(resnet, loader, per_layer=6)
    golden = resnet(images).detach()
    for _, record in campaign.run().iterrows():
        limit, found = campaign.limits[record["layer"]], {}

        def damage(module, inputs, output, record=record, limit=limit, found=found):
            output = output.clone()
            flat = output.view(-1)
            found["golden"] = float(flat[record["neuron"]])
            word = np.float32(found["golden"]).view(np.uint32) ^ np.uint32(1 << record["bit"])
            value = float(word.view(np.float32))
            found["detected"] = not abs(value) <= limit
            found["faulty"] = (-limit if value < 0 else limit) if found["detected"] else value
            flat[record["neuron"]] = found["faulty"]
            return output

        number = record["image"]
        with torch.no_grad():
            handle = resnet.get_submodule(record["layer"]).register_forward_hook(damage)
            logits = resnet(images[number : number + 1])
            handle.remove()
        assert record["golden_value"] == pytest.approx(found["golden"], rel=1e-4, abs=1e-6)
        assert record["faulty_value"] == pytest.approx(found["faulty"], rel=1e-3, abs=1e-6)
        assert record["detected"] == found["detected"]
        assert record["mismatch"] == (int(logits.argmax()) != int(golden[number].argmax()))
        for column, row in (("golden_loss", golden[number : number + 1]), ("faulty_loss", logits)):
            assert record[column] == pytest.approx(float(F.cross_entropy(row, labels[number : number + 1])), rel=1e-3, abs=1e-5)


# Injections with several rows in the plan.


@pytest.mark.parametrize("name", TARGETS)
def test_injections_with_several_rows_have_one_record_per_row_and_count_once(resnet, loader, name):
    model = TARGETS[name]
    campaign = Campaign(resnet, loader, fault_model=model, per_layer=30)
    records = campaign.run()
    assert len(records) == len(campaign.plan) == 4 * 30 * model.bits * model.values
    for (layer, _), injection in records.groupby(["layer", "index"]):
        assert len(injection) == model.bits * model.values
        assert injection["neuron"].nunique() == model.values
        for column in ("image", "masked", "golden_loss", "faulty_loss", "mismatch"):
            assert injection[column].nunique(dropna=False) == 1
        for _, value in injection.groupby("neuron"):
            assert len(value) == model.bits
            golden, faulty, detected = (value[column].to_numpy() for column in ("golden_value", "faulty_value", "detected"))
            assert (golden == golden[0]).all()
            word = golden[:1].astype(np.float32).view(np.uint32) ^ np.uint32(sum(1 << bit for bit in value["bit"]))
            flipped, limit = float(word.view(np.float32)[0]), campaign.limits[layer]
            inside = abs(flipped) <= limit
            assert (detected == (not inside)).all()
            expected = flipped if inside else (-limit if flipped < 0 else limit)
            assert faulty == pytest.approx(expected, rel=1e-6)
    for layer in summarise(records, campaign.neurons).values():
        of_layer = records[records["layer"] == layer.layer].groupby("index")
        assert layer.injections == layer.delta_loss.n == layer.mismatch.n == 30
        assert layer.mismatch.value == of_layer["mismatch"].first().mean()
        loss = (of_layer["faulty_loss"].first() - of_layer["golden_loss"].first()).abs()
        assert layer.delta_loss.value == pytest.approx(loss.mean(), rel=1e-5)
        assert layer.masked == of_layer["masked"].first().sum()
        # An injection is detected where the detector saw any of its values.
        assert layer.detected == of_layer["detected"].any().sum()


def test_a_summary_has_the_layers_in_order_of_execution(resnet, loader):
    campaign = Campaign(resnet, loader)
    records = campaign.run()
    results = summarise(records.sample(frac=1, random_state=0), campaign.neurons)
    assert list(results) == [result.layer for result in results.values()] == ["stem.0", "conv1", "conv2", "fc"]
    assert [result.neurons for result in results.values()] == [8 * 16 * 16, 8 * 8 * 8, 8 * 8 * 8, 4]
    assert list(summarise(records[records["layer"] == "conv2"], campaign.neurons)) == ["conv2"]


# Interruptions.


def test_a_campaign_goes_on_from_its_shards_and_mends_a_damaged_one(resnet, loader, tmp_path):
    undisturbed = Campaign(resnet, loader, shard_dir=tmp_path).run()
    assert_same_records(undisturbed, Campaign(resnet, loader).run())
    shards = sorted(tmp_path.glob("*.parquet"))
    assert len(shards) == 4  # of the 10 eligible images, 3 by 3
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:100])
    kept = [shard.stat().st_mtime_ns for shard in shards[2:]]
    again = Campaign(resnet, loader, shard_dir=tmp_path)
    runs = count_runs(again.engine)
    pd.testing.assert_frame_equal(again.run(), undisturbed)
    assert len(runs) == 2
    assert sorted(tmp_path.glob("*.parquet")) == shards
    assert [shard.stat().st_mtime_ns for shard in shards[2:]] == kept
    # And once more, now that there is nothing left to do.
    pd.testing.assert_frame_equal(again.run(), undisturbed)
    assert len(runs) == 2


def test_an_interrupted_campaign_goes_on_where_it_was(resnet, loader, tmp_path, capsys):
    expected = Campaign(resnet, loader).run()
    first = Campaign(resnet, loader, shard_dir=tmp_path)
    runs = count_runs(first.engine, fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert len(runs) == len(list(tmp_path.glob("*.parquet"))) == 2
    assert not list(tmp_path.glob(".*"))
    capsys.readouterr()
    # Another number of faults per batch changes no result.
    second = Campaign(resnet, loader, shard_dir=tmp_path, batch_size=5)
    later = count_runs(second.engine)
    records = second.run()
    assert "going on after 2 of 4 shards" in capsys.readouterr().err
    assert_same_records(records, expected)
    assert sum(runs) + sum(later) == len(second.plan)
    assert len(later) == 2


CHANGES = {
    "plan": lambda c: setattr(c, "plan", draw_plan(c.engine.sites, c.chances, 20, seed=5)),
    "detector limits": lambda c: setattr(c, "limits", {**c.limits, "fc": 1e3}),
    "images per shard": lambda c: setattr(c, "image_batch", 4),
}


@pytest.mark.parametrize("name", CHANGES)
def test_shards_of_another_campaign_are_refused_by_the_name_of_what_differs(resnet, loader, tmp_path, name):
    Campaign(resnet, loader, shard_dir=tmp_path).run()
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    changed = Campaign(resnet, loader, shard_dir=tmp_path)
    CHANGES[name](changed)
    assert_refused(changed, {name})
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def assert_refused(campaign, names):
    """The campaign is refused, without a fault, and the reasons are `names`."""
    runs = count_runs(campaign.engine)
    with pytest.raises(CampaignMismatch, match="shards of another campaign") as refusal:
        campaign.run()
    assert not runs
    settings = read_json(campaign.shard_dir / "campaign.json", "")
    assert names <= settings.keys()
    assert {name for name in settings if f"{name} was {settings[name]}, now" in str(refusal.value)} == names


def test_shards_of_other_models_formats_and_data_are_refused(resnet, images, labels, loader, tmp_path):
    original = Campaign(resnet, loader, shard_dir=tmp_path)
    original.run()

    def changed(model=resnet, data=loader, **changes):
        campaign = Campaign(model, data, shard_dir=tmp_path, **changes)
        campaign.limits = original.limits
        if campaign.fault_model == SINGLE_FLIP and campaign.number_format is FP32:
            campaign.plan = original.plan
        return campaign

    assert_refused(changed(name="whole"), {"engine"})
    assert_refused(changed(number_format=parse_format("fp16")), {"number format", "plan"})
    assert_refused(changed(fault_model=FaultModel(bits=2)), {"fault bits", "plan"})
    assert_refused(changed(fault_model=FaultModel("weight")), {"target", "fault target", "plan"})
    stuck = changed(fault_model=FaultModel(operation="stuck_at_1"))
    stuck.plan = original.plan
    assert_refused(stuck, {"fault operation"})
    other = images.clone()
    other[0, 0, 0, 0] += 1
    assert_refused(changed(data=loader_of(other, labels, 5)), {"images"})
    relabelled = changed()
    relabelled.loader = loader_of(images, (labels + 1) % 4, 5)
    assert_refused(relabelled, {"images"})
    with torch.no_grad():
        resnet.fc.weight[0, 0] += 1e-3
    assert_refused(changed(), {"model"})
    with torch.no_grad():
        resnet.fc.weight[0, 0] -= 1e-3


def test_a_plan_of_another_model_is_refused(resnet, loader):
    campaign = Campaign(resnet, loader)
    for column, value in (("neuron", 10**6), ("neuron", -1), ("image", 12), ("bit", 32), ("weight", 0.0), ("weight", np.nan)):
        with pytest.raises(CampaignMismatch, match=column):
            campaign.run(campaign.plan.assign(**{column: value}))
    with pytest.raises(CampaignMismatch, match="'other'"):
        campaign.run(campaign.plan.assign(layer="other"))


# Campaigns in rounds.

DESIGNS = {
    "proportional": {"design": Design("proportional", 130, 64, "never", 0.99, 4)},
    "neyman": {},
    "neyman, importance": {"images": "importance"},
    "until 60 %": {"design": Design("neyman", 600, 64, "60%", 0.99, 4)},
    "until 40 %, two bits": {"design": Design("uniform", 300, 50, "40%", 0.9, 4), "fault_model": FaultModel(bits=2)},
}


@pytest.mark.parametrize("name", DESIGNS)
def test_a_design_gives_the_same_records_for_any_batching(resnet, loader, name):
    design = DESIGNS[name].get("design", Design("neyman", 200, 64, "never", 0.99, 4))
    campaign = Campaign(resnet, loader, **DESIGNS[name])
    reference = campaign.run_design()
    bits = campaign.fault_model.bits
    count = reference.groupby("layer", sort=False)["index"].nunique()
    assert count.index.tolist() == [site.layer for site in campaign.engine.sites]
    assert count.between(min(design.pilot, design.injections_per_layer), design.injections_per_layer + 64).all()
    assert len(reference) == bits * count.sum()
    for _, records in reference.groupby("layer"):
        assert records["index"].is_monotonic_increasing
    if bits == 1:
        assert not reference.duplicated(["layer", "index"]).any()
        pd.testing.assert_frame_equal(
            campaign.run(reference[PLAN_COLUMNS])[EXACT], reference[EXACT]
        )  # one campaign of them all, in one go
    for image_batch, batch_size in ((1, 7), (100, 1000)):
        assert_same_records(
            Campaign(resnet, loader, image_batch=image_batch, batch_size=batch_size, **DESIGNS[name]).run_design(), reference
        )


def test_a_layer_is_done_when_its_interval_is_as_narrow_as_wanted(resnet, loader):
    campaign = Campaign(resnet, loader, design=Design("uniform", 2000, 50, "60%", 0.9, 4))
    records = campaign.run_design()
    results = summarise(records, campaign.neurons)
    half = {}
    for layer, result in results.items():
        found = mean_interval(result.delta_loss, 0.9)
        half[layer] = (found.high - found.low) / 2 / found.value
        assert half[layer] <= 0.6 or result.injections == 2000
    assert len({result.injections for result in results.values()}) > 1
    assert min(half.values()) <= 0.6


@pytest.mark.parametrize("name", ["neyman", "until 60 %"])
def test_a_design_interrupted_in_a_later_round_goes_on_bit_for_bit(resnet, loader, tmp_path, name, monkeypatch, capsys):
    # Neither these runs nor how long they take has a say in the records.
    monkeypatch.setattr("textguard.faults.sampling.measure_pace", lambda *_, **__: 1.0)
    undisturbed = Campaign(resnet, loader, **DESIGNS[name])
    runs = count_runs(undisturbed.engine)
    expected = undisturbed.run_design()
    whole = sum(runs)
    first = Campaign(resnet, loader, shard_dir=tmp_path, **DESIGNS[name])
    before = count_runs(first.engine, fail_at=6)
    with pytest.raises(KeyboardInterrupt):
        first.run_design()
    assert [len(list((tmp_path / f"round-{number}").glob("*.parquet"))) for number in (0, 1)] == [4, 2]
    capsys.readouterr()
    second = Campaign(resnet, loader, shard_dir=tmp_path, **DESIGNS[name])
    after = count_runs(second.engine)
    records = second.run_design()
    said = capsys.readouterr().err
    assert "round 1: going on after 4 of 4 shards" in said
    assert "round 2: going on after 2 of 4 shards" in said
    pd.testing.assert_frame_equal(records, expected)
    assert sum(before) + sum(after) == whole
    # Other chances to be drawn make another campaign.
    other = Campaign(resnet, loader, shard_dir=tmp_path, images="importance", **DESIGNS[name])
    with pytest.raises(CampaignMismatch, match="plan was"):
        other.run_design()


# One campaign, several detectors.

DETECTORS = [
    ("profiled", "off"),
    ("profiled", "fixed:0.7"),
    ("off", "profiled"),
    ("off", "fixed:300"),
    ("fixed:100", "fixed:0.3"),
]
RERUN = {
    "one value": {},
    "several values": {"fault_model": TARGETS["both"]},
    "weights": {"fault_model": FaultModel("weight", values=2)},
    "metadata": {"fault_model": FaultModel("metadata"), "number_format": parse_format("bfp(8,7,16)")},
}


@pytest.mark.parametrize("name", RERUN)
@pytest.mark.parametrize(("before", "after"), DETECTORS)
def test_what_another_detector_changes_is_run_again_and_nothing_else(resnet, loader, before, after, name, tmp_path):
    campaign = Campaign(resnet, loader, per_layer=60, **RERUN[name])
    layers = [site.layer for site in campaign.engine.sites]
    limits = {detector: detector_limits(detector, layers, campaign.limits) for detector in (before, after)}
    campaign.limits = limits[before]
    records = campaign.run()
    options = {"image_batch": 3, "fault_model": campaign.fault_model, "shard_dir": tmp_path}
    changed = rerun_changed(campaign.engine, loader, records, limits[after], **options)
    together = replace_records(records, changed)
    campaign.limits = limits[after]
    expected = campaign.run()
    columns = ["layer", "index", "neuron", "bit"]
    ordered = [frame.sort_values(columns, ignore_index=True) for frame in (together, expected)]
    assert_same_records(*ordered)
    assert list(changed.columns) == RECORD_COLUMNS
    count = len(changed.drop_duplicates(["layer", "index"]))
    assert 0 < count < 240 or name == "metadata"  # of which all are run again: the records do not tell what it becomes
    # Under the same detector, only what it replaced is.
    same = rerun_changed(campaign.engine, loader, expected, limits[after], image_batch=3, fault_model=campaign.fault_model)
    assert name == "metadata" or set(map(tuple, same[["layer", "index"]].to_numpy())) == set(
        map(tuple, expected.loc[expected["detected"], ["layer", "index"]].to_numpy())
    )


def test_nothing_is_run_again_where_the_detector_changes_nothing(resnet, loader):
    campaign = Campaign(resnet, loader)
    records = campaign.run()
    kept = records[~records["detected"]].reset_index(drop=True)
    runs = count_runs(campaign.engine)
    changed = rerun_changed(campaign.engine, loader, kept, campaign.limits, image_batch=3)
    assert not runs
    assert changed.empty
    assert list(changed.columns) == RECORD_COLUMNS
    pd.testing.assert_frame_equal(replace_records(kept, changed), kept)


# Data.


class Pictures(Dataset):
    """Images with their labels in front, as Python ints."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels.tolist()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        return self.labels[number], self.images[number]


class Swapped(Pictures):
    """The other way round, as the campaign wants it."""

    def __getitem__(self, number):
        return self.images[number], self.labels[number]


def swap(pairs):
    """A collate function: stacked images, and the labels as a list of ints."""
    return torch.stack([image for _, image in pairs]), [label for label, _ in pairs]


class Stream(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return (self.dataset[number] for number in range(len(self.dataset)))


def loaders(images, labels):
    generator = torch.Generator().manual_seed(0)
    return {
        "shuffled": DataLoader(Swapped(images, labels), batch_size=5, shuffle=True, generator=generator),
        "one worker": DataLoader(Swapped(images, labels), batch_size=5, shuffle=True, num_workers=1),
        "custom collate_fn": DataLoader(Pictures(images, labels), batch_size=5, collate_fn=swap),
        "drop_last": DataLoader(Swapped(images, labels), batch_size=5, drop_last=True),
        "batch sampler": DataLoader(Swapped(images, labels), batch_sampler=[[3, 1], [0]]),
        "single images": DataLoader(Swapped(images, labels), batch_size=None),
    }


@pytest.mark.parametrize("name", loaders(torch.zeros(1), torch.zeros(1)))
def test_positions_are_those_in_the_data_set_however_it_is_loaded(resnet, images, labels, loader, name):
    expected = Campaign(resnet, loader)
    other = loaders(images, labels)[name]
    pd.testing.assert_frame_equal(profile_ranges(resnet, other), profile_ranges(resnet, loader), rtol=1e-5)
    assert eligible_images(expected.engine, other) == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    records = run_campaign(expected.engine, other, expected.plan, expected.limits, image_batch=4)
    assert_same_records(records, expected.run())


def test_a_stream_of_images_is_refused(resnet, images, labels):
    engine = make_engine("replay", resnet, images[0], 8)
    stream = DataLoader(Stream(Swapped(images, labels)), batch_size=5)
    plan = draw_plan(engine.sites, np.ones(12), 2, seed=0)
    limits = {site.layer: 1.0 for site in engine.sites}
    uses = {
        "ranges": lambda: profile_ranges(resnet, stream),
        "activations": lambda: profile_activations(resnet, stream),
        "eligible": lambda: eligible_images(engine, stream),
        "campaign": lambda: run_campaign(engine, stream, plan, limits, image_batch=4),
    }
    for use in uses.values():
        with pytest.raises(InvalidParameter, match="map-style data set"):
            use()


def test_eligible_images_are_classified_correctly_and_without_a_tie(images):
    class Given(nn.Module):
        """Logits as they are in the image's first row; the convolution is there for the engine."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 1)

        def forward(self, x):
            return x[:, 0, 0, :4] + 0 * self.conv(x).mean(dim=(1, 2, 3))[:, None]

    given = torch.tensor([[3.0, 1, 0, 0], [1, 3, 0, 0], [3, 3, 0, 0], [0, 0, 1, 2], [0, 0, 0, 0]])
    pictures = torch.zeros(5, 3, 16, 16)
    pictures[:, 0, 0, :4] = given
    engine = make_engine("replay", Given(), pictures[0], 4)
    assert eligible_images(engine, loader_of(pictures, torch.tensor([0, 0, 0, 3, 0]), 2)) == [0, 3]
    softmax = given.softmax(dim=1).sort(dim=1, descending=True).values
    torch.testing.assert_close(top2diff(given), softmax[:, 0] - softmax[:, 1])


def outputs_of(model, images, names) -> dict[str, list[torch.Tensor]]:
    """What the modules `names` return, call by call, and copied: what follows may change it in place."""
    outputs = {name: [] for name in names}
    for name, found in outputs.items():
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, found=found: found.append(output.clone())
        )
    with torch.no_grad():
        model(images)
    return outputs


def test_profiled_ranges_are_the_layers_extremes(tiny_model, images):
    ranges = profile_ranges(tiny_model, loader_of(images, torch.zeros(12).long(), 5)).set_index("layer")
    outputs = outputs_of(tiny_model, images, ranges.index)
    wanted = {name for name, module in tiny_model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert set(ranges.index) == wanted
    for name, (output,) in outputs.items():
        assert ranges.loc[name, "kind"] == type(tiny_model.get_submodule(name)).__name__
        assert ranges.loc[name, "neurons"] == output.numel() / 12
        assert ranges.loc[name, "max_abs"] == pytest.approx(float(output.abs().max()), rel=1e-5)
        assert ranges.loc[name, "mean_abs"] == pytest.approx(float(output.abs().double().mean()), rel=1e-5)


def test_profiled_activations_are_the_activations_extremes(resnet, images):
    found = profile_activations(resnet, loader_of(images, torch.zeros(12).long(), 5)).set_index("activation")
    outputs = outputs_of(resnet, images, ["stem.2", "act"])
    expected = {"stem_2": outputs["stem.2"][0], "act": outputs["act"][0], "act_1": outputs["act"][1]}
    assert set(found.index) == expected.keys()
    for name, output in expected.items():
        assert found.loc[name, "low"] == pytest.approx(float(output.min()), abs=1e-6)
        assert found.loc[name, "high"] == pytest.approx(float(output.max()), rel=1e-5)


# Several processes.

PROCESS = """
import sys
from pathlib import Path

sys.path[:0] = [{repository!r}, {tests!r}]
import torch
from conftest import TinyResNet, settle
from test_campaign import Campaign, count_runs
from textguard.artifacts import write_json, write_parquet
from textguard.errors import InvalidParameter
from textguard.faults.profiling import loader_of

torch.set_num_threads(1)
torch.manual_seed(0)
model = settle(TinyResNet())
images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
campaign = Campaign(model, loader_of(images, model(images).argmax(dim=1), 5), image_batch=2)
runs = count_runs(campaign.engine)
refused = ""
try:
    campaign.run()
except InvalidParameter as error:
    refused = str(error)
campaign.shard_dir = Path({folder!r}) / "shards"
records = campaign.run()
alone, runs[:] = list(runs), []
campaign.shard_dir = Path({folder!r}) / "design"
designed = campaign.run_design()
rank = torch.distributed.get_rank()
write_parquet(Path({folder!r}) / f"records-{{rank}}.parquet", records)
write_parquet(Path({folder!r}) / f"designed-{{rank}}.parquet", designed)
write_json(Path({folder!r}) / f"process-{{rank}}.json", {{"refused": refused, "runs": alone, "designed": runs}})
torch.distributed.destroy_process_group()
"""


def test_processes_of_torchrun_share_the_shards_of_each_round(resnet, images, tmp_path):
    script = tmp_path / "process.py"
    tests = str(Path(__file__).parent)
    script.write_text(PROCESS.format(repository=str(REPOSITORY), tests=tests, folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    alone = {name: value for name, value in environment(OMP_NUM_THREADS="1").items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    campaign = Campaign(resnet, loader_of(images, resnet(images).argmax(dim=1), 5), image_batch=2)
    expected = campaign.run()
    processes = [read_json(tmp_path / f"process-{rank}.json", "") for rank in (0, 1)]
    assert all("need a shard_dir" in process["refused"] for process in processes)
    assert [len(process["runs"]) for process in processes] == [3, 3]  # of the 6 shards
    assert sum(sum(process["runs"]) for process in processes) == len(campaign.plan)
    for rank in (0, 1):
        records = read_parquet(tmp_path / f"records-{rank}.parquet", "", RECORD_COLUMNS)
        assert_same_records(records, expected)
        assert records["masked"].equals(expected["masked"])
    # In rounds, too, and both plan the same second one.
    designed = [read_parquet(tmp_path / f"designed-{rank}.parquet", "", RECORD_COLUMNS) for rank in (0, 1)]
    pd.testing.assert_frame_equal(*designed)
    assert_same_records(designed[0], campaign.run_design())
    assert [len(process["designed"]) for process in processes] == [2 + 3 + 3] * 2  # the first two to see how fast it is
    assert len(list((tmp_path / "design").glob("round-?/*.parquet"))) == 12
    # A single process goes on from what two have made.
    campaign.shard_dir = tmp_path / "shards"
    runs = count_runs(campaign.engine)
    assert_same_records(campaign.run(), expected)
    assert not runs
    assert "WORLD_SIZE" not in os.environ
