"""The command `textguard`, in the folder of somebody's own package: results, exit codes, and one line for each mistake."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import REPOSITORY
from textguard.assessment import load
from textguard.assessment.command import run
from textguard.assessment.folders import ImageFolders
from textguard.faults import FaultModel, execution
from textguard.vision.transforms import evaluation_view

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=3, channels=3):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Linear(144, classes)

    def forward(self, images):
        return self.fc(self.act(self.conv(images)).flatten(1))

def build():
    return Net()

def broken():
    raise ValueError("out of cheese")

ready = Net()
number = 7
"""
DATA = """
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset
from own_package.net import Net

def pairs():
    images = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    net = Net().eval()
    net.load_state_dict(load_file("net.safetensors"))
    return TensorDataset(images, net(images).argmax(dim=1))

def loader():
    return DataLoader(pairs(), batch_size=8)

def nothing():
    return 7
"""
ASSESS = ("assess", "own_package.net:build", "--weights", "net.safetensors", "--data", "own_package.data:loader")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder with somebody's package and weights, in which the command is given."""
    folder = tmp_path / "own_package"
    folder.mkdir()
    for name, text in (("__init__", ""), ("net", NETWORK), ("data", DATA)):
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_package"]:
        monkeypatch.delitem(sys.modules, name)
    torch.manual_seed(0)
    from own_package.net import Net

    net = Net()
    save_file(net.state_dict(), "net.safetensors")
    with torch.no_grad():
        net.fc.weight *= 2
        net.fc.bias *= 2
    save_file(net.state_dict(), "doubled.safetensors")
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_package"]:
        del sys.modules[name]


def refused(capsys, *arguments: str) -> str:
    """The one line of a command that ends with 2."""
    capsys.readouterr()
    assert run(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("assess")]
    assert len(lines) == 1
    assert "params.yaml" not in lines[0]
    assert "dvc" not in lines[0]
    return lines[0]


def test_from_a_network_of_ones_own_to_a_verdict(package, capsys):
    assert run([*ASSESS, "--out", "base", "--injections", "200", "--fit-per-megabit", "20.49"]) == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["layer", "conv", "fc", "overall", "saved"]
    assert "30 of 30 images eligible" in shown.err
    found = load("base")
    assert found.settings["injections_per_layer"] == 200
    assert float(shown.out.splitlines()[3].split()[4]) == pytest.approx(found.table["delta_loss"].iloc[-1], abs=1e-6)
    assert sorted(path.name for path in Path("base").iterdir()) == [
        "assessment.json",
        "predictions.parquet",
        "records.parquet",
    ]
    doubled = [word.replace("net.safetensors", "doubled.safetensors") for word in ASSESS]
    assert run([*doubled, "--out", "change", "--plan", "base"]) == 0
    assert load("change").plan.equals(found.plan)
    capsys.readouterr()
    assert run(["gate", "base", "base"]) == 0
    assert capsys.readouterr().out.startswith("**PASS: none of 15")
    assert run(["gate", "base", "change"]) == 1
    assert "| base -> change | DeltaLoss, overall |" in (first := capsys.readouterr().out)
    assert first.startswith("**FAIL: ")
    assert run(["gate", "base", "change", "--delta-loss", "200%"]) == 0
    Path("pyproject.toml").write_text("[tool.textguard.gate]\ndelta_loss_percent = 200\n", encoding="utf-8")
    assert run(["gate", "base", "change"]) == 0
    assert run(["gate", "base", "change", "--delta-loss", "10"]) == 1  # options come first
    Path("other.toml").write_text("[tool.textguard.gate]\nsignificance = 1e-300\n", encoding="utf-8")
    assert run(["gate", "base", "change", "--config", "other.toml"]) == 0
    assert run(["report", "change", "base"]) == 0
    page = Path("change/report.html").read_text(encoding="utf-8")
    assert "textguard: change beside base" in page
    capsys.readouterr()
    assert run(["advise", "base", "--target-sdc", "2%"]) == 0
    advice = capsys.readouterr().out
    assert "2" in advice.splitlines()[0]
    assert "conv" in advice
    for content, said in {
        "delta_loss_percent = 'much'": "delta_loss_percent is 'much' on the command line or in other.toml",
        "sdc = 10": "other.toml [tool.textguard.gate] holds 'sdc'; allowed: top1_points, delta_loss_percent",
        "sdc_percent = ": "other.toml cannot be read",
    }.items():
        Path("other.toml").write_text(f"[tool.textguard.gate]\n{content}\n", encoding="utf-8")
        assert said in refused(capsys, "gate", "base", "change", "--config", "other.toml")


