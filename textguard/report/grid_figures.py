"""Figures of a whole grid."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from textguard.report.cells import Cell, count_trainings
from textguard.report.drawing import add_note
from textguard.report.published import Published, load_published
from textguard.report.results import read_estimate

PARTS = {"last_layer": "last layer", "overall": "all layers"}
MARKERS = "osD^vPX*<>hpd8"


def draw_improvement(cells: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> tuple[Figure, pd.DataFrame]:
    """How many times less DeltaLoss than the baseline: one row per cell, with its interval. cells: see `load_cells`."""
    figure = Figure(figsize=(7.0, 1.5 + 0.28 * len(cells)), layout="constrained")
    panels = figure.subplots(1, len(PARTS), sharey=True)
    rows, published = [], [row for row in load_published() if row.source == "paper"]
    names = [f"{cell['dataset']}, {cell['backbone']}, {cell['variant']}" for cell in cells]
    for axes, (part, label) in zip(panels, PARTS.items(), strict=True):
        for row, cell in enumerate(cells):
            found = read_estimate(cell[part])
            bars = [[found.value - found.low], [found.high - found.value]]
            if np.isfinite(found.value):
                axes.errorbar(found.value, row, xerr=bars, marker="o", color=colours[cell["variant"]], capsize=2, elinewidth=1)
            beside = _published(cell, published, part)
            if beside is not None:
                axes.plot(beside, row, marker="D", color="black", markerfacecolor="none")
            where = {name: cell[name] for name in ("dataset", "backbone", "variant")}
            numbers = {
                "trainings": len(cell["seeds"]),
                **found.as_json(),
                "verdict": cell["verdict"][part],
                "published": beside,
            }
            rows.append({**where, "part": part, **numbers})
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel=f"improvement, {label} (x)")
    panels[0].set_yticks(range(len(cells)), names)
    panels[0].set_ylim(len(cells) - 0.5, -0.5)
    figure.suptitle("Improvement in reliability over the baseline", fontsize=9)
    spread = count_trainings(len(cell["seeds"]) for cell in cells)
    note = (
        f"DeltaLoss of the baseline / text-guided; right of 1 is better; {spread} per row; bars: interval\n"
        "diamonds: the paper's, for this backbone and start of the head, on ImageNet where it has no such data set"
    )
    add_note(figure, note)
    return figure, pd.DataFrame(rows)


def _published(cell: Mapping[str, Any], rows: Sequence[Published], part: str) -> float | None:
    """The paper's improvement for a cell's backbone and variant: on its data set, else on ImageNet, where it has one."""
    fitting = [row for row in rows if (row.backbone, row.variant) == (cell["backbone"], cell["variant"])]
    for dataset in (cell["dataset"], "imagenet"):
        for row in fitting:
            if row.dataset == dataset and part in row.numbers:
                return float(row.numbers[part])
    return None


def draw_tradeoff(cells: Sequence[Cell]) -> tuple[Figure, pd.DataFrame]:
    """Accuracy against DeltaLoss: who is better in both? One point per training."""
    figure = Figure(figsize=(6.8, 4.0), layout="constrained")
    axes = figure.add_subplot()
    places = sorted({(cell.results[0].run.dataset, cell.results[0].run.backbone) for cell in cells})
    rows = []
    for cell in cells:
        for result in cell.results:
            place = (result.run.dataset, result.run.backbone)
            x, y = result.top1.times(100), result.overall
            low = max(y.low, y.value / 1000)
            axes.errorbar(
                x.value,
                y.value,
                xerr=[[x.value - x.low], [x.high - x.value]],
                yerr=[[y.value - low], [y.high - y.value]],
                color=cell.colour,
                marker=MARKERS[places.index(place) % len(MARKERS)],
                elinewidth=0.7,
                markersize=5,
            )
            rows.append({"run": result.key, "variant": cell.variant, "top1_percent": x.value, "delta_loss": y.value})
    numbers = pd.DataFrame(rows)
    front = numbers.sort_values(["top1_percent", "delta_loss"], ascending=[False, True])
    numbers["undominated"] = False
    numbers.loc[front.index[front["delta_loss"] <= front["delta_loss"].cummin()], "undominated"] = True
    edge = numbers[numbers["undominated"]].sort_values("top1_percent")
    axes.plot(edge["top1_percent"], edge["delta_loss"], color="black", linewidth=0.8, linestyle=":", zorder=0)
    axes.set(yscale="log", xlabel="top-1 accuracy (%)", ylabel="overall DeltaLoss (nats)", title="Accuracy and resilience")
    variants = {cell.variant: cell.colour for cell in cells}
    handles = [Line2D([], [], linestyle="none", marker="s", color=colour, label=name) for name, colour in variants.items()]
    handles += [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=MARKERS[number % len(MARKERS)],
            color="black",
            markerfacecolor="none",
            label=" ".join(reversed(place)),
        )
        for number, place in enumerate(places)
    ]
    figure.legend(handles=handles, loc="outside right upper")  # beside the points, and not on them
    note = "one point per training; bars: intervals over images and over injections; dotted: none is better in both"
    add_note(figure, note)
    return figure, numbers
