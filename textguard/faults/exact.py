"""Layers without sampling: every image, every neuron and every bit.

The last layer has a closed form, because a fault there changes one logit and leaves the others' part in the softmax's
denominator as it is. Other fully connected layers at the end go through the engine, as long as they have few enough faults.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from textguard.errors import UnsupportedModel
from textguard.estimates.summary import Totals
from textguard.faults.damage import SINGLE_FLIP, FaultModel, Faults, Storage
from textguard.faults.detectors import clamp_to_range
from textguard.faults.engines import Engine, ReplayEngine
from textguard.faults.inputs import batches
from textguard.faults.sites import Site
from textguard.faults.task import CLASSES, Task, make_task
from textguard.runtime import progress

FAULTS_AT_ONCE = 2**16  # through the engine
TEMPERATURES = tuple(2.0 ** (half / 2) for half in range(-12, 13))  # factors of the logits


def affordable(engine: Engine, images: int, fault_model: FaultModel, up_to: int, task: Task | str = CLASSES) -> list[Site]:
    """The layers at a model's end that can be enumerated: in closed form, or because they have few faults.

    Only fully connected layers count, and only single flips with the replay engine. In other layers and engines, an enumeration
    takes more inferences than it is worth.

    Parameters
    ----------
    engine : Engine
        The model's engine.
    images : int
        How many images are eligible.
    fault_model : FaultModel
        What one injection is.
    up_to : int
        The most faults that a layer without closed form may have, over all images, neurons and bits. 0 for no enumeration at
        all, not even in closed form.
    task : Task or its name, default that of an ordinary classifier
        What logits mean. Others than this one have no closed form.

    Returns
    -------
    list of Site
        The layers, in order of execution.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from textguard.faults import FaultModel, make_engine
    >>> from textguard.faults.exact import affordable
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> engine = make_engine("replay", model, torch.zeros(4), batch_size=64)
    >>> [site.layer for site in affordable(engine, images=10, fault_model=FaultModel(), up_to=1)]
    ['2']
    >>> [site.layer for site in affordable(engine, images=10, fault_model=FaultModel(), up_to=10 * 8 * 32)]
    ['0', '2']
    """
    if not up_to or fault_model != SINGLE_FLIP or not isinstance(engine, ReplayEngine):
        return []
    bits, found, formula = engine.number_format.bits, [], make_task(task).has_softmax
    for site in reversed(engine.sites):
        many = site.neurons * images * bits > up_to
        if site.kind != "Linear" or len(site.shape) != 1 or (many and not (formula and has_closed_form(engine, site))):
            break
        found.insert(0, site)
    return found


def has_closed_form(engine: ReplayEngine, site: Site) -> bool:
    """Whether a site is the last one, and nothing but a factor lies between it and the logits."""
    if site is not engine.sites[-1] or len(site.shape) != 1:
        return False
    try:
        engine.factor_behind_last()
    except UnsupportedModel:
        return False
    return True


@torch.inference_mode()
def enumerate_layer(
    engine: ReplayEngine,
    loader: DataLoader,
    images: Sequence[int],
    site: Site,
    limit: float,
    label: str = "enumerate",
    task: Task | str = CLASSES,
) -> Totals:
    """Flip every bit of every output of one layer, once for each image.

    Parameters
    ----------
    engine : ReplayEngine
        The model's engine.
    loader : DataLoader
        Gives images and labels; a map-style data set.
    images : sequence of int
        Indices of the images in the loader's data set.
    site : Site
        The layer, one of `engine.sites`.
    limit : float
        The largest magnitude that the range detector lets pass.
    label : str
        What the progress bar says.
    task : Task or its name, default that of an ordinary classifier
        What batches and logits mean. Another one goes through the engine, fault by fault.

    Returns
    -------
    Totals
        What the faults did, by bit.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.faults import enumerate_layer, make_engine
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> loader = DataLoader(TensorDataset(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])), batch_size=5)
    >>> engine = make_engine("replay", model, torch.zeros(4), batch_size=64)
    >>> totals = enumerate_layer(engine, loader, [0, 1, 4], engine.sites[-1], limit=float("inf"))
    >>> int(totals.faults.sum()) == 3 * 3 * 32  # images, neurons, bits
    True
    """
    task = make_task(task)
    bits, closed = engine.number_format.bits, task.has_softmax and has_closed_form(engine, site)
    at_once = (loader.batch_size or 1) if closed else max(1, FAULTS_AT_ONCE // (site.neurons * bits))
    sums = np.zeros((5, bits))
    with progress(total=len(images) * site.neurons * bits, label=f"{label} {site.layer}", unit="inj") as bar:
        for part, pictures, labels in batches(loader, engine.device, _split(images, at_once), task):
            if closed:
                found = flip_logits(engine, _outputs(engine, pictures), engine.factor_behind_last(), labels, limit)
            else:
                found = _flip_all(engine, pictures, labels, site, limit, task)
            sums += _sums(found)
            bar.update(len(part) * site.neurons * bits)
    return _totals(site, len(images), sums)


def _split(images: Sequence[int], at_once: int) -> list[Sequence[int]]:
    return [images[start : start + at_once] for start in range(0, len(images), at_once)]


def _outputs(engine: ReplayEngine, pictures: Tensor) -> Tensor:
    """The last site's fault-free outputs, [B, C]."""
    outputs: list[Tensor] = []
    engine.observe(pictures, lambda _, output: outputs.append(output))
    return outputs[-1]


