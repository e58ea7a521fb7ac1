"""Weights from elsewhere: what is taken, what is refused with which words, and that nothing in a file is ever run."""

import argparse
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from dvc.utils.serialize import modify_yaml
from safetensors.torch import save_file
from torch import nn

from conftest import REPOSITORY, TinyMobileNet
from stages import data, embeddings, heads, prompts, responses, train
from textguard.artifacts import read_classes, sha256_of_file
from textguard.errors import InvalidArtifact, InvalidEmbeddings, InvalidParameter, UnknownName
from textguard.params import Params, load_params
from textguard.text.embeddings import load_text_features
from textguard.text.row_map import read_row_map
from textguard.vision.checkpoints import load_checkpoint
from textguard.vision.classifiers import ClassifierSpec, build_classifier, load_classifier, save_classifier
from textguard.vision.datasets import imagenet_classes

BASELINE = ClassifierSpec("d", "resnet18", "baseline", 32, 32, "bilinear", 0, ("a", "b", "c"))
GUIDED = replace(BASELINE, variant="descriptions")
BASELINE_WEIGHTS, GUIDED_WEIGHTS = "resnet18-baseline", "resnet18-descriptions"


def network(spec: ClassifierSpec = BASELINE, width: int = 0) -> nn.Module:
    torch.manual_seed(0)
    return build_classifier(replace(spec, width=width)).eval()


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(found(images), expected(images))
    assert not found.training


def published(tmp_path: Path, content: Any) -> str:
    torch.save(content, tmp_path / "m.pth")
    return f"published:{tmp_path / 'm.pth'}"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "optimizer": {"lr": 0.1}, "epoch": 89, "args": argparse.Namespace(lr=0.1, opt=["sgd"])},
        lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},  # of DistributedDataParallel
        lambda state: state,
        lambda state: {name: tensor for name, tensor in state.items() if "num_batches_tracked" not in name},
    ],
    ids=["a training script's", "distributed", "bare", "from before the counters"],
)
@pytest.mark.parametrize(("spec", "width"), [(BASELINE, 0), (GUIDED, 12)])
def test_published_weights_are_read(tmp_path, spec, width, wrap):
    model = network(spec, width)
    found, found_spec = load_checkpoint(published(tmp_path, wrap(model.state_dict())), spec)
    assert found_spec == replace(spec, width=width)
    assert_same(found, model)


@pytest.mark.parametrize(("spec", "width"), [(BASELINE, 0), (GUIDED, 12)])
def test_safetensors_are_read_with_and_without_a_spec(tmp_path, spec, width):
    model = network(spec, width)
    save_classifier(tmp_path / "own.safetensors", model, replace(spec, width=width, dataset="other"), {"inputs": "x"})
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    for name in ("own", "bare"):
        found, found_spec = load_checkpoint(str(tmp_path / f"{name}.safetensors"), spec)
        assert found_spec == replace(spec, width=width)
        assert_same(found, model)


def test_a_model_of_this_project_must_be_the_runs(tmp_path):
    save_classifier(tmp_path / "m.safetensors", network(), BASELINE, {})
    other = replace(BASELINE, backbone="resnet34", image_size=64, classes=("a", "b", "d"))
    with pytest.raises(InvalidArtifact, match=r"backbone resnet18 instead of resnet34; image_size 32 instead of 64; classes"):
        load_checkpoint(str(tmp_path / "m.safetensors"), other)


