"""How variants, backbones and data sets look and are called, everywhere the same."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from textguard.schema.results import BASELINE, PROPOSED

# No marker stands for two things. The diamond is left for published numbers.
VARIANT_MARKERS = {BASELINE: "o", "random": "s", "template": "v", PROPOSED: "^"}
VARIANT_COLOURS = {BASELINE: "#d55e00", "random": "#7f7f7f", "template": "#56b4e9", PROPOSED: "#0072b2"}
OTHER_MARKERS = "Pp"  # of variants that a grid adds, in their order there; so are the colours
OTHER_COLOURS = ("#009e73", "#cc79a7", "#e69f00", "#f0e442")
PLACE_FILLS = ("full", "left", "bottom", "right", "top")  # of marks, by backbone on data set, where a panel holds several
PUBLISHED_MARKER = "D"
VARIANT_NAMES = {"random": "random start", "template": "one template"}
NO_FILLS: Mapping[tuple[str, str], str] = MappingProxyType({})
NO_LABELS: Mapping[str, str] = MappingProxyType({})
BACKBONE_NAMES = {
    "alexnet": "AlexNet",
    "vgg16_bn": "VGG-16-BN",
    "vgg19_bn": "VGG-19-BN",
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "resnet101": "ResNet-101",
    "resnet152": "ResNet-152",
    "mobilenet_v2": "MobileNet-V2",
    "maxvit_t": "MaxViT-T",
    "swin_v2_t": "SwinV2-T",
    "swin_v2_s": "SwinV2-S",
    "focalnet_t": "FocalNet-T",
    "focalnet_s": "FocalNet-S",
}
DATASET_NAMES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "stl10": "STL-10",
    "fashion_mnist": "Fashion-MNIST",
    "food101": "Food-101",
    "imagenet": "ImageNet",
}


@dataclass(frozen=True)
class Style:
    """A variant in figures. colour: #rrggbb. marker: matplotlib's. name: as it is spoken."""

    colour: str
    marker: str
    name: str


def styles(variants: Sequence[str], colours: Mapping[str, str], labels: Mapping[str, str] = NO_LABELS) -> dict[str, Style]:
    """Variant -> its style, for all of a grid's variants. colours, labels: params.yaml's, for some of them."""
    others = [variant for variant in variants if variant not in VARIANT_MARKERS]
    # The colours begin anew with the markers the other way round.
    cycle = [OTHER_MARKERS[(turn + colour) % 2] for turn in (0, 1) for colour in range(len(OTHER_COLOURS))]
    markers = VARIANT_MARKERS | dict(zip(others, itertools.cycle(cycle), strict=False))
    coloured = VARIANT_COLOURS | dict(zip(others, itertools.cycle(OTHER_COLOURS), strict=False)) | dict(colours)
    return {variant: Style(coloured[variant], markers[variant], variant_name(variant, labels)) for variant in variants}


def fills(places: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """(Data set, backbone) -> how marks are filled, where one panel holds several of them."""
    return dict(zip(places, itertools.cycle(PLACE_FILLS), strict=False))


def variant_name(variant: str, labels: Mapping[str, str] = NO_LABELS) -> str:
    """A variant as it is spoken; one that a grid adds is called by its label, or its key."""
    return (VARIANT_NAMES | dict(labels)).get(variant, variant)


def backbone_name(backbone: str) -> str:
    """A backbone as it is spoken; one without such a name is called by its key."""
    return BACKBONE_NAMES.get(backbone, backbone)


def element_key(dataset: str, backbone: str, variant: str) -> str:
    """What marks of a variant of a backbone on a data set are named by in figures, and rows about it in tables."""
    return f"{dataset} {backbone} {variant}"


def place_name(dataset: str, backbone: str) -> str:
    """A backbone on a data set as it is spoken: ResNet-18 on digits."""
    return f"{backbone_name(backbone)} on {DATASET_NAMES.get(dataset, dataset)}"
