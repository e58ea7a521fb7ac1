"""Learned clipping thresholds: what is learned, what it costs, and what engines make of it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from conftest import TINY, settle
from fault_helpers import assert_same, random_faults
from textguard.assessment import assess
from textguard.errors import InvalidParameter, UnsupportedModel
from textguard.faults import learn_thresholds, profile_activations, protect
from textguard.faults.detectors import ChannelBound
from textguard.faults.engines import ReplayEngine, WholeEngine
from textguard.faults.profiling import activation_bounds
from textguard.hardware.rates import error_rates


def pictures(count: int, seed: int) -> DataLoader:
    """Four noisy patterns of 8 x 8 pixels."""
    patterns = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=draw)
    return DataLoader(
        TensorDataset(patterns[labels] + 1.5 * torch.randn(count, 3, 8, 8, generator=draw), labels), batch_size=64
    )


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = TINY["resnet"]()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(6):
        for images, labels in pictures(512, 1):
            adam.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            adam.step()
    return model.eval()


def top1(model: nn.Module, loader: DataLoader) -> float:
    with torch.no_grad():
        return sum(int((model(images).argmax(dim=1) == labels).sum()) for images, labels in loader) / len(loader.dataset)


def test_thresholds_are_lower_and_the_model_is_as_good(trained):
    before = copy.deepcopy(trained.state_dict())
    thresholds = learn_thresholds(trained, pictures(512, 1))
    profiled = profile_activations(trained, pictures(512, 1)).set_index("activation")
    assert list(thresholds) == list(profiled.index)
    shares = []
    for name, (low, high) in thresholds.items():
        assert low == pytest.approx(profiled["low"][name], abs=1e-6)
        assert high.shape == (8,)
        assert float(high.max()) <= profiled["high"][name] * (1 + 1e-6)
        shares.append(float(high.mean() / profiled["high"][name]))
    assert max(shares) < 0.9
    held_out, images = pictures(400, 2), pictures(8, 2).dataset.tensors[0]
    protected = protect(trained, images[0], thresholds, "learned")
    assert top1(trained, held_out) > 0.9
    assert top1(protected, held_out) >= top1(trained, held_out) - 0.01
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    again = learn_thresholds(trained, pictures(512, 1))
    assert all(torch.equal(high, again[name][1]) for name, (_, high) in thresholds.items())


def test_thresholds_that_cost_too_much_go_back(trained):
    thresholds = learn_thresholds(trained, pictures(512, 1), weight=1e6, steps=120)
    protected = protect(trained, torch.zeros(3, 8, 8), thresholds, "learned")
    assert top1(protected, pictures(512, 1)) >= top1(trained, pictures(512, 1)) - 0.005


def test_faults_do_no_more_than_with_clip_to_zero(trained):
    image, held_out, lost = torch.zeros(3, 8, 8), pictures(128, 2), {}
    for mitigation in ("none", "ranger", "clip_to_zero", "learned"):
        bounds = activation_bounds(trained, pictures(512, 1), mitigation)
        curve = error_rates(protect(trained, image, bounds, mitigation), held_out, [1e-4, 3e-4], memories=24)
        lost[mitigation] = curve.memories.groupby("rate")[["lost", "flips"]].mean()
    # Thresholds are in no memory, so all have the same bits at fault.
    assert all(found["flips"].tolist() == lost["none"]["flips"].tolist() for found in lost.values())
    assert (lost["learned"]["lost"] <= lost["clip_to_zero"]["lost"] + 0.5).all()
    assert (lost["learned"]["lost"] < lost["none"]["lost"] / 1.5).all()


@pytest.mark.parametrize("name", TINY)
def test_engines_inject_behind_thresholds(name, images):
    torch.manual_seed(0)
    model = settle(TINY[name]())
    loader = DataLoader(TensorDataset(images, model(images).argmax(dim=1)), batch_size=5)
    thresholds = {key: (low, 0.7 * high) for key, (low, high) in learn_thresholds(model, loader, steps=2).items()}
    protected = protect(model, images[0], thresholds, "learned")
    engines = [ReplayEngine(protected, images[0], 8), WholeEngine(protected, images[0], 8)]
    assert engines[0].sites == ReplayEngine(model, images[0], 8).sites
    faults = random_faults(engines[0], len(images), 150, 1e6)
    assert_same(*(engine.run(images, faults) for engine in engines), faults)
    seen = {}
    for key, (_, high) in thresholds.items():
        channel = 1 if name != "transformer" else -1
        module = protected.get_submodule(f"bound_{key}")
        module.register_forward_hook(lambda module, inputs, output, key=key: seen.update({key: (inputs[0], output)}))
        with torch.no_grad():
            protected(images * 3)
        given, passed = (value.movedim(channel, -1) for value in seen[key])
        expected = torch.where((given <= high * (1 + 1e-4)) & ~given.isnan(), given, 0.0)
        near = (given - high).abs() < 1e-3
        assert ((passed == expected) | near | (given < 0)).all()
        assert (passed != given).any()


def test_thresholds_work_in_an_assessment(trained):
    found = assess(trained, pictures(32, 2), injections_per_layer=16, mitigation="learned", profile=pictures(64, 1))
    assert found.settings["mitigation"] == "learned"
    assert found.engine == "replay"
    assert len(found.table) == 5


def test_thresholds_that_cannot_be_are_refused(trained):
    loader, image = pictures(64, 1), torch.zeros(3, 8, 8)
    thresholds = learn_thresholds(trained, loader, steps=1)
    with pytest.raises(InvalidParameter, match="weight is -1"):
        learn_thresholds(trained, loader, weight=-1)
    with pytest.raises(InvalidParameter, match="for mitigation 'learned', not for 'ranger'"):
        protect(trained, image, thresholds, "ranger")
    wrong = {name: (low, high[:3]) for name, (low, high) in thresholds.items()}
    with pytest.raises(InvalidParameter, match="needs 8 thresholds, one per channel"):
        protect(trained, image, wrong, "learned")
    with pytest.raises(UnsupportedModel, match="nothing to bound"):
        learn_thresholds(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), loader)
    bound = ChannelBound(0.0, torch.tensor([1.0, 2.0]), dimension=1)
    assert bound(torch.full((1, 2, 1, 1), 1.5)).flatten().tolist() == [0.0, 1.5]
