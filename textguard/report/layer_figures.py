"""Figures with one row per layer, of one backbone on one data set."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.markers import CARETLEFT

from textguard.analysis.files import RESULTS_DIR, RUNS_DIR, load_ranges
from textguard.analysis.layers import Aligned, align, layer_means
from textguard.errors import InvalidArtifact, printable
from textguard.estimates.statistics import Estimate
from textguard.report.drawing import AS_IS, LONGEST_AXIS, SMALL, add_note, drawable, mark, plain_ticks, state
from textguard.report.forest import is_told, tally
from textguard.report.legend import name_styles
from textguard.report.rendering import show_estimate, show_number
from textguard.report.variants import Variant, count_trainings, trainings
from textguard.schema.results import NO_VERDICT, Cell, RunResult

ROW_INCHES = 0.16  # the least height of a layer's row in which its name can be read
MARK_INCHES = 0.055  # of it, of each variant
LONGEST = 48  # characters of a layer's name that are drawn
TALL = 40  # layers from which on the axes have their numbers at the top too
WIDEST = 8.0  # how much farther than the outermost mark an axis goes on for the intervals
OF_ONE = ", or is of one training"
RATIOS = {"sdc": "SDC", "delta_loss": "DeltaLoss"}
# What faults do in a layer: a field of `LayerMean`, how often it goes into its unit, and the axis's label.
LEVELS = {
    "sdc": (100, "SDC (% of faults)"),
    "delta_loss": (1, "mean DeltaLoss (nats)"),
    "masked": (100, "masked (% of faults)"),
}


def draw_layers(variants: Sequence[Variant], title: str, cells: Sequence[Cell]) -> tuple[Figure, pd.DataFrame]:
    """How many times less faults do in each layer than in the baseline's; beside it, how large its values are without faults.

    cells: of this backbone on this data set. Numbers: one row per training and layer; ratios are those of all trainings.
    Raises InvalidArtifact where value ranges are not those of the results.
    """
    results = [result for variant in variants for result in variant.results]
    ranges = {result.run: _ranges(result) for result in results}
    aligned = align(results)
    compared = [(variant, cell) for variant in variants for cell in cells if cell.variant == variant.key]
    figure, panels = _panels(aligned, max(1, len(compared)), 3)
    said = []
    for axes, (measure, name) in zip(panels, RATIOS.items(), strict=False):
        verdicts = [verdict for _, cell in compared for verdict in _verdicts(cell, measure)]
        said.append((name, [verdict for verdict in verdicts if verdict != NO_VERDICT]))
        _draw_ratios(axes, aligned, compared, measure)
        axes.set(title=name, xlabel="baseline / variant (times less)")
    for variant in variants:
        _draw_values(panels[2], aligned, variant, [ranges[result.run] for result in variant.results])
    panels[2].set(xscale="log", title="values without faults", xlabel="largest |value|, training images")
    _finish(panels, aligned)
    name_styles(figure, [variant.style for variant in variants])
    state(figure, f"{title}, by layer: {_ratios_in_words(said)}")
    counted = sum(len(verdicts) for _, verdicts in said)
    several = any(len(cell.seeds) > 1 for _, cell in compared)
    chance = f"; by chance alone, about {counted * (1 - results[0].confidence):.2g} of {counted} intervals would leave 1 out"
    note = (
        f"right is better; filled, with a thick bar: the interval leaves 1 out; hollow: it holds 1{'' if several else OF_ONE}; "
        "bars are cut at the edge\nno mark: no such layer in the baseline, or a training without such damage; "
        f"{trainings(variants)} each{chance if several else ''}"
    )
    add_note(figure, note)
    return figure, _table(variants, compared, aligned, ranges)


def _verdicts(cell: Cell, measure: str) -> list[str]:
    return [getattr(layer.verdict, measure) for layer in cell.layers]


def _ratios_in_words(said: Sequence[tuple[str, Sequence[str]]]) -> str:
    (first, verdicts), (second, others) = said
    if not (verdicts or others):
        return "there is no baseline to compare with, or no damage"
    if not verdicts:
        return f"{second} is {tally(others)}, and {first} was seen in too few trainings"
    return f"{first} is {tally(verdicts)}, {second} {tally(others, of='')}"


def _table(
    variants: Sequence[Variant],
    compared: Sequence[tuple[Variant, Cell]],
    aligned: Aligned,
    ranges: Mapping[str, pd.DataFrame],
) -> pd.DataFrame:
    ratios = {(variant.key, layer.layer): layer for variant, cell in compared for layer in cell.layers}
    rows = []
    for variant in variants:
        for result in variant.results:
            values = ranges[result.run].set_index("layer")
            for layer in result.layers:
                row = _row(variant, result, aligned, layer.layer)
                for measure in RATIOS:
                    row |= _spread(measure, getattr(layer, measure))
                row |= {name: float(values.loc[layer.layer, name]) for name in ("max_abs", "mean_abs")}
                if found := ratios.get((variant.key, layer.layer)):
                    for measure in RATIOS:
                        row |= _spread(f"{measure}_ratio", getattr(found.improvement, measure))
                        row[f"{measure}_verdict"] = getattr(found.verdict, measure)
                rows.append(row)
    return pd.DataFrame(rows)


def _spread(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _ranges(result: RunResult) -> pd.DataFrame:
    """The ranges of a run's layers, faulty or skipped. Raises InvalidArtifact."""
    table = load_ranges(result.run)
    own, found = {layer.layer for layer in result.layers}, set(table["layer"])
    known = own | {name.removeprefix("backbone.") for name in result.skipped}
    last = result.layers[-1].layer
    if wrong := sorted((own - found) | (found - known)):
        differ = f"are about different layers ({printable(wrong[0])!r})"
    elif math.isclose(result.scale * dict(zip(table["layer"], table["max_abs"], strict=True))[last], result.largest_logit):
        return table
    else:
        differ = f"are of different classifiers (the largest value of {printable(last)!r})"
    raise InvalidArtifact(
        f"{RUNS_DIR / result.run / 'ranges.csv'} and {RESULTS_DIR / result.run}.json {differ}; "
        "delete both and run 'dvc repro': stages 'ranges' and 'results' write them"
    )


