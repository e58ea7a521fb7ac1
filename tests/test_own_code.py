"""Networks and data of a user's own in the pipeline: `module:PACKAGE.FILE:NAME` in params.yaml."""

import itertools
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch

from bad_input_grid import Grid, says
from conftest import REPOSITORY, copy_checkout
from smoke_grid import run
from textguard import modules
from textguard.artifacts import code_of_users
from textguard.errors import InvalidArtifact, InvalidParameter
from textguard.params import load_params
from textguard.vision.backbones import build_backbone
from textguard.vision.datasets import load_split, own_parts, read_source, read_split, save_splits

OWN = REPOSITORY / "grids" / "own"
NUMBERS = itertools.count()
NET = "class Net(nn.Module):\n    def __init__(self, {takes}):\n        super().__init__()\n        {init}\n{forward}"
FORWARD = "    def forward(self, x):\n        return self.fc(x.mean(dim=(2, 3)))\n"
INIT = "self.fc = nn.Linear(3, num_classes)"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file of own code under a name that no other test has imported; returns what params.yaml calls NAME in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))

    def write(content: str, name: str = "Net") -> str:
        module = f"own_{next(NUMBERS)}"
        (tmp_path / f"{module}.py").write_text(f"import torch\nfrom torch import nn\n{content}", encoding="utf-8")
        return f"module:{module}:{name}"

    yield write
    code_of_users.clear()


def net(takes: str = "num_classes", init: str = INIT, forward: str = FORWARD) -> str:
    return NET.format(takes=takes, init=init, forward=forward)


def test_an_own_network_is_built_with_the_numbers_that_are_wanted(write):
    drops = "    def forward(self, x):\n        return self.fc(nn.functional.dropout(x.mean((2, 3)), 0.5, self.training))\n"
    init = "self.side = image_size; self.fc = nn.Linear(3, num_classes)"
    name = write(net("num_classes, image_size, depth=1", init, drops))
    torch.manual_seed(3)
    model = build_backbone(name, 7, 16)
    drawn = torch.rand(1)
    assert (model.side, model(torch.rand(2, 3, 16, 16)).shape) == (16, (2, 7))
    torch.manual_seed(3)
    torch.nn.Linear(3, 7)
    assert torch.equal(drawn, torch.rand(1)), "trying it drew from the caller's generator"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("def", ["SyntaxError: ", "line 3)"]),
        ("\nimport no_such_package", ["importing own_", "ModuleNotFoundError: No module named 'no_such_package'", "line 4)"]),
        ("raise SystemExit(0)", ["SystemExit: 0 (own_", "line 3)"]),
        ("class Nets: pass", ["holds no 'Net'; it holds Nets"]),
        ("Net = 3", ["is a int; it must make a network, given num_classes"]),
        (net("classes", "pass"), ["takes classes; it must take num_classes"]),
        (net("num_classes, width"), ["TypeError: ", "'width'"]),
        ("def Net(num_classes): return 3", ["made a int; it must make a torch.nn.Module"]),
        (net(init="self.fc = nn.Linear(-1, num_classes)"), ["RuntimeError: ", "(own_", "line 6)"]),
        (
            net(forward="    def forward(self, x):\n        return {}['key']"),
            ["in training", "KeyError: 'key' (own_", "line 8)"],
        ),
        (net(forward="    def forward(self, x):\n        return {'a': x}"), ["gives a dict; made with num_classes=5, it must"]),
        (net(init="self.fc = nn.Linear(3, 4)"), ["gives a tensor [2, 4]; made with num_classes=5, it must give [2, 5]"]),
        (
            net(forward="    def forward(self, x):\n        return self.fc(x.mean((2, 3))) if self.training else x"),
            ["in evaluation", "[2, 3, 8, 8]; made"],
        ),
    ],
)
def test_what_is_wrong_with_an_own_network_is_one_line(write, content, parts):
    name = write(content)
    with pytest.raises(InvalidParameter) as error:
        build_backbone(name, 5, 8)
    says(str(error.value), name, "params.yaml backbones", *parts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["module:", "module:a", "module:a:", "module:a.:b", "module:../a:b", "module:a:b.c", "module:a b:c"]
)
def test_a_name_of_another_form_says_which_it_must_have(name):
    with pytest.raises(InvalidParameter, match=r"in here must be module:PACKAGE\.FILE:NAME, as module:own\.net:Net"):
        modules.find(name, "here")


def test_nothing_is_imported_but_files_of_the_grid_and_the_repository(write, tmp_path):
    for name in ("module:os:system", "module:torch.hub:load", "module:textguard.params:load_params", "module:absent.net:Net"):
        with pytest.raises(InvalidParameter, match=r"there is no file .*\.py in .* or .*; put it there, or a link"):
            modules.find(name, "here")
    (tmp_path / "json.py").write_text("Net = 1", encoding="utf-8")
    with pytest.raises(InvalidParameter, match=r"json is another module of this name, .*; rename json\.py"):
        modules.find("module:json:Net", "here")


