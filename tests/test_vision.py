"""Classifiers, training, evaluation."""

import copy
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from textguard.errors import InvalidArtifact, InvalidParameter
from textguard.faults.campaign import top2diff
from textguard.vision.classifiers import (
    ClassifierSpec,
    TextGuidedClassifier,
    build_classifier,
    load_classifier,
    save_classifier,
)
from textguard.vision.evaluation import accuracy_by_threshold, measure_cost, predict
from textguard.vision.recipe import load_recipe
from textguard.vision.training import train

RECIPE = load_recipe(
    "resnet",
    {"epochs": 4, "batch_size": 8, "base_batch_size": 8, "warmup_epochs": 1, "schedule": "cosine", "schedule_per": "step"},
)


def test_the_text_guided_head_is_the_published_one():
    matrix = F.normalize(torch.randn(3, 5), dim=1)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    model = TextGuidedClassifier(backbone, 3, 5, matrix)
    images = torch.randn(4, 3, 2, 2)
    features = backbone(images)
    expected = (1 / 0.07) * F.cosine_similarity(features[:, None], matrix[None], dim=2)
    torch.testing.assert_close(model(images), expected)
    assert {name for name, _ in model.named_parameters()} == {
        "backbone.1.weight",
        "backbone.1.bias",
        "logit_scale",
        "head.weight",
    }
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_a_random_head_is_the_default_initialisation():
    torch.manual_seed(0)
    model = TextGuidedClassifier(nn.Flatten(), 10, 12, None)
    bound = 1 / math.sqrt(12)
    assert float(model.head.weight.detach().abs().max()) <= bound
    assert float(model.head.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_classifiers_survive_the_disk(tmp_path):
    spec = ClassifierSpec("d", "resnet18", "descriptions", 32, 32, "bilinear", 6, ("a", "b"))
    model = build_classifier(spec, F.normalize(torch.randn(2, 6), dim=1)).eval()
    save_classifier(tmp_path / "m.safetensors", model, spec, {})
    loaded, found = load_classifier(tmp_path / "m.safetensors")
    assert found == spec
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    save_classifier(tmp_path / "m.safetensors", model, replace(spec, width=7), {})
    with pytest.raises(InvalidArtifact, match="does not fit the classifier in 3 of 124 places"):
        load_classifier(tmp_path / "m.safetensors")


def small_task() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    labels = torch.arange(33) % 2
    images = torch.randn(33, 3, 6, 6) + labels[:, None, None, None]
    return model, images, labels


def test_training_learns_and_an_interrupted_one_ends_with_the_same_bits(tmp_path):
    model, images, labels = small_task()
    history = train(model, images, labels, RECIPE, seed=5, checkpoint=tmp_path / "a.safetensors", label="a")
    assert [epoch.epoch for epoch in history] == [1, 2, 3, 4]
    assert history[-1].loss < history[0].loss

    class Killed(Exception):
        pass

    def kill(epoch: int) -> None:
        if epoch == 2:
            raise Killed

    interrupted, _, _ = small_task()
    with pytest.raises(Killed):
        train(
            interrupted,
            images,
            labels,
            RECIPE,
            seed=5,
            checkpoint=tmp_path / "b.safetensors",
            label="b",
            after_epoch=kill,
        )
    torch.rand(17)  # whatever else used the global generator in between
    resumed = copy.deepcopy(small_task()[0])
    again = train(resumed, images, labels, RECIPE, seed=5, checkpoint=tmp_path / "b.safetensors", label="b")
    assert again == history
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    model, images, labels = small_task()
    with pytest.raises(InvalidParameter, match=r"epoch 1, step 1; lower params\.yaml recipes"):
        train(model, images * float("nan"), labels, RECIPE, seed=0, checkpoint=tmp_path / "c.safetensors", label="c")
    assert not (tmp_path / "c.safetensors").exists()


def test_predictions_and_thresholds(resnet, images):
    with torch.inference_mode():
        logits = resnet(images)
    labels = torch.where(torch.arange(12) < 9, logits.argmax(1), (logits.argmax(1) + 1) % 4)
    predictions = predict(resnet, images, labels, 5)
    assert (predictions["prediction"] == predictions["label"]).sum() == 9
    np.testing.assert_allclose(predictions["loss"], F.cross_entropy(logits, labels, reduction="none"), rtol=1e-4)
    np.testing.assert_allclose(predictions["top2diff"], top2diff(logits), rtol=1e-4, atol=1e-6)

    table = pd.DataFrame({"label": [0, 0, 0, 0], "prediction": [0, 0, 0, 1], "top2diff": [0.05, 0.2, 0.9, 0.9]})
    curve = accuracy_by_threshold(table).set_index("threshold_percent")["accuracy_percent"]
    assert curve.loc[[0, 5, 6, 20, 21, 40]].tolist() == [75, 75, 50, 50, 25, 25]


def test_parameters_and_multiply_adds_are_counted():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 10))
    cost = measure_cost(model, torch.zeros(3, 4, 4))
    assert cost.parameters == 8 * 27 + 8 + 1280 + 10
    assert cost.multiply_adds == 16 * 8 * 27 + 1280
