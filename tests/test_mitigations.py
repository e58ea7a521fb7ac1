"""Mitigations: every activation kept within its profiled range, and nothing else changed."""

import copy
import math
from collections.abc import Callable

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from conftest import TINY, settle
from textguard.errors import InvalidParameter, UnknownName, UnsupportedModel
from textguard.faults import (
    FaultModel,
    profile_activations,
    profile_ranges,
    protect,
    unprotected,
)
from textguard.faults.damage import Faults
from textguard.faults.detectors import Bound
from textguard.faults.engines import ReplayEngine, WholeEngine
from textguard.faults.mitigations import ROUNDING


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
    with pytest.raises(UnknownName, match=r"mitigation 'clip'.*clip_to_zero, learned, none, ranger"):
        protect(spellings, images[0], bounds, "clip")
    del bounds["relu_1"]
    with pytest.raises(InvalidParameter, match="activation 'relu_1' has no profiled range"):
        protect(spellings, images[0], bounds, "ranger")


# Every spelling of activations that replays do not know, by name.
MORE = {
    **{module.__name__: module() for module in (nn.PReLU, nn.CELU, nn.SELU, nn.Mish, nn.Softplus, nn.Softsign, nn.LogSigmoid)},
    **{module.__name__: module() for module in (nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.RReLU)},
    **{"Threshold": nn.Threshold(0.1, 0.0), "GLU": nn.GLU(dim=1), "Hardswish": nn.Hardswish(), "Hardsigmoid": nn.Hardsigmoid()},
    **{name: getattr(F, name) for name in ("mish", "softplus", "celu", "selu", "softsign", "glu", "hardtanh", "hardsigmoid")},
    "prelu": lambda x: F.prelu(x, torch.tensor(0.25)),
    "F.threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "clamp": lambda x: x.clamp(min=0),
    "torch.clamp": lambda x: torch.clamp(x, min=0),
    "clamp_min": lambda x: x.clamp_min(0),
    "clip": lambda x: torch.clip(x, 0, 6),
    "relu_": lambda x: x.relu_(),
    "torch.relu_": torch.relu_,
    "F.elu_": F.elu_,
    "clamp_": lambda x: x.clamp_(min=0),
    "F.relu(x, True)": lambda x: F.relu(x, True),
    "F.selu(x, inplace=True)": lambda x: F.selu(x, inplace=True),
}


class Between(nn.Module):
    """A convolution and a layer with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.between, self.fc = nn.Conv2d(3, 4, 3), between, nn.LazyLinear(3)
        self.eval()(torch.zeros(1, 3, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.between(self.conv(x)).flatten(1))


@pytest.mark.parametrize("between", MORE.values(), ids=MORE)
def test_activations_of_all_kinds_are_protected(between, images):
    model, images = Between(between), images[:4, :, :6, :6]
    bounds = bounds_of(model, images)
    (name,) = bounds
    protected = protect(model, images[0], bounds, "ranger")
    with torch.no_grad():
        torch.testing.assert_close(protected(images), model(images), rtol=1e-5, atol=1e-6)
        seen = []
        protected.get_submodule(f"bound_{name}").register_forward_hook(lambda module, inputs, output: seen.append(output))
        protected(images * 1e6)
    low, high = bounds[name]
    assert low - 1e-3 <= float(seen[0].min())
    assert float(seen[0].max()) <= high + 1e-3
    assert unprotected(model, images[0]) == []


LEFT = {
    "mul": lambda x: x * x.sigmoid(),
    "pow_1": lambda x: x**2,
    "exp": lambda x: x.exp(),
    "mul_2": lambda x: x * x,
}


def test_what_bends_values_and_is_not_protected_is_named(images, capsys):
    image = images[0, :, :6, :6]
    for name, between in LEFT.items():
        model = Between(between)
        left = unprotected(model, image)
        assert len(left) == 1
        assert left[0].startswith(name.partition("_")[0])
        names = bounds_of(model, image[None])
        if names:
            protect(model, image, names, "ranger")
            assert f"leaves 1 nonlinear steps without bounds: {left[0]}" in capsys.readouterr().err
        else:
            with pytest.raises(UnsupportedModel, match=f"'ranger' has nothing to bound: .*; {left[0]} is none that it knows"):
                protect(model, image, {}, "ranger")


def test_gates_and_clamps_of_weights_are_no_activations(images):
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate, self.scale = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Parameter(torch.tensor(200.0))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv(x))
            return (x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))).mean((2, 3)) * self.scale.clamp(max=100)

    model = Gated().eval()
    assert list(bounds_of(model, images)) == ["relu", "sigmoid"]
    assert unprotected(model, images[0]) == []


def test_a_model_without_activations_is_refused_in_one_line(images):
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(3)).eval()
    model(images[:1])
    with pytest.raises(UnsupportedModel, match="'clip_to_zero' has nothing to bound: the model has no activation function; "):
        protect(model, images[0], {}, "clip_to_zero")
    assert protect(model, images[0], {}, "none") is model


def test_what_overwrites_a_value_that_others_read_stays_so_in_a_replay(images):
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            y = x.relu_()
            return (x + y).mean((2, 3))

    model = Aliased().eval()
    torch.testing.assert_close(ReplayEngine(model, images[0], 4).observe(images), model(images).detach())
