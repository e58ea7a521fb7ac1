"""Image classification networks by name. Adding one is a line in BACKBONES."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from textguard.errors import InvalidParameter, UnknownName
from textguard.runtime import import_torchvision

import_torchvision()
from torchvision import models  # noqa: E402 (as import_torchvision imports it)


@dataclass(frozen=True)
class Backbone:
    """build(num_classes=...) makes the network with random weights; smallest, largest: the image sides it takes, in pixels.

    weights() gets those that were trained on ImageNet.
    """

    build: Callable[..., nn.Module]
    weights: Callable[[], dict[str, Tensor]]
    smallest: int
    largest: int = 4096


def _torchvision(name: str, smallest: int, largest: int = 4096) -> Backbone:
    """A network of torchvision; weights of the recipes that the paper used, and not of later and better ones."""

    def weights() -> dict[str, Tensor]:
        known = models.get_model_weights(name)["IMAGENET1K_V1"]
        return known.get_state_dict(progress=False, check_hash=True, weights_only=True)

    return Backbone(lambda **options: models.get_model(name, **options), weights, smallest, largest)


def _timm(name: str, smallest: int, **settings: float) -> Backbone:
    """A network of timm, with its default weights."""

    def build(**options: bool | float) -> nn.Module:
        import timm  # only where it is used: importing it takes seconds

        return timm.create_model(name, **settings, **options)

    return Backbone(build, lambda: build(pretrained=True).state_dict(), smallest)


BACKBONES = {
    "alexnet": _torchvision("alexnet", 63),
    "vgg16_bn": _torchvision("vgg16_bn", 32),
    "vgg19_bn": _torchvision("vgg19_bn", 32),
    "resnet18": _torchvision("resnet18", 8),
    "resnet34": _torchvision("resnet34", 8),
    "resnet50": _torchvision("resnet50", 8),
    "resnet101": _torchvision("resnet101", 8),
    "resnet152": _torchvision("resnet152", 8),
    "mobilenet_v2": _torchvision("mobilenet_v2", 8),
    "maxvit_t": _torchvision("maxvit_t", 224, 224),
    "swin_v2_t": _torchvision("swin_v2_t", 32),
    "swin_v2_s": _torchvision("swin_v2_s", 32),
    "focalnet_t": _timm("focalnet_tiny_srf", 32, drop_path_rate=0.2),
    "focalnet_s": _timm("focalnet_small_srf", 32, drop_path_rate=0.3),
}


def pretrained_weights(name: str) -> dict[str, Tensor]:
    """The state dict of backbone `name` as trained on ImageNet's 1,000 classes, downloaded or from the cache of downloads.

    Raises UnknownName, and OSError or RuntimeError where the download fails.
    """
    if name not in BACKBONES:
        raise UnknownName("backbone", name, BACKBONES, "params.yaml runs.*.backbone")
    return BACKBONES[name].weights()


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
