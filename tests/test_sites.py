"""Where faults go: every backbone of the paper, layers that functions call, and other kinds of operations."""

import contextlib
import io
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import TINY, settle
from fault_helpers import make_faults
from textguard.faults.damage import Faults
from textguard.faults.engines import ENGINES, ReplayEngine, WholeEngine, make_engine
from textguard.faults.sites import UNWANTED
from textguard.runtime import import_torchvision

import_torchvision()
import timm  # noqa: E402 (needs the operators)
from torchvision import models  # noqa: E402

# Image side; number of Conv2d and Linear modules; of them with outputs that have no batch dimension (the two of each cpb_mlp);
# of them called by a function instead of as a module (qkv and proj of each window attention).
BACKBONES = {
    "alexnet": (63, 8, 0, 0),
    "vgg16_bn": (32, 16, 0, 0),
    "vgg19_bn": (32, 19, 0, 0),
    "resnet18": (32, 21, 0, 0),
    "resnet34": (32, 37, 0, 0),
    "resnet50": (32, 54, 0, 0),
    "resnet101": (32, 105, 0, 0),
    "resnet152": (32, 156, 0, 0),
    "mobilenet_v2": (32, 53, 0, 0),
    "maxvit_t": (224, 151, 0, 0),
    "swin_v2_t": (64, 77, 24, 24),
    "swin_v2_s": (64, 149, 48, 48),
    "focalnet_tiny_srf": (32, 89, 0, 0),
    "focalnet_small_srf": (32, 173, 0, 0),
}
# More layers of what a smaller one of the same family has: looked at once a week.
DEEPER = ("vgg19_bn", "resnet101", "resnet152", "swin_v2_s", "focalnet_small_srf")
LARGE = ("vgg19_bn", "maxvit_t", "swin_v2_s", "focalnet_small_srf", "resnet152")
BIT = 30  # the top exponent bit: what is small becomes huge, what is 2 or more vanishes


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A backbone with random weights, and 2 images."""
    torch.manual_seed(0)
    side = BACKBONES[name][0]
    build = (lambda: timm.create_model(name, num_classes=10)) if name.startswith("focalnet") else getattr(models, name)
    model = build() if name.startswith("focalnet") else build(num_classes=10)
    images = torch.randn(2, 3, side, side)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:  # without statistics of its own, the values of a deep network run away
        kept = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model.train()(torch.randn(2 if name == "maxvit_t" else 8, 3, side, side))
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum
    return model.eval(), images


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow) if name in DEEPER else name for name in BACKBONES]
)
def backbone(request) -> tuple[str, nn.Module, Tensor, ReplayEngine]:
    """Name, network, images, and its engine, of which nothing was said."""
    model, images = network(request.param)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        engine = make_engine("replay", model, images[0], 4)
    assert type(engine) is ReplayEngine
    assert said.getvalue() == ""
    return request.param, model, images, engine


def layers_of(model: nn.Module) -> dict[int, str]:
    """Weights -> name, of every Conv2d and Linear module."""
    return {id(layer.weight): name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}


@contextlib.contextmanager
def listening(model: nn.Module, visit: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Without the code under test: lets `visit` replace the output of each conv2d and linear, called by whomever."""
    names = layers_of(model)

    def listened(function: Callable) -> Callable:
        return lambda x, weight, *more, **options: visit(names[id(weight)], function(x, weight, *more, **options))

    with mock.patch.object(F, "conv2d", listened(F.conv2d)), mock.patch.object(F, "linear", listened(F.linear)):
        yield


