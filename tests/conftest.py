"""Small models and grids that several tests share."""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as stages/__main__.py does, and before torch is loaded
# The tests run in about as many processes as there are cores: more threads would only stand in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from filelock import FileLock
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gate_runs import TOLERANCES, Metrics, even, metrics, report, right
from smoke_grid import ALL, repro, run
from stored_grid import INJECT, STATISTICS, store_grid, store_text_quality
from textguard.analysis.regression import compare_all
from textguard.analysis.results import write_results
from textguard.params import FiguresParams, GateParams, Params, Run, load_params
from textguard.report.gate import read_runs

if TYPE_CHECKING:
    from answer_server import Server

REPOSITORY = Path(__file__).resolve().parent.parent

pytest_plugins = ["bad_input_grid"]

# What a checkout needs for `dvc repro`; the tests copy it, so that they can change and break it.
CHECKOUT = ("dvc.yaml", "params.yaml", ".dvc", ".dvcignore", ".gitignore", "stages", "textguard", "prompts/cache")
GRID_FILES = ("dvc.yaml", "params.yaml", ".dvc", ".dvcignore")
NOT_IN_GIT = shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local")


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


@pytest.fixture
def labels(resnet: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the small residual network says of the images, but for two where it is wrong, [12]."""
    found = resnet(images).argmax(dim=1)
    found[[2, 7]] = (found[[2, 7]] + 1) % 4
    return found


@pytest.fixture
def loader(images: torch.Tensor, labels: torch.Tensor) -> DataLoader:
    """The images and these labels, in batches of 5."""
    return DataLoader(TensorDataset(images, labels), batch_size=5)


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


def copy_checkout(folder: Path, *grids: str) -> None:
    """Copy what a fresh clone holds of the pipeline and of these grids, without any data or result."""
    names = [Path(name) for name in CHECKOUT] + [Path("grids") / grid / name for grid in grids for name in GRID_FILES]
    names += [own for grid in grids if (REPOSITORY / (own := Path("grids") / grid / "own")).is_dir()]  # its code
    for name in names:
        source = REPOSITORY / name
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=NOT_IN_GIT, symlinks=True)
        else:
            shutil.copy(source, folder / name)


@pytest.fixture(scope="session")
def make_checkout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Copies of the checkout, each a git and DVC repository that holds the smoke grid."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("checkout")
        copy_checkout(folder, "smoke")
        run(["git", "init", "-q"], folder)
        return folder

    return make


def once(factory: pytest.TempPathFactory, worker: str, name: str, make: Callable[[], Path]) -> Path:
    """The folder that `make` returns, which is called in the first process that asks for this name. The others wait for it."""
    base = factory.getbasetemp()
    shared = base if worker == "master" else base.parent
    with FileLock(shared / f"{name}.lock"):
        if not (shared / name).exists():
            (shared / name).write_text(str(make()), encoding="utf-8")
    return Path((shared / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def finished(make_checkout: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A checkout with the smoke grid run once, for the tests of all processes: to be copied, not changed."""

    def make() -> Path:
        checkout = make_checkout()
        ran, _ = repro(checkout)
        assert ran == ALL
        return checkout

    return once(tmp_path_factory, worker_id, "finished", make)


@pytest.fixture
def checkout(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished checkout, cache and all."""
    return Path(shutil.copytree(finished, tmp_path / "checkout", symlinks=True))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Run]:
    """The runs of a small grid that is stored in the current folder, with its results."""
    monkeypatch.chdir(tmp_path)
    stored = store_grid()
    write_results(stored, STATISTICS, INJECT)
    return stored


@pytest.fixture
def params(runs: dict[str, Run]) -> Params:
    """The default grid's parameters with these runs, and what is known of their texts."""
    default = load_params(REPOSITORY / "params.yaml")
    store_text_quality("d-template", 10, 10)
    store_text_quality("d-descriptions", 150, 148)
    found = replace(
        default,
        datasets={"d": default.datasets["digits"], "e": default.datasets["digits"]},
        backbones=dict.fromkeys(("resnet18", "alexnet"), replace(default.backbones["resnet18"], epochs=2)),
        variants=["baseline", "template", "descriptions"],
        hardware=replace(
            default.hardware,
            models=dict.fromkeys(("two_bits", "weight_for_good"), default.inject.faults),
            rates=[1e-5, 1e-4],
            protections=["none", "secded(64)"],
        ),
        figures=FiguresParams(60),
    )
    vars(found)["runs"] = runs  # no rectangle, so that some cells are missing
    return found


@pytest.fixture(scope="session")
def usual() -> Metrics:
    """The metrics file of a campaign that needs few injections."""
    return metrics(even(), right())


@pytest.fixture
def gate(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Writes two runs (or two folders of them, by file name) to disk; returns how many numbers are worse, and the report."""

    def compare(base: Metrics, new: Metrics, tolerances: GateParams = TOLERANCES) -> tuple[int, str]:
        runs = []
        for side, content in (("base", base), ("new", new)):
            files = {"run.json": content} if "run" in content else content
            shutil.rmtree(tmp_path / side, ignore_errors=True)
            (tmp_path / side).mkdir()
            for name, text in files.items():
                (tmp_path / side / name).write_text(json.dumps(text), encoding="utf-8")
            runs.append(read_runs(tmp_path / side))
        return report(compare_all(*runs, tolerances), tolerances)

    return compare


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """Headless Chromium without a network, or a skipped test."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no browser: install chromium and chromium-driver to run this test")
    options = Options()
    options.binary_location = chromium
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"),
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=Service(driver)) as started:
        yield started


def show(browser, width: int, path: Path) -> None:
    """Open a file in the browser, in a window of this width, and wait until it is loaded."""
    from selenium.webdriver.support.wait import WebDriverWait

    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    address = path.resolve().as_uri()
    browser.get(address)
    # On a busy machine `get` can return while the old document makes way for the new one.
    loaded = "return document.URL === arguments[0] && document.readyState === 'complete' && document.body !== null"
    WebDriverWait(browser, timeout=30).until(lambda _: browser.execute_script(loaded, address))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator["Server"]:
    """A running server of answers, and its key in the environment."""
    from answer_server import SECRET, Server

    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest start first, so that no process waits for them at the end.

    With two processes, the first makes the checkout that several use, while the second is at files that need none.
    """
    first = ["test_dag.py", "test_jobs.py", "test_own_code.py", "test_dvc_commands.py", "test_interruptions.py"]
    first += ["test_responses_stage.py", "test_sites.py", "test_training.py"]
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))
