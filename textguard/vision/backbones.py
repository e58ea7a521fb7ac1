"""Image classification networks by name. Adding one is a line in BACKBONES."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from textguard.errors import InvalidParameter, UnknownName
from textguard.runtime import import_torchvision

import_torchvision()
from torchvision import models  # noqa: E402 (as import_torchvision imports it)


@dataclass(frozen=True)
class Backbone:
    """build(num_classes=...) makes the network with random weights; smallest, largest: the image sides it takes, in pixels."""

    build: Callable[..., nn.Module]
    smallest: int
    largest: int = 4096


def _timm(name: str, **settings: float) -> Callable[..., nn.Module]:
    def build(num_classes: int) -> nn.Module:
        import timm  # only where it is used: importing it takes seconds

        return timm.create_model(name, num_classes=num_classes, **settings)

    return build


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
    "maxvit_t": Backbone(models.maxvit_t, 224, 224),
    "swin_v2_t": Backbone(models.swin_v2_t, 32),
    "swin_v2_s": Backbone(models.swin_v2_s, 32),
    "focalnet_t": Backbone(_timm("focalnet_tiny_srf", drop_path_rate=0.2), 32),
    "focalnet_s": Backbone(_timm("focalnet_small_srf", drop_path_rate=0.3), 32),
}


def build_backbone(name: str, outputs: int, image_size: int) -> nn.Module:
    """The network `name` with `outputs` outputs, weights drawn from torch's global generator. Takes images [B, 3, S, S].

    Raises UnknownName, or InvalidParameter for images of a wrong size.
    """
    if name not in BACKBONES:
        raise UnknownName("backbone", name, BACKBONES, "params.yaml runs.*.backbone")
    backbone = BACKBONES[name]
    if not backbone.smallest <= image_size <= backbone.largest:
        raise InvalidParameter(
            f"{name} takes images of {backbone.smallest} to {backbone.largest} pixels a side, not {image_size}; "
            "change params.yaml recipes.*.image_size"
        )
    return backbone.build(num_classes=outputs)
