"""Image classification networks by name: those of the paper's Table 1, any other of timm and torchvision, and a user's own.

Adding one under a name of its own is a line in BACKBONES. `timm:NAME`, `torchvision:NAME` and `module:PACKAGE.FILE:NAME` need
none. The last is a class or function of the user's that makes a network, given num_classes, and image_size where it takes that.
"""

import copy
import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from textguard import modules
from textguard.errors import InvalidParameter, UnknownName, printable
from textguard.runtime import import_torchvision

import_torchvision()
from torchvision import models  # noqa: E402 (as import_torchvision imports it)
from torchvision.ops import StochasticDepth  # noqa: E402

WHERE = "params.yaml backbones"


@dataclass(frozen=True)
class Backbone:
    """A network, with random weights until `pretrained` ones are loaded.

    build: num_classes, and drop_path, how often the last residual branch is left out in training (None: the network's own).
    pretrained: its weights for ImageNet's 1,000 classes, by name, downloaded where they are not at hand.
    smallest, largest: the image sides it takes, in pixels. sized: whether `build` takes image_size as well.
    """

    build: Callable[..., nn.Module]
    pretrained: Callable[[], dict[str, Tensor]]
    smallest: int
    largest: int = 4096
    sized: bool = False


def _torchvision(name: str, smallest: int, largest: int = 4096) -> Backbone:
    def build(num_classes: int, drop_path: float | None = None) -> nn.Module:
        model = models.get_model(name, num_classes=num_classes)
        if drop_path is not None:
            branches = [module for module in model.modules() if isinstance(module, StochasticDepth) and module.p]
            if drop_path and not branches:
                raise TypeError("it leaves out no residual branches")
            # The builders of these networks fix the rate. It grows linearly from branch to branch, so that scaling is all.
            most = max((branch.p for branch in branches), default=0.0)
            for branch in branches:
                branch.p *= drop_path / most
        return model

    def pretrained() -> dict[str, Tensor]:
        weights = models.get_model_weights(name)["IMAGENET1K_V1"]  # trained as the paper trains, which V2 are not
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)

    return Backbone(build, pretrained, smallest, largest)


def _timm(name: str, smallest: int, drop_path_rate: float = 0.0) -> Backbone:
    def build(num_classes: int, drop_path: float | None = None) -> nn.Module:
        import timm  # only where it is used: importing it takes seconds

        rate = drop_path_rate if drop_path is None else drop_path
        return timm.create_model(name, num_classes=num_classes, **({"drop_path_rate": rate} if rate else {}))

    def pretrained() -> dict[str, Tensor]:
        import timm

        model = timm.create_model(name, pretrained=True)  # as many classes as the weights have, where others start at random
        wanted = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
        if wanted != (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD):
            raise ValueError(f"they are for images of another mean and deviation, {wanted}")
        return model.state_dict()

    return Backbone(build, pretrained, smallest)


def _own(name: str) -> Backbone:
    """What a user's class or function makes. Raises InvalidParameter where there is none, or it takes no num_classes."""
    made = modules.find(name, WHERE)
    if not callable(made):
        raise InvalidParameter(f"{name} in {WHERE} is a {type(made).__name__}; it must make a network, given num_classes")
    takes = modules.call(lambda: inspect.signature(made), f"{name} in {WHERE}: looking at what it takes").parameters
    if "num_classes" not in takes and inspect.Parameter.VAR_KEYWORD not in {one.kind for one in takes.values()}:
        raise InvalidParameter(
            f"{name} in {WHERE} takes {printable(', '.join(takes)) or 'nothing'}; it must take num_classes, how many numbers "
            "the network gives per image"
        )

    def build(num_classes: int, drop_path: float | None = None, **size: int) -> nn.Module:
        if drop_path is not None and "drop_path" not in takes:
            raise TypeError("it has no such argument")
        given = {"num_classes": num_classes} | size | ({} if drop_path is None else {"drop_path": drop_path})
        model = modules.call(lambda: made(**given), f"{name} in {WHERE}")
        if not isinstance(model, nn.Module):
            raise InvalidParameter(f"{name} in {WHERE} made a {type(model).__name__}; it must make a torch.nn.Module")
        return model

    def pretrained() -> dict[str, Tensor]:
        raise ValueError("a network of your own has none that could be downloaded")

    return Backbone(build, pretrained, 1, sized="image_size" in takes)


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


