"""The mitigations that the field compares with. Each wraps any model and keeps every activation within its profiled range."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from textguard.errors import InvalidParameter, Setting, UnknownName, UnsupportedModel
from textguard.faults.detectors import Bound
from textguard.faults.graph import ACTIVATIONS, TracedModel

# Every bound is wider by this share of the larger one. In other batch sizes sums round differently, because these add in
# another order, and the profiled extremes have to stay in range there too.
ROUNDING = 1e-5
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
    return {index: step.name for index, step in enumerate(traced.steps) if traced.operation(step) in ACTIVATIONS}


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
        The model cannot be traced.
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
    names = activations(traced)
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
