"""The replay engine against two that run the whole network, and against plain hooks, fault by fault."""

import random
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import TINY, settle
from textguard.errors import UnknownName, UnsupportedModel
from textguard.faults import suffix
from textguard.faults.damage import SINGLE_FLIP, FaultModel, Faults, operate
from textguard.faults.detectors import clamp_to_range
from textguard.faults.engines import ENGINES, PyTorchFIEngine, ReplayEngine, WholeEngine, make_engine
from textguard.faults.formats import FP32
from textguard.faults.local import LocalSteps
from textguard.vision.classifiers import ClassifierSpec, build_classifier

# Engines add up in different orders: convolutions of other batch sizes and memory formats, folded BatchNorm. Logits are
# compared in units of the largest of the C where that is above 1: after a fault of 1e38, small ones are what is left of large
# ones.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
OFF = float("inf")
LIMITS = (2.0, 65536.0, OFF)  # of the range detector
# Finite, but near the largest fp32 number: there it depends on the order of additions whether a sum overflows.
OVERFLOWS = 1e30
CORNER_BITS = (31, 30, 30, 29, 28, 27, 25, 23, 22)


def make_faults(engine, position, image, neuron, bit, limit, model=SINGLE_FLIP) -> Faults:
    """Single flips: tensors or lists of int64, one entry each."""
    position, image, neuron, bit = (torch.as_tensor(column) for column in (position, image, neuron, bit))
    count = len(position)
    neurons = torch.tensor([site.neurons for site in engine.sites])[position]
    assert (neuron < neurons).all()
    return Faults(model, position, image, torch.full((count,), float(limit)), torch.arange(count), neuron, 1 << bit)


def random_faults(engine, images: int, count: int, limit: float, layers=None, bits=range(32)) -> Faults:
    """Faults at random places of all layers, or of the given ones in turn."""
    draw = torch.Generator().manual_seed(0)
    named = {site.layer: site.position for site in engine.sites}
    choice = torch.tensor([named[layer] for layer in layers or named])
    position = choice[torch.arange(count) % len(choice)]
    neurons = torch.tensor([site.neurons for site in engine.sites])[position]
    return make_faults(
        engine,
        position,
        torch.randint(images, (count,), generator=draw),
        (torch.rand(count, generator=draw) * neurons).long(),
        torch.tensor(bits)[torch.randint(len(bits), (count,), generator=draw)],
        limit,
    )


def close(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which rows of two logits [N, C] agree; NaN equals NaN, and infinities those of their sign."""
    unit = b.abs().nan_to_num(0.0, 0.0, 0.0).amax(dim=1, keepdim=True).clamp(min=1)
    return torch.isclose(a / unit, b / unit, equal_nan=True, **TOLERANCE).all(dim=1)


def assert_same(a, b, faults, least=0.97):
    """Outcomes of two engines agree: golden values and logits to TOLERANCE, the rest exactly."""
    torch.testing.assert_close(a.golden_value, b.golden_value, **TOLERANCE)
    assert close(a.golden_logits, b.golden_logits).all()
    for outcomes in (a, b):
        codes = operate(FP32.encode(outcomes.golden_value, None, None), faults.mask, faults.model.operation)
        expected, detected = clamp_to_range(FP32.decode(codes, None, None), faults.limit)
        torch.testing.assert_close(outcomes.faulty_value, expected, equal_nan=True, rtol=0, atol=0)
        assert torch.equal(outcomes.detected, detected)
        assert torch.equal(outcomes.logits[outcomes.masked], outcomes.golden_logits[faults.image[outcomes.masked]])
    # Golden values that lie a rounding apart can lie on two sides of a carry, where one bit flips to values further apart.
    closer = {name: bound / 10 for name, bound in TOLERANCE.items()}
    same = torch.isclose(a.faulty_value, b.faulty_value, equal_nan=True, **closer)
    assert same.float().mean() > least
    assert torch.equal(a.detected[same], b.detected[same])
    certain = same & ~(b.faulty_value.isfinite() & (b.faulty_value.abs() > OVERFLOWS))
    wrong = certain & ~close(a.logits, b.logits)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {len(wrong)} faults, the first in site {faults.position[wrong][0]}, neuron "
        f"{faults.neuron[wrong][0]}: {a.logits[wrong][0].tolist()} and {b.logits[wrong][0].tolist()}"
    )
    mismatch_a, mismatch_b = (o.logits.argmax(dim=1) != o.golden_logits.argmax(dim=1)[faults.image] for o in (a, b))
    assert torch.equal(mismatch_a[certain], mismatch_b[certain])


# Tiny models and real backbones, on all engines.


def make_constant(layer: nn.Module, channel: int, value: float) -> None:
    """Let a channel of the layer be `value` everywhere. Flipping bit 30 makes 1 infinite, and 1.5 NaN."""
    with torch.no_grad():
        layer.weight[channel] = 0
        layer.bias[channel] = value


@pytest.mark.parametrize("limit", LIMITS)
def test_engines_agree_fault_by_fault(tiny_model, images, limit):
    for module in tiny_model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            make_constant(module, 0, 1.0)
            make_constant(module, 1, -1.5)
    replay, whole = ReplayEngine(tiny_model, images[0], 32), WholeEngine(tiny_model, images[0], 16)
    assert replay.sites == whole.sites
    faults = random_faults(replay, len(images), 400, limit, bits=(*range(32), *[30] * 8))
    outcomes = replay.run(images, faults)
    assert_same(outcomes, whole.run(images, faults), faults)
    if not isinstance(tiny_model, TINY["transformer"]):  # PyTorchFI would take its windows for images
        reference = PyTorchFIEngine(tiny_model, images[0], 16)
        assert reference.sites == whole.sites
        assert_same(outcomes, reference.run(images, faults), faults)
    assert outcomes.detected.any() == (limit != OFF)
    for kind in (torch.isnan, torch.isinf):
        assert kind(outcomes.faulty_value).any() == (limit == OFF)


class NarrowVGG(nn.Module):
    """torchvision's vgg16_bn, an eighth as wide."""

    def __init__(self):
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers

        self.features = make_layers([size if size == "M" else size // 8 for size in cfgs["D"]], batch_norm=True)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(64 * 4, 128),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(128, 128),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(128, 5),
        )

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def backbone(name, size):
    torch.manual_seed(0)
    if name == "vgg16_bn":
        model = NarrowVGG()
    else:
        variant, width = ("baseline", 0) if name == "mobilenet_v2" else ("random", 16)
        model = build_classifier(ClassifierSpec("none", name, variant, size, size, "bilinear", width, tuple("abcde")))
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        with torch.no_grad():  # without statistics of its own, hardly a fault would reach a deep network's logits
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 1.0
            model.train()(torch.randn(16, 3, size, size))
    return model.eval(), torch.randn(4, 3, size, size)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 32), ("mobilenet_v2", 32), ("alexnet", 64), ("vgg16_bn", 32)])
