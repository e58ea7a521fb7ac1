"""Bad input: values of params.yaml that only the stage that uses them can judge, and weights that are not the ones it names."""

import hashlib

import pytest

from bad_input_grid import MODEL, RUN, says
from smoke_grid import BASELINE, TEXT
from textguard.artifacts import read_safetensors

NAMES = {
    "source": (
        "datasets.digits.source",
        "mnist",
        "data digits",
        ["data set 'mnist'", "known: cifar10", "datasets.*.source"],
    ),
    "backbone": (
        "backbones.resnet18",
        {"network": "lenet", "recipe": "resnet"},
        f"train {BASELINE}",
        ["backbone 'lenet'", "known: alexnet, focalnet_s,", "vgg19_bn", "params.yaml backbones"],
    ),
    "data that is nowhere": ("datasets.digits.folder", "nowhere", "data digits", ["nowhere is no folder", "datasets.*.folder"]),
    "data that nobody can download": ("datasets.digits.source", "imagenet", "data digits", ["datasets.*.folder", "train/WNID"]),
    "small images": (
        "backbones.resnet18.network",
        "alexnet",
        f"train {BASELINE}",
        ["alexnet", "63 to 4096 pixels", "not 32", "backbones.*.image_size"],
    ),
    "encoder": ("encoder", "word2vec", "heads digits", ["encoder 'word2vec'", "known: minilm, open_clip:MODEL:PRETRAINED"]),
    "encoder without a tag": ("encoder", "open_clip:RN50", "heads digits", ["'open_clip:RN50'", "open_clip:MODEL:PRETRAINED"]),
    "OpenCLIP model": ("encoder", "open_clip:ViT-Z:openai", "heads digits", ["OpenCLIP model 'ViT-Z'", "ViT-B-32"]),
    "OpenCLIP tag": ("encoder", "open_clip:RN50:mine", f"embeddings {TEXT}", ["tag of RN50 'mine'", "known:", "openai"]),
    "sentence-transformers folder": (
        "encoder",
        "sentence_transformers:/none",
        "heads digits",
        ["/none/modules.json", "No such file"],
    ),
    "encoder folder": ("encoder", "open_clip:local-dir:/none", "heads digits", ["/none/open_clip_config.json", "No such file"]),
    "engine": ("inject.engine", "hooks", f"inject {BASELINE}", ["engine 'hooks'", "known: pytorchfi, replay, whole"]),
    "detector": ("inject.detector", "clamp", f"inject {BASELINE}", ["detector 'clamp'", "known: fixed:X, off, profiled"]),
    "detector without a number": ("inject.detector", "fixed:", f"inject {BASELINE}", ["'fixed:'", "number above 0"]),
    "detector with a word": ("inject.detector", "fixed:ten", f"inject {BASELINE}", ["'fixed:ten'", "number above 0"]),
    "detector below 0": ("inject.detector", "fixed:-1", f"inject {BASELINE}", ["'fixed:-1'", "number above 0"]),
    "detector at NaN": ("inject.detector", "fixed:nan", f"inject {BASELINE}", ["'fixed:nan'", "number above 0"]),
    "format": ("inject.format", "posit8", f"inject {BASELINE}", ["number format 'posit8'", "known:", "bf16", "inject.format"]),
    "format's sizes": ("inject.format", "int(1)", f"inject {BASELINE}", ["'int(1)'", "B from 2 to 16", "inject.format"]),
    "metadata of fp32": (
        "inject.faults.target",
        "metadata",
        f"inject {BASELINE}",
        ["fp32 has no metadata", "inject.faults.target"],
    ),
    "too many bits": ("inject.faults.bits", 33, f"inject {BASELINE}", ["inject.faults.bits is 33", "32 to choose from"]),
    "no such layers": ("inject.kinds", ["Conv3d"], f"inject {BASELINE}", ["no Conv3d output"]),
    "more flips than weights": (
        "closeup.weight_flips",
        10**9,
        f"closeup {BASELINE}",
        ["closeup.weight_flips is 1000000000", "there are 11166912 weights"],
    ),
    "few training images": ("datasets.digits.limit_train", 5, "data digits", ["digits cannot be split", "datasets", "5"]),
    "many test images": ("datasets.digits.limit_test", 999, "data digits", ["digits cannot be split", "datasets", "999"]),
}


