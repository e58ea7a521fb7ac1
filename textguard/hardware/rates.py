"""Many faults at once: a classifier's accuracy against the bit error rate of the memory that holds its weights.

At a bit error rate p every stored bit is at fault with probability p, independently of the others. A memory is one draw, and
all images see it. Which data bits of a tensor are at fault depends on the seed, the memory, the tensor's size and its number
among those of that size, in the order in which an inference reads them. So a bit that is at fault at some rate is so at every
higher one, under every protection, and in every model that begins with the same layers, and curves can be compared memory by
memory.
"""

import hashlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from scipy.special import stdtrit
from torch import Tensor, nn
from torch.utils.data import DataLoader

from textguard.artifacts import read_json, weights_mark, write_json
from textguard.errors import CampaignMismatch, InvalidArtifact, InvalidParameter, Setting, UnsupportedModel
from textguard.estimates.statistics import CONFIDENCE, Estimate, rate_estimate, sample_mean, studentised
from textguard.faults.checks import checked_name, confidence_level, folder_path, some_text, whole_number
from textguard.faults.copying import copy_model
from textguard.faults.damage import Operation
from textguard.faults.exported import evaluation
from textguard.faults.formats import FP32, Format, parse_format, stored_as
from textguard.faults.graph import unwrapped
from textguard.faults.inputs import batches, check_labels, check_logits, positions, prepare
from textguard.faults.plans import uniform_numbers
from textguard.faults.sites import uncompiled
from textguard.faults.task import CLASSES, Task, make_task
from textguard.hardware.protection import Code, Protection, Read, parse_protection
from textguard.hardware.stored import stored_tensors, tensors_of
from textguard.runtime import progress, share_work, wait_for_all

