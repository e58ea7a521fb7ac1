"""The mitigations that the field compares with. Each wraps any model and keeps every activation within its profiled range."""

import math
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from textguard.errors import InvalidParameter, Setting, UnknownName, UnsupportedModel
from textguard.faults.checks import whole_number
from textguard.faults.detectors import Bound, ChannelBound, along
from textguard.faults.graph import ACTIVATIONS, TracedModel
from textguard.faults.inputs import batches, check_labels, check_logits, device_of, positions, prepare
from textguard.faults.sites import another_of
from textguard.faults.task import CLASSES, Task, make_task

# Every bound is wider by this share of the larger one. In other batch sizes sums round differently, because these add in
# another order, and the profiled extremes have to stay in range there too.
ROUNDING = 1e-5
# Activations that replays do not know. Unlike ACTIVATIONS, they steer nothing but what is bounded.
OTHERS = (
    *(nn.PReLU, nn.RReLU, nn.CELU, nn.SELU, nn.Mish, nn.Softplus, nn.Softsign, nn.Threshold, nn.GLU, nn.LogSigmoid),
    *(nn.Hardshrink, nn.Softshrink, nn.Tanhshrink),
    *(F.prelu, F.rrelu, F.celu, F.selu, F.mish, F.softplus, F.softsign, F.threshold, F.glu, F.logsigmoid, F.hardshrink),
    *(F.softshrink, F.tanhshrink, F.sigmoid, F.tanh, torch.prelu, torch.rrelu, torch.celu, torch.selu, torch.threshold),
    *(torch.special.expit, torch.clamp, torch.clip, torch.clamp_min, torch.clamp_max, torch.hardshrink),
    *("clamp", "clip", "clamp_min", "clamp_max", "prelu", "hardshrink", "sigmoid", "tanh"),
)
# Elementwise steps that are no activation by name, and whose outputs have no bound by themselves.
NONLINEAR = (
    *(torch.exp, torch.expm1, torch.log, torch.log1p, torch.square, torch.pow, torch.abs, torch.sqrt, torch.reciprocal),
    *(
        operator.pow,
        operator.abs,
        torch.special.expm1,
        torch.maximum,
        torch.max,
        torch.rsqrt,
        torch.sinh,
        torch.cosh,
        torch.where,
    ),
    *("exp", "expm1", "log", "log1p", "square", "pow", "abs", "sqrt", "reciprocal", "rsqrt", "maximum", "where"),
)
PRODUCTS = (operator.mul, torch.mul, "mul")
MITIGATIONS = ("none", "ranger", "clip_to_zero", "learned")
Mitigation = Literal["none", "ranger", "clip_to_zero", "learned"]
Bounds = Mapping[str, tuple[float, "float | Tensor"]]
# How thresholds are learned: how steep what takes the place of a step is, as a share of the threshold; what an update changes
# of it; the least share of a maximum that it may become; and the share of the images that may be lost.
SOFT, RATE, LEAST, TOLERATED = 0.05, 0.02, 0.05, 0.005
CHECKED = 2048  # images, at most, on which it is seen what thresholds cost


def activations(traced: TracedModel) -> dict[int, str]:
    """The steps of a traced model that are activation functions.

    Parameters
    ----------
    traced : TracedModel
        The traced model.

    Returns
    -------
    dict of int to str
        Index of the step -> its name.
    """
    return {index: step.name for index, step in enumerate(traced.steps) if _is_activation(traced, step)}


def _is_activation(traced: TracedModel, step: fx.Node) -> bool:
    operation = traced.operation(step)
    # A clamp of what no image flows into, such as a learnt scale, is none.
    return operation in ACTIVATIONS or (operation in OTHERS and traced.depends_on_images(step))


def _is_left_out(traced: TracedModel, step: fx.Node) -> bool:
    """Whether a step bends values, and is no activation that is bounded."""
    if step.op in ("placeholder", "output", "get_attr") or not traced.depends_on_images(step):
        return False
    operation = traced.operation(step)
    if operation in NONLINEAR:
        return True
    # An activation that is spelled out, x * sigmoid(x). Gates, which come from elsewhere, are none.
    sources = [arg for arg in step.args if isinstance(arg, fx.Node)] if operation in PRODUCTS else []
    return len(sources) == 2 and (
        sources[0] is sources[1] or any(a in b.all_input_nodes and _bends(traced, b) for a, b in (sources, sources[::-1]))
    )


def _bends(traced: TracedModel, step: fx.Node) -> bool:
    return _is_activation(traced, step) or _is_left_out(traced, step)


