"""Weights from elsewhere: what fits is loaded as it is, what does not is named, and nothing is executed."""

import argparse
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from conftest import REPOSITORY, run
from textguard.artifacts import read_csv, write_safetensors
from textguard.errors import InvalidArtifact, InvalidParameter
from textguard.params import load_params
from textguard.vision.backbones import build_backbone
from textguard.vision.checkpoints import read_checkpoint, read_text_features
from textguard.vision.classifiers import ClassifierSpec, TextGuidedClassifier, fill, load_classifier, save_classifier

CLASSES, WIDTH = 10, 16
FEATURES = REPOSITORY.parent / "shared" / "data" / "imagenet_text_features"


class Program:
    """What a pickle can hold: a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def guided() -> nn.Module:
    return TextGuidedClassifier(build_backbone("resnet18", WIDTH, 32), CLASSES, WIDTH, None)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("make", [lambda: build_backbone("resnet18", CLASSES, 32), guided], ids=["baseline", "text-guided"])
def test_published_checkpoints_load_whole(tmp_path, make, prefix):
    torch.manual_seed(0)
    model = make()
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    extra = {"optimizer": {"lr": 0.1, "state": [1, None]}, "epoch": 89, "args": argparse.Namespace(model="resnet18", lr=0.1)}
    torch.save({"model": state, **extra}, tmp_path / "published.pth")
    torch.manual_seed(1)
    other = make()
    fill(other, read_checkpoint(f"published:{tmp_path}/published.pth", "resnet18"))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(other.eval()(images), model.eval()(images))


def test_a_file_of_this_project_is_a_checkpoint_too(tmp_path):
    model, path = guided(), tmp_path / "model.safetensors"
    spec = ClassifierSpec("digits", "resnet18", "descriptions", 32, 32, "bilinear", WIDTH, tuple("abcdefghij"))
    save_classifier(path, model, spec, {})
    assert read_checkpoint(str(path), "resnet18").keys() == model.state_dict().keys()
    write_safetensors(path, model.state_dict())
    assert torch.equal(read_checkpoint(str(path), "resnet18")["head.weight"], model.head.weight)


def test_what_does_not_fit_is_named_with_both_sides():
    model = build_backbone("resnet18", CLASSES, 32)
    state = model.state_dict()
    state["fc.weight"] = torch.zeros(7, 512)
    state["extra"] = torch.zeros(1)
    del state["conv1.weight"]
    message = (
        r"3 of 123 places: conv1\.weight is missing, not \(64, 3, 7, 7\); extra is \(1,\), not wanted; fc\.weight is \(7, 512\)"
    )
    with pytest.raises(InvalidArtifact, match=message):
        fill(model, state)


def test_a_program_in_a_pickle_does_not_run(tmp_path):
    for content in (Program(tmp_path / "ran"), {"model": {"a": Program(tmp_path / "ran")}}):
        torch.save(content, tmp_path / "evil.pth")
        with pytest.raises(InvalidArtifact, match=r"evil\.pth holds something else than tensors .*, which is not executed"):
            read_checkpoint(f"published:{tmp_path}/evil.pth", "resnet18")
        with pytest.raises(InvalidArtifact, match="not executed"):
            read_text_features(tmp_path / "evil.pth", 3)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "ran").exists(), "this file is harmless, and the test proves nothing"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"hello"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    with pytest.raises(InvalidArtifact, match=r"damaged\.pth"):
        read_checkpoint(f"published:{path}", "resnet18")


@pytest.mark.parametrize("content", [[1, 2], {"model": 3}, {"epoch": 3}, {}, torch.zeros(2)])
def test_a_file_without_weights_is_named(tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(InvalidArtifact, match=r"odd\.pth holds no state dict"):
        read_checkpoint(f"published:{tmp_path}/odd.pth", "resnet18")


def test_other_names_are_refused_with_what_is_allowed(tmp_path):
    for name in ("weights.bin", "https://example.org/a.pth", "resnet18.pth"):
        with pytest.raises(InvalidParameter, match=r"allowed: null, torchvision, published:FILE\.pth, FILE\.safetensors"):
            read_checkpoint(name, "resnet18")
    with pytest.raises(InvalidArtifact, match=r"none\.pth is missing"):
        read_checkpoint(f"published:{tmp_path}/none.pth", "resnet18")


def test_pretrained_weights_that_cannot_be_downloaded_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(InvalidArtifact, match=r"weights of resnet18 cannot be had .* published:FILE\.pth"):
        read_checkpoint("torchvision", "resnet18")


def test_pretrained_weights_come_from_the_cache_of_downloads(tmp_path, monkeypatch):
    import hashlib
    import io

    from torchvision.models import ResNet18_Weights

    weights = ResNet18_Weights.IMAGENET1K_V1
    model, buffer = build_backbone("resnet18", 1000, 224), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    mark = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(type(weights), "url", f"https://example.org/resnet18-{mark}.pth")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / f"resnet18-{mark}.pth").write_bytes(buffer.getvalue())
    assert torch.equal(read_checkpoint("torchvision", "resnet18")["fc.bias"], model.fc.bias)


def test_text_features_have_rows_of_length_one(tmp_path):
    path = tmp_path / "features.pth"
    torch.save(torch.randn(5, 4).double() * 9, path)
    features = read_text_features(path, 5)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    with pytest.raises(InvalidArtifact, match="features of 5 classes, and the data set has 6"):
        read_text_features(path, 6)
    for odd in ({"a": 1}, torch.zeros(5), torch.zeros(5, 4), torch.full((5, 4), torch.nan), torch.ones(5, 4, dtype=torch.int)):
        torch.save(odd, path)
        with pytest.raises(InvalidArtifact, match=r"class features|zero, NaN"):
            read_text_features(path, 5)


@pytest.mark.skipif(not FEATURES.is_dir(), reason="the published text features are not at hand")
@pytest.mark.parametrize("name", ["gpt3", "a-photo-of-a"])
def test_the_published_text_features_load(name):
    features = read_text_features(FEATURES / f"{name}.pth", 1000)
    assert features.shape == (1000, 512)
    mean = features.mean(dim=0)
    cosine = (mean @ mean * 1e6 - 1000) / (1000 * 999)
    assert cosine == pytest.approx({"gpt3": 0.603, "a-photo-of-a": 0.599}[name], abs=0.001)


GUIDED = "digits-resnet18-descriptions-s0"
BASELINE = "digits-resnet18-baseline-s0"


@pytest.fixture
def grid(tmp_path, monkeypatch) -> Path:
    """The smoke grid with its data set, nothing trained."""
    shutil.copy(REPOSITORY / "grids" / "smoke" / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    run([sys.executable, str(REPOSITORY / "stages"), "data", "digits"], tmp_path)
    return tmp_path


def change(grid: Path, key: str, **values: object) -> None:
    params = yaml.safe_load((grid / "params.yaml").read_text())
    params["runs"][key] |= values
    (grid / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def stage(name: str, key: str, grid: Path):
    return run([sys.executable, str(REPOSITORY / "stages"), name, key], grid, check=False)


def test_a_campaign_needs_no_training(grid):
    for key, model in ((BASELINE, build_backbone("resnet18", CLASSES, 32)), (GUIDED, guided())):
        torch.save({"model": model.state_dict()}, grid / f"{key}.pth")
        change(grid, key, checkpoint=f"published:{key}.pth", head_from=f"{key}.pth")
        for name in ("train", "ranges", "evaluate"):
            done = stage(name, key, grid)
            assert done.returncode == 0, done.stderr
        loaded, spec = load_classifier(grid / "models" / f"{key}.safetensors")
        assert spec.width == (WIDTH if key == GUIDED else 0)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
        curve = read_csv(grid / "metrics" / "runs" / key / "training.csv", "train", ["epoch", "loss"], [])
        assert curve.empty


def test_a_checkpoint_of_another_classifier_leaves_nothing_behind(grid):
    torch.save({"model": build_backbone("resnet18", 7, 32).state_dict()}, grid / "other.pth")
    change(grid, BASELINE, checkpoint="published:other.pth", head_from="other.pth")
    done = stage("train", BASELINE, grid)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "published:other.pth does not fit the classifier in 2 of 122 places" in done.stderr
    change(grid, GUIDED, checkpoint="published:other.pth", head_from="other.pth")
    done = stage("train", GUIDED, grid)
    assert "holds no text-guided classifier" in done.stderr
    assert not (grid / "models").exists()


def test_a_checkpoint_is_the_file_that_dvc_watches(grid):
    change(grid, BASELINE, checkpoint="published:weights.pth")
    with pytest.raises(InvalidParameter, match=r"head_from is 'data/digits/classes\.json'; .* starts from 'weights\.pth'"):
        load_params()
    change(grid, BASELINE, checkpoint="torchvision")
    with pytest.raises(InvalidParameter, match="checkpoint is torchvision: its weights are for baselines on source imagenet"):
        load_params()


def test_published_features_start_a_head_without_any_text(grid):
    torch.manual_seed(0)
    torch.save(torch.randn(CLASSES, WIDTH), grid / "features.pth")
    params = yaml.safe_load((grid / "params.yaml").read_text())
    params["texts"] = {}
    params["runs"] = {GUIDED: params["runs"][GUIDED] | {"head_from": "features.pth"}}
    (grid / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    done = stage("train", GUIDED, grid)
    assert done.returncode == 0, done.stderr
    assert load_classifier(grid / "models" / f"{GUIDED}.safetensors")[1].width == WIDTH
