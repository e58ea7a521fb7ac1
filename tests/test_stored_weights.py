"""Weights as they lie in memory: a fault in one is in every call that reads it."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

from fault_helpers import OFF, close, make_faults
from textguard.faults import FaultModel, make_engine
from textguard.faults.damage import operate, weight_limits
from textguard.faults.engines import Engine
from textguard.faults.formats import FP32, parse_format

WEIGHT = FaultModel(target="weight")


class Tied(nn.Module):
    """Two layers that share their weights, the second one defined first; and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.first.weight = self.second.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.gelu(self.second(torch.relu(self.first(x.flatten(1)[:, :8])))))


class ConvTwice(nn.Module):
    """A convolution that is called twice, with BatchNorm behind it, which replays fold into a copy of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Shared(nn.Module):
    """ALBERT: one block of attention and feed-forward for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2)[:, :, :8]
        for _ in range(3):
            q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
            x = x + self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)
            x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


class Siamese(nn.Module):
    """A trunk that sees two halves of the image, which are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((self.trunk(x[:, :1]) - self.trunk(x[:, 1:])).abs())


class HeadOfEmbedding(nn.Module):
    """A language model's tied head: before it, the same weights are read by what is no operation, through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.words = nn.Linear(8, 8), nn.Linear(8, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.words.weight.t().square().sum(1).sqrt()
        return self.words(self.fc(x.flatten(1)[:, :8]) * scale)


MODELS = [Tied, ConvTwice, Shared, Siamese, HeadOfEmbedding]


def built(network: type[nn.Module]) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return network().eval(), torch.randn(3, 2, 6, 6)


def flipped(model: nn.Module, name: str, neuron: int, mask: int, images: torch.Tensor) -> torch.Tensor:
    """The logits of a copy of the model whose state dict has one flipped weight."""
    model = copy.deepcopy(model)
    state = model.state_dict()
    value = state[name].flatten()[neuron]
    faulty = FP32.decode(operate(FP32.encode(value[None], None, None), torch.tensor([mask]), "flip"), None, None)
    state[name].view(-1)[neuron] = faulty[0]
    model.load_state_dict(state)
    with torch.no_grad():
        return model(images)