def without(state: dict, *names: str) -> dict:
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        (
            replace(BASELINE, classes=tuple("abcd")),
            lambda s: s,
            r"4 classes.* 2 of another shape: fc.weight is \[3, 512\] instead of \[4, 512\], fc.bias",
        ),
        (
            BASELINE,
            lambda s: {**without(s, "fc.bias"), "x.y": torch.zeros(1)},
            r"its 122 tensors and the 122 wanted are 1 missing: fc.bias; 1 of no use: x.y; change params",
        ),
        (
            BASELINE,
            lambda s: TinyMobileNet().state_dict(),
            r"are 102 missing: conv1.weight, .*; 18 of no use: features.0.weight",
        ),
        (GUIDED, lambda s: s, "plain network, without the text-guided head, and the run's variant is 'descriptions'"),
        (BASELINE, lambda s: network(GUIDED, 5).state_dict(), "holds a text-guided classifier, and .* 'baseline'"),
        (BASELINE, lambda s: {**s, "fc.bias": s["fc.bias"] * float("nan")}, r"NaN or infinity in fc.bias \(1 such"),
        (BASELINE, lambda s: {"state_dict": s, "epoch": 3}, "under 'model', but a dictionary of state_dict, epoch"),
        (BASELINE, lambda s: {"model": [1, 2]}, "but a dictionary of model"),
        (BASELINE, lambda s: torch.zeros(3), "but a Tensor"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_differences(tmp_path, spec, change, message):
    with pytest.raises(InvalidArtifact, match=message) as raised:
        load_checkpoint(published(tmp_path, change(network().state_dict())), spec)
    assert str(tmp_path) in str(raised.value)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    "read", [lambda file: load_checkpoint(f"published:{file}", BASELINE), lambda f: load_text_features(f, [])]
)
@pytest.mark.parametrize("write", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content, protocol=2))])
def test_a_malicious_pickle_is_not_run(tmp_path, write, read):
    file, sprung = tmp_path / "m.pth", tmp_path / "sprung"
    write({"model": network().state_dict(), "args": Trap(sprung)}, file)
    with pytest.raises(InvalidArtifact, match=r"holds other things than tensors.*, which are not loaded"):
        read(file)
    assert not sprung.exists()
    if write is not torch.save:
        pickle.loads(file.read_bytes())
        assert sprung.exists(), "the trap works"


@pytest.mark.parametrize("part", [0, 0.5, 0.99])
@pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
def test_a_truncated_file_is_refused(tmp_path, name, part):
    file = tmp_path / name
    (torch.save if name == "m.pth" else save_file)(network().state_dict(), file)
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    with pytest.raises(InvalidArtifact, match=rf"{name} (cannot be read|is damaged)"):
        load_checkpoint(f"published:{file}" if name == "m.pth" else str(file), BASELINE)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InvalidArtifact, match=r"m.pth is missing; create it, or name another one"):
        load_checkpoint(f"published:{tmp_path}/m.pth", BASELINE)


def test_pretrained_weights_come_from_torch_hubs_cache(tmp_path, monkeypatch):
    spec = replace(BASELINE, classes=tuple(imagenet_classes()))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(InvalidArtifact, match=r"pretrained weights of resnet18 cannot be had .* torch hub \(TORCH_HOME\)"):
        load_checkpoint("torchvision", spec)
    model = network(spec)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    found, _ = load_checkpoint("torchvision", spec)
    assert_same(found, model)
    with pytest.raises(InvalidParameter, match="for ImageNet's 1,000 classes, and d's 3 are others"):
        load_checkpoint("torchvision", BASELINE)


def test_text_features_are_read_and_normalised(tmp_path):
    features = torch.randn(3, 5, dtype=torch.float64) * 8
    torch.save(features, tmp_path / "t.pth")
    expected = nn.functional.normalize(features, dim=1).float()
    torch.testing.assert_close(load_text_features(tmp_path / "t.pth", ["a", "b", "c"]), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(4, 5), r"holds \[4, 5\] torch.float32; one tensor \[3, E\] of floats"),
        (torch.ones(3), r"holds \[3\]"),
        (torch.ones(3, 5, dtype=torch.int64), "int64"),
        ({"a": torch.ones(3, 5)}, "holds dict"),
        (torch.zeros(3, 5), "vector is zero"),
        (torch.full((3, 5), float("nan")), "NaN"),
    ],
)
def test_text_features_that_do_not_fit_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "t.pth")
    with pytest.raises(InvalidEmbeddings, match=rf"t.pth.*{message}.*texts.\*.cache"):
        load_text_features(tmp_path / "t.pth", ["a", "b", "c"])


def row_map(tmp_path, **rows):
    stated = {name: {"rows": dict.fromkeys(map(str, own), "a word"), "why": "alike"} for name, own in rows.items()}
    (tmp_path / "rows.json").write_text(json.dumps(stated), encoding="utf-8")
    return tmp_path / "rows.json"