HIGHEST_RATE = 0.5  # beyond it, a memory is a worse one of the other bits
KEPT_BYTES = 2**31  # of images that are kept for all memories; more are read again for each
RESAMPLES = 2000
PROBED = 256  # images that suggested rates are tried on
COUNTS = ("flips", "corrected", "detected", "silent", "wrong")
OUTCOMES = ("top1", "lost", "changed", "delta_loss", "nonfinite")
MEMORY_COLUMNS = ["rate", "memory", *COUNTS, *OUTCOMES]


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a model, in memory: its values, how they are stored, and how their words are protected."""

    name: str
    values: Tensor  # [n], a view of the model's own
    format: Format
    limit: Tensor
    code: Code

    def codes(self, index: Tensor) -> Tensor:
        """The codes of some values, int64 [V]."""
        return self._encode(self.values[index])

    def _encode(self, values: Tensor) -> Tensor:
        return self.format.encode(values, self.limit, torch.zeros_like(values, dtype=torch.int64))

    def round(self) -> None:
        """Store the values, in place."""
        codes = self._encode(self.values)
        self.values.copy_(self.format.decode(codes, self.limit, torch.zeros_like(codes)))

    def damage(self, index: Tensor, mask: Tensor, zeroed: Tensor) -> Tensor:
        """Let some values be read wrong. Returns what they were, [V]."""
        before, codes = self.values[index], self.codes(index) ^ mask
        faulty = self.format.decode(codes, self.limit, torch.zeros_like(codes)).to(before.dtype)
        self.values[index] = torch.where(zeroed, torch.zeros_like(faulty), faulty)
        return before


@torch.no_grad()
def _stored(model: nn.Module, image: Tensor, number_format: Format, protection: Protection) -> list[_Tensor]:
    """The float parameters and buffers that an inference reads, tied ones once, rounded to their format in place.

    What products read, such as the weights of convolutions, is stored in the number format. Biases, norms with their statistics
    and other vectors keep their own type, as in campaigns.
    """
    tensors = tensors_of(model)
    found: list[_Tensor] = []
    seen: set[tuple[int, int]] = set()
    for stored in stored_tensors(model, image):
        tensor = tensors[stored.name]
        tensor.data = tensor.data.contiguous()
        if (place := (tensor.data_ptr(), tensor.numel())) in seen:
            continue
        seen.add(place)
        own, native = stored_as(number_format if stored.product else FP32, stored.dtype, repr(stored.name))
        limit = tensor.abs().max().float()
        one = _Tensor(stored.name, tensor.data.view(-1), own, limit, protection.code(own))
        if not native:
            one.round()
        found.append(one)
    return found


class _Memory:
    """The memory that holds a model's weights, with all cells numbered: data bits, and check bits.

    Parameters
    ----------
    tensors : sequence of _Tensor
        What it holds.
    seed : int
        The seed of all draws.
    protection : str
        The name of the protection, which decides on the check bits that are at fault.
    operation : {"flip", "stuck_at_0", "stuck_at_1"}
        What happens to a bit that is at fault.
    """

    def __init__(self, tensors: Sequence[_Tensor], seed: int, protection: str, operation: Operation) -> None:
        self.tensors, self._seed, self._protection, self._operation = tensors, seed, protection, operation
        count: dict[str, int] = {}
        self._streams = []
        for one in tensors:
            size = f"{len(one.values)} values of {one.code.bits} bits"
            count[size] = count.get(size, 0) + 1
            self._streams.append(f"{size}, {count[size]}")

    @property
    def data_bits(self) -> int:
        """Bits of the values."""
        return sum(len(one.values) * one.code.bits for one in self.tensors)

    @property
    def stored_bits(self) -> int:
        """These, and check bits."""
        return self.data_bits + sum(one.code.check_bits(len(one.values)) for one in self.tensors)

    @property
    def gates(self) -> float:
        """Two-input gates to read all values once; see `Code.operations`."""
        return sum(len(one.values) * one.code.operations for one in self.tensors)

    def draw(self, number: int, rate: float) -> list[tuple["_Cells", "_Cells"]]:
        """For each tensor, the data and the check cells that are at fault in a memory at a rate."""
        found = []
        for one, size in zip(self.tensors, self._streams, strict=True):
            values, stream = len(one.values), f"memory {number}, {size}"
            data = _draw_cells(self._seed, stream, values * one.code.bits, rate)
            found.append((data, _draw_cells(self._seed, f"{stream}, {self._protection}", one.code.check_bits(values), rate)))
        return found

    def read(
        self, cells: Sequence[tuple["_Cells", "_Cells"]], rate: float
    ) -> tuple[dict[str, int], list[tuple[_Tensor, Read]]]:
        """What is read at a rate no higher than that the cells were drawn for: counts, and the tensors that are read wrong."""
        counts, wrong = dict.fromkeys(COUNTS, 0), []
        for one, (data, checks) in zip(self.tensors, cells, strict=True):
            size = len(one.values)
            errors = np.concatenate([data.at(rate), checks.at(rate) + size * one.code.bits])
            if not len(errors):
                continue
            if self._operation != "flip":
                errors = one.code.stuck(size, errors, int(self._operation[-1]), lambda index, one=one: self._codes(one, index))
            found = one.code.correct(size, errors)
            for name, number in zip(
                COUNTS, (len(errors), found.corrected, found.detected, found.silent, len(found.value)), strict=True
            ):
                counts[name] += number
            if len(found.value):
                wrong.append((one, found))
        return counts, wrong

    @staticmethod
    def _codes(one: _Tensor, index: np.ndarray) -> np.ndarray:
        return one.codes(torch.from_numpy(index).to(one.values.device)).cpu().numpy()


@dataclass(frozen=True)
class _Cells:
    """Cells at fault, in the order in which a rising rate adds them. exposure: -log(1 - the rate from which on they are)."""

    position: np.ndarray
    exposure: np.ndarray

    def at(self, rate: float) -> np.ndarray:
        """Those at a rate no higher than that they were drawn for, int64 [F]."""
        return self.position[: np.searchsorted(self.exposure, -math.log1p(-rate))]


def _draw_cells(seed: int, stream: str, cells: int, rate: float) -> _Cells:
    """The cells of a memory that are at fault at a rate, which follow from (seed, stream, cells) alone.

    Each cell has a uniform number, and is at fault at all rates above it. Only the smallest ones are drawn, in their order: by
    Rényi's representation the exposure of the k-th is the sum of exponential numbers over how many cells were left. So their
    count at a rate is binomial. Positions are uniform ones; one that was there before is passed over.

    References
    ----------
    Rényi, "On the theory of order statistics", Acta Mathematica Academiae Scientiarum Hungaricae 4, 1953.
    """
    most, expected = -math.log1p(-rate), cells * rate
    count = min(cells, math.ceil(expected + 8 * math.sqrt(expected) + 16))  # enough but once in many lives
    while True:
        steps = -np.log1p(-uniform_numbers(seed, f"{stream} when", count, 1)[:, 0])
        exposure = np.cumsum(steps / (cells - np.arange(count)))
        if count == cells or exposure[-1] > most:
            break
        count = min(cells, 2 * count)
    exposure = exposure[: np.searchsorted(exposure, most)]
    count = draws = len(exposure)
    position = np.empty(0, dtype=np.int64)
    while len(position) < count:
        drawn = (uniform_numbers(seed, f"{stream} where", draws, 1)[:, 0] * cells).astype(np.int64)
        position = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        draws = 2 * draws
    return _Cells(position[:count], exposure)


class _Images:
    """The images of a loader with their golden outcome, kept for all memories where they are few enough."""

    def __init__(
        self, model: nn.Module, loader: DataLoader, device: torch.device, batch_size: int, task: Task, most: int | None = None
    ) -> None:
        self._model, self._loader, self._device, self._task = model, loader, device, task
        read = positions(loader)[:most]
        self._parts = [read[start : start + batch_size] for start in range(0, len(read), batch_size)]
        self._kept: list[tuple[Tensor, Tensor]] | None = []
        self._golden: list[tuple[Tensor, Tensor, Tensor]] = []
        correct = eligible = size = 0
        for images, labels in self._read():
            logits = check_logits(self._infer(images), len(images), "the model", task)
            check_labels(logits, labels, task)
            if not self._golden and not torch.allclose(self._infer(images), logits, rtol=1e-3, atol=1e-4, equal_nan=True):
                raise UnsupportedModel(
                    f"the model gives other logits for the same {len(images)} images when it is run again: it is random or "
                    "keeps a state; write F.dropout(x, p, self.training), and take noise out of forward"
                )
            right = task.correct(logits, labels)
            certain = right & (task.certainty(logits) > 0)
            self._golden.append((logits, task.loss(logits, labels).double(), certain))
            correct, eligible = correct + int(right.sum()), eligible + int(certain.sum())
            size += images.numel() * images.element_size()
            if self._kept is not None:
                self._kept.append((images, labels))
                self._kept = self._kept if size <= KEPT_BYTES else None
        self.count, self.eligible, self.top1 = len(read), eligible, correct / len(read)
        if not eligible:
            raise InvalidParameter(f"no image is eligible: the fault-free model has top-1 {self.top1:.1%}; train it longer")

    @property
    def chance(self) -> float:
        """The share of the commonest label, or 0 where labels are no single numbers."""
        labels = torch.cat([labels for _, labels in self._kept or self._read()])
        return float(labels.unique(return_counts=True)[1].max()) / self.count if labels.ndim == 1 else 0.0

    @property
    def mark(self) -> str:
        """A fingerprint of the first batch and of which images there are."""
        images, labels = next(iter(self._kept or self._read()))
        digest = hashlib.sha256(repr(self._parts).encode())
        for tensor in (images, labels):
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _read(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _, images, labels in batches(self._loader, self._device, self._parts, self._task):
            yield images, labels

    def _infer(self, images: Tensor) -> Tensor:
        logits = self._model(images.clone())
        return logits.float() if isinstance(logits, Tensor) else logits

    @property
    def unharmed(self) -> dict[str, float]:
        """The outcome of a memory that is read as it was written."""
        return {"top1": self.top1, "lost": 0.0, "changed": 0.0, "delta_loss": 0.0, "nonfinite": 0.0}

    def outcome(self) -> dict[str, float]:
        """What the model, as it is now, makes of all images: OUTCOMES."""
        correct = changed = nonfinite = finite = 0
        total = 0.0
        for (images, labels), (golden, loss, eligible) in zip(self._kept or self._read(), self._golden, strict=True):
            logits = self._infer(images)
            faulty = self._task.loss(logits, labels).double()
            known = faulty.isfinite()
            correct += int((self._task.correct(logits, labels) & known).sum())
            changed += int((self._task.differs(logits, golden) | (~known & loss.isfinite())).sum())
            total += float((faulty - loss).abs()[eligible & known].sum())
            finite += int((eligible & known).sum())
            nonfinite += int((eligible & ~known).sum())
        return {
            "top1": correct / self.count,
            "lost": 100 * (self.top1 - correct / self.count),
            "changed": changed / self.count,
            "delta_loss": total / finite if finite else math.nan,
            "nonfinite": nonfinite / self.eligible,
        }


@dataclass(frozen=True)
class RateCurve:
    """What a classifier loses against the bit error rate of its memory.

    Intervals are over memories, with the images as they are. See `points` and `losing` for how they are made.

    Attributes
    ----------
    settings : dict
        `number_format`, `protection`, `operation`, `seed`, `images` and `eligible` (their numbers), `golden_top1`, `data_bits`,
        `stored_bits` (with check bits) and `gates` (of two inputs, to read all values once).
    memories : pandas.DataFrame
        One row per rate and memory: `rate`, `memory`; `flips` (stored bits that differ from what was written); words
        `corrected`, `detected` and `silent` (see `Read`); `wrong` (values that are read wrong, or as zero); `top1`; `lost`
        (points of accuracy); `changed` (share of images whose prediction changes, or whose loss becomes NaN or infinite);
        `delta_loss` (nats, mean over eligible images with a finite loss; NaN where there is none); and `nonfinite` (share of
        eligible images whose loss is NaN or infinite, which count as wrong).
    confidence : float
        Of intervals.

    Examples
    --------
    >>> import pandas as pd
    >>> from textguard.hardware.rates import MEMORY_COLUMNS, RateCurve
    >>> rows = [(rate, memory, 1, 0, 0, 1, 1, 0.9 - lost / 100, lost, 0.1, 0.5, 0.0)
    ...         for rate, losses in ((1e-6, (0, 0, 0, 2)), (1e-5, (0, 4, 30, 6))) for memory, lost in enumerate(losses)]
    >>> curve = RateCurve({"golden_top1": 0.9}, pd.DataFrame(rows, columns=MEMORY_COLUMNS))
    >>> [curve.points[rate]["lost"].value for rate in curve.rates]
    [0.5, 10.0]
    >>> f"{curve.losing(1).value:.2g}"
    '1.5e-06'
    """

    settings: Mapping[str, Any]
    memories: pd.DataFrame = field(repr=False)
    confidence: float = CONFIDENCE

    @property
    def rates(self) -> list[float]:
        """The bit error rates, ascending."""
        return sorted(self.memories["rate"].unique().tolist())

    @property
    def _most(self) -> float:
        """The points of accuracy that there are to lose."""
        return 100 * self.settings["golden_top1"]

    def _lost(self, memories: Sequence[int] | None = None) -> np.ndarray:
        """Points lost by all memories or some, float [memories, rates], in the order of their numbers."""
        table = self.memories.pivot(index="memory", columns="rate", values="lost").sort_index(axis=1)
        return (table if memories is None else table.loc[memories]).to_numpy()

    @cached_property
    def points(self) -> dict[float, dict[str, Estimate]]:
        """Rate -> `top1`, `lost`, `changed`, `delta_loss` and `nonfinite`: means over memories with their intervals.

        Intervals are Student's, corrected for skewness as in Hall (1992). At low rates few memories lose much, and at high ones
        few lose little, and these may not be among those drawn. So each end is that of the same sample with one more memory:
        one that loses nothing, and one that is as bad as can be. It loses all accuracy, changes all predictions, or has twice
        the largest DeltaLoss at that rate, or the largest at any.
        """
        found = {}
        highest = self.memories["delta_loss"].max()
        for rate, rows in self.memories.groupby("rate"):
            own = rows["delta_loss"].dropna().to_numpy()
            worst = 2 * float(own.max()) if own.any() else float(highest)
            lost = _mean(rows["lost"].to_numpy(), self._most, self.confidence, self._most - 100, self._most)
            top1 = (self._most - np.array([lost.value, lost.high, lost.low])) / 100
            found[float(rate)] = {
                "top1": Estimate(*(float(one) for one in top1), lost.n, lost.error / 100),
                "lost": lost,
                "changed": _mean(rows["changed"].to_numpy(), 1.0, self.confidence, 0.0, 1.0),
                "delta_loss": _mean(own, worst, self.confidence, 0.0, math.inf),
                "nonfinite": _mean(rows["nonfinite"].to_numpy(), 1.0, self.confidence, 0.0, 1.0),
            }
        return found

    def losing(self, points: float) -> Estimate:
        """The bit error rate at which the model loses so many points of accuracy, in the mean over memories.

        Between rates, the mean is a line that begins with nothing lost at rate 0, made monotone. The upper end of the interval
        is where the lower limit of the mean, as in `points`, reaches `points`. The lower end uses that more flips do not help.
        The faults of m memories at rate p make one memory at rate r = 1 - (1 - p)^m, so a loss that has probability P at rate r
        has at most 1 - (1 - P)^(1/m) at rate p [1]_. So a rate where many memories lose much limits the mean at lower ones,
        where few do. It is the first whose mean is a sixth of the accuracy, and at least `points`. The limit is a percentile of
        the bootstrap over memories, to which two are added: one that loses all, and one that loses nothing. Where no rate does
        that, few memories or none have lost much; then the limit is no higher than with the upper end of the mean at the
        highest rate, taken for that of memories that lose all or nothing.

        Parameters
        ----------
        points : float
            Above 0, below the fault-free accuracy in percent.

        Returns
        -------
        Estimate
            Its value and its upper end are infinite where no rate was high enough.

        Raises
        ------
        InvalidParameter
            There are not so many points to lose.

        References
        ----------
        .. [1] Bollobás and Thomason, "Threshold functions", Combinatorica 7, 1987.
        """
        if not 0 < points < self._most:
            raise InvalidParameter(Setting("points"), f" is {points!r:.60}; it must be above 0 and below {self._most:.4g}")
        rates, lost = np.array(self.rates), self._lost()
        value = float(_crossings(rates, lost.mean(axis=0), points))
        lows = [self.points[rate]["lost"].low for rate in self.rates]
        high = float(_crossings(rates, np.maximum.accumulate(lows), points))
        enough = np.flatnonzero(_monotone(lost.mean(axis=0)) >= max(points, self._most / 6))
        at = int(enough[0]) if len(enough) else len(rates) - 1
        shares = _shares_of_exposure(lost[:, at], self._most, points)
        share = float(np.quantile(shares, (1 - self.confidence) / 2))
        above = self.points[self.rates[at]]["lost"].high
        if not len(enough) and above > points:
            all_or_nothing = math.log1p(-points / self._most) / math.log1p(-above / self._most) if above < self._most else 0.0
            share = min(share, all_or_nothing)
        exposure = -math.log1p(-rates[at]) * share
        return Estimate(value, min(float(-np.expm1(-exposure)), value), max(high, value), len(lost))

    def compare(self, other: "RateCurve", points: float) -> Estimate:
        """By how many times this model's memory may err more often than another's, until it has lost so many points.

        Memories are paired by their numbers: they have the same bits at fault where both models store as many. The ends of the
        interval are percentiles of the bootstrap over memories. Each end has one more memory, which speaks against it: at every
        rate one model loses the most of all memories there, and the other one the least.

        Parameters
        ----------
        other : RateCurve
            Of the other model or protection.
        points : float
            As for `losing`.

        Returns
        -------
        Estimate
            The ratio of both `losing` rates; an end is 0 or infinite where rates do not show one, and NaN stands for a ratio of
            two rates that none was high enough for.

        Raises
        ------
        InvalidParameter
            The curves have no two memories in common, or one has not so many points to lose.
        """
        common = sorted(set(self.memories["memory"]) & set(other.memories["memory"]))
        if len(common) < 2:
            raise InvalidParameter("the curves have fewer than two memories in common; give both the same memories")
        value = float(_ratios(*(np.array(curve.losing(points).value) for curve in (self, other))))
        draws = np.random.default_rng(0).multinomial(len(common), np.full(len(common), 1 / len(common)), size=RESAMPLES)
        draws = np.concatenate([draws, np.ones((RESAMPLES, 1), dtype=int)], axis=1) / (len(common) + 1)
        tail, ends = (1 - self.confidence) / 2, []
        for level, method, unknown, kinds in ((tail, "lower", 0.0, "max min"), (1 - tail, "higher", math.inf, "min max")):
            crossings = []
            for curve, kind in zip((self, other), kinds.split(), strict=True):
                lost = curve._lost(common)
                means = draws @ np.vstack([lost, getattr(lost, kind)(axis=0)])
                crossings.append(_crossings(curve.rates, means, points))
            ratios = _ratios(*crossings, unknown)
            ends.append(float(np.quantile(ratios, level, method=method)))
        return Estimate(value, min(ends[0], value), max(ends[1], value), len(common))

    def as_json(self) -> dict[str, Any]:
        """The curve as a metrics file holds it: settings, memories by column, and the estimates of `points`.

        Returns
        -------
        dict
            Keys `settings`, `confidence`, `memories` and `points`; NaN are None. `from_json` reads it.
        """
        columns = {name: [_plain(one) for one in self.memories[name].tolist()] for name in MEMORY_COLUMNS}
        points = [
            {"rate": rate} | {name: estimate.as_json() for name, estimate in found.items()}
            for rate, found in self.points.items()
        ]
        return {"settings": dict(self.settings), "confidence": self.confidence, "memories": columns, "points": points}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "RateCurve":
        """The curve that `as_json` made this of."""
        memories = pd.DataFrame({name: found["memories"][name] for name in MEMORY_COLUMNS})
        memories = memories.astype(dict.fromkeys(("rate", *OUTCOMES), "float64"))
        return cls(found["settings"], memories, found["confidence"])


def _plain(number: float) -> float | None:
    return None if isinstance(number, float) and not math.isfinite(number) else number


def _mean(values: np.ndarray, worst: float, confidence: float, least: float, most: float) -> Estimate:
    """The mean over memories, with the interval that `RateCurve.points` describes, cut where values end."""
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan, 0)
    t = float(stdtrit(len(values) - 1, 0.5 + confidence / 2)) if len(values) > 1 else math.nan
    ends = []
    for unseen, quantile in ((min(0.0, values.min()), t), (worst, -t)):
        sample = sample_mean([values], [1.0], [unseen])
        changed = (values != unseen).any()  # else the one more memory is like all others
        ends.append(sample.value + (sample.unseen[0] - studentised(sample.with_unseen, quantile) if changed else 0.0))
    low, high = (float(np.clip(end, least, most)) for end in ends)
    if math.isfinite(most):
        # No values between 0 and `most` vary more than hits and misses do.
        score = rate_estimate(len(values) * min(max(sample.value / most, 0.0), 1.0), len(values), confidence)
        if sample.value < most / 2:
            high = min(high, most * score.high)
        elif values.min() >= 0:
            low = max(low, most * score.low)
    return Estimate(sample.value, low, high, sample.n, sample.error)


def _crossings(rates: Sequence[float], means: np.ndarray, points: float) -> np.ndarray:
    """Where means over rates, [..., rates], reach `points`: [...]; infinite where they do not.

    Each is made monotone, begins with 0 at rate 0, and is a line between rates.
    """
    means = np.maximum(_monotone(np.asarray(means, dtype=float)), 0)
    means, known = np.concatenate([np.zeros((*means.shape[:-1], 1)), means], axis=-1), np.append(0.0, rates)
    at = np.maximum((means >= points).argmax(axis=-1), 1)
    before, after = (np.take_along_axis(means, index[..., None], axis=-1)[..., 0] for index in (at - 1, at))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = known[at - 1] + (known[at] - known[at - 1]) * (points - before) / (after - before)
    return np.where(after >= points, found, math.inf)


def _monotone(means: np.ndarray) -> np.ndarray:
    """The nearest numbers, in the sum of squares, that do not fall along the last axis, [..., R].

    At i it is the largest, over all starts up to i, of the smallest mean from there to an end from i on.
    """
    sums = np.concatenate([np.zeros((*means.shape[:-1], 1)), means.cumsum(axis=-1)], axis=-1)
    fitted = np.full_like(means, -math.inf)
    for start in range(means.shape[-1]):
        averages = (sums[..., start + 1 :] - sums[..., start : start + 1]) / np.arange(1, means.shape[-1] - start + 1)
        smallest = np.minimum.accumulate(averages[..., ::-1], axis=-1)[..., ::-1]
        fitted[..., start:] = np.maximum(fitted[..., start:], smallest)
    return fitted


def _ratios(mine: np.ndarray, theirs: np.ndarray, unknown: float = math.nan) -> np.ndarray:
    """The ratios of crossings; `unknown` where both are infinite."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(mine) & np.isinf(theirs), unknown, mine / theirs)


