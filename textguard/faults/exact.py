"""Layers without sampling: every image, neuron and bit.

For the last layer in closed form: a fault there changes one logit, and what the others add to the softmax's denominator stays
the same. For others through the engine, as far as there are few enough faults.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from textguard.errors import UnsupportedModel
from textguard.estimates.summary import Totals
from textguard.faults.damage import SINGLE_FLIP, FaultModel, Faults
from textguard.faults.detectors import clamp_to_range
from textguard.faults.engines import Engine, ReplayEngine
from textguard.faults.profiling import batches
from textguard.faults.sites import Site
from textguard.runtime import progress

FAULTS_AT_ONCE = 2**16


def affordable(engine: Engine, images: int, fault_model: FaultModel, up_to: int) -> list[Site]:
    """The fully connected layers at the end that can be enumerated: with a closed form, or with no more than `up_to` faults.

    images: how many are eligible. up_to: 0 for none at all, not even the last. Before them, and with other engines than replay,
    so many inferences cost more than they tell.
    """
    if not up_to or fault_model != SINGLE_FLIP or not isinstance(engine, ReplayEngine):
        return []
    bits, found = engine.number_format.bits, []
    for site in reversed(engine.sites):
        many = site.neurons * images * bits > up_to
        if site.kind != "Linear" or len(site.shape) != 1 or (many and not has_closed_form(engine, site)):
            break
        found.insert(0, site)
    return found


def has_closed_form(engine: ReplayEngine, site: Site) -> bool:
    """Whether nothing but a factor lies between a site and the logits."""
    if site is not engine.sites[-1] or len(site.shape) != 1:
        return False
    try:
        engine.factor_behind_last()
    except UnsupportedModel:
        return False
    return True


@torch.inference_mode()
def enumerate_layer(
    engine: ReplayEngine, loader: DataLoader, images: Sequence[int], site: Site, limit: float, label: str = "enumerate"
) -> Totals:
    """Flip every bit of every output of one layer, for each of the images (positions in the loader's data set).

    limit: what the range detector lets pass.
    """
    bits, closed = engine.number_format.bits, has_closed_form(engine, site)
    at_once = (loader.batch_size or 1) if closed else max(1, FAULTS_AT_ONCE // (site.neurons * bits))
    parts = [images[start : start + at_once] for start in range(0, len(images), at_once)]
    totals = np.zeros((5, bits))
    with progress(total=len(images) * site.neurons * bits, label=f"{label} {site.layer}", unit="inj") as bar:
        for part, pictures, labels in batches(loader, engine.device, parts):
            if closed:
                outputs: list[Tensor] = []
                engine.observe(pictures, lambda _, output, here=outputs: here.append(output))
                found = flip_logits(engine, outputs[-1], engine.factor_behind_last(), labels, limit)
            else:
                found = _flip_all(engine, pictures, labels, site, limit)
            totals += np.stack([column.double().sum(dim=(0, 1)).cpu().numpy() for column in found])
            bar.update(len(part) * site.neurons * bits)
    masked, detected, mismatches, nonfinite = totals[:4].astype(np.int64)
    faults = np.full(bits, len(images) * site.neurons)
    return Totals(site.layer, site.neurons, faults, masked, detected, mismatches, nonfinite, totals[4])


def _flip_all(engine: ReplayEngine, images: Tensor, labels: Tensor, site: Site, limit: float) -> tuple[Tensor, ...]:
    """The same as `flip_logits`, one injection for each."""
    shape = (len(images), site.neurons, engine.number_format.bits)
    fault = torch.arange(torch.Size(shape).numel(), device=images.device)
    image, neuron, bit = torch.unravel_index(fault, shape)
    outcomes = engine.run(
        images,
        Faults(
            model=SINGLE_FLIP,
            position=torch.full_like(fault, site.position),
            image=image,
            limit=torch.full_like(fault, limit, dtype=torch.float32),
            row=fault,
            neuron=neuron,
            mask=1 << bit,
        ),
    )
    golden_loss = F.cross_entropy(outcomes.golden_logits, labels, reduction="none")
    delta_loss = (F.cross_entropy(outcomes.logits, labels[image], reduction="none") - golden_loss[image]).abs()
    mismatch = outcomes.logits.argmax(dim=1) != outcomes.golden_logits.argmax(dim=1)[image]
    return tuple(column.view(shape) for column in _columns(outcomes.masked, outcomes.detected, mismatch, delta_loss))


def _columns(masked: Tensor, detected: Tensor, mismatch: Tensor, delta_loss: Tensor) -> tuple[Tensor, ...]:
    finite = delta_loss.isfinite()
    return masked, detected, mismatch & finite, ~finite, delta_loss.where(finite, 0.0)


def flip_logits(engine: ReplayEngine, outputs: Tensor, factor: float, labels: Tensor, limit: float) -> tuple[Tensor, ...]:
    """What every bit flip in a last layer's outputs [B, C] does, where logits are `factor` times the outputs.

    labels: int64 [B]. Returns five tensors [B, C, bits]: whether it is masked, detected, changes the class though the loss is
    finite, makes the loss NaN or infinite (bool); and DeltaLoss where it is finite, else 0 (float32).
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
    passed, detected = clamp_to_range(flipped, torch.tensor(limit, device=outputs.device))
    faulty = passed * factor

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
    return _columns(passed == outputs[..., None], detected, mismatch, delta_loss)
