"""Figures of whole classifiers, of one backbone on one data set."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from textguard.analysis.files import RUNS_DIR, load_threshold_curve
from textguard.analysis.thresholds import crossing, differences
from textguard.errors import InvalidArtifact
from textguard.estimates.statistics import Estimate, quantile
from textguard.report.drawing import LONGEST_AXIS, add_note, logarithmic, mark, plain_ticks, state
from textguard.report.legend import name_styles
from textguard.report.rendering import show_estimate, show_number
from textguard.report.variants import Variant, count_trainings, trainings
from textguard.schema.base import Measured
from textguard.schema.results import BASELINE, PROPOSED, Convergence, RunResult

WIDEST = 8.0  # how much farther than the largest difference its axis goes on for the bands
CUT = 10.0  # how far beyond what the most injections say an axis of convergence goes


def draw_accuracy(variants: Sequence[Variant], title: str) -> tuple[Figure, pd.DataFrame]:
    """Accuracy against the least Top2Diff that a prediction must have to count as right; below, beside the baseline's.

    Numbers: one row per training and threshold.
    """
    curves = _load_curves(variants)
    thresholds = next(iter(curves.values()))["threshold_percent"].to_numpy(float)
    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    baselines = {result.seed: result for variant in variants if variant.key == BASELINE for result in variant.results}
    compared = {}
    for variant in variants:
        own = np.array([curves[result.run]["accuracy_percent"] for result in variant.results])
        for result, accuracy in zip(variant.results, own, strict=True) if len(own) > 1 else ():
            (line,) = panels[0].plot(thresholds, accuracy, color=variant.style.colour, linewidth=0.4, alpha=0.6)
            said = f"{variant.style.name}, seed {result.seed}: top-1 {accuracy[0]:.2f} % at threshold 0, 1 {variant.each}"
            mark(line, variant.element, said)
        _draw_curve(panels[0], variant, thresholds, own.mean(axis=0), f"top-1 {own[:, 0].mean():.2f} % at threshold 0")
        pairs = [(baselines[result.seed], result) for result in variant.results if result.seed in baselines]
        if variant.key != BASELINE and pairs:
            compared[variant.key] = _draw_difference(panels[1], variant, thresholds, pairs, curves)
    panels[0].set(ylabel="top-1 accuracy (%)")
    panels[1].set(
        ylabel="more than the\nbaseline (points)", xlabel="Top2Diff threshold (%): predictions below it count as wrong"
    )
    panels[1].axhline(0, color="black", linewidth=0.8)
    every = [one for found in compared.values() for one in found]
    largest = max((abs(one.value) for one in every), default=1.0) or 1.0
    ends = [abs(end) for one in every for end in (one.low, one.high) if math.isfinite(end)]
    wide = 1.1 * max(largest, min(max(ends, default=0.0), WIDEST * largest))
    margin = 0.02 * (thresholds[-1] - thresholds[0]) or 1.0
    panels[1].set(ylim=(-wide, wide), xlim=(thresholds[0] - margin, thresholds[-1] + margin))
    name_styles(figure, [variant.style for variant in variants])
    state(figure, f"{title}: {_difference_in_words(variants, compared)}")
    images = variants[0].results[0].top1.n
    note = f"{images:,} test images; thin: one line per training; thick: their mean, {trainings(variants)}"
    add_note(
        figure,
        f"{note}\nbands: intervals of the difference over trainings of the same seeds, cut at the edge\n"
        "circles: where the curves cross for the last time, with its interval, if they do in every training",
    )
    tables = [
        curves[result.run].assign(run=result.run, variant=variant.key) for variant in variants for result in variant.results
    ]
    return figure, pd.concat(tables, ignore_index=True)


def _load_curves(variants: Sequence[Variant]) -> dict[str, pd.DataFrame]:
    """Run -> its curve. Raises InvalidArtifact where thresholds differ."""
    curves: dict[str, pd.DataFrame] = {}
    for result in (result for variant in variants for result in variant.results):
        curve = load_threshold_curve(result.run)
        steps = next(iter(curves.values()), curve)["threshold_percent"]
        if not curve["threshold_percent"].equals(steps):
            raise InvalidArtifact(
                f"{RUNS_DIR / result.run / 'thresholds.csv'} has other thresholds than another run's; delete both and run "
                "'dvc repro': stage 'evaluate' writes them"
            )
        curves[result.run] = curve
    return curves


def _draw_curve(axes: Axes, variant: Variant, x: np.ndarray, y: np.ndarray, said: str) -> None:
    every = max(1, len(x) // 10)
    look = {"color": variant.style.colour, "marker": variant.style.marker, "markevery": every, "linewidth": 1.3}
    (line,) = axes.plot(x, y, **look)
    mark(line, variant.element, f"{variant.style.name}: {said}, {trainings([variant])}")


def _draw_difference(
    axes: Axes,
    variant: Variant,
    thresholds: np.ndarray,
    pairs: Sequence[tuple[RunResult, RunResult]],
    curves: Mapping[str, pd.DataFrame],
) -> list[Estimate]:
    """A variant's difference from the baseline with its band, and where both cross. Returns the difference."""
    confidence = pairs[0][1].confidence
    baseline, own = (np.array([curves[pair[side].run]["accuracy_percent"] for pair in pairs], dtype=float) for side in (0, 1))
    found = differences(baseline, own, confidence)
    low, high, value = (np.array([getattr(one, name) for one in found]) for name in ("low", "high", "value"))
    mark(axes.fill_between(thresholds, low, high, color=variant.style.colour, alpha=0.07, linewidth=0), variant.element)
    for end in axes.plot(thresholds, np.transpose([low, high]), color=variant.style.colour, linewidth=0.9, linestyle=":"):
        mark(end, variant.element)
    _draw_curve(axes, variant, thresholds, value, f"{value[0]:+.2f} points at threshold 0")
    count, at = crossing(thresholds, baseline, own, confidence)
    if math.isfinite(at.value):
        look = {"marker": "o", "markersize": 7, "markerfacecolor": "none", "color": variant.style.colour}
        drawn = axes.plot(at.value, 0, zorder=3, **look)
        if len(pairs) > 1:
            drawn += axes.plot([at.low, at.high], [0, 0], color=variant.style.colour, linewidth=1.8, alpha=0.7)
        shown = show_estimate(at) if len(pairs) > 1 else f"{at.value:.0f}"
        said = f"{variant.style.name}: last crossing with the baseline at {shown} %, {count_trainings([count])}"
        for line in drawn:
            mark(line, variant.element, said)
    return found


