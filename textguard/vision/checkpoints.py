"""Classifiers with weights from elsewhere, so that campaigns can be run without training.

torchvision         pretrained on ImageNet by torchvision (for FocalNet: timm), from torch hub's cache or downloaded; baselines
published:PATH.pth  {"model": state dict}, as torchvision's training script writes it, baseline or text-guided; or a state dict
PATH.safetensors    a model of this project, or a state dict
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from textguard.artifacts import parse_json, read_pth, read_safetensors, reading
from textguard.errors import InvalidArtifact, InvalidParameter, printable
from textguard.vision.backbones import find_backbone
from textguard.vision.classifiers import (
    LARGEST_WIDTH,
    ClassifierSpec,
    build_classifier,
    check_tensors,
    differences,
    load_weights,
    misfit,
)
from textguard.vision.datasets import imagenet_classes

PUBLISHED = "published:"
WHERE = "change params.yaml weights"


def load_checkpoint(checkpoint: str, spec: ClassifierSpec) -> tuple[nn.Module, ClassifierSpec]:
    """The classifier of `spec` with the weights that `checkpoint` names, in evaluation mode, and its spec.

    The width E of a text-guided one comes from the weights. Raises InvalidArtifact for a file that is missing, damaged, holds
    anything but tensors, or does not fit, with the differences; InvalidParameter for other classes than the weights are for.
    """
    if checkpoint == "torchvision":
        source, tensors = f"pretrained {spec.backbone}", _pretrained(spec)
    elif checkpoint.startswith(PUBLISHED):
        source = checkpoint.removeprefix(PUBLISHED)
        tensors = _published(Path(source))
    else:
        source, tensors = checkpoint, _ours(Path(checkpoint), spec)
    with _refusing(source):
        check_tensors(tensors)
    guided = "logit_scale" in tensors and "head.weight" in tensors and tensors["head.weight"].ndim == 2
    if guided == (spec.variant == "baseline"):
        kind = "text-guided classifier" if guided else "plain network, without the text-guided head"
        raise InvalidArtifact(f"{source} holds a {kind}, and the run's variant is {spec.variant!r}; change one of the two")
    width = tensors["head.weight"].shape[1] if guided else 0
    if width > LARGEST_WIDTH:
        raise InvalidArtifact(f"{source} has a head of width {width:,}; at most {LARGEST_WIDTH:,} is allowed; {WHERE}")
    spec = replace(spec, width=width)
    model = build_classifier(spec)
    if problem := misfit(model, tensors):
        raise InvalidArtifact(
            f"{source} does not fit {spec.backbone} with {len(spec.classes)} classes; of its {len(tensors)} tensors and the "
            f"{len(model.state_dict())} wanted are {problem}; {WHERE}"
        )
    with _refusing(source):
        load_weights(model, tensors)
    return model.eval(), spec


@contextmanager
def _refusing(source: str) -> Iterator[None]:
    """What is wrong with weights, behind where they come from."""
    try:
        yield
    except InvalidArtifact as error:
        raise InvalidArtifact(f"{source} {error}; {WHERE}") from error


def _pretrained(spec: ClassifierSpec) -> dict[str, Tensor]:
    if list(spec.classes) != imagenet_classes():
        raise InvalidParameter(
            f"pretrained weights are for ImageNet's 1,000 classes, and {spec.dataset}'s {len(spec.classes)} are others; {WHERE}"
        )
    try:
        return find_backbone(spec.backbone).pretrained()
    except Exception as error:  # two libraries, their servers and their caches have errors of their own
        raise InvalidArtifact(
            f"pretrained weights of {spec.backbone} cannot be had ({type(error).__name__}: {printable(str(error), 120)}); "
            "without a network, put them where torch hub (TORCH_HOME) or Hugging Face (HF_HOME) keeps its files, or "
            f"{WHERE} to a file of yours"
        ) from error


def _published(path: Path) -> dict[str, Tensor]:
    content = read_pth(path)
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        found = (
            f"a dictionary of {', '.join(map(str, list(content)[:8]))}"
            if isinstance(content, dict)
            else f"a {type(content).__name__}"
        )
        raise InvalidArtifact(f"{path} holds no state dict, alone or under 'model', but {printable(found, 100)}; {WHERE}")
    # DistributedDataParallel adds "module.".
    named = {name.removeprefix("module.") if isinstance(name, str) else name: tensor for name, tensor in tensors.items()}
    if len(named) < len(tensors):
        twice = next(name for name in named if name in tensors and f"module.{name}" in tensors)
        raise InvalidArtifact(f"{path} holds {printable(twice, 60)} with and without 'module.' in front; {WHERE}")
    return named


def _ours(path: Path, spec: ClassifierSpec) -> dict[str, Tensor]:
    tensors, metadata = read_safetensors(path, "")
    with reading(path, ""):
        stated = parse_json(metadata.get("spec", "{}"))
        if not isinstance(stated, dict):
            raise InvalidArtifact("states a classifier (metadata 'spec') that is no JSON object")
    if found := differences({name: value for name, value in stated.items() if name not in ("dataset", "width")}, spec):
        raise InvalidArtifact(f"{path} is another classifier than the run's: {found}; {WHERE}, or the run's other keys")
    return tensors
