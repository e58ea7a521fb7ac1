"""Figures of corrupted images."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from textguard.report.drawing import add_note, logarithmic
from textguard.report.rendering import show_estimate
from textguard.report.theme import PLACE_MARKERS, place_name
from textguard.report.variants import Variant
from textguard.schema.corruptions import CLEAN, EFFECTS, ComparedCorruptions, Corruptions


def draw_corruptions(variants: Sequence[Variant], runs: Mapping[str, Corruptions], title: str) -> tuple[Figure, pd.DataFrame]:
    """Accuracy against severity: one panel per kind of corruption, one line per training. Severity 0: clean images."""
    table = pd.DataFrame(
        {
            **{"run": result.run, "variant": variant.key, "kind": images.kind, "severity": images.severity},
            **images.top1.times(100).as_json(),
        }
        for variant in variants
        for result in variant.results
        for images in runs[result.run].conditions
    )
    kinds = [kind for kind in table["kind"].unique() if kind != CLEAN]
    figure = Figure(figsize=(1.8 + 2.2 * len(kinds), 3.4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        for variant in variants:
            for number, result in enumerate(variant.results):
                part = table[(table["run"] == result.run) & table["kind"].isin([CLEAN, kind])].sort_values("severity")
                style = variant.style
                look = {"color": style.colour, "marker": style.marker, "markersize": 4, "linewidth": 1}
                axes.plot(part["severity"], part["value"], label=None if number else style.name, **look)
                low, high = (part[end].astype(float) for end in ("low", "high"))
                axes.fill_between(part["severity"], low, high, color=style.colour, alpha=0.1, linewidth=0)
        axes.set(title=kind, xlabel="severity", xticks=sorted(table["severity"].unique()))
    figure.axes[0].set_ylabel("top-1 accuracy (%)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(f"{title}: accuracy on corrupted images", fontsize=9)
    add_note(figure, "severity 0: clean images; one line per training; bands: intervals over images")
    return figure, table


def draw_together(variants: Sequence[Variant], compared: ComparedCorruptions) -> tuple[Figure, pd.DataFrame]:
    """What faults do on clean images against what corruption costs: does what stands one stand the other?"""
    known = {both.run: both for both in compared.classifiers}
    shown = [(variant, result) for variant in variants for result in variant.results if result.run in known]
    places = sorted({(result.dataset, result.backbone) for _, result in shown})
    markers = {place: PLACE_MARKERS[number % len(PLACE_MARKERS)] for number, place in enumerate(places)}
    figure = Figure(figsize=(8.6, 3.8), layout="constrained")
    rows = []
    for axes, measure in zip(figure.subplots(1, 2, sharey=True), ("sdc", "delta_loss"), strict=True):
        for variant, result in shown:
            both = known[result.run]
            x, y = getattr(both, measure).times(100 if measure == "sdc" else 1), both.lost
            axes.errorbar(
                x.value,
                y.value,
                xerr=[[x.value - max(x.low, x.value / 1000)], [x.high - x.value]],
                yerr=[[y.value - y.low], [y.high - y.value]],
                color=variant.style.colour,
                marker=markers[result.dataset, result.backbone],
                elinewidth=0.7,
                markersize=5,
            )
            numbers = {"lost_points": y.value, "lost_low": y.low, "lost_high": y.high}
            rows.append({"run": result.run, "variant": variant.key, "measure": measure, **x.as_json(), **numbers})
        logarithmic(axes, "x", [row["value"] for row in rows if row["measure"] == measure])
        found = [one for one in compared.together if one.measure == measure]
        said = "; ".join(f"{one.dataset} {show_estimate(one.correlation)}, n = {one.correlation.n}" for one in found)
        unit = "%" if measure == "sdc" else "nats"
        axes.set_xlabel(f"{EFFECTS[measure]} on clean images ({unit})")
        axes.set_title(f"rank correlation: {said}", fontsize=7)
    figure.axes[0].set_ylabel("top-1 lost to corruption (points)")
    looks = {variant.style.name: variant.style.colour for variant, _ in shown}
    handles = [Line2D([], [], linestyle="none", marker="s", color=colour, label=name) for name, colour in looks.items()]
    look = {"linestyle": "none", "color": "black", "markerfacecolor": "none"}
    handles += [Line2D([], [], marker=marker, label=place_name(*place), **look) for place, marker in markers.items()]
    figure.legend(handles=handles, loc="outside right upper")
    figure.suptitle("Resilience to faults and to corruption", fontsize=9)
    add_note(figure, "one point per training; bars: intervals over injections and over images; lower left is better in both")
    return figure, pd.DataFrame(rows)