def unprotected(model: nn.Module, image: Tensor) -> list[str]:
    """The steps of a model that bend values as activations do, and that `protect` does not know.

    Parameters
    ----------
    model : nn.Module
        Any classifier that torch.fx can trace, from images [B, ...] to logits [B, C].
    image : Tensor
        One image, shape [...], on the model's device.

    Returns
    -------
    list of str
        Their names in the trace, in order of execution.

    Raises
    ------
    UnsupportedModel
        The model cannot be traced.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from textguard.faults.mitigations import unprotected
    >>> class Swish(nn.Module):
    ...     def forward(self, x):
    ...         return x * x.sigmoid()
    >>> unprotected(nn.Sequential(nn.Linear(2, 2), Swish(), nn.ReLU()).eval(), torch.zeros(2))
    ['mul']
    """
    return _left_out(TracedModel(model, image))


def _left_out(traced: TracedModel) -> list[str]:
    return [step.name for step in traced.steps if _is_left_out(traced, step)]


def protect(model: nn.Module, image: Tensor, bounds: Bounds, mitigation: Mitigation) -> nn.Module:
    """Keep every activation of a model within its profiled range.

    Layers keep their names, so a campaign finds the same sites in the protected model.

    Parameters
    ----------
    model : nn.Module
        Any classifier that torch.fx can trace, from images [B, ...] to logits [B, C].
    image : Tensor
        One image, shape [...], on the model's device.
    bounds : mapping of str to (float, float or Tensor)
        Name of the activation -> its lowest and its highest fault-free output, as `profile_activations` measures them; for
        `learned`, its lowest output and a threshold for each channel, float32 [C], as `learn_thresholds` returns them.
    mitigation : {"none", "ranger", "clip_to_zero", "learned"}
        What takes the place of a value outside its range: `ranger` puts the nearer bound there [1]_, `clip_to_zero` zero [2]_,
        and so does `learned` [3]_, whose ranges are narrower.

    Returns
    -------
    nn.Module
        A protected copy in evaluation mode; for `none`, the model itself.

    Raises
    ------
    UnknownName
        There is no such mitigation.
    UnsupportedModel
        The model cannot be traced, or has no activation that could be bounded.
    InvalidParameter
        An activation was not profiled, or the model has no such one.

    References
    ----------
    .. [1] Chen et al., "A Low-cost Fault Corrector for Deep Neural Networks through Range Restriction" (Ranger), DSN 2021.
    .. [2] Hoang et al., "FT-ClipAct: Resilience Analysis of Deep Neural Networks and Improving their Fault Tolerance using
       Clipped Activation", DATE 2020.
    .. [3] Ghavami et al., "FitAct: Error Resilient Deep Neural Networks via Fine-Grained Post-Trainable Activation Functions",
       DATE 2022.

    Examples
    --------
    >>> from collections import OrderedDict
    >>> import torch
    >>> from torch import nn
    >>> from textguard.faults import protect
    >>> model = nn.Sequential(OrderedDict(fc=nn.Linear(2, 2, bias=False), act=nn.ReLU())).eval()
    >>> _ = nn.init.eye_(model.fc.weight)
    >>> protected = protect(model, torch.zeros(2), {"act": (0.0, 1.5)}, "ranger")
    >>> protected(torch.tensor([[0.25, 1e9]])).detach()
    tensor([[0.2500, 1.5000]])
    """
    if mitigation not in MITIGATIONS:
        raise UnknownName("mitigation", mitigation, MITIGATIONS, Setting("mitigation"))
    if mitigation == "none":
        return model
    traced, names = _traced(model, image, mitigation)
    if left_out := _left_out(traced):
        print(
            f"mitigation {mitigation!r} leaves {len(left_out)} nonlinear steps without bounds: {', '.join(left_out[:8])}"
            f"{' ...' if left_out[8:] else ''}",
            file=sys.stderr,
            flush=True,
        )
    if unknown := [name for name in bounds if name not in names.values()]:
        raise InvalidParameter(f"the model has no activation {unknown[0]!r}; profile this model (stage 'ranges')")
    for index, name in names.items():
        if name not in bounds:
            raise InvalidParameter(f"activation {name!r} has no profiled range; profile the same model first (stage 'ranges')")
        _insert(traced, index, f"bound_{name}", _bound(traced, index, mitigation, *bounds[name]))
    traced.model.recompile()
    if getattr(model, "adapted", False):  # what it takes for images; see inputs.prepare
        traced.model.adapted = True
        traced.model.meta["another"] = another_of(model)  # copies of a traced model keep its `meta` alone
    return traced.model


