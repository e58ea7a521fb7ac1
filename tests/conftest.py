"""Small models and grids that several tests share."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as stages/__main__.py does, and before torch is loaded
# The tests run in about as many processes as there are cores: more threads would only stand in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import yaml
from filelock import FileLock
from torch import nn

from smoke_grid import ALL, GRID, GUIDED, change, repro, run
from textguard.faults.damage import SINGLE_FLIP, FaultModel, Faults, operate
from textguard.faults.detectors import clamp_to_range
from textguard.faults.engines import Engine, Outcomes
from textguard.faults.formats import FP32

REPOSITORY = Path(__file__).resolve().parent.parent

# What a checkout needs for `dvc repro`; the tests copy it, so that they can change and break it.
CHECKOUT = ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore", "stages", "textguard", "prompts/cache")


class TinyResNet(nn.Module):
    """Convolutions, BatchNorm, in-place activations, a residual addition, pooling and a linear layer."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        y = self.act(self.norm1(self.conv1(x)))
        y = self.conv2(y)
        y += x
        return self.fc(self.act(y).mean(dim=(2, 3)))


class TinyTransformer(nn.Module):
    """Windows folded into the batch dimension, as Swin has them, and sizes that are read from the input."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.mix = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).permute(0, 2, 3, 1)
        batch, height, width, channels = x.shape
        windows = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(2, 3).reshape(-1, 4, channels)
        windows = windows + torch.nn.functional.gelu(self.mix(self.norm(windows)))
        return self.head(windows.reshape(batch, -1, channels).mean(dim=1))


class TinyMobileNet(nn.Module):
    """Depthwise convolution, ReLU6, dropout and two linear layers behind each other."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU6(inplace=True),
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU6(inplace=True),
            nn.Conv2d(6, 10, 1),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(10, 12), nn.Linear(12, classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(nn.functional.adaptive_avg_pool2d(self.features(images), 1), 1))


TINY = {"resnet": TinyResNet, "transformer": TinyTransformer, "mobilenet": TinyMobileNet}


def settle(model: nn.Module) -> nn.Module:
    """Give BatchNorm layers statistics other than 0 and 1, and switch to evaluation."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 3, 16, 16) * 2 + 0.5)
    return model.eval()


@pytest.fixture(params=sorted(TINY))
def tiny_model(request: pytest.FixtureRequest) -> nn.Module:
    """A small random classifier of each architecture, images [B, 3, 16, 16] to 4 classes."""
    torch.manual_seed(0)
    return settle(TINY[request.param]())


@pytest.fixture
def resnet() -> nn.Module:
    """The small residual network."""
    torch.manual_seed(0)
    return settle(TinyResNet())


@pytest.fixture
def images() -> torch.Tensor:
    """12 random images, [12, 3, 16, 16]."""
    return torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class DigitsNetwork(nn.Module):
    """8 x 8 pixels to 10 numbers."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.fc = nn.Linear(12 * 4, outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu(self.conv1(images))
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc(x.flatten(1))


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All of scikit-learn's digits, [1797, 1, 8, 8], and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images).float()[:, None] / 8 - 1, torch.from_numpy(data.target)


def trained(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int = 4) -> nn.Module:
    """The model, after a few seconds with Adam."""
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=order).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """200 images and their labels, that no model was trained on."""
    images, labels = digits()
    return images[-200:], labels[-200:]


@pytest.fixture(scope="session")
def network() -> nn.Module:
    """A small classifier of digits, nine out of ten of them right."""
    torch.manual_seed(0)
    images, labels = digits()
    return trained(DigitsNetwork(), images[:-200], labels[:-200])


# Engines add up in different orders: convolutions of other batch sizes and memory formats, folded BatchNorm. Logits are
# compared in units of the largest of the C where that is above 1: after a fault of 1e38, small ones are what is left of large
# ones.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
# Finite, but near the largest fp32 number: there it depends on the order of additions whether a sum overflows.
OVERFLOWS = 1e30
OFF = float("inf")  # the limit of a range detector that lets everything pass


