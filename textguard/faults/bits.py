"""Bits of stored numbers, and the range detector that looks at a flipped value."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from textguard.errors import BitOutOfRange, InvalidParameter, UnknownName

FP32_BITS = 32  # bit 0 is the lowest mantissa bit, 23 the lowest exponent bit, 31 the sign


def flip_bit(values: Tensor, bit: Tensor) -> Tensor:
    """Invert one stored bit of each value.

    values: float32, shape [N]. bit: int64, shape [N], 0 (lowest mantissa bit) to 31 (sign).
    Returns float32 [N]; may be infinite or NaN. Raises BitOutOfRange.
    Source: IEEE 754-2019, section 3.4.
    """
    if values.dtype != torch.float32:
        raise BitOutOfRange(f"values are {values.dtype}; bits can be flipped in torch.float32")
    if bit.numel() and not 0 <= int(bit.min()) <= int(bit.max()) < FP32_BITS:
        raise BitOutOfRange(f"bits {int(bit.min())} to {int(bit.max())}; fp32 has bits 0 to {FP32_BITS - 1}")
    mask = torch.ones_like(bit, dtype=torch.int32) << bit.to(torch.int32)
    return (values.contiguous().view(torch.int32) ^ mask).view(torch.float32)


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
            raise InvalidParameter(f"params.yaml inject.detector is {detector!r}; X must be an fp32 number above 0")
        return dict.fromkeys(layers, limit)
    if detector == "profiled":
        missing = [layer for layer in layers if layer not in profiled]
        if missing:
            raise InvalidParameter(f"layer {missing[0]!r} has no profiled range; profile the same model first (stage 'ranges')")
        return {layer: profiled[layer] for layer in layers}
    raise UnknownName("detector", detector, ["profiled", "fixed:X", "off"], "params.yaml inject.detector")
