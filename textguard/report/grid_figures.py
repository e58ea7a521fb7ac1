"""Figures of a whole grid."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from textguard.analysis.effects import more_points
from textguard.analysis.mechanism import association, classifiers
from textguard.estimates.statistics import Estimate
from textguard.report.drawing import SMALL, add_note, logarithmic, mark, plain_ticks, state
from textguard.report.forest import (
    LINE_INCHES,
    Row,
    draw_rows,
    in_words,
    is_told,
    lines,
    name_rows,
    tally,
)
from textguard.report.legend import name_styles
from textguard.report.published import Published, load_published
from textguard.report.rendering import show_estimate, show_number
from textguard.report.theme import PUBLISHED_MARKER, Style, element_key, fills, place_name
from textguard.report.variants import Variant, count_trainings
from textguard.schema.results import MEASURES, NO_VERDICT, ONE_TRAINING, PLACES, Cell, RunResult

# What the rows of a network are: name, measure, place. SDC in the mean over neurons is to SDC what FIT is.
HEADLINE = [("SDC", "sdc", "overall"), ("DeltaLoss", "delta_loss", "overall"), ("FIT", "sdc", "by_neurons")]
PUBLISHED = {"last_layer": "last layer", "overall": "all layers"}  # DeltaLoss of the paper
AXIS = (0.1, 1000.0)
MOST_BESIDE = 3  # panels in a row
RANGE_EFFECTS = {"head_delta_loss": "DeltaLoss of the head (nats)", "head_sdc": "SDC of the head (%)"}


def draw_improvement(
    cells: Sequence[Cell], styles: Mapping[str, Style], shown: Collection[str] | None = None
) -> tuple[Figure, pd.DataFrame]:
    """How many times less faults do than in the baseline: SDC, DeltaLoss and FIT per network; below, what is published.

    shown: variants that are drawn, where it is not all. Numbers: of all cells, measures and places.
    """
    drawn = [cell for cell in cells if shown is None or cell.variant in shown] or list(cells)
    rows = [row for place in _places(drawn) for row in _headline(place, drawn, styles)]
    published = [row for row in load_published() if row.source == "paper"]
    beside = _published_rows(drawn, styles, published)
    heights = [lines(part) for part in (rows, beside) if part]
    figure = Figure(figsize=(8.0, 1.7 + LINE_INCHES * sum(heights) + 0.4 * len(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    label = "what faults do in the baseline / in the variant (times less, right is better)"
    draw_rows(panels[0], rows, AXIS, label, "ratio [interval]")
    name_rows(panels[0], rows)
    if beside:
        draw_rows(panels[1], beside, AXIS, "DeltaLoss as published, baseline / text-guided (times less)", "ratio")
        name_rows(panels[1], beside)
    state(figure, _improvement_in_words(drawn))
    note = (
        "filled mark and bold: the interval leaves 1 out; hollow: it cannot be told, or has no interval; arrows: it goes on\n"
        "SDC and DeltaLoss: mean over all layers; FIT: SDC of a fault in any neuron"
    )
    add_note(figure, note + ("; diamonds: as the paper prints it" if beside else ""))
    numbers = [
        {
            "dataset": cell.dataset,
            "backbone": cell.backbone,
            "variant": cell.variant,
            "measure": measure,
            "place": place,
            "what": f"{MEASURES[measure]}, {PLACES[place]}",
            "trainings": len(cell.seeds),
            **_ratio(cell, measure, place).as_json(),
            "verdict": _verdict(cell, measure, place),
            "published": _published(cell, published, place) if measure == "delta_loss" else None,
        }
        for cell in cells
        for measure in MEASURES
        for place in PLACES
    ]
    return figure, pd.DataFrame(numbers)


def _places(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((cell.dataset, cell.backbone) for cell in cells))


def _ratio(cell: Cell, measure: str, place: str) -> Estimate:
    return getattr(getattr(cell.first.improvement, measure), place)


def _verdict(cell: Cell, measure: str, place: str) -> str:
    return getattr(getattr(cell.first.verdict, measure), place)


def _headline(place: tuple[str, str], cells: Sequence[Cell], styles: Mapping[str, Style]) -> list[Row]:
    """The rows of one network: by measure, then by variant."""
    here = [cell for cell in cells if (cell.dataset, cell.backbone) == place]
    group = f"{place_name(*place)}, {count_trainings(len(cell.seeds) for cell in here)}"
    return [
        Row(
            group,
            f"{name}, {styles[cell.variant].name}",
            _ratio(cell, measure, where),
            _verdict(cell, measure, where),
            styles[cell.variant].colour,
            styles[cell.variant].marker,
            element_key(*place, cell.variant),
            len(cell.seeds),
        )
        for name, measure, where in HEADLINE
        for cell in here
    ]


def _published_rows(cells: Sequence[Cell], styles: Mapping[str, Style], published: Sequence[Published]) -> list[Row]:
    """What the paper prints of these backbones and variants, on these data sets and on ImageNet."""
    subjects = [(dataset, cell.backbone, cell.variant) for cell in cells for dataset in (cell.dataset, "imagenet")]
    return [
        Row(
            f"Published: {place_name(row.dataset, row.backbone)}",
            f"{row.table}, {name}, {styles[row.variant].name}",
            Estimate(value := float(row.numbers[column]), value, value, 1),
            NO_VERDICT,
            "black",
            PUBLISHED_MARKER,
            element_key(*row.subject),
            1,
            published=True,
        )
        for subject in sorted(set(subjects), key=subjects.index)
        for row in published
        if row.subject == subject
        for column, name in PUBLISHED.items()
        if column in row.numbers
    ]


def _improvement_in_words(cells: Sequence[Cell]) -> str:
    if len(cells) == 1:
        (cell,) = cells
        said = [f"{name} {in_words(_ratio(cell, *at), _verdict(cell, *at))}" for name, *at in HEADLINE]
        return f"{place_name(cell.dataset, cell.backbone)}, {cell.variant} beside the baseline: {'; '.join(said)}"
    said = [(name, [_verdict(cell, *at) for cell in cells]) for name, *at in HEADLINE]
    (first, verdicts), *others = said
    words = [f"{first} is {tally(verdicts)}", *(f"{name} {tally(verdicts, of='')}" for name, verdicts in others)]
    return f"Beside the baseline, {', '.join(words)}"


def _published(cell: Cell, rows: Sequence[Published], part: str) -> float | None:
    """The paper's improvement for a cell's backbone and variant: on its data set, else on ImageNet, where it has one."""
    fitting = [row for row in rows if (row.backbone, row.variant) == (cell.backbone, cell.variant)]
    for dataset in (cell.dataset, "imagenet"):
        for row in fitting:
            if row.dataset == dataset and part in row.numbers:
                return float(row.numbers[part])
    return None


def draw_tradeoff(variants: Sequence[Variant], cells: Sequence[Cell]) -> tuple[Figure, pd.DataFrame]:
    """What a variant gains and loses: its accuracy against its DeltaLoss, each beside the baseline of the same seed.

    One panel per backbone on a data set. Numbers: one row per training that has a baseline.
    """
    runs = {result.run: result for variant in variants for result in variant.results}
    compared = [pairs for variant in variants if (pairs := _pairs(variant, runs, cells)).runs]
    places = list(dict.fromkeys(pairs.place for pairs in compared))
    across = max(1, min(MOST_BESIDE, len(places)))
    down = max(1, math.ceil(len(places) / across))
    figure = Figure(figsize=(3.0 + 2.8 * across, 1.3 + 2.7 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes in panels[len(places) :]:
        axes.set_axis_off()
    for axes, place in zip(panels, places, strict=False):
        _draw_pairs(axes, [pairs for pairs in compared if pairs.place == place], place_name(*place))
    figure.supylabel("DeltaLoss, baseline / variant (times less)", fontsize=8)
    styles = {pairs.variant.key: pairs.variant.style for pairs in compared}.values()
    name_styles(figure, styles)
    state(figure, _tradeoff_in_words(compared))
    note = (
        "small: a training and the baseline of its seed; large: their mean, filled where DeltaLoss is told apart from the "
        "baseline's\nbars: intervals over trainings, cut at the edge; lines: the baseline"
    )
    add_note(figure, note)
    return figure, pd.DataFrame([row for pairs in compared for row in pairs.numbers])


@dataclass(frozen=True)
class _Pairs:
    """A variant's trainings that have a baseline, and their cell.

    points: of top-1, more than the baseline, over trainings; without an interval of one. numbers: a row per training.
    """

    variant: Variant
    runs: Sequence[RunResult]
    cell: Cell
    points: Estimate
    numbers: Sequence[dict[str, Any]]

    @property
    def place(self) -> tuple[str, str]:
        return self.cell.dataset, self.cell.backbone

    @property
    def loss_verdict(self) -> str:
        return _verdict(self.cell, "delta_loss", "overall")

    @property
    def points_verdict(self) -> str:
        """Whether accuracy is told apart from the baseline's."""
        if len(self.runs) == 1:
            return ONE_TRAINING
        return "better" if self.points.low > 0 else "worse" if self.points.high < 0 else NO_VERDICT