def _shares_of_exposure(lost: np.ndarray, most: float, points: float) -> np.ndarray:
    """Down to which share of the exposure the mean loss may still be `points`: float [RESAMPLES], of the bootstrap.

    lost: of the memories at one rate. most: what there is to lose. At a share a of the exposure, a loss that has probability P
    has at most 1 - (1 - P)^a.
    """
    extremes, count = np.array([0.0, most]), len(lost) + 2
    chosen = lost[np.random.default_rng(0).integers(len(lost), size=(RESAMPLES, len(lost)))]
    ordered = np.sort(np.concatenate([chosen.clip(min=0), np.tile(extremes, (RESAMPLES, 1))], axis=1), axis=1)
    steps = np.diff(ordered, axis=1, prepend=0.0)  # of the loss, each reached by the memories from it on
    fewer = np.arange(count) / count  # 1 - P
    low, high = np.zeros(RESAMPLES), np.ones(RESAMPLES)
    for _ in range(40):
        middle = (low + high) / 2
        enough = (steps * (1 - fewer ** middle[:, None])).sum(axis=1) >= points
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return high


@torch.inference_mode()
def error_rates(
    model: nn.Module,
    loader: DataLoader,
    rates: Sequence[float],
    *,
    memories: int = 32,
    number_format: str = "fp32",
    protection: str = "none",
    operation: Operation = "flip",
    seed: int = 0,
    batch_size: int = 256,
    confidence: float = CONFIDENCE,
    task: Task | str = CLASSES,
    shard_dir: str | os.PathLike[str] | None = None,
    label: str = "rates",
) -> RateCurve:
    """Let the bits of a classifier's stored weights err at some rates, and measure what it loses.

    All float parameters and buffers that an inference reads are stored: weights, biases, norms and running statistics, tied
    ones once. What products read, such as the weights of convolutions, is stored in the number format; the rest keeps its own
    type. Check bits err as data bits do.

    Parameters
    ----------
    model : torch.nn.Module
        From images [B, ...] to logits [B, C], on the device to use. It is copied, and stays as it is.
    loader : DataLoader
        Gives images and labels, from a map-style data set. All that it reads are used.
    rates : sequence of float
        Bit error rates, above 0 and at most 0.5; see `suggest_rates`.
    memories : int, default 32
        How many memories are drawn; at least 2. More of them extend a curve.
    number_format : str, default "fp32"
        How weights are stored; see `parse_format`. Formats whose values share metadata are not taken.
    protection : str, default "none"
        See `parse_protection`.
    operation : {"flip", "stuck_at_0", "stuck_at_1"}, default "flip"
        What happens to a bit that is at fault.
    seed : int, default 0
        Of all draws.
    batch_size : int, default 256
        Images per inference. It changes no result but for rounding.
    confidence : float, default 0.99
        Of intervals, 0.5 to 0.9999.
    task : Task or its name, default that of an ordinary classifier
        What batches and logits mean.
    shard_dir : str or path-like, optional
        Where the outcome of each memory is kept. An interrupted call goes on behind them, also with other rates or more
        memories. The processes that `torchrun` starts share the work through this folder.
    label : str, default "rates"
        Names the work in progress lines.

    Returns
    -------
    RateCurve
        What was lost.

    Raises
    ------
    TextguardError
        A setting is unknown, out of range, or does not fit the model or the data; or shard_dir holds other memories.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.hardware.rates import error_rates
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> images = torch.randn(16, 4)
    >>> loader = DataLoader(TensorDataset(images, model(images).argmax(dim=1)), batch_size=8)
    >>> curve = error_rates(model, loader, [1e-4, 1e-2], memories=8)
    >>> curve.settings["data_bits"], curve.settings["golden_top1"]
    (2144, 1.0)
    >>> safe = error_rates(model, loader, [1e-4, 1e-2], memories=8, protection="secded(32)")
    >>> bool(safe.points[1e-2]["lost"].value < curve.points[1e-2]["lost"].value)
    True
    """
    rates, shards = _checked_rates(rates), folder_path(Setting("shard_dir"), shard_dir)
    memories, batch_size = (
        whole_number(Setting(name), value, least)
        for name, value, least in (("memories", memories, 2), ("batch_size", batch_size, 1))
    )
    seed, confidence = whole_number(Setting("seed"), seed, 0), confidence_level(Setting("confidence"), confidence)
    checked_name("operation", operation, get_args(Operation), Setting("operation"))
    settings = {"number_format": number_format, "protection": protection, "operation": operation, "seed": seed}
    task = make_task(task)
    memory, images = _set_up(model, loader, settings, batch_size, task)
    rank, processes = share_work(shards)
    if shards:
        _check_settings(shards, {"weights": weights_mark(model), "images": images.mark, **settings, **task.as_json()}, rank)
    found: dict[tuple[int, float], dict[str, float]] = {}
    for number in range(memories):
        for rate in rates:
            if (row := _load(shards, number, rate)) is not None:
                found[number, rate] = row
    if found:
        print(f"{label}: going on after {len(found)} of {memories * len(rates)} memories", file=sys.stderr, flush=True)
    mine = range(rank, memories, processes)
    with progress(total=len(mine) * len(rates), label=label, unit="memory") as bar:
        bar.update(sum((number, rate) in found for number in mine for rate in rates))
        for number in mine:
            missing = [rate for rate in rates if (number, rate) not in found]
            for rate, row in _outcomes(memory, images, number, missing):
                found[number, rate] = row
                if shards:
                    write_json(_shard(shards, number, rate), {name: _plain(value) for name, value in row.items()})
                bar.update(1)
    if processes > 1:
        wait_for_all()
        found = {(number, rate): _load(shards, number, rate) for number in range(memories) for rate in rates}
    rows = [{"rate": rate, "memory": number, **found[number, rate]} for rate in rates for number in range(memories)]
    settings |= {"images": images.count, "eligible": images.eligible, "golden_top1": images.top1}
    settings |= {"data_bits": memory.data_bits, "stored_bits": memory.stored_bits, "gates": memory.gates}
    return RateCurve(settings, pd.DataFrame(rows)[MEMORY_COLUMNS], confidence)


