"""Weights that were trained elsewhere: torchvision's, those the paper's authors publish, or a safetensors file.

A pickle can hold any program. Files are read as tensors and plain values only, and what else they ask for is refused.
"""

import argparse
import pickle
import urllib.error
from pathlib import Path

import torch
from torch import Tensor

from textguard.artifacts import read_safetensors, reading
from textguard.errors import InvalidArtifact, InvalidParameter
from textguard.vision.backbones import pretrained_weights

PUBLISHED = "published:"
TORCHVISION = "torchvision"


def read_checkpoint(checkpoint: str, backbone: str) -> dict[str, Tensor]:
    """Read weights: parameter and buffer names, as the classifier has them, -> tensors on the CPU.

    checkpoint: `torchvision` (ImageNet weights that go with the backbone; downloaded once), `published:FILE.pth` (a torch
    checkpoint with its state dict under "model", or a state dict alone), or `FILE.safetensors`.
    Raises InvalidArtifact, InvalidParameter.
    """
    if checkpoint == TORCHVISION:
        return _download(backbone)
    path = Path(checkpoint.removeprefix(PUBLISHED))
    if checkpoint.startswith(PUBLISHED):
        return _state_dict(path)
    if path.suffix != ".safetensors":
        allowed = f"null, {TORCHVISION}, {PUBLISHED}FILE.pth, FILE.safetensors"
        raise InvalidParameter(f"checkpoint {checkpoint!r} in params.yaml runs; allowed: {allowed}")
    return read_safetensors(path, "")[0]


def read_text_features(path: Path, classes: int) -> Tensor:
    """Read published class features, float [C, E] in label order. Returns rows of length 1. Raises InvalidArtifact."""
    stored = _load(path)
    with reading(path, ""):
        if not isinstance(stored, Tensor) or stored.ndim != 2 or not stored.is_floating_point():
            raise InvalidArtifact("holds no matrix of class features")
        if len(stored) != classes:
            raise InvalidArtifact(f"holds features of {len(stored)} classes, and the data set has {classes}")
        lengths = stored.float().norm(dim=1, keepdim=True)
        if not (lengths > 0).all() or not lengths.isfinite().all():
            raise InvalidArtifact("holds features that are zero, NaN or infinite")
        return stored.float() / lengths


def _state_dict(path: Path) -> dict[str, Tensor]:
    stored = _load(path)
    with reading(path, ""):
        state = stored.get("model", stored) if isinstance(stored, dict) else None
        if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise InvalidArtifact("holds no state dict, neither by itself nor under 'model'")
        # Models that were trained on several devices are saved with their wrapper's name.
        return {name.removeprefix("module."): value for name, value in state.items()}


def _load(path: Path) -> object:
    with reading(path, ""):
        try:
            # torchvision's reference scripts keep their command line beside the weights: names and plain values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise InvalidArtifact("holds something else than tensors and plain values, which is not executed") from error


def _download(backbone: str) -> dict[str, Tensor]:
    try:
        return pretrained_weights(backbone)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise InvalidArtifact(
            f"the pretrained weights of {backbone} cannot be had ({type(error).__name__}: {reason}); download them where there "
            "is a network, and name the file in params.yaml runs.*.checkpoint as published:FILE.pth"
        ) from error