def _sums(found: Sequence[Tensor]) -> np.ndarray:
    """By bit, [5, bits], what `flip_logits` returns."""
    return np.stack([column.double().sum(dim=(0, 1)).cpu().numpy() for column in found])


def _totals(site: Site, images: int, sums: np.ndarray) -> Totals:
    masked, detected, mismatches, nonfinite = sums[:4].astype(np.int64)
    faults = np.full(sums.shape[1], images * site.neurons)
    return Totals(site.layer, site.neurons, faults, masked, detected, mismatches, nonfinite, sums[4])


def _flip_all(engine: ReplayEngine, images: Tensor, labels: Tensor, site: Site, limit: float, task: Task) -> tuple[Tensor, ...]:
    """What `flip_logits` returns, for any layer: each fault is an injection of its own through the engine."""
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
    golden_loss = task.loss(outcomes.golden_logits, labels)
    delta_loss = (task.loss(outcomes.logits, labels[image]) - golden_loss[image]).abs()
    mismatch = task.differs(outcomes.logits, outcomes.golden_logits[image])
    return tuple(column.view(shape) for column in _columns(outcomes.masked, outcomes.detected, mismatch, delta_loss))


def _columns(masked: Tensor, detected: Tensor, mismatch: Tensor, delta_loss: Tensor) -> tuple[Tensor, ...]:
    """The five tensors of `flip_logits`, of whatever shape these have."""
    finite = delta_loss.isfinite()
    return masked, detected, mismatch & finite, ~finite, delta_loss.where(finite, 0.0)


