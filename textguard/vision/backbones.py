"""Image classification networks by name. Adding one is a line in BACKBONES."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from textguard.errors import InvalidParameter, UnknownName
from textguard.runtime import define_missing_torchvision_operators

define_missing_torchvision_operators()
from torchvision import models  # noqa: E402 (needs the operators)


@dataclass(frozen=True)
class Backbone:
    """build(num_classes=...) makes the network with random weights; smallest: the least image side it can take, in pixels."""

    build: Callable[..., nn.Module]
    smallest: int


BACKBONES = {
    "alexnet": Backbone(models.alexnet, 63),
    "vgg16_bn": Backbone(models.vgg16_bn, 32),
    "vgg19_bn": Backbone(models.vgg19_bn, 32),
    "resnet18": Backbone(models.resnet18, 8),
    "resnet34": Backbone(models.resnet34, 8),
    "resnet50": Backbone(models.resnet50, 8),
    "resnet101": Backbone(models.resnet101, 8),
    "resnet152": Backbone(models.resnet152, 8),
    "mobilenet_v2": Backbone(models.mobilenet_v2, 8),
}


def build_backbone(name: str, outputs: int, image_size: int) -> nn.Module:
    """The network `name` with `outputs` outputs, weights drawn from torch's global generator. Takes images [B, 3, S, S].

    Raises UnknownName, or InvalidParameter for images that are too small.
    """
    if name not in BACKBONES:
        raise UnknownName("backbone", name, BACKBONES, "params.yaml runs.*.backbone")
    backbone = BACKBONES[name]
    if image_size < backbone.smallest:
        raise InvalidParameter(
            f"{name} takes images of at least {backbone.smallest} pixels a side, not {image_size}; "
            "change params.yaml datasets.*.image_size"
        )
    return backbone.build(num_classes=outputs)
