"""What fault-free inferences tell before faults are injected: which images are eligible, and the ranges of layers."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from textguard.errors import InvalidParameter, Setting, UnknownName, UnsupportedModel
from textguard.faults.engines import Engine, ReplayEngine, WholeEngine
from textguard.faults.graph import TracedModel
from textguard.faults.mitigations import activations
from textguard.faults.sites import DEFAULT_KINDS

IMAGES = ("uniform", "importance", "shared")


def loader_of(images: Tensor, labels: Tensor, batch_size: int) -> DataLoader:
    """A DataLoader of images [N, ...] and labels int64 [N] that lie in memory."""
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


def count_images(loader: DataLoader) -> int:
    """The number of images in the loader's data set. Raises InvalidParameter where it has no positions, or not all are read."""
    if isinstance(loader.dataset, IterableDataset):
        raise InvalidParameter("the DataLoader's data set must give images by their position (a map-style data set)")
    if not _reads_all(loader):
        raise InvalidParameter(
            "the DataLoader's sampler does not read each image of its data set once; "
            "choose images with torch.utils.data.Subset(dataset, positions) instead"
        )
    return len(loader.dataset)


def _reads_all(loader: DataLoader) -> bool:
    """Whether the loader gives every image once, in whatever order, but for a last batch that it may drop."""
    own = type(loader.batch_sampler) not in (BatchSampler, type(None))
    order = itertools.chain.from_iterable(loader.batch_sampler) if own else loader.sampler
    if type(order) is SequentialSampler or (type(order) is RandomSampler and not order.replacement):
        return order.data_source is loader.dataset and len(order) == len(loader.dataset)
    # A sampler of the user's; no more of it is read than it can rightly have, as it may be endless.
    count = len(loader.dataset)
    return sorted(int(position) for position in itertools.islice(order, count + 1)) == list(range(count))


def batches(
    loader: DataLoader, device: torch.device, parts: Sequence[Sequence[int]] | None = None
) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
    """Positions, images [B, ...] and labels [B], on the device: of `parts`, else of the whole data set in its order.

    The loader's data set, number of workers and way to collate are used, not its order: positions are those in its data set.
    """
    count, size = count_images(loader), loader.batch_size or 1
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)] if parts is None else parts
    chosen = DataLoader(
        loader.dataset,
        batch_sampler=parts,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn if loader.batch_sampler else None,  # without batches, it would not stack
        pin_memory=device.type == "cuda",
    )
    for part, (images, labels) in zip(parts, chosen, strict=True):
        yield part, images.to(device, non_blocking=True), torch.as_tensor(labels).to(device, non_blocking=True)


def first_image(loader: DataLoader, device: torch.device) -> Tensor:
    """One image of the loader's data set, [...], on the device: engines and traces need its shape."""
    _, images, _ = next(batches(loader, device, [[0]]))
    return images[0]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters lie, else its buffers; the CPU for a model that has neither."""
    return next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), torch.device("cpu"))


def top2diff(logits: Tensor) -> Tensor:
    """Difference of the two largest softmax probabilities. logits: [N, C], C >= 2. Returns [N], 0 to 1."""
    first, second = logits.softmax(dim=1).topk(2, dim=1).values.unbind(dim=1)
    return first - second


def image_chances(engine: Engine, loader: DataLoader, images: str = "uniform") -> np.ndarray:
    """How likely each image is to be drawn for an injection, relative to the others.

    Images that the fault-free model classifies wrongly, or with Top2Diff = 0, are not eligible: their chance is 0.

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

    Returns
    -------
    numpy.ndarray
        float64 [N], one chance per position in the data set.

    Raises
    ------
    UnknownName
        There is no such way to draw images.
    InvalidParameter
        The data set is no map-style one.

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
    if images not in (*IMAGES, "guided"):
        raise UnknownName("way to draw images", images, IMAGES, Setting("images"))
    chances, doubt, odds = (np.zeros(count_images(loader)) for _ in range(3))
    for part, pictures, labels in batches(loader, engine.device):
        logits = engine.observe(pictures)
        correct = (logits.argmax(dim=1) == labels) & (top2diff(logits) > 0)
        chances[part] = correct.cpu().numpy()
        loss = F.cross_entropy(logits.double(), labels, reduction="none")
        doubt[part] = (-torch.expm1(-loss)).clamp(min=0).cpu().numpy()
        odds[part] = torch.expm1(loss).clamp(min=0).cpu().numpy()  # against the image's class
    doubt *= chances
    if images in ("uniform", "shared") or not doubt.sum():
        return chances
    # Batches of another size change the last digits of logits. Two decimals hide that, so that it changes no plan.
    if images == "importance":
        return chances * ((1 + doubt * (chances.sum() / doubt.sum())) / 2).round(2)
    # What small changes do goes with the doubt, what large ones do hardly depends on it; the fourth root lies between.
    shares = [(0.25, chances), (0.55, doubt), (0.2, chances * np.minimum(odds, 1.0) ** 0.25)]
    return chances * sum(share * part * (chances.sum() / part.sum()) for share, part in shares).round(2)


