"""Weights that are none: tensors of other kinds, spoilt numbers, files of other classifiers. One line each, nothing is run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from textguard.artifacts import read_safetensors, write_safetensors
from textguard.errors import InvalidArtifact, InvalidEmbeddings
from textguard.text.embeddings import load_text_features
from textguard.vision import checkpoints, classifiers
from textguard.vision.checkpoints import load_checkpoint
from textguard.vision.classifiers import (
    LARGEST_WIDTH,
    ClassifierSpec,
    TextGuidedClassifier,
    check_tensors,
    load_classifier,
    load_weights,
    save_classifier,
)

SPEC = ClassifierSpec("d", "resnet18", "baseline", 32, 32, "bilinear", 0, ("a", "b", "c"))
GUIDED = replace(SPEC, variant="descriptions", width=4)


def network(outputs: int = 3) -> nn.Module:
    """Every kind of state that networks keep: weights, BatchNorm's statistics and counter, a table, a mask."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, outputs), nn.BatchNorm1d(outputs))
    model.register_buffer("places", torch.tensor([0, 2, 1]))
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    return model.eval()


@pytest.fixture(autouse=True)
def _small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is built in no time takes the place of all others."""

    def build(spec: ClassifierSpec) -> nn.Module:
        backbone = network(spec.width or len(spec.classes))
        return TextGuidedClassifier(backbone, len(spec.classes), spec.width, None).eval() if spec.width else backbone

    for module in (checkpoints, classifiers):
        monkeypatch.setattr(module, "build_classifier", build)


def nested() -> torch.Tensor:
    with pytest.warns(UserWarning, match="nested"):
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


# Anything that torch.save takes, in the place of the weight of shape [3, 12].
NO_FLOATS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(3, 12).to_sparse(), "a sparse_coo tensor in 1.weight"),
    "compressed": (lambda: torch.eye(3, 12).to_sparse_csr(), "a sparse_csr tensor in 1.weight"),
    "meta": (lambda: torch.empty(3, 12, device="meta"), "a tensor without numbers in 1.weight"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.eye(3, 12), 0.1, 0, torch.qint8), "a quantised tensor in 1.weight"),
    "float8": (lambda: torch.eye(3, 12).to(torch.float8_e4m3fn), "float8_e4m3fn numbers in 1.weight"),
    "complex": (lambda: torch.eye(3, 12, dtype=torch.complex64), "complex64 numbers in 1.weight"),
    "integers": (lambda: torch.eye(3, 12, dtype=torch.int8), "torch.int8 in 1.weight, where the network has torch.float32"),
    "truths": (lambda: torch.eye(3, 12, dtype=torch.bool), "torch.bool in 1.weight"),
    "one number for all": (
        lambda: torch.zeros(1, 1).expand(3, 12),
        "a tensor of 144 bytes, of which 4 are stored, in 1.weight",
    ),
    "two terabytes": (lambda: torch.zeros(1, 1).expand(10**6, 5 * 10**5), "a tensor of 2,000,000,000,000 bytes"),
}


@pytest.mark.filterwarnings("ignore")  # of torch, about kinds of tensors that are deprecated or unfinished
@pytest.mark.parametrize(("make", "message"), NO_FLOATS.values(), ids=NO_FLOATS)
def test_other_tensors_than_floats_are_refused(tmp_path, make, message):
    torch.save({**network().state_dict(), "1.weight": make()}, tmp_path / "m.pth")
    with pytest.raises(InvalidArtifact, match=rf"m\.pth holds {message}.*; change params\.yaml weights") as raised:
        load_checkpoint(f"published:{tmp_path / 'm.pth'}", SPEC)
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [name for name in NO_FLOATS if name not in ("integers", "truths")])
def test_text_features_of_other_tensors_are_refused(tmp_path, kind):
    make, message = NO_FLOATS[kind]
    torch.save(make(), tmp_path / "t.pth")
    found = message.partition(" in ")[0].removesuffix(",")
    with pytest.raises(InvalidEmbeddings, match=rf"t\.pth holds {found}.*; change params\.yaml texts\.\*\.cache"):
        load_text_features(tmp_path / "t.pth", ["a", "b", "c"])


def test_a_nested_tensor_is_refused_before_its_shape_is_asked():
    with pytest.raises(InvalidArtifact, match="holds a nested tensor in w; weights are dense tensors of 16 to 64 bit floats"):
        check_tensors({"w": nested()})


def changed(name: str, value: float, dtype: torch.dtype = torch.float32) -> Callable[[dict], dict]:
    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensor = state[name].to(dtype, copy=True)
        tensor.view(-1)[0] = value
        return {**state, name: tensor}

    return change


SPOILT: dict[str, tuple[Callable[[dict], dict], str]] = {
    "NaN": (changed("1.weight", torch.nan), r"holds NaN or infinity in 1\.weight \(1 such tensors\)"),
    "infinite": (changed("1.bias", -torch.inf), r"holds NaN or infinity in 1\.bias"),
    "beyond the cast": (changed("1.weight", 1e300, torch.float64), r"holds numbers beyond torch\.float32 in 1\.weight"),
    "other mask": (changed("mask", torch.inf), "holds NaN or infinity in mask"),
    "negative variance": (changed("2.running_var", -1.0), r"holds a negative variance in 2\.running_var"),
    "NaN as variance": (changed("2.running_var", torch.nan), r"NaN or infinity in 2\.running_var"),
    "other table": (changed("places", 99, torch.int64), "holds other numbers in places than the network"),
    "floats as counter": (changed("2.num_batches_tracked", 1.0), r"torch\.float32 in 2\.num_batches_tracked, where .*int64"),
    "no text": (lambda state: {**state, 7: torch.zeros(1)}, "calls a tensor 7; names are texts"),
    "None": (lambda state: {**state, None: torch.zeros(1)}, "calls a tensor None; names are texts"),
    "twice": (lambda state: {**state, "module.1.bias": torch.zeros(3)}, r"holds 1\.bias with and without 'module\.' in front"),
    "hostile name": (lambda state: {**state, "\x1b[2J" + "x" * 10**6: torch.zeros(1)}, r"1 of no use:  ?\[2Jx+\.\.\.; change"),
    "hostile keys": (lambda state: {"\x1b[2J" + "y" * 10**6: 1}, r"a dictionary of \[2Jy+\.\.\.; change"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT)
def test_spoilt_weights_are_refused(tmp_path, spoil, message):
    torch.save(spoil(network().state_dict()), tmp_path / "m.pth")
    with pytest.raises(InvalidArtifact, match=message) as raised:
        load_checkpoint(f"published:{tmp_path / 'm.pth'}", SPEC)
    line = str(raised.value)
    assert str(tmp_path) in line
    assert "params.yaml weights" in line
    assert len(line) < 1000
    assert line.isprintable()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_other_sizes_are_cast(dtype):
    model, state = network(), network().state_dict()
    load_weights(model, {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()})
    torch.testing.assert_close(model.state_dict(), state, rtol=0.01, atol=0.01)
    assert model[1].weight.dtype == torch.float32


def test_a_head_may_not_ask_for_any_amount_of_memory(tmp_path):
    state = {"logit_scale": torch.zeros(()), "head.weight": torch.zeros(1, LARGEST_WIDTH + 1)}
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(InvalidArtifact, match=r"a head of width 65,537; at most 65,536 is allowed"):
        load_checkpoint(f"published:{tmp_path / 'm.pth'}", replace(SPEC, variant="descriptions"))


METADATA = {
    "a list": ([], "has metadata 'textguard' that are no JSON object of texts"),
    "a number": (3, "no JSON object of texts"),
    "a spec that is a number": ({"spec": 5}, "no JSON object of texts"),
    "a spec that is null": ({"spec": None}, "no JSON object of texts"),
    "no JSON": ({"spec": "{"}, "JSONDecodeError"),
    "deep": ({"spec": "[" * 100_000}, "too deep"),
    "a list as spec": ({"spec": "[1]"}, "no JSON object"),
    "a text as spec": ({"spec": '"x"'}, "no JSON object"),
    "a number as spec": ({"spec": "5"}, "no JSON object"),
    "null as spec": ({"spec": "null"}, "no JSON object"),
    "other network": ({"spec": '{"backbone": ["x"]}'}, r"backbone \['x'\] instead of resnet18"),
    "other classes": ({"spec": '{"classes": ["a", "c", "b"]}'}, "classes in another order, or others, c instead of b"),
    "fewer classes": ({"spec": '{"classes": ["a", "b"]}'}, "classes, 2 instead of 3"),
    "no classes": ({"spec": '{"classes": null}'}, r"classes None instead of \('a', 'b', 'c'\)"),
    "unknown fields": ({"spec": json.dumps(dict.fromkeys("pqrstuv"))}, r"p None instead of None; q .*; r .*; \.\.\.; change"),
}


@pytest.mark.parametrize(("stated", "message"), METADATA.values(), ids=METADATA)
def test_metadata_of_other_makers_are_one_line(tmp_path, stated, message):
    file = tmp_path / "m.safetensors"
    save_file(network().state_dict(), file, metadata={"textguard": json.dumps(stated)})
    with pytest.raises(InvalidArtifact, match=message) as raised:
        load_checkpoint(str(file), SPEC)
    assert str(raised.value).startswith(str(file))
    assert len(str(raised.value)) < 600


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Path]:
    """A model file of this project, whose spec or tensors were changed."""

    def store(spec: ClassifierSpec, tensors: Callable[[dict], dict] = lambda state: state, **fields: Any) -> Path:
        file = tmp_path / "m.safetensors"
        model = classifiers.build_classifier(spec)
        save_classifier(file, model, spec, {"inputs": "0"})
        _, metadata = read_safetensors(file, "train")
        described = json.loads(metadata["spec"]) | fields
        content = {name: value for name, value in described.items() if value is not ...}
        write_safetensors(file, tensors(model.state_dict()), {**metadata, "spec": json.dumps(content)})
        return file

    return store


OWN = {
    "other data set": (SPEC, {"dataset": "e"}, "dataset e instead of d"),
    "other network": (SPEC, {"backbone": "resnet34"}, "backbone resnet34 instead of resnet18"),
    "other variant": (SPEC, {"variant": "random"}, "variant random instead of baseline"),
    "other size": (SPEC, {"image_size": 64, "resize_size": 70}, "image_size 64 instead of 32; resize_size 70 instead of 32"),
    "huge size": (SPEC, {"image_size": 10**9}, "image_size 1000000000 instead of 32"),
    "other interpolation": (SPEC, {"interpolation": "magic"}, "interpolation magic instead of bilinear"),
    "other order": (SPEC, {"classes": ["b", "a", "c"]}, "classes in another order, or others, b instead of a"),
    "fewer classes": (SPEC, {"classes": ["a", "b"]}, "classes, 2 instead of 3"),
    "a text as classes": (SPEC, {"classes": "abc"}, r"does not say which classifier it holds \(classes: "),
    "numbers as classes": (SPEC, {"classes": [1, 2, 3]}, r"\(classes\.0: Input should be a valid string"),
    "a list as network": (SPEC, {"backbone": []}, r"\(backbone: "),
    "null as network": (SPEC, {"backbone": None}, r"\(backbone: "),
    "a text as size": (SPEC, {"image_size": "32"}, r"\(image_size: "),
    "half a pixel": (SPEC, {"image_size": 32.5}, r"\(image_size: "),
    "true as width": (SPEC, {"width": True}, r"\(width: "),
    "a text as width": (GUIDED, {"width": "4"}, r"\(width: "),
    "negative width": (GUIDED, {"width": -5}, r"\(width: "),
    "huge width": (GUIDED, {"width": 10**12}, r"\(width: "),
    "other width": (GUIDED, {"width": 5}, r"states the width 5 and 3 classes for variant descriptions.* \[3, 4\]"),
    "no width": (GUIDED, {"width": 0}, "states the width 0"),
    "a width without a head": (SPEC, {"width": 4}, "states the width 4 .* baseline, and its head.weight is missing"),
    "unknown field": (SPEC, {"extra": 1}, r"\(extra: "),
    "missing field": (SPEC, {"width": ...}, r"\(width: "),
}


@pytest.mark.parametrize(("spec", "fields", "message"), OWN.values(), ids=OWN)
def test_a_model_that_is_not_the_runs_is_refused(stored, spec, fields, message):
    file = stored(spec, **fields)
    with pytest.raises(InvalidArtifact, match=message) as raised:
        load_classifier(file, replace(spec, width=0))
    assert str(raised.value).startswith(str(file))
    assert str(raised.value).endswith("; delete it and run 'dvc repro': stage 'train' writes it")


@pytest.mark.parametrize("stated", ["", "[]", "3", "null", '"x"', "{", "[" * 100_000])
def test_a_model_without_a_spec_is_refused(tmp_path, stated):
    write_safetensors(tmp_path / "m.safetensors", network().state_dict(), {"spec": stated})
    with pytest.raises(InvalidArtifact, match="does not say which classifier it holds"):
        load_classifier(tmp_path / "m.safetensors", SPEC)


@pytest.mark.parametrize("name", ["NaN", "infinite", "beyond the cast", "negative variance", "other table", "hostile name"])
def test_a_model_with_spoilt_weights_is_refused(stored, name):
    spoil, message = SPOILT[name]
    with pytest.raises(InvalidArtifact, match=message.removesuffix("; change")) as raised:
        load_classifier(stored(SPEC, spoil), SPEC)
    assert str(raised.value).endswith("stage 'train' writes it")


def test_a_sound_model_is_read(stored):
    for spec in (SPEC, GUIDED):
        model, found = load_classifier(stored(spec), replace(spec, width=0))
        assert found == spec
        torch.testing.assert_close(model.state_dict(), classifiers.build_classifier(spec).state_dict(), equal_nan=True)
