"""Figures of the faults of section `hardware`, of one backbone on one data set."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from textguard.report.drawing import AS_IS, add_note, logarithmic, ratio_axis
from textguard.report.theme import Style
from textguard.report.variants import Variant, count_trainings
from textguard.schema.hardware import USUAL, Hardware, HardwareCell
from textguard.schema.results import MEASURES, Cell


def draw_fault_models(
    cells: Sequence[HardwareCell], usual: Sequence[Cell], styles: Mapping[str, Style], title: str
) -> tuple[Figure, pd.DataFrame]:
    """How many times less faults of each kind do than in the baseline: one row per kind, one mark per variant.

    cells: of one backbone on one data set. usual: the same under the faults of section inject.
    """
    measures = ("sdc", "delta_loss")
    numbers = []
    for cell, first in zip(cells, (cell.first for cell in usual), strict=True):
        for measure in measures:
            found, said = (getattr(part, measure).overall for part in (first.improvement, first.verdict))
            numbers.append({"faults": USUAL, "variant": cell.variant, "measure": measure, **found.as_json(), "verdict": said})
        numbers += [
            {
                "faults": ratio.faults,
                "variant": cell.variant,
                "measure": ratio.measure,
                **ratio.ratio.as_json(),
                "verdict": ratio.verdict,
            }
            for ratio in cell.ratios
            if ratio.measure in measures and ratio.place == "overall"
        ]
    table = pd.DataFrame(numbers)
    names = list(dict.fromkeys(table["faults"]))
    figure = Figure(figsize=(8.0, 1.6 + 0.12 * (1 + len(cells)) * len(names)), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2, sharey=True), measures, strict=True):
        for number, cell in enumerate(cells):
            style, part = styles[cell.variant], table[(table["measure"] == measure) & (table["variant"] == cell.variant)]
            part = part[np.isfinite(part["value"].astype(float))]
            place = [names.index(name) + 0.7 * ((number + 0.5) / len(cells) - 0.5) for name in part["faults"]]
            value, low, high = (part[column].astype(float).to_numpy() for column in ("value", "low", "high"))
            # An end that is not known reaches as far as the axis does.
            low, high = (
                np.where(np.isnan(low), value / 1e3, np.maximum(low, value / 1e3)),
                np.where(np.isfinite(high), high, value * 1e3),
            )
            look = {"marker": style.marker, "color": style.colour, "label": style.name, "capsize": 2, "elinewidth": 1}
            axes.errorbar(value, place, xerr=[value - low, high - value], linestyle="none", **look)
        ratio_axis(axes, f"{MEASURES[measure]}, all layers (x)")
        for row in range(len(names) - 1):
            axes.axhline(row + 0.5, color="#dddddd", linewidth=0.6)
    figure.axes[0].set_yticks(range(len(names)), names, **AS_IS)
    figure.axes[0].set_ylim(len(names) - 0.5, -0.5)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.suptitle(f"{title}: what faults do in the baseline / in the text-guided classifier", fontsize=9)
    spread = count_trainings(len(cell.seeds) for cell in cells)
    said = f"right of 1 the text-guided one is better; {spread} each; bars: interval, a thousandfold where it has no end"
    add_note(figure, f"{said}\n{USUAL}: those of section inject")
    return figure, table


def draw_error_rates(variants: Sequence[Variant], runs: Mapping[str, Hardware], title: str) -> tuple[Figure, pd.DataFrame]:
    """Accuracy lost against the bit error rate of the parameters' memory: one line per training, one panel per protection."""
    protections = list(dict.fromkeys(curve.protection for run in runs.values() for curve in run.curves))
    figure = Figure(figsize=(1.6 + 2.9 * len(protections), 3.6), layout="constrained")
    rows = []
    for axes, protection in zip(figure.subplots(1, len(protections), sharey=True, squeeze=False)[0], protections, strict=True):
        for variant in variants:
            for number, result in enumerate(variant.results):
                (curve,) = (curve for curve in runs[result.run].curves if curve.protection == protection)
                rate = [point.rate for point in curve.points]
                lost, low, high = ([getattr(point.accuracy, end) for point in curve.points] for end in ("value", "low", "high"))
                look = {"color": variant.style.colour, "marker": variant.style.marker, "markersize": 4, "linewidth": 1}
                axes.plot(rate, lost, label=None if number else variant.style.name, **look)
                axes.fill_between(rate, low, high, color=variant.style.colour, alpha=0.1, linewidth=0)
                rows += [
                    {
                        "run": result.run,
                        "variant": variant.key,
                        "protection": protection,
                        "rate": point.rate,
                        **point.accuracy.as_json(),
                    }
                    for point in curve.points
                ]
        bits = next(curve.bits for run in runs.values() for curve in run.curves if curve.protection == protection)
        axes.set(xlabel="bit errors per stored bit", title=f"{protection}, {bits:.4g} stored per bit")
        logarithmic(axes, "x", [row["rate"] for row in rows])
    figure.axes[0].set_ylabel("top-1 lost (points)")
    figure.axes[0].legend()
    figure.suptitle(f"{title}: bit errors that stay in the parameters' memory", fontsize=9)
    add_note(figure, "one line per training; bands: interval over memories with that error rate")
    return figure, pd.DataFrame(rows)
