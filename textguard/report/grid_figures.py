"""Figures of a whole grid."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from textguard.report.drawing import AS_IS, add_note, logarithmic, ratio_axis
from textguard.report.published import Published, load_published
from textguard.report.theme import PLACE_MARKERS, PUBLISHED_MARKER, Style, place_name
from textguard.report.variants import Variant, count_trainings
from textguard.schema.results import MEASURES, PLACES, Cell

# What the panels show: measure, place, and the paper's name for it.
PANELS = [("sdc", "by_neurons", ""), ("sdc", "overall", ""), ("delta_loss", "head", ""), ("delta_loss", "overall", "overall")]


def draw_improvement(cells: Sequence[Cell], styles: Mapping[str, Style]) -> tuple[Figure, pd.DataFrame]:
    """How many times less faults do than in the baseline: one row per cell, with its interval. Numbers: of all measures."""
    figure = Figure(figsize=(9.0, 1.5 + 0.28 * len(cells)), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    published = [row for row in load_published() if row.source == "paper"]
    names = [f"{place_name(cell.dataset, cell.backbone)}, {styles[cell.variant].name}" for cell in cells]
    for axes, (measure, place, part) in zip(panels, PANELS, strict=True):
        for row, cell in enumerate(cells):
            found, style = getattr(getattr(cell.first.improvement, measure), place), styles[cell.variant]
            bars = [[found.value - found.low], [found.high - found.value]]
            if np.isfinite(found.value):
                look = {"marker": style.marker, "color": style.colour, "capsize": 2, "elinewidth": 1}
                axes.errorbar(found.value, row, xerr=bars, **look)
            beside = _published(cell, published, part)
            if beside is not None:
                axes.plot(beside, row, marker=PUBLISHED_MARKER, color="black", markerfacecolor="none")
        ratio_axis(axes, f"{MEASURES[measure]}, {PLACES[place]} (x)")
    panels[0].set_yticks(range(len(cells)), names, **AS_IS)
    panels[0].set_ylim(len(cells) - 0.5, -0.5)
    figure.suptitle("What faults do in the baseline / in the text-guided classifier", fontsize=9)
    spread = count_trainings(len(cell.seeds) for cell in cells)
    note = (
        f"right of 1 the text-guided one is better; {spread} per row; bars: interval\n"
        "diamonds: the paper's, for this backbone and start of the head, on ImageNet where it has no such data set"
    )
    add_note(figure, note)
    numbers = [
        {
            "dataset": cell.dataset,
            "backbone": cell.backbone,
            "variant": cell.variant,
            "measure": measure,
            "place": place,
            "what": f"{MEASURES[measure]}, {PLACES[place]}",
            "trainings": len(cell.seeds),
            **getattr(getattr(cell.first.improvement, measure), place).as_json(),
            "verdict": getattr(getattr(cell.first.verdict, measure), place),
            "published": _published(cell, published, place) if measure == "delta_loss" else None,
        }
        for cell in cells
        for measure in MEASURES
        for place in PLACES
    ]
    return figure, pd.DataFrame(numbers)


def _published(cell: Cell, rows: Sequence[Published], part: str) -> float | None:
    """The paper's improvement for a cell's backbone and variant: on its data set, else on ImageNet, where it has one."""
    fitting = [row for row in rows if (row.backbone, row.variant) == (cell.backbone, cell.variant)]
    for dataset in (cell.dataset, "imagenet"):
        for row in fitting:
            if row.dataset == dataset and part in row.numbers:
                return float(row.numbers[part])
    return None


def draw_tradeoff(variants: Sequence[Variant]) -> tuple[Figure, pd.DataFrame]:
    """Accuracy against DeltaLoss: who is better in both? One point per training."""
    figure = Figure(figsize=(6.8, 4.0), layout="constrained")
    axes = figure.add_subplot()
    places = sorted({(result.dataset, result.backbone) for variant in variants for result in variant.results})
    markers = {place: PLACE_MARKERS[number % len(PLACE_MARKERS)] for number, place in enumerate(places)}
    rows = []
    for variant in variants:
        for result in variant.results:
            x, y = result.top1.times(100), result.overall.delta_loss
            low = max(y.low, y.value / 1000)
            axes.errorbar(
                x.value,
                y.value,
                xerr=[[x.value - x.low], [x.high - x.value]],
                yerr=[[y.value - low], [y.high - y.value]],
                color=variant.style.colour,
                marker=markers[result.dataset, result.backbone],
                elinewidth=0.7,
                markersize=5,
            )
            rows.append({"run": result.run, "variant": variant.key, "top1_percent": x.value, "delta_loss": y.value})
    numbers = pd.DataFrame(rows)
    front = numbers.sort_values(["top1_percent", "delta_loss"], ascending=[False, True])
    numbers["undominated"] = False
    numbers.loc[front.index[front["delta_loss"] <= front["delta_loss"].cummin()], "undominated"] = True
    edge = numbers[numbers["undominated"]].sort_values("top1_percent")
    axes.plot(edge["top1_percent"], edge["delta_loss"], color="black", linewidth=0.8, linestyle=":", zorder=0)
    unseen = logarithmic(axes, "y", numbers["delta_loss"])
    axes.set(xlabel="top-1 accuracy (%)", ylabel="overall DeltaLoss (nats)", title="Accuracy and resilience")
    looks = {variant.style.name: variant.style.colour for variant in variants}
    handles = [Line2D([], [], linestyle="none", marker="s", color=colour, label=name) for name, colour in looks.items()]
    look = {"linestyle": "none", "color": "black", "markerfacecolor": "none"}
    handles += [Line2D([], [], marker=marker, label=place_name(*place), **look) for place, marker in markers.items()]
    figure.legend(handles=handles, loc="outside right upper")  # beside the points, and not on them
    note = "one point per training; bars: intervals over images and over injections; dotted: none is better in both"
    add_note(figure, note + unseen)
    return figure, numbers