def test_engines_agree_on_real_backbones(name, size):
    model, pictures = backbone(name, size)
    engines = [
        ReplayEngine(model, pictures[0], 32),
        WholeEngine(model, pictures[0], 32),
        PyTorchFIEngine(model, pictures[0], 64),
    ]
    assert engines[0].sites == engines[1].sites == engines[2].sites
    linear = [site.layer for site in engines[0].sites if site.kind == "Linear"]
    for limit in LIMITS:
        # Every layer twice, and the linear ones, where most of the damage is done, more often.
        layers = [site.layer for site in engines[0].sites] * 2 + linear * (8 // len(linear))
        faults = random_faults(engines[0], 4, len(layers), limit, layers)
        first, *others = (engine.run(pictures, faults) for engine in engines)
        for other in others:
            assert_same(first, other, faults, least=0.8)
        assert (~close(first.logits, first.golden_logits[faults.image])).float().mean() > 0.2  # most of the bits are low


# A twin that shares no code with the engines.


def inject_with_a_hook(model: nn.Module, image: torch.Tensor, layer: str, neuron: int, bit: int, limit: float) -> torch.Tensor:
    """The slow twin: one image, one fault, one whole forward pass."""

    def hook(module, inputs, output):
        flat = output.clone().reshape(-1)
        word = flat[neuron : neuron + 1].view(torch.int32)
        word ^= torch.tensor(1 << bit).to(torch.int32)
        flat[neuron] = clamp_to_range(flat[neuron : neuron + 1], torch.tensor([limit]))[0][0]
        return flat.reshape(output.shape)

    handle = model.get_submodule(layer).register_forward_hook(hook)
    with torch.no_grad():
        logits = model(image.clone()[None])
    handle.remove()
    return logits[0]


def assert_hooks_agree(model, images, engine, faults):
    """An engine's logits are those of one hook per fault. The detector's limit must be finite."""
    outcomes = engine.run(images, faults)
    for i in range(len(faults.position)):
        layer, bit = engine.sites[faults.position[i]].layer, int(faults.mask[i]).bit_length() - 1
        logits = inject_with_a_hook(model, images[faults.image[i]], layer, int(faults.neuron[i]), bit, float(faults.limit[i]))
        torch.testing.assert_close(
            outcomes.logits[i], logits, equal_nan=True, **TOLERANCE, msg=f"fault {i} in {layer}, bit {bit}"
        )
    return outcomes


@pytest.mark.parametrize("name", ["replay", "whole"])
def test_engines_agree_with_one_hook_per_fault(tiny_model, images, name):
    engine = make_engine(name, tiny_model, images[0], 16)
    faults = random_faults(engine, len(images), 90, 3.0)
    outcomes = assert_hooks_agree(tiny_model, images, engine, faults)
    assert (~close(outcomes.logits, outcomes.golden_logits[faults.image])).sum() > 20


def test_results_do_not_depend_on_batch_size_or_order(tiny_model, images):
    faults = random_faults(ReplayEngine(tiny_model, images[0], 8), len(images), 150, 3.0)
    reference = ReplayEngine(tiny_model, images[0], 1).run(images, faults)
    for batch_size in (7, 64, 1000):
        assert_same(ReplayEngine(tiny_model, images[0], batch_size).run(images, faults), reference, faults)
    shuffle = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    for name in ("replay", "whole"):
        engine = make_engine(name, tiny_model, images[0], 64)
        columns = (faults.position[shuffle], faults.image[shuffle], faults.limit[shuffle], faults.row)
        shuffled = engine.run(images, Faults(SINGLE_FLIP, *columns, faults.neuron[shuffle], faults.mask[shuffle]))
        torch.testing.assert_close(shuffled.golden_value, reference.golden_value[shuffle], **TOLERANCE)
        torch.testing.assert_close(shuffled.logits, reference.logits[shuffle], equal_nan=True, **TOLERANCE)


# Random networks: the geometry of local replays, of folded convolutions and of convolutions as matrix products.


class Residual(nn.Module):
    def __init__(self, branch, shortcut):
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x):
        return self.branch(x) + self.shortcut(x)


