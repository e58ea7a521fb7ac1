"""The figure of the effects in one backbone on one data set."""

import pandas as pd
from matplotlib.figure import Figure

from textguard.report.drawing import add_note, state
from textguard.report.effect_tables import SPOKEN, Shown, shown_effects
from textguard.report.forest import (
    LINE_INCHES,
    Row,
    difference_limits,
    draw_rows,
    lines,
    name_rows,
    ratio_limits,
    tally,
)
from textguard.report.theme import element_key
from textguard.schema.effects import OUTCOMES, SECOND, Effects

# What a row is: its colour, its marker, and what stands above those of its kind.
KINDS = {
    "contrast": ("#0072b2", "o", "one change of a variant"),
    "factor": ("#000000", "s", "factors of the design"),
    "interaction": ("#7f7f7f", "v", "interactions of two factors"),
}


def draw_effects(found: Effects, title: str) -> tuple[Figure, pd.DataFrame]:
    """A forest plot: one row per contrast, factor and interaction, one panel per outcome, both intervals as bars."""
    effects = list(shown_effects(found))
    figure = Figure(figsize=(13.0, 1.9 + LINE_INCHES * lines(_rows(found, effects, SPOKEN[0]))), layout="constrained")
    panels = figure.subplots(1, len(SPOKEN), sharey=True)
    for axes, at in zip(panels, SPOKEN, strict=True):
        rows = _rows(found, effects, at)
        if at[0] == "top1":
            draw_rows(axes, rows, difference_limits(rows), f"{OUTCOMES[at]} (points more)", "points [interval]")
        else:
            draw_rows(axes, rows, ratio_limits(rows), f"{OUTCOMES[at]} (times less)", "ratio [interval]")
    name_rows(panels[0], rows)
    words = [_in_words(effects, at) for at in SPOKEN]
    state(figure, f"{title}, what one change does: {', '.join(words)}")
    trainings = sorted({effect.effect.n for shown in effects for effect in shown.effects})
    note = (
        f"right is better; filled and bold: the interval leaves no effect out; bars: {100 * found.confidence:g}%, thick: "
        f"{SECOND:.0%}; arrows: it goes on\n{' or '.join(map(str, trainings))} trainings each; no mark: a training saw no "
        "damage, or too little is known"
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


def _rows(found: Effects, effects: list[Shown], at: tuple[str, str]) -> list[Row]:
    variants = {contrast.name: contrast.variant for contrast in found.contrasts}
    rows = []
    for shown in effects:
        effect, (colour, marker, group) = shown.at(*at), KINDS[shown.kind]
        key = element_key(found.dataset, found.backbone, variants.get(shown.name, shown.name))
        name = f"{shown.name}: {shown.of}" if shown.kind == "factor" else shown.name
        rows.append(Row(group, name, effect.effect, effect.verdict, colour, marker, key, effect.effect.n, second=effect.second))
    return rows


def _in_words(effects: list[Shown], at: tuple[str, str]) -> str:
    """How many of the effects that are no interactions can be told."""
    verdicts = [shown.at(*at).verdict for shown in effects if shown.kind != "interaction"]
    if at[0] == "top1":
        return f"accuracy is {tally(verdicts, 'higher', 'lower', of='')}"
    return f"{OUTCOMES[at].split(',')[0]} is {tally(verdicts, of='')}"