@torch.no_grad()
def calls(model: nn.Module, images: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of the output of every convolution and linear layer, in order of execution."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    with listening(model, lambda name, output: seen.append((name, tuple(output.shape))) or output):
        model(images)
    return seen


def flipped(value: float, bit: int, limit: float) -> float:
    """The value with one bit of its fp32 code flipped, behind a range detector."""
    found = (np.float32(value).view(np.uint32) ^ np.uint32(1 << bit)).view(np.float32)
    if abs(found) <= limit:
        return float(found)
    return -limit if found < 0 else limit


def edit(output: Tensor, neuron: int, bit: int, limit: float) -> Tensor:
    """The output for one image with one damaged value."""
    flat = output.flatten().clone()
    flat[neuron] = flipped(float(flat[neuron]), bit, limit)
    return flat.reshape(output.shape)


@torch.no_grad()
def plain_inference(model: nn.Module, image: Tensor, layer: str, neuron: int, limit: float) -> Tensor:
    """The logits of one image, with a fault in a layer."""
    with listening(model, lambda name, output: edit(output, neuron, BIT, limit) if name == layer else output):
        return model(image[None])[0]


def outputs_of(engine, images: Tensor) -> dict[str, Tensor]:
    """Layer -> its fault-free output, one image's share per row."""
    outputs = {}

    def see(position, output):
        outputs[engine.sites[position].layer] = output.reshape(len(images), -1).clone()

    engine.observe(images, see)
    return outputs


def loud_faults(engine, images: Tensor, positions: list[int]) -> Faults:
    """One fault per position, in its largest positive value on an image; the detector lets pass 50 times that."""
    outputs = outputs_of(engine, images)
    image = [number % len(images) for number in range(len(positions))]
    shares = [outputs[engine.sites[position].layer][i] for position, i in zip(positions, image, strict=True)]
    neuron = [int(share.argmax()) for share in shares]
    return make_faults(positions, image, neuron, 1 << BIT, [50 * float(share.max()) for share in shares])


def assert_same_change(found: Tensor, expected: Tensor, golden: Tensor, loud: float = 0.6, floor: float = 1e-5) -> None:
    """What faults do to the logits [N, C] is the same, and so much that another fault would do something else.

    floor: rounding errors of the fault-free logits; loud: the share of faults that must change them by 10 times as much.
    """
    scale = golden.abs().amax(dim=1, keepdim=True)
    change = (expected - golden).abs().amax(dim=1, keepdim=True)
    assert ((found - expected).abs() <= floor * scale + 2e-3 * change).all()
    assert (change > 10 * floor * scale).float().mean() >= loud


def test_every_layer_of_a_backbone_is_a_site_or_says_why_not(backbone):
    name, model, images, engine = backbone
    _, modules, batchless, functional = BACKBONES[name]
    one, two = calls(model, images[:1]), calls(model, images)
    expected = {layer: small for (layer, small), (_, large) in zip(one, two, strict=True) if small != large}
    assert [site.layer for site in engine.sites] == list(expected)
    assert {site.layer: site.neurons for site in engine.sites} == {
        layer: torch.Size(shape).numel() for layer, shape in expected.items()
    }
    layers = {layer: module for layer, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert len(layers) == modules
    assert len(engine.sites) == modules - batchless
    assert [site.kind for site in engine.sites] == [type(layers[site.layer]).__name__ for site in engine.sites]
    assert [site.weights for site in engine.sites] == [layers[site.layer].weight.numel() for site in engine.sites]

    skipped = dict(engine.skipped)
    assert len(skipped) == len(engine.skipped)
    assert skipped.keys() & layers.keys() == layers.keys() - expected.keys()
    assert all("cpb_mlp" in layer and "no batch dimension" in skipped[layer] for layer in layers.keys() - expected.keys())
    assert len(layers.keys() - expected.keys()) == batchless

    fired = set()
    hooks = [m.register_forward_hook(lambda *_, layer=layer: fired.add(layer)) for layer, m in layers.items()]
    with torch.no_grad():
        model(images[:1])
    for hook in hooks:
        hook.remove()
    unheard = {site.layer for site in engine.sites} - fired
    assert len(unheard) == functional
    assert all(layer.endswith(("attn.qkv", "attn.proj")) for layer in unheard)


def test_faults_do_the_same_to_a_backbone_replayed_and_run_whole(backbone):
    name, model, images, replay = backbone
    whole = WholeEngine(model, images[0], 4)
    assert whole.sites == replay.sites
    # Of several operations that read a parameter, one may be traced as part of what all images share.
    reasons = [[(layer, reason.endswith(UNWANTED)) for layer, reason in engine.skipped] for engine in (whole, replay)]
    assert reasons[0] == reasons[1]
    count = len(replay.sites)
    positions = [0, count // 2, count - 1] if name in LARGE else [0, 1, count // 3, count // 2, count - 2, count - 1]
    if BACKBONES[name][3]:
        wanted = ("features.1.1.attn.qkv", "features.3.0.attn.proj")
        positions += [site.position for site in replay.sites if site.layer in wanted]
        assert len(set(positions)) >= 5
        positions = [position for position in positions for _ in images]
    faults = loud_faults(replay, images, positions)
    found, same = replay.run(images, faults), whole.run(images, faults)
    torch.testing.assert_close(found.golden_value, same.golden_value, rtol=1e-3, atol=1e-5)
    golden = found.golden_logits[faults.image]
    floor = 1e-3 if "resnet" in name else 1e-4  # without a training behind them, errors grow with the depth
    assert_same_change(found.logits, same.logits, golden, floor=floor)
    for number in range(0, len(positions), 3 if len(positions) > 3 else 2):  # and without any of our engines
        layer, image = replay.sites[int(faults.position[number])].layer, images[faults.image[number]]
        expected = plain_inference(model, image, layer, int(faults.neuron[number]), float(faults.limit[number]))
        assert_same_change(found.logits[number][None], expected[None], golden[number][None], loud=0, floor=floor)


@pytest.mark.parametrize("engine_of", ["replay", "whole"])
def test_a_batch_of_one_image_has_the_same_sites(engine_of):
    model, images = network("swin_v2_t")  # with one window per image in its last stage
    engine = make_engine(engine_of, model, images[0], 4)
    together, alone = outputs_of(engine, images), outputs_of(engine, images[:1])
    for layer, output in together.items():
        torch.testing.assert_close(alone[layer], output[:1], rtol=1e-3, atol=1e-4)
    position = next(site.position for site in engine.sites if site.layer == "features.7.1.attn.proj")
    fault = loud_faults(engine, images, [position])
    expected = plain_inference(model, images[0], "features.7.1.attn.proj", int(fault.neuron[0]), float(fault.limit[0]))
    found = engine.run(images, fault)
    assert_same_change(found.logits, expected[None], found.golden_logits[:1], floor=1e-4)


def test_a_fault_in_a_window_belongs_to_the_windows_image(images):
    torch.manual_seed(0)
    model = settle(TINY["transformer"]())
    replay = ReplayEngine(model, images[0], 5)
    assert {site.layer: site.shape for site in replay.sites} == {"patches": (8, 4, 4), "mix": (4, 4, 8), "head": (4,)}
    outputs = []
    with torch.no_grad():
        for image in images:  # one at a time, so that all of the output is this image's
            with listening(model, lambda name, output: outputs.append(output.flatten()) or output if name == "mix" else output):
                model(image[None])
    draw = torch.Generator().manual_seed(2)
    image = torch.randint(len(images), (40,), generator=draw).tolist()
    neuron = torch.randint(4 * 4 * 8, (40,), generator=draw).tolist()
    faults = make_faults([1] * 40, image, neuron, 1 << BIT, 50.0)
    for engine in (replay, WholeEngine(model, images[0], 7)):
        found = engine.run(images, faults)
        expected = torch.stack([outputs[i][n] for i, n in zip(image, neuron, strict=True)])
        torch.testing.assert_close(found.golden_value, expected, rtol=1e-4, atol=1e-6)
        logits = torch.stack([plain_inference(model, images[i], "mix", n, 50.0) for i, n in zip(image, neuron, strict=True)])
        assert_same_change(found.logits, logits, found.golden_logits[faults.image], loud=0.3)


def before_second_call(neuron: int, limit: float) -> Callable:
    """A hook that damages what its module gets at its second call."""
    count = 0

    def hook(module, inputs):
        nonlocal count
        count += 1
        return edit(inputs[0], neuron, BIT, limit) if count == 2 else None

    return hook


def test_residual_additions_of_resnet18_on_request():
    model, images = network("resnet18")
    engine = ReplayEngine(model, images[0], 4, kinds=("Conv2d", "Linear", "Add"))
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert [site.layer for site in engine.sites if site.kind == "Add"] == [f"{block}.add" for block in blocks]
    assert len(engine.sites) == 21 + 8
    assert {site.weights for site in engine.sites if site.kind == "Add"} == {0}
    shapes = {site.layer: site.shape for site in engine.sites}
    assert all(shapes[f"{block}.add"] == shapes[f"{block}.conv2"] for block in blocks)
    positions = [site.position for site in engine.sites if site.layer in ("layer1.0.add", "layer3.1.add", "layer4.1.add")]
    faults = loud_faults(engine, images, positions)
    expected = []
    for position, image, neuron, limit in zip(positions, faults.image, faults.neuron, faults.limit, strict=True):
        # The second call of a block's relu is behind its addition.
        relu = model.get_submodule(engine.sites[position].layer.removesuffix(".add")).relu
        handle = relu.register_forward_pre_hook(before_second_call(int(neuron), float(limit)))
        with torch.no_grad():
            expected.append(model(images[image][None])[0])
        handle.remove()
    found = engine.run(images, faults)
    assert_same_change(found.logits, torch.stack(expected), found.golden_logits[faults.image], floor=1e-4)


def test_additions_in_place_are_sites_of_both_engines(resnet, images):
    names = [
        [site.layer for site in build(resnet, images[0], 4, kinds=("Add",)).sites] for build in (ReplayEngine, WholeEngine)
    ]
    assert names[0] == names[1] == ["add"]


class TinyAttention(nn.Module):
    """Products and sums of activations in all their spellings, each with a module behind it that a hook can be put on."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.qkv = nn.Linear(8, 24)
        self.probes = nn.ModuleDict({name: nn.Identity() for name in ("at", "bmm", "einsum", "sum", "add", "sdpa")})
        self.bias = nn.Parameter(torch.randn(16, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = self.probes["at"](q @ k.transpose(1, 2)).softmax(dim=-1)
        mixed = self.probes["bmm"](torch.bmm(scores, v))
        mixed = self.probes["einsum"](torch.einsum("bqk,bkc->bqc", scores, mixed))
        x = self.probes["sum"](x + mixed) + self.bias  # a bias and a number are no branches
        x = self.probes["add"](torch.add(x + 1, mixed))
        x = self.probes["sdpa"](F.scaled_dot_product_attention(x, k, v)) + 2.0
        return self.head(x.mean(dim=1))


def test_products_and_sums_of_activations_on_request(images):
    torch.manual_seed(0)
    model = TinyAttention().eval()
    kinds = ("Conv2d", "Linear", "MatMul", "Add")
    probes = {"matmul": "at", "matmul#2": "bmm", "matmul#3": "einsum", "add": "sum", "add#2": "add", "matmul#4": "sdpa"}
    engines = [build(model, images[0], 5, kinds=kinds) for build in (ReplayEngine, WholeEngine)]
    assert engines[0].sites == engines[1].sites
    assert [(site.layer, site.kind) for site in engines[0].sites] == [
        ("patches", "Conv2d"),
        ("qkv", "Linear"),
        *((name, "Add" if name.startswith("add") else "MatMul") for name in probes),
        ("head", "Linear"),
    ]
    assert engines[0].sites[2].shape == (16, 16)
    positions = [site.position for site in engines[0].sites if site.layer in probes for _ in range(4)]
    faults = loud_faults(engines[0], images, positions)
    expected = []
    for position, image, neuron, limit in zip(positions, faults.image, faults.neuron, faults.limit, strict=True):
        probe = model.probes[probes[engines[0].sites[position].layer]]
        handle = probe.register_forward_hook(
            lambda module, inputs, output, n=int(neuron), limit=float(limit): edit(output, n, BIT, limit)
        )
        with torch.no_grad():
            expected.append(model(images[image][None])[0])
        handle.remove()
    for engine in engines:
        found = engine.run(images, faults)
        assert_same_change(found.logits, torch.stack(expected), found.golden_logits[faults.image])


def test_attention_products_of_swin_v2_on_request():
    model, images = network("swin_v2_t")
    kinds = ("Conv2d", "Linear", "MatMul", "Add")
    engine, whole = (build(model, images[0], 4, kinds=kinds) for build in (ReplayEngine, WholeEngine))
    blocks = [f"features.{stage}.{block}" for stage, depth in ((1, 2), (3, 2), (5, 6), (7, 2)) for block in range(depth)]
    by_kind = {kind: [site.layer for site in engine.sites if site.kind == kind] for kind in kinds}
    assert by_kind["MatMul"] == [f"{block}.attn.matmul{call}" for block in blocks for call in ("", "#2")]
    assert by_kind["Add"] == [f"{block}.add{call}" for block in blocks for call in ("", "#2")]
    assert [(site.kind, site.shape) for site in whole.sites] == [(site.kind, site.shape) for site in engine.sites]
    wanted = ("features.1.1.attn.matmul", "features.5.2.attn.matmul#2", "features.1.0.add", "features.7.1.add#2")
    faults = loud_faults(engine, images, [site.position for site in engine.sites if site.layer in wanted for _ in images])
    found, same = engine.run(images, faults), whole.run(images, faults)
    assert_same_change(found.logits, same.logits, found.golden_logits[faults.image], floor=1e-4)


def test_both_engines_name_products_and_sums_after_their_module(images):
    model = nn.Sequential(TinyAttention()).eval()
    names = [[site.layer for site in build(model, images[0], 4, kinds=("Add",)).sites] for build in (ReplayEngine, WholeEngine)]
    assert names[0] == ["0.add", "0.add#2"]
    assert names[1] == names[0]


class Signal(nn.Module):
    """Convolutions of one dimension, then transposed ones of two; between them some of three, where they are wanted."""

    def __init__(self, depth: bool) -> None:
        super().__init__()
        self.wave = nn.Conv1d(3, 6, 5, stride=2, padding=2)
        self.depth = nn.Conv3d(1, 2, 3, padding=1) if depth else nn.Identity()
        self.up = nn.ConvTranspose2d(12 if depth else 6, 5, 3, stride=2)
        self.head = nn.Linear(5, 4)

    def forward(self, signals: Tensor) -> Tensor:
        x = torch.tanh(self.wave(signals))
        x = torch.tanh(self.depth(x.unflatten(2, (4, 4))[:, None])).flatten(1, 2)
        return self.head(torch.tanh(self.up(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("engine_of", "depth"),
    [
        ("replay", False),
        ("replay", True),
        ("whole", False),
        ("whole", True),
    ],
)
def test_other_convolutions_on_request(engine_of, depth):
    torch.manual_seed(0)
    model, signals = Signal(depth).eval(), torch.randn(6, 3, 32)
    build, expected_sites = (
        ENGINES[engine_of],
        [("wave", "Conv1d", (6, 16)), ("up", "ConvTranspose2d", (5, 9, 9)), ("head", "Linear", (4,))],
    )
    if depth:
        expected_sites.insert(1, ("depth", "Conv3d", (2, 6, 4, 4)))
    engine = build(model, signals[0], 5, kinds=("Conv1d", "Conv3d", "ConvTranspose2d", "Linear"))
    assert [(site.layer, site.kind, site.shape) for site in engine.sites] == expected_sites
    positions = [position for position in range(len(engine.sites)) for _ in range(6)]
    faults = loud_faults(engine, signals, positions)
    expected = []
    for position, image, neuron, limit in zip(positions, faults.image, faults.neuron, faults.limit, strict=True):
        handle = model.get_submodule(engine.sites[position].layer).register_forward_hook(
            lambda module, inputs, output, n=int(neuron), limit=float(limit): edit(output, n, BIT, limit)
        )
        with torch.no_grad():
            expected.append(model(signals[image][None])[0])
        handle.remove()
    found = engine.run(signals, faults)
    assert_same_change(found.logits, torch.stack(expected), found.golden_logits[faults.image], loud=0.9)
    usual = build(model, signals[0], 5)
    assert [site.layer for site in usual.sites] == [layer for layer, kind, _ in expected_sites if kind != "ConvTranspose2d"]
    assert dict(usual.skipped)["up"] == "ConvTranspose2d is not among the wanted kinds of sites"
