"""The training loop: it learns, goes on after an interruption to the same bits, and shares its work among processes."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from dvc.utils.serialize import load_yaml
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import REPOSITORY, TinyMobileNet, TinyResNet, TinyTransformer
from smoke_grid import environment, run
from stages.rehearsal import rehearse
from textguard.artifacts import read_safetensors, write_safetensors
from textguard.errors import InvalidArtifact, InvalidParameter, TextguardError, UnsupportedModel
from textguard.faults.task import top2diff
from textguard.params import CloseupParams, FaultParams, load_params
from textguard.vision.datasets import PackedSplit
from textguard.vision.evaluation import predict
from textguard.vision.order import epoch_order
from textguard.vision.recipe import Recipe, load_recipe
from textguard.vision.training import Checkpoints, Epoch, Trainer, train
from textguard.vision.transforms import TrainingView, evaluation_view, training_view

CLASSES = 4
STEPS = 5  # of an epoch over the 40 images
PLAIN = {
    **{"epochs": 2, "batch_size": 8, "base_batch_size": 8, "learning_rate": 0.05, "warmup_epochs": 0, "schedule": "cosine"},
    **{"image_size": 16, "resize_size": 16, "crop": "none", "flip": 0.0, "auto_augment": "none", "random_erasing": 0.0},
}
EVERYTHING = {
    **{"optimizer": "adamw", "learning_rate": 0.01, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "clip_norm": 1.0},
    **{"ema": True, "ema_decay": 0.9, "ema_steps": 2, "warmup_epochs": 1, "repeated_augmentation": 2, "norm_weight_decay": 0.0},
    **{"crop": "padded", "crop_padding": 2, "flip": 0.5, "auto_augment": "trivial_augment_wide", "random_erasing": 0.2},
}


def recipe(**changes: object) -> Recipe:
    return load_recipe("resnet", PLAIN | changes)


def split(images: int = 40) -> PackedSplit:
    """Images whose brightness says which class they are of."""
    labels = torch.arange(images) % CLASSES
    noise = torch.randint(0, 60, (images, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    pixels = (noise + 60 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    return PackedSplit(pixels, labels, list("abcd"), [0.5] * 3, [0.25] * 3)


def view_of(used: Recipe) -> TrainingView:
    return training_view(split(), used, seed=3)


def network(kind: type[nn.Module] = TinyResNet) -> nn.Module:
    torch.manual_seed(1)
    return kind(CLASSES)


def trained(used: Recipe, work: Path, kind: type[nn.Module] = TinyResNet, **options: object) -> tuple[nn.Module, list[Epoch]]:
    model = network(kind)
    return model, train(model, view_of(used), CLASSES, used, seed=3, work=work, label="t", **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_it_learns_and_says_how(tmp_path):
    seen = []
    model, history = trained(recipe(epochs=15), tmp_path, report=seen.append)
    assert seen == history
    assert [epoch.epoch for epoch in history] == list(range(1, 16))
    assert history[-1].loss < history[0].loss / 2
    assert history[-1].accuracy > 0.75
    assert history[0].learning_rate == 0.05
    assert 0 < history[-1].learning_rate < 0.01
    model.eval()
    images = torch.stack([image for image, _ in evaluation_view(split(), 16, 16, "bilinear")])
    assert (model(images).argmax(dim=1) == split().labels).float().mean() > 0.75


def test_a_step_is_what_the_recipe_says(tmp_path):
    """One epoch, beside the same written out with torch alone."""
    used = recipe(epochs=1, label_smoothing=0.1, clip_norm=0.5, weight_decay=0.01, norm_weight_decay=0.0)
    model, history = trained(used, tmp_path)
    other = network().train()
    norms = [p for module in other.modules() if isinstance(module, nn.BatchNorm2d) for p in module.parameters()]
    rest = [p for p in other.parameters() if all(p is not norm for norm in norms)]
    biases = {id(p) for name, p in other.named_parameters() if name.endswith("bias")}
    groups = [
        {"params": [p for p in norms if id(p) not in biases], "weight_decay": 0.0},
        {"params": rest + [p for p in norms if id(p) in biases], "weight_decay": 0.01},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=used.momentum)
    view, losses = view_of(used), []
    for looks in epoch_order(40, used, 3, 0).view(STEPS, 8, 2):
        images, labels = zip(*(view[tuple(look)] for look in looks.tolist()), strict=True)
        loss = F.cross_entropy(other(torch.stack(images)), torch.tensor(labels), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert history[0].loss == pytest.approx(np.mean(losses), rel=1e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-3, atol=1e-4)


class Killed(BaseException):
    """What ends a training between two steps."""


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, TinyResNet),
        (EVERYTHING, TinyMobileNet),  # which has dropout
        ({"precision": "bf16", "ema": True, "ema_steps": 3}, TinyResNet),
        ({"precision": "fp16", "momentum": 0.0}, TinyTransformer),
    ],
    ids=["plain", "everything", "bf16", "fp16"],
)
@pytest.mark.parametrize("stops", [(1,), (5,), (7,), (3, 4, 9, 10)])
def test_wherever_it_is_killed_it_ends_with_the_same_bits(tmp_path, monkeypatch, changes, kind, stops):
    monkeypatch.setenv("TEXTGUARD_CHECKPOINT", "0")
    used = recipe(**changes)
    expected, history = trained(used, tmp_path / "whole", kind)
    for stop in stops:

        def kill(step: int, stop: int = stop) -> None:
            if step == stop:
                raise Killed

        torch.manual_seed(stop)  # what is left of the killed process does not matter
        with pytest.raises(Killed):
            trained(used, tmp_path / "killed", kind, after_step=kill)
    seen = []
    model, found = trained(used, tmp_path / "killed", kind, report=seen.append)
    assert found == seen == history
    assert same(model, expected)


def test_a_trainer_goes_on_from_the_state_of_another():
    used = recipe(**EVERYTHING, precision="fp16")
    one, other = (Trainer(network(TinyMobileNet), 40, CLASSES, used, seed=3, label="t") for _ in range(2))
    batches = [*one.batches(view_of(used))]
    assert len(batches) == STEPS
    losses = [one.step(*batch) for batch in batches[:3]]
    assert one.progress.loss == pytest.approx(8 * sum(losses))
    assert one.progress.seen == 24
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert other.progress == one.progress
    rest = [*other.batches(view_of(used))]
    assert [labels.tolist() for _, labels in rest] == [labels.tolist() for _, labels in batches[3:]]
    assert [one.step(*batch) for batch in batches[3:]] == [other.step(*batch) for batch in rest]
    assert one.end_epoch() == other.end_epoch() == one.progress.history[0]
    for trainer in (one, other):
        trainer.end()
    assert same(one.model, other.model)
    assert same(one.model, one.average.module)


def test_a_state_of_another_training_is_not_taken():
    state = Trainer(network(), 40, CLASSES, recipe(), seed=3, label="t").state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Trainer(network(TinyMobileNet), 40, CLASSES, recipe(), seed=3, label="t").load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        Trainer(network(), 40, CLASSES, recipe(ema=True), seed=3, label="t").load_state_dict(state)


def test_between_two_checkpoints_no_more_than_their_distance_is_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTGUARD_CHECKPOINT", "3600")
    steps = []

    def kill(step: int) -> None:
        steps.append(step)
        if step == STEPS + 3:
            raise Killed

    with pytest.raises(Killed):
        trained(recipe(), tmp_path, after_step=kill)
    trained(recipe(), tmp_path, after_step=steps.append)
    assert steps == [*range(1, STEPS + 4), *range(STEPS + 1, 2 * STEPS + 1)]


def test_a_damaged_checkpoint_costs_the_steps_behind_the_one_before(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TEXTGUARD_CHECKPOINT", "0")
    expected, _ = trained(recipe(), tmp_path / "whole")
    assert len(list((tmp_path / "whole").iterdir())) == 2

    def kill(step: int) -> None:
        if step == 7:
            raise Killed

    with pytest.raises(Killed):
        trained(recipe(), tmp_path / "killed", after_step=kill)
    last = max((tmp_path / "killed").iterdir())
    last.write_bytes(last.read_bytes()[:-100])
    capsys.readouterr()
    model, _ = trained(recipe(), tmp_path / "killed")
    said = capsys.readouterr().err
    assert f"{last} cannot be read" in said
    assert "going on after epoch 1 of 2, step 1" in said
    assert same(model, expected)
    # With none left, it starts again.
    for path in (tmp_path / "killed").iterdir():
        path.write_bytes(b"")
    assert same(trained(recipe(), tmp_path / "killed")[0], expected)


def test_the_average_is_what_remains(tmp_path):
    """It takes (1 - 0.99) * 8 * 1 / 2 of the model after every step, and all of it after the first."""
    used = recipe(ema=True, ema_decay=0.99, ema_steps=1)
    average: dict[str, Tensor] = {}
    model = network()

    def follow(_: int) -> None:
        for name, value in model.state_dict().items():
            old = average.get(name, value)
            average[name] = old + (value - old) * 0.04 if value.is_floating_point() else value.clone()

    plain = replace(used, ema=False)
    train(model, view_of(used), CLASSES, plain, seed=3, work=tmp_path / "plain", label="t", after_step=follow)
    averaged, _ = trained(used, tmp_path / "average")
    assert not same(averaged, model)
    for name, value in averaged.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, average[name], rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_stops_with_step_rate_and_checkpoint(tmp_path):
    used = recipe(learning_rate=0.05)
    trained(replace(used, epochs=1), tmp_path)
    (kept,) = tmp_path.iterdir()
    model = network()
    view = view_of(used)
    broken = copy.deepcopy(view)
    broken.plain.prepared = None
    broken.plain.split.mean = [math.nan] * 3
    message = rf"t: the loss is nan in epoch 2, step 1, at learning rate .*; the last good checkpoint is {kept}; lower params"
    with pytest.raises(InvalidParameter, match=message):
        train(model, broken, CLASSES, used, seed=3, work=tmp_path, label="t")
    with pytest.raises(InvalidParameter, match=r"in epoch 1, step 1, .* there is no checkpoint yet"):
        train(network(), broken, CLASSES, used, seed=3, work=tmp_path / "new", label="t")


def test_reading_processes_and_memory_layout_change_nothing(tmp_path, monkeypatch):
    used = recipe(**EVERYTHING)
    expected, history = trained(used, tmp_path / "0")
    monkeypatch.setenv("TEXTGUARD_WORKERS", "2")
    model, found = trained(used, tmp_path / "2")
    assert same(model, expected)
    assert found == history
    monkeypatch.delenv("TEXTGUARD_WORKERS")
    monkeypatch.setenv("TEXTGUARD_CHANNELS_LAST", "1")
    plain = recipe(epochs=1)
    _, found = trained(plain, tmp_path / "last")
    monkeypatch.delenv("TEXTGUARD_CHANNELS_LAST")
    assert found[0].loss == pytest.approx(trained(plain, tmp_path / "first")[1][0].loss, rel=1e-3)


@pytest.mark.parametrize("name", ["TEXTGUARD_CHECKPOINT", "TEXTGUARD_CHANNELS_LAST", "TEXTGUARD_COMPILE"])
@pytest.mark.parametrize("value", ["-1", "2.5", "yes"])
def test_a_bad_setting_is_named(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidParameter, match=f"{name}='{value}' in the environment"):
        trained(recipe(), tmp_path)


PROCESS = """
import json, os, sys
sys.path[:0] = [{repository!r}, {tests!r}]
from pathlib import Path
import torch
import yaml
from dvc.utils.serialize import load_yaml
from conftest import TinyTransformer
from test_training import network, recipe, split, view_of
from textguard.artifacts import write_safetensors
from textguard.vision.evaluation import predict
from textguard.vision.training import train
from textguard.vision.transforms import evaluation_view
folder, changes, stop = Path({folder!r}), json.loads({changes!r}), int(os.environ.get("STOP", "0"))
used, model = recipe(**changes), network(TinyTransformer)
def after_step(step):
    if step == stop:
        torch.distributed.barrier()
        os._exit(9)
