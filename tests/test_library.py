"""What other people's code calls: `assess` for any model, mitigations, and the last layer without sampling."""

import copy
import io
import math
import subprocess
import sys
from contextlib import redirect_stderr
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import textguard.faults
from conftest import REPOSITORY, TINY, settle
from textguard.errors import CampaignMismatch, InvalidParameter, UnknownName, UnsupportedModel
from textguard.faults import (
    FaultModel,
    assess,
    draw_plan,
    eligible_images,
    enumerate_last_layer,
    parse_format,
    profile_activations,
    profile_ranges,
    protect,
)
from textguard.faults.damage import Faults, Storage
from textguard.faults.detectors import Bound
from textguard.faults.engines import ReplayEngine, WholeEngine
from textguard.faults.exact import flip_logits
from textguard.faults.mitigations import ROUNDING
from textguard.vision.classifiers import TextGuidedClassifier

COLUMNS = [
    *("layer", "kind", "neurons", "injections", "masked", "detected", "nonfinite"),
    *("delta_loss", "delta_loss_low", "delta_loss_high", "mismatch", "mismatch_low", "mismatch_high"),
]
COUNTS = ["layer", "kind", "neurons", "injections", "nonfinite"]
NUMBERS = [name for name in COLUMNS if name.startswith(("delta_loss", "mismatch"))]


class Network(nn.Module):
    """8 x 8 pixels to 10 numbers."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.fc = nn.Linear(12 * 4, outputs)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv1(images))
        x = F.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc(x.flatten(1))


class Untraceable(Network):
    """A model with a decision in it, such as torch.fx cannot trace."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.sum() > 0 else -images)


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.from_numpy(data.images).float()[:, None] / 8 - 1, torch.from_numpy(data.target)


def trained(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = 4) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=order).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    """200 images and their labels, that no model was trained on."""
    images, labels = digits()
    return images[-200:], labels[-200:]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small classifier of digits, nine out of ten of them right."""
    torch.manual_seed(0)
    images, labels = digits()
    return trained(Network(), images[:-200], labels[:-200])


@pytest.fixture(scope="module")
def guided() -> nn.Module:
    """The same with a text-guided head."""
    torch.manual_seed(0)
    images, labels = digits()
    directions = F.normalize(torch.randn(10, 16), dim=1)
    return trained(TextGuidedClassifier(Network(16), 10, 16, directions), images[:-200], labels[:-200])


@pytest.fixture
def loader(data) -> DataLoader:
    """Shuffled, as people have them."""
    return DataLoader(TensorDataset(*data), batch_size=48, shuffle=True)


def assert_agree(a: pd.DataFrame, b: pd.DataFrame) -> None:
    """Two engines' results: the counts of what they both count are equal."""
    pd.testing.assert_frame_equal(a[COUNTS], b[COUNTS])
    assert (a["detected"] - b["detected"]).abs().max() <= 1  # a value at its limit
    pd.testing.assert_frame_equal(a[NUMBERS], b[NUMBERS], rtol=0.01, atol=1e-4)


# What is imported when


