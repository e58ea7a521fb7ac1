"""Forest plots: one row per estimate in groups, each with its numbers beside it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.markers import CARETLEFT, CARETRIGHT
from matplotlib.ticker import FixedLocator, NullFormatter

from textguard.estimates.statistics import Estimate
from textguard.report.drawing import AS_IS, SMALL, drawable, mark
from textguard.report.rendering import show_estimate, show_number
from textguard.report.variants import count_trainings
from textguard.schema.results import ONE_TRAINING

LINE_INCHES = 0.19  # the height of a row, and of a group's name
LONGEST = 44  # characters of a row's name that are drawn
FARTHEST = (1e-3, 1e3)  # where an axis of ratios ends at the latest
STEPS = (1, 2, 5)


@dataclass(frozen=True)
class Row:
    """An estimate and how it looks.

    group: what stands above it and its neighbours; empty for nothing. verdict: of its interval, see `Verdict`. key: what a page
    finds its mark by. second: another interval, drawn as a thicker bar. published: printed by others, without an interval.
    """

    group: str
    name: str
    estimate: Estimate
    verdict: str
    colour: str
    marker: str
    key: str
    trainings: int
    second: Estimate | None = None
    published: bool = False

    @property
    def printed(self) -> str:
        """Its numbers as they are written."""
        return show_number(self.estimate.value) if self.published else show_estimate(self.estimate)


def is_told(verdict: str) -> bool:
    """Whether an interval leaves out that there is no difference."""
    return verdict in ("better", "worse")


def lines(rows: Sequence[Row]) -> int:
    """How many lines the rows and their groups' names take."""
    return len(rows) + sum(bool(group) for group, _ in groupby(row.group for row in rows))


def name_rows(axes: Axes, rows: Sequence[Row]) -> None:
    """Write the rows' names, and those of their groups above them in bold, on the y axis, which begins at the top."""
    places = [(place, row.name, False) for place, row in _places(rows)]
    places += [(place - 1, row.group, True) for place, row in _firsts(rows)]
    axes.set_yticks([place for place, _, _ in places], [drawable(name, LONGEST) for _, name, _ in places], **AS_IS)
    for label, (_, _, bold) in zip(axes.get_yticklabels(), places, strict=True):
        if bold:
            label.set_fontweight("bold")
    axes.set_ylim(lines(rows) - 0.4, -0.6)


def draw_rows(axes: Axes, rows: Sequence[Row], limits: tuple[float, float], label: str, heading: str = "") -> None:
    """Draw the rows' estimates on a logarithmic axis of ratios with a line at 1, or of differences with one at 0.

    A mark is filled where its interval leaves out that there is no difference, and its numbers are bold then. An interval that
    goes on beyond the axis, or has no end, has an arrow there. limits: of the axis, which is linear where the lower is below 0.
    heading: above the numbers at the right.
    """
    ratios = limits[0] > 0
    if ratios:
        axes.set(xscale="log")
        ticks = _ticks(limits)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlim=limits, xlabel=label)
    axes.axvline(1 if ratios else 0, color="black", linewidth=0.8, zorder=1)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    for place, row in _places(rows):
        _draw(axes, place, row, limits)
    for place, _ in _firsts(rows)[1:]:
        axes.axhline(place - 1.5, color="#d9d9d9", linewidth=0.6)
    if heading:
        axes.text(1.03, 1.0, heading, transform=axes.transAxes, fontsize=SMALL, va="bottom", color="#404040")


def ratio_limits(rows: Iterable[Row], within: tuple[float, float] = FARTHEST) -> tuple[float, float]:
    """Ends of an axis of ratios that holds the rows' estimates and intervals, and 1, as far as `within` goes."""
    numbers = [
        number for row in rows for number in (row.estimate.value, row.estimate.low, row.estimate.high) if 0 < number < math.inf
    ]
    low, high = (min(max(end, within[0]), within[1]) for end in (min([1 / 1.5, *numbers]), max([1.5, *numbers])))
    steps = _steps(*within)
    return max(step for step in steps if step <= low * 1.0001), min(step for step in steps if step >= high * 0.9999)


def difference_limits(rows: Iterable[Row]) -> tuple[float, float]:
    """Ends of an axis of differences that holds the rows' estimates, and their intervals as far as those go on for four times
    the largest estimate.
    """
    rows = [row for row in rows if math.isfinite(row.estimate.value)]
    largest = max((abs(row.estimate.value) for row in rows), default=0.0) or 0.25
    ends = [abs(end) for row in rows for end in (row.estimate.low, row.estimate.high) if math.isfinite(end)]
    most = 1.1 * max(largest, min(max(ends, default=0.0), 4 * largest))
    return -most, most