def _set_up(
    model: nn.Module, loader: DataLoader, settings: Mapping[str, Any], batch_size: int, task: Task, most: int | None = None
) -> tuple[_Memory, "_Images"]:
    """A copy of the model in memory, and its golden run on the first `most` images."""
    number_format, protection = _format(settings["number_format"]), parse_protection(settings["protection"])
    model, image = prepare(model, loader, task)
    with torch.inference_mode(False):
        model = uncompiled(evaluation(copy_model(unwrapped(model))))
        tensors = _stored(model, image, number_format, protection)
    images = _Images(model, loader, image.device, batch_size, task, most)
    return _Memory(tensors, settings["seed"], protection.name, settings["operation"]), images


def _outcomes(
    memory: _Memory, images: _Images, number: int, rates: Sequence[float]
) -> Iterator[tuple[float, dict[str, float]]]:
    """Rate -> what one memory does at it, ascending."""
    if not rates:
        return
    cells = memory.draw(number, rates[-1])
    before, outcome = 0, images.unharmed
    for rate in rates:
        at_fault = sum(len(part.at(rate)) for pair in cells for part in pair)
        counts, wrong = memory.read(cells, rate)
        if not wrong:
            outcome = images.unharmed
        elif before != at_fault:  # else the same bits are at fault as at the rate before
            outcome = _run(images, wrong)
        before = at_fault
        yield rate, counts | outcome


