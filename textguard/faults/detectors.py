"""What looks at values while a model runs: range detectors at the damaged value, and bounds on every activation."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from textguard.errors import InvalidParameter, Setting, UnknownName


def clamp_to_range(values: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """A range detector's view of injected values, and what it puts in their place.

    values: float32, shape [N]. limit: float32, shape [N] or [], the largest magnitude seen in fault-free runs.
    Returns the values, where those that are NaN, infinite or larger in magnitude than `limit` have become -limit if they
    were negative, else +limit (NaN becomes +limit); and the bool mask [N] of the replaced ones. An infinite limit switches the
    detector off. Source: GoldenEye, DSN 2022.
    """
    armed = torch.isfinite(limit)
    detected = armed & ~(values.abs() <= limit)  # the negation also holds for NaN
    replaced = torch.where(values < 0, -limit, limit)
    return torch.where(detected, replaced, values), detected


def detector_limits(detector: str, layers: Sequence[str], profiled: Mapping[str, float]) -> dict[str, float]:
    """The magnitude that each layer's detector lets pass.

    detector: `profiled` (each layer's own maximum over the training set), `fixed:X` (X for every layer), or `off`.
    Returns layer -> limit, infinite for `off`. Raises UnknownName, or InvalidParameter when a layer was not profiled.
    """
    name, _, value = detector.partition(":")
    if detector == "off":
        return dict.fromkeys(layers, float("inf"))
    if name == "fixed":
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if not 0 < limit <= torch.finfo(torch.float32).max:
            raise InvalidParameter(Setting("detector"), f" is {detector!r}; X must be an fp32 number above 0")
        return dict.fromkeys(layers, limit)
    if detector == "profiled":
        missing = [layer for layer in layers if layer not in profiled]
        if missing:
            raise InvalidParameter(f"layer {missing[0]!r} has no profiled range; profile the same model first (stage 'ranges')")
        return {layer: profiled[layer] for layer in layers}
    raise UnknownName("detector", detector, ["profiled", "fixed:X", "off"], Setting("detector"))


class Bound(nn.Module):
    """Replaces values outside [low, high], NaN among them: by the nearer bound, or by zero (NaN by `low`, or by zero)."""

    def __init__(self, low: float, high: float, to_zero: bool) -> None:
        super().__init__()
        self.low, self.high, self.to_zero = low, high, to_zero

    def forward(self, values: Tensor) -> Tensor:
        if self.to_zero:
            return torch.where((values >= self.low) & (values <= self.high), values, 0.0)
        return torch.nan_to_num(values, nan=self.low, posinf=self.high, neginf=self.low).clamp(self.low, self.high)