def _traced(model: nn.Module, image: Tensor, mitigation: str) -> tuple[TracedModel, dict[int, str]]:
    """The traced model and its activations. Raises UnsupportedModel where there is nothing to bound."""
    try:
        traced = TracedModel(model, image)
    except UnsupportedModel as error:
        needs = " needs a model that can be traced; set it to none: "
        raise UnsupportedModel(Setting("mitigation"), f" {mitigation!r}", needs, *error.args) from error
    if names := activations(traced):
        return traced, names
    left_out = _left_out(traced)
    bending = f"; {', '.join(left_out)} is none that it knows" if left_out else ""
    raise UnsupportedModel(
        Setting("mitigation"),
        f" {mitigation!r} has nothing to bound: the model has no activation function{bending}; "
        "write it as one of torch.nn, or set it to none",
    )


def _bound(traced: TracedModel, index: int, mitigation: str, low: float, high: float | Tensor) -> Bound:
    """What keeps an activation in its range."""
    if mitigation != "learned":
        if isinstance(high, Tensor):
            raise InvalidParameter(f"thresholds per channel are for mitigation 'learned', not for {mitigation!r}")
        margin = ROUNDING * max(abs(low), abs(high))
        return Bound(low - margin, high + margin, to_zero=mitigation == "clip_to_zero")
    step, dimension = traced.steps[index], _channels(traced, index)
    count = traced.shapes[step][max(dimension - 1, -1)]
    if not isinstance(high, Tensor) or high.shape != (count,):
        raise InvalidParameter(f"activation {step.name!r} needs {count} thresholds, one per channel; see learn_thresholds")
    margin = ROUNDING * max(abs(low), float(high.abs().max()))
    return ChannelBound(low - margin, high.to(device_of(traced.model)) + margin, dimension)


def _insert(traced: TracedModel, index: int, label: str, module: nn.Module) -> None:
    """Put a module behind a step, before all that reads it."""
    step = traced.steps[index]
    traced.model.add_submodule(label, module)
    with traced.model.graph.inserting_after(step):
        bounded = traced.model.graph.call_module(label, (step,))
    step.replace_all_uses_with(bounded, delete_user_cb=lambda user: user is not bounded)


def _channels(traced: TracedModel, index: int) -> int:
    """The dimension of an activation's channels: 1 of feature maps, -1 of vectors, tokens and what a linear layer gives."""
    step = traced.steps[index]
    linear = any(traced.operation(source) in (nn.Linear, F.linear) for source in step.all_input_nodes)
    return 1 if len(traced.shapes[step]) == 3 and not linear else -1


class _Threshold(nn.Module):
    """A ChannelBound that is learned: above its thresholds it gives zero, and its gradient is that of a soft step."""

    def __init__(self, most: Tensor, dimension: int) -> None:
        super().__init__()
        self.most, self.dimension, self.share = most, dimension, nn.Parameter(torch.ones_like(most))

    @property
    def high(self) -> Tensor:
        """The thresholds now, float32 [C]."""
        # A channel that has no positive output has no smaller threshold.
        return self.most * torch.where(self.most > 0, self.share, 1.0)

    def forward(self, values: Tensor) -> Tensor:
        high, most = (along(vector, self.dimension, values.ndim) for vector in (self.high, self.most))
        passed = torch.where(values <= high.detach() + ROUNDING * most.abs(), values, 0.0)
        soft = values.detach() * torch.sigmoid((high - values.detach()) / (SOFT * most.abs() + torch.finfo(most.dtype).tiny))
        return passed + soft - soft.detach()


