"""Replays of faults while they are local, and their shortcuts: random and unusual networks against whole inferences."""

import random
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fault_helpers import OFF, assert_same, close, make_constant, make_faults
from textguard.faults import suffix
from textguard.faults.damage import Faults
from textguard.faults.engines import ReplayEngine, WholeEngine
from textguard.faults.local import LocalSteps

# Signs, and the bits of the exponent, where most of the damage is done.
CORNER_BITS = (31, 30, 30, 29, 28, 27, 25, 23, 22)


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
            columns.append((site.position, pick.randrange(images), neuron, 1 << bit))
    return make_faults(*zip(*columns, strict=True), limit)


@pytest.fixture
def paths(monkeypatch) -> Counter:
    """Counts (operation, size of the patch) for each step that a local replay took, and matrix products."""
    taken = Counter()
    run, matrix_product = LocalSteps.run, suffix.matrix_product

    def count_steps(self, step, patches, golden, image):
        patch = run(self, step, patches, golden, image)
        operation = self._traced.operation(step)
        kind = "refused" if patch is None else "one channel" if patch.one_channel else "all channels"
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
    monkeypatch.setattr(suffix, "matrix_product", count_products)
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
        for size in ("one channel", "one channel, window", "all channels", "all channels, window"):
            assert paths[operation, size] >= 20, (operation, size, paths)
    assert paths["Flatten", "one channel"] > 100
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
    "sums of different single channels": lambda: layers_behind_a_convolution(thirds(groups=4), nn.ReLU6(), *follow()),
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


# Calls that look like others, and are not.


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
    "nothing but a batch": lambda: Calling(
        lambda m, x: m.tail(torch.stack([torch.flatten(m.one(m.last(x).flatten(1)), 0)] * 2, dim=1)),
        last=nn.Conv2d(4, 4, 16),
        one=nn.Linear(4, 1),
        tail=nn.Linear(2, 4),
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
