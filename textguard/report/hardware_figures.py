"""Figures of the faults of section `hardware`, of one backbone on one data set."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from textguard.analysis.duplication import Duplicated, duplicated
from textguard.analysis.hardware import mean_curve
from textguard.estimates.statistics import Estimate
from textguard.report.drawing import AS_IS, SMALL, add_note, drawable, logarithmic, mark, state
from textguard.report.forest import LINE_INCHES, Row, draw_rows, lines, name_rows, ratio_limits, tally
from textguard.report.legend import name_styles
from textguard.report.rendering import show_estimate, show_number
from textguard.report.theme import Style, element_key
from textguard.report.variants import Variant, count_trainings, trainings
from textguard.schema.hardware import USUAL, Curve, Hardware, HardwareCell
from textguard.schema.results import MEASURES, Cell

LONGEST = 40  # characters of a layer's name that are drawn
# What bit errors in memory do: a field of `Point`, how often it goes into its unit, and the axis's label.
SUFFERED = {"accuracy": (1, "top-1 lost (points)"), "changed": (100, "predictions changed (%)")}


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
    figure = Figure(figsize=(10.2, 1.9 + LINE_INCHES * lines(_kinds(table, "sdc", cells, styles))), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, measure in zip(panels, measures, strict=True):
        rows = _kinds(table, measure, cells, styles)
        draw_rows(axes, rows, ratio_limits(rows), f"{MEASURES[measure]}, baseline / variant (times less)", "ratio [interval]")
    name_rows(panels[0], rows)
    said = {measure: table[table["measure"] == measure]["verdict"].to_list() for measure in measures}
    first, second = tally(said["sdc"]), tally(said["delta_loss"], of="")
    who = f" with {styles[cells[0].variant].name}" if len(cells) == 1 else ""
    state(figure, f"{title}, faults of {table['faults'].nunique()} kinds: SDC{who} is {first}, DeltaLoss {second}")
    spread = count_trainings(len(cell.seeds) for cell in cells)
    note = f"means over all layers; right is better; filled and bold: the interval leaves 1 out; {spread} each"
    add_note(figure, f"{note}; arrows: it goes on\n{USUAL}: those of section inject")
    return figure, table


def _kinds(table: pd.DataFrame, measure: str, cells: Sequence[HardwareCell], styles: Mapping[str, Style]) -> list[Row]:
    """One row per kind of fault and variant; a single variant's stand without groups."""
    by_variant = {cell.variant: cell for cell in cells}
    part = table[table["measure"] == measure]
    rows = []
    for faults in part["faults"].unique():
        for _, found in part[part["faults"] == faults].iterrows():
            cell, style = by_variant[found["variant"]], styles[found["variant"]]
            numbers = [math.nan if found[name] is None else float(found[name]) for name in ("value", "low", "high")]
            names = (faults, style.name) if len(cells) > 1 else ("", faults)
            key = element_key(cell.dataset, cell.backbone, cell.variant)
            estimate = Estimate(*numbers, int(found["n"]))
            rows.append(Row(*names, estimate, found["verdict"], style.colour, style.marker, key, len(cell.seeds)))
    return rows


def draw_error_rates(
    variants: Sequence[Variant], runs: Mapping[str, Hardware], cells: Sequence[HardwareCell], title: str
) -> tuple[Figure, pd.DataFrame]:
    """Accuracy lost and predictions changed against the bit error rate of the parameters' memory: one column per protection.

    A thin line per training, their mean with its interval. cells: the same variants beside their baseline.
    """
    protections = list(dict.fromkeys(curve.protection for run in runs.values() for curve in run.curves))
    figure = Figure(figsize=(2.4 + 2.4 * len(protections), 5.2), layout="constrained")
    panels = figure.subplots(2, len(protections), sharex="col", sharey="row", squeeze=False)
    rows = []
    for column, protection in zip(panels.T, protections, strict=True):
        for variant in variants:
            own = [runs[result.run] for result in variant.results]
            curves = [next(curve for curve in run.curves if curve.protection == protection) for run in own]
            for result, curve in zip(variant.results, curves, strict=True):
                rates = [point.rate for point in curve.points]
                for axes, measure in zip(column, SUFFERED, strict=True):
                    values = [getattr(point, measure).value * SUFFERED[measure][0] for point in curve.points]
                    (line,) = axes.plot(rates, values, color=variant.style.colour, linewidth=0.5, alpha=0.7)
                    said = f"{SUFFERED[measure][1]} {show_number(values[-1])} at a rate of {rates[-1]:g}"
                    mark(line, variant.element, f"{variant.style.name}, seed {result.seed}: {said}, 1 training")
                rows += [
                    {
                        "run": result.run,
                        "variant": variant.key,
                        "protection": protection,
                        "rate": point.rate,
                        **point.accuracy.as_json(),
                        **{f"changed_{end}": number for end, number in point.changed.as_json().items()},
                    }
                    for point in curve.points
                ]
            _draw_mean(column, variant, curves, own[0].confidence)
        bits = next(curve.bits for run in runs.values() for curve in run.curves if curve.protection == protection)
        column[0].set(title=f"{protection}\n{bits:.4g} stored per bit")
        column[1].set(xlabel="bit errors per stored bit")
        logarithmic(column[1], "x", [row["rate"] for row in rows])
    for axes, (_, label) in zip(panels[:, 0], SUFFERED.values(), strict=True):
        axes.set_ylabel(label)
    name_styles(figure, [variant.style for variant in variants])
    state(figure, f"{title}: {_rates_in_words(cells)}")
    means = f"thick: their mean, {trainings(variants)}, with its interval as a band"
    add_note(figure, f"errors that stay in the parameters' memory; thin: one line per training; {means}")
    return figure, pd.DataFrame(rows)


