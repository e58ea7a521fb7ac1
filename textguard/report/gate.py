"""Regression gate: did any run get worse? Two metrics files, or folders of them, compared number by number.

    python -m textguard.report.gate BASE NEW [--params FILE]

prints a Markdown table and returns 1 when anything is worse by more than its tolerance (params.yaml, section `gate`) and the
difference is significant: one-sided, with Holm's correction over all comparisons of the call. Bad input returns 2.

A difference is tested in one of three ways.

- exact: both values come from enumeration (low == value == high), and differ or do not.
- paired: both files hold blocks, means of equal parts of the sample, from the same faults (or, for top-1, the same images). The
  p-value is the share of all sign flips of the blocks' differences that reach their sum: Fisher's randomisation test, exact
  where base and new are exchangeable within a block. Not the t test: DeltaLoss is so skewed that a few faults make its mean,
  and t finds a layer whose every DeltaLoss has doubled only by luck (1024 injections, coefficient of variation 20).
- unpaired: standard errors from the intervals, added in quadrature, and the normal distribution. Improvements always, on the
  logarithm.

Where the base is 0, nothing is within a relative tolerance, and significance alone decides. What is null cannot be compared;
like runs and layers that only one side has, it is listed, and does not fail.

Sources: Fisher, The Design of Experiments, 1935, section 21. Holm, Scandinavian Journal of Statistics 6, 1979.
"""

import argparse
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, NoReturn

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from textguard.artifacts import read_json, reading
from textguard.errors import InvalidArtifact, InvalidParameter, TextguardError
from textguard.params import PARAMS_FILE, GateParams, load_gate_params
from textguard.report.tables import Table, as_markdown

FEWEST_BLOCKS = 16  # with fewer, flipped signs cannot reach the p-values that hundreds of comparisons ask for
MOST_BLOCKS = 32  # two halves of 2^16 sums; more are merged
ROUNDING = 1e-9  # 0.97 - 0.96 is not above 0.01
HEADERS = ["Run", "Quantity", "Base", "New", "Change", "Tested", "p (Holm)", "Verdict"]

_strict = ConfigDict(strict=True)
Number = Annotated[float, BeforeValidator(lambda number: math.nan if number in (None, math.inf, -math.inf) else number)]


@dataclass(frozen=True, config=_strict)
class Measured:
    """A number with its interval, NaN where the file has null; blocks: see this module's description."""

    value: Number
    low: Number
    high: Number
    blocks: list[Number] | None = None

    @property
    def exact(self) -> bool:
        """Whether nothing was sampled."""
        return self.low == self.value == self.high


@dataclass(frozen=True, config=_strict)
class Plan:
    """mark: equal where two campaigns injected the same faults."""

    mark: str


@dataclass(frozen=True, config=_strict)
class Overall:
    """Means over the layers: DeltaLoss in nats, SDC probability as a share."""

    delta_loss: Measured
    sdc: Measured


@dataclass(frozen=True, config=_strict)
class LastLayer:
    """DeltaLoss in nats."""

    delta_loss: Measured


@dataclass(frozen=True, config=_strict)
class Layer:
    """DeltaLoss in nats."""

    layer: str
    delta_loss: Measured


@dataclass(frozen=True, config=_strict)
class Improvement:
    """How many times smaller DeltaLoss is than that of the run `baseline`."""

    baseline: str
    last_layer: Measured
    overall: Measured


@dataclass(frozen=True, config=_strict)
class Run:
    """What the gate reads of a run's metrics file. images: a digest of the test split. top1: a share."""

    run: str
    confidence: Annotated[float, Field(gt=0, lt=1)]
    plan: Plan
    images: str
    top1: Measured
    overall: Overall
    last_layer: LastLayer
    layers: list[Layer]
    improvement: Improvement | None


@dataclass(frozen=True)
class Comparison:
    """One quantity of one run. p: one-sided, in the direction of the change; NaN where nothing can be compared.

    worse_by and allowed are in units of the test: share (top1), nats, share (SDC), logarithm (improvements).
    """

    run: str
    quantity: str
    base: str = ""
    new: str = ""
    change: str = ""
    tested: str = ""
    worse_by: float = math.nan
    allowed: float = math.nan
    p: float = math.nan
    note: str = "not comparable"
    headline: bool = True


def main(arguments: list[str]) -> int:
    """Print the table for the command line's two files or folders. Returns the exit code."""
    parser = _Parser(prog="python -m textguard.report.gate", description="Fail when metrics got worse.", allow_abbrev=False)
    parser.add_argument("base", type=Path, metavar="BASE", help="metrics file of a run, or a folder of them")
    parser.add_argument("new", type=Path, metavar="NEW", help="the same, to be judged")
    parser.add_argument("--params", type=Path, default=PARAMS_FILE, metavar="FILE", help="with section 'gate'")
    try:
        options = parser.parse_args(arguments)
        tolerances = load_gate_params(options.params)
        base, new = read_runs(options.base), read_runs(options.new)
        if options.base.is_dir() != options.new.is_dir():
            raise InvalidParameter(f"{options.base} and {options.new} must be two files or two folders")
    except TextguardError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    report, worse = judge(compare_all(base, new, tolerances), tolerances.significance)
    print(report, end="")
    return 1 if worse else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidParameter(f"{message}; {self.format_usage()}")