def _draw_ratios(axes: Axes, aligned: Aligned, compared: Sequence[tuple[Variant, Cell]], measure: str) -> None:
    found = [[getattr(layer.improvement, measure) for layer in cell.layers] for _, cell in compared]
    limits = _limits([one for own in found for one in own], least=(0.5, 2.0))
    axes.axvline(1, color="black", linewidth=0.8, zorder=1)
    for number, ((variant, cell), own) in enumerate(zip(compared, found, strict=True)):
        marks = []
        for layer, ratio in zip(cell.layers, own, strict=True):
            verdict = getattr(layer.verdict, measure)
            said = f"{show_estimate(ratio)} times less {RATIOS[measure]}, {count_trainings([len(cell.seeds)])}; {verdict}"
            place = aligned.at(variant.results[0], layer.layer) + shift(number, len(compared))
            marks.append(_Mark(place, ratio, f"{layer.layer}: {said}", is_told(verdict)))
        _draw(axes, marks, variant, limits)
    axes.set(xscale="log", xlim=limits)


def _draw_values(axes: Axes, aligned: Aligned, variant: Variant, ranges: Sequence[pd.DataFrame]) -> None:
    first = variant.results[0]
    means = pd.concat(ranges).groupby("layer", sort=False)["max_abs"].mean()
    own = [layer.layer for layer in first.layers if means[layer.layer] > 0]
    x, y = [means[name] for name in own], [aligned.at(first, name) for name in own]
    look = {"color": variant.style.colour, "marker": variant.style.marker, "linewidth": 0.8, "alpha": 0.85}
    (line,) = axes.plot(x, y, **look)
    largest = show_number(means[own[-1]]) if own else "0"
    said = f"largest |value| of {own[-1] if own else 'no layer'} {largest}, n = {int(ranges[0]['images'].iloc[0])} images"
    mark(line, variant.element, f"{variant.style.name}: {said}, {trainings([variant])}")


