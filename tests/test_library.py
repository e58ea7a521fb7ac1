"""What other people's code calls: `assess`, for any model and data."""

import copy
import io
import subprocess
import sys
from contextlib import redirect_stderr

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from conftest import REPOSITORY, DigitsNetwork
from textguard import assessment
from textguard.errors import CampaignMismatch, InvalidParameter, UnknownName, UnsupportedModel
from textguard.faults import (
    FaultModel,
    draw_plan,
    eligible_images,
    image_chances,
)
from textguard.faults.engines import ReplayEngine

COLUMNS = [
    *("layer", "kind", "neurons", "method", "injections", "masked", "detected", "nonfinite"),
    *("delta_loss", "delta_loss_low", "delta_loss_high", "mismatch", "mismatch_low", "mismatch_high"),
    *("sdc", "sdc_low", "sdc_high"),
]
COUNTS = ["layer", "kind", "neurons", "method", "injections", "nonfinite"]
NUMBERS = [name for name in COLUMNS if name.startswith(("delta_loss", "mismatch", "sdc"))]


class Untraceable(DigitsNetwork):
    """A model with a decision in it, such as torch.fx cannot trace."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.sum() > 0 else -images)


@pytest.fixture
def loader(data) -> DataLoader:
    """Shuffled, as people have them."""
    return DataLoader(TensorDataset(*data), batch_size=48, shuffle=True)


def assess(*given: object, **options: object) -> pd.DataFrame:
    """The rows of the layers."""
    return assessment.assess(*given, **options).table[:-1]


def assert_agree(a: pd.DataFrame, b: pd.DataFrame) -> None:
    """Two engines' results: the counts of what they both count are equal."""
    pd.testing.assert_frame_equal(a[COUNTS], b[COUNTS])
    assert (a["detected"] - b["detected"]).abs().max() <= 1  # a value at its limit
    pd.testing.assert_frame_equal(a[NUMBERS], b[NUMBERS], rtol=0.01, atol=1e-4)


# What is imported


