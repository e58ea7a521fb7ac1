"""Classifiers with weights from elsewhere, so that campaigns can be run without training.

torchvision         pretrained on ImageNet by torchvision (for FocalNet: timm), from torch hub's cache or downloaded; baselines
published:PATH.pth  {"model": state dict}, as torchvision's training script writes it, baseline or text-guided; or a state dict
PATH.safetensors    a model of this project, or a state dict
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from textguard.artifacts import parse_json, read_pth, read_safetensors
from textguard.errors import InvalidArtifact, InvalidParameter, printable
from textguard.vision.backbones import find_backbone
from textguard.vision.classifiers import ClassifierSpec, build_classifier, misfit
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
    guided = "logit_scale" in tensors and "head.weight" in tensors and tensors["head.weight"].ndim == 2
    if guided == (spec.variant == "baseline"):
        kind = "text-guided classifier" if guided else "plain network, without the text-guided head"
        raise InvalidArtifact(f"{source} holds a {kind}, and the run's variant is {spec.variant!r}; change one of the two")
    spec = replace(spec, width=tensors["head.weight"].shape[1] if guided else 0)
    model = build_classifier(spec)
    if problem := misfit(model, tensors):
        raise InvalidArtifact(
            f"{source} does not fit {spec.backbone} with {len(spec.classes)} classes; of its {len(tensors)} tensors and the "
            f"{len(model.state_dict())} wanted are {problem}; {WHERE}"
        )
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise InvalidArtifact(f"{source} holds NaN or infinity in {bad[0]} ({len(bad)} such tensors); {WHERE}")
    model.load_state_dict(tensors)
    return model.eval(), spec


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
            f"a dictionary of {', '.join(map(str, content))}" if isinstance(content, dict) else f"a {type(content).__name__}"
        )
        raise InvalidArtifact(f"{path} holds no state dict, alone or under 'model', but {printable(found, 100)}; {WHERE}")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}  # DistributedDataParallel adds "module."


def _ours(path: Path, spec: ClassifierSpec) -> dict[str, Tensor]:
    tensors, metadata = read_safetensors(path, "")
    stated = parse_json(metadata.get("spec", "{}"))
    wanted = {**spec.__dict__, "classes": list(spec.classes)}
    differing = [name for name in stated if name not in ("dataset", "width") and stated[name] != wanted.get(name)]
    if differing:
        found = "; ".join(
            f"{name} {printable(str(stated[name]), 60)} instead of {printable(str(wanted.get(name)), 60)}" for name in differing
        )
        raise InvalidArtifact(f"{path} is another classifier than the run's: {found}; {WHERE}, or the run's other keys")
    return tensors
