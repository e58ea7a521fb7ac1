"""What is no site, and how the engines say so."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textguard.errors import UnknownName, UnsupportedModel
from textguard.faults.engines import ENGINES, ReplayEngine, WholeEngine


class Odd(nn.Module):
    """Layers in which no fault of an image's own can happen, each for another reason."""

    def __init__(self, across: bool) -> None:
        super().__init__()
        self.table = nn.Linear(2, 8)
        self.register_buffer("places", torch.randn(5, 2))
        self.across = nn.Linear(8, 8) if across else nn.Identity()
        self.short = nn.Linear(8, 8).bfloat16()
        self.unused = nn.Conv2d(3, 3, 1)
        self.named = nn.Embedding(4, 4)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(2)[:, :, :8] + self.table(self.places).mean()
        if isinstance(self.across, nn.Linear):
            x = self.across(x.transpose(0, 1)).transpose(0, 1)
        x = self.short(x.bfloat16()).float()
        return self.head(self.twice(self.twice(x).relu()).mean(dim=1))


@pytest.mark.parametrize("engine_of", ["replay", "whole"])
def test_what_is_no_site_says_why(engine_of, images):
    across = engine_of == "whole"
    engine = ENGINES[engine_of](Odd(across).eval(), images[0], 4)
    assert [site.layer for site in engine.sites] == ["twice", "twice#2", "head"]
    assert [site.parameter for site in engine.sites] == ["twice.weight", "twice.weight", "head.weight"]
    elsewhere = {"across": "its output of shape [3, 2, 8] does not have its batch in dimension 0"} if across else {}
    unread = {
        "unused": "no injectable operation reads the weights of this Conv2d",
        "named": "no injectable operation reads the weights of this Embedding",
    }
    if engine_of == "replay":
        unread = {layer: reason for layer, reason in engine.skipped if layer in unread}  # see the next test
    assert (
        dict(engine.skipped)
        == elsewhere
        | {
            "table": "its output has no batch dimension: all images share its values",
            "short": "its output is torch.bfloat16, not float32",
        }
        | unread
    )


def test_layers_that_are_never_called_are_skipped_by_both_engines(images):
    skipped = [build(Odd(across=False).eval(), images[0], 4).skipped for build in (ReplayEngine, WholeEngine)]
    assert skipped[0] == skipped[1]


def test_a_layer_whose_batch_is_not_in_dimension_0_is_skipped_by_both_engines(images):
    skipped = [build(Odd(across=True).eval(), images[0], 4).skipped for build in (ReplayEngine, WholeEngine)]
    assert skipped[0] == skipped[1]


def test_weights_that_a_function_makes_have_no_owner(images):
    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4, 1))
            self.head = nn.Linear(3, 4)

        def forward(self, x):
            x = x.mean(dim=(2, 3))
            return self.head(x) + F.linear(x, self.scale * torch.ones(4, 3))

    for build in (ReplayEngine, WholeEngine):
        sites = build(Made().eval(), images[0], 4).sites
        assert [(site.layer, site.weights) for site in sites] == [("head", 12), ("linear", 12)]


def test_projections_inside_torchs_own_attention_are_not_heard_and_said_so(images):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = x.reshape(-1, 96, 8)
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))

    for build in (ReplayEngine, WholeEngine):
        engine = build(Attending().eval(), images[0], 4)
        assert [site.layer for site in engine.sites] == ["head"]
        assert {layer for layer, _ in engine.skipped} == {"attention", "attention.out_proj"}
        assert all(reason.startswith("no injectable operation reads the weights") for _, reason in engine.skipped)


@pytest.mark.parametrize("engine_of", ["replay", "whole"])
def test_unknown_kinds_and_models_without_sites_are_refused(engine_of, resnet, images):
    with pytest.raises(UnknownName, match=r"'Softmax'.*known: Add, Conv1d, Conv2d, Conv3d, ConvTranspose2d, Linear, MatMul"):
        ENGINES[engine_of](resnet, images[0], 4, kinds=("Conv2d", "Softmax"))
    with pytest.raises(UnsupportedModel, match="no Conv3d or Conv1d output"):
        ENGINES[engine_of](resnet, images[0], 4, kinds=("Conv3d", "Conv1d"))
