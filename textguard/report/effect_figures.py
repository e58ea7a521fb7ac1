"""The figure of the effects in one backbone on one data set."""

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from textguard.report.drawing import AS_IS, add_note, drawable, ratio_axis
from textguard.report.effect_tables import SPOKEN, shown_effects
from textguard.schema.effects import OUTCOMES, SECOND, Effect, Effects

LONGEST = 44  # characters of an effect's name that are drawn
FARTHEST = 1e3  # how far a bar without an end reaches, as a factor of its estimate; in points, a tenth of it
INK = {"contrast": "#0072b2", "factor": "#000000", "interaction": "#7f7f7f"}
MARKERS = {"contrast": "o", "factor": "s", "interaction": "D"}


def draw_effects(found: Effects, title: str) -> tuple[Figure, pd.DataFrame]:
    """A forest plot: one row per contrast, factor and interaction, one panel per outcome, both intervals as bars."""
    effects = list(shown_effects(found))
    figure = Figure(figsize=(10.0, 1.5 + 0.2 * len(effects)), layout="constrained")
    panels = figure.subplots(1, len(SPOKEN), sharey=True)
    for axes, at in zip(panels, SPOKEN, strict=True):
        for row, shown in enumerate(effects):
            _draw(axes, row, shown.kind, shown.at(*at))
        if at[0] == "top1":
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_xlabel(f"{OUTCOMES[at]} (points more)")
        else:
            ratio_axis(axes, f"{OUTCOMES[at]} (times less)")
        axes.grid(axis="y", color="#eeeeee", linewidth=0.6)
        for row in range(1, len(effects)):
            if effects[row].kind != effects[row - 1].kind:
                axes.axhline(row - 0.5, color="black", linewidth=0.6)
    panels[0].set_yticks(range(len(effects)), [drawable(shown.name, LONGEST) for shown in effects], **AS_IS)
    panels[0].set_ylim(len(effects) - 0.5, -0.5)
    figure.suptitle(f"{title}: what one change does", fontsize=9)
    kinds = {"contrast": "circles: contrasts", "factor": "squares: factors", "interaction": "diamonds: interactions"}
    there = ", ".join(words for kind, words in kinds.items() if any(shown.kind == kind for shown in effects))
    trainings = sorted({effect.effect.n for shown in effects for effect in shown.effects})
    note = (
        f"right is better; filled: the interval leaves no effect out; bars: {100 * found.confidence:g}%, thick: {SECOND:.0%}\n"
        f"{there}; {' or '.join(map(str, trainings))} trainings each; no mark: a training saw no damage, or too little is known"
    )
    add_note(figure, note)
    numbers = [
        {
            "kind": shown.kind,
            "effect": shown.name,
            "of": shown.of,
            "measure": effect.measure,
            "place": effect.place,
            **effect.effect.as_json(),
            "low_second": effect.second.low,
            "high_second": effect.second.high,
            "largest": effect.largest,
            "verdict": effect.verdict,
        }
        for shown in effects
        for effect in shown.effects
    ]
    return figure, pd.DataFrame(numbers)


def _draw(axes: Axes, row: int, kind: str, effect: Effect) -> None:
    value, points = effect.effect.value, effect.measure == "top1"
    if not math.isfinite(value):
        return
    told = effect.verdict in ("better", "worse")
    look = {"color": INK[kind], "solid_capstyle": "butt"}
    for estimate, width in ((effect.effect, 0.9), (effect.second, 2.6)):
        low, high = (value - FARTHEST / 10, value + FARTHEST / 10) if points else (value / FARTHEST, value * FARTHEST)
        ends = [
            end if math.isfinite(end) and (points or end > 0) else far
            for end, far in ((estimate.low, low), (estimate.high, high))
        ]
        axes.plot(ends, [row, row], linewidth=width, **look)
    axes.plot(value, row, marker=MARKERS[kind], markersize=4.5, color=INK[kind], markerfacecolor=INK[kind] if told else "white")
