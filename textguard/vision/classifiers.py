"""Classifiers: a backbone with its own last layer (baseline), or with the text-guided head; and their files."""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from textguard.artifacts import oddity, read_safetensors, reading, write_safetensors
from textguard.errors import InvalidArtifact, printable
from textguard.vision.backbones import build_backbone

INITIAL_TEMPERATURE = 0.07
LARGEST_WIDTH = 65_536  # of a text-guided head: several times that of any text encoder
COUNTER = ".num_batches_tracked"  # BatchNorm's, which nothing reads
SHOWN = 3  # of the names that a message could list


class TextGuidedClassifier(nn.Module):
    """A backbone whose output is compared with one vector per class.

    backbone: images [B, 3, S, S] to features [B, E]. class_embeddings: [C, E], rows of length 1, the head's first weights; None
    leaves `torch.nn.Linear`'s own. Logits are exp(logit_scale) * head(features / ||features||), shape [B, C]; everything is
    trained. Source: Wasim et al., NeurIPS 2023, section 4.2, with the parameter names of its published checkpoints.
    """

    def __init__(self, backbone: nn.Module, classes: int, width: int, class_embeddings: Tensor | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / INITIAL_TEMPERATURE)))
        self.head = nn.Linear(width, classes, bias=False)
        if class_embeddings is not None:
            with torch.no_grad():
                self.head.weight.copy_(class_embeddings)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        features = features / features.norm(dim=-1, keepdim=True)
        return self.logit_scale.exp() * self.head(features)


class PlainHeadClassifier(nn.Module):
    """A backbone whose last layer is a latent one, with a head behind it that neither normalises nor scales.

    It differs from a `TextGuidedClassifier` in nothing else. Images [B, 3, S, S] to logits [B, C].
    """

    def __init__(self, backbone: nn.Module, classes: int, width: int, rows: Tensor | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, classes, bias=False)
        if rows is not None:
            with torch.no_grad():
                self.head.weight.copy_(rows)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class ClassifierSpec:
    """All that is needed to build a classifier and to prepare its images.

    width: E of the latent layer in front of a head; 0 for a baseline. image_size, resize_size, interpolation: see
    textguard.vision.transforms.evaluation_view. plain: whether that head neither normalises nor scales; files name it only
    where it is so.
    """

    dataset: str
    backbone: str
    variant: str
    image_size: int
    resize_size: int
    interpolation: str
    width: Annotated[int, Field(ge=0, le=LARGEST_WIDTH)]
    classes: tuple[str, ...]
    plain: bool = False


def build_classifier(spec: ClassifierSpec, class_embeddings: Tensor | None = None, drop_path: float | None = None) -> nn.Module:
    """Build the network of `spec`, weights drawn from torch's global generator.

    class_embeddings: see TextGuidedClassifier; drop_path: see `build_backbone`. Raises UnknownName, InvalidParameter.
    """
    backbone = build_backbone(spec.backbone, spec.width or len(spec.classes), spec.image_size, drop_path)
    if not spec.width:
        return backbone
    kind = PlainHeadClassifier if spec.plain else TextGuidedClassifier
    return kind(backbone, len(spec.classes), spec.width, class_embeddings)


def save_classifier(path: Path, model: nn.Module, spec: ClassifierSpec, provenance: dict[str, str]) -> None:
    """Write weights and spec to one safetensors file."""
    described = {**spec.__dict__, "classes": list(spec.classes)}
    if not spec.plain:
        del described["plain"]
    write_safetensors(path, model.state_dict(), {"spec": json.dumps(described), **provenance})


def load_classifier(path: Path, wanted: ClassifierSpec, latent: bool | None = None) -> tuple[nn.Module, ClassifierSpec]:
    """Read the classifier of a run in evaluation mode, and its spec.

    wanted: what the run says it is, but for its width, which only the file knows. latent: whether it has any; None: where it is
    no baseline. Raises InvalidArtifact when the file is damaged, is another classifier's, or holds weights that do not fit or
    are none.
    """
    tensors, metadata = read_safetensors(path, "train")
    with reading(path, "train"):
        spec = _stated_spec(metadata)
        if found := differences({name: value for name, value in spec.__dict__.items() if name != "width"}, wanted):
            raise InvalidArtifact(f"is another classifier than the run's: {found}")
        check_tensors(tensors)
        # Checked before anything is built, as a width may ask for any amount of memory.
        head = list(tensors["head.weight"].shape) if "head.weight" in tensors else "missing"
        expected = spec.variant != "baseline" if latent is None else latent
        if (spec.width != 0) != expected or (spec.width and head != [len(spec.classes), spec.width]):
            raise InvalidArtifact(
                f"states the width {spec.width} and {len(spec.classes)} classes for variant {spec.variant}, "
                f"and its head.weight is {head}"
            )
    model = build_classifier(spec)
    with reading(path, "train"):
        if problem := misfit(model, tensors):
            raise InvalidArtifact(f"does not fit {spec.backbone} ({spec.variant}): {problem}")
        load_weights(model, tensors)
    return model.eval(), spec