def test_a_row_map_gives_each_class_the_mean_direction_of_its_rows(tmp_path):
    features = torch.tensor([[2.0, 0, 0], [0, 8.0, 0], [0, 0, 1.0]])
    torch.save(features, tmp_path / "t.pth")
    found = load_text_features(tmp_path / "t.pth", ["ship", "cat"], row_map(tmp_path, cat=[2], ship=[0, 1]))
    half = 0.5**0.5  # rows are normalised before their mean is taken: the longer one does not weigh more
    torch.testing.assert_close(found, torch.tensor([[half, half, 0], [0, 0, 1.0]]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ship": {"rows": {"9": "x"}, "why": "y"}}, r"t\.pth has rows 0 to 2"),
        ({"cat": {"rows": {"0": "x"}, "why": "y"}}, "one entry for each of ship, and has cat"),
        ({"ship": {"rows": {"-1": "x"}, "why": "y"}}, "names row '-1' for class 'ship'"),
        ({"ship": {"rows": {}, "why": "y"}}, "must give class 'ship'"),
        ({"ship": {"rows": {"1": "x"}}}, "must give class 'ship'"),
        ([1], "has list"),
    ],
)
def test_a_row_map_that_does_not_fit_is_refused(tmp_path, content, message):
    torch.save(torch.eye(3), tmp_path / "t.pth")
    (tmp_path / "rows.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises((InvalidEmbeddings, InvalidArtifact), match=rf"rows\.json.*{message}"):
        load_text_features(tmp_path / "t.pth", ["ship"], tmp_path / "rows.json")


def test_the_rows_that_stand_for_cifar10_are_what_they_are_called():
    names, cifar = (
        imagenet_classes(),
        ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    )
    file = REPOSITORY / "prompts" / "cache" / "cifar10_imagenet_rows.json"
    owned = read_row_map(file, cifar)
    stated = json.loads(file.read_text(encoding="utf-8"))
    for name, rows in zip(cifar, owned, strict=True):
        assert list(stated[name]["rows"].values()) == [names[row] for row in rows]
    assert len({row for rows in owned for row in rows}) == sum(map(len, owned)), "no row stands for two classes"


@pytest.mark.parametrize("name", ["gpt3", "a-photo-of-a"])
def test_the_published_text_features_are_read(name):
    file = REPOSITORY.parent / "shared" / "data" / "imagenet_text_features" / f"{name}.pth"
    if not file.is_file():
        pytest.skip("the published text features are not here")
    matrix_ce = load_text_features(file, imagenet_classes())
    assert matrix_ce.shape == (1000, 512)
    torch.testing.assert_close(matrix_ce.norm(dim=1), torch.ones(1000))
    # The file names no classes; that it has ours, in our order, its meaning shows.
    nearest = (matrix_ce @ matrix_ce.T).fill_diagonal_(0).argmax(dim=1)
    names = imagenet_classes()
    assert names[nearest[names.index("violin")]] == "cello"


@pytest.fixture
def grid(tmp_path, monkeypatch) -> Callable[..., Params]:
    """The smoke grid in a folder of its own, the working directory, with some of its sections changed."""

    def write(**sections: Any) -> Params:
        shutil.copy(REPOSITORY / "grids" / "smoke" / "params.yaml", tmp_path)
        with modify_yaml("params.yaml") as params:
            params.update(sections, root=str(REPOSITORY))
        return load_params()

    monkeypatch.chdir(tmp_path)
    return write


SHA256 = "0" * 64
WEIGHTS = {
    "misspelt": (GUIDED_WEIGHTS, "torchvison", None, "allowed: torchvision, published:PATH.pth, PATH.safetensors"),
    "archive": (GUIDED_WEIGHTS, "published:m.safetensors.zip", SHA256, "allowed: torchvision, published:PATH.pth"),
    "published without saying so": (GUIDED_WEIGHTS, "m.pth", SHA256, "allowed: torchvision, published:PATH.pth"),
    "pretrained with texts": (GUIDED_WEIGHTS, "torchvision", None, "whose networks are baselines, not 'descriptions'"),
    "no SHA-256": (BASELINE_WEIGHTS, "published:w/m.pth", None, r"sha256 is null; give the SHA-256 of w/m\.pth"),
    "needless SHA-256": (BASELINE_WEIGHTS, "torchvision", SHA256, "sha256 must be null: 'torchvision' checks its files itself"),
    "half a SHA-256": (BASELINE_WEIGHTS, "m.safetensors", SHA256[:32], r"sha256 is \"0{32}\" in params\.yaml: .*\{64\}"),
    "other variant": (
        "resnet18-random",
        "m.safetensors",
        SHA256,
        "'resnet18-random' .* known: resnet18-baseline, resnet18-desc",
    ),
    "other backbone": ("resnet34-baseline", "torchvision", None, "'resnet34-baseline' in params.yaml weights"),
    "run": ("digits-resnet18-baseline-0", "torchvision", None, "classifier BACKBONE-VARIANT 'digits-resnet18-baseline-0' in"),
}


@pytest.mark.parametrize(("name", "source", "sha256", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_are_checked_before_anything_runs(grid, name, source, sha256, message):
    with pytest.raises((InvalidParameter, UnknownName), match=message) as raised:
        grid(weights={name: {"source": source, "sha256": sha256}})
    assert f"weights.{name}" in str(raised.value)


def test_the_file_of_weights_is_known_from_their_source(grid):
    pretrained, published = {"source": "torchvision", "sha256": None}, {"source": "published:w/m.pth", "sha256": SHA256}
    weights = grid(weights={BASELINE_WEIGHTS: pretrained, GUIDED_WEIGHTS: published}).weights
    assert (weights[BASELINE_WEIGHTS].file, weights[GUIDED_WEIGHTS].file) == (None, "w/m.pth")
    own = {"source": "m.safetensors", "sha256": SHA256}
    assert grid(weights={BASELINE_WEIGHTS: own}).weights[BASELINE_WEIGHTS].file == "m.safetensors"


def test_a_campaign_can_be_run_without_training(grid, tmp_path):
    """The stage writes what the others read: a model with the run's spec, and a curve without points."""
    params = grid(variants=["baseline", "random"])
    for stage in (data, heads):
        stage.main(params, "digits")
    shutil.copy("models/heads/digits/random.safetensors", "models/heads/digits/descriptions.safetensors")
    classes = tuple(read_classes(Path("data/digits/classes.json")))
    for name, spec, width in ((BASELINE_WEIGHTS, BASELINE, 0), (GUIDED_WEIGHTS, GUIDED, 12)):
        model, key = network(replace(spec, classes=classes), width), f"digits-{name}-0"
        torch.save({"model": model.state_dict()}, tmp_path / "m.pth")
        train.main(grid(weights={name: {"source": "published:m.pth", "sha256": sha256_of_file(Path("m.pth"), "")}}), key)
        wanted = replace(spec, dataset="digits", classes=classes)
        found, found_spec = load_classifier(Path("models") / f"{key}.safetensors", wanted)
        assert_same(found, model)
        assert (found_spec.width, found_spec.dataset, found_spec.variant) == (width, "digits", spec.variant)
        curve = pd.read_csv(Path("metrics") / "runs" / key / "training.csv")
        assert len(curve) == 0
        assert {"epoch", "loss", "learning_rate"} <= set(curve.columns)


def test_training_starts_from_published_text_features(grid, tmp_path, monkeypatch):
    features = torch.randn(10, 6) * 3
    torch.save(features, tmp_path / "t.pth")
    published = {
        "provider": "features",
        "questions": ["A published description of {a_class}"],
        "cache": [str(tmp_path / "t.pth")],
    }
    params = grid(texts={"descriptions": published})
    data.main(params, "digits")
    for stage in (prompts, responses, embeddings):
        stage.main(params, "digits-descriptions")
    heads.main(params, "digits")
    starts = []
    monkeypatch.setattr(train, "train", lambda model, *_, **__: starts.append(model.head.weight.detach().clone()) or [])
    train.main(params, f"digits-{GUIDED_WEIGHTS}-0")
    torch.testing.assert_close(starts[0].cpu(), nn.functional.normalize(features, dim=1))
