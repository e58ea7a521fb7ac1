"""Networks by name: the paper's fourteen, what text guidance adds to each, and any other of timm and torchvision."""

import csv
import io
import itertools

import pytest
import torch
from torch import nn

from textguard.errors import InvalidParameter, UnknownName
from textguard.faults.sites import DEFAULT_KINDS, Calls
from textguard.vision.backbones import BACKBONES, build_backbone
from textguard.vision.classifiers import ClassifierSpec, build_classifier
from textguard.vision.evaluation import Cost, measure_cost

# Table 1 of the paper, in millions, beside the parameters that are added in fact (to three decimals), the network's Conv2d and
# Linear calls, and the side of its images. Where 0.137 is printed as 0.13, the table was cut, not rounded.
TABLE_1 = """\
backbone,published_parameters,published_flops,parameters,calls,side
alexnet,-1.49,-1.50,-1.487,8,224
vgg16_bn,-1.49,-1.50,-1.487,16,224
vgg19_bn,-1.49,-1.50,-1.487,19,224
resnet18,0.26,0.26,0.262,21,224
resnet34,0.26,0.26,0.262,37,224
resnet50,-0.49,-0.49,-0.488,54,224
resnet101,-0.49,-0.49,-0.488,105,224
resnet152,-0.49,-0.50,-0.488,156,224
mobilenet_v2,-0.11,-0.09,-0.113,53,224
maxvit_t,0.26,0.28,0.262,151,224
swin_v2_t,0.13,0.15,0.137,77,256
swin_v2_s,0.13,0.15,0.137,149,256
focalnet_t,0.13,0.14,0.137,89,224
focalnet_s,0.13,0.14,0.137,173,224
"""
ROWS = list(csv.DictReader(io.StringIO(TABLE_1)))
IMAGENET = tuple(map(str, range(1000)))


def measured(backbone: str, side: int, width: int) -> tuple[Cost, int]:
    """What a classifier costs, and how often it calls a Conv2d or Linear; it never gets any weights."""
    spec = ClassifierSpec("imagenet", backbone, "any", side, side, "bilinear", width, IMAGENET)
    calls = []
    with torch.device("meta"), torch.no_grad():
        model = build_classifier(spec)
        cost = measure_cost(model, torch.empty(3, side, side))
        with Calls(lambda call: calls.append(call.kind) or call.output):
            assert model(torch.empty(2, 3, side, side)).shape == (2, 1000)
    return cost, sum(kind in DEFAULT_KINDS for kind in calls)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["backbone"])
def test_what_text_guidance_adds_is_what_the_paper_says(row):
    side = int(row["side"])
    (plain, calls), (guided, guided_calls) = (measured(row["backbone"], side, width) for width in (0, 512))
    added = (guided.parameters - plain.parameters) / 1e6
    assert round(added, 3) == float(row["parameters"])
    cut = row["published_parameters"] == "0.13"
    assert (int(added * 100) / 100 if cut else round(added, 2)) == float(row["published_parameters"])
    assert (guided.multiply_adds - plain.multiply_adds) / 1e6 == pytest.approx(float(row["published_flops"]), abs=0.03)
    assert (calls, guided_calls) == (int(row["calls"]), int(row["calls"]) + 1)


def test_the_papers_networks_are_all_there():
    assert list(BACKBONES) == [row["backbone"] for row in ROWS]


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("swin_v2_t", 12),
        ("maxvit_t", 11),
        ("focalnet_t", 11),  # its first block has a rate of 0, and nothing to leave out
        ("timm:convnext_atto", 11),
        ("torchvision:convnext_tiny", 18),
    ],
)
def test_drop_path_grows_linearly_to_what_the_recipe_says(name, rates):
    with torch.device("meta"):
        model = build_backbone(name, 10, 224, drop_path=0.55)
    attributes = {"StochasticDepth": "p", "DropPath": "drop_prob"}  # torchvision's and timm's
    branches = [module for module in model.modules() if type(module).__name__ in attributes]
    grown = sorted({round(getattr(branch, attributes[type(branch).__name__]), 4) for branch in branches})
    assert len(grown) == rates
    assert grown[-1] == pytest.approx(0.55)
    steps = [b - a for a, b in itertools.pairwise(grown)]
    assert max(steps) == pytest.approx(min(steps), abs=2e-4)
    assert grown[0] == pytest.approx(0, abs=1e-9) or grown[0] == pytest.approx(steps[0], abs=2e-4)


@pytest.mark.parametrize("name", ["resnet18", "timm:vgg11"])
def test_a_network_without_residual_branches_to_drop_says_so(name):
    with torch.device("meta"), pytest.raises(InvalidParameter, match=f"{name} takes no drop_path .* to null"):
        build_backbone(name, 10, 64, drop_path=0.1)
    with torch.device("meta"):
        assert isinstance(build_backbone(name, 10, 64, drop_path=0.0), nn.Module)


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:regnet_y_400mf"])
def test_any_network_of_timm_and_torchvision_needs_no_line(name):
    with torch.no_grad():
        assert build_backbone(name, 7, 64).eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnet51", UnknownName, r"'resnet51' in params.yaml backbones; known: alexnet, .*timm:NAME"),
        ("timm:resnt50", UnknownName, "timm:resnet50,"),
        ("torchvision:resnet5", UnknownName, "torchvision:resnet50"),
        ("timm:", UnknownName, "known: timm:"),
        ("timm:vit_tiny_patch16_224", InvalidParameter, r"does not run on images of 64 pixels .* backbones.\*.image_size"),
        ("torchvision:googlenet", InvalidParameter, "one number per class when it is trained"),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_networks_that_do_not_exist_or_fit_are_refused(name, error, message):
    with pytest.raises(error, match=message):
        build_backbone(name, 10, 64)
