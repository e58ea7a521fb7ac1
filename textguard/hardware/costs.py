"""What protections of memory and mitigations cost, and what they buy at a bit error rate."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from textguard.errors import InvalidParameter, Setting
from textguard.faults.detectors import Bound
from textguard.faults.exported import evaluation
from textguard.faults.inputs import batches, prepare
from textguard.faults.mitigations import MITIGATIONS, protect
from textguard.faults.profiling import activation_bounds
from textguard.faults.task import CLASSES, Task, make_task
from textguard.hardware.rates import RateCurve

ROUNDS = 9
LIMITS = ("value", "low", "high")


def time_ratios(models: Mapping[str, nn.Module], images: Tensor, rounds: int = ROUNDS) -> dict[str, float]:
    """How many times as long an inference takes as that of the first model.

    The models take turns, so that whatever else the machine does meets all, and the fastest round of each counts.

    Parameters
    ----------
    models : mapping of str to torch.nn.Module
        The models, in evaluation mode, on the device to use.
    images : Tensor
        [B, ...], one batch.
    rounds : int, default 9
        How often each is timed, after one round that is not.

    Returns
    -------
    dict of str to float
        Name -> ratio; 1 for the first model.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from textguard.hardware.costs import time_ratios
    >>> found = time_ratios({"one": nn.Linear(8, 8), "two": nn.Sequential(nn.Linear(8, 8), nn.ReLU())}, torch.rand(4, 8))
    >>> found["one"], found["two"] > 0
    (1.0, True)
    """
    fastest = dict.fromkeys(models, math.inf)
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(images)
                if images.is_cuda:
                    torch.cuda.synchronize()
                if number:
                    fastest[name] = min(fastest[name], time.perf_counter() - start)
    first = next(iter(fastest.values()))
    return {name: seconds / first for name, seconds in fastest.items()}


def mitigation_costs(
    model: nn.Module,
    loader: DataLoader,
    *,
    mitigations: Sequence[str] = MITIGATIONS,
    profile: DataLoader | None = None,
    task: Task | str = CLASSES,
) -> pd.DataFrame:
    """What mitigations add to an inference.

    Parameters
    ----------
    model : torch.nn.Module
        From images [B, ...] to logits [B, C], on the device to use.
    loader : DataLoader
        Its first batch is timed.
    mitigations : sequence of str, default all
        See `protect`.
    profile : DataLoader, optional
        Gives the images that ranges and thresholds are taken from; by default those of `loader`.
    task : Task or its name, default that of an ordinary classifier
        What batches and logits mean.

    Returns
    -------
    pandas.DataFrame
        One row per mitigation: mitigation; time (of an inference, as a multiple of the model's own, all in one run);
        comparisons (per image: two for each activation); and numbers (bounds that are stored).

    Raises
    ------
    TextguardError
        As `protect`.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.hardware.costs import mitigation_costs
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> images = torch.randn(32, 4)
    >>> loader = DataLoader(TensorDataset(images, model(images).argmax(dim=1)), batch_size=8)
    >>> mitigation_costs(model, loader, mitigations=["ranger", "learned"])[["mitigation", "comparisons", "numbers"]]
      mitigation  comparisons  numbers
    0     ranger           16        2
    1    learned           16        9
    """
    task = make_task(task)
    plain, image = prepare(model, loader, task)
    # A protected model is a traced one: so is what it is compared with.
    protected = {
        name: protect(plain, image, activation_bounds(model, profile or loader, name, task), name) for name in mitigations
    }
    _, images, _ = next(batches(loader, image.device, task=task))
    times = time_ratios({"": evaluation(plain), **protected}, images)
    rows = [(name, times[name], *bounding_operations(one, images)) for name, one in protected.items()]
    return pd.DataFrame(rows, columns=["mitigation", "time", "comparisons", "numbers"])


@torch.inference_mode()
def bounding_operations(protected: nn.Module, images: Tensor) -> tuple[int, int]:
    """What a mitigation adds to an inference, as numbers that are the same on every machine.

    Parameters
    ----------
    protected : torch.nn.Module
        What `protect` returned, on the images' device.
    images : Tensor
        [B, ...], one batch.

    Returns
    -------
    comparisons, bounds : int
        Comparisons per image, two for each value of an activation; and bounds that are stored, one lowest value for each
        activation, and a highest one for it or for each of its channels. Both are 0 without a mitigation.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from textguard.faults import protect
    >>> from textguard.hardware.costs import bounding_operations
    >>> model, images = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(2, 4)
    >>> bounding_operations(protect(model, images[0], {"_1": (0.0, 1.0)}, "ranger"), images)
    (16, 2)
    """
    comparisons = bounds = 0

    def count(module: Bound, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal comparisons, bounds
        comparisons += 2 * output.numel() // len(images)
        bounds += 1 + (module.high.numel() if isinstance(module.high, Tensor) else 1)

    hooks = [module.register_forward_hook(count) for module in protected.modules() if isinstance(module, Bound)]
    try:
        if hooks:
            protected(images)
    finally:
        for hook in hooks:
            hook.remove()
    return comparisons, bounds


def protection_table(
    curves: Mapping[str, RateCurve], rate: float, *, points: float = 10.0, mitigations: pd.DataFrame | None = None
) -> pd.DataFrame:
    """What each protection or mitigation costs, and what it buys at a bit error rate.

    Parameters
    ----------
    curves : mapping of str to RateCurve
        Name -> its curve, of the same memories. The first one is what the others are compared with.
    rate : float
        The bit error rate, one of all curves'.
    points : float, default 10
        Of accuracy, for the rate at which so many are lost.
    mitigations : pandas.DataFrame, optional
        What `mitigation_costs` returned, for curves of the same names.

    Returns
    -------
    pandas.DataFrame
        One row per curve: name; stored_per_data_bit; gates (of two inputs, to read all values once); time, comparisons and
        numbers, where `mitigations` holds them; golden_top1; top1, delta_loss (nats) and sdc (share of predictions that change
        or are no numbers) at the rate, losing (the bit error rate at which `points` are lost), and longer (that rate as a
        multiple of the first curve's), each with its interval in _low and _high.

    Raises
    ------
    InvalidParameter
        A curve has no such rate.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.hardware.costs import protection_table
    >>> from textguard.hardware.rates import error_rates
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> images = torch.randn(16, 4)
    >>> loader = DataLoader(TensorDataset(images, model(images).argmax(dim=1)), batch_size=8)
    >>> curves = {name: error_rates(model, loader, [1e-3], memories=8, protection=name) for name in ("none", "secded(64)")}
    >>> protection_table(curves, 1e-3)[["name", "stored_per_data_bit", "gates"]].round(3)
             name  stored_per_data_bit   gates
    0        none                1.000     0.0
    1  secded(64)                1.127  6968.0
    """
    costs = {} if mitigations is None else mitigations.set_index("mitigation").to_dict("index")
    first, rows = next(iter(curves.values())), []
    for name, curve in curves.items():
        if rate not in curve.points:
            known = ", ".join(f"{one:g}" for one in curve.rates)
            raise InvalidParameter(Setting("rate"), f" is {rate!r:.60}; curve {name!r} has {known}")
        at, settings = curve.points[rate], curve.settings
        row: dict[str, Any] = {
            "name": name,
            "stored_per_data_bit": settings["stored_bits"] / settings["data_bits"],
            "gates": settings["gates"],
            **costs.get(name, {}),
            "golden_top1": settings["golden_top1"],
        }
        estimates = {"top1": at["top1"], "delta_loss": at["delta_loss"], "sdc": at["changed"], "losing": curve.losing(points)}
        if curve is not first:
            estimates["longer"] = curve.compare(first, points)
        for measure, estimate in estimates.items():
            row |= {measure + ("" if end == "value" else f"_{end}"): getattr(estimate, end) for end in LIMITS}
        rows.append(row)
    return pd.DataFrame(rows)