def _difference_in_words(variants: Sequence[Variant], compared: Mapping[str, Sequence[Estimate]]) -> str:
    """At how many thresholds the proposed variant, or else the last one, is told apart from the baseline."""
    if not compared:
        return "accuracy against Top2Diff"
    key = PROPOSED if PROPOSED in compared else list(compared)[-1]
    name = next(variant.style.name for variant in variants if variant.key == key)
    if math.isnan(compared[key][0].low):
        return f"how accuracy falls with the Top2Diff that counts has no verdict for {name} (1 training)"
    counts = {
        "higher": sum(one.low > 0 for one in compared[key]),
        "lower": sum(one.high < 0 for one in compared[key]),
    }
    told = " and ".join(f"{word} at {count}" for word, count in counts.items() if count) or "told apart at none"
    return f"beside the baseline, accuracy of {name} is {told} of {len(compared[key])} Top2Diff thresholds"


def draw_convergence(variants: Sequence[Variant], title: str) -> tuple[Figure, pd.DataFrame]:
    """How the mean DeltaLoss of the sampled layers settles and its interval narrows as injections come in; of one training.

    Beside guided injections, dotted, what as many uniform ones would tell.
    """
    figure = Figure(figsize=(8.6, 3.9), layout="constrained")
    tables = []
    panels = figure.subplots(1, 2)
    for variant in variants:
        first = variant.results[0]
        if not first.convergence:
            continue
        points = pd.DataFrame([point.as_json() for point in first.convergence], columns=list(Convergence.model_fields))
        numbers = ("value", "low", "high", "uniform_error")
        points = points.astype(dict.fromkeys(numbers, float))  # also where none has any
        value = points["value"].where(points["value"] > 0)
        points["half_percent"] = 100 * (points["high"] - points["low"]) / (2 * value)
        points["uniform_percent"] = 100 * quantile(first.confidence) * points.pop("uniform_error") / value.iloc[-1]
        last = first.convergence[-1]
        said = f"DeltaLoss {show_estimate(_measured(last))} nats from {last.n:,} injections"
        count, low = points["injections_per_layer"], points["low"].clip(lower=points["value"] / 1000)
        band = panels[0].fill_between(count, low, points["high"], color=variant.style.colour, alpha=0.15, linewidth=0)
        mark(band, variant.element)
        for axes, y in zip(panels, ("value", "half_percent"), strict=True):
            (line,) = axes.plot(count, points[y], color=variant.style.colour, marker=variant.style.marker, linewidth=1.2)
            mark(line, variant.element, f"{variant.style.name}: {said}, 1 training")
        (line,) = panels[1].plot(count, points["uniform_percent"], color=variant.style.colour, linewidth=1.2, linestyle=":")
        mark(line, variant.element)
        tables.append(points.assign(run=first.run, variant=variant.key, plan=first.plan.plan))
    panels[0].set(ylabel="DeltaLoss, mean of sampled layers (nats)")
    panels[1].set(ylabel="half the interval, of the value (%)")
    if not tables:
        for axes in panels:
            axes.set_axis_off()
        panels[0].text(0, 0.5, "no layer was sampled at random", transform=panels[0].transAxes)
        state(figure, f"{title}: how the estimate settles is not known")
        add_note(figure, "faults planned by bit, or by what the first ones did, do not tell what fewer would have told")
        columns = ["injections_per_layer", "value", "low", "high", "n", "half_percent", "uniform_percent"]
        return figure, pd.DataFrame(columns=[*columns, "run", "variant", "plan"])
    found = pd.concat(tables, ignore_index=True)
    unseen = "".join(_scale(axes, found, name) for axes, name in zip(panels, ("value", "half_percent"), strict=True))
    last = found[found["injections_per_layer"] == found["injections_per_layer"].max()]
    for axes, names in zip(panels, (["value"], ["half_percent", "uniform_percent"]), strict=True):
        ends = last[names].to_numpy()
        if (ends > 0).any():
            low = ends[ends > 0].min() / CUT
            axes.set_ylim(low, min(np.nanmax(ends) * CUT, low * LONGEST_AXIS))
    name_styles(figure, [variant.style for variant in variants])
    state(figure, f"{title}: {_settled_in_words(last)}")
    uniform = "; dotted: what as many uniform ones would tell, from the weights of the guided ones" * _has_uniform(last)
    plans = f"plan {', '.join(sorted(set(found['plan'])))}{uniform}"
    note = f"one training each; bands: interval over injections, cut at the edge{unseen}"
    add_note(figure, f"{note}; layers whose faults were all tried are left out\n{plans}")
    return figure, found


