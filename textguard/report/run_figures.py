"""Figures of whole classifiers, of one backbone on one data set."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from textguard.analysis.files import RUNS_DIR, load_threshold_curve
from textguard.errors import InvalidArtifact
from textguard.report.drawing import add_note, logarithmic
from textguard.report.variants import Variant, trainings
from textguard.schema.results import BASELINE


def draw_accuracy(variants: Sequence[Variant], title: str) -> tuple[Figure, pd.DataFrame]:
    """Accuracy against the least Top2Diff that a prediction must have to count as right."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    tables, curves = [], {}
    steps = None
    for variant in variants:
        own = [load_threshold_curve(result.run) for result in variant.results]
        for curve, result in zip(own, variant.results, strict=True):
            steps = curve["threshold_percent"] if steps is None else steps
            if not curve["threshold_percent"].equals(steps):
                raise InvalidArtifact(
                    f"{RUNS_DIR / result.run / 'thresholds.csv'} has other thresholds than another run's; delete both and run "
                    "'dvc repro': stage 'evaluate' writes them"
                )
        tables += [
            curve.assign(run=result.run, variant=variant.key) for curve, result in zip(own, variant.results, strict=True)
        ]
        thresholds = own[0]["threshold_percent"].to_numpy(float)
        accuracies = np.array([curve["accuracy_percent"] for curve in own])
        curves[variant.key] = accuracies.mean(axis=0)
        axes.plot(thresholds, curves[variant.key], color=variant.style.colour, linewidth=1.4, label=variant.style.name)
        if len(own) > 1:
            axes.fill_between(
                thresholds, accuracies.min(axis=0), accuracies.max(axis=0), color=variant.style.colour, alpha=0.2, linewidth=0
            )
    for variant in variants:
        if variant.key != BASELINE and BASELINE in curves:
            for at, accuracy in crossings(thresholds, curves[BASELINE], curves[variant.key]):
                axes.plot(at, accuracy, marker="o", markersize=6, markerfacecolor="none", color=variant.style.colour)
                axes.annotate(f"{at:.0f} %", (at, accuracy), xytext=(4, 5), textcoords="offset points", fontsize=7)
    axes.set(xlabel="Top2Diff threshold (%): predictions below it count as wrong", ylabel="top-1 accuracy (%)")
    axes.set_title(f"{title}: accuracy against Top2Diff")
    axes.legend()
    band = "; bands: lowest to highest" if any(len(variant.results) > 1 for variant in variants) else ""
    images = variants[0].results[0].top1.n
    note = f"n = {images:,} test images, {trainings(variants)} per line{band}; circles: last crossing with the baseline"
    add_note(figure, note)
    return figure, pd.concat(tables, ignore_index=True)


def crossings(thresholds: np.ndarray, baseline: np.ndarray, guided: np.ndarray) -> list[tuple[float, float]]:
    """Where a guided curve crosses the baseline's for the last time, up or down: threshold and accuracy; at most one."""
    ahead = guided - baseline
    # Where both are level, who was ahead before still counts as ahead: to touch is not to cross.
    apart = np.flatnonzero(ahead)
    changes = np.flatnonzero(np.diff(np.sign(ahead[apart])))
    if not len(changes):
        return []
    last = apart[changes[-1]]
    share = ahead[last] / (ahead[last] - ahead[last + 1])
    at = thresholds[last] + share * (thresholds[last + 1] - thresholds[last])
    return [(float(at), float(guided[last] + share * (guided[last + 1] - guided[last])))]


def draw_convergence(variants: Sequence[Variant], title: str) -> tuple[Figure, pd.DataFrame]:
    """The mean DeltaLoss of the sampled layers and its interval, after fewer injections; of one training per variant."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    tables = []
    for variant in variants:
        points = pd.DataFrame(point.as_json() for point in variant.results[0].convergence)
        if points.empty:
            continue
        points = points.astype(dict.fromkeys(("value", "low", "high"), float))  # also where no point has an interval
        count, low = points["injections_per_layer"], points["low"].clip(lower=points["value"] / 1000)
        axes.plot(count, points["value"], color=variant.style.colour, marker="o", linewidth=1.2, label=variant.style.name)
        axes.fill_between(count, low, points["high"], color=variant.style.colour, alpha=0.2, linewidth=0)
        tables.append(points.assign(run=variant.results[0].run, variant=variant.key))
    axes.set(xlabel="injections per layer", ylabel="DeltaLoss, mean of sampled layers (nats)")
    axes.set_title(f"{title}: convergence")
    if tables:
        points = pd.concat(tables)
        if np.isfinite(points["value"]).any():  # or there is nothing to scale
            axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(points["injections_per_layer"])))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.legend()
        unseen = logarithmic(axes, "y", points["value"])
        note = "one training each; bands: interval over injections; layers whose faults were all tried are left out" + unseen
    else:
        axes.text(0.5, 0.5, "no layer was sampled at random", ha="center", transform=axes.transAxes)
        note = "faults planned by bit, or by what the first ones did, do not tell what fewer would have told"
    add_note(figure, note)
    columns = ["injections_per_layer", "value", "low", "high", "n", "run", "variant"]
    return figure, pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
