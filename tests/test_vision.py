"""Classifiers, training, evaluation."""

import copy
import math
from dataclasses import replace

import pandas as pd
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from textguard.artifacts import weights_mark
from textguard.errors import InvalidArtifact
from textguard.vision.classifiers import (
    ClassifierSpec,
    TextGuidedClassifier,
    build_classifier,
    load_classifier,
    save_classifier,
)
from textguard.vision.evaluation import accuracy_by_threshold, measure_cost, score_scale


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


def test_the_scale_leads_from_the_last_layer_to_the_logits():
    model = TextGuidedClassifier(nn.Flatten(), 3, 12, None)
    outputs = []
    model.head.register_forward_hook(lambda *call: outputs.append(call[-1]))
    logits = model(torch.randn(4, 3, 2, 2))
    torch.testing.assert_close(logits, score_scale(model) * outputs[0])
    assert score_scale(nn.Linear(3, 2)) == 1


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
    loaded, found = load_classifier(tmp_path / "m.safetensors", replace(spec, width=0))
    assert found == spec
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))
    save_classifier(tmp_path / "m.safetensors", model, replace(spec, width=7), {})
    with pytest.raises(InvalidArtifact, match=r"states the width 7 and 2 classes .* its head.weight is \[2, 6\]; delete"):
        load_classifier(tmp_path / "m.safetensors", spec)


def test_low_top2diff_counts_as_wrong():
    table = pd.DataFrame({"label": [0, 0, 0, 0], "prediction": [0, 0, 0, 1], "top2diff": [0.05, 0.2, 0.9, 0.9]})
    curve = accuracy_by_threshold(table).set_index("threshold_percent")["accuracy_percent"]
    assert curve.loc[[0, 5, 6, 20, 21, 40]].tolist() == [75, 75, 50, 50, 25, 25]


def test_parameters_and_multiply_adds_are_counted():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 10))
    cost = measure_cost(model, torch.zeros(3, 4, 4))
    assert cost.parameters == 8 * 27 + 8 + 1280 + 10
    assert cost.multiply_adds == 16 * 8 * 27 + 1280


def test_weights_have_one_mark_whatever_file_they_came_from_and_another_once_a_bit_changes(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    mark = weights_mark(model)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    safetensors.torch.save_model(model, tmp_path / "a.safetensors")
    for load in (
        lambda other: other.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True)),
        lambda other: safetensors.torch.load_model(other, tmp_path / "a.safetensors"),
    ):
        other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        assert weights_mark(other) != mark
        load(other)
        assert weights_mark(other) == mark
    changes = {
        "a parameter": lambda own: own[0].bias.data.nextafter_(torch.full((2,), 9.0)),
        "a buffer": lambda own: own[1].running_mean.add_(1),
        "a count": lambda own: own[1].num_batches_tracked.add_(1),
        "a dtype": lambda own: own.double(),
        "a shape": lambda own: setattr(own[0].weight, "data", own[0].weight.data.reshape(3, 2)),
    }
    for change in changes.values():
        other = copy.deepcopy(model)
        change(other)
        assert weights_mark(other) != mark
    assert weights_mark(nn.Sequential(model)) != mark  # other names