class Doubled(nn.Module):
    def forward(self, x):
        return x + x


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return self.factor * x


def norm_of(channels):
    """A BatchNorm2d whose statistics and weights are not 0 and 1."""
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.normal_(1, 0.5)
        norm.bias.normal_()
    return norm


class RandomNet(nn.Module):
    """A network of 2 to 11 random pieces, images [B, 3, H, W] to 5 classes; `shape` is (3, H, W)."""

    ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Hardtanh, nn.Identity, nn.Dropout)
    PIECES = ("conv",) * 5 + ("act",) * 4 + ("norm",) * 2 + ("pool",) * 2 + ("residual",) * 3 + ("average", "double", "scale")

    def __init__(self, seed):
        super().__init__()
        self.pick = random.Random(seed)
        torch.manual_seed(seed)
        self.shape = (3, self.pick.randint(4, 20), self.pick.randint(4, 20))
        layers, value = [], torch.zeros(2, *self.shape)
        wanted = self.pick.randint(2, 9)
        while len(layers) < wanted:
            layer = self.conv(3, 6) if not layers else self.piece(value)
            after = self.fits(layer, value)
            if after is not None:
                layers, value = [*layers, layer], after
        if value[0].numel() > 1500 or self.pick.random() < 0.3:
            layers.append(nn.AdaptiveAvgPool2d(1))
            value = layers[-1](value)
        features = value[0].numel()
        layers.append(nn.Flatten())
        if self.pick.random() < 0.5:
            layers += [nn.Linear(features, 7), self.activation()]
            features = 7
        layers.append(nn.Linear(features, 5))
        if self.pick.random() < 0.3:
            layers.append(Scaled(3.0))
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)

    def piece(self, value, residuals=True):
        kind, channels = self.pick.choice(self.PIECES), value.shape[1]
        if kind == "norm":
            return norm_of(channels)
        if kind == "act":
            return self.activation()
        if kind == "pool":
            kernel = self.pair(1, 4)
            padding = [self.pick.randint(0, size // 2) for size in kernel]
            return nn.MaxPool2d(kernel, self.pair(1, 3), padding, self.pair(1, 2), ceil_mode=self.pick.random() < 0.2)
        if kind == "average":
            return nn.AvgPool2d(self.pick.randint(1, 3), self.pick.randint(1, 2))
        if kind == "double":
            return Doubled()
        if kind == "scale":
            return Scaled(self.pick.uniform(0.5, 2))
        return self.residual(value) if kind == "residual" and residuals else self.conv(channels)

    def residual(self, value):
        branch, after = [], value
        for _ in range(self.pick.randint(1, 4)):
            layer = self.piece(after, residuals=False)
            found = self.fits(layer, after)
            if found is not None:
                branch, after = [*branch, layer], found
        if after.shape == value.shape and self.pick.random() < 0.6:
            return Residual(nn.Sequential(*branch), nn.Identity())
        stride = [-(-before // size) for before, size in zip(value.shape[2:], after.shape[2:], strict=True)]
        settings = {"kernel_size": 1, "stride": stride, "padding": 0, "groups": 1}
        return Residual(nn.Sequential(*branch), self.conv(value.shape[1], after.shape[1], **settings))

    def conv(self, channels, outputs=None, **settings):
        groups = self.pick.choice([1, 1, 1, channels, 2 if channels % 2 == 0 else 1])
        if not outputs:
            outputs = channels if groups == channels else groups * self.pick.randint(1, 8 // groups)
        drawn = {
            "kernel_size": self.pair(1, 5),
            "stride": self.pick.choice([(1, 1), (1, 1), self.pair(1, 3)]),
            "padding": self.pair(0, 3),
            "dilation": self.pair(1, 2),
            "groups": groups if outputs % groups == 0 else 1,
            "bias": self.pick.random() < 0.5,
        }
        conv = nn.Conv2d(channels, outputs, **(drawn | settings))
        nn.init.kaiming_normal_(conv.weight)
        if conv.bias is not None and outputs > 1:
            make_constant(conv, 0, self.pick.choice([1.0, -1.0]))  # exactly
        return conv

    def activation(self):
        return self.pick.choice(self.ACTIVATIONS)()

    def pair(self, low, high):
        return self.pick.randint(low, high), self.pick.randint(low, high)

    @staticmethod
    def fits(layer, value):
        """What the layer makes of the value, or None where it cannot, or where torch 2.13 itself is no reference.

        An output that sees nothing but padding is -inf for MaxPool2d, and a convolution in the channels_last format may crash.
        There, convolutions of one channel with unequal strides may also be wrong.
        """
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 1 and layer.stride[0] != layer.stride[1]:
            return None
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
            columns = zip(layer.kernel_size, layer.stride, layer.padding, layer.dilation, value.shape[2:], strict=True)
            for kernel, stride, padding, dilation, size in columns:
                count = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
                firsts = range(-padding, -padding + count * stride, stride)
                seen = [any(0 <= first + tap * dilation < size for tap in range(kernel)) for first in firsts]
                if not seen or not all(seen):
                    return None
        try:
            with torch.no_grad():
                after = layer.eval()(value)
        except RuntimeError:
            return None
        return after if after.numel() else None


def faults_at_every_edge(engine, images: int, limit: float, seed: int, inside: int = 5) -> Faults:
    """For each site: the corners of its map, some of its borders and some of what lies between them."""
    pick = random.Random(seed)
    columns = []
    for site in engine.sites:
        channels, height, width = (*site.shape, 1, 1)[:3]
        top, left = (0, height - 1), (0, width - 1)
        places = [(row, column) for row in top for column in left]
        places += [(pick.choice(top), pick.randrange(width)) for _ in range(2)]
        places += [(pick.randrange(height), pick.choice(left)) for _ in range(2)]
        places += [(pick.randrange(height), pick.randrange(width)) for _ in range(inside)]
        for row, column in places:
            neuron = (pick.randrange(channels) * height + row) * width + column
            bit = pick.choice((*CORNER_BITS, pick.randrange(32)))
            columns.append((site.position, pick.randrange(images), neuron, bit))
    return make_faults(engine, *zip(*columns, strict=True), limit)


@pytest.fixture
def paths(monkeypatch) -> Counter:
    """Counts (operation, size of the patch) for each step that a local replay took, and matrix products."""
    taken = Counter()
    run, matrix_product = LocalSteps.run, suffix._matrix_product

    def count_steps(self, step, patches, golden, image):
        patch = run(self, step, patches, golden, image)
        operation = self._traced.operation(step)
        kind = "refused" if patch is None else "point" if patch.is_point else "all channels"
        window = patch is not None and patch.values[0, ..., 0].numel() > 1
        taken[getattr(operation, "__name__", operation), f"{kind}, window" if window else kind] += len(image)
        return patch

    def count_products(*args):
        product = matrix_product(*args)

        def run_and_count(x):
            taken["matrix"] += len(x)
            return product(x)

        return run_and_count

    monkeypatch.setattr(LocalSteps, "run", count_steps)
    monkeypatch.setattr(suffix, "_matrix_product", count_products)
    return taken


def test_random_networks_replay_as_they_run_whole(paths):
    reached = injected = masked = infinite = 0
    for seed in range(150):
        model = RandomNet(seed).eval()
        pictures = torch.randn(3, *model.shape)
        replay, whole = ReplayEngine(model, pictures[0], 8), WholeEngine(model, pictures[0], 64)
        assert replay.sites == whole.sites
        # torch's GELU makes infinity infinite in some places of a tensor and NaN in others.
        largest = 65536.0 if any(isinstance(module, nn.GELU) for module in model.modules()) else OFF
        for limit in (3.0, largest):
            faults = faults_at_every_edge(replay, 3, limit, seed)
            try:
                outcomes = replay.run(pictures, faults)
                assert_same(outcomes, whole.run(pictures, faults), faults, least=0.9)
            except Exception as error:
                raise AssertionError(
                    f"seed {seed}, limit {limit}, images {model.shape}, sites {replay.sites}\n{model}"
                ) from error
            reached += int((~close(outcomes.logits, outcomes.golden_logits[faults.image])).sum())
            masked += int(outcomes.masked.sum())
            infinite += int(outcomes.faulty_value.isinf().sum())
            injected += len(faults.position)
    # The comparison is worth something only where faults show, and where they took the fast paths.
    assert reached > 0.6 * injected
    assert masked > 0.05 * injected
    assert infinite > 50
    assert paths["matrix"] > 100
    for operation in ("Conv2d", "BatchNorm2d", "MaxPool2d", "ReLU6", "add", "mul"):
        for size in ("point", "point, window", "all channels", "all channels, window"):
            assert paths[operation, size] >= 20, (operation, size, paths)
    assert paths["Flatten", "point"] > 100
    assert paths["Linear", "all channels"] > 100


def layers_behind_a_convolution(*layers):
    """Images [B, 3, 27, 30] to 4 channels, of which the first is 1 everywhere, and through the layers to 5 classes."""
    conv = nn.Conv2d(3, 4, 3, padding=1)
    make_constant(conv, 0, 1.0)
    return nn.Sequential(conv, *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))


def thirds(**settings):
    """Two ways from 27 x 30 to 9 x 10, for which the pixels to look at are the same for some faults and differ for others."""
    ways = nn.Conv2d(4, 4, 1, stride=3, **settings), nn.Conv2d(4, 4, 3, stride=3, padding=1, **settings)
    return nn.Sequential(Residual(*ways), norm_of(4))


def follow():
    return nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)


# What random networks seldom hold.
DIRECTED = {
    "sums of different pixels": lambda: layers_behind_a_convolution(thirds(), *follow()),
    "sums of different points": lambda: layers_behind_a_convolution(thirds(groups=4), nn.ReLU6(), *follow()),
    "outputs that see all of 2 x 3": lambda: layers_behind_a_convolution(
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.Conv2d(4, 6, 5, padding=2),
        norm_of(6),
        nn.ReLU6(),
        nn.Conv2d(6, 4, (3, 5), padding=(1, 2)),
    ),
    # As a matrix, it would multiply an infinity by zero.
    "outputs that see a part of 4 x 4": lambda: layers_behind_a_convolution(
        nn.AdaptiveAvgPool2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU6()
    ),
    "poolings": lambda: layers_behind_a_convolution(
        nn.MaxPool2d(2, ceil_mode=True),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        *follow(),
        nn.MaxPool2d((2, 3), (1, 2), (1, 0), (2, 1)),
    ),
}


@pytest.mark.parametrize("name", DIRECTED)
def test_particular_networks_replay_as_they_run_whole(name, paths):
    torch.manual_seed(0)
    model = DIRECTED[name]().eval()
    pictures = torch.randn(4, 3, 27, 30)
    replay, whole = ReplayEngine(model, pictures[0], 16), WholeEngine(model, pictures[0], 64)
    for limit in (3.0, OFF):
        faults = faults_at_every_edge(replay, 4, limit, seed=0, inside=40)
        outcomes = replay.run(pictures, faults)
        assert_same(outcomes, whole.run(pictures, faults), faults, least=0.9)
    assert outcomes.faulty_value.isinf().any()
    assert (paths["matrix"] > 0) == (name == "outputs that see all of 2 x 3")


# Faults that leave no trace.


def test_faults_that_relu_hides_are_masked_and_end_with_the_golden_logits(resnet, images):
    replay, whole = ReplayEngine(resnet, images[0], 64), WholeEngine(resnet, images[0], 64)
    # A low mantissa bit never changes the sign: ReLU hides it wherever BatchNorm is negative, and nowhere else.
    faults = random_faults(replay, len(images), 200, 3.0, ["conv1"], bits=[12])
    outcomes = replay.run(images, faults)
    normalised = resnet.norm1(resnet.conv1(resnet.stem(images))).flatten(1)[faults.image, faults.neuron]
    assert 50 < (normalised < -1e-2).sum() < 150
    assert outcomes.masked[normalised < -1e-2].all()
    assert not outcomes.masked[normalised > 1e-2].any()
    assert torch.equal(outcomes.logits[outcomes.masked], outcomes.golden_logits[faults.image[outcomes.masked]])
    assert_same(outcomes, whole.run(images, faults), faults)


class PreActivation(nn.Module):
    """The value behind `stem` is read by ReLU and by the shortcut around it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + self.conv(F.relu(x))).mean(dim=(2, 3)))


def test_faults_that_a_second_reader_carries_on_are_not_masked(images):
    torch.manual_seed(0)
    model = PreActivation().eval()
    engine = ReplayEngine(model, images[0], 64)
    negative = (model.stem(images) < -0.1).flatten(1).nonzero()[:200:4]
    count = len(negative)
    # Bit 23 changes the exponent by one: a negative number stays negative, and ReLU still gives 0.
    faults = make_faults(engine, torch.zeros(count).long(), negative[:, 0], negative[:, 1], torch.full((count,), 23), 50.0)
    outcomes = assert_hooks_agree(model, images, engine, faults)
    assert not outcomes.masked.any()
    assert (outcomes.logits != outcomes.golden_logits[faults.image]).any(dim=1).float().mean() > 0.9


def test_values_that_nothing_reads_mask_their_faults(images):
    class Unread(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.extra, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4)

        def forward(self, x):
            x = self.stem(x)
            self.extra(x).relu()
            return self.fc(x.mean(dim=(2, 3)))

    torch.manual_seed(0)
    model = Unread().eval()
    engine = ReplayEngine(model, images[0], 16)
    faults = random_faults(engine, len(images), 60, 50.0)
    outcomes = assert_hooks_agree(model, images, engine, faults)
    assert outcomes.masked[faults.position == 1].all()
    assert not outcomes.masked[faults.position == 2].any()


# Models that the replay engine refuses, and those that it would get wrong if it did not look closely.


class Carrying(nn.Module):
    """`kept` is read again after an addition that may have changed it, and that hides every fault."""

    def __init__(self, add):
        super().__init__()
        self.add = add
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        kept = self.stem(x)
        total = self.add(kept, self.conv(kept))
        hidden = torch.relu(total - 100)  # hides every fault
        return self.fc(torch.cat([hidden.mean(dim=(2, 3)), kept.mean(dim=(2, 3))], dim=1))


def add_as_python_does(kept, more):
    total = kept
    total += more  # changes `kept`; torch.fx traces it as an addition that does not
    return total


class Branching(nn.Module):
    """Which way it goes depends on the values of each batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x):
        x = self.conv(x).mean(dim=(2, 3))
        if x.isnan().any() or x.abs().max() > 1e6:
            x = x.nan_to_num().clamp(-1e6, 1e6)
        return self.fc(x)


IN_PLACE = {
    "add_": (lambda: Carrying(lambda kept, more: kept.add_(more)), "changes a value in place"),
    "+=": (lambda: Carrying(add_as_python_does), "other outputs than the model"),
    "branching": (Branching, "cannot be traced"),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_models_that_cannot_be_replayed_are_run_whole_and_a_line_says_so(name, images, capsys):
    build, reason = IN_PLACE[name]
    torch.manual_seed(0)
    model = build().eval()
    with pytest.raises(UnsupportedModel, match=reason):
        ReplayEngine(model, images[0], 8)
    capsys.readouterr()
    engine = make_engine("replay", model, images[0], 8)
    captured = capsys.readouterr()
    assert isinstance(engine, WholeEngine)
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "going on with 'whole'" in captured.err
    assert reason in captured.err
    faults = random_faults(engine, len(images), 60, 50.0, bits=[30])
    outcomes = assert_hooks_agree(model, images, engine, faults)
    assert not outcomes.masked.any()
    assert (~close(outcomes.logits, outcomes.golden_logits[faults.image])).float().mean() > 0.5


class Calling(nn.Module):
    """Ways to call things that a local replay has to understand, or to leave alone."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.body = forward
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.more = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.body(self, self.conv(x))


class Unusual(Calling):
    """The same, of maps with 4 channels."""

    def forward(self, x):
        return self.fc(super().forward(x).mean(dim=(2, 3)))


def fold(model, x):
    """The last dimension through a linear layer, with all others folded into the batch."""
    return model.tail(model.rows(torch.flatten(x, 0, 2)).unflatten(0, (-1, 4, 16)).flatten(1))


def add_before_and_behind(model, x):
    x = model.more(x)
    return model.norm(x) + x


def with_a_hook(layer, hook, kind="forward"):
    getattr(layer, f"register_{kind}_hook")(hook)
    return Unusual(lambda model, x: model.hooked(torch.relu(x)), hooked=layer)


def keep_low(module, inputs, output):
    return output.clamp(-0.3, 0.3)


UNUSUAL = {
    "named factor": lambda: Unusual(lambda m, x: torch.mul(x, other=2.5)),
    "named operand": lambda: Unusual(lambda m, x: torch.add(x, other=m.more(x))),
    "named input of a function": lambda: Unusual(lambda m, x: m.more(torch.relu(input=x))),
    "named input of an activation": lambda: Unusual(lambda m, x: m.more(m.act(input=x)), act=nn.ReLU()),
    "named input of a convolution": lambda: Unusual(lambda m, x: m.more(input=torch.relu(x))),
    "weighted sum": lambda: Unusual(lambda m, x: torch.add(x, m.more(x), alpha=2)),
    "sum with a number": lambda: Unusual(lambda m, x: m.more(x + 1)),
    "broadcast sum": lambda: Unusual(lambda m, x: m.more(x) + m.one(x), one=nn.Conv2d(4, 1, 1)),
    "square": lambda: Unusual(lambda m, x: x * x),
    "factor per channel": lambda: Unusual(lambda m, x: m.more(x * m.factor), factor=nn.Parameter(torch.randn(4, 1, 1))),
    "gate": lambda: Unusual(lambda m, x: x * torch.sigmoid(m.more(x.mean(dim=(2, 3), keepdim=True)))),
    "rows in the batch": lambda: Calling(fold, rows=nn.Linear(16, 2), tail=nn.Linear(128, 4)),
    "linear on a map": lambda: Calling(
        lambda m, x: m.tail(m.row(m.last(x)).flatten(1)), last=nn.Conv2d(4, 4, 16), row=nn.Linear(1, 3), tail=nn.Linear(12, 4)
    ),
    "reflected padding": lambda: Unusual(lambda m, x: m.pad(x), pad=nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
    "named padding": lambda: Unusual(lambda m, x: m.pad(x), pad=nn.Conv2d(4, 4, 3, padding="same")),
    "indices of the maxima": lambda: Unusual(lambda m, x: m.pool(x)[0], pool=nn.MaxPool2d(2, return_indices=True)),
    "norm without weights": lambda: Unusual(lambda m, x: m.norm(m.more(x)), norm=nn.BatchNorm2d(4, affine=False)),
    "norm and not": lambda: Unusual(add_before_and_behind, norm=nn.BatchNorm2d(4)),
    "concatenation": lambda: Unusual(lambda m, x: m.wide(torch.cat([x, F.relu(x)], dim=1)), wide=nn.Conv2d(8, 4, 3)),
    "transposed map": lambda: Unusual(lambda m, x: m.more(torch.relu(x).transpose(2, 3))),
    "hook on a convolution": lambda: with_a_hook(nn.Conv2d(4, 4, 3, padding=1), keep_low),
    "hook before a convolution": lambda: with_a_hook(nn.Conv2d(4, 4, 3), lambda m, x: (x[0].clamp(max=0.3),), "forward_pre"),
    "hook on an activation": lambda: with_a_hook(nn.ReLU(), keep_low),
    "hook on a pooling": lambda: with_a_hook(nn.MaxPool2d(2), keep_low),
    "hook on a norm": lambda: with_a_hook(nn.BatchNorm2d(4), keep_low),
    "hook that looks at neighbours": lambda: with_a_hook(nn.Identity(), lambda m, x, output: output.roll(1, dims=2)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_calls_replay_as_they_run_whole(name, images):
    torch.manual_seed(0)
    model = UNUSUAL[name]().eval()
    replay, whole = ReplayEngine(model, images[0], 16), WholeEngine(model, images[0], 64)
    assert replay.sites == whole.sites
    for limit in (50.0, OFF):
        faults = faults_at_every_edge(replay, len(images), limit, seed=0)
        outcomes = replay.run(images, faults)
        assert_same(outcomes, whole.run(images, faults), faults, least=0.9)
        assert (~close(outcomes.logits, outcomes.golden_logits[faults.image])).float().mean() > 0.3


def test_windows_in_the_batch_dimension_belong_to_their_image(images):
    torch.manual_seed(0)
    engine = ReplayEngine(settle(TINY["transformer"]()), images[0], 8)
    shapes = {site.layer: site.shape for site in engine.sites}
    assert shapes == {"patches": (8, 4, 4), "mix": (4, 4, 8), "head": (4,)}


def test_a_layer_called_twice_is_two_sites(images):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            return self.fc(self.conv(self.conv(x).relu()).mean(dim=(2, 3)))

    torch.manual_seed(0)
    model = Twice().eval()
    engines = [ReplayEngine(model, images[0], 4), WholeEngine(model, images[0], 16)]
    assert all([site.layer for site in engine.sites] == ["conv", "conv#2", "fc"] for engine in engines)
    faults = random_faults(engines[0], len(images), 60, OFF)
    assert_same(*(engine.run(images, faults) for engine in engines), faults)
    with pytest.raises(UnsupportedModel, match="called once"):
        PyTorchFIEngine(model, images[0], 4)


@pytest.mark.parametrize("name", ["replay", "whole"])
def test_weights_that_no_site_stands_for_are_listed(name, images):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, stride=4)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.memory = nn.LSTM(8, 8, batch_first=True)
            self.scale = nn.Bilinear(8, 8, 8)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = self.memory(self.attention(x, x, x, need_weights=False)[0])[0].mean(dim=1)
            return self.head(self.scale(x, x))

    engine = make_engine(name, Attending().eval(), images[0], 4)
    found = {site.layer for site in engine.sites}
    skipped = dict(engine.skipped)
    assert {"patches", "head"} <= found
    for layer in ("attention", "memory", "scale"):
        assert layer in found or any(known == layer and reason for known, reason in skipped.items()), (layer, found, skipped)


def test_engines_that_cannot_be_used_say_why(images):
    with pytest.raises(UnknownName, match="pytorchfi, replay, whole"):
        make_engine("goldeneye", nn.Linear(1, 1), images[0], 4)
    for name in ("replay", "whole"):
        with pytest.raises(UnsupportedModel, match="no Conv2d or Linear"):
            make_engine(name, nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768)).eval(), images[0], 4)
    with pytest.raises(UnsupportedModel, match="fp32 neurons"):
        make_engine("pytorchfi", TINY["resnet"](), images[0], 4, target="weight")


def test_settings_are_the_same_for_the_same_weights_and_no_others(resnet, images):
    first = make_engine("replay", resnet, images[0], 4).settings
    assert make_engine("replay", resnet, images[0], 64).settings == first
    assert make_engine("whole", resnet, images[0], 4).settings["model"] == first["model"]
    with torch.no_grad():
        resnet.fc.bias[0] += 1e-3
    assert make_engine("replay", resnet, images[0], 4).settings["model"] != first["model"]


# Nothing that belongs to the caller changes.


def snapshot(model):
    return {name: (tensor.clone(), tensor.stride()) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("target", ["neuron", "weight"])
@pytest.mark.parametrize("name", ENGINES)
def test_the_model_and_the_images_are_left_alone(tiny_model, images, name, target):
    if name == "pytorchfi" and (target == "weight" or isinstance(tiny_model, TINY["transformer"])):
        pytest.skip("PyTorchFI cannot")
    before, pictures = snapshot(tiny_model), images.clone()
    golden = tiny_model(images).detach()
    engine = make_engine(name, tiny_model, images[0], 16, target=target)
    sizes = [site.weights if target == "weight" else site.neurons for site in engine.sites]
    draw = torch.Generator().manual_seed(0)
    position = torch.arange(40) % len(sizes)
    place = (torch.rand(40, generator=draw) * torch.tensor(sizes)[position]).long()
    mask = 1 << torch.randint(32, (40,), generator=draw)
    faults = Faults(FaultModel(target), position, torch.arange(40) % 12, torch.full((40,), 3.0), torch.arange(40), place, mask)
    first, second = engine.run(images, faults), engine.run(images, faults)
    engine.observe(images)
    # Nor does one run leave anything behind for the next.
    assert torch.equal(first.logits.view(torch.int32), second.logits.view(torch.int32))
    for key, (tensor, stride) in snapshot(tiny_model).items():
        assert torch.equal(before[key][0], tensor)
        assert before[key][1] == stride
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())
    assert torch.equal(pictures, images)
    assert torch.equal(tiny_model(images), golden)


@pytest.mark.parametrize("name", ENGINES)
def test_models_that_change_their_input_do_not_change_the_callers_images(name, images):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    ).eval()
    pictures = images.clone()
    engine = make_engine(name, model, images[0], 16)
    faults = random_faults(engine, len(images), 40, 3.0)
    outcomes = engine.run(images, faults)
    torch.testing.assert_close(engine.observe(images), outcomes.golden_logits, **TOLERANCE)
    assert torch.equal(images, pictures)
    assert model[0].inplace


@pytest.mark.parametrize("name", ENGINES)
def test_a_model_in_training_stays_in_training(resnet, images, name):
    engine = make_engine(name, resnet.train(), images[0], 16)
    faults = random_faults(engine, len(images), 40, 3.0)
    outcomes = engine.run(images, faults)
    assert all(module.training for module in resnet.modules())
    torch.testing.assert_close(outcomes.golden_logits, resnet.eval()(images), **TOLERANCE)


@pytest.mark.parametrize("name", ENGINES)
def test_engines_can_be_built_in_inference_mode(name, images):
    torch.manual_seed(0)
    model = settle(TINY["resnet"]())
    engine = make_engine(name, model, images[0], 16)
    faults = random_faults(engine, len(images), 60, 3.0)
    expected = engine.run(images, faults)
    with torch.inference_mode():
        pictures = images.clone()
        inside = make_engine(name, model, pictures[0], 16)
        outcomes = inside.run(pictures, faults)
        assert torch.equal(pictures, images)
    assert type(inside) is type(engine)
    assert torch.equal(outcomes.logits, expected.logits)
    # And a model whose weights were made there.
    with torch.inference_mode():
        torch.manual_seed(0)
        made_inside = TINY["resnet"]().eval()
        made_inside.load_state_dict(model.state_dict())
        before = snapshot(made_inside)
        outcomes = make_engine(name, made_inside, pictures[0], 16).run(pictures, faults)
        assert torch.equal(outcomes.logits, expected.logits)
        assert all(torch.equal(before[key][0], tensor) for key, tensor in made_inside.state_dict().items())


class Normalising(nn.Module):
    """Statistics of the batch: images change each other."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean(dim=(2, 3)))


class Naming(nn.Module):
    """A dictionary instead of logits."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 16 * 16, 4)

    def forward(self, x):
        return {"logits": self.fc(x.flatten(1))}


@pytest.mark.parametrize(("model", "reason"), [(Normalising, "norm normalises over the batch"), (Naming, "returns a dict")])
@pytest.mark.parametrize("engine", [ReplayEngine, WholeEngine])
def test_models_whose_images_or_outputs_cannot_be_told_apart_are_refused(engine, model, reason, images):
    with pytest.raises(UnsupportedModel, match=reason):
        engine(model().eval(), images[0], 8)


class Choosing(nn.Module):
    """Other layers for bright images."""

    def __init__(self):
        super().__init__()
        self.dark, self.bright = nn.Linear(3 * 16 * 16, 4), nn.Linear(3 * 16 * 16, 4)

    def forward(self, x):
        return (self.bright if x.abs().max() > 20 else self.dark)(x.flatten(1))


def test_a_model_that_runs_other_layers_for_other_images_is_refused(images):
    engine = WholeEngine(Choosing().eval(), images[0], 8)
    engine.observe(images)
    with pytest.raises(UnsupportedModel, match="other operations for other images"):
        engine.observe(images * 100)
