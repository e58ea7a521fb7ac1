"""What looks at values while a model runs: range detectors at the damaged value, and bounds on every activation."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from textguard.errors import InvalidParameter, Setting, UnknownName


def clamp_to_range(values: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Let a range detector look at values, and replace those that it takes for faults.

    A value is detected where it is NaN, infinite or larger in magnitude than `limit`. It then becomes -limit where it was
    negative, else +limit; a NaN becomes +limit. An infinite limit switches the detector off.

    Parameters
    ----------
    values : Tensor
        float32 [N].
    limit : Tensor
        float32 [N] or []. The largest magnitude that passes.

    Returns
    -------
    passed : Tensor
        float32 [N], the values behind the detector.
    detected : Tensor
        bool [N], which values were replaced.

    References
    ----------
    Mahmoud et al., "GoldenEye: A Platform for Evaluating Emerging Numerical Data Formats in DNN Accelerators", DSN 2022.

    Examples
    --------
    >>> import torch
    >>> from textguard.faults.detectors import clamp_to_range
    >>> clamp_to_range(torch.tensor([1.0, -7.0, float("nan")]), torch.tensor(4.0))
    (tensor([ 1., -4.,  4.]), tensor([False,  True,  True]))
    """
    armed = torch.isfinite(limit)
    detected = armed & ~(values.abs() <= limit)  # unlike `>`, this also holds for NaN
    replaced = torch.where(values < 0, -limit, limit)
    return torch.where(detected, replaced, values), detected


def detector_limits(detector: str, layers: Sequence[str], profiled: Mapping[str, float]) -> dict[str, float]:
    """The largest magnitude that each layer's range detector lets pass.

    Parameters
    ----------
    detector : str
        `profiled` for each layer's own profiled maximum, `fixed:X` for X in every layer, or `off`.
    layers : sequence of str
        The layers to give limits for.
    profiled : mapping of str to float
        Layer -> the largest magnitude of its fault-free outputs. Only `profiled` reads it.

    Returns
    -------
    dict of str to float
        Layer -> limit, infinite for `off`.

    Raises
    ------
    UnknownName
        There is no such detector.
    InvalidParameter
        X is not a positive fp32 number, or a layer was not profiled.

    Examples
    --------
    >>> from textguard.faults.detectors import detector_limits
    >>> detector_limits("profiled", ["conv1", "fc"], {"conv1": 2.5, "fc": 11.0})
    {'conv1': 2.5, 'fc': 11.0}
    >>> detector_limits("fixed:65536", ["conv1", "fc"], {})
    {'conv1': 65536.0, 'fc': 65536.0}
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
    """A module that lets only values within [low, high] pass.

    It replaces any other value by the nearer bound, and NaN by `low`. With `to_zero`, it replaces all of these by zero.

    Parameters
    ----------
    low, high : float
        The smallest and the largest value that pass.
    to_zero : bool
        Whether zero takes the place of what does not pass.

    Examples
    --------
    >>> import torch
    >>> from textguard.faults.detectors import Bound
    >>> values = torch.tensor([-3.0, 0.5, 9.0, float("nan")])
    >>> Bound(-1.0, 2.0, to_zero=False)(values)
    tensor([-1.0000,  0.5000,  2.0000, -1.0000])
    >>> Bound(-1.0, 2.0, to_zero=True)(values)
    tensor([0.0000, 0.5000, 0.0000, 0.0000])
    """

    def __init__(self, low: float, high: float, to_zero: bool) -> None:
        super().__init__()
        self.low, self.high, self.to_zero = low, high, to_zero

    def forward(self, values: Tensor) -> Tensor:
        """The values, float32 of any shape, as the bounds leave them."""
        if self.to_zero:
            return torch.where((values >= self.low) & (values <= self.high), values, 0.0)
        return torch.nan_to_num(values, nan=self.low, posinf=self.high, neginf=self.low).clamp(self.low, self.high)


class ChannelBound(Bound):
    """A module that lets only values up to their channel's threshold pass, and replaces all others, and NaN, by zero.

    Parameters
    ----------
    low : float
        The smallest value that passes.
    high : Tensor
        float32 [C], the largest value that passes in each channel. It is no buffer: faults in stored weights do not hit it.
    dimension : {1, -1}
        Which dimension of the values is the channel's.

    Examples
    --------
    >>> import torch
    >>> from textguard.faults.detectors import ChannelBound
    >>> ChannelBound(0.0, torch.tensor([1.0, 4.0]), dimension=-1)(torch.tensor([[2.0, 2.0], [0.5, float("nan")]]))
    tensor([[0.0000, 2.0000],
            [0.5000, 0.0000]])
    """

    def __init__(self, low: float, high: Tensor, dimension: int) -> None:
        nn.Module.__init__(self)
        self.low, self.high, self.dimension = low, high, dimension

    def forward(self, values: Tensor) -> Tensor:
        """The values, float32 of any shape, as the thresholds leave them."""
        return self.passed(values, along(self.high, self.dimension, values.ndim))

    def passed(self, values: Tensor, high: Tensor) -> Tensor:
        """The values as thresholds leave them that broadcast to their shape."""
        return torch.where((values >= self.low) & (values <= high), values, 0.0)


def along(vector: Tensor, dimension: int, rank: int) -> Tensor:
    """A vector [C] shaped to broadcast along dimension 1 or -1 of values with so many dimensions."""
    return vector.view(-1, *[1] * (rank - 2)) if dimension == 1 else vector
