"""Mitigations that the field compares with, as wrappers of any model: every activation kept within its profiled range."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from textguard.errors import InvalidParameter, Setting, UnknownName
from textguard.faults.detectors import Bound
from textguard.faults.graph import ACTIVATIONS, TracedModel

# Other batch sizes add in other orders: the profiled extremes themselves must not be out of range.
ROUNDING = 1e-5
MITIGATIONS = ("none", "ranger", "clip_to_zero")
Mitigation = Literal["none", "ranger", "clip_to_zero"]


def activations(traced: TracedModel) -> dict[int, str]:
    """Index -> name of the steps that are activations."""
    return {index: step.name for index, step in enumerate(traced.steps) if traced.operation(step) in ACTIVATIONS}


def protect(model: nn.Module, image: Tensor, bounds: Mapping[str, tuple[float, float]], mitigation: Mitigation) -> nn.Module:
    """A copy of the model whose activations stay within `bounds` (name of the step -> lowest and highest profiled value).

    image: one image, shape [...]. `ranger` puts the nearer bound in the place of values outside, `clip_to_zero` zero. Layers
    keep their names, so that the sites of a campaign stay the same. Raises UnknownName, UnsupportedModel, or InvalidParameter
    when an activation was not profiled. Sources: Chen et al., DSN 2021 (Ranger); Hoang et al., DATE 2020 (FT-ClipAct).
    """
    if mitigation not in MITIGATIONS:
        raise UnknownName("mitigation", mitigation, MITIGATIONS, Setting("mitigation"))
    if mitigation == "none":
        return model
    traced = TracedModel(model, image)
    for index, name in activations(traced).items():
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
    return traced.model
