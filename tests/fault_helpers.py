"""Faults to inject in tests, and what it means that two engines agree on what they did."""

from collections.abc import Sequence

import torch
from torch import nn

from textguard.faults.damage import SINGLE_FLIP, FaultModel, Faults, operate
from textguard.faults.detectors import clamp_to_range
from textguard.faults.engines import Engine, Outcomes
from textguard.faults.formats import FP32

# Engines add up in different orders: convolutions of other batch sizes and memory formats, folded BatchNorm. Logits are
# compared in units of the largest of the C where that is above 1: after a fault of 1e38, small ones are what is left of large
# ones.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
# Finite, but near the largest fp32 number: there it depends on the order of additions whether a sum overflows.
OVERFLOWS = 1e30
OFF = float("inf")  # the limit of a range detector that lets everything pass


def make_faults(
    position: torch.Tensor | Sequence[int],
    image: torch.Tensor | Sequence[int],
    neuron: torch.Tensor | Sequence[int],
    mask: torch.Tensor | Sequence[int] | int,
    limit: float | Sequence[float] = OFF,
    model: FaultModel = SINGLE_FLIP,
) -> Faults:
    """Faults in one value each, one entry per fault; `mask` and `limit` may be one number for all."""
    position, image, neuron = (torch.as_tensor(column) for column in (position, image, neuron))
    row = torch.arange(len(position))
    mask, limit = (torch.as_tensor(column).expand(len(row)) for column in (mask, limit))
    return Faults(model, position, image, limit.float(), row, neuron, mask)


def random_faults(
    engine: Engine,
    images: int,
    count: int,
    limit: float,
    layers: Sequence[str] | None = None,
    bits: Sequence[int] = range(32),
) -> Faults:
    """Single flips of random neurons, of all layers or of the given ones in turn."""
    draw = torch.Generator().manual_seed(0)
    named = {site.layer: site.position for site in engine.sites}
    choice = torch.tensor([named[layer] for layer in layers or named])
    position = choice[torch.arange(count) % len(choice)]
    neurons = torch.tensor([site.neurons for site in engine.sites])[position]
    image = torch.randint(images, (count,), generator=draw)
    neuron = (torch.rand(count, generator=draw) * neurons).long()
    bit = torch.tensor(bits)[torch.randint(len(bits), (count,), generator=draw)]
    return make_faults(position, image, neuron, 1 << bit, limit)


def close(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which rows of two logits [N, C] agree; NaN equals NaN, and infinities those of their sign."""
    unit = b.abs().nan_to_num(0.0, 0.0, 0.0).amax(dim=1, keepdim=True).clamp(min=1)
    return torch.isclose(a / unit, b / unit, equal_nan=True, **TOLERANCE).all(dim=1)


def assert_same(a: Outcomes, b: Outcomes, faults: Faults, least: float = 0.97) -> None:
    """Outcomes of two engines agree: golden values and logits to TOLERANCE, the rest exactly."""
    torch.testing.assert_close(a.golden_value, b.golden_value, **TOLERANCE)
    assert close(a.golden_logits, b.golden_logits).all()
    for outcomes in (a, b):
        codes = operate(FP32.encode(outcomes.golden_value, None, None), faults.mask, faults.model.operation)
        expected, detected = clamp_to_range(FP32.decode(codes, None, None), faults.limit)
        torch.testing.assert_close(outcomes.faulty_value, expected, equal_nan=True, rtol=0, atol=0)
        assert torch.equal(outcomes.detected, detected)
        assert torch.equal(outcomes.logits[outcomes.masked], outcomes.golden_logits[faults.image[outcomes.masked]])
    # Golden values that lie a rounding apart can lie on two sides of a carry, where one bit flips to values further apart.
    closer = {name: bound / 10 for name, bound in TOLERANCE.items()}
    same = torch.isclose(a.faulty_value, b.faulty_value, equal_nan=True, **closer)
    assert same.float().mean() > least
    assert torch.equal(a.detected[same], b.detected[same])
    certain = same & ~(b.faulty_value.isfinite() & (b.faulty_value.abs() > OVERFLOWS))
    wrong = certain & ~close(a.logits, b.logits)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {len(wrong)} faults, the first in site {faults.position[wrong][0]}, neuron "
        f"{faults.neuron[wrong][0]}: {a.logits[wrong][0].tolist()} and {b.logits[wrong][0].tolist()}"
    )
    mismatch_a, mismatch_b = (o.logits.argmax(dim=1) != o.golden_logits.argmax(dim=1)[faults.image] for o in (a, b))
    assert torch.equal(mismatch_a[certain], mismatch_b[certain])


def make_constant(layer: nn.Module, channel: int, value: float) -> None:
    """Let a channel of the layer be `value` everywhere. Flipping bit 30 makes 1 infinite, and 1.5 NaN."""
    with torch.no_grad():
        layer.weight[channel] = 0
        layer.bias[channel] = value
