"""Recipes: how a classifier is trained, as data. What the fields do is in optimisation.py, mixing.py, order.py, transforms.py.

recipes/NAME.yaml holds one recipe per family of networks, with every field; params.yaml overrides fields. This module only
reads and checks, and imports no torch, because params.py uses it.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from textguard.errors import UnknownName

LIBRARY = Path(__file__).with_name("recipes")
# Network -> the recipe of its family: those of textguard.vision.backbones that have a name of their own.
FAMILIES = {
    "alexnet": "alexnet",
    "vgg16_bn": "vgg",
    "vgg19_bn": "vgg",
    "resnet18": "resnet",
    "resnet34": "resnet",
    "resnet50": "resnet",
    "resnet101": "resnet",
    "resnet152": "resnet",
    "mobilenet_v2": "mobilenet",
    "maxvit_t": "maxvit",
    "swin_v2_t": "swin",
    "swin_v2_s": "swin",
    "focalnet_t": "focalnet",
    "focalnet_s": "focalnet",
}

# The bounds keep what is multiplied with each other within fp32, and are far beyond anything that can be meant.
Count = Annotated[int, Field(gt=0, le=1_000_000)]
Rate = Annotated[float, Field(ge=0, le=1e6)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Pixels = Annotated[int, Field(ge=8, le=4096)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Recipe:
    """How a classifier is trained.

    batch_size: images per optimiser step, over all processes together. learning_rate, min_learning_rate: as stated for
    base_batch_size; what is used grows linearly with batch_size. norm_weight_decay, bias_weight_decay, position_weight_decay:
    null takes weight_decay; see textguard.vision.optimisation.parameter_groups. schedule to warmup_start: see
    textguard.vision.optimisation.learning_rate_at. mixup, cutmix: alpha of the Beta distribution, 0 is off; see
    textguard.vision.mixing.mix. ema to ema_steps: see textguard.vision.optimisation.Ema. repeated_augmentation: how often an
    image is in an epoch; see textguard.vision.order.epoch_order. clip_norm: largest norm of all gradients together, 0 is off.
    drop_path: how often the last residual branch is left out, growing linearly to it from the first one's 0; null leaves the
    network's own. image_size to random_erasing: see textguard.vision.transforms.
    """

    epochs: Count
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)]
    base_batch_size: Count
    optimizer: Literal["sgd", "adamw"]
    learning_rate: Annotated[float, Field(gt=0, le=1e6)]
    momentum: Decay
    betas: tuple[Decay, Decay]
    eps: Annotated[float, Field(gt=0, le=1)]
    weight_decay: Rate
    norm_weight_decay: Rate | None
    bias_weight_decay: Rate | None
    position_weight_decay: Rate | None
    schedule: Literal["step", "cosine", "exponential"]
    schedule_per: Literal["epoch", "step"]
    step_epochs: Count
    gamma: Annotated[float, Field(gt=0, le=1)]
    min_learning_rate: Rate
    warmup_epochs: Annotated[int, Field(ge=0, le=1_000_000)]
    warmup_start: Annotated[float, Field(gt=0, le=1)]
    label_smoothing: Decay
    mixup: Rate
    cutmix: Rate
    ema: bool
    ema_decay: Decay
    ema_steps: Count
    repeated_augmentation: Annotated[int, Field(gt=0, le=1000)]
    clip_norm: Rate
    precision: Literal["fp32", "fp16", "bf16"]
    sync_batch_norm: bool
    drop_path: Decay | None
    image_size: Pixels
    resize_size: Pixels
    interpolation: Literal["bilinear", "bicubic"]
    crop: Literal["none", "random_resized", "padded"]
    crop_scale: tuple[Share, Share]
    crop_padding: Annotated[int, Field(ge=0, le=4096)]
    flip: Share
    auto_augment: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\n\r]*$")]
    random_erasing: Share

    @model_validator(mode="after")
    def _fields_fit(self) -> "Recipe":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}; it must be below epochs, {self.epochs}")
        if self.resize_size < self.image_size:
            raise ValueError(f"resize_size is {self.resize_size}; it must not be below image_size, {self.image_size}")
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale is {list(self.crop_scale)}; its minimum comes first")
        if self.crop_padding >= self.image_size:
            raise ValueError(
                f"crop_padding is {self.crop_padding}; it must be below image_size, {self.image_size}, or crops miss the image"
            )
        return self


def library_fields(name: str, where: str) -> dict[str, Any]:
    """All fields of the library's recipe `name`, unchecked. Raises UnknownName; `where` says where it was named."""
    known = sorted(path.stem for path in LIBRARY.glob("*.yaml"))
    if name not in known:
        raise UnknownName("recipe", name, known, where)
    return yaml.safe_load((LIBRARY / f"{name}.yaml").read_text(encoding="utf-8"))


def load_recipe(name: str, overrides: dict[str, Any]) -> Recipe:
    """The library's recipe `name` with some fields overridden. Raises UnknownName, or pydantic's ValidationError.

    params.yaml is read by textguard.params.load_params, which says in one line what is wrong and where.
    """
    fields = library_fields(name, "load_recipe") | overrides
    return TypeAdapter(Recipe).validate_json(json.dumps(fields))