def test_the_package_and_its_statistics_need_no_torch():
    program = (
        "import sys, textguard.faults, textguard.faults.statistics as s; dir(textguard.faults);"
        "print(s.rate_estimate(1, 4).value, sorted({'torch', 'torchvision', 'pytorchfi', 'timm'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "0.25 []\n"


def test_every_export_exists_and_others_are_named():
    assert set(dir(textguard.faults)) >= {"assess", "draw_plan", "FaultModel", "enumerate_last_layer", "protect", "summarise"}
    for name in dir(textguard.faults):
        assert getattr(textguard.faults, name).__name__ == name
    with pytest.raises(AttributeError, match=r"no attribute 'inject'; it exports assess, draw_plan"):
        textguard.faults.inject  # noqa: B018


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
    for name in ("delta_loss", "mismatch"):
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
    plan = draw_plan(engine.sites, eligible_images(engine, loader), 100, 2, flip)
    for layer, faults in plan.groupby("layer"):
        weights = network.get_submodule(layer).weight.detach().numpy().flatten()
        words = weights[faults["neuron"]].view(np.uint32) ^ np.left_shift(1, faults["bit"].to_numpy()).astype(np.uint32)
        beyond = ~(np.abs(words.view(np.float32)) <= np.abs(weights).max())
        assert found["detected"][layer] == beyond.sum() > 0


def test_options_that_cannot_be_are_refused(network, loader):
    with pytest.raises(UnknownName, match="number format 'fp12' in number_format"):
        assess(network, loader, number_format="fp12")
    with pytest.raises(InvalidParameter, match="has no metadata"):
        assess(network, loader, fault_model=FaultModel(target="metadata"))
    with pytest.raises(UnknownName, match="pytorchfi, replay, whole"):
        assess(network, loader, engine="goldeneye")
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
    shards = sorted(tmp_path.glob("*.parquet"))
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


# Mitigations


class Spellings(nn.Module):
    """A residual model with activations in every spelling; `bound` is where a twin does a mitigation's work."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 6, 3, stride=2)
        self.gelu = nn.GELU()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 4)

    def bound(self, number: int, x: Tensor) -> Tensor:
        return x

    def forward(self, images: Tensor) -> Tensor:
        x = self.bound(0, self.act(self.norm(self.conv1(images))))
        x = self.bound(1, F.relu(self.conv2(x) + x, inplace=True))
        x = self.bound(2, torch.relu(self.conv3(x)))
        x = self.bound(3, self.gelu(x.mean(dim=(2, 3))))
        x = self.bound(4, self.fc1(x).relu())
        return self.fc2(x)


class MitigatedTwin(Spellings):
    """The same, mitigated by hand."""

    bounds: list[tuple[float, float]]
    to_zero: bool

    def bound(self, number: int, x: Tensor) -> Tensor:
        low, high = (torch.tensor(end) for end in self.bounds[number])
        if self.to_zero:
            return torch.where((x < low) | (x > high) | x.isnan(), torch.tensor(0.0), x)
        return torch.where(x.isnan(), low, torch.minimum(torch.maximum(x, low), high))


@pytest.fixture
def spellings() -> nn.Module:
    """Random weights and statistics."""
    torch.manual_seed(0)
    return settle(Spellings())


def bounds_of(model: nn.Module, images: Tensor) -> dict[str, tuple[float, float]]:
    found = profile_activations(model, DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=5, shuffle=True))
    return {row.activation: (row.low, row.high) for row in found.itertuples()}


def widened(bounds: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """A little more than was profiled: in batches of other sizes sums differ by a rounding, and beyond a bound lies zero."""
    return {name: (low - 1e-3 * high, high + 1e-3 * high) for name, (low, high) in bounds.items()}


def twin_of(model: nn.Module, bounds: dict[str, tuple[float, float]], mitigation: str) -> nn.Module:
    twin = MitigatedTwin()
    twin.load_state_dict(model.state_dict())
    twin.bounds, twin.to_zero = list(bounds.values()), mitigation == "clip_to_zero"
    return twin.eval()


@torch.no_grad()
def test_activations_are_profiled_in_every_spelling(spellings, images):
    seen: dict[int, Tensor] = {}
    spellings.bound = lambda number, x: seen.update({number: x.clone()}) or x
    spellings(images)
    del spellings.bound
    bounds = bounds_of(spellings, images)
    assert list(bounds) == ["act", "relu", "relu_1", "gelu", "relu_2"]
    for output, found in zip(seen.values(), bounds.values(), strict=True):
        assert found == pytest.approx((float(output.min()), float(output.max())), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("mitigation", ["ranger", "clip_to_zero"])
def test_activations_are_kept_within_their_bounds(mitigation, spellings, images):
    bounds = widened(bounds_of(spellings, images))
    before = copy.deepcopy(spellings)
    protected = protect(spellings, images[0], bounds, mitigation)
    assert spellings.act.inplace  # the user's own model is as it was
    assert sum(isinstance(module, Bound) for module in spellings.modules()) == 0
    assert sum(isinstance(module, Bound) for module in protected.modules()) == len(bounds) == 5
    twin = twin_of(spellings, bounds, mitigation)
    with torch.no_grad():
        golden = before(images)
        torch.testing.assert_close(protected(images), golden, rtol=1e-5, atol=1e-6)
        loud = images * torch.logspace(0.5, 3, len(images))[:, None, None, None]
        loud[-1, 0, 0, 0], loud[-2, 1, 2, 2], loud[-3, 2, 1, 1] = math.nan, math.inf, -math.inf
        expected = twin(loud)
        assert expected.isfinite().all()
        torch.testing.assert_close(protected(loud), expected, rtol=1e-4, atol=1e-5)
        assert not torch.isclose(before(loud), expected, rtol=0.1).any(dim=1).all()
        assert before(loud)[-1].isnan().all()


def random_faults(engine, images: int, count: int, limit: float = math.inf) -> Faults:
    draw = torch.Generator().manual_seed(1)
    position = torch.arange(count) % len(engine.sites)
    neurons = torch.tensor([site.neurons for site in engine.sites])[position]
    return Faults(
        model=FaultModel(),
        position=position,
        image=torch.randint(images, (count,), generator=draw),
        limit=torch.full((count,), limit),
        row=torch.arange(count),
        neuron=(torch.rand(count, generator=draw) * neurons).long(),
        mask=1 << torch.randint(20, 32, (count,), generator=draw),
    )


@pytest.mark.parametrize("mitigation", ["ranger", "clip_to_zero"])
def test_engines_inject_into_a_protected_model(mitigation, spellings, images):
    bounds = widened(bounds_of(spellings, images))
    protected = protect(spellings, images[0], bounds, mitigation)
    largest, lows = {}, {}

    def watch(name):
        def hook(module, inputs, output):
            assert not output.isnan().any()
            largest[name] = max(largest.get(name, -math.inf), float(output.max()))
            lows[name] = min(lows.get(name, math.inf), float(output.min()))

        return hook

    sites = ReplayEngine(spellings, images[0], 8).sites
    assert ReplayEngine(protected, images[0], 8).sites == sites
    replay = ReplayEngine(protected, images[0], 8)
    for name in bounds:
        protected.get_submodule(f"bound_{name}").register_forward_hook(watch(name))
    whole = WholeEngine(protected, images[0], 8)
    assert whole.sites == sites
    largest.clear()  # of the engine's first runs
    lows.clear()
    faults = random_faults(replay, len(images), 150)
    found, same = replay.run(images, faults), whole.run(images, faults)
    for name, (low, high) in bounds.items():
        zero = mitigation == "clip_to_zero"
        margin = 2 * ROUNDING * max(abs(low), abs(high))
        assert low - margin <= lows[name] or (zero and lows[name] == 0)
        assert largest[name] <= high + margin
    assert all(largest[name] > 0.9 * high for name, (_, high) in bounds.items())
    torch.testing.assert_close(found.golden_value, same.golden_value, rtol=1e-4, atol=1e-5)
    carried = ~torch.isclose(found.faulty_value, same.faulty_value, rtol=1e-3, atol=1e-5, equal_nan=True)
    assert carried.float().mean() < 0.03
    torch.testing.assert_close(found.logits[~carried], same.logits[~carried], rtol=1e-3, atol=1e-4, equal_nan=True)
    # And it is the mitigation that does it: damage is smaller than without, and mended by the twin's own hand.
    bare = ReplayEngine(spellings, images[0], 8).run(images, faults)
    inner = faults.position < len(sites) - 1

    def damage(outcomes):
        return (outcomes.logits - outcomes.golden_logits[faults.image]).abs().nan_to_num(1e30, 1e30).amax(dim=1)[inner]

    assert damage(bare).max() > 1e6
    # fc1's outputs of at most their bounds can do only so much
    assert damage(found).max() < 1e3
    by_hand = WholeEngine(twin_of(spellings, bounds, mitigation), images[0], 8).run(images, faults)
    torch.testing.assert_close(by_hand.logits[~carried], same.logits[~carried], rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("mitigation", ["ranger", "clip_to_zero"])
def test_protecting_changes_neither_sites_nor_fault_free_outputs(mitigation, name, images):
    torch.manual_seed(0)
    model = settle(TINY[name]())
    bounds = widened(bounds_of(model, images))
    assert len(bounds) == {"resnet": 3, "transformer": 1, "mobilenet": 2}[name]
    protected = protect(model, images[0], bounds, mitigation)
    engines = [ReplayEngine(one, images[0], 8) for one in (model, protected)]
    assert engines[0].sites == engines[1].sites
    assert engines[0].skipped == engines[1].skipped
    torch.testing.assert_close(engines[0].observe(images), engines[1].observe(images), rtol=1e-5, atol=1e-6)
    ranges = [
        profile_ranges(one, DataLoader(TensorDataset(images, torch.zeros(12)), batch_size=4)) for one in (model, protected)
    ]
    pd.testing.assert_frame_equal(*ranges, rtol=1e-5)


def test_protecting_keeps_the_names_of_products_and_sums(images):
    torch.manual_seed(0)
    model = nn.Sequential(settle(TINY["resnet"]()))
    protected = protect(model, images[0], bounds_of(model, images), "ranger")
    names = [[site.layer for site in ReplayEngine(one, images[0], 4, kinds=("Add",)).sites] for one in (model, protected)]
    assert names[0] == ["0.add"]
    assert names[1] == names[0]


def test_mitigations_that_cannot_be_are_refused(spellings, images):
    bounds = bounds_of(spellings, images)
    assert protect(spellings, images[0], {}, "none") is spellings
    with pytest.raises(UnknownName, match=r"mitigation 'clip'.*clip_to_zero, none, ranger"):
        protect(spellings, images[0], bounds, "clip")
    del bounds["relu_1"]
    with pytest.raises(InvalidParameter, match="activation 'relu_1' has no profiled range"):
        protect(spellings, images[0], bounds, "ranger")


# The last layer without sampling


def brute_force(engine: ReplayEngine, images: Tensor, labels: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """DeltaLoss and mismatch [B, C, bits], one inference for each."""
    sites, bits = len(engine.sites), engine.number_format.bits
    shape = (len(images), 10, bits)
    image, neuron, bit = (index.flatten() for index in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
    count = len(image)
    outcomes = engine.run(
        images,
        Faults(
            model=FaultModel(),
            position=torch.full((count,), sites - 1),
            image=image,
            limit=torch.full((count,), limit),
            row=torch.arange(count),
            neuron=neuron,
            mask=1 << bit,
        ),
    )
    golden = F.cross_entropy(outcomes.golden_logits, labels, reduction="none")[image]
    delta = (F.cross_entropy(outcomes.logits, labels[image], reduction="none") - golden).abs()
    mismatch = outcomes.logits.argmax(dim=1) != outcomes.golden_logits.argmax(dim=1)[image]
    return delta.reshape(shape), mismatch.reshape(shape)


@pytest.mark.parametrize("which", ["network", "guided"])
@pytest.mark.parametrize("text", ["fp32", "fp16", "int(8)", "bfp(8,7,4)", "adaptivfloat(4,3)"])
def test_the_last_layer_is_enumerated_as_a_campaign_would(text, which, request, data):
    model, (images, labels) = request.getfixturevalue(which), data
    loader = DataLoader(TensorDataset(images, labels), batch_size=3, shuffle=True)
    ranges = profile_ranges(model, loader)
    profiled = dict(zip(ranges["layer"], ranges["max_abs"], strict=True))
    engine = ReplayEngine(model, images[0], 64, number_format=parse_format(text), profiled=profiled)
    chosen = [5, 0, 17, 17, 199, 60, 121]
    last = engine.sites[-1].layer
    assert last == ("fc" if which == "network" else "head")
    assert engine.factor_behind_last() == pytest.approx(float(model.logit_scale.exp()) if which == "guided" else 1.0)
    for limit in (math.inf, profiled[last], 65536.0):
        found = enumerate_last_layer(engine, loader, chosen, limit)
        delta, mismatch = brute_force(engine, images[chosen], labels[chosen], limit)
        assert found.delta_loss.shape == found.mismatch.shape == (len(chosen), 10, engine.number_format.bits)
        assert torch.equal(found.mismatch, mismatch)
        torch.testing.assert_close(found.delta_loss, delta, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert mismatch.any()
        assert not mismatch.all()
        if text == "fp32":
            assert found.delta_loss.isnan().any() == math.isinf(limit)


@pytest.mark.parametrize("text", ["fp32", "fp16", "fp8_e5m2", "int(8)", "fixed(3,4)", "adaptivfloat(4,3)", "bfp(8,7,3)"])
@pytest.mark.parametrize("limit", [math.inf, 3.0])
def test_ties_infinities_and_nans_count_as_torch_counts_them(limit, text):
    form = parse_format(text)
    storage = Storage(form, 127 / 16, 5, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    outputs = torch.cat(
        [
            torch.randint(-4, 5, (60, 5), generator=draw) / 2,  # many are equal
            torch.randn(60, 5, generator=draw) * 4,
            torch.zeros(1, 5),
            torch.full((1, 5), 1.75),
        ]
    )
    outputs = storage.round(outputs)
    labels = torch.randint(5, (len(outputs),), generator=draw)
    delta, mismatch = flip_logits(
        SimpleNamespace(storage=lambda position: storage, number_format=form), outputs, 0.5, labels, limit
    )
    for row, label in enumerate(labels):
        golden = outputs[row] * 0.5
        for column in range(5):
            block = outputs[row][column // 3 * 3 :][:3] if form.block else outputs[row]
            shared = form.shared(block, storage.limit)
            code = form.encode(outputs[row, column], storage.limit, shared)
            faulty = golden.repeat(form.bits, 1)
            for bit in range(form.bits):
                value = float(form.decode(code ^ (1 << bit), storage.limit, shared))
                if not math.isinf(limit) and not abs(value) <= limit:
                    value = -limit if value < 0 else limit
                faulty[bit, column] = value * 0.5
            expected = F.cross_entropy(faulty, label.expand(form.bits), reduction="none") - F.cross_entropy(golden, label)
            torch.testing.assert_close(delta[row, column], expected.abs(), rtol=1e-4, atol=1e-6, equal_nan=True)
            assert torch.equal(mismatch[row, column], faulty.argmax(dim=1) != golden.argmax())


def test_ten_thousand_images_at_once():
    storage = Storage(parse_format("fp32"), 0.0, 10, torch.device("cpu"))
    engine = SimpleNamespace(storage=lambda position: storage, number_format=storage.format)
    delta, mismatch = flip_logits(engine, torch.randn(10_000, 10), 14.3, torch.randint(10, (10_000,)), 5.0)
    assert delta.shape == mismatch.shape == (10_000, 10, 32)
    assert (delta.dtype, mismatch.dtype) == (torch.float32, torch.bool)
    assert delta.isfinite().all()


@pytest.mark.parametrize("which", ["network", "guided"])
def test_a_sampled_campaign_agrees_with_all_faults(which, request, loader):
    model = request.getfixturevalue(which)
    sampled = assess(model, loader, injections_per_layer=3000, seed=1, kinds=("Linear",)).iloc[-1]
    ranges = profile_ranges(model, loader, ("Linear",)).set_index("layer")
    engine = ReplayEngine(model, loader.dataset[0][0], 64, kinds=("Linear",))
    exact = enumerate_last_layer(engine, loader, eligible_images(engine, loader), ranges["max_abs"][sampled["layer"]])
    delta, mismatch = float(exact.delta_loss.double().mean()), float(exact.mismatch.double().mean())
    assert sampled["delta_loss_low"] < delta < sampled["delta_loss_high"]
    assert sampled["mismatch_low"] < mismatch < sampled["mismatch_high"]
    assert sampled["delta_loss_high"] - sampled["delta_loss_low"] < delta  # an interval that says something


class Ending(nn.Module):
    """A last layer, and what comes behind it."""

    def __init__(self, end) -> None:
        super().__init__()
        self.first, self.last, self.end = nn.Linear(64, 6), nn.Linear(6, 10), end
        self.shift = nn.Parameter(torch.randn(10))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images.flatten(1))
        return self.end(self, x, self.last(x))


FACTORS = {
    "nothing": (lambda model, x, y: y, 1.0),
    "a number": (lambda model, x, y: y * 2.0, 2.0),
    "a number first": (lambda model, x, y: 2.0 * y, 2.0),
    "a parameter": (lambda model, x, y: torch.mul(model.scale, y), 1.5),
    "several": (lambda model, x, y: -3 * (y * (model.scale + 0.5) * 0.5), -3.0),
}
NO_FACTORS = {
    "softmax": lambda model, x, y: y.softmax(dim=1),
    "a shift": lambda model, x, y: y + model.shift,
    "a vector": lambda model, x, y: y * model.shift,
    "the image": lambda model, x, y: y * x.norm(dim=1, keepdim=True),
    "itself": lambda model, x, y: y * y,
    "twice": lambda model, x, y: y * 2.0 + y * 0.5,
}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_behind_the_last_layer(name, data):
    end, factor = FACTORS[name]
    torch.manual_seed(0)
    model, (images, labels) = Ending(end).eval(), (data[0][:6], data[1][:6])
    engine = ReplayEngine(model, images[0], 64)
    assert engine.factor_behind_last() == pytest.approx(factor)
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    found = enumerate_last_layer(engine, loader, list(range(6)), 20.0)
    delta, mismatch = brute_force(engine, images, labels, 20.0)
    torch.testing.assert_close(found.delta_loss, delta, rtol=1e-4, atol=1e-5)
    if factor > 0:
        assert torch.equal(found.mismatch, mismatch)


@pytest.mark.parametrize("name", NO_FACTORS)
def test_more_than_a_factor_cannot_be_enumerated(name, data):
    torch.manual_seed(0)
    images, labels = data[0][:6], data[1][:6]
    engine = ReplayEngine(Ending(NO_FACTORS[name]).eval(), images[0], 64)
    with pytest.raises(UnsupportedModel, match="behind the last layer"):
        enumerate_last_layer(engine, DataLoader(TensorDataset(images, labels), batch_size=4), [0, 1], 20.0)


def test_a_last_layer_with_several_values_per_class_cannot_be_enumerated(data):
    model = nn.Sequential(nn.Flatten(2), nn.Linear(64, 4)).eval()
    engine = ReplayEngine(model, data[0][0], 4)
    with pytest.raises(UnsupportedModel, match=r"gives \[1, 4\] values per image"):
        enumerate_last_layer(engine, DataLoader(TensorDataset(*data), batch_size=4), [0], 20.0)


def test_images_are_taken_in_the_order_of_their_positions(network, loader):
    engine = ReplayEngine(network, loader.dataset[0][0], 4)
    chosen = [9, 2, 9, 150]
    together = enumerate_last_layer(engine, loader, chosen, 10.0)
    for row, image in enumerate(chosen):
        alone = enumerate_last_layer(engine, loader, [image], 10.0)
        torch.testing.assert_close(together.delta_loss[row], alone.delta_loss[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(together.delta_loss[0], together.delta_loss[1])
