"""Which layers, and which of their feature maps, to duplicate for a wanted cut in SDC.

The sample is split in two. One half of each layer's injections says what is protected first, the other half says how much of
the SDC that covers. Of many that are chosen and measured by the same injections, the best look better than they are, because
luck counts for them. Mahmoud et al., "Optimizing Selective Protection for CNN Resilience", ISSRE 2021, take feature maps in the
order of their share in one sample.

A layer's share is its SDC rate times the neurons that faults can hit. Its share in FIT is the same, because FIT counts the
failures of equal bits. To protect means here that each fault in the output is found and undone, as where it is computed twice
and compared. What is left where activations are clamped instead has to be measured: see `measure_mitigations`.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader

from textguard.artifacts import weights_mark
from textguard.assessment.assessing import assess
from textguard.assessment.result import Assessment
from textguard.errors import InvalidParameter, Setting, UnknownName, printable
from textguard.estimates.statistics import Estimate, Sample, quantile, rate_interval
from textguard.estimates.summary import LayerResult
from textguard.faults.copying import copy_model
from textguard.faults.exported import evaluation
from textguard.faults.inputs import batches, prepare
from textguard.faults.mitigations import protect
from textguard.faults.profiling import activation_bounds
from textguard.faults.sites import Site
from textguard.faults.task import CLASSES, Task, make_task

EXPOSURES = ("neurons", "multiply_adds", "layers")
FEWEST = 4  # injections of each stratum: two for either half
MOST_NAMES = 6  # of layers, in the sentence
CHOOSING, MEASURING = 0, 1  # which half of a stratum: its injections of even and of odd place
MEASURED = ["mitigation", "before", "after", "removed", "removed_low", "removed_high", "time"]
RUNS = 7  # of one inference, of which the fastest counts
TABLE = ["share", "covered", "covered_low", "covered_high", "left", "left_low", "left_high", "cost", "total_cost"]


@dataclass(frozen=True)
class Advice:
    """What to protect, in which order.

    `str` of it is the sentence.

    Attributes
    ----------
    table : pandas.DataFrame
        One row per layer, in the order in which they are chosen: layer; share (of all SDC); covered, covered_low, covered_high
        (the share of all SDC that this layer and those above it have, with its interval); left, left_low, left_high (the SDC
        rate of the rest, as a share of all faults); cost (the layer's share of all known multiply-adds, NaN where it is not
        known); total_cost (with those above it). Shares and rates are measured on the half of the sample that had no part in
        the order.
    channels : pandas.DataFrame
        The same for feature maps, one row per layer and channel. Layers that were enumerated are one row with channel -1,
        because their totals do not tell channels apart. Empty where injections damage no single neuron.
    layers_needed, channels_needed : int
        How many rows it takes for the target. The interval has to reach it, not just the estimate.
    now : Estimate
        The SDC rate without protection, from the half that measures.
    sentence : str
        What came out, for a person.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.assessment import advise, assess
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    >>> images = torch.rand(6, 1, 4, 4)
    >>> loader = DataLoader(TensorDataset(images, model(images).argmax(dim=1)), batch_size=3)
    >>> advice = advise(assess(model, loader, injections_per_layer=200), target_sdc=0.9)
    >>> advice.layers_needed, str(advice).endswith("nothing has to be protected.")
    (0, True)
    """

    table: pd.DataFrame
    channels: pd.DataFrame
    layers_needed: int
    channels_needed: int
    now: Estimate
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def advise(
    assessment: Assessment,
    *,
    cut: float = 0.9,
    target_sdc: float | None = None,
    target_fit: float | None = None,
    by: Literal["neurons", "multiply_adds", "layers"] = "neurons",
    order: Literal["share", "cost"] = "share",
) -> Advice:
    """Say which layers, and which feature maps, to duplicate so that few enough faults corrupt the output.

    Parameters
    ----------
    assessment : Assessment
        Of the model, as `assess` returns it.
    cut : float, default 0.9
        The share of SDC to be rid of, 0 to 1. It is the target where no other is given.
    target_sdc : float, optional
        The SDC rate that may be left, as a share of all faults.
    target_fit : float, optional
        The failures per 10^9 hours that may be left. The assessment must know the raw rate: `assess(fit_per_megabit=...)`.
    by : {"neurons", "multiply_adds", "layers"}, default "neurons"
        What faults hit in proportion to. `layers` is the plain mean over layers, as in the paper. Of weight faults, `neurons`
        means weights.
    order : {"share", "cost"}, default "share"
        What is chosen first: what has the largest share of SDC, or the largest share for its multiply-adds. With `cost`,
        what has unknown multiply-adds comes last.

    Returns
    -------
    Advice
        The order of choice, with what it covers and costs.

    Raises
    ------
    UnknownName
        There is no such `by` or `order`.
    InvalidParameter
        A target is out of range, two are given, or the sample is too small to be split.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.assessment import assess
    >>> from textguard.assessment.advice import advise
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    >>> images = torch.rand(6, 1, 4, 4)
    >>> loader = DataLoader(TensorDataset(images, model(images).argmax(dim=1)), batch_size=3)
    >>> found = advise(assess(model, loader, injections_per_layer=200), cut=0.5)
    >>> found.table[["layer", "cost", "total_cost"]].round(2).values.tolist()
    [['3', 0.25, 0.25], ['0', 0.75, 1.0]]
    """
    if by not in EXPOSURES:
        raise UnknownName("exposure", by, EXPOSURES, Setting("by"))
    if order not in ("share", "cost"):
        raise UnknownName("order", order, ("share", "cost"), Setting("order"))
    target = _target(assessment, cut, target_sdc, target_fit, by)
    exposures, confidence = _exposures(assessment, by), assessment.confidence
    layers = _units(assessment, exposures, None)
    found = choose(layers, confidence, order)
    channels = pd.DataFrame(columns=["layer", "channel", *TABLE])
    if tells_channels(assessment):
        records = assessment.records.drop_duplicates(["layer", "index"])
        channels = choose(_units(assessment, exposures, records), confidence, order)
    now = _left(layers.halves[MEASURING], np.zeros(len(layers.cost), dtype=bool), layers, confidence)
    needed = [_needed(table, target, now) for table in (found, channels)]
    return Advice(found, channels, *needed, now, _sentence(found, channels, needed, now, target))


def measure_mitigations(
    model: nn.Module,
    loader: DataLoader,
    assessment: Assessment,
    mitigations: Sequence[str] = ("ranger", "clip_to_zero"),
    by: Literal["neurons", "multiply_adds", "layers"] = "neurons",
    **options: Any,
) -> pd.DataFrame:
    """Replay an assessment's faults on protected copies of the model, and say how much of its SDC is gone.

    Parameters
    ----------
    model : torch.nn.Module
        The one that was assessed.
    loader : DataLoader
        As it was then.
    assessment : Assessment
        What `assess` returned for them, without a mitigation.
    mitigations : sequence of str, default ("ranger", "clip_to_zero")
        See `protect`.
    by : {"neurons", "multiply_adds", "layers"}, default "neurons"
        See `advise`.
    **options
        Passed on to `assess`, such as `profile`, which gives the images from which the bounds of activations are taken.

    Returns
    -------
    pandas.DataFrame
        One row per mitigation: mitigation; before, after (SDC rates, as shares of all faults); removed, removed_low,
        removed_high (the share of SDC that is gone, with an interval from pairs of the same faults; negative where there is
        more than before); time (of an inference of one batch, over the unprotected model's in the same run).

    Raises
    ------
    TextguardError
        The model cannot be protected, or it is not the one that was assessed.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.assessment import assess
    >>> from textguard.assessment.advice import measure_mitigations
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    >>> images = torch.rand(6, 1, 4, 4)
    >>> loader = DataLoader(TensorDataset(images, model(images).argmax(dim=1)), batch_size=3)
    >>> found = assess(model, loader, injections_per_layer=200, detector="off")
    >>> measured = measure_mitigations(model, loader, found, ["ranger"])
    >>> measured.columns.tolist()
    ['mitigation', 'before', 'after', 'removed', 'removed_low', 'removed_high', 'time']
    """
    if (found := weights_mark(model)) != assessment.weights:
        raise InvalidParameter(f"the model has weights {found}, and those that were assessed are {assessment.weights}")
    settings, exposures = assessment.settings, _exposures(assessment, by)
    kept = {name: settings[name] for name in ("detector", "confidence", "image_batch")} | {"engine": assessment.engine}
    parts = {name: options.get(name) for name in ("forward", "labels", "correct", "loss")}
    task, rows = make_task(options.get("task", CLASSES.name), **parts), []
    if (task.as_json() or None) != settings.get("task"):
        raise InvalidParameter(Setting("task"), " (or forward, labels, correct, loss) is another than that of the assessment")
    for mitigation in mitigations:
        other = assess(model, loader, plan=assessment, mitigation=mitigation, **kept | options)
        before, after, removed = removed_share(assessment, other, exposures)
        time_taken = _slower(model, loader, mitigation, options.get("profile") or loader, task)
        rows.append((mitigation, before, after, removed.value, removed.low, removed.high, time_taken))
    return pd.DataFrame(rows, columns=MEASURED)


def removed_share(before: Assessment, after: Assessment, exposures: np.ndarray) -> tuple[float, float, Estimate]:
    """The SDC rates of two assessments with one plan, and the share of the first that is gone in the second.

    exposures: each layer's share of all faults, float [L]. NaN with limits 0 and 1 where no SDC was seen.
    """
    sides = [_units(side, exposures, None) for side in (before, after)]
    rows = [_rows(side, exposures) for side in (before, after)]
    if len(rows[0]) != len(rows[1]):
        raise InvalidParameter("the two assessments have other faults; take plan=... of the first for the second")
    sizes, either = _sizes(rows[0]), (rows[0]["value"] != 0) | (rows[1]["value"] != 0)
    old, new = ((side["value"] / sizes)[either].to_numpy(float) for side in rows)
    pairs = _half(rows[0].assign(unit=0, value=either.astype(float)))  # those that corrupt something on either side
    totals = [float(part.sum() + units.known.sum()) for part, units in zip((old, new), sides, strict=True)]
    if not totals[0] > 0:
        return *totals, Estimate(math.nan, 0.0, 1.0, 0)
    share = 1 - totals[1] / totals[0]
    variance = pairs.variance((old * (1 - share) - new) / totals[0])
    confidence = before.confidence
    if share < 0:  # which no proportion is
        reach = quantile(confidence) * math.sqrt(variance)
        return *totals, Estimate(share, share - reach, share + reach, len(old))
    # One more that is gone, where fewer are, or one more that is not.
    more, gone = float(sides[0].most.max()), share <= 0.5
    moved = (share * totals[0] + gone * more) / (totals[0] + more)
    change = (moved - share, ((gone - share) * more / totals[0]) ** 2, 0.0)
    return *totals, rate_interval(Sample(share, variance, 0.0, max(1, len(old)), change, guided=True), confidence)


def _slower(model: nn.Module, loader: DataLoader, mitigation: str, profile: DataLoader, task: Task) -> float:
    """How many times as long an inference of one batch takes with a mitigation."""
    bounds = activation_bounds(model, profile, mitigation, task)
    plain, image = prepare(model, loader, task)
    plain, protected = evaluation(copy_model(plain)), protect(plain, image, bounds, mitigation)
    _, images, _ = next(batches(loader, image.device, task=task))
    with torch.inference_mode():
        fastest = [math.inf, math.inf]
        for _ in range(RUNS):  # in turn, so that whatever else the machine does meets both
            for number, one in enumerate((plain, protected)):
                start = time.perf_counter()
                one(images)
                if images.device.type == "cuda":
                    torch.cuda.synchronize()
                fastest[number] = min(fastest[number], time.perf_counter() - start)
    return fastest[1] / fastest[0]


@dataclass(frozen=True)
class Target:
    """When enough is protected: where `column` of the table has reached `limit`. said: what is wanted, in words."""

    column: str
    limit: float
    said: str

    def reached(self, value: float) -> bool:
        """Whether a value of the column is enough."""
        return value >= self.limit if self.column.startswith("covered") else value <= self.limit


def _target(assessment: Assessment, cut: float, target_sdc: float | None, target_fit: float | None, by: str) -> Target:
    """What is wanted. Raises InvalidParameter."""
    wanted = {"cut": cut, "target_sdc": target_sdc, "target_fit": target_fit}
    for name, value in wanted.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        most = math.inf if name == "target_fit" else 1.0
        if value is not None and not (number and 0 <= value <= most and math.isfinite(value)):
            allowed = "0 or more" if name == "target_fit" else "a share from 0 to 1"
            raise InvalidParameter(Setting(name), f" is {value!r:.60}; it must be {allowed}")
    if target_sdc is not None and target_fit is not None:
        raise InvalidParameter(Setting("target_sdc"), " and ", Setting("target_fit"), " are both given; leave one of them out")
    if target_fit is not None:
        per_bit = assessment.settings["fit_per_megabit"]
        if per_bit is None:
            raise InvalidParameter(
                Setting("target_fit"), " needs the raw failure rate of the memory: assess(..., fit_per_megabit=20.49)"
            )
        if by != "neurons":
            raise InvalidParameter(
                Setting("target_fit"), " counts failures per bit that faults can hit; leave out ", Setting("by")
            )
        bits = sum(assessment.exposed_bits(site.layer) for site in assessment.sites)
        return Target("left_high", target_fit / (bits * per_bit / 1e6), f"a FIT of at most {target_fit:.3g}")
    if target_sdc is not None:
        return Target("left_high", target_sdc, f"an SDC rate of at most {percent(target_sdc)}")
    return Target("covered_low", cut, f"{percent(cut)} less SDC")


def _exposures(assessment: Assessment, by: str) -> np.ndarray:
    """Each layer's share of all faults, float [L]. Raises InvalidParameter."""
    found = []
    for site in assessment.sites:
        found.append({"neurons": assessment.exposed_bits(site.layer), "multiply_adds": site.multiply_adds, "layers": 1.0}[by])
        if found[-1] is None:
            raise InvalidParameter(
                f"the multiply-adds of layer {printable(site.layer)!r} ({site.kind}) are not known; take 'neurons' for ",
                Setting("by"),
            )
    return np.array(found) / sum(found)


def tells_channels(assessment: Assessment) -> bool:
    """Whether each injection damages one neuron, which is in one channel."""
    model = assessment.fault_model
    return (model.target, model.values, model.shaped) == ("neuron", 1, False) and len(assessment.records) > 0


def _needed(table: pd.DataFrame, target: Target, now: Estimate) -> int:
    """How many rows it takes. The interval decides, and it was measured where nothing was chosen.

    The sets are nested, so that what they cover grows from row to row. To stop at the first that is enough is then wrong no
    more often than one interval is.
    """
    if target.reached(0.0 if target.column.startswith("covered") else now.high):
        return 0
    enough = np.flatnonzero([target.reached(value) for value in table[target.column]])
    return int(enough[0]) + 1 if len(enough) else len(table)


def _sentence(layers: pd.DataFrame, channels: pd.DataFrame, needed: Sequence[int], now: Estimate, target: Target) -> str:
    """What came out, in words."""
    if not now.value > 0:
        return (
            f"No injection corrupted the output: the SDC rate is at most {percent(now.high)}, and nothing tells layers apart."
        )
    start = f"The SDC rate is {in_percent(now)} of all faults. For {target.said}, "
    if not needed[0]:
        return f"{start}nothing has to be protected."
    said = start + _covers(layers, needed[0], target, "layers")
    if len(channels) and needed[1]:
        said += f" Feature by feature, {_covers(channels, needed[1], target, 'feature maps')}"
    unknown = [printable(name, 60) for name in layers.loc[layers["cost"].isna(), "layer"]]
    return f"{said} Multiply-adds of {len(unknown)} layers are not known, such as {unknown[0]}." if unknown else said


def _covers(table: pd.DataFrame, needed: int, target: Target, what: str) -> str:
    """What it takes, and what comes of it."""
    row = table.iloc[needed - 1]
    if needed == len(table):
        likely = _needed(table, Target(target.column.rpartition("_")[0], target.limit, target.said), Estimate(1, 1, 1, 0))
        return (
            f"the sample is too small to promise it of fewer than all {len(table):,} {what}; "
            f"by the estimate without its interval, {likely:,} would do{_named(table, likely)}."
        )
    found = in_percent(Estimate(row["covered"], row["covered_low"], row["covered_high"], 0))
    cost = f" for {percent(row['total_cost'])} of the multiply-adds" if math.isfinite(row["total_cost"]) else ""
    return (
        f"duplicate {needed:,} of {len(table):,} {what}{_named(table, needed)}: they cover {found} of SDC{cost}, "
        f"and leave a rate of at most {percent(row['left_high'])}."
    )


def _named(table: pd.DataFrame, count: int) -> str:
    """The first layers of a table in brackets; nothing for channels."""
    names = [printable(name, 60) for name in table["layer"][:count]] if "channel" not in table else []
    more = [f"{len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else []
    return f" ({', '.join([*names[:MOST_NAMES], *more])})" if names else ""


def in_percent(found: Estimate) -> str:
    """A share with its interval, in percent."""
    if found.low == found.high:
        return f"{percent(found.value)} (exact)"
    return f"{percent(found.value)} [{percent(found.low)}, {percent(found.high)}]"


def percent(share: float) -> str:
    """A share in percent. What is not all of it is never called 100 %."""
    size = 100 * share
    return f"{size:.1f} %" if 1 <= size < 99.95 else (f"{size:.4g} %" if size >= 99.95 else f"{size:.2g} %")


@dataclass(frozen=True)
class Half:
    """One half of a sample, as far as it corrupted something.

    unit: what each such injection hit, int [H]. effect: what it adds to the SDC rate of the whole, float [H]. observation:
    injections with one number are one observation, as are those of one index where layers share their images, int [H]. stratum:
    that of each observation, int [O]. sizes: observations of each stratum, whatever they did, [S]. injections: all of them.
    """

    unit: np.ndarray
    effect: np.ndarray
    observation: np.ndarray
    stratum: np.ndarray
    sizes: np.ndarray
    injections: int

    def variance(self, values: np.ndarray) -> float:
        """Of the sum of `values`, float [H], one for each injection; all others have 0."""
        each = np.bincount(self.observation, values, len(self.stratum))
        squares, sums = (np.bincount(self.stratum, part, len(self.sizes)) for part in (each**2, each))
        return float(((squares - sums**2 / self.sizes) * self.sizes / (self.sizes - 1)).sum())


@dataclass(frozen=True)
class Units:
    """What can be protected, each layer or each channel, and what is known of it.

    names: its columns layer and, of channels, channel, one row per unit. cost: its multiply-adds, float [U], NaN where they are
    not known. known: what its faults add to the SDC rate of the whole, where that is exact, float [U]. most: what one more
    injection that corrupts something would add, float [U], 0 where it is exact. siblings: the number of units that its layer is
    divided into, int [U]. halves: the one to choose by, and the one to measure by. guided: whether the plan was.
    """

    names: pd.DataFrame
    cost: np.ndarray
    known: np.ndarray
    most: np.ndarray
    siblings: np.ndarray
    halves: tuple[Half, Half]
    guided: bool = False


def choose(units: Units, confidence: float, order: str) -> pd.DataFrame:
    """The table of `Advice` for these units."""
    score = _score(units)
    share = score / score.sum() if score.sum() > 0 else score
    known = np.where(np.isnan(units.cost), math.inf, np.maximum(units.cost, 1.0))
    ranked = np.argsort(-(share / known if order == "cost" else share), kind="stable")
    half, rows = units.halves[MEASURING], []
    total, inside = half.effect.sum() + units.known.sum(), np.zeros(len(ranked), dtype=bool)
    each = (np.bincount(half.unit, half.effect, len(ranked)) + units.known) / total if total else np.full(len(ranked), math.nan)
    for unit in ranked:
        inside[unit] = True
        covered, left = _covered(half, inside, units, confidence), _left(half, inside, units, confidence)
        rows.append((each[unit], covered.value, covered.low, covered.high, left.value, left.low, left.high))
    found = pd.DataFrame(rows, columns=TABLE[:7])
    cost = units.cost[ranked] / np.nansum(units.cost) if np.nansum(units.cost) > 0 else np.full(len(ranked), math.nan)
    names = units.names.iloc[ranked].reset_index(drop=True)
    return pd.concat([names, found.assign(cost=cost, total_cost=np.nancumsum(cost))], axis=1)


def _score(units: Units) -> np.ndarray:
    """What each unit adds to the SDC rate, by the half to choose by.

    A channel gets few injections, and luck decides which of them corrupt something. What it adds is therefore drawn to what a
    channel of its layer adds on average, as if every channel had been corrupted once more in that way. Source: Gamma-Poisson
    smoothing, for rates that differ between channels about as much as an exponential distribution does.
    """
    half, count = units.halves[CHOOSING], len(units.cost)
    added, hits = (np.bincount(half.unit, part, count) for part in (half.effect, None))
    layer = pd.factorize(units.names["layer"])[0]
    mean = np.bincount(layer, added)[layer] / units.siblings
    often = np.bincount(layer, hits)[layer] / units.siblings
    own = np.where(units.siblings > 1, often / (often + 1), 1.0)
    return own * added + (1 - own) * mean + units.known


def _covered(half: Half, inside: np.ndarray, units: Units, confidence: float) -> Estimate:
    """The share of all SDC that is in the units of `inside`, bool [U]. NaN with limits 0 and 1 where no SDC was seen."""
    if inside.all():
        return Estimate(1.0, 1.0, 1.0, len(half.effect), 0.0)
    total = half.effect.sum() + units.known.sum()
    if not total > 0:
        return Estimate(math.nan, 0.0, 1.0, 0)
    within = inside[half.unit]
    share = (half.effect[within].sum() + units.known[inside].sum()) / total
    variance = half.variance((within - share) * half.effect / total)
    # One more corruption, where there are fewer of them; where those are known exactly, on the other side.
    fewer = inside if (share <= 0.5) == bool(units.most[inside].any()) or not units.most[~inside].any() else ~inside
    more, found = float(units.most[fewer].max()), fewer is inside
    moved = (share * total + found * more) / (total + more)
    spread = ((found - share) * more / total) ** 2
    count = max(1, len(half.effect))
    return rate_interval(Sample(float(share), variance, 0.0, count, (moved - share, spread, 0.0), guided=True), confidence)


def _left(half: Half, inside: np.ndarray, units: Units, confidence: float) -> Estimate:
    """The SDC rate of the units that are not in `inside`, bool [U]."""
    if inside.all():
        return Estimate(0.0, 0.0, 0.0, half.injections, 0.0)
    values = half.effect * ~inside[half.unit]
    rate, more = values.sum() + units.known[~inside].sum(), units.most[~inside].max()
    sample = Sample(float(rate), half.variance(values), 0.0, half.injections, (more, more**2, 0.0), units.guided)
    return rate_interval(sample, confidence)


def _units(assessment: Assessment, exposures: np.ndarray, records: pd.DataFrame | None) -> Units:
    """The layers as units, or with `records`, one row per injection, their channels."""
    rows, names, units = _rows(assessment, exposures), [], []
    of_layer = {} if records is None else dict(list(records.groupby("layer", sort=False)))
    for site, exposure in zip(assessment.sites, exposures, strict=True):
        strata = assessment.layers[site.layer].strata.get("sdc", [])
        if site.layer in of_layer and strata:
            channel, count = _channels(of_layer[site.layer], site, len(strata))
            named = range(count)
        else:
            channel, count, named = np.zeros(sum(map(len, strata)), dtype=int), 1, [-1]
        units.append(len(names) + channel)
        adds = math.nan if site.multiply_adds is None else site.multiply_adds / count
        known = 0.0 if strata else exposure * assessment.layers[site.layer].sdc.value
        names += [(site.layer, number, adds, known, count) for number in named]
    rows["unit"] = np.concatenate(units)
    table = pd.DataFrame(names, columns=["layer", "channel", "cost", "known", "siblings"])
    halves = tuple(_half(rows[rows["place"] % 2 == half]) for half in (CHOOSING, MEASURING))
    measuring = rows[rows["place"] % 2 == MEASURING]
    most = (measuring["heaviest"] / (_sizes(measuring) + 1)).groupby(measuring["layer"]).max()
    return Units(
        table[["layer"] if records is None else ["layer", "channel"]],
        *(table[name].to_numpy(float) for name in ("cost", "known")),
        table["layer"].map(most).fillna(0.0).to_numpy(float),
        table["siblings"].to_numpy(),
        halves,
        assessment.settings["plan"] == "guided",
    )


def _rows(assessment: Assessment, exposures: np.ndarray) -> pd.DataFrame:
    """Every injection into a sampled layer, stratum by stratum in order of its index.

    Columns: layer; stratum; place in it; value, what it adds to the SDC rate of the whole, times the size of its sample;
    heaviest, what one more that corrupts something would have there. Raises InvalidParameter.
    """
    parts = [pd.DataFrame(columns=["layer", "stratum", "place", "value", "heaviest"]).astype({"value": float, "place": int})]
    for place, (site, exposure) in enumerate(zip(assessment.sites, exposures, strict=True)):
        layer = assessment.layers[site.layer]
        for number, (share, stratum) in enumerate(zip(layer.shares, layer.strata.get("sdc", ()), strict=False)):
            if len(stratum) < FEWEST:
                of_bit = " of a bit" if len(layer.shares) > 1 else ""
                raise InvalidParameter(
                    f"layer {printable(site.layer)!r} has {len(stratum)} injections{of_bit}, and half of them "
                    f"choose what the others measure: at least {FEWEST} are needed; assess with more ",
                    Setting("injections_per_layer"),
                )
            # Injections of one index hit the same image where layers share their images. They err together.
            own = number if layer.shared else place * len(layer.shares) + number
            columns = {"layer": site.layer, "stratum": own, "place": np.arange(len(stratum))}
            heaviest = exposure * share * _heaviest(layer, stratum)
            parts.append(pd.DataFrame(columns | {"value": exposure * share * stratum, "heaviest": heaviest}))
    return pd.concat(parts[1:] or parts, ignore_index=True)


def _sizes(rows: pd.DataFrame) -> pd.Series:
    """Of each row, the size of its sample: of its layer's injections in its stratum."""
    return rows.groupby(["layer", "stratum"], sort=False)["value"].transform("size")


def _half(rows: pd.DataFrame) -> Half:
    """Those that corrupted something. rows: with `unit`."""
    size, (stratum, numbers) = _sizes(rows), pd.factorize(rows["stratum"])
    hit = rows["value"].to_numpy() != 0
    observed = (stratum * 2**32 + rows["place"].to_numpy(int))[hit]
    _, first, observation = np.unique(observed, return_index=True, return_inverse=True)
    return Half(
        rows["unit"].to_numpy(int)[hit],
        (rows["value"] / size).to_numpy(float)[hit],
        observation,
        stratum[hit][first],
        size.groupby(stratum).max().to_numpy(float) if len(numbers) else np.zeros(0),
        len(rows),
    )


def _heaviest(layer: LayerResult, stratum: np.ndarray) -> float:
    """The weight of one more injection that corrupts something; see `rate_sample`."""
    if stratum.any():
        return float(stratum.max())
    return max(1.0, layer.sdc.unseen[0] * (len(stratum) + 1) / float(layer.shares[0]))


def _channels(records: pd.DataFrame, site: Site, strata: int) -> tuple[np.ndarray, int]:
    """The channel of each of a layer's injections, stratum by stratum, and the number of its channels."""
    axis = 0 if len(site.shape) == 3 or site.kind.startswith("Conv") else -1
    records = records.sort_values(["bit", "index"] if strata > 1 else "index")
    return np.unravel_index(records["neuron"].to_numpy(), site.shape)[axis], site.shape[axis]