def eligible_images(engine: Engine, loader: DataLoader) -> list[int]:
    """Find the images that the fault-free model classifies correctly with Top2Diff > 0.

    Parameters
    ----------
    engine : Engine
        Runs the fault-free model; see `make_engine`.
    loader : DataLoader
        Gives images and labels, from a map-style data set.

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
    return np.flatnonzero(image_chances(engine, loader)).tolist()


@torch.inference_mode()
def profile_ranges(model: nn.Module, loader: DataLoader, kinds: Sequence[str] = DEFAULT_KINDS) -> pd.DataFrame:
    """Measure each fault site's largest and mean absolute output over all images of a data set.

    Parameters
    ----------
    model : torch.nn.Module
        From images [B, ...] to logits [B, C], on the device to use.
    loader : DataLoader
        Gives images and labels, from a map-style data set; mostly the training images.
    kinds : sequence of str, default ("Conv1d", "Conv2d", "Conv3d", "Linear")
        Operations whose outputs are fault sites.

    Returns
    -------
    pandas.DataFrame
        One row per site, in order of execution: layer, kind, neurons (values per image), max_abs, mean_abs.

    Raises
    ------
    UnsupportedModel
        The model has no output of these kinds, returns no tensor of logits, or gives NaN or infinity without any fault.
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
    device = device_of(model)
    image = first_image(loader, device)
    engine = observer(model, image, kinds)
    largest, total = np.zeros(len(engine.sites)), np.zeros(len(engine.sites))
    count = 0

    def see(position: int, output: Tensor) -> None:
        magnitude = output.abs()
        if not math.isfinite(most := float(magnitude.max())):
            layer = engine.sites[position].layer
            raise UnsupportedModel(f"without any fault, layer {layer!r} gives NaN or infinity: it has no range to be profiled")
        largest[position] = max(largest[position], most)
        total[position] += float(magnitude.sum(dtype=torch.float64))

    for part, images, _ in batches(loader, device):
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
def profile_activations(model: nn.Module, loader: DataLoader) -> pd.DataFrame:
    """Measure the lowest and highest output of each activation function, between which `protect` keeps it.

    Parameters
    ----------
    model : torch.nn.Module
        From images [B, ...] to logits [B, C], on the device to use.
    loader : DataLoader
        Gives images and labels, from a map-style data set; mostly the training images.

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
    device = device_of(model)
    traced = TracedModel(model, first_image(loader, device))
    names = activations(traced)
    low, high = dict.fromkeys(names.values(), np.inf), dict.fromkeys(names.values(), -np.inf)
    for _, images, _ in batches(loader, device):
        values = traced.inputs(images)
        for index in traced.walk(values):
            if index in names:
                name, value = names[index], values[traced.steps[index]]
                least, most = float(value.min()), float(value.max())
                if not (math.isfinite(least) and math.isfinite(most)):
                    raise UnsupportedModel(f"without any fault, activation {name!r} gives NaN or infinity")
                low[name], high[name] = min(low[name], least), max(high[name], most)
    return pd.DataFrame({"activation": list(low), "low": list(low.values()), "high": list(high.values())})