def flip_logits(
    engine: ReplayEngine, outputs: Tensor, factor: float, labels: Tensor, limit: float, storage: Storage | None = None
) -> tuple[Tensor, ...]:
    """What every bit flip in a last layer's outputs does, where the logits are `factor` times the outputs.

    Parameters
    ----------
    engine : ReplayEngine
        Says how the outputs are stored.
    outputs : Tensor
        float32 [B, C], fault-free.
    factor : float
        The logits are this many times the outputs.
    labels : Tensor
        int64 [B].
    limit : float
        The largest magnitude that the range detector lets pass.
    storage : Storage, optional
        How the outputs are stored, where that is not as the engine stores them.

    Returns
    -------
    masked, detected, mismatch, nonfinite : Tensor
        bool [B, C, bits]: whether the flip leaves no trace, is detected, changes the class though the loss is finite, and makes
        the loss NaN or infinite.
    delta_loss : Tensor
        float32 [B, C, bits], in nats, 0 where it is not finite.
    """
    passed, detected = _flip(storage or engine.storage(-1), outputs, limit)
    logits, faulty = outputs * factor, passed * factor
    best = logits.argmax(dim=1, keepdim=True)
    rest = logits.masked_fill(F.one_hot(best[:, 0], logits.shape[1]).bool(), -torch.inf)
    rival, highest = rest.argmax(dim=1, keepdim=True)[..., None], rest.amax(dim=1, keepdim=True)[..., None]
    number = torch.arange(logits.shape[1], device=logits.device)[:, None]
    # argmax takes the first of equal logits, and prefers NaN to any number.
    top = logits.gather(1, best)[..., None]
    wins = (faulty > top) | ((faulty == top) & (number < best[..., None])) | faulty.isnan()
    loses = (faulty < highest) | ((faulty == highest) & (rival < number))
    mismatch = torch.where(number == best[..., None], loses, wins)
    return _columns(passed == outputs[..., None], detected, mismatch, _delta_loss(logits, faulty, labels))