history = train(model, view_of(used), 4, used, seed=3, work=folder / "work", label="t", after_step=after_step)
rank = os.environ["RANK"]
curve = json.dumps([epoch.__dict__ for epoch in history])
write_safetensors(folder / f"model-{{rank}}.safetensors", model.state_dict(), {{"history": curve}})
predict(model, evaluation_view(split(37), 16, 16, "bilinear"), 5).to_parquet(folder / f"predictions-{{rank}}.parquet")
"""


def launch(folder: Path, processes: int, changes: dict, **more: str) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    (folder / "work").mkdir(exist_ok=True)
    script = folder / "process.py"
    settings = {"repository": str(REPOSITORY), "tests": str(Path(__file__).parent), "folder": str(folder)}
    script.write_text(PROCESS.format(**settings, changes=json.dumps(changes)), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(script)]
    known = {
        name: value for name, value in environment(OMP_NUM_THREADS="1", **more).items() if name not in ("RANK", "WORLD_SIZE")
    }
    return subprocess.run(command, cwd=folder, env=known, capture_output=True, encoding="utf-8", check=False, timeout=300)


def test_two_processes_train_and_predict_what_one_does(tmp_path):
    """With a network without BatchNorm and dropout, whose images mix across the border between the processes' parts."""
    changes = {"mixup": 0.8, "cutmix": 1.0, "optimizer": "adamw", "learning_rate": 0.01, "clip_norm": 1.0}
    expected, history = trained(recipe(**changes), tmp_path, TinyTransformer)
    stopped = launch(tmp_path / "two", 2, changes, STOP="7", TEXTGUARD_CHECKPOINT="0")
    assert stopped.returncode != 0
    assert (tmp_path / "two" / "work" / "checkpoint-000000006.safetensors").exists()
    done = launch(tmp_path / "two", 2, changes)
    assert done.returncode == 0, done.stderr
    assert "going on after epoch 1 of 2" in done.stderr
    for rank in (0, 1):
        tensors, metadata = read_safetensors(tmp_path / "two" / f"model-{rank}.safetensors", "")
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(tensors[name], value, rtol=1e-3, atol=1e-4)
        for epoch, other in zip(json.loads(metadata["history"]), history, strict=True):
            assert epoch == pytest.approx(other.__dict__, rel=1e-3)
    model = network(TinyTransformer)
    model.load_state_dict(tensors)
    alone = predict(model, evaluation_view(split(37), 16, 16, "bilinear"), 5)
    for rank in (0, 1):
        together = pd.read_parquet(tmp_path / "two" / f"predictions-{rank}.parquet")
        pd.testing.assert_frame_equal(together, alone, check_exact=False, rtol=1e-5)
        assert together["image"].tolist() == list(range(37))


