"""Figures of corrupted images."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from textguard.report.drawing import add_note, logarithmic, mark, plain_ticks, state
from textguard.report.forest import tally
from textguard.report.legend import name_styles
from textguard.report.rendering import show_estimate
from textguard.report.theme import element_key, fills
from textguard.report.variants import Variant, trainings
from textguard.schema.corruptions import CLEAN, EFFECTS, ComparedCorruptions, CorruptionCell, Corruptions


def draw_corruptions(
    variants: Sequence[Variant], runs: Mapping[str, Corruptions], cells: Sequence[CorruptionCell], title: str
) -> tuple[Figure, pd.DataFrame]:
    """Accuracy against severity: one panel per kind of corruption; a thin line per training, and their mean. 0: clean images.

    cells: the same variants beside their baseline; empty where there is none.
    """
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
    figure = Figure(figsize=(2.6 + 2.2 * max(2, len(kinds)), 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        for variant in variants:
            style = variant.style
            part = table[(table["variant"] == variant.key) & table["kind"].isin([CLEAN, kind])]
            for _, one in part.sort_values("severity").groupby("run"):
                (line,) = axes.plot(one["severity"], one["value"], color=style.colour, linewidth=0.5, alpha=0.6)
                mark(line, variant.element)
            mean = part.groupby("severity")["value"].mean()
            (line,) = axes.plot(mean.index, mean, color=style.colour, marker=style.marker, markersize=4.5, linewidth=1.4)
            said = f"{mean.iloc[0]:.1f} % on clean images, {mean.iloc[-1]:.1f} % at severity {mean.index[-1]}"
            mark(line, variant.element, f"{style.name}, {kind}: {said}, {trainings([variant])}")
        axes.set(title=kind, xlabel="severity", xticks=sorted(table["severity"].unique()))
    figure.axes[0].set_ylabel("top-1 accuracy (%)")
    name_styles(figure, [variant.style for variant in variants])
    verdicts = [
        effect.verdict for cell in cells for effect in cell.effects if effect.measure == "top1" and effect.kind != CLEAN
    ]
    found = f"beside the baseline, accuracy on corrupted images is {tally(verdicts, 'higher', 'lower')}" if verdicts else ""
    state(figure, f"{title}: {found or 'accuracy on corrupted images'}")
    add_note(figure, f"severity 0: clean images; thin: one line per training; thick: their mean, {trainings(variants)}")
    return figure, table


def draw_together(variants: Sequence[Variant], compared: ComparedCorruptions) -> tuple[Figure, pd.DataFrame]:
    """What faults do on clean images against what corruption costs: does what stands one stand the other?"""
    known = {both.run: both for both in compared.classifiers}
    shown = [(variant, result) for variant in variants for result in variant.results if result.run in known]
    fill = fills(sorted({(result.dataset, result.backbone) for _, result in shown}))
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    rows = []
    for axes, measure in zip(figure.subplots(1, 2, sharey=True), ("sdc", "delta_loss"), strict=True):
        for variant, result in shown:
            both, place = known[result.run], (result.dataset, result.backbone)
            x, y = getattr(both, measure).times(100 if measure == "sdc" else 1), both.lost
            bars = axes.errorbar(
                x.value,
                y.value,
                xerr=[[x.value - max(x.low, x.value / 1000)], [x.high - x.value]],
                yerr=[[y.value - y.low], [y.high - y.value]],
                color=variant.style.colour,
                marker=variant.style.marker,
                fillstyle=fill[place],
                markerfacecoloralt="white",
                elinewidth=0.7,
                markersize=5.5,
            )
            said = f"{variant.style.name}, seed {result.seed}: {EFFECTS[measure]} {show_estimate(x)}, lost {show_estimate(y)}"
            for drawn in (bars.lines[0], *bars.lines[2]):
                mark(drawn, element_key(*place, variant.key), f"{said} points, 1 training")
            numbers = {"lost_points": y.value, "lost_low": y.low, "lost_high": y.high}
            rows.append({"run": result.run, "variant": variant.key, "measure": measure, **x.as_json(), **numbers})
        logarithmic(axes, "x", [row["value"] for row in rows if row["measure"] == measure])
        plain_ticks(axes, "x")
        found = [one for one in compared.together if one.measure == measure]
        said = "; ".join(f"{one.dataset} {show_estimate(one.correlation)}, n = {one.correlation.n}" for one in found)
        unit = "%" if measure == "sdc" else "nats"
        axes.set_xlabel(f"{EFFECTS[measure]} on clean images ({unit})")
        axes.set_title(f"rank correlation: {said}", fontsize=7.5)
    figure.axes[0].set_ylabel("top-1 lost to corruption (points)")
    name_styles(figure, {variant.key: variant.style for variant, _ in shown}.values(), fill)
    state(figure, _together_in_words(compared))
    drawn = f", {len(shown)} of {len(known)} drawn" if len(shown) < len(known) else ""
    note = f"one mark per training{drawn}; bars: intervals over injections and over images"
    add_note(figure, f"{note}; lower left is better in both")
    return figure, pd.DataFrame(rows)


def _together_in_words(compared: ComparedCorruptions) -> str:
    """What the correlations over most classifiers say; their intervals take trainings for independent."""
    last = {one.measure: one.correlation for one in compared.together}
    said = {
        measure: "goes with" if one.low > 0 else "goes against" if one.high < 0 else "cannot be told to go with"
        for measure, one in last.items()
    }
    if len(set(said.values())) == 1:
        words = [f"faults' damage {next(iter(said.values()))} accuracy lost to corruption"]
    else:
        words = [f"{EFFECTS[measure]} {said[measure]} accuracy lost to corruption" for measure in said]
    return f"Over {len(compared.classifiers)} classifiers, {' and '.join(words)}"