def _run(images: _Images, wrong: Sequence[tuple[_Tensor, Read]]) -> dict[str, float]:
    """The outcome of a memory that is read wrong; its values are restored bit for bit."""
    kept: list[tuple[_Tensor, Tensor, Tensor]] = []
    try:
        for one, read in wrong:
            index, mask, zeroed = (
                torch.from_numpy(part).to(one.values.device) for part in (read.value, read.mask, read.zeroed)
            )
            kept.append((one, index, one.damage(index, mask, zeroed)))
        return images.outcome()
    finally:
        for one, index, before in kept:
            one.values[index] = before


def _checked_rates(rates: object) -> list[float]:
    """Bit error rates, ascending and each once. Raises InvalidParameter."""
    try:
        found = sorted({float(rate) for rate in rates})  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise InvalidParameter(Setting("rates"), f" is {rates!r:.60}; it must be a list of numbers") from error
    if not found or not all(0 < rate <= HIGHEST_RATE for rate in found):
        raise InvalidParameter(
            Setting("rates"), f" is {rates!r:.60}; one or more numbers above 0, and at most {HIGHEST_RATE}, are needed"
        )
    return found


def _format(number_format: str) -> Format:
    """The format of stored weights. Raises UnknownName, InvalidParameter."""
    found = parse_format(some_text(Setting("number_format"), number_format))
    if found.shared_bits:
        raise InvalidParameter(
            Setting("number_format"),
            f" is {number_format!r}, whose values share metadata, and where a memory holds that is not known; take one without",
        )
    return found