@pytest.mark.parametrize(("place", "value", "stage", "parts"), NAMES.values(), ids=NAMES)
def test_what_a_stage_does_not_know_is_named_with_what_it_knows(grid, place, value, stage, parts):
    grid.change(place, value)
    grid.change("hardware.models", {})  # which take what is wrong in inject.faults from there
    if stage.startswith("heads"):
        grid.change("variants", ["baseline", "random"])  # whose head is as wide as the encoder's vectors
    says(grid.fails(*stage.split()), "params.yaml", *parts)


def test_an_encoder_folder_without_a_width_is_refused(grid):
    grid.put("open_clip_config.json", '{"model_cfg": {}}')
    grid.change("encoder", f"open_clip:local-dir:{grid.folder}")
    grid.change("variants", ["baseline", "random"])
    says(grid.fails("heads", "digits"), "open_clip_config.json", "params.yaml encoder")


def test_a_diverging_training_says_when_and_what_to_lower(grid):
    grid.change("backbones.resnet18.learning_rate", 1e6)
    grid.change("backbones.resnet18.weight_decay", 1e6)
    before = grid.files()
    code, lines = grid.run("train", BASELINE)
    assert code == 1
    says(lines[-1], "InvalidParameter", BASELINE, "the loss is", "in epoch 1", "lower params.yaml backbones.*.learning_rate")
    assert grid.files() == before


def test_weights_from_elsewhere_must_have_the_sha256_that_params_yaml_says(grid):
    file = grid.put("own.safetensors", (grid.folder / MODEL).read_bytes())
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    where = "weights.resnet18-baseline"
    grid.change(where, {"source": file.name, "sha256": "0" * 64})
    line = grid.fails("train", BASELINE)
    says(line, "InvalidArtifact", f"{file.name} has the SHA-256 {found}, not {'0' * 64}", f"params.yaml {where}.sha256")
    trained, _ = read_safetensors(grid.folder / MODEL, "train")
    grid.change(f"{where}.sha256", found)
    assert grid.run("train", BASELINE) == (0, [])
    taken, _ = read_safetensors(grid.folder / MODEL, "train")
    assert all(taken[name].equal(tensor) for name, tensor in trained.items())
    assert len((grid.folder / RUN / "training.csv").read_text(encoding="utf-8").splitlines()) == 1  # the curve's header
    file.unlink()
    says(grid.fails("train", BASELINE), "InvalidArtifact", f"{file.name} is missing", "name another one")


PLANS = {
    "few for each bit": ({"plan": "proportional"}, "injections_per_layer is 4; a plan by bit needs 2 for each of 32 bits"),
    "small pilot": (
        {"plan": "neyman", "pilot": 8, "injections_per_layer": 99},
        "pilot is 8; a plan by bit needs 2 for each of 32 bits",
    ),
    "several bits": (
        {"plan": "neyman", "injections_per_layer": 99, "faults.bits": 2},
        "only faults of one bit in one value can be planned by bit",
    ),
    "no end": ({"stop_at": "soon"}, "stop_at is 'soon'; allowed: never, a half-width in nats as 0.001, or in percent"),
    "negative end": ({"stop_at": "-5%"}, "stop_at is '-5%'; allowed"),
    "other detector": ({"compare_detectors": ["tmr"]}, "detector 'tmr'"),
    "negative detector": ({"compare_detectors": ["fixed:-1"]}, "'fixed:-1'; X must be an fp32 number above 0"),
}


@pytest.mark.parametrize(("settings", "message"), PLANS.values(), ids=PLANS)
def test_plans_that_cannot_be_carried_out_are_named(grid, settings, message):
    for name, value in settings.items():
        grid.change(f"inject.{name}", value)
    says(grid.fails("inject", BASELINE), message)


@pytest.mark.parametrize("policy", ["drop", "cap:0", "cap:"])
def test_an_unknown_policy_for_non_finite_losses_is_named(grid, policy):
    grid.change("statistics.nonfinite", policy)
    says(grid.fails("results"), f"statistics.nonfinite is '{policy}'", "goldeneye, or cap:X")
