"""Classifiers: a backbone with its own last layer (baseline), or with the text-guided head; and their files."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from textguard.artifacts import parse_json, read_safetensors, reading, write_safetensors
from textguard.errors import InvalidArtifact
from textguard.vision.backbones import build_backbone

INITIAL_TEMPERATURE = 0.07


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


@dataclass(frozen=True)
class ClassifierSpec:
    """All that is needed to build a classifier and to prepare its images.

    width: E of the text-guided head; 0 for a baseline. image_size, resize_size, interpolation: see
    textguard.vision.transforms.evaluation_view.
    """

    dataset: str
    backbone: str
    variant: str
    image_size: int
    resize_size: int
    interpolation: str
    width: int
    classes: tuple[str, ...]


def build_classifier(spec: ClassifierSpec, class_embeddings: Tensor | None = None, drop_path: float | None = None) -> nn.Module:
    """Build the network of `spec`, weights drawn from torch's global generator.

    class_embeddings: see TextGuidedClassifier; drop_path: see `build_backbone`. Raises UnknownName, InvalidParameter.
    """
    backbone = build_backbone(spec.backbone, spec.width or len(spec.classes), spec.image_size, drop_path)
    if not spec.width:
        return backbone
    return TextGuidedClassifier(backbone, len(spec.classes), spec.width, class_embeddings)


def save_classifier(path: Path, model: nn.Module, spec: ClassifierSpec, provenance: dict[str, str]) -> None:
    """Write weights and spec to one safetensors file."""
    described = {**spec.__dict__, "classes": list(spec.classes)}
    write_safetensors(path, model.state_dict(), {"spec": json.dumps(described), **provenance})


def load_classifier(path: Path) -> tuple[nn.Module, ClassifierSpec]:
    """Read a classifier in evaluation mode. Raises InvalidArtifact when the file is damaged or its weights do not fit."""
    tensors, metadata = read_safetensors(path, "train")
    with reading(path, "train"):
        if "spec" not in metadata:
            raise InvalidArtifact("does not say which classifier it holds")
        described = parse_json(metadata["spec"])
        spec = ClassifierSpec(**{**described, "classes": tuple(described["classes"])})
    model = build_classifier(spec)
    with reading(path, "train"):
        if problem := misfit(model, tensors):
            raise InvalidArtifact(f"does not fit {spec.backbone} ({spec.variant}): {problem}")
    model.load_state_dict(tensors)
    return model.eval(), spec


def misfit(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """How tensors differ from a model's, by name and shape. Empty where they do not differ.

    BatchNorm's counters may be missing: older versions of torch wrote none, and nothing reads them.
    """
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    missing = [name for name in expected if name not in found and not name.endswith(".num_batches_tracked")]
    others = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {found[name]} instead of {expected[name]}"
        for name in expected
        if found.get(name, expected[name]) != expected[name]
    ]
    kinds = (("missing", missing), ("of no use", others), ("of another shape", wrong))
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" for kind, names in kinds if names
    )