def find_backbone(name: str) -> Backbone:
    """The backbone called `name`, `timm:NAME`, `torchvision:NAME` or `module:PACKAGE.FILE:NAME`.

    Raises UnknownName, with the names that are close; InvalidParameter for a user's own that is not there, or fails.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    if name.startswith(modules.PREFIX):
        return _own(name)
    library, _, inner = name.partition(":")
    if library == "torchvision":
        known, backbone = models.list_models(models), _torchvision(inner, 1)
    elif library == "timm":
        import timm

        known, backbone = timm.list_models(), _timm(inner, 1)
    else:
        raise UnknownName("backbone", name, [*BACKBONES, "timm:NAME", "torchvision:NAME", "module:PACKAGE.FILE:NAME"], WHERE)
    if inner not in known:
        close = difflib.get_close_matches(inner, known, n=8, cutoff=0.4) or known[:8]
        raise UnknownName("backbone", name, [f"{library}:{other}" for other in close], f"{WHERE} (one of {len(known)})")
    return backbone


def build_backbone(name: str, outputs: int, image_size: int, drop_path: float | None = None) -> nn.Module:
    """The network `name` with `outputs` outputs, weights drawn from torch's global generator. Takes images [B, 3, S, S].

    drop_path: see Backbone. Raises UnknownName, or InvalidParameter for images of a wrong size, and for a network that has no
    residual branches to leave out or is no plain classifier.
    """
    backbone = find_backbone(name)
    if not backbone.smallest <= image_size <= backbone.largest:
        raise InvalidParameter(
            f"{name} takes images of {backbone.smallest} to {backbone.largest} pixels a side, not {image_size}; "
            "change params.yaml backbones.*.image_size"
        )
    try:
        size = {"image_size": image_size} if backbone.sized else {}
        model = backbone.build(num_classes=outputs, drop_path=drop_path, **size)
    except TypeError as error:
        if drop_path is None:
            raise
        raise InvalidParameter(f"{name} takes no drop_path ({error}); set params.yaml backbones.*.drop_path to null") from error
    if name.startswith(modules.PREFIX):
        _try_own(name, model, outputs, image_size)
    elif name not in BACKBONES:
        _try(name, model, outputs, image_size)
    return model


def _try_own(name: str, model: nn.Module, outputs: int, image_size: int) -> None:
    """Run two images through a copy of a user's network. Raises InvalidParameter where it does not give `outputs` for each.

    With numbers, unlike `_try`: code of a user's may look at them. It draws from no generator of the caller's.
    """
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    if device.type == "meta":
        return
    images = torch.rand(2, 3, image_size, image_size, device=device, generator=torch.Generator(device).manual_seed(0))
    for training in (True, False):
        what = f"{name} in {WHERE}, {'in training' if training else 'in evaluation'}, on images {list(images.shape)},"
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            tried = copy.deepcopy(model).train(training)
            found = modules.call(lambda tried=tried: tried(images.clone()), what)
        if not isinstance(found, Tensor) or found.shape != (2, outputs):
            got = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise InvalidParameter(
                f"{what} gives {got}; made with num_classes={outputs}, it must give [2, {outputs}], one number per class "
                "(or, below a text-guided head, per feature)"
            )


def _try(name: str, model: nn.Module, outputs: int, image_size: int) -> None:
    """Run a network of which nothing is known, without its numbers. Raises InvalidParameter where it is no classifier."""
    try:
        with torch.no_grad():
            found = copy.deepcopy(model).to("meta")(torch.empty(2, 3, image_size, image_size, device="meta"))
    except Exception as error:  # of whatever the network is made of
        raise InvalidParameter(
            f"{name} does not run on images of {image_size} pixels a side ({printable(str(error))}); "
            "change params.yaml backbones.*.image_size"
        ) from error
    if not isinstance(found, Tensor) or found.shape != (2, outputs):
        raise InvalidParameter(f"{name} does not give one number per class when it is trained; change {WHERE}")
