"""What is no site, and how the engines say so."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from textguard.errors import InvalidParameter, UnknownName, UnsupportedModel
from textguard.faults import sites
from textguard.faults.engines import ENGINES, ReplayEngine, WholeEngine
from textguard.schema import campaign


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
    engine = ENGINES[engine_of](Odd(across=True).eval(), images[0], 4)
    names = ["across", "short", "twice", "twice#2", "head"]
    assert [site.layer for site in engine.sites] == names
    assert [site.parameter for site in engine.sites] == [f"{name.partition('#')[0]}.weight" for name in names]
    assert [site.dtype for site in engine.sites if site.layer == "short"] == ["bfloat16"]
    assert [site.dimension for site in engine.sites if site.layer == "across"] == [1]
    assert dict(engine.skipped) == {
        "table": "its output has no batch dimension: all images share its values",
        "unused": "no operation reads the weight and bias of this Conv2d",
        "named": "no operation reads the weight of this Embedding",
        "Activation": "1 call; Activation is not among the wanted kinds of sites",
    }


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


class Computed(nn.Module):
    """Weights that are computed from others, each in another way, and parameters that no layer of torch's reads."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        self.spectral = nn.utils.spectral_norm(nn.Linear(4, 4))
        self.pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
        self.standard = Standardised(4, 4)
        self.raw = nn.ModuleDict({"inner": Raw()})
        self.scale = nn.Parameter(torch.ones(4))
        self.place = nn.Parameter(torch.ones(1, 4))
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.scripted = torch.jit.script(nn.Linear(4, 4))
        self.compiled = torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager")
        self.register_buffer("fixed", torch.randn(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pruned(self.spectral(self.normed(x).mean(dim=(2, 3))))
        x = self.raw["inner"](self.standard(x)) * self.scale + self.place
        return self.head(F.linear(self.compiled(self.scripted(self.experts[0](x))), self.fixed))


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


@pytest.mark.parametrize("engine_of", [ReplayEngine, WholeEngine])
def test_computed_weights_are_their_modules_and_what_is_no_site_is_listed(engine_of, images):
    torch.manual_seed(0)
    model = Computed().eval()
    with torch.no_grad():
        model(images)  # old normalisations leave what they computed with a graph, which cannot be copied
    before = [type(module) for module in model.modules()]
    engine = engine_of(model, images[0], 4)
    layers = ["normed", "spectral", "pruned", "standard", "experts.0", "compiled.0", "linear", "head"]
    assert [site.layer for site in engine.sites] == layers
    computed = dict.fromkeys(("normed", "spectral", "pruned", "standard"), "")
    assert {site.layer: site.parameter for site in engine.sites} == {
        **{layer: f"{layer}.weight" for layer in layers},
        **computed,
        "linear": "fixed",
    }
    assert dict(engine.skipped) == {
        "raw.inner": "MatMul is not among the wanted kinds of sites",
        "scale": "no kind of site covers torch.Tensor.mul, which reads it",
        "place": "no kind of site covers an addition of another shape, which reads it",
        "experts.1": "no operation reads the weight and bias of this Linear",
        "scripted": "TorchScript runs it, and what it calls is not seen",
    }
    asked = engine_of(model, images[0], 4, kinds=("MatMul",))
    assert [(site.layer, site.parameter) for site in asked.sites] == [("raw.inner", "raw.inner.w")]
    with pytest.raises(InvalidParameter, match="'normed' computes its weights"):
        engine_of(model, images[0], 4, target="weight")
    assert [type(module) for module in model.modules()] == before
    assert type(model.compiled).__name__ == "OptimizedModule"


def test_a_layer_whose_rows_belong_to_no_image_is_listed(images):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = x.flatten(1)[:, :32].unflatten(1, (4, 8))
            x = self.mix((x + x.roll(1, dims=0) * 0.1).flatten(0, 1)).unflatten(0, (-1, 4))
            return self.head(x.mean(dim=1))

    engine = WholeEngine(Mixing().eval(), images[0], 4)
    assert [site.layer for site in engine.sites] == ["head"]
    assert dict(engine.skipped)["mix"] == "its images' shares cannot be told from each other"


@pytest.mark.parametrize("engine_of", ["replay", "whole"])
def test_unknown_kinds_and_models_without_sites_are_refused(engine_of, resnet, images):
    with pytest.raises(UnknownName, match=r"'Norm'.*known: Activation, Add, BatchNorm, Bilinear, Conv1d, Conv2d"):
        ENGINES[engine_of](resnet, images[0], 4, kinds=("Conv2d", "Norm"))
    with pytest.raises(UnsupportedModel, match="no Conv3d or Conv1d output"):
        ENGINES[engine_of](resnet, images[0], 4, kinds=("Conv3d", "Conv1d"))


def test_the_page_knows_the_kinds_that_nobody_asked_for():
    assert campaign.UNWANTED == sites.UNWANTED