def tally(verdicts: Sequence[str], better: str = "lower", worse: str = "higher", of: str = " comparisons") -> str:
    """How many verdicts tell something, in words: `lower in 2 of 6 comparisons and higher in 1`."""
    if verdicts and ONE_TRAINING in verdicts and not any(map(is_told, verdicts)):
        return "without a verdict (1 training)"
    counts = {word: sum(verdict == name for verdict in verdicts) for word, name in ((better, "better"), (worse, "worse"))}
    told = [f"{word} in {count}" for word, count in counts.items() if count]
    if not told:
        return f"told apart in none of {len(verdicts)}{of}"
    return " and ".join([f"{told[0]} of {len(verdicts)}{of}", *told[1:]])


def in_words(estimate: Estimate, verdict: str) -> str:
    """What one ratio says, above 1 being better: `is lower (1.5 [1.2, 1.9])`, or that it cannot be told."""
    word = {"better": "is lower", "worse": "is higher", ONE_TRAINING: "has no verdict from 1 training"}.get(
        verdict, "cannot be told apart"
    )
    return f"{word} ({show_estimate(estimate)})"


def _places(rows: Sequence[Row]) -> Iterator[tuple[float, Row]]:
    """Each row and its line; each group's name takes one before it."""
    place, group = 0, ""
    for row in rows:
        place += row.group not in ("", group)
        group = row.group
        yield place, row
        place += 1


def _firsts(rows: Sequence[Row]) -> list[tuple[float, Row]]:
    """The first row of each group that has a name."""
    group, found = "", []
    for place, row in _places(rows):
        if row.group not in ("", group):
            found.append((place, row))
        group = row.group
    return found


def _draw(axes: Axes, place: float, row: Row, limits: tuple[float, float]) -> None:
    estimate, drawn = row.estimate, []
    for interval, width in ((estimate, 1.0), (row.second, 2.8)):
        ends = None if interval is None else _ends(interval, limits)
        if ends is None:
            continue
        drawn += axes.plot(ends, [place, place], linewidth=width, color=row.colour, solid_capstyle="butt")
        if interval is estimate:
            for end, limit, caret in zip(ends, limits, (CARETLEFT, CARETRIGHT), strict=True):
                if end == limit:
                    drawn += axes.plot(limit, place, marker=caret, markersize=5, color=row.colour, clip_on=False)
    said = row.printed
    if limits[0] <= estimate.value <= limits[1]:
        face = row.colour if is_told(row.verdict) else "white"
        look = {"marker": row.marker, "color": row.colour, "markerfacecolor": face, "markersize": 5, "linestyle": "none"}
        drawn += axes.plot(estimate.value, place, zorder=3, **look)
    where = f"{row.group}, {row.name}" if row.group else row.name
    known = "as published" if row.published else f"{count_trainings([row.trainings])}; {row.verdict}"
    for line in drawn:
        mark(line, row.key, f"{where}: {said}, {known}")
    weight = "bold" if is_told(row.verdict) else "normal"
    across = axes.get_yaxis_transform()
    axes.text(1.03, place, said, transform=across, fontsize=SMALL, fontweight=weight, va="center", ha="left", **AS_IS)


def _ends(interval: Estimate, limits: tuple[float, float]) -> tuple[float, float] | None:
    """Where a bar begins and ends on the axis; None where there is nothing to draw."""
    known = [math.isfinite(end) for end in (interval.low, interval.high)]
    if not (math.isfinite(interval.value) or any(known)) or interval.low == interval.high:
        return None
    low, high = (end if here else limit for end, here, limit in zip((interval.low, interval.high), known, limits, strict=True))
    return tuple(min(max(end, limits[0]), limits[1]) for end in (low, high))


def _steps(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [float(f"{step}e{decade}") for decade in decades for step in STEPS]
    return [step for step in steps if low <= step * 1.0001 and step <= high * 1.0001]


def _ticks(limits: tuple[float, float]) -> list[float]:
    """Powers of ten, and what lies between them where the axis is short."""
    steps = _steps(*limits)
    return steps if len(steps) <= 7 else [step for step in steps if f"{step:e}".startswith("1.0")]