def _measured(point: Convergence) -> Measured:
    return Measured(point.value, point.low, point.high, point.n)


def _scale(axes: Axes, found: pd.DataFrame, name: str) -> str:
    """Logarithmic axes, where there is something to scale. Returns what a note says of values that have no place there."""
    axes.set_xlabel("injections per layer")
    if not np.isfinite(found[name]).any():
        return ""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(found["injections_per_layer"])))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    unseen = logarithmic(axes, "y", found[name])
    plain_ticks(axes, "y")
    return unseen


def _has_uniform(last: pd.DataFrame) -> bool:
    return bool((last["uniform_percent"] > 0).any())


def _settled_in_words(last: pd.DataFrame) -> str:
    """How well the estimates are known at the end, and how many more injections that would have taken without a guide."""
    said = f"{last['injections_per_layer'].iloc[0]:,} injections per layer tell the mean DeltaLoss of sampled layers"
    halves = last["half_percent"].dropna()
    if halves.empty:
        return f"{said} without an interval"
    said += f" to ±{_between(halves)} %"
    if not _has_uniform(last):
        return said
    return f"{said}; uniform ones would have to be {_between((last['uniform_percent'] / halves) ** 2)} times as many"


def _between(numbers: pd.Series) -> str:
    low, high = show_number(numbers.min()), show_number(numbers.max())
    return low if low == high else f"{low} to {high}"