def _stated_spec(metadata: Mapping[str, str]) -> ClassifierSpec:
    try:
        return TypeAdapter(ClassifierSpec).validate_json(metadata["spec"])
    except KeyError as error:
        raise InvalidArtifact("does not say which classifier it holds") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "its spec"
        raise InvalidArtifact(f"does not say which classifier it holds ({printable(place, 60)}: {first['msg']})") from error


def differences(stated: Mapping[str, Any], wanted: ClassifierSpec) -> str:
    """How what a file states of its classifier differs from a spec, field by field. Empty where it does not."""
    found = []
    for name, value in stated.items():
        own = getattr(wanted, name, None)
        if name == "classes" and isinstance(value, (list, tuple)):
            pairs = [(a, b) for a, b in zip(value, own, strict=False) if a != b]
            if pairs:
                found.append(f"classes in another order, or others, {_short(pairs[0][0])} instead of {_short(pairs[0][1])}")
            elif len(value) != len(own):
                found.append(f"classes, {len(value)} instead of {len(own)}")
        elif name not in wanted.__dict__ or value != own:
            found.append(f"{printable(name, 40)} {_short(value)} instead of {_short(own)}")
    return _listed(found, "; ")


def _short(value: object) -> str:
    return printable(str(value), 60)


def _listed(names: Collection[str], between: str = ", ") -> str:
    shown = [printable(name, 120) for name in list(names)[:SHOWN]]
    return between.join(shown + ["..."] * (len(names) > SHOWN))


def check_tensors(tensors: Mapping[Any, Tensor]) -> None:
    """Raises InvalidArtifact where a name is no text, or a tensor is not one of numbers that lie one by one in the file."""
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise InvalidArtifact(f"calls a tensor {_short(repr(name))}; names are texts")
        if problem := oddity(tensor):
            raise InvalidArtifact(f"holds {problem} in {_short(name)}; weights are dense tensors of 16 to 64 bit floats")


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model weights that have its names and shapes (see `misfit`), cast to its own types.

    Raises InvalidArtifact for weights that are no floats, or NaN or infinite once they are cast; for negative variances; and
    for tables of integers that are not the network's own, as nothing trains them.
    """
    own, loaded, spoilt = model.state_dict(), {}, []
    for name, tensor in tensors.items():
        wanted = own[name]
        if wanted.is_floating_point() != tensor.is_floating_point():
            raise InvalidArtifact(f"holds {tensor.dtype} in {name}, where the network has {wanted.dtype}")
        loaded[name] = cast = tensor.to(wanted.dtype)
        if name.endswith(COUNTER) or torch.equal(cast, wanted):  # some masks are infinite by design
            continue
        if not cast.is_floating_point():
            raise InvalidArtifact(f"holds other numbers in {name} than the network, which needs its own")
        if name.endswith("running_var") and (cast < 0).any():
            raise InvalidArtifact(f"holds a negative variance in {name}")
        if not torch.isfinite(cast).all():
            spoilt.append(name)
    if spoilt:
        first = tensors[spoilt[0]]
        what = f"numbers beyond {own[spoilt[0]].dtype}" if torch.isfinite(first).all() else "NaN or infinity"
        raise InvalidArtifact(f"holds {what} in {spoilt[0]} ({len(spoilt)} such tensors)")
    model.load_state_dict(loaded)


def misfit(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """How tensors differ from a model's, by name and shape. Empty where they do not differ.

    BatchNorm's counters may be missing: older versions of torch wrote none, and nothing reads them.
    """
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    missing = [name for name in expected if name not in found and not name.endswith(COUNTER)]
    others = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {found[name]} instead of {expected[name]}"
        for name in expected
        if found.get(name, expected[name]) != expected[name]
    ]
    kinds = (("missing", missing), ("of no use", others), ("of another shape", wrong))
    return "; ".join(f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds if names)