def read_runs(path: Path) -> dict[str, Run]:
    """File name -> run, of a folder's JSON files that hold one; a single file's name is "". Raises InvalidArtifact."""
    if not path.is_dir():
        return {"": read_run(path)}
    runs = {file.name: read_run(file) for file in sorted(path.glob("*.json")) if "run" in _keys(file)}
    if not runs:
        raise InvalidArtifact(f"{path} holds no run's metrics (*.json); name another folder, or run 'dvc repro' in its grid")
    return runs


def read_run(path: Path) -> Run:
    """Read one run's metrics file. Raises InvalidArtifact."""
    with reading(path, ""):
        try:
            return TypeAdapter(Run).validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the file"
            raise InvalidArtifact(f"holds no run's metrics ({place}: {first['msg']})") from error


def _keys(path: Path) -> list[str]:
    content = read_json(path, "")
    return list(content) if isinstance(content, dict) else []


def compare_all(base: dict[str, Run], new: dict[str, Run], tolerances: GateParams) -> list[Comparison]:
    """Compare runs of the same file name; name those that only one side has."""
    comparisons = []
    for name in sorted(base.keys() | new.keys()):
        if name in base and name in new:
            comparisons += compare(base[name], new[name], tolerances)
        else:
            run, note = (base[name].run, "gone") if name in base else (new[name].run, "new")
            comparisons.append(Comparison(run, "all", note=note))
    return comparisons


def compare(base: Run, new: Run, tolerances: GateParams) -> list[Comparison]:
    """Compare all quantities of two runs: top-1, overall, last layer and improvements first, then layer by layer."""
    name = new.run if base.run == new.run else f"{base.run} -> {new.run}"
    quantiles = [NormalDist().inv_cdf((1 + run.confidence) / 2) for run in (base, new)]
    same_faults = base.plan.mark == new.plan.mark

    def top1(old: Measured, now: Measured) -> Comparison:
        tested, p = _test(old, now, quantiles, paired=base.images == new.images)
        allowed = tolerances.top1_points / 100 + ROUNDING
        points = 100 * (now.value - old.value)
        shown = _show(old, " %"), _show(now, " %"), "" if math.isnan(points) else f"{points:+.2f} points"
        return Comparison(name, "top-1", *shown, tested, old.value - now.value, allowed, p)

    def loss(quantity: str, old: Measured, now: Measured, percent: float, unit: str = "", headline: bool = True) -> Comparison:
        tested, p = _test(old, now, quantiles, paired=same_faults)
        allowed = (percent / 100 + ROUNDING) * old.value
        shown = _show(old, unit), _show(now, unit), _show_ratio(old, now)
        return Comparison(name, quantity, *shown, tested, now.value - old.value, allowed, p, headline=headline)

    def improvement(quantity: str, old: Measured, now: Measured) -> Comparison:
        tested, p = _test(_log(old), _log(now), quantiles, paired=False)
        allowed = -math.log1p(-tolerances.improvement_percent / 100) + ROUNDING
        shown = _show(old, " x"), _show(now, " x"), _show_ratio(old, now)
        return Comparison(name, quantity, *shown, tested, _log(old).value - _log(now).value, allowed, p)

    percent = tolerances.delta_loss_percent
    comparisons = [
        top1(base.top1, new.top1),
        loss("DeltaLoss, overall", base.overall.delta_loss, new.overall.delta_loss, percent),
        loss("SDC, overall", base.overall.sdc, new.overall.sdc, tolerances.sdc_percent, " %"),
        loss("DeltaLoss, last layer", base.last_layer.delta_loss, new.last_layer.delta_loss, percent),
    ]
    if base.improvement and new.improvement and base.improvement.baseline == new.improvement.baseline:
        comparisons += [
            improvement("improvement, last layer", base.improvement.last_layer, new.improvement.last_layer),
            improvement("improvement, overall", base.improvement.overall, new.improvement.overall),
        ]
    elif base.improvement or new.improvement:
        comparisons.append(Comparison(name, "improvement"))
    layers = [{layer.layer: layer.delta_loss for layer in run.layers} for run in (base, new)]
    for layer in dict.fromkeys([*layers[0], *layers[1]]):
        old, now = layers[0].get(layer), layers[1].get(layer)
        if old and now:
            comparisons.append(loss(f"DeltaLoss, {layer}", old, now, percent, headline=False))
        else:
            comparisons.append(Comparison(name, f"DeltaLoss, {layer}", note="gone" if old else "new", headline=False))
    return comparisons


def _show(measured: Measured, unit: str) -> str:
    value = measured.value * (100 if unit == " %" else 1)
    return "" if math.isnan(value) else f"{value:.4g}{unit}"


