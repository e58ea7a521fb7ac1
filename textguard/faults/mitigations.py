"""The mitigations that the field compares with. Each wraps any model and keeps every activation within its profiled range."""

import operator
import sys
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from textguard.errors import InvalidParameter, Setting, UnknownName, UnsupportedModel
from textguard.faults.detectors import Bound
from textguard.faults.graph import ACTIVATIONS, TracedModel

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
MITIGATIONS = ("none", "ranger", "clip_to_zero")
Mitigation = Literal["none", "ranger", "clip_to_zero"]


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


def protect(model: nn.Module, image: Tensor, bounds: Mapping[str, tuple[float, float]], mitigation: Mitigation) -> nn.Module:
    """Keep every activation of a model within its profiled range.

    Layers keep their names, so a campaign finds the same sites in the protected model.

    Parameters
    ----------
    model : nn.Module
        Any classifier that torch.fx can trace, from images [B, ...] to logits [B, C].
    image : Tensor
        One image, shape [...], on the model's device.
    bounds : mapping of str to (float, float)
        Name of the activation -> its lowest and its highest fault-free output, as `profile_activations` measures them.
    mitigation : {"none", "ranger", "clip_to_zero"}
        What takes the place of a value outside its range: `ranger` puts the nearer bound there [1]_, `clip_to_zero` zero [2]_.

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
    try:
        traced = TracedModel(model, image)
    except UnsupportedModel as error:
        needs = " needs a model that can be traced; set it to none: "
        raise UnsupportedModel(Setting("mitigation"), f" {mitigation!r}", needs, *error.args) from error
    names, left_out = activations(traced), _left_out(traced)
    if not names:
        bending = f"; {', '.join(left_out)} is none that it knows" if left_out else ""
        raise UnsupportedModel(
            Setting("mitigation"),
            f" {mitigation!r} has nothing to bound: the model has no activation function{bending}; "
            "write it as one of torch.nn, or set it to none",
        )
    if left_out:
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
        step, label = traced.steps[index], f"bound_{name}"
        low, high = bounds[name]
        margin = ROUNDING * max(abs(low), abs(high))
        traced.model.add_submodule(label, Bound(low - margin, high + margin, to_zero=mitigation == "clip_to_zero"))
        with traced.model.graph.inserting_after(step):
            bounded = traced.model.graph.call_module(label, (step,))
        step.replace_all_uses_with(bounded, delete_user_cb=lambda user, kept=bounded: user is not kept)
    traced.model.recompile()
    traced.model.adapted = getattr(model, "adapted", False)  # what it takes for images; see inputs.prepare
    return traced.model
