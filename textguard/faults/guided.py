"""Guided plans: every injection looks at some candidate faults, and takes one of them by what it is predicted to do.

An injection draws its image and some neurons of it, and takes one of the faults in their bits. The chances of these candidates
are a mixture of several proposals. The weight of the injection is the mean chance of its candidates over the chance of the one
that it took. The mean of weighted results has no bias, whatever the predictions are worth, because the candidates are drawn
uniformly and each of them can be taken [1]_. Uniform chances are part of the mixture, so that no weight is larger than one over
their share [2]_. Injections are independent of each other, and no outcome decides on any of them.

.. [1] Talbot, Cline and Egbert, "Importance Resampling for Global Illumination", Eurographics Symposium on Rendering, 2005.
.. [2] Owen and Zhou, "Safe and Effective Importance Sampling", Journal of the American Statistical Association 95, 2000.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from textguard.errors import InvalidParameter, Setting
from textguard.faults.damage import FaultModel
from textguard.faults.engines import Engine
from textguard.faults.formats import Format
from textguard.faults.inputs import batches
from textguard.faults.plans import PLAN_COLUMNS, SHARED, bits_at, distinct, draw_bits, draw_images, uniform_numbers
from textguard.faults.prediction import Prediction, class_changes, loss_changes
from textguard.faults.sites import Site
from textguard.faults.task import CLASSES, Task, make_task
from textguard.runtime import progress

CANDIDATES = 64  # neurons that an injection looks at
# Of the mixture: drawn uniformly; by bit, as the candidates' predictions are on average; by the predicted DeltaLoss; by the
# root of the DeltaLoss that it would be if all that the fault changes worked against the image's own class; by how likely the
# class is to change.
SHARES = {"uniform": 0.1, "bit": 0.05, "predicted": 0.35, "feared": 0.2, "changed": 0.3}
OWN = 0.5  # of the rest, what goes to the first range detector where there are several
TRIED = 10  # the highest bits, for which predictions are computed. Each one below does half of what the next one does.
LARGEST_LOSS = 1e30  # nats, of what overflows
AT_ONCE = 256  # injections that are chosen for together
VALUES = 2**25  # that the sites of all images of one prediction hold together

# What faults may do: DeltaLoss as predicted, DeltaLoss as feared, and how likely the class is to change.
Effects = tuple[Tensor, ...]


def draw_guided(
    engine: Engine,
    sites: Sequence[Site],
    loader: DataLoader,
    chances: np.ndarray,
    counts: Mapping[str, tuple[int, int]],
    seed: int,
    fault_model: FaultModel,
    limits: Sequence[Mapping[str, float]],
    share_images: bool = False,
    label: str | None = None,
    task: Task | str = CLASSES,
) -> pd.DataFrame:
    """Draw independent injections for each layer, mostly those that are predicted to do most.

    A fault depends only on the seed, the model, the chances, its layer and its index in it. So a larger count extends a plan.

    Parameters
    ----------
    engine : Engine
        Predicts what faults do.
    sites : sequence of Site
        The layers to draw faults for.
    loader : DataLoader
        Gives images and labels, from a map-style data set.
    chances : ndarray
        float [N], each image's chance to be drawn; see `image_chances`.
    counts : mapping of str to (int, int)
        Layer -> index of the first of its injections that is drawn, and of the first that is not.
    seed : int
        The seed of all draws.
    fault_model : FaultModel
        What one injection damages.
    limits : sequence of mappings of str to float
        For each range detector that the faults are for: layer -> largest magnitude that it lets pass. The first one counts for
        as much as all others together.
    share_images : bool, default False
        Whether injections of the same index hit the same image in all layers; see `draw_plan`.
    label : str, optional
        Names the work in progress lines. Without it there are none.
    task : Task or its name, default that of an ordinary classifier
        What batches and logits mean. Any loss that has gradients can be foreseen.

    Returns
    -------
    DataFrame
        As `draw_plan` returns it.

    Raises
    ------
    InvalidParameter
        Faults of this model cannot be predicted.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.faults import FaultModel, draw_guided, make_engine
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(2, 100), nn.Linear(100, 2))
    >>> images = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    >>> engine, loader = make_engine("replay", model, images[0], 8), DataLoader(TensorDataset(images, torch.tensor([0, 0])))
    >>> limits = {site.layer: 10.0 for site in engine.sites}
    >>> plan = draw_guided(engine, engine.sites, loader, np.ones(2), {"0": (0, 500), "1": (0, 500)}, 0, FaultModel(), [limits])
    >>> bool((plan["bit"] >= 24).mean() > 0.7), bool(plan["weight"].max() <= 10)  # 8 of 32 bits
    (True, True)
    """
    check_predictable(fault_model)
    task = make_task(task)
    drawn = {
        site.layer: _Draws(site, chances, *counts[site.layer], seed, fault_model, engine.number_format, share_images)
        for site in sites
    }
    wanted = np.unique(np.concatenate([draws.image for draws in drawn.values()]))
    size = max(1, VALUES // sum(site.neurons for site in engine.sites))
    parts = [part.tolist() for part in np.array_split(wanted, range(size, len(wanted), size))]
    with progress(total=len(wanted), label=label or "", unit="image", shown=label is not None) as bar:
        for part, images, labels in batches(loader, engine.device, parts, task):
            prediction = engine.predict(images, labels, task.margin)
            for site in sites:
                drawn[site.layer].take(prediction, np.array(part), [own[site.layer] for own in limits])
            bar.update(len(part))
    return pd.concat([drawn[site.layer].plan() for site in sites], ignore_index=True)


def check_predictable(fault_model: FaultModel) -> None:
    """Refuse what is not predicted. Raises InvalidParameter."""
    if fault_model.target != "neuron":
        raise InvalidParameter(
            Setting("plan"),
            f" guided predicts faults in neurons, not in {fault_model.target}; take uniform, proportional or neyman",
        )
    if fault_model.shaped:
        plans = "uniform, proportional or neyman" if fault_model.bits == 1 else "uniform"
        raise InvalidParameter(
            Setting("plan"), f" guided predicts faults in single values, not in a {fault_model.pattern}; take {plans}"
        )


class _Draws:
    """The injections `first` to `end` of a layer: their images and candidates, and bit by bit what they take of these."""

    def __init__(
        self,
        site: Site,
        chances: np.ndarray,
        first: int,
        end: int,
        seed: int,
        fault_model: FaultModel,
        number_format: Format,
        share_images: bool,
    ) -> None:
        self.site, self.model, self.index = site, fault_model, np.arange(first, end)
        self.bits = bits_at(site, fault_model, number_format)
        values, bits = fault_model.values, fault_model.bits
        self.image = draw_images(chances, seed, SHARED if share_images else f"{site.position}", end)[first:]
        self.weight = chances[chances > 0].mean() / chances[self.image]
        uniform = uniform_numbers(seed, f"{site.position} candidates", end, CANDIDATES * values * (1 + bits) + 1)[first:]
        self._chosen, rest = uniform[:, 0], uniform[:, 1:].reshape(len(uniform) * CANDIDATES, -1)
        # Candidates are spread evenly over the layer's values: one in each of as many parts of it, wherever in there.
        rest[:, 0] = (np.tile(np.arange(CANDIDATES), len(uniform)) + rest[:, 0]) / CANDIDATES
        # int64 [injections, candidates, values]
        self.neurons = distinct(rest[:, :values], site.neurons, "values").reshape(-1, CANDIDATES, values)
        # Of one bit in one value, all are tried. Others are drawn: int64 [injections, candidates, values, bits].
        self.drawn_bits = None
        if (values, bits) != (1, 1):
            damaged = draw_bits(rest[:, values:].reshape(-1, bits), self.bits, fault_model)
            self.drawn_bits = damaged.reshape(-1, CANDIDATES, values, bits)
        self.neuron = np.zeros((len(self.index), values), dtype=np.int64)
        self.bit = np.zeros((len(self.index), values, bits), dtype=np.int64)

    def take(self, prediction: Prediction, part: np.ndarray, limits: Sequence[float]) -> None:
        """Take a candidate for each injection on the images `part`, which the prediction is of. limits: of each detector."""
        there = np.flatnonzero(np.isin(self.image, part))
        for first in range(0, len(there), AT_ONCE):
            self._take(prediction, there[first : first + AT_ONCE], part, limits)

    def _take(self, prediction: Prediction, rows: np.ndarray, part: np.ndarray, limits: Sequence[float]) -> None:
        """The same for the injections `rows`, few enough for the processor's cache."""
        device = prediction.doubt.device
        image = torch.as_tensor(np.searchsorted(part, self.image[rows]), device=device)
        predicted = [self._predict(prediction, rows, image, limit) for limit in limits]
        chance = mixture(predicted).flatten(1)
        upto = chance.cumsum(dim=1)
        chosen = torch.searchsorted(upto, torch.as_tensor(self._chosen[rows], device=device)[:, None] * upto[:, -1:])
        chosen = chosen.clamp(max=chance.shape[1] - 1)
        self.weight[rows] *= (1 / (chance.shape[1] * chance.gather(1, chosen)[:, 0])).cpu().numpy()
        chosen = chosen[:, 0].cpu().numpy()
        candidate = chosen // (chance.shape[1] // CANDIDATES)
        self.neuron[rows] = self.neurons[rows, candidate]
        self.bit[rows] = (chosen % self.bits)[:, None, None] if self.drawn_bits is None else self.drawn_bits[rows, candidate]

    def _predict(self, prediction: Prediction, rows: np.ndarray, image: Tensor, limit: float) -> Effects:
        """What some injections' candidates may do, float64 [n, candidates, bits] each."""
        shape = (len(rows), CANDIDATES, self.model.values)
        neuron = torch.as_tensor(self.neurons[rows], device=image.device)
        low = 0
        if self.drawn_bits is None:
            low = max(0, self.bits - TRIED)
            masks = (1 << torch.arange(low, self.bits, device=image.device))[None]
        else:
            masks = torch.as_tensor((1 << self.drawn_bits[rows]).sum(axis=3), device=image.device).reshape(-1, 1)
        each = image[:, None, None].expand(shape).reshape(-1)
        moved = prediction.changes(self.site.position, each, neuron.reshape(-1), masks, self.model.operation, limit)
        change, reach = (part.reshape(*shape, -1).sum(dim=2) for part in moved)
        doubt = prediction.doubt[image][:, None, None]
        effects = loss_changes(doubt, change), loss_changes(doubt, -reach), class_changes(doubt, change, reach)
        return tuple(_of_all_bits(effect, low) for effect in effects)

    def plan(self) -> pd.DataFrame:
        """The injections as a plan's rows: one for each damaged bit."""
        rows = self.bit[0].size
        columns = {
            "layer": np.full(len(self.index) * rows, self.site.layer, dtype=object),
            "index": self.index.repeat(rows),
            "image": self.image.repeat(rows),
            "neuron": self.neuron.reshape(-1).repeat(self.model.bits),
            "bit": self.bit.reshape(-1),
            "weight": self.weight.repeat(rows),
        }
        return pd.DataFrame(columns)[PLAN_COLUMNS]