def _draw_mean(column: Sequence[Axes], variant: Variant, curves: Sequence[Curve], confidence: float) -> None:
    means = mean_curve(curves, confidence)
    for number, (axes, (factor, label)) in enumerate(zip(column, SUFFERED.values(), strict=True), start=1):
        rates, found = [mean[0] for mean in means], [mean[number].times(factor) for mean in means]
        low, high = ([getattr(one, end) for one in found] for end in ("low", "high"))
        style = variant.style
        mark(axes.fill_between(rates, low, high, color=style.colour, alpha=0.12, linewidth=0), variant.element)
        look = {"color": style.colour, "marker": style.marker, "markersize": 4.5, "linewidth": 1.4}
        (line,) = axes.plot(rates, [one.value for one in found], **look)
        said = f"{label} {show_estimate(found[-1])} at a rate of {rates[-1]:g}"
        mark(line, variant.element, f"{style.name}: {said}, {trainings([variant])}")


def _rates_in_words(cells: Sequence[HardwareCell]) -> str:
    """Whether the bit error rate that costs the most points of those asked for is another than the baseline's."""
    ratios = [ratio for cell in cells for ratio in cell.ratios if ratio.measure == "rate"]
    if not ratios:
        return "what bit errors in the parameters' memory cost"
    most = max(ratio.points for ratio in ratios)
    said = tally([ratio.verdict for ratio in ratios if ratio.points == most], "higher", "lower")
    return f"beside the baseline, the bit error rate that costs {most:g} points of top-1 is {said}"


def draw_protection_cost(variants: Sequence[Variant], title: str) -> tuple[Figure, pd.DataFrame]:
    """Which share of SDC is covered where the layers that bring most of it per multiply-add are computed twice."""
    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 100], [0, 100], color="black", linewidth=0.8, linestyle=":", zorder=1)
    rows, curves = [], []
    for variant in variants:
        found = duplicated(variant.results)
        curves += found
        for one in found:
            look = {"where": "post", "color": variant.style.colour, "linewidth": 0.5, "alpha": 0.7}
            (line,) = axes.step(100 * one.cost, 100 * one.covered, **look)
            mark(line, variant.element, f"{variant.style.name}: {_half_in_words([one])}")
            rows += [
                {"run": one.run, "variant": variant.key, "layer": layer, "cost": 100 * cost, "covered": 100 * covered}
                for layer, cost, covered in zip(("", *one.layers), one.cost, one.covered, strict=True)
            ]
        if not found:
            continue
        at = np.linspace(0, 1, 101)
        mean = 100 * np.mean([one.at(at) for one in found], axis=0)
        look = {"color": variant.style.colour, "marker": variant.style.marker, "markersize": 5, "markevery": 10}
        (line,) = axes.plot(100 * at, mean, drawstyle="steps-post", linewidth=1.5, **look)
        mark(line, variant.element, f"{variant.style.name}: {_half_in_words(found)}")
    axes.set(xlabel="multiply-adds that are done twice (% of all)", ylabel="share of SDC in these layers (%)")
    axes.set(xlim=(0, 100), ylim=(0, 102))
    _name_largest(axes, curves)
    name_styles(figure, [variant.style for variant in variants])
    state(figure, f"{title}: {_half_in_words(curves)}")
    honest = all(len(variant.results) > 1 for variant in variants)
    order = "is chosen on the other trainings" if honest else "of a single training is chosen on its own faults: optimistic"
    add_note(
        figure,
        f"layers in the order of SDC per multiply-add, weighed by neurons; the order {order}\n"
        f"thin: one line per training; thick: their mean, {trainings(variants)}; dotted: no better than chance; "
        "comparing the results costs more",
    )
    return figure, pd.DataFrame(rows)


def _half_in_words(curves: Sequence[Duplicated]) -> str:
    """Which share of multiply-adds is in the layers that hold half of SDC, from the lowest to the highest training."""
    if not curves:
        return "no SDC was seen"
    low, high = (end(100 * curve.cost_of(0.5) for curve in curves) for end in (min, max))
    between = f"{low:.2g} %" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} to {high:.2g} %"
    return f"half of SDC is in layers with {between} of the multiply-adds, in {count_trainings([len(curves)])}"


def _name_largest(axes: Axes, curves: Sequence[Duplicated]) -> None:
    """Write the name of the layer that holds most of SDC, where it is the same in all trainings, beside its step."""
    steps = [(curve, int(np.diff(curve.covered).argmax())) for curve in curves]
    if len({curve.layers[place] for curve, place in steps}) != 1:
        return
    shares = [100 * (curve.covered[place + 1] - curve.covered[place]) for curve, place in steps]
    cost = 100 * max(curve.cost[place + 1] for curve, place in steps)
    name = drawable(steps[0][0].layers[steps[0][1]], LONGEST)
    said = f"{name}: {min(shares):.0f} to {max(shares):.0f} % of SDC"
    axes.annotate(said, (cost, 50), xytext=(8, 0), textcoords="offset points", va="center", fontsize=SMALL, **AS_IS)