def test_the_files_behind_a_name_are_those_that_it_imports(tmp_path, monkeypatch):
    files = {
        "own/__init__.py": "",
        "own/net.py": "import torch\nfrom . import blocks\nfrom .deep.er import thing\ndef late():\n    import helper.more",
        "own/blocks.py": "from own.net import Net\nimport own.absent, json",
        "own/deep/er.py": "from ..sibling import x",
        "own/sibling.py": "",
        "own/unused.py": "",
        "helper/__init__.py": "def",
        "helper/more.py": "",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert modules.dependencies("module:own.net:Net", "here") == sorted(set(files) - {"own/unused.py"})
    # What lies below the repository's root is named from there.
    assert modules.dependencies("module:examples.own_classifier:model", "here") == ["${root}/examples/own_classifier.py"]


DATA = "import numpy as np\n\ndef splits():\n    "
PIXELS = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
PIXELS_HERE = "np.arange(32, dtype=np.uint8).reshape(2, 4, 4)"


@pytest.mark.parametrize(
    "images",
    [
        PIXELS_HERE,
        f"torch.from_numpy({PIXELS_HERE})[:, None]",
        f"{PIXELS_HERE}[..., None].repeat(3, 3)",
        f"{PIXELS_HERE} / np.float32(255)",
        f"list({PIXELS_HERE})",
        f"[__import__('PIL.Image').Image.fromarray(each) for each in {PIXELS_HERE}]",
    ],
)
@pytest.mark.parametrize("form", ["({images}, [0, 1])", "list(zip({images}, torch.tensor([0, 1])))"])
def test_own_images_become_the_same_pixels_in_every_form(write, images, form):
    part = form.format(images=images)
    name = write(f"{DATA}return {{'train': {part}, 'test': {part}, 'classes': ('a', 'b')}}", "splits")
    content = read_source(name, None)
    for part in (content.parts["train"], content.parts["test"]):
        assert part.images.dtype == torch.uint8
        assert torch.equal(part.images[:, :1], torch.from_numpy(PIXELS)[:, None])
        assert part.labels.tolist() == [0, 1]
    assert content.classes == ["a", "b"]


GOOD = f"({PIXELS_HERE}, [0, 1])"


@pytest.mark.parametrize(
    ("returned", "parts"),
    [
        ("1 / 0", ["ZeroDivisionError: division by zero (own_", "line 6)"]),
        ("3", ["returns a int; it must return {'train': PART, 'test': PART, 'classes': [NAME, ...]}"]),
        (f"{{'train': {GOOD}, 'classes': ['a', 'b']}}", ["returns a dict of train, classes; it must return"]),
        (
            f"{{'train': {GOOD}, 'test': 3, 'classes': ['a', 'b']}}",
            ["as 'test' a int; a part must be a tuple (images, labels)"],
        ),
        (f"{{'all': {GOOD}}}", ["bad class names as 'classes': there must be two or more"]),
        (f"{{'all': {GOOD}, 'classes': ['a', 'A']}}", ["are the same, or but for case"]),
        (f"{{'all': ({PIXELS_HERE}, [0]), 'classes': ['a', 'b']}}", ["labels [1], int64, for 2 images; each needs one"]),
        (f"{{'all': ({PIXELS_HERE}, [0., 1.]), 'classes': ['a', 'b']}}", ["labels [2], float64", "from 0 to 1"]),
        (f"{{'all': ({PIXELS_HERE}, [1, 2]), 'classes': ['a', 'b']}}", ["labels from 1 to 2, and 2 classes; count from 0"]),
        (
            f"{{'all': (-{PIXELS_HERE} / 9., [0, 1]), 'classes': ['a', 'b']}}",
            ["values from ", "floats from 0 to 1", "normalised"],
        ),
        ("{'all': (np.zeros((2, 5, 4, 4)), [0, 1]), 'classes': ['a', 'b']}", ["images [2, 5, 4, 4], float64; images must be"]),
        ("{'all': (np.zeros((2, 4, 4), np.int64), [0, 1]), 'classes': ['a', 'b']}", ["int64; images must be uint8"]),
        ("{'all': (np.full((2, 4, 4), np.nan), [0, 1]), 'classes': ['a', 'b']}", ["values from nan to nan"]),
        (
            "{'all': ([np.zeros((2, 2)), np.zeros((3, 3))], [0, 1]), 'classes': ['a', 'b']}",
            ["its images make no array (", "one size"],
        ),
        ("{'all': [1, 2, 3], 'classes': ['a', 'b']}", ["its items are no pairs; a part must be"]),
    ],
)
def test_what_is_wrong_with_own_data_is_one_line(write, returned, parts):
    name = write(f"{DATA}return {returned}", "splits")
    with pytest.raises(InvalidParameter) as error:
        read_source(name, None)
    says(str(error.value), name, "params.yaml datasets.*.source", *parts)
    assert "\n" not in str(error.value)


def test_splits_of_own_data_cannot_be_exchanged(write, tmp_path):
    params = load_params(OWN / "params.yaml").datasets["shapes"]
    name = write(f"{DATA}return {{'train': {GOOD}, 'test': {GOOD}, 'classes': ['a', 'b']}}", "splits")
    content = read_source(name, None)
    wanted = type(params)(**{**vars(params), "source": name})
    options = {"checksum": False, "corrupt_share": 0.0, "orientation": "stored"}
    save_splits(tmp_path / "data", content, content.parts, None, source=name, **options)
    assert len(read_split(tmp_path / "data", "test", wanted, tmp_path)) == 2
    shutil.copy(tmp_path / "data/train/images.safetensors", tmp_path / "data/test/images.safetensors")
    assert len(load_split(tmp_path / "data", "test", None)) == 2
    with pytest.raises(InvalidArtifact, match="holds no testing images"):
        read_split(tmp_path / "data", "test", wanted, tmp_path)


def test_the_data_of_the_template_are_what_they_say(monkeypatch):
    monkeypatch.chdir(OWN)
    monkeypatch.setattr("sys.path", list(sys.path))
    parts, classes = own_parts("module:own.data:splits")
    code_of_users.clear()
    assert (classes, [len(parts[name][1]) for name in ("train", "test")]) == (["square", "disc", "cross"], [240, 60])


@pytest.fixture
def template(tmp_path, monkeypatch) -> Grid:
    """The template grid's own files, to break."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(OWN / name, tmp_path)
    shutil.copytree(OWN / "own", tmp_path / f"own_{(number := next(NUMBERS))}", ignore=shutil.ignore_patterns("__pycache__"))
    grid = Grid(tmp_path)
    grid.change("root", str(REPOSITORY))
    grid.change("backbones.net.network", f"module:own_{number}.net:Net")
    grid.change("datasets.shapes.source", f"module:own_{number}.data:splits")
    text = (tmp_path / "dvc.yaml").read_text(encoding="utf-8")
    (tmp_path / "dvc.yaml").write_text(text.replace("- own/", f"- own_{number}/"), encoding="utf-8")
    return grid


def test_the_check_looks_names_up_and_says_what_dvc_does_not_watch(template):
    assert template.run("check") == (0, [])
    package = next(template.folder.glob("own_*"))
    shutil.rmtree(template.folder / "metrics")
    network, source = f"module:{package.name}.net:Net", f"module:{package.name}.data:splits"
    template.change("backbones.net.network", f"module:{package.name}.net:Net2")
    says(template.fails("check"), "params.yaml backbones", "net.py holds no 'Net2'; it holds Net")
    template.change("backbones.net.network", f"module:{package.name}.nets:Net")
    says(template.fails("check"), "params.yaml backbones.net.network", f"there is no file {package.name}/nets.py in ")
    template.change("backbones.net.network", "timm:no_such_network_anywhere")
    template.change("datasets.shapes.source", "digits")
    says(template.fails("check"), "backbone 'timm:no_such_network_anywhere' in params.yaml backbones (one of")
    template.change("backbones.net.network", network)
    template.change("datasets.shapes.source", source.replace("splits", "drawn"))
    says(template.fails("check"), "drawn in params.yaml datasets.*.source failed: TypeError: ")
    template.change("datasets.shapes.source", source)
    os.rename(package / "data.py", package / "more.py")
    (package / "data.py").write_text("from .more import splits\n", encoding="utf-8")
    says(template.fails("check"), "dvc.yaml does not watch the files of own code", "run 'make grids'")


def test_the_template_runs_whole_and_reruns_what_a_change_concerns(tmp_path):
    copy_checkout(tmp_path, "own")
    folder = tmp_path / "grids" / "own"
    run(["git", "init", "--quiet"], tmp_path)
    run(["dvc", "repro"], folder)
    assert "module:own.net:Net" in (folder / "models/recipes/net-baseline.json").read_text(encoding="utf-8")
    assert (folder / "metrics/results/shapes-net-baseline-0.json").is_file()
    assert "shapes-net-baseline-0" in (folder / "plots/report.html").read_text(encoding="utf-8")
    assert run(["dvc", "status", "--json"], folder).stdout.strip() == "{}"
    for name, watching in (("net", {"train", "evaluate", "ranges", "inject", "hardware", "closeup"}), ("data", {"data"})):
        file = folder / "own" / f"{name}.py"
        content = file.read_text(encoding="utf-8")
        file.write_text(f"{content}\n# another\n", encoding="utf-8")
        changed = set(json.loads(run(["dvc", "status", "--json"], folder).stdout))
        assert {stage.partition("@")[0] for stage in changed} == watching
        file.write_text(content, encoding="utf-8")
