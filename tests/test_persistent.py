"""Faults that stay in stored values or at neurons: who they hit, what they do, and that the fast way does what the slow one does."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from textguard.errors import CampaignMismatch, InvalidParameter, TextguardError
from textguard.hardware.persistent import PersistentResult, run_persistent
from textguard.hardware.stored import draw_persistent, stored_tensors

COUNTS = ["images", "masked", "changed", "nonfinite", "correct", "lost", "gained", "finite", "eligible", "eligible_changed"]


class Mixed(nn.Module):
    """Convolutions of several kinds, norms, a residual connection, features, a table of places and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, padding_mode="reflect")
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.places = nn.Parameter(torch.randn(4, 8) * 0.1)
        self.layer_norm, self.features = nn.LayerNorm(8), nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.features.weight
        self.head = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.stem(images)))
        x = F.relu(x + self.norm2(self.grouped(x)))
        x = self.pool(F.relu6(self.depthwise(x))).flatten(2).transpose(1, 2) + self.places
        x = x + self.tied(F.gelu(self.features(self.layer_norm(x))))
        return self.head(x.mean(dim=1))


class Untraceable(nn.Module):
    """A branch on a value, which torch.fx and torch.export refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.flatten(1)) if float(images.sum()) < 1e9 else images.flatten(1)[:, :4]


def trained_norms(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The model, its running statistics taken from random images."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(16, *shape))
    return model.eval()


def loader_for(model: nn.Module, shape: tuple[int, ...], count: int = 10) -> DataLoader:
    """Random images; the model is right about most of them."""
    images = torch.randn(count, *shape)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[:2] = (labels[:2] + 1) % 3
    return DataLoader(TensorDataset(images, labels), batch_size=4)


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, DataLoader]:
    torch.manual_seed(0)
    model = trained_norms(Mixed(), (3, 8, 8))
    return model, loader_for(model, (3, 8, 8))


def assert_alike(a: PersistentResult, b: PersistentResult) -> None:
    """Two results are the same but for rounding: it may move a logit over the bound of what is masked, and a loss a little."""
    assert a.outcomes.columns.tolist() == b.outcomes.columns.tolist()
    for name in ("layer", "index", "neuron", "bit", "golden_value", "faulty_value"):
        pd.testing.assert_series_equal(a.outcomes[name], b.outcomes[name])
    for name in COUNTS:
        if name != "masked":
            assert (a.outcomes[name] == b.outcomes[name]).all(), a.outcomes[a.outcomes[name] != b.outcomes[name]]
    assert ((a.outcomes["masked"] - b.outcomes["masked"]).abs() <= 2).all()
    for name in ("delta_loss", "eligible_delta_loss"):
        np.testing.assert_allclose(a.outcomes[name], b.outcomes[name], rtol=2e-3, atol=2e-5)
    both = a.by_image.merge(b.by_image, on=["layer", "image"], suffixes=("", "_b"))
    assert len(both) == len(a.by_image) == len(b.by_image)
    for name in ("faults", "changed", "lost", "gained"):
        assert (both[name] == both[f"{name}_b"]).all()
    np.testing.assert_allclose(both["delta"], both["delta_b"], rtol=2e-3, atol=2e-4)


def test_an_inference_reads_weights_biases_norms_and_their_statistics_tied_ones_once(mixed):
    model, loader = mixed
    tensors = {tensor.name: tensor for tensor in stored_tensors(model, loader.dataset[0][0])}
    expected = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()} - {"tied.weight"}
    assert set(tensors) == expected
    assert tensors["norm1.running_var"].readers == ("batch_norm",)
    assert tensors["features.weight"].product
    assert not tensors["places"].product


def test_a_larger_count_extends_a_plan_and_values_and_bits_are_uniform(mixed):
    model, loader = mixed
    tensors = stored_tensors(model, loader.dataset[0][0])
    few, many = (draw_persistent(tensors, count, seed=3) for count in (5, 400))
    pd.testing.assert_frame_equal(few, many[many["index"] < 5].reset_index(drop=True))
    stem = many[many["layer"] == "stem.weight"]
    assert stem["neuron"].nunique() > 150  # of 216
    assert sorted(stem["bit"].unique()) == list(range(32))
    assert len(draw_persistent(tensors, {"stem.weight": 2}, seed=3, bits=3)) == 6


def test_the_replay_does_what_the_loop_of_all_images_does(mixed):
    model, loader = mixed
    tensors = stored_tensors(model, loader.dataset[0][0])
    plan = draw_persistent(tensors, 12, seed=1)
    # All tensors are hit where it shows, and where it does not.
    high = plan.assign(bit=np.resize([30, 31, 29, 23, 2, 26], len(plan)))
    whole = run_persistent(model, loader, high, engine="whole")
    assert_alike(run_persistent(model, loader, high, batch_size=7, image_batch=4), whole)
    assert 0 < whole.outcomes["changed"].sum() < whole.outcomes["images"].sum()
    assert whole.outcomes["nonfinite"].any()
    assert whole.top1 == 0.8


def test_replays_take_other_dimensions_than_maps():
    torch.manual_seed(0)
    model = trained_norms(
        nn.Sequential(
            nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6)
        ),
        (3, 8),
    )
    loader = loader_for(model, (3, 8))
    plan = draw_persistent(stored_tensors(model, loader.dataset[0][0]), 12, seed=1)
    assert_alike(run_persistent(model, loader, plan), run_persistent(model, loader, plan, engine="whole"))