def _flip(storage: Storage, outputs: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Outputs [B, C] behind the range detector, with each of their bits flipped, and whether it saw that: [B, C, bits]."""
    number_format = storage.format
    bits = torch.arange(number_format.bits, device=outputs.device)
    shared = torch.zeros_like(outputs, dtype=torch.int64)
    if number_format.shared_bits:
        block = number_format.block or outputs.shape[1]
        blocks = F.pad(outputs, (0, -outputs.shape[1] % block)).unflatten(1, (-1, block))
        shared = number_format.shared(blocks, storage.limit).repeat_interleave(block, dim=1)[:, : outputs.shape[1]]
    codes = number_format.encode(outputs, storage.limit, shared)
    flipped = number_format.decode(codes[..., None] ^ (1 << bits), storage.limit, shared[..., None])
    return clamp_to_range(flipped, torch.tensor(limit, device=outputs.device))


def _delta_loss(logits: Tensor, faulty: Tensor, labels: Tensor) -> Tensor:
    """DeltaLoss, [B, C, bits], where one of the logits [B, C] becomes faulty [B, C, bits]. NaN or infinite where it is so."""
    own = F.one_hot(labels, logits.shape[1]).bool()
    # log(sum(exp)) of all logits but one, from those before and those behind it. Subtracting one from the sum could cancel.
    edge = logits.new_full((len(logits), 1), -torch.inf)
    before = torch.cat([edge, logits.logcumsumexp(dim=1)[:, :-1]], dim=1)
    behind = torch.cat([logits.flip(1).logcumsumexp(dim=1).flip(1)[:, 1:], edge], dim=1)
    others = torch.logaddexp(before, behind)
    target = torch.where(own[..., None], faulty, logits.gather(1, labels[:, None])[..., None])
    loss = torch.logaddexp(others[..., None], faulty) - target
    # Cross entropy makes NaN of a logit of +inf, where this difference is an infinity for a wrong class.
    loss = torch.where(faulty == torch.inf, torch.nan, loss)
    return (loss - F.cross_entropy(logits, labels, reduction="none")[:, None, None]).abs()


@dataclass(frozen=True)
class Rescaled:
    """What all single-bit faults of a last layer do, where its logits are scaled. Neither changes a prediction without faults.

    Attributes
    ----------
    factor : float
        The logits are this many times the layer's outputs.
    delta_loss : ndarray
        The sum of DeltaLoss, in nats, where the logits are further multiplied by each of TEMPERATURES, behind the range
        detector; float [25]. It is over the faults whose loss is finite without that: SDC and mismatch stay as they are.
    folded : Totals or None
        What the faults do where the factor is in the layer's weights, and none behind it. None where it is 1.
    """

    factor: float
    delta_loss: np.ndarray
    folded: Totals | None

    def as_json(self) -> dict[str, Any]:
        """As metrics files hold it: with lists for arrays, and without `folded` where it is None."""
        curve = {"factor": self.factor, "temperatures": list(TEMPERATURES), "delta_loss": self.delta_loss.tolist()}
        return curve if self.folded is None else {**curve, "folded": self.folded.as_json()}


@torch.inference_mode()
def rescale_last_layer(
    engine: ReplayEngine,
    loader: DataLoader,
    images: Sequence[int],
    limits: Mapping[str, float],
    folded_limits: Mapping[str, float],
    label: str = "rescale",
) -> dict[str, Rescaled]:
    """Flip every bit of every output of the last layer, with its logits scaled; one pass over the images.

    Parameters
    ----------
    engine : ReplayEngine
        The model's engine, whose last site has a closed form.
    loader : DataLoader
        Gives images and labels; a map-style data set.
    images : sequence of int
        Indices of the images in the loader's data set.
    limits : mapping of str to float
        Range detector -> the largest magnitude of an output that it lets pass.
    folded_limits : mapping of str to float
        The same where the factor between outputs and logits is in the layer's weights.
    label : str
        What the progress bar says.

    Returns
    -------
    dict of str to Rescaled
        Range detector -> what the faults did.

    Raises
    ------
    UnsupportedModel
        More than a factor lies behind the last layer; see `has_closed_form`.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.faults import make_engine
    >>> from textguard.faults.exact import enumerate_layer, rescale_last_layer
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> loader = DataLoader(TensorDataset(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])), batch_size=5)
    >>> engine = make_engine("replay", model, torch.zeros(4), batch_size=64)
    >>> found = rescale_last_layer(engine, loader, [0, 1, 4], {"fixed:2": 2.0}, {"fixed:2": 2.0})["fixed:2"]
    >>> totals = enumerate_layer(engine, loader, [0, 1, 4], engine.sites[-1], limit=2.0)
    >>> found.folded, abs(found.delta_loss[12] / totals.delta_loss.sum() - 1) < 1e-5
    (None, True)
    """
    site, factor, stored, bits = engine.sites[-1], engine.factor_behind_last(), engine.storage(-1), engine.number_format.bits
    in_weights = Storage(stored.format, float(stored.limit) * abs(factor), stored.size, engine.device)
    curves = {name: np.zeros(len(TEMPERATURES)) for name in limits}
    folded = {name: np.zeros((5, bits)) for name in limits}
    with progress(total=len(images) * site.neurons * bits, label=f"{label} {site.layer}", unit="inj") as bar:
        for part, pictures, labels in batches(loader, engine.device, _split(images, loader.batch_size or 1)):
            outputs = _outputs(engine, pictures)
            for name, limit in limits.items():
                passed, _ = _flip(stored, outputs, limit)
                curves[name] += _sums_by_temperature(outputs * factor, passed * factor, labels)
                if factor != 1:
                    logits = in_weights.round(outputs * factor)
                    folded[name] += _sums(flip_logits(engine, logits, 1.0, labels, folded_limits[name], in_weights))
            bar.update(len(part) * site.neurons * bits)
    return {
        name: Rescaled(factor, curves[name], _totals(site, len(images), folded[name]) if factor != 1 else None)
        for name in limits
    }


def _sums_by_temperature(logits: Tensor, faulty: Tensor, labels: Tensor) -> np.ndarray:
    """The sums of DeltaLoss at each of TEMPERATURES, as `Rescaled` has them."""
    finite = _delta_loss(logits, faulty, labels).isfinite()
    # float32 holds neither a logit that a flip made large times 64, nor small changes of a loss; at 1, it says what is finite.
    logits, faulty = logits.double(), faulty.double()
    sums = [_delta_loss(t * logits, t * faulty, labels).where(finite, 0.0).sum() for t in TEMPERATURES]
    return torch.stack(sums).cpu().numpy()