def _pairs(variant: Variant, runs: Mapping[str, RunResult], cells: Sequence[Cell]) -> _Pairs:
    own = [run for run in variant.results if run.improvement and run.improvement.baseline in runs]
    baselines = [runs[run.improvement.baseline] for run in own]
    place = (variant.results[0].dataset, variant.results[0].backbone)
    cell = next((cell for cell in cells if (cell.dataset, cell.backbone, cell.variant) == (*place, variant.key)), None)
    differences = [100 * (run.top1.value - base.top1.value) for run, base in zip(own, baselines, strict=True)]
    if len(own) > 1 and np.isfinite(differences).all():
        points = more_points(baselines, own, own[0].confidence)
    else:
        points = Estimate(differences[0] if len(own) == 1 else math.nan, math.nan, math.nan, len(own))
    numbers = [
        {
            "run": run.run,
            "dataset": run.dataset,
            "backbone": run.backbone,
            "variant": variant.key,
            "seed": run.seed,
            "top1_points": difference,
            "delta_loss_ratio": run.improvement.delta_loss.overall.value,
        }
        for run, difference in zip(own, differences, strict=True)
    ]
    return _Pairs(variant, own if cell else [], cell, points, numbers)


def _draw_pairs(axes: Axes, compared: Sequence[_Pairs], title: str) -> None:
    """One panel of `draw_tradeoff`."""
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=0.8)
    rows = [row for pairs in compared for row in pairs.numbers]
    points, ratios = (np.array([row[name] for row in rows], dtype=float) for name in ("top1_points", "delta_loss_ratio"))
    unseen = logarithmic(axes, "y", ratios)
    # The axes hold every training, and intervals as far as they are not much wider than what was seen.
    bars = [_ratio(pairs.cell, "delta_loss", "overall") for pairs in compared]
    seen = np.append(ratios[np.isfinite(ratios) & (ratios > 0)], 1.0)
    low, high = (_finite([getattr(bar, end) for bar in bars]) for end in ("low", "high"))
    if axes.get_yscale() == "log":
        least, most = seen.min() / 1.3, seen.max() * 1.3
        axes.set_ylim(min([least, *np.maximum(low, least / 4)]), max([most, *np.minimum(high, most * 4)]))
    wide = 1.2 * max([0.2, *np.abs(_finite(points))])
    ends = np.abs(_finite([end for pairs in compared for end in (pairs.points.low, pairs.points.high)]))
    wide = max([wide, *np.minimum(1.05 * ends, 2.5 * wide)])
    axes.set_xlim(-wide, wide)
    for pairs in compared:
        style, ratio = pairs.variant.style, _ratio(pairs.cell, "delta_loss", "overall")
        look = {"linestyle": "none", "marker": style.marker, "color": style.colour}
        key = element_key(*pairs.place, pairs.variant.key)
        for row in pairs.numbers:
            x, y = row["top1_points"], row["delta_loss_ratio"]
            (dot,) = axes.plot(x, y, markersize=4, alpha=0.7, markeredgewidth=0, **look)
            said = f"DeltaLoss {show_number(y)} times less, top-1 {x:+.2f} points"
            mark(dot, key, f"{style.name}, seed {row['seed']}: {said}, 1 training")
        if not (math.isfinite(pairs.points.value) and math.isfinite(ratio.value)):
            continue
        face = style.colour if is_told(pairs.loss_verdict) else "white"
        drawn = axes.plot(pairs.points.value, ratio.value, markersize=7, markerfacecolor=face, zorder=3, **look)
        if len(pairs.runs) > 1:
            drawn += axes.plot([pairs.points.low, pairs.points.high], [ratio.value] * 2, color=style.colour, linewidth=0.8)
            drawn += axes.plot([pairs.points.value] * 2, [ratio.low, ratio.high], color=style.colour, linewidth=0.8)
        said = f"DeltaLoss {show_estimate(ratio)} times less, top-1 {show_points(pairs.points)}"
        for line in drawn:
            mark(line, key, f"{style.name}: {said}, {count_trainings([len(pairs.runs)])}")
    axes.set(xlabel="top-1 more than the baseline (points)" + unseen.removeprefix("; "), title=title)
    plain_ticks(axes, "y")
    axes.text(0.97, 0.97, "better \u2197", transform=axes.transAxes, ha="right", va="top", fontsize=8, fontweight="bold")