def test_an_assessment_is_not_overwritten_unless_told(package, capsys):
    assert run([*ASSESS, "--out", "base", "--injections", "5"]) == 0
    before = Path("base/records.parquet").read_bytes()
    assert "base holds an assessment; say --force to replace it" in refused(
        capsys, *ASSESS, "--out", "base", "--injections", "6"
    )
    assert Path("base/records.parquet").read_bytes() == before
    assert run([*ASSESS, "--out", "base", "--injections", "6", "--force"]) == 0
    assert len(load("base").records) == 12


def test_an_interrupted_assessment_goes_on(package, capsys, monkeypatch):
    arguments = [*ASSESS, "--out", "base", "--injections", "50", "--image-batch", "10"]
    work, calls = execution._run_shard, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) > 4:  # two measure the pace
            raise KeyboardInterrupt
        return work(*given)

    monkeypatch.setattr(execution, "_run_shard", interrupted)
    assert run(arguments) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "textguard assess: interrupted; run it again to go on from there"
    assert "base holds no assessment" in refused(capsys, "gate", "base", "base")
    monkeypatch.setattr(execution, "_run_shard", work)
    # Other faults must not be mixed with those that are done.
    assert "holds shards of another campaign" in refused(capsys, *arguments, "--seed", "1")
    assert run(arguments) == 0
    assert "going on after 2 of 3 shards" in capsys.readouterr().err
    resumed = load("base")
    assert run([*arguments, "--force"]) == 0
    assert load("base").records.equals(resumed.records)
    assert not list(Path("base").glob(".*"))


def test_options_reach_the_assessment(package):
    options = {
        "injections": ("64", "injections_per_layer", 64),
        "seed": ("7", "seed", 7),
        "plan": ("neyman", "plan", "neyman"),
        "images": ("importance", "images", "importance"),
        "stop-at": ("50%", "stop_at", "50%"),
        "pilot": ("64", "pilot", 64),
        "format": ("fp16", "number_format", "fp16"),
        "kinds": ("Linear,Conv2d", "kinds", ["Linear", "Conv2d"]),
        "detector": ("fixed:9", "detector", "fixed:9"),
        "mitigation": ("ranger", "mitigation", "ranger"),
        "engine": ("whole", "engine", "whole"),
        "confidence": ("0.9", "confidence", 0.9),
        "fit-per-megabit": ("3", "fit_per_megabit", 3.0),
        "image-batch": ("9", "image_batch", 9),
        "noise": ("report", "noise", "report"),
    }
    given = [word for name, (text, _, _) in options.items() for word in (f"--{name}", text)]
    data = ["--data", "own_package.data:pairs", "--batch", "7", "--arguments", '{"classes": 3}', "--out", "all"]
    assert run(["assess", "own_package.net:Net", "--weights", "net.safetensors", *data, *given]) == 0
    settings = load("all").settings
    for _, name, value in options.values():
        assert settings[name] == value
    weights = ["--target", "weight", "--operation", "stuck_at_1", "--injections", "2", "--batch-size", "3"]
    assert run([*ASSESS, "--out", "weights", *weights, "--enumerate-up-to", "1"]) == 0
    assert load("weights").settings["fault_model"] == {"target": "weight", "operation": "stuck_at_1", "bits": 1, "values": 1}
    shape = ["--pattern", "block", "--block", "2x4", "--damage", "random", "--bits", "2", "--injections", "2"]
    assert run([*ASSESS, "--out", "blocks", *shape]) == 0
    assert load("blocks").fault_model == FaultModel(bits=2, pattern="block", block=(2, 4), damage="random")
    assert run(["assess", "own_package.net:ready", *ASSESS[2:], "--out", "ready", "--injections", "2"]) == 0


