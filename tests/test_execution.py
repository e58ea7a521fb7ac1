"""Fault plans carried out: the same records however they are run, interruptions, processes that share the work."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from conftest import REPOSITORY
from small_campaign import TARGETS, SmallCampaign, assert_same_records, count_runs
from smoke_grid import environment
from textguard.artifacts import read_json, read_parquet, write_parquet
from textguard.errors import CampaignMismatch
from textguard.estimates.summary import summarise
from textguard.faults.damage import SINGLE_FLIP, FaultModel
from textguard.faults.execution import RECORD_COLUMNS
from textguard.faults.formats import FP32, parse_format
from textguard.faults.plans import PLAN_COLUMNS, draw_plan
from textguard.faults.profiling import loader_of

# The same records, however they are made.


@pytest.mark.parametrize("fault_model", [SINGLE_FLIP, *TARGETS.values()], ids=str)
def test_a_campaign_gives_the_same_records_for_any_batching_and_all_engines(resnet, loader, fault_model):
    reference = SmallCampaign(resnet, loader, name="pytorchfi", fault_model=fault_model).run()
    assert len(reference) == 4 * 20 * fault_model.values * fault_model.bits
    assert 0 < reference["detected"].mean() < 1
    assert 0 < reference["mismatch"].mean() < 1
    batchings = [("replay", 1, 1), ("replay", 5, 7), ("replay", 100, 1000), ("whole", 100, 4), ("whole", 2, 1000)]
    for name, image_batch, batch_size in batchings:
        changes = {"name": name, "image_batch": image_batch, "batch_size": batch_size, "fault_model": fault_model}
        assert_same_records(SmallCampaign(resnet, loader, **changes).run(), reference)


@pytest.mark.parametrize("fault_model", [SINGLE_FLIP, TARGETS["both"]], ids=str)
def test_records_come_in_the_order_of_the_plan_and_do_not_depend_on_it(resnet, loader, fault_model):
    campaign = SmallCampaign(resnet, loader, fault_model=fault_model)
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
    campaign = SmallCampaign(resnet, loader)
    write_parquet(tmp_path / "plan.parquet", campaign.plan)
    plan = read_parquet(tmp_path / "plan.parquet", "inject", PLAN_COLUMNS)
    pd.testing.assert_frame_equal(plan, campaign.plan)
    reference = campaign.run()
    for name in ("replay", "whole", "pytorchfi"):
        assert_same_records(SmallCampaign(resnet, loader, name=name).run(plan), reference)


def test_records_are_what_a_damaged_network_does(resnet, images, labels, loader):
    campaign = SmallCampaign(resnet, loader, per_layer=6)
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
    campaign = SmallCampaign(resnet, loader, fault_model=model, per_layer=30)
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
    campaign = SmallCampaign(resnet, loader)
    records = campaign.run()
    results = summarise(records.sample(frac=1, random_state=0), campaign.neurons)
    assert list(results) == [result.layer for result in results.values()] == ["stem.0", "conv1", "conv2", "fc"]
    assert [result.neurons for result in results.values()] == [8 * 16 * 16, 8 * 8 * 8, 8 * 8 * 8, 4]
    assert list(summarise(records[records["layer"] == "conv2"], campaign.neurons)) == ["conv2"]


# Interruptions.


def test_a_campaign_goes_on_from_its_shards_and_mends_a_damaged_one(resnet, loader, tmp_path):
    undisturbed = SmallCampaign(resnet, loader, shard_dir=tmp_path).run()
    assert_same_records(undisturbed, SmallCampaign(resnet, loader).run())
    shards = sorted(tmp_path.glob("*.parquet"))
    assert len(shards) == 4  # of the 10 eligible images, 3 by 3
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:100])
    kept = [shard.stat().st_mtime_ns for shard in shards[2:]]
    again = SmallCampaign(resnet, loader, shard_dir=tmp_path)
    runs = count_runs(again.engine)
    pd.testing.assert_frame_equal(again.run(), undisturbed)
    assert len(runs) == 2
    assert sorted(tmp_path.glob("*.parquet")) == shards
    assert [shard.stat().st_mtime_ns for shard in shards[2:]] == kept
    # And once more, now that there is nothing left to do.
    pd.testing.assert_frame_equal(again.run(), undisturbed)
    assert len(runs) == 2


def test_an_interrupted_campaign_goes_on_where_it_was(resnet, loader, tmp_path, capsys):
    expected = SmallCampaign(resnet, loader).run()
    first = SmallCampaign(resnet, loader, shard_dir=tmp_path)
    runs = count_runs(first.engine, fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert len(runs) == len(list(tmp_path.glob("*.parquet"))) == 2
    assert not list(tmp_path.glob(".*"))
    capsys.readouterr()
    # Another number of faults per batch changes no result.
    second = SmallCampaign(resnet, loader, shard_dir=tmp_path, batch_size=5)
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
    SmallCampaign(resnet, loader, shard_dir=tmp_path).run()
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    changed = SmallCampaign(resnet, loader, shard_dir=tmp_path)
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
    original = SmallCampaign(resnet, loader, shard_dir=tmp_path)
    original.run()

    def changed(model=resnet, data=loader, **changes):
        campaign = SmallCampaign(model, data, shard_dir=tmp_path, **changes)
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
    campaign = SmallCampaign(resnet, loader)
    for column, value in (("neuron", 10**6), ("neuron", -1), ("image", 12), ("bit", 32), ("weight", 0.0), ("weight", np.nan)):
        with pytest.raises(CampaignMismatch, match=column):
            campaign.run(campaign.plan.assign(**{column: value}))
    with pytest.raises(CampaignMismatch, match="'other'"):
        campaign.run(campaign.plan.assign(layer="other"))


# Several processes.

PROCESS = """
import sys
from pathlib import Path

sys.path[:0] = [{repository!r}, {tests!r}]
import torch
from conftest import TinyResNet, settle
from small_campaign import SmallCampaign, count_runs
from textguard.artifacts import write_json, write_parquet
from textguard.errors import InvalidParameter
from textguard.faults.profiling import loader_of

torch.set_num_threads(1)
torch.manual_seed(0)
model = settle(TinyResNet())
images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
campaign = SmallCampaign(model, loader_of(images, model(images).argmax(dim=1), 5), image_batch=2)
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
    script.write_text(PROCESS.format(repository=str(REPOSITORY), tests=tests, folder=str(tmp_path)), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    alone = {name: value for name, value in environment(OMP_NUM_THREADS="1").items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, encoding="utf-8", check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    campaign = SmallCampaign(resnet, loader_of(images, resnet(images).argmax(dim=1), 5), image_batch=2)
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