def _of_all_bits(effect: Tensor, low: int) -> Tensor:
    """What all bits do, finite, from what those from `low` on do, float64 [..., bits]."""
    effect = effect.nan_to_num(nan=LARGEST_LOSS).clamp(max=LARGEST_LOSS)
    if not low:
        return effect
    halves = 2.0 ** torch.arange(-low, 0, dtype=torch.float64, device=effect.device)
    return torch.cat([effect[..., :1] * halves, effect], dim=-1)


def mixture(predicted: Sequence[Effects]) -> Tensor:
    """The chance of each candidate, float64 [n, candidates, bits], summing to 1 over candidates and bits.

    predicted: for each range detector what its candidates may do, float64 [n, candidates, bits] each.
    """
    cells = predicted[0][0][0].numel()
    chance = torch.full_like(predicted[0][0], SHARES["uniform"] / cells)
    others = (1 - OWN) / max(1, len(predicted) - 1)
    for number, (expected, feared, changed) in enumerate(predicted):
        weight = 1.0 if len(predicted) == 1 else others if number else OWN
        by_bit = feared.clamp(max=1.0).mean(dim=1, keepdim=True).expand_as(feared)
        proposals = {"bit": by_bit, "predicted": expected, "feared": feared.sqrt(), "changed": changed}
        for name, proposal in proposals.items():
            total = proposal.sum(dim=(1, 2), keepdim=True)
            chance += SHARES[name] * weight * torch.where(total > 0, proposal / total, 1 / cells)
    return chance