def test_predictions_are_the_networks_own(resnet):
    view = evaluation_view(split(12), 16, 16, "bilinear")
    images = torch.stack([image for image, _ in view])
    with torch.inference_mode():
        logits = resnet(images)
    predictions = predict(resnet, view, 5)
    assert predictions["label"].tolist() == split(12).labels.tolist()
    assert predictions["prediction"].tolist() == logits.argmax(dim=1).tolist()
    expected = F.cross_entropy(logits, split(12).labels, reduction="none")
    np.testing.assert_allclose(predictions["loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(predictions["top2diff"], top2diff(logits), rtol=1e-4, atol=1e-6)


RUN = "digits-resnet18-baseline-0"


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    """The smoke grid with its data set, nothing trained."""
    folder = tmp_path_factory.mktemp("grid")
    params = load_yaml(str(REPOSITORY / "grids" / "smoke" / "params.yaml")) | {"variants": ["baseline"]}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    for stage in ("data", "heads"):
        run([sys.executable, str(REPOSITORY / "stages"), stage, "digits"], folder)
    return folder


def test_a_mistake_of_all_processes_is_said_once(grid):
    done = run([sys.executable, str(REPOSITORY / "stages"), "train", RUN], grid, check=False, TEXTGUARD_PROCESSES="3")
    assert done.returncode == 1
    assert done.stderr.strip() == f"InvalidParameter: train {RUN}: batches of 50 images cannot be shared by 3 processes alike"


def test_processes_share_training_and_evaluation_of_a_stage(grid):
    for stage in ("train", "evaluate"):
        done = run([sys.executable, str(REPOSITORY / "stages"), stage, RUN], grid, TEXTGUARD_PROCESSES="2")
        assert "Traceback" not in done.stderr
    assert len(pd.read_csv(grid / "metrics" / "runs" / RUN / "training.csv")) == 2
    assert len(pd.read_csv(grid / "metrics" / "live" / RUN / "plots" / "metrics" / "loss.tsv", sep="\t")) == 2
    table = pd.read_parquet(grid / "metrics" / "records" / RUN / "predictions.parquet")
    assert len(table) == 60
    assert not os.listdir(grid / ".work" / "train" / RUN) or os.listdir(grid / ".work" / "train" / RUN) == ["lock"]


STATES = [
    *("[]", "3", "null", '"x"', "{}", "[" * 100_000, '{"model": 3}', '{"model": []}'),
    *('{"progress": {"step": -5, "history": []}}', '{"progress": {"step": 1e9, "history": []}}'),
    *('{"progress": {"step": 5, "history": [[1]]}}', '{"progress": []}', '{"optimizer": "x"}', '{"optimizer": {"x": 1}}'),
    '{"optimizer": {"0": 1}, "progress": {"step": "x", "history": []}}',
]


@pytest.mark.parametrize("state", STATES)
def test_a_checkpoint_with_a_damaged_state_is_named_and_left(tmp_path, capsys, state):
    trainer, checkpoints = Trainer(network(), 40, CLASSES, recipe(), seed=0, label="t"), Checkpoints(tmp_path, "t")
    checkpoints.save(trainer)
    (file,) = checkpoints.files
    tensors, metadata = read_safetensors(file, "train")
    good = json.loads(metadata["state"])
    try:
        changed = json.dumps(good | json.loads(state)) if isinstance(json.loads(state), dict) and state != "{}" else state
    except RecursionError:
        changed = state
    write_safetensors(file, tensors, {"state": changed})
    checkpoints.restore(trainer)
    assert f"t: {file} cannot be read" in capsys.readouterr().err
    assert not checkpoints.files
    assert same(trainer.model, network())
    assert trainer.progress.step == 0


BEYOND = {
    **{"epochs": 10**7, "batch_size": 10**7, "base_batch_size": 10**7, "learning_rate": 1e308, "min_learning_rate": math.inf},
    **{"weight_decay": math.inf, "clip_norm": math.inf, "mixup": 1e300, "cutmix": math.nan, "eps": math.inf, "gamma": math.nan},
    **{"ema_steps": 10**9, "repeated_augmentation": 10**9, "crop_padding": 16, "warmup_epochs": 10**9, "step_epochs": 10**9},
}


@pytest.mark.parametrize(("name", "value"), BEYOND.items(), ids=BEYOND)
def test_recipes_stay_within_what_can_be_trained(name, value):
    with pytest.raises(ValidationError, match=name):
        recipe(**{name: value})


SMOKE = load_params(REPOSITORY / "grids" / "smoke" / "params.yaml")
LOOK = CloseupParams(images=2, weight_flips=20, smallest_map=2, seed=0)


class Untraceable(TinyResNet):
    """Looks at its input before it decides what to do, as some vision transformers do."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images if images.sum() < 1e9 else -images)


def test_a_rehearsal_leaves_no_trace():
    used, model = recipe(), network()
    before, state = copy.deepcopy(model), torch.get_rng_state()
    rehearse(model, view_of(used), used, SMOKE.inject, LOOK)
    assert same(model, before)
    assert model.training == before.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


FOUND = {
    "format": ({"format": "fp7"}, {}, "format 'fp7'"),
    "detector": ({"detector": "magic"}, {}, "detector 'magic'"),
    "kinds": ({"kinds": ["Conv3d"]}, {}, "the model has no Conv3d output"),
    "weights of additions": (
        {"kinds": ["Add"], "faults": FaultParams("weight", "flip", 1, 1, "value", [8, 8], "equal", "inference")},
        {},
        "weight",
    ),
    "flips": ({}, {"weight_flips": 10**6}, "weight_flips is 1000000, and there are [0-9]+ weights to flip"),
}


@pytest.mark.parametrize(("inject", "closeup", "message"), FOUND.values(), ids=FOUND)
def test_a_rehearsal_finds_what_would_come_later(inject, closeup, message):
    used = recipe()
    with pytest.raises(TextguardError, match=message):
        rehearse(network(), view_of(used), used, replace(SMOKE.inject, **inject), replace(LOOK, **closeup))


@pytest.mark.parametrize("number_format", ["fp32", "fp16", "int(8)", "bfp(8,7,16)"])
@pytest.mark.parametrize("kind", [TinyResNet, TinyTransformer, Untraceable])
@pytest.mark.parametrize("engine", ["replay", "whole"])
def test_a_rehearsal_refuses_nothing_that_works(kind, number_format, engine):
    """Additions, products and functions have no module to be named after."""
    used = recipe()
    inject = replace(SMOKE.inject, kinds=["Conv2d", "Linear", "Add", "MatMul"], format=number_format, engine=engine)
    rehearse(network(kind), view_of(used), used, inject, LOOK)


def test_a_rehearsal_takes_the_only_image_twice():
    used = recipe()
    rehearse(network(), training_view(split(1), used, 0), used, SMOKE.inject, LOOK)


def test_a_rehearsal_says_that_a_mitigation_needs_a_trace():
    used, inject = recipe(), replace(SMOKE.inject, mitigation="ranger")
    rehearse(network(), view_of(used), used, inject, LOOK)
    with pytest.raises(UnsupportedModel) as raised:
        rehearse(network(Untraceable), view_of(used), used, inject, LOOK)
    line = raised.value.told("params.yaml inject.{}".format)
    assert line.startswith(
        "params.yaml inject.mitigation 'ranger' needs a model that can be traced; set it to none: Untraceable"
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_one_image_at_a_time_is_refused_where_batchnorm_needs_two(monkeypatch, processes):
    monkeypatch.setattr("textguard.vision.training.join_processes", lambda device: (0, processes))
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, CLASSES))
    used = recipe(batch_size=2)
    with pytest.raises(
        InvalidParameter, match=rf"t: batches of {processes} images .* one, and BatchNorm .*batch_size, or lower"
    ):
        Trainer(pooled, processes, CLASSES, used, seed=0, label="t")
    for fine in (network(), nn.Sequential(pooled[:2], pooled[3])):  # statistics of one image's places, or none
        assert Trainer(fine, processes, CLASSES, used, seed=0, label="t").batch_size == processes


@pytest.mark.parametrize("spoil", [torch.nan, torch.inf])
def test_weights_that_the_last_step_spoilt_are_not_saved(tmp_path, spoil):
    model = network()

    def after_step(step: int) -> None:
        if step == STEPS:
            model.fc.weight.data[0, 0] = spoil

    with pytest.raises(
        InvalidParameter, match=r"t: fc\.weight is NaN or infinite in epoch 1, step 5, .*there is no checkpoint yet"
    ):
        train(model, view_of(recipe()), CLASSES, recipe(), seed=3, work=tmp_path, label="t", after_step=after_step)
    assert not list(tmp_path.iterdir())


def test_half_precision_on_a_cpu_is_said_to_be_slow(capsys):
    for precision, said in (("fp32", 0), ("bf16", 1)):
        Trainer(network(), 8, CLASSES, recipe(precision=precision), seed=0, label="t")
        assert capsys.readouterr().err.count("t: precision bf16 on a CPU, which can be slower than fp32") == said


def test_outputs_that_are_not_finite_are_no_evaluation():
    model = network().eval()
    model.fc.weight.data.fill_(3e38)
    with pytest.raises(
        InvalidArtifact, match=r"e: without any fault, .* outputs are NaN or infinite for 40 of 40 images; train"
    ):
        predict(model, evaluation_view(split(), 16, 16, "bilinear"), 8, "e")