def test_estimates_need_no_torch():
    program = (
        "import sys, textguard.estimates.statistics as s, textguard.estimates.summary;"
        "print(s.rate_estimate(1, 4).value, sorted({'torch', 'torchvision', 'textguard.faults'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == "0.25 []\n"


# assess


def test_assess_tells_of_every_layer(network, loader, data):
    before, network_state = copy.deepcopy(network.state_dict()), [p.requires_grad for p in network.parameters()]
    network.train()
    found = assess(network, loader, injections_per_layer=150, seed=3)
    assert network.training
    network.eval()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [p.requires_grad for p in network.parameters()] == network_state
    assert list(found.columns) == COLUMNS
    assert found["layer"].tolist() == ["conv1", "conv2", "fc"]
    assert found["kind"].tolist() == ["Conv2d", "Conv2d", "Linear"]
    assert found["neurons"].tolist() == [8 * 8 * 8, 12 * 4 * 4, 10]
    assert (found["injections"] == 150).all()
    assert (found["method"] == "sampled").all()
    for name in ("delta_loss", "mismatch", "sdc"):
        assert (found[f"{name}_low"] <= found[name] + 1e-12).all()
        assert (found[name] <= found[f"{name}_high"]).all()
        assert (found[f"{name}_low"] < found[f"{name}_high"]).all()
    assert (found["delta_loss"] > 0).all()
    assert found["mismatch"].between(0, 1).all()
    assert found["detected"].between(1, 149).all()
    assert found["masked"].between(0, 149).all()
    assert found["masked"][0] > 0  # behind a ReLU

    other_order = DataLoader(TensorDataset(*data), batch_size=13)
    pd.testing.assert_frame_equal(assess(network, other_order, injections_per_layer=150, seed=3), found, rtol=1e-4)
    pd.testing.assert_frame_equal(
        assess(network, loader, injections_per_layer=150, seed=3, batch_size=7, image_batch=5), found, rtol=1e-4
    )
    other_seed = assess(network, loader, injections_per_layer=150, seed=4)
    assert (other_seed["delta_loss"] != found["delta_loss"]).all()
    assert_agree(assess(network, loader, injections_per_layer=150, seed=3, engine="whole"), found)
    by_pytorchfi = assess(network, loader, injections_per_layer=150, seed=3, engine="pytorchfi")
    assert_agree(by_pytorchfi, found)
    only = assess(network, loader, injections_per_layer=20, kinds=("Linear",))
    assert only["layer"].tolist() == ["fc"]


SPREADS = {
    "neyman": {"plan": "neyman", "pilot": 64},
    "importance": {"plan": "proportional", "images": "importance"},
    "stopping": {"stop_at": "30%", "pilot": 100, "confidence": 0.9},
    "all": {"plan": "neyman", "images": "importance", "stop_at": "40%", "pilot": 64, "confidence": 0.95},
}


@pytest.mark.parametrize("name", SPREADS)
def test_assess_spreads_injections_as_told_and_by_all_engines_alike(name, network, loader):
    options = {"injections_per_layer": 320, "seed": 3, **SPREADS[name]}
    found = assess(network, loader, **options)
    assert found["injections"].between(options.get("pilot", 320), 330).all()
    for number in ("delta_loss", "mismatch", "sdc"):
        assert (found[f"{number}_low"] <= found[number]).all()
        assert (found[number] < found[f"{number}_high"]).all()
    assert_agree(assess(network, loader, engine="whole", **options), found)
    narrower = assess(network, loader, **{**options, "confidence": 0.5, "stop_at": "never"})
    wider = assess(network, loader, **{**options, "confidence": 0.999, "stop_at": "never"})
    widths = [frame["delta_loss_high"] - frame["delta_loss_low"] for frame in (narrower, wider)]
    assert (widths[0] < widths[1]).all()
    if "stop_at" in options:
        stopped = found[found["injections"] < 320]
        half = (stopped["delta_loss_high"] - stopped["delta_loss_low"]) / 2
        assert (half <= float(options["stop_at"].rstrip("%")) / 100 * stopped["delta_loss"]).all()


def test_assess_enumerates_what_it_may_and_samples_the_rest(network, loader, data):
    options = {"injections_per_layer": 60, "seed": 3, "detector": "off"}
    sampled = assess(network, loader, **options)
    found = assess(network, loader, enumerate_up_to=1, **options)
    assert found["method"].tolist() == ["sampled", "sampled", "exact"]
    pd.testing.assert_frame_equal(found[:2], sampled[:2], rtol=1e-5)
    last = found.iloc[2]
    engine = ReplayEngine(network, data[0][0], 8)
    assert last["injections"] == len(eligible_images(engine, loader)) * 10 * 32
    assert last["nonfinite"] > 0
    for name in ("delta_loss", "mismatch", "sdc"):
        assert last[f"{name}_low"] == last[name] == last[f"{name}_high"]
    assert last["sdc"] > last["mismatch"]
    pd.testing.assert_frame_equal(
        assess(network, loader, enumerate_up_to=1, kinds=("Linear",), **options).iloc[[0]].reset_index(drop=True),
        found.iloc[[2]].reset_index(drop=True),
    )
    few = DataLoader(TensorDataset(data[0][:3], data[1][:3]), batch_size=2)
    everything = assess(network, few, enumerate_up_to=10**6, **options)
    assert everything["method"].tolist() == ["sampled", "sampled", "exact"]  # convolutions never
    # The other engines are too slow for it.
    assert (assess(network, few, enumerate_up_to=10**6, engine="whole", **options)["method"] == "sampled").all()


def test_the_interval_of_no_mismatch_holds_zero(network, loader):
    found = assess(network, loader, injections_per_layer=20, number_format="int(16)", seed=1)
    assert (found["mismatch"] == 0).any()
    assert (found["mismatch_low"] <= found["mismatch"]).all()


def test_the_range_detectors_settings(network, loader, data):
    wide = DataLoader(TensorDataset(data[0] * 4, data[1]), batch_size=32)
    settings = {"profiled": {}, "fixed:65536": {}, "fixed:0.5": {}, "off": {}, "wide": {"profile": wide}}
    found = {
        name: assess(network, loader, injections_per_layer=300, detector="profiled" if name == "wide" else name, **options)
        for name, options in settings.items()
    }
    detected = {name: frame["detected"].to_numpy() for name, frame in found.items()}
    assert (detected["off"] == 0).all()
    assert (detected["fixed:65536"] > 0).all()
    assert (detected["fixed:65536"] <= detected["wide"]).all()
    assert (detected["wide"] <= detected["profiled"]).all()
    assert detected["fixed:65536"].sum() < detected["wide"].sum() < detected["profiled"].sum()
    assert (detected["fixed:0.5"] > detected["profiled"]).all()
    assert (found["off"]["nonfinite"] > 0).any()
    assert all((frame["nonfinite"] == 0).all() for name, frame in found.items() if name != "off")
    assert (found["profiled"]["delta_loss"] < found["fixed:65536"]["delta_loss"]).all()
    with pytest.raises(UnknownName, match=r"detector 'on'.*fixed:X, off, profiled"):
        assess(network, loader, detector="on")


FAULTS = {
    "two bits": {"fault_model": FaultModel(bits=2)},
    "two values": {"fault_model": FaultModel(values=2)},
    "weights": {"fault_model": FaultModel(target="weight")},
    "stuck weights in int(8)": {"fault_model": FaultModel(target="weight", operation="stuck_at_1"), "number_format": "int(8)"},
    "fp16": {"number_format": "fp16"},
    "int(8)": {"number_format": "int(8)"},
    "bfp": {"number_format": "bfp(8,7,16)"},
    "metadata": {"number_format": "bfp(8,7,16)", "fault_model": FaultModel(target="metadata")},
}


# torch warns once per process, of weight_limits: see test_fault_models.py.
@pytest.mark.parametrize("options", FAULTS.values(), ids=FAULTS)
def test_fault_models_and_formats_by_both_engines(options, network, loader):
    replay, whole = (assess(network, loader, injections_per_layer=60, engine=name, **options) for name in ("replay", "whole"))
    assert_agree(replay, whole)
    assert (replay["injections"] == 60).all()
    assert (replay["delta_loss"] > 0).all()
    usual = assess(network, loader, injections_per_layer=60)
    assert (replay["delta_loss"] != usual["delta_loss"]).all()


def test_the_detector_of_weights_knows_the_largest_weight(network, loader):
    flip = FaultModel(target="weight")
    found = assess(network, loader, injections_per_layer=100, seed=2, fault_model=flip).set_index("layer")
    engine = ReplayEngine(network, loader.dataset[0][0], 8)
    plan = draw_plan(engine.sites, image_chances(engine, loader), 100, 2, flip)
    for layer, faults in plan.groupby("layer"):
        weights = network.get_submodule(layer).weight.detach().numpy().flatten()
        words = weights[faults["neuron"]].view(np.uint32) ^ np.left_shift(1, faults["bit"].to_numpy()).astype(np.uint32)
        beyond = ~(np.abs(words.view(np.float32)) <= np.abs(weights).max())
        assert found["detected"][layer] == beyond.sum() > 0


def test_options_that_cannot_be_are_refused(network, loader):
    with pytest.raises(UnknownName, match="number format 'fp12' in argument number_format"):
        assess(network, loader, number_format="fp12")
    with pytest.raises(InvalidParameter, match="has no metadata"):
        assess(network, loader, fault_model=FaultModel(target="metadata"))
    with pytest.raises(UnknownName, match=r"engine 'goldeneye' in argument engine; known: pytorchfi, replay, whole"):
        assess(network, loader, engine="goldeneye")
    with pytest.raises(UnknownName, match=r"plan 'even' in argument plan; known: guided, neyman, proportional, uniform"):
        assess(network, loader, plan="even")
    with pytest.raises(UnknownName, match=r"way to draw images 'some' in argument images; known: importance, shared, uniform"):
        assess(network, loader, images="some")
    with pytest.raises(InvalidParameter, match="argument stop_at is 'soon'; allowed: never"):
        assess(network, loader, stop_at="soon")
    with pytest.raises(InvalidParameter, match="argument pilot is 63; a plan by bit needs 2 for each of 32 bits"):
        assess(network, loader, plan="neyman", pilot=63)
    with pytest.raises(InvalidParameter, match="faults of one bit in one value can be planned by bit"):
        assess(network, loader, plan="proportional", fault_model=FaultModel(bits=2))
    with pytest.raises(TypeError, match="'injections'"):
        assess(network, loader, injections=5)
    with pytest.raises(TypeError, match="compare_detectors"):  # whose results the table does not hold
        assess(network, loader, compare_detectors=("off",))
    images = loader.dataset.tensors[0]
    wrong = DataLoader(TensorDataset(images, (network(images).argmax(dim=1) + 1) % 10), batch_size=9)
    with pytest.raises(InvalidParameter, match="no image is eligible"):
        assess(network, wrong)


def untraceable(network: nn.Module) -> nn.Module:
    model = Untraceable()
    model.load_state_dict(network.state_dict())
    return model.eval()


def test_a_model_that_cannot_be_traced_is_run_whole(network, loader, data):
    positive = DataLoader(TensorDataset(data[0] + 1, data[1]), batch_size=32)
    images = positive.dataset.tensors[0]
    labels = network(images).argmax(dim=1)
    positive = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)
    with pytest.raises(UnsupportedModel, match="cannot be traced"):
        ReplayEngine(untraceable(network), images[0], 4)
    expected = assess(network, positive, injections_per_layer=60, engine="whole")
    pd.testing.assert_frame_equal(assess(untraceable(network), positive, injections_per_layer=60), expected, rtol=1e-4)