MISTAKES = {
    "no module": (["assess", "own_pakage.net:build"], "there is no module own_pakage.net in "),
    "no name": (["assess", "own_package.net:bild"], "there is no 'bild' in it; it has torch, nn, Net, build"),
    "half a name": (["assess", "own_package.net"], "it must be MODULE:NAME, as mypkg.net:build"),
    "no network": (["assess", "own_package.net:number"], "is a int; it must be a Module, or make one when called"),
    "makes no network": (["assess", "own_package.data:nothing"], "made a int; it must make a torch.nn.Module"),
    "an exception": (["assess", "own_package.net:broken"], "broken failed: ValueError: out of cheese (net.py, line 17)"),
    "no data": (["--data", "own_package.data:nothing"], "is a int; it must be a DataLoader or a data set of (image, label)"),
    "no file": (["--weights", "nt.safetensors"], "nt.safetensors is missing"),
    "a file of another kind": (["--weights", "net.h5"], "allowed: .safetensors, .pt, .pth (without code in it)"),
    "other shapes": (["--arguments", '{"classes": 4}'], "has fc.bias of shape [3], and the network [4]"),
    "other layers": (["--weights", "lacks.safetensors"], "it lacks fc.bias, and has besides head.bias and 1 more"),
    "no JSON": (["--arguments", "classes=4"], "'classes=4' is no JSON object"),
    "surplus arguments": (["assess", "own_package.net:build", "--arguments", '{"depth": 4}'], "TypeError: build() got an"),
    "no injections": (["--injections", "0"], "option --injections is 0; at least 1"),
    "no format": (["--format", "fp12"], "number format 'fp12' in option --format"),
    "no number": (["--seed", "x"], "argument --seed: invalid int value: 'x'; 'textguard assess --help' says"),
    "no such option": (["--sed", "1"], "unrecognized arguments: --sed 1"),
    "no such plan": (["--plan", "best"], "plan 'best' in option --plan; known: guided"),
    "no such folder": (["--plan", "./best"], "best holds no assessment"),
    "no batch": (["--batch", "0"], "option --batch is 0"),
    "no images": (["--data", "folder:own_package"], "class folders; at least 2 are needed"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_one_line(name, package, capsys):
    changed, said = MISTAKES[name]
    if name == "other layers":
        tensors = load_file("net.safetensors")
        tensors |= {"head.bias": tensors.pop("fc.bias"), "head.weight": torch.zeros(1)}
        save_file(tensors, "lacks.safetensors")
    network = changed.pop(1) if (changed := list(changed))[0] == "assess" else "own_package.net:Net"
    rest = changed[1:] if changed[0] == "assess" else changed
    line = refused(capsys, "assess", network, *ASSESS[2:], "--out", "out", *rest)
    assert said in line
    assert not Path("out").exists()


def test_commands_that_there_are_not(package, capsys):
    assert "the following arguments are required: COMMAND" in refused(capsys)
    assert "invalid choice: 'asses'" in refused(capsys, "asses")
    assert "the following arguments are required: NEW" in refused(capsys, "gate", "base")
    assert "'5' is no share above 0 and below 1" in refused(capsys, "advise", "base", "--target-sdc", "5")
    assert "base holds no assessment" in refused(capsys, "report", "base")
    assert "base holds no assessment" in refused(capsys, "advise", "base", "--target-sdc", "0.1%")


MEANING = """
def forward(network, batch):
    return network(batch["pixels"])

def labels(batch):
    return batch["kind"]

def collate(items):
    import torch
    return {"pixels": torch.stack([image for image, _ in items]), "kind": torch.tensor([int(label) for _, label in items])}

def dicts():
    from torch.utils.data import DataLoader
    return DataLoader(pairs(), batch_size=8, collate_fn=collate)
"""


def test_batches_of_ones_own_are_assessed(package, capsys):
    with Path("own_package/data.py").open("a", encoding="utf-8") as file:
        file.write(MEANING)
    own = ["--data", "own_package.data:dicts", "--forward", "own_package.data:forward", "--labels", "own_package.data:labels"]
    assert run([*ASSESS[:4], *own, "--out", "own", "--injections", "20"]) == 0
    assert run([*ASSESS, "--out", "plain", "--injections", "20"]) == 0
    own, plain = load("own"), load("plain")
    for name in ("faulty_loss", "mismatch", "neuron", "bit"):
        np.testing.assert_allclose(own.records[name].astype(float), plain.records[name].astype(float), rtol=1e-4)
    assert own.settings["task"]["labels"] == "own_package.data.labels"
    assert "task 'guess' in option --task" in refused(capsys, *ASSESS, "--out", "none", "--task", "guess")


def test_help_shows_an_example_that_runs(capsys):
    for arguments in ([], ["assess"], ["gate"], ["report"], ["advise"]):
        with pytest.raises(SystemExit) as ended:
            run([*arguments, "--help"])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert re.search(r"example.*:\n  textguard \w+ ", text)
        assert max(map(len, text.splitlines())) <= 128


def test_python_m_textguard_is_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "textguard", "gate", "old", "new"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "InvalidArtifact: old holds no assessment (assessment.json); name a folder that Assessment.save or textguard wrote\n"
    )


# Images in folders


@pytest.fixture
def pictures(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    for name in ("cat", "ant", "bee"):
        (tmp_path / "test" / name).mkdir(parents=True)
        for number, shape in enumerate([(12, 20, 3), (31, 13, 3), (9, 9)]):
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "test" / name / f"{number}.png")
    return tmp_path


class Pixels(torch.utils.data.Dataset):
    """What our own views of images read: the same files as torchvision opens them."""

    def __init__(self, folders: ImageFolders) -> None:
        self.folders, self.labels = folders, torch.from_numpy(folders.labels)
        self.mean, self.std = folders.mean.flatten().tolist(), folders.std.flatten().tolist()

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index):
        image = Image.open(self.folders.root / self.folders.paths[index]).convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), int(self.labels[index])