def _shard(shards: Path, number: int, rate: float) -> Path:
    return shards / f"memory-{number:05d}-rate-{rate!r}.json"


def _load(shards: Path | None, number: int, rate: float) -> dict[str, Any] | None:
    """A finished memory's row, or None where it has to be run."""
    if not shards or not (file := _shard(shards, number, rate)).exists():
        return None
    try:
        row = read_json(file, "rates", (*COUNTS, *OUTCOMES))
    except InvalidArtifact:
        return None
    return {name: math.nan if row[name] is None else row[name] for name in (*COUNTS, *OUTCOMES)}


def _check_settings(shards: Path, settings: dict[str, Any], rank: int) -> None:
    """Note the settings beside the shards. Raises CampaignMismatch when shards with other settings lie there."""
    file = shards / "rates.json"
    if not file.exists():
        if rank == 0:
            write_json(file, settings)
        return
    before = read_json(file, "rates")
    if names := [name for name in {**before, **settings} if before.get(name) != settings.get(name)]:
        differences = "; ".join(f"{name} was {before.get(name)}, now {settings.get(name)}" for name in names)
        raise CampaignMismatch(f"{shards} holds memories of another curve: {differences}; delete it or name another")


@torch.inference_mode()
def suggest_rates(
    model: nn.Module,
    loader: DataLoader,
    *,
    number_format: str = "fp32",
    protection: str = "none",
    seed: int = 0,
    task: Task | str = CLASSES,
) -> list[float]:
    """Bit error rates in half decades, from about one fault per memory to where accuracy is that of chance, at most one in 100.

    Four memories and the first 256 images tell where that is; chance is the share of the commonest label.

    Parameters
    ----------
    model, loader, number_format, protection, seed, task
        As for `error_rates`.

    Returns
    -------
    list of float
        The rates, ascending.

    Raises
    ------
    TextguardError
        As `error_rates`.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.hardware.rates import suggest_rates
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> images = torch.randn(16, 4)
    >>> loader = DataLoader(TensorDataset(images, model(images).argmax(dim=1)), batch_size=8)
    >>> suggest_rates(model, loader)[:3]
    [0.0003, 0.001, 0.003]
    """
    settings = {"number_format": number_format, "protection": protection, "operation": "flip", "seed": seed}
    memory, images = _set_up(model, loader, settings, PROBED, make_task(task), PROBED)
    found: list[float] = []
    exponent = math.floor(math.log10(1 / memory.stored_bits))
    for rate in (float(f"{digit}e{power}") for power in range(exponent, -1) for digit in (1, 3)):
        if 3.2 * rate < 1 / memory.stored_bits or rate > 1e-2:
            continue
        found.append(rate)
        right = [row["top1"] for number in range(4) for _, row in _outcomes(memory, images, number, [rate])]
        if sum(right) / len(right) <= 1.2 * images.chance:
            break
    return found
