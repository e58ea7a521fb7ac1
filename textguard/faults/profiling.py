"""What fault-free inferences tell before faults are injected: which images are eligible, and the ranges of layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from textguard.errors import InvalidParameter, Setting, UnknownName, UnsupportedModel
from textguard.faults.engines import Engine, ReplayEngine, WholeEngine
from textguard.faults.graph import TracedModel
from textguard.faults.inputs import batches, check_labels, check_logits, count_images, prepare
from textguard.faults.mitigations import Bounds, activations, learn_thresholds
from textguard.faults.sites import DEFAULT_KINDS
from textguard.faults.task import CLASSES, Task, make_task

IMAGES = ("uniform", "importance", "shared")


def loader_of(images: Tensor, labels: Tensor, batch_size: int) -> DataLoader:
    """A DataLoader of images [N, ...] and labels int64 [N] that lie in memory."""
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


@dataclass(frozen=True)
class FaultFree:
    """What the fault-free model makes of a data set of N images. Where the loader leaves one out, all of it is 0.

    Attributes
    ----------
    read : ndarray
        bool [N], whether the loader reads the image.
    correct : ndarray
        bool [N], whether the model is right about it.
    certain : ndarray
        bool [N], whether Top2Diff is above 0.
    broken : ndarray
        bool [N], whether Top2Diff is NaN, because logits are.
    doubt : ndarray
        float [N], 1 - exp(-loss), which is 1 - p(label) for cross entropy.
    odds : ndarray
        float [N], exp(loss) - 1, which are the odds against the label.
    """

    read: np.ndarray
    correct: np.ndarray
    certain: np.ndarray
    broken: np.ndarray
    doubt: np.ndarray
    odds: np.ndarray

    @property
    def eligible(self) -> np.ndarray:
        """Bool [N], whether faults are injected on the image."""
        return self.correct & self.certain

    @property
    def top1(self) -> float:
        """The share of the images read that the model is right about."""
        return float(self.correct[self.read].mean())

    def chances(self, images: str) -> np.ndarray:
        """See `image_chances`."""
        if images not in (*IMAGES, "guided"):
            raise UnknownName("way to draw images", images, IMAGES, Setting("images"))
        chances, doubt = self.eligible.astype(float), np.where(self.eligible, self.doubt, 0.0)
        if images in ("uniform", "shared") or not doubt.sum():
            return chances
        # Batches of another size change the last digits of logits. Two decimals hide that, so that it changes no plan.
        if images == "importance":
            return chances * ((1 + doubt * (chances.sum() / doubt.sum())) / 2).round(2)
        # What small changes do goes with the doubt, what large ones do hardly depends on it; the fourth root lies between.
        shares = [(0.25, chances), (0.55, doubt), (0.2, chances * np.minimum(self.odds, 1.0) ** 0.25)]
        return chances * sum(share * part * (chances.sum() / part.sum()) for share, part in shares).round(2)

    def refuse_none(self) -> None:
        """Say why no image is eligible. Raises InvalidParameter."""
        if self.eligible.any():
            return
        read, right, broken = (int(part.sum()) for part in (self.read, self.correct, self.broken))
        found = f"no image is eligible: of {read}, the fault-free model is right about {right} (top-1 {self.top1:.1%})"
        if broken:
            first = int(np.flatnonzero(self.broken)[0])
            cure = (
                f"logits of {broken} ({broken / read:.0%}) are NaN or infinite, the first at position {first}; look for NaN in "
                "that image and in the weights"
            )
        elif right:
            cure = f"in all {right} the two best classes tie; a head whose weights are all 0 does that, so load trained ones"
        else:
            cure = "check that weights are loaded, images normalised as in training, and labels numbered as the logits are"
        raise InvalidParameter(f"{found}; {cure}")


def look(engine: Engine, loader: DataLoader, task: Task = CLASSES) -> FaultFree:
    """Run all images that a loader reads without faults. task: what batches and logits mean. Raises TextguardError."""
    count = count_images(loader)
    read, correct, certain, broken = (np.zeros(count, dtype=bool) for _ in range(4))
    doubt, odds = np.zeros(count), np.zeros(count)
    for part, pictures, labels in batches(loader, engine.device, task=task):
        logits = check_logits(engine.observe(pictures), len(part), "the model", task)
        check_labels(logits, labels, task)
        read[part] = True
        correct[part] = task.correct(logits, labels).cpu().numpy()
        certainty = task.certainty(logits)
        certain[part], broken[part] = (certainty > 0).cpu().numpy(), certainty.isnan().cpu().numpy()
        loss = task.precise_loss(logits, labels)
        doubt[part] = (-torch.expm1(-loss)).clamp(min=0).cpu().numpy()
        odds[part] = torch.expm1(loss).clamp(min=0).cpu().numpy()  # against the image's class
    return FaultFree(read, correct, certain, broken, doubt, odds)


def image_chances(engine: Engine, loader: DataLoader, images: str = "uniform", task: Task | str = CLASSES) -> np.ndarray:
    """How likely each image is to be drawn for an injection, relative to the others.

    Images that the fault-free model classifies wrongly, or with Top2Diff = 0, are not eligible: their chance is 0. So is
    that of images that the loader's sampler leaves out.

    Parameters
    ----------
    engine : Engine
        Runs the fault-free model; see `make_engine`.
    loader : DataLoader
        Gives images and labels, from a map-style data set of N images.
    images : {"uniform", "importance", "shared", "guided"}, default "uniform"
        `uniform` and `shared` give all eligible images the chance 1. `importance` gives half of that to all, and half in
        proportion to 1 - p(label), because a small change of the logits changes the loss most where the model is least
        certain. It makes estimates steadier in layers whose faults do little, not in the last ones. No injection weighs more
        than about 2.
        `guided` is what plan `guided` draws by: a quarter to all, the rest where the class is in doubt.
    task : Task or its name, default that of an ordinary classifier
        What batches and logits mean.

    Returns
    -------
    numpy.ndarray
        float64 [N], one chance per position in the data set.

    Raises
    ------
    UnknownName
        There is no such way to draw images, or no such task.
    InvalidParameter
        The data set is no map-style one, or labels do not fit the logits.

    Examples
    --------
    The classifier below takes its images for logits, and is wrong about the second of three.

    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.faults import image_chances, make_engine
    >>> model = nn.Linear(2, 2, bias=False)
    >>> model.weight.data = torch.eye(2)
    >>> images, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 0, 0])
    >>> loader = DataLoader(TensorDataset(images, labels))
    >>> engine = make_engine("replay", model, images[0], batch_size=1)
    >>> image_chances(engine, loader).tolist()
    [1.0, 0.0, 1.0]
    >>> image_chances(engine, loader, "importance").tolist()
    [1.35, 0.0, 0.65]
    """
    return look(engine, loader, make_task(task)).chances(images)


def eligible_images(engine: Engine, loader: DataLoader, task: Task | str = CLASSES) -> list[int]:
    """Find the images that the fault-free model classifies correctly with Top2Diff > 0.

    Parameters
    ----------
    engine : Engine
        Runs the fault-free model; see `make_engine`.
    loader : DataLoader
        Gives images and labels, from a map-style data set.
    task : Task or its name, default that of an ordinary classifier
        What batches and logits mean.

    Returns
    -------
    list of int
        Their positions in the data set, ascending.

    Raises
    ------
    InvalidParameter
        The data set is no map-style one.

    References
    ----------
    Mahmoud et al., Optimizing Selective Protection for CNN Resilience, ISSRE 2021.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.faults import eligible_images, make_engine
    >>> model = nn.Linear(2, 2, bias=False)
    >>> model.weight.data = torch.eye(2)
    >>> images, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 0, 0])
    >>> engine = make_engine("replay", model, images[0], batch_size=1)
    >>> eligible_images(engine, DataLoader(TensorDataset(images, labels)))
    [0, 2]
    """
    return np.flatnonzero(image_chances(engine, loader, task=task)).tolist()


@torch.inference_mode()
def profile_ranges(
    model: nn.Module, loader: DataLoader, kinds: Sequence[str] = DEFAULT_KINDS, task: Task | str = CLASSES
) -> pd.DataFrame:
    """Measure each fault site's largest and mean absolute output over all images of a data set.

    Parameters
    ----------
    model : torch.nn.Module
        From images [B, ...] to logits [B, C], on the device to use.
    loader : DataLoader
        Gives images and labels, from a map-style data set; mostly the training images.
    kinds : sequence of str, default ("Conv1d", "Conv2d", "Conv3d", "Linear")
        Operations whose outputs are fault sites.
    task : Task or its name, default that of an ordinary classifier
        What batches and logits mean.

    Returns
    -------
    pandas.DataFrame
        One row per site, in order of execution: layer, kind, neurons (values per image), max_abs, mean_abs.

    Raises
    ------
    UnsupportedModel
        The model has no output of these kinds, returns no tensor of logits, or gives NaN or infinity without any fault.
    InvalidParameter
        The loader's first batch is not what the task needs.
    UnknownName
        There is no such kind of site.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.faults import profile_ranges
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    >>> model[0].weight.data = torch.eye(2)
    >>> images = torch.tensor([[1.0, -3.0], [0.0, 2.0]])
    >>> profile_ranges(model, DataLoader(TensorDataset(images, torch.tensor([0, 1]))))
      layer    kind  neurons  max_abs  mean_abs
    0     0  Linear        2      3.0       1.5
    """
    task = make_task(task)
    model, image = prepare(model, loader, task, labelled=False)
    engine = observer(model, image, kinds)
    largest, total = np.zeros(len(engine.sites)), np.zeros(len(engine.sites))
    count = 0

    def see(position: int, output: Tensor) -> None:
        magnitude = output.abs() if output.is_floating_point() else output.double().abs()  # -128 has no magnitude in int8
        if not math.isfinite(most := float(magnitude.max())):
            layer = engine.all_sites[position].layer
            raise UnsupportedModel(f"without any fault, layer {layer!r} gives NaN or infinity: it has no range to be profiled")
        largest[position] = max(largest[position], most)
        total[position] += float(magnitude.sum(dtype=torch.float64))

    for part, images, _ in batches(loader, image.device, task=task):
        engine.observe(images, see)
        count += len(part)
    return pd.DataFrame(
        {
            "layer": site.layer,
            "kind": site.kind,
            "neurons": site.neurons,
            "max_abs": largest[site.position],
            "mean_abs": total[site.position] / (site.neurons * count),
        }
        for site in engine.sites
    )


def observer(model: nn.Module, image: Tensor, kinds: Sequence[str]) -> Engine:
    """An engine that shows the outputs of all sites, whether the model can be traced or not. image: one, [...].

    Raises UnsupportedModel, UnknownName.
    """
    try:
        return ReplayEngine(model, image, 1, kinds=kinds)
    except UnsupportedModel:  # `make_engine` tells the user why, when the campaign begins
        return WholeEngine(model, image, 1, kinds=kinds)


def largest_outputs(ranges: pd.DataFrame) -> dict[str, float]:
    """Layer -> its largest absolute output, from what `profile_ranges` returns."""
    return dict(zip(ranges["layer"], ranges["max_abs"], strict=True))


@torch.inference_mode()
def profile_activations(model: nn.Module, loader: DataLoader, task: Task | str = CLASSES) -> pd.DataFrame:
    """Measure the lowest and highest output of each activation function, between which `protect` keeps it.

    Parameters
    ----------
    model : torch.nn.Module
        From images [B, ...] to logits [B, C], on the device to use.
    loader : DataLoader
        Gives images and labels, from a map-style data set; mostly the training images.
    task : Task or its name, default that of an ordinary classifier
        What batches and logits mean.

    Returns
    -------
    pandas.DataFrame
        One row per call of an activation function, in order of execution: activation (its name in the trace), low, high.

    Raises
    ------
    UnsupportedModel
        The model cannot be traced, or an activation is NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.faults import profile_activations
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    >>> model[0].weight.data = torch.eye(2)
    >>> images = torch.tensor([[1.0, -3.0], [0.0, 2.0]])
    >>> profile_activations(model, DataLoader(TensorDataset(images, torch.tensor([0, 1]))))
      activation  low  high
    0         _1  0.0   2.0
    """
    task = make_task(task)
    model, image = prepare(model, loader, task, labelled=False)
    traced = TracedModel(model, image)
    names = activations(traced)
    low, high = dict.fromkeys(names.values(), np.inf), dict.fromkeys(names.values(), -np.inf)
    for _, images, _ in batches(loader, image.device, task=task):
        values = traced.inputs(images)
        for index in traced.walk(values):
            if index in names:
                name, value = names[index], values[traced.steps[index]]
                least, most = float(value.min()), float(value.max())
                if not (math.isfinite(least) and math.isfinite(most)):
                    raise UnsupportedModel(f"without any fault, activation {name!r} gives NaN or infinity")
                low[name], high[name] = min(low[name], least), max(high[name], most)
    return pd.DataFrame({"activation": list(low), "low": list(low.values()), "high": list(high.values())})


def activation_bounds(model: nn.Module, loader: DataLoader, mitigation: str, task: Task | str = CLASSES) -> Bounds:
    """What `protect` needs for a mitigation: measured ranges, or learned thresholds. Raises TextguardError."""
    if mitigation == "learned":
        return learn_thresholds(model, loader, task=task)
    if mitigation not in ("ranger", "clip_to_zero"):  # `protect` says what is wrong with others
        return {}
    return {row.activation: (row.low, row.high) for row in profile_activations(model, loader, task).itertuples(index=False)}