def test_a_model_that_cannot_be_traced_is_told_of_in_one_line(network, loader):
    said = io.StringIO()
    with redirect_stderr(said):
        assess(untraceable(network), loader, injections_per_layer=5)
    assert said.getvalue().count("engine 'replay' cannot be used, going on with 'whole'") == 1


def test_an_interrupted_assessment_goes_on(network, loader, tmp_path, capsys):
    options = {"injections_per_layer": 40, "seed": 5, "image_batch": 16}
    undisturbed = assess(network, loader, **options)
    first = assess(network, loader, shard_dir=tmp_path, **options)
    pd.testing.assert_frame_equal(first, undisturbed)
    shards = sorted(tmp_path.glob("round-0/*.parquet"))
    assert len(shards) > 3
    kept = {shard: shard.stat().st_mtime_ns for shard in shards[1:]}
    shards[0].unlink()
    capsys.readouterr()
    pd.testing.assert_frame_equal(assess(network, loader, shard_dir=tmp_path, **options), undisturbed)
    assert f"going on after {len(shards) - 1} of {len(shards)} shards" in capsys.readouterr().err
    assert {shard: shard.stat().st_mtime_ns for shard in shards[1:]} == kept
    assert shards[0].exists()
    for other in ({"seed": 6}, {"detector": "off"}, {"number_format": "fp16"}, {"fault_model": FaultModel(bits=2)}):
        with pytest.raises(CampaignMismatch, match="another campaign"):
            assess(network, loader, shard_dir=tmp_path, **{**options, **other})


def test_numpy_numbers_and_paths_as_text_are_taken(network, loader, tmp_path):
    plain = assess(network, loader, injections_per_layer=6, seed=2, batch_size=8, image_batch=16)
    numbers = {"injections_per_layer": np.int64(6), "seed": np.uint32(2), "batch_size": np.int8(8), "image_batch": np.int16(16)}
    given = assess(network, loader, **numbers, confidence=np.float64(0.99), shard_dir=str(tmp_path))
    pd.testing.assert_frame_equal(given, plain)
    assert list(tmp_path.glob("round-0/*.parquet"))
    engine = ReplayEngine(network, loader.dataset.tensors[0][0], 4)
    pd.testing.assert_frame_equal(
        draw_plan(engine.sites, np.ones(4), np.int32(3), seed=0), draw_plan(engine.sites, np.ones(4), 3, seed=0)
    )