def make_faults(
    position: torch.Tensor | Sequence[int],
    image: torch.Tensor | Sequence[int],
    neuron: torch.Tensor | Sequence[int],
    mask: torch.Tensor | Sequence[int] | int,
    limit: float | Sequence[float] = OFF,
    model: FaultModel = SINGLE_FLIP,
) -> Faults:
    """Faults in one value each, one entry per fault; `mask` and `limit` may be one number for all."""
    position, image, neuron = (torch.as_tensor(column) for column in (position, image, neuron))
    row = torch.arange(len(position))
    mask, limit = (torch.as_tensor(column).expand(len(row)) for column in (mask, limit))
    return Faults(model, position, image, limit.float(), row, neuron, mask)


def random_faults(
    engine: Engine,
    images: int,
    count: int,
    limit: float,
    layers: Sequence[str] | None = None,
    bits: Sequence[int] = range(32),
) -> Faults:
    """Single flips of random neurons, of all layers or of the given ones in turn."""
    draw = torch.Generator().manual_seed(0)
    named = {site.layer: site.position for site in engine.sites}
    choice = torch.tensor([named[layer] for layer in layers or named])
    position = choice[torch.arange(count) % len(choice)]
    neurons = torch.tensor([site.neurons for site in engine.sites])[position]
    image = torch.randint(images, (count,), generator=draw)
    neuron = (torch.rand(count, generator=draw) * neurons).long()
    bit = torch.tensor(bits)[torch.randint(len(bits), (count,), generator=draw)]
    return make_faults(position, image, neuron, 1 << bit, limit)


def close(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which rows of two logits [N, C] agree; NaN equals NaN, and infinities those of their sign."""
    unit = b.abs().nan_to_num(0.0, 0.0, 0.0).amax(dim=1, keepdim=True).clamp(min=1)
    return torch.isclose(a / unit, b / unit, equal_nan=True, **TOLERANCE).all(dim=1)


def assert_same(a: Outcomes, b: Outcomes, faults: Faults, least: float = 0.97) -> None:
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


def make_constant(layer: nn.Module, channel: int, value: float) -> None:
    """Let a channel of the layer be `value` everywhere. Flipping bit 30 makes 1 infinite, and 1.5 NaN."""
    with torch.no_grad():
        layer.weight[channel] = 0
        layer.bias[channel] = value


@pytest.fixture(scope="session")
def make_checkout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Copies of the checkout, each a git and DVC repository that holds the smoke grid."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("checkout")
        for name in CHECKOUT:
            source = REPOSITORY / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / name)
        grid = folder / "grids" / "smoke"
        grid.mkdir(parents=True)
        for name in ("dvc.yaml", "params.yaml"):
            shutil.copy(REPOSITORY / "grids" / "smoke" / name, grid / name)
        run(["git", "init", "-q"], folder)
        run(["dvc", "init", "-q"], folder)
        run(["dvc", "config", "core.analytics", "false"], folder)
        shutil.copytree(REPOSITORY / ".dvc" / "plots", folder / ".dvc" / "plots")
        return folder

    return make


@pytest.fixture(scope="session")
def finished(make_checkout: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A checkout with the smoke grid run once, for the tests of all processes: to be copied, not changed."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    with FileLock(shared / "finished.lock"):
        if not (shared / "finished").exists():
            checkout = make_checkout()
            recipe = yaml.safe_load((checkout / GRID / "params.yaml").read_text())["recipes"]["resnet"]
            change(checkout, "recipes.mobilenet", recipe)
            change(checkout, f"runs.{GUIDED}.recipe", "mobilenet")
            ran, _ = repro(checkout)
            assert ran == ALL
            (shared / "finished").write_text(str(checkout))
    return Path((shared / "finished").read_text())


@pytest.fixture
def checkout(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished checkout, cache and all."""
    return Path(shutil.copytree(finished, tmp_path / "checkout", symlinks=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest start first, so that no process waits for them at the end.

    With two processes, the third begins when the first has made the checkout that both use.
    """
    first = ["test_dag.py", "test_language_models.py", "test_interruptions.py"]
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))