def draw_outcomes(variants: Sequence[Variant], title: str) -> tuple[Figure, pd.DataFrame]:
    """What faults do in each layer: SDC, DeltaLoss, and the share that leaves no trace.

    Numbers: one row per training and layer.
    """
    results = [result for variant in variants for result in variant.results]
    aligned, means = align(results), [layer_means(variant.results) for variant in variants]
    figure, panels = _panels(aligned, len(variants), len(LEVELS))
    for axes, (measure, (factor, label)) in zip(panels, LEVELS.items(), strict=True):
        found = [{layer: getattr(mean, measure).times(factor) for layer, mean in own.items()} for own in means]
        everything = [one for own in found for one in own.values()]
        linear = measure == "masked" or not any(one.value > 0 for one in everything)
        limits = (0.0, 100.0) if measure == "masked" else (0.0, 1.0) if linear else _limits(everything, (math.inf, 0.0))
        for number, (variant, own) in enumerate(zip(variants, found, strict=True)):
            marks = []
            for layer, one in own.items():
                alone = measure == "masked" and len(variant.results) == 1  # which has no interval
                said = f"{layer}: {label} {show_number(one.value) if alone else show_estimate(one)}, {trainings([variant])}"
                place = aligned.at(variant.results[0], layer) + shift(number, len(variants))
                marks.append(_Mark(place, one, said, interval=not alone))
            _draw(axes, marks, variant, limits)
        axes.set(xscale="linear" if linear else "log", xlim=limits, xlabel=label)
    _finish(panels, aligned)
    name_styles(figure, [variant.style for variant in variants])
    state(figure, f"{title}: {_levels_in_words(variants, aligned, means)}")
    several = any(len(variant.results) > 1 for variant in variants)
    bars = f"over {variants[0].each}s" if several else "over injections; of the masked share there is none"
    note = f"{_injections(results)}, {trainings(variants)} each; bars: intervals {bars}, cut at the edge"
    add_note(
        figure,
        f"{note}\narrows at the left edge: none seen, and the bar ends at the upper limit; masked: no trace in the logits",
    )
    rows = [
        _row(variant, result, aligned, layer.layer)
        | _spread("sdc", layer.sdc)
        | _spread("delta_loss", layer.delta_loss)
        | {"injections": layer.injections, "masked": layer.outcomes.masked, "benign": layer.outcomes.benign}
        | {"nonfinite": layer.outcomes.nonfinite}
        for variant in variants
        for result in variant.results
        for layer in result.layers
    ]
    return figure, pd.DataFrame(rows)


def _levels_in_words(variants: Sequence[Variant], aligned: Aligned, means: Sequence[Mapping[str, object]]) -> str:
    """In which layer SDC is largest, where it is the same in all variants; and how much is masked."""
    found = [{layer: mean.sdc.value for layer, mean in own.items()} for own in means]
    if not any(value > 0 for own in found for value in own.values()):
        said = "no SDC was seen"
    else:
        worst = [max(own, key=lambda layer: own[layer] if math.isfinite(own[layer]) else -1.0) for own in found]
        places = {aligned.at(variant.results[0], layer) for variant, layer in zip(variants, worst, strict=True)}
        shares = [100 * own[layer] for own, layer in zip(found, worst, strict=True)]
        where = _spoken(aligned, places.pop()) if len(places) == 1 else "another layer in each variant"
        said = f"SDC is largest in {where}, {between(shares)}"
    masked = [100 * mean.masked.value for own in means for mean in own.values()]
    return f"{said}; {between(masked) if max(masked) > 0 else 'none'} of a layer's faults are masked"


def _spoken(aligned: Aligned, place: int) -> str:
    role, name = aligned.roles[place], drawable(aligned.names[place], LONGEST)
    return f"{'the ' if role else ''}{role or 'layer'} ({name})" if not role.startswith("block") else f"{name} ({role})"


def between(percent: Sequence[float]) -> str:
    low, high = f"{min(percent):.2g}", f"{max(percent):.2g}"
    return f"{high} %" if low == high else f"{low} to {high} %"


def _limits(found: Sequence[Estimate], least: tuple[float, float]) -> tuple[float, float]:
    """Ends of a logarithmic axis that holds all values, `least`, and intervals as far as they are not much wider."""
    values = [one.value for one in found if 0 < one.value < math.inf]
    if not values and least[0] > least[1]:
        return 0.1, 10.0
    low, high = min([least[0], *values]), max([least[1], *values])
    ends = [end for one in found for end in (one.low, one.high) if 0 < end < math.inf]
    first, last = max(low / WIDEST, min([low, *ends])) / 1.3, min(high * WIDEST, max([high, *ends])) * 1.3
    return first, min(last, first * LONGEST_AXIS)