@pytest.mark.parametrize(("size", "resize"), [(8, 8), (8, 11), (9, 9), (16, 40)])
def test_images_in_folders_are_what_torchvision_makes_of_them(size, resize, pictures):
    folders = ImageFolders(pictures / "test", size, resize, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert folders.classes == ["ant", "bee", "cat"]
    view = evaluation_view(Pixels(folders), size, resize, "bilinear")
    for index in range(len(folders)):
        image, label = folders[index]
        assert label == view[index][1] == index // 3
        torch.testing.assert_close(image, view[index][0])


def test_grey_images_have_one_channel(pictures):
    grey = ImageFolders(pictures / "test", 9, 9, (0.5,), (0.25,))[2][0]
    coloured = ImageFolders(pictures / "test", 9, 9, (0.5,) * 3, (0.25,) * 3)[2][0]
    assert grey.shape == (1, 9, 9)
    torch.testing.assert_close(grey, coloured[:1], rtol=0, atol=1e-5)


def test_a_folder_of_images_is_assessed(package, pictures, capsys):
    options = ["assess", "own_package.net:build", "--weights", "net.safetensors", "--out", "photos", "--injections", "4"]
    assert run([*options, "--data", f"folder:{pictures / 'test'}", "--size", "8", "--mean", "0.5,0.5,0.5"]) == 0
    found = load("photos")
    assert (found.images, found.classes) == (9, ("ant", "bee", "cat"))
    for arguments, said in {
        ("--data", f"folder:{pictures}"): "holds parts of a data set; name one of them",
        ("--data", "folder:none"): "none is no folder",
        ("--data", f"folder:{pictures / 'test'}", "--size", "8", "--resize", "7"): "1 <= size <= resize is needed",
        ("--data", f"folder:{pictures / 'test'}", "--mean", "0.5"): "--mean and --std must hold 3 numbers each, or 1",
    }.items():
        assert said in refused(capsys, *[word.replace("photos", "others") for word in options], *arguments)
    (pictures / "test" / "bee" / "1.png").write_bytes(b"\x89PNG")
    said = refused(
        capsys, *[word.replace("photos", "o") for word in options], "--data", f"folder:{pictures / 'test'}", "--size", "8"
    )
    assert "1.png cannot be read" in said