def _show_ratio(old: Measured, now: Measured) -> str:
    ratio = now.value / old.value if old.value else math.nan
    return "" if math.isnan(ratio) else f"{100 * (ratio - 1):+.1f} %"


def _log(measured: Measured) -> Measured:
    """The same on the logarithm, NaN where there is none."""
    numbers = (measured.value, measured.low, measured.high)
    return Measured(*(math.log(number) if number > 0 else math.nan for number in numbers))


def _test(old: Measured, now: Measured, quantiles: list[float], *, paired: bool) -> tuple[str, float]:
    """How a difference is tested, and its one-sided p in its own direction; NaN where it cannot be.

    quantiles: of the normal distribution, that the two intervals were made with.
    """
    difference = now.value - old.value
    if math.isnan(difference):
        return "", math.nan
    if old.exact and now.exact:
        return "exact", 0.0 if difference else 1.0
    blocks = [np.array(measured.blocks or []) for measured in (old, now)]
    if paired and len(blocks[0]) == len(blocks[1]) >= FEWEST_BLOCKS and np.isfinite(blocks).all():
        return "paired", sign_flip_p((blocks[1] - blocks[0]) * math.copysign(1, difference))
    error = math.hypot(*((m.high - m.low) / (2 * z) for m, z in zip((old, now), quantiles, strict=True)))
    return "unpaired", math.erfc(abs(difference) / error / math.sqrt(2)) / 2 if error else math.nan


def sign_flip_p(differences: np.ndarray) -> float:
    """Share of the 2^K ways to flip the signs of K differences, shape [K], whose sum is at least that of the differences.

    All ways are counted, with sums of halves. Neighbours are merged while there are more than MOST_BLOCKS of them.
    """
    differences = differences[differences != 0]  # flipped or not, these change nothing
    while len(differences) > MOST_BLOCKS:
        differences = np.add.reduceat(differences, range(0, len(differences), 2))
    # The sum stays as large where those that are flipped add up to 0 or less.
    first, second = (_subset_sums(half) for half in np.array_split(differences, 2))
    slack = 1e-12 * np.abs(differences).sum()
    reached = np.searchsorted(np.sort(second), slack - first, side="right").sum()
    return float(reached) / (len(first) * len(second))


def _subset_sums(numbers: np.ndarray) -> np.ndarray:
    sums = np.zeros(1)
    for number in numbers:
        sums = np.concatenate([sums, sums + number])
    return sums


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values, shape [M], adjusted so that those at most alpha hold one false alarm or more with probability alpha at most."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1)))
    return adjusted


def judge(comparisons: list[Comparison], significance: float) -> tuple[str, int]:
    """The table of all comparisons with their verdicts as Markdown, and how many are worse."""
    table, failed = verdict_table(comparisons, significance)
    return as_markdown(replace(table, caption=f"**{table.caption}**")), failed


def verdict_table(comparisons: list[Comparison], significance: float) -> tuple[Table, int]:
    """The same as a table of texts."""
    p = np.array([comparison.p for comparison in comparisons])
    worse_by = np.array([comparison.worse_by for comparison in comparisons])
    tested = ~np.isnan(p)
    adjusted = np.full(len(p), math.nan)
    # Each direction is a family of its own; what went the other way is in it, and never significant.
    worse, better = (holm(np.where(sign * worse_by[tested] > 0, p[tested], 1)) for sign in (1, -1))
    adjusted[tested] = np.minimum(worse, better)
    verdicts = [_verdict(c, q <= significance) for c, q in zip(comparisons, adjusted, strict=True)]

    rows, unremarkable = [], {}
    for c, q, verdict in zip(comparisons, adjusted, verdicts, strict=True):
        if c.headline or verdict not in ("same", "within tolerance", "not separable"):
            rows.append([c.run, c.quantity, c.base, c.new, c.change, c.tested, "" if math.isnan(q) else f"{q:.2g}", verdict])
        else:
            unremarkable.setdefault(c.run, Counter())[verdict] += 1
    for run, counts in unremarkable.items():
        text = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        last = max(index for index, row in enumerate(rows) if row[0] == run)
        rows.insert(last + 1, [run, "DeltaLoss, other layers", *[""] * 5, text])
    failed = verdicts.count("worse")
    result = f"FAIL: {failed} worse" if failed else "PASS: none worse"
    left = f", {verdicts.count('not comparable')} not comparable" if "not comparable" in verdicts else ""
    caption = (
        f"{result} by more than the tolerance and significantly so; {tested.sum()} comparisons{left}; "
        f"one-sided, Holm's correction, family-wise significance {significance:g}."
    )
    return Table("gate", caption, HEADERS, rows), failed


def _verdict(comparison: Comparison, significant: bool) -> str:
    if math.isnan(comparison.p):
        return comparison.note
    if not comparison.worse_by:
        return "same"
    if abs(comparison.worse_by) <= comparison.allowed:
        return "within tolerance"
    if not significant:
        return "not separable"
    return "worse" if comparison.worse_by > 0 else "better"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