def shift(number: int, count: int) -> float:
    """How far below the middle of its row a variant's mark stands, in rows."""
    return 0.7 * ((number + 0.5) / count - 0.5)


@dataclass(frozen=True)
class _Mark:
    """An estimate at a place among the rows. said: what a page says of it. told: whether it is filled, with a thick bar."""

    place: float
    found: Estimate
    said: str
    told: bool = True
    interval: bool = True


def _draw(axes: Axes, marks: Sequence[_Mark], variant: Variant, limits: tuple[float, float]) -> None:
    """A variant's marks with their intervals; where nothing was seen, an arrow at the left edge, and the upper limit alone."""
    colour = variant.style.colour
    marks = [one for one in marks if not math.isnan(one.found.value)]
    for told, width in ((True, 1.1), (False, 0.5)):
        bars = [[(end, one.place) for end in _ends(one.found, limits)] for one in marks if one.interval and one.told == told]
        # In one, because titles of their own would be most of the page.
        mark(axes.add_collection(LineCollection(bars, colors=colour, linewidth=width), autolim=False), variant.element)
    for one in marks:
        unseen = one.found.value < limits[0]
        look = {"marker": CARETLEFT if unseen else variant.style.marker, "color": colour, "markeredgewidth": 0.8}
        look |= {"markerfacecolor": colour if one.told and not unseen else "white", "clip_on": False, "zorder": 3}
        (line,) = axes.plot(min(max(one.found.value, limits[0]), limits[1]), one.place, linestyle="none", **look)
        mark(line, variant.element, f"{variant.style.name}, {one.said}")


def _ends(found: Estimate, limits: tuple[float, float]) -> list[float]:
    """Of an interval's bar, which goes on to the edge where there is no end."""
    ends = (edge if math.isnan(end) else end for end, edge in zip((found.low, found.high), limits, strict=True))
    return [min(max(end, limits[0]), limits[1]) for end in ends]


def _panels(aligned: Aligned, marks: int, count: int) -> tuple[Figure, list[Axes]]:
    """Panels side by side with a row per layer."""
    height = max(ROW_INCHES, 0.05 + MARK_INCHES * marks) * len(aligned.names)
    figure = Figure(figsize=(10.2, max(2.9, 1.6 + height)), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True))


def _finish(panels: Sequence[Axes], aligned: Aligned) -> None:
    """Names of the layers at the left, their roles at the right, and a band behind every other role."""
    rows = len(aligned.names)
    panels[0].set_yticks(range(rows), [drawable(name, LONGEST) for name in aligned.names], fontsize=SMALL, **AS_IS)
    panels[0].set_ylim(rows - 0.4, -0.6)
    starts = [place for place in range(rows) if not place or aligned.roles[place] != aligned.roles[place - 1]]
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], rows], strict=True)):
        for axes in panels:
            if number % 2:
                axes.axhspan(start - 0.5, end - 0.5, color="#f2f2f2", linewidth=0, zorder=0)
        where, across = (start + end - 1) / 2, panels[-1].get_yaxis_transform()
        panels[-1].text(1.03, where, aligned.roles[start], transform=across, fontsize=SMALL, va="center")
    for axes in panels:
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labeltop=rows > TALL)
        plain_ticks(axes, "x")


def _row(variant: Variant, result: RunResult, aligned: Aligned, layer: str) -> dict[str, object]:
    return {"run": result.run, "variant": variant.key, "layer": layer, "role": aligned.roles[aligned.at(result, layer)]}


def _injections(results: Sequence[RunResult]) -> str:
    counts = sorted({layer.injections for result in results for layer in result.layers if layer.method == "sampled"})
    sampled = f"{counts[0]:,}{f' to {counts[-1]:,}' if len(counts) > 1 else ''} injections per sampled layer" if counts else ""
    exact = any(layer.method == "exact" for result in results for layer in result.layers)
    return " and ".join(part for part in (sampled, "all faults of exact ones" if exact else "") if part)
