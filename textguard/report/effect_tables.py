"""What stage `effects` found, as a table and in sentences."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from textguard.estimates.statistics import Estimate
from textguard.report.rendering import Judged, Table, show_estimate, show_number
from textguard.report.theme import place_name
from textguard.schema.effects import OUTCOMES, SECOND, Effect, Effects, FactorEffect
from textguard.schema.results import ONE_TRAINING

SPOKEN = (("delta_loss", "overall"), ("sdc", "overall"), ("top1", "all"))  # what sentences tell, and the figure shows
MEASURES = {"delta_loss": "DeltaLoss", "sdc": "SDC", "top1": "top-1"}
CAPTION = (
    "What one change does. (x): so many times less, above 1 is better; top-1: points more. A contrast sets a variant against "
    "another one, in pairs of trainings with the same seed. A factor's high level is set against its low one, over all levels "
    "of the others; an interaction is the first factor's effect where the second is high / where it is low (of top-1: their "
    "difference). Brackets: intervals of what other trainings would show, by Student's t, on logarithms of DeltaLoss and SDC. "
    "Largest effect left: the end of the first interval that is farther from no effect. Trainings: those that have the change "
    "for contrasts, all of the design for factors."
)


@dataclass(frozen=True)
class Shown:
    """An effect as rows and sentences call it. kind: contrast, factor or interaction. of: what is set against what."""

    kind: str
    name: str
    of: str
    effects: Sequence[Effect]

    def at(self, measure: str, place: str) -> Effect:
        """One of its outcomes."""
        return next(effect for effect in self.effects if (effect.measure, effect.place) == (measure, place))


def shown_effects(found: Effects) -> Iterator[Shown]:
    """The contrasts, then the factors, then the interactions."""
    for contrast in found.contrasts:
        yield Shown("contrast", contrast.name, f"{contrast.variant} against {contrast.against}", contrast.effects)
    for effect in found.factorial.effects if found.factorial else []:
        yield _of_factors(effect, found.factorial.factors)


def _of_factors(effect: FactorEffect, levels: dict[str, list[Any]]) -> Shown:
    first, *others = effect.factors
    low, high = (_spoken(level) for level in levels[first])
    of = f"{high} instead of {low}"
    if others:
        of += f", where {others[0]} is {_spoken(levels[others[0]][1])} / where it is {_spoken(levels[others[0]][0])}"
    if effect.aliases:
        of += f"; or of {', or of '.join(' x '.join(alias) for alias in effect.aliases)}, which the design cannot tell from it"
    return Shown("interaction" if others else "factor", " x ".join(effect.factors), of, effect.effects)


def _spoken(level: Any) -> str:
    return level if isinstance(level, str) else json.dumps(level)


def effects_table(effects: Sequence[Effects]) -> Table:
    """Every effect, its outcomes with their intervals; sentences about them stand in the caption. No rows without effects."""
    unit = {measure: " (points)" if measure == "top1" else " (x)" for measure in MEASURES}
    headers = ["Dataset", "Backbone", "Effect", "Of"]
    headers += [f"{name}{unit[measure]}" for (measure, _), name in OUTCOMES.items()]
    headers += [f"{OUTCOMES[at]}, {SECOND:.0%}{unit[at[0]]}" for at in SPOKEN]
    headers += [f"Largest Effect Left, {MEASURES[at[0]]}{unit[at[0]]}" for at in SPOKEN]
    rows: list[list[Any]] = []
    for found in effects:
        for shown in shown_effects(found):
            outcomes = [shown.at(*at) for at in OUTCOMES]
            spoken = [shown.at(*at) for at in SPOKEN]
            rows.append(
                [
                    *(found.dataset, found.backbone, shown.name, shown.of),
                    *(Judged(outcome.effect, outcome.verdict) for outcome in outcomes),
                    *(outcome.second for outcome in spoken),
                    *(show_number(outcome.largest) if math.isfinite(outcome.effect.value) else None for outcome in spoken),
                    outcomes[0].effect.n,
                ]
            )
    said = [f"{place_name(found.dataset, found.backbone)}: {' '.join(sentences(found))}" for found in effects]
    confidence = " and ".join(dict.fromkeys(f"{found.confidence:.4g}" for found in effects))
    caption = f"{CAPTION} Confidence of the first interval: {confidence}; so often does one of no effect hold it."
    return Table("effects", " ".join([caption, *said]), [*headers, "Trainings"], rows)


def sentences(found: Effects) -> list[str]:
    """What the effects in one backbone on one data set come to, in words: each contrast, each factor, and what interacts."""
    said = [_sentence(shown) for shown in shown_effects(found) if shown.kind != "interaction"]
    if found.factorial:
        said += list(_interactions(found))
        left = [
            f"{OUTCOMES[fit.measure, fit.place]} {100 * fit.explained:.0f} %"
            for fit in found.factorial.fits
            if (fit.measure, fit.place) in SPOKEN and math.isfinite(fit.explained)
        ]
        if left:
            said.append(f"Main effects, two-way interactions and seeds explain of the variance: {', '.join(left)}.")
    return said


def _sentence(shown: Shown) -> str:
    parts = [_part(shown.at(*at)) for at in SPOKEN]
    count = shown.effects[0].effect.n
    trainings = f"{count} training{'s' if count > 1 else ''}"
    return f"{shown.name} ({shown.of}): {'; '.join(parts)} ({trainings})."


def _part(effect: Effect) -> str:
    """One outcome in words, with its interval and whether it can be told."""
    name, estimate = MEASURES[effect.measure], effect.effect
    if not math.isfinite(estimate.value):
        bounded = math.isfinite(estimate.low) or math.isfinite(estimate.high)
        bound = f", {show_estimate(estimate)} times less by the means" if bounded else ""
        return f"{name} cannot be told, for {effect.zeros} of the trainings saw none{bound}"
    if effect.measure == "top1":
        words, interval, unit = f"{estimate.value:+.2f}", _interval(estimate, "{:+.2f}"), " points"
    elif estimate.value < 1:
        more = Estimate(1 / estimate.value, _inverse(estimate.high), _inverse(estimate.low), estimate.n)
        words, interval, unit = show_number(more.value), _interval(more), " times more"
    else:
        words, interval, unit = show_number(estimate.value), _interval(estimate), " times less"
    said = {"better": "", "worse": "", ONE_TRAINING: " of this one training:"}.get(effect.verdict, " cannot be told:")
    return f"{name}{said} {words}{interval}{unit}"


def _interval(estimate: Estimate, form: str = "") -> str:
    if not (math.isfinite(estimate.low) or math.isfinite(estimate.high)):
        return ""
    low, high = (form.format(end) if form else show_number(end) for end in (estimate.low, estimate.high))
    return f" [{low}, {high}]"


def _inverse(number: float) -> float:
    return 1 / number if number > 0 else math.inf


def _interactions(found: Effects) -> Iterator[str]:
    """The interactions that can be told, or that none can."""
    pairs = [shown for shown in shown_effects(found) if shown.kind == "interaction"]
    for measure, where in SPOKEN:
        told = [shown for shown in pairs if shown.at(measure, where).verdict in ("better", "worse")]
        words = "; ".join(f"{shown.name} {show_estimate(shown.at(measure, where).effect)}" for shown in told)
        unit = "points" if measure == "top1" else "x"
        if told:
            yield f"Interactions in {OUTCOMES[measure, where]} that can be told ({unit}): {words}."
        elif pairs and all(math.isfinite(shown.at(measure, where).effect.value) for shown in pairs):
            yield f"No interaction of the {len(pairs)} in {OUTCOMES[measure, where]} can be told."
