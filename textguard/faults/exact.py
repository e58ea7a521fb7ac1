"""The last layer without sampling: every image, neuron and bit, in closed form.

A fault in the last layer changes one logit, and what the others add to the softmax's denominator stays the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from textguard.errors import UnsupportedModel
from textguard.faults.campaign import batches
from textguard.faults.detectors import clamp_to_range
from textguard.faults.engines import ReplayEngine


@dataclass(frozen=True)
class LastLayer:
    """All single bit flips of the last layer's outputs, over B images.

    delta_loss: |CE(faulty) - CE(golden)|, float32 [B, C, bits], NaN or infinite where the loss is; mismatch: whether the argmax
    changed, bool [B, C, bits].
    """

    delta_loss: Tensor
    mismatch: Tensor


@torch.inference_mode()
def enumerate_last_layer(engine: ReplayEngine, loader: DataLoader, images: list[int], limit: float) -> LastLayer:
    """Flip every bit of every output of the last layer, for each of the images (positions in the loader's data set).

    limit: what the range detector lets pass. Raises UnsupportedModel where more than a factor lies between that layer and the
    logits.
    """
    factor = engine.factor_behind_last()
    last = engine.sites[-1]
    if len(last.shape) != 1:
        raise UnsupportedModel(f"the last layer, {last.layer!r}, gives {list(last.shape)} values per image, not one per class")
    size = loader.batch_size or 1
    parts = [images[start : start + size] for start in range(0, len(images), size)]
    found = []
    for _, pictures, labels in batches(loader, engine.device, parts):
        outputs: list[Tensor] = []
        engine.observe(pictures, lambda _, output, here=outputs: here.append(output))
        found.append(flip_logits(engine, outputs[-1], factor, labels, limit))
    return LastLayer(*(torch.cat(column) for column in zip(*found, strict=True)))


def flip_logits(engine: ReplayEngine, outputs: Tensor, factor: float, labels: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """DeltaLoss and mismatch of every bit flip in a last layer's outputs [B, C], where logits are `factor` times the outputs.

    labels: int64 [B]. Returns float32 and bool, both [B, C, bits].
    """
    storage, number_format = engine.storage(-1), engine.number_format
    bits = torch.arange(number_format.bits, device=outputs.device)
    shared = torch.zeros_like(outputs, dtype=torch.int64)
    if number_format.shared_bits:
        block = number_format.block or outputs.shape[1]
        blocks = F.pad(outputs, (0, -outputs.shape[1] % block)).unflatten(1, (-1, block))
        shared = number_format.shared(blocks, storage.limit).repeat_interleave(block, dim=1)[:, : outputs.shape[1]]
    codes = number_format.encode(outputs, storage.limit, shared)
    flipped = number_format.decode(codes[..., None] ^ (1 << bits), storage.limit, shared[..., None])
    faulty = clamp_to_range(flipped, torch.tensor(limit, device=outputs.device))[0] * factor

    logits = outputs * factor
    own = F.one_hot(labels, logits.shape[1]).bool()
    # log(sum(exp)) of all logits but one, from those before and behind it: no subtraction that could cancel.
    edge = logits.new_full((len(logits), 1), -torch.inf)
    before = torch.cat([edge, logits.logcumsumexp(dim=1)[:, :-1]], dim=1)
    behind = torch.cat([logits.flip(1).logcumsumexp(dim=1).flip(1)[:, 1:], edge], dim=1)
    others = torch.logaddexp(before, behind)
    target = torch.where(own[..., None], faulty, logits.gather(1, labels[:, None])[..., None])
    loss = torch.logaddexp(others[..., None], faulty) - target
    # An infinite logit makes the loss what cross entropy makes of it: NaN, but for -inf of another class.
    loss = torch.where(faulty == torch.inf, torch.nan, loss)
    delta_loss = (loss - F.cross_entropy(logits, labels, reduction="none")[:, None, None]).abs()

    best = logits.argmax(dim=1, keepdim=True)
    rest = logits.masked_fill(F.one_hot(best[:, 0], logits.shape[1]).bool(), -torch.inf)
    rival, highest = rest.argmax(dim=1, keepdim=True)[..., None], rest.amax(dim=1, keepdim=True)[..., None]
    number = torch.arange(logits.shape[1], device=logits.device)[:, None]
    # argmax takes the first of equal logits, and NaN before all others.
    top = logits.gather(1, best)[..., None]
    wins = (faulty > top) | ((faulty == top) & (number < best[..., None])) | faulty.isnan()
    loses = (faulty < highest) | ((faulty == highest) & (rival < number))
    mismatch = torch.where(number == best[..., None], loses, wins)
    return delta_loss, mismatch