def learn_thresholds(
    model: nn.Module,
    loader: DataLoader,
    *,
    steps: int = 48,
    weight: float = 0.03,
    seed: int = 0,
    task: Task | str = CLASSES,
) -> dict[str, tuple[float, Tensor]]:
    """Learn for each channel of every activation above which threshold a value is taken for a fault.

    Thresholds begin at the channels' largest outputs. The network is frozen, and a few steps of Adam lower the loss plus
    `weight` times the mean threshold, as a share of where it began. If the network then gets more images wrong than before, by
    more than 0.5 % of at most 2,048 of them, thresholds go back halfway to where they began, until it does not.

    Parameters
    ----------
    model : torch.nn.Module
        From images [B, ...] to logits [B, C], on the device to use.
    loader : DataLoader
        Gives images and labels, from a map-style data set; mostly the training images.
    steps : int, default 48
        How many batches are learned from.
    weight : float, default 0.03
        What thresholds count for beside the loss.
    seed : int, default 0
        Of the order of the images.
    task : Task or its name, default that of an ordinary classifier
        What batches and logits mean.

    Returns
    -------
    dict of str to (float, Tensor)
        Name of the activation -> its lowest output, and the thresholds of its channels, float32 [C]; for `protect`.

    Raises
    ------
    UnsupportedModel
        The model cannot be traced, or has no activation.
    InvalidParameter
        A setting is out of range, or the loader does not give what the task needs.

    References
    ----------
    Ghavami et al., "FitAct: Error Resilient Deep Neural Networks via Fine-Grained Post-Trainable Activation Functions", DATE
    2022. There, every neuron has a threshold of its own.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.faults import learn_thresholds, protect
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> images = torch.randn(32, 4)
    >>> thresholds = learn_thresholds(model, DataLoader(TensorDataset(images, model(images).argmax(dim=1)), batch_size=8))
    >>> {name: tuple(high.shape) for name, (low, high) in thresholds.items()}
    {'_1': (8,)}
    >>> protected = protect(model, images[0], thresholds, "learned")
    """
    steps, seed = whole_number(Setting("steps"), steps, 1), whole_number(Setting("seed"), seed, 0)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight < math.inf:
        raise InvalidParameter(Setting("weight"), f" is {weight!r:.60}; it must be a number from 0 up")
    task = make_task(task)
    model, image = prepare(model, loader, task)
    with torch.inference_mode(False):
        traced, names = _traced(model, image, "learned")
        lows, thresholds = _largest(traced, names, loader, task)
        for name, module in thresholds.items():
            index = next(index for index, one in names.items() if one == name)
            _insert(traced, index, f"bound_{name}", module)
        traced.model.recompile()
        learned = traced.model.requires_grad_(False)
        shares = [module.share.requires_grad_() for module in thresholds.values()]
        before, checked = _count_correct(learned, loader, task)
        adam = torch.optim.Adam(shares, lr=RATE)
        for images, labels in _drawn(loader, image.device, steps, seed, task):
            adam.zero_grad()
            with torch.enable_grad():
                loss = task.loss(learned(images), labels).mean()
                (loss + weight * torch.cat(shares).mean()).backward()
            adam.step()
            for share in shares:
                share.data.clamp_(LEAST, 1.0)
        for _ in range(8):
            if _count_correct(learned, loader, task)[0] >= before - TOLERATED * checked:
                break
            for share in shares:
                share.data.add_(1.0).div_(2)
        else:
            for share in shares:
                share.data.fill_(1.0)
        return {name: (lows[name], module.high.detach()) for name, module in thresholds.items()}


@torch.no_grad()
def _largest(
    traced: TracedModel, names: Mapping[int, str], loader: DataLoader, task: Task
) -> tuple[dict[str, float], dict[str, _Threshold]]:
    """Activation -> its lowest output, and the thresholds of its channels at their largest outputs."""
    low, high = dict.fromkeys(names.values(), math.inf), {}
    for _, images, _ in batches(loader, device_of(traced.model), task=task):
        values = traced.inputs(images)
        for index in traced.walk(values):
            if index not in names:
                continue
            name, value = names[index], values[traced.steps[index]]
            most = value.movedim(_channels(traced, index), 0).flatten(1).amax(dim=1).float()
            high[name] = torch.maximum(high[name], most) if name in high else most
            low[name] = min(low[name], float(value.min()))
    for name, most in high.items():
        if not (math.isfinite(low[name]) and bool(most.isfinite().all())):
            raise UnsupportedModel(f"without any fault, activation {name!r} gives NaN or infinity")
    return low, {name: _Threshold(high[name], _channels(traced, index)) for index, name in names.items()}


def _drawn(loader: DataLoader, device: torch.device, steps: int, seed: int, task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """So many batches of images in random order, and again in another one where they are not enough."""
    read, size, rng = np.array(positions(loader)), loader.batch_size or 1, np.random.default_rng(seed)
    parts: list[Sequence[int]] = []
    while len(parts) < steps:
        order = rng.permutation(read).tolist()
        parts += [order[start : start + size] for start in range(0, len(order), size)]
    for _, images, labels in batches(loader, device, parts[:steps], task):
        yield images, labels


@torch.no_grad()
def _count_correct(model: nn.Module, loader: DataLoader, task: Task) -> tuple[int, int]:
    """How many of a loader's images a model gets right, and of how many: of all, or of CHECKED from all over them."""
    read, size, correct = positions(loader), loader.batch_size or 1, 0
    chosen = [read[number] for number in np.unique(np.linspace(0, len(read) - 1, min(CHECKED, len(read))).astype(int))]
    parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    for part, images, labels in batches(loader, device_of(model), parts, task):
        logits = check_logits(model(images), len(part), "the model", task)
        check_labels(logits, labels, task)
        correct += int(task.correct(logits, labels).sum())
    return correct, len(chosen)
