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

    weights() gets those that were trained on ImageNet. drop_path: what the builder calls the chance that the last residual
    branch is left out in training; empty for a network without it.
    """

    build: Callable[..., nn.Module]
    weights: Callable[[], dict[str, Tensor]]
    smallest: int
    largest: int = 4096
    drop_path: str = ""


def _torchvision(name: str, smallest: int, largest: int = 4096, drop_path: str = "") -> Backbone:
    """A network of torchvision; weights of the recipes that the paper used, and not of later and better ones."""

    def weights() -> dict[str, Tensor]:
        known = models.get_model_weights(name)["IMAGENET1K_V1"]
        return known.get_state_dict(progress=False, check_hash=True, weights_only=True)

    return Backbone(lambda **options: models.get_model(name, **options), weights, smallest, largest, drop_path)


def _timm(name: str, smallest: int, **defaults: float) -> Backbone:
    """A network of timm, with its default weights."""

    def build(**options: bool | float) -> nn.Module:
        import timm  # only where it is used: importing it takes seconds

        return timm.create_model(name, **defaults | options)

    return Backbone(build, lambda: build(pretrained=True).state_dict(), smallest, drop_path="drop_path_rate")


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
    "maxvit_t": _torchvision("maxvit_t", 224, 224, "stochastic_depth_prob"),
    "swin_v2_t": _torchvision("swin_v2_t", 32, drop_path="stochastic_depth_prob"),
    "swin_v2_s": _torchvision("swin_v2_s", 32, drop_path="stochastic_depth_prob"),
    # timm leaves drop path out unless told: the rates of FocalNet's publication.
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


def build_backbone(name: str, outputs: int, image_size: int, drop_path: float | None = None) -> nn.Module:
    """The network `name` with `outputs` outputs, weights drawn from torch's global generator. Takes images [B, 3, S, S].

    drop_path: the chance that the last residual branch is left out in training, growing linearly to it; None keeps the
    network's own. Raises UnknownName, or InvalidParameter for images of a wrong size or a network without drop path.
    """
    if name not in BACKBONES:
        raise UnknownName("backbone", name, BACKBONES, "params.yaml runs.*.backbone")
    backbone = BACKBONES[name]
    if not backbone.smallest <= image_size <= backbone.largest:
        raise InvalidParameter(
            f"{name} takes images of {backbone.smallest} to {backbone.largest} pixels a side, not {image_size}; "
            "change params.yaml recipes.*.image_size"
        )
    if drop_path is None:
        return backbone.build(num_classes=outputs)
    if not backbone.drop_path:
        raise InvalidParameter(f"{name} has no drop path: set params.yaml recipes.*.drop_path to null")
    return backbone.build(num_classes=outputs, **{backbone.drop_path: drop_path})