def some_faults(engine: Engine, each: int) -> list[tuple[int, int, int, int]]:
    """Position, image, weight and mask of some faults in each site, in the upper bits."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for site in engine.sites:
        for number in range(each):
            neuron = int(torch.randint(site.weights, (), generator=draw))
            found.append((site.position, number % 3, neuron, 1 << int(torch.randint(21, 32, (), generator=draw))))
    return found


@pytest.mark.parametrize("network", MODELS)
@pytest.mark.parametrize("name", ["replay", "whole"])
def test_a_fault_is_in_every_call_that_reads_the_weight(network, name):
    model, images = built(network)
    engine = make_engine(name, model, images[0], 4, target="weight")
    assert engine.settings["engine"].lower().startswith(name)
    assert len({site.parameter for site in engine.sites}) == len(engine.sites)
    assert not any("#" in site.layer for site in engine.sites)
    assert weight_limits(model, engine.sites).keys() == {site.layer for site in engine.sites}
    parameters = {site.position: site.parameter for site in engine.sites}
    faults = some_faults(engine, 12)
    outcomes = engine.run(images, make_faults(*zip(*faults, strict=True), limit=OFF, model=WEIGHT))
    expected = torch.cat([flipped(model, parameters[p], n, m, images[i : i + 1]) for p, i, n, m in faults])
    assert close(outcomes.logits, expected).all()
    assert (~close(expected, outcomes.golden_logits[[i for _, i, _, _ in faults]])).sum() > len(faults) / 4  # they do something
    with torch.no_grad():  # and nothing is left of them
        assert close(engine.observe(images), model(images)).all()


@pytest.mark.parametrize("name", ["replay", "whole"])
def test_weights_that_are_read_once_are_hit_in_batches(name):
    """The fast way: their faults share the inferences behind the layer."""
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    engine = make_engine(name, model, torch.zeros(2, 6, 6), 4, target="weight")
    assert not engine._shared


def test_outputs_of_all_calls_stay_sites_for_faults_in_neurons():
    model, images = built(ConvTwice)
    assert [site.layer for site in make_engine("replay", model, images[0], 4).sites] == ["conv", "conv#2", "head"]


def test_formats_round_a_shared_weight_once_and_all_outputs():
    model, images = built(ConvTwice)
    options = {"number_format": parse_format("int(8)"), "profiled": {"conv": 4.0, "conv#2": 4.0, "head": 4.0}}
    replay, whole = (make_engine(name, model, images[0], 4, target="weight", **options) for name in ("replay", "whole"))
    faults = some_faults(replay, 8)
    position, image, neuron, _ = zip(*faults, strict=True)
    struck = make_faults(position, image, neuron, 1 << 7, limit=OFF, model=WEIGHT)
    a, b = replay.run(images, struck), whole.run(images, struck)
    assert close(a.logits, b.logits).all()
    assert torch.equal(a.golden_value, b.golden_value)


class Standardised(nn.Conv2d):
    """Weight standardisation: the weights are computed in each forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Pruned(nn.Module):
    """Weights in a buffer, a mask over them, and a table that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(8, 6))
        self.place = nn.Parameter(torch.randn(1, 8))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x.flatten(1)[:, :8] + self.place) @ self.table)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.attention = nn.LSTM(6, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lstm(x.flatten(1, 2))[0]
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def convolutions(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(change(nn.Conv2d(2, 3, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))


def pruned(layer: nn.Module) -> nn.Module:
    return prune.random_unstructured(layer, "weight", 0.4)


INT8 = parse_format("int(8)")
# A model, and how its rounded twin is made by hand: from the model to the (owner, name of the weight) pairs of its matrices.
ROUNDED = {
    "weight_norm": lambda: convolutions(nn.utils.parametrizations.weight_norm),
    "the old weight_norm": lambda: convolutions(nn.utils.weight_norm),
    "spectral_norm": lambda: convolutions(nn.utils.parametrizations.spectral_norm),
    "pruned": lambda: convolutions(pruned),
    "standardised": lambda: convolutions(lambda conv: Standardised(2, 3, 3)),
    "LSTM and attention": Recurrent,
    "buffer": Pruned,
}


def hand_rounded(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The logits of the model where what each product reads as a matrix is rounded just before."""

    class Rounds(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            name, kwargs = getattr(func, "__name__", ""), kwargs or {}
            if name in ("conv2d", "linear", "matmul", "__matmul__"):
                args = (args[0], rounded(args[1]), *args[2:])
            elif name == "lstm":
                args = (*args[:2], [rounded(one) if one.ndim > 1 else one for one in args[2]], *args[3:])
            elif name == "multi_head_attention_forward":
                args = (*args[:5], rounded(args[5]), *args[6:11], rounded(args[11]), *args[12:])
            return func(*args, **kwargs)

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        limit = weight.detach().abs().max()
        return INT8.round(weight.detach().reshape(1, -1), limit).reshape(weight.shape)

    with torch.no_grad(), Rounds():
        return model(images)


@pytest.mark.parametrize("make", ROUNDED.values(), ids=ROUNDED)
@pytest.mark.parametrize("name", ["replay", "whole"])
def test_formats_round_every_weight_that_a_product_reads(make, name):
    torch.manual_seed(0)
    model, images = make().eval(), torch.randn(3, 2, 6, 6)
    with torch.no_grad():
        before = model(images)
    # Outputs are left alone, so that weights alone make the difference.
    sites = make_engine(name, model, images[0], 4).sites
    engine = make_engine(name, model, images[0], 4, number_format=INT8, profiled={site.layer: 4.0 for site in sites})
    for storage in engine._storages:
        storage.round = lambda values: values
    assert engine.unrounded == ([("place", "read by add")] if make is Pruned else [])
    found = engine.observe(images)
    expected = hand_rounded(model, images)
    assert not close(before, expected).any()
    assert close(found, expected).all()
    with torch.no_grad():
        assert close(model(images), before).all()  # the user's model is as it was