def _finite(numbers: Iterable[float]) -> np.ndarray:
    numbers = np.array(list(numbers), dtype=float)
    return numbers[np.isfinite(numbers)]


def show_points(points: Estimate) -> str:
    """A difference in points with its sign, and its interval where it has one."""
    interval = f" [{points.low:+.2f}, {points.high:+.2f}]" if math.isfinite(points.low) else ""
    return f"{points.value:+.2f}{interval} points"


def _tradeoff_in_words(compared: Sequence[_Pairs]) -> str:
    loss = tally([pairs.loss_verdict for pairs in compared])
    points = tally([pairs.points_verdict for pairs in compared], better="higher", worse="lower", of="")
    return f"Beside the baseline, DeltaLoss over all layers is {loss}, and accuracy {points}"


def draw_range_effect(variants: Sequence[Variant]) -> tuple[Figure, pd.DataFrame]:
    """Does damage go with how far the scores go? Every classifier's largest logit against DeltaLoss and SDC of its head."""
    results = [result for variant in variants for result in variant.results]
    places = list(dict.fromkeys((result.dataset, result.backbone) for result in results))
    fill = fills(places)
    confidence = results[0].confidence
    table = classifiers({"": results})
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    found = {}
    for axes, (name, label) in zip(figure.subplots(1, 2), RANGE_EFFECTS.items(), strict=True):
        unseen = logarithmic(axes, "x", table["largest_logit"]) + logarithmic(axes, "y", table[name])
        for variant in variants:
            for result in variant.results:
                x = result.largest_logit
                y = getattr(result.head, name.removeprefix("head_")).value * (100 if name == "head_sdc" else 1)
                look = {"linestyle": "none", "marker": variant.style.marker, "color": variant.style.colour, "markersize": 5.5}
                place = (result.dataset, result.backbone)
                (line,) = axes.plot(x, y, fillstyle=fill[place], markerfacecoloralt="white", **look)
                said = f"{variant.style.name}, seed {result.seed}: largest logit {show_number(x)}, {label} {show_number(y)}"
                mark(line, element_key(*place, variant.key), f"{said}, 1 {variant.each}")
        found[name] = association(table, "largest_logit", name, confidence)["correlation_within"]
        axes.set(xlabel="largest logit on training images", ylabel=label)
        plain_ticks(axes, "x")
        plain_ticks(axes, "y")
        axes.set_title(f"correlation within networks {_correlation(found[name])}, n = {found[name].n}", fontsize=8)
        if unseen:
            axes.annotate(unseen.removeprefix("; "), (0, 1), xycoords="axes fraction", fontsize=SMALL, va="top")
    name_styles(figure, {variant.key: variant.style for variant in variants}.values(), fill)
    state(figure, _range_effect_in_words(*found.values()))
    note = (
        "one mark per classifier; correlation: of logarithms, the networks' means taken out; interval: percentiles of a\n"
        "bootstrap that draws kinds of classifiers whole; what goes together need not make one another"
    )
    add_note(figure, note)
    return figure, table.drop(columns="grid")


def _correlation(found: Estimate) -> str:
    if not math.isfinite(found.value):
        return "undefined"
    interval = f" [{found.low:.2f}, {found.high:.2f}]" if math.isfinite(found.low) else ""
    return f"{found.value:.2f}{interval}"


def _range_effect_in_words(loss: Estimate, sdc: Estimate) -> str:
    if not (math.isfinite(loss.low) or math.isfinite(sdc.low)):
        return f"Whether damage in the head goes with the largest logit cannot be told from these {loss.n} classifiers"
    said = {
        name: f"{'goes with' if one.low > 0 else 'goes against' if one.high < 0 else 'cannot be told to go with'}"
        for name, one in (("DeltaLoss", loss), ("SDC", sdc))
    }
    if len(set(said.values())) == 1:
        return f"DeltaLoss and SDC of the head {said['SDC'].replace('goes', 'go')} the largest logit"
    return f"DeltaLoss of the head {said['DeltaLoss']} the largest logit, and SDC {said['SDC']} it"
