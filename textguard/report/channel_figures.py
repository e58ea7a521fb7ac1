"""The figure of what faults do in each channel of one layer."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from textguard.estimates.channels import FEWEST
from textguard.report.drawing import SMALL, add_note, drawable, state
from textguard.report.rendering import show_number

MEASURES = {"sdc": (100, "SDC", "%"), "delta_loss": (1, "DeltaLoss", "nats")}
COLOURS = colormaps["magma"]
GREY = "#c9c9c9"
OUTLINE = "#00c8ff"  # which no value has as its colour
WIDTH, PANEL, BAR = 10.2, 4.75, 0.13  # inches: the figure, a panel, and how thick a colour bar is
TICK_INCHES = 0.14  # between the numbers of two rows
LOGARITHMIC = 30  # how many times the smallest value the largest has to be for a logarithmic scale
DECADES = 4  # of such a scale at most, down from its largest value
LINE = 110  # letters of a title with many digits
LONGEST = 48  # characters of a layer's name
MOST_NAMES = 5  # channels that the title names
LEGEND = (
    "a channel is a feature map, or a feature of a linear layer; rows are numbered by their first channel; 0 is the darkest"
)


@dataclass(frozen=True)
class Channels:
    """One layer of a model, channel by channel.

    name: what the model is called. table: one row per channel, as `summarise_channels` has them for a layer. means: measure ->
    that of the whole layer, in nats or as a share. limits: measure -> between what all channels lie by chance, as
    `chance_limits` has it with this confidence.
    """

    name: str
    table: pd.DataFrame
    means: Mapping[str, float]
    limits: Mapping[str, tuple[float, float]]
    confidence: float

    @property
    def known(self) -> pd.DataFrame:
        """The channels with enough injections."""
        return self.table[self.table["injections"] >= FEWEST]

    def more(self, measure: str) -> pd.DataFrame:
        """The channels that have more of it than chance explains, the largest first."""
        known = self.known
        return known[known[measure] > self.limits[measure][1]].sort_values(measure, ascending=False, kind="stable")

    def less(self, measure: str) -> pd.DataFrame:
        """The channels that have less of it than chance explains, the smallest first."""
        known = self.known
        return known[known[measure] < self.limits[measure][0]].sort_values(measure, kind="stable")

    @property
    def finding(self) -> str:
        """How many channels have more SDC than the layer's mean, how many less, and which."""
        more, less = self.more("sdc"), self.less("sdc")
        enough = " hit often enough" if len(self.known) < len(self.table) else ""
        of = f"of {len(self.known):,} channels{enough}"
        mean = "SDC than the layer's mean beyond chance"
        if not len(more) + len(less):
            return f"none {of} has more or less {mean}"
        if not len(more):
            return f"{len(less):,} {of} {_has(less)} less {mean}{_named(less)}, none more"
        return f"{len(more):,} {of} {_has(more)} more {mean}{_named(more)}, {len(less) or 'none'} less{_named(less)}"


def draw_channels(layer: str, models: Sequence[Channels], remarks: Sequence[str] = ()) -> tuple[Figure, pd.DataFrame]:
    """SDC and DeltaLoss of each channel of a layer as squares in rows, of one model or of several below each other.

    remarks: what the note says besides. Numbers: one row per model and channel.
    """
    widths = [_width(len(model.table)) for model in models]
    heights = [PANEL * _rows(len(model.table), width) / width for model, width in zip(models, widths, strict=True)]
    figure = Figure(layout="constrained")
    figure.set_figwidth(WIDTH)
    *panels, bars = figure.subplots(len(models) + 1, len(MEASURES), height_ratios=[*heights, BAR])
    named = {model.name: f"{model.name}: " if len(models) > 1 else "" for model in models}
    for side, bar, (measure, (factor, name, unit)) in zip(np.transpose(panels), bars, MEASURES.items(), strict=True):
        norm = _scale(np.concatenate([factor * model.known[measure].to_numpy(float) for model in models]))
        for axes, model, width in zip(side, models, widths, strict=True):
            _draw_squares(axes, factor * model.known[measure].reindex(model.table.index), width, norm)
            _outline(axes, [*model.more(measure)["channel"], *model.less(measure)["channel"]], width)
            mean = show_number(factor * model.means[measure])
            axes.set_title(f"{named[model.name]}{name}, {mean} {unit} on average")
        figure.colorbar(ScalarMappable(norm, COLOURS), cax=bar, orientation="horizontal", label=f"{name} ({unit})")
        if not isinstance(norm, LogNorm):
            bar.xaxis.set(major_locator=MaxNLocator(5), major_formatter="{x:.3g}")
    findings = [f"{named[model.name]}{model.finding}" for model in models]
    findings[0] = f"{drawable(layer, LONGEST)}: {findings[0]}"
    finding = state(figure, "; ".join(findings))
    finding.set_text("\n".join(textwrap.fill(line, LINE) for line in findings))
    behind = [f"{named[model.name]}{_behind(model)}" for model in models]
    note = add_note(figure, "\n".join([*behind, LEGEND, "; ".join(remarks)]).strip())
    lines = [text.get_text().count("\n") + 1 for text in (finding, note)]
    figure.set_figheight(sum(heights) + 0.5 * len(models) + 0.6 + 0.2 * lines[0] + 0.16 * lines[1])
    numbers = [model.table.assign(model=model.name, layer=layer) for model in models]
    return figure, pd.concat(numbers, ignore_index=True)


def _has(channels: pd.DataFrame) -> str:
    return "has" if len(channels) == 1 else "have"


def _named(channels: pd.DataFrame) -> str:
    """The first channels in brackets, and how many more there are."""
    names = [str(number) for number in channels["channel"]]
    if not names:
        return ""
    if len(names) > MOST_NAMES + 1:
        names = [*names[:MOST_NAMES], f"{len(names) - MOST_NAMES} others"]
    return f" ({' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))})"


def _width(count: int) -> int:
    """How many channels are in a row: 8 at least, and about twice the rows or more."""
    width = 8
    while width * width < 2 * count:
        width *= 2
    return width


def _rows(count: int, width: int) -> int:
    return -(-count // width)


def _scale(values: np.ndarray) -> Normalize:
    """From 0, or logarithmic where values differ much; smaller ones take the darkest colour."""
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        return Normalize(0, 1)
    low, high = positive.min(), positive.max()
    if high < LOGARITHMIC * low:
        return Normalize(0, high)
    return LogNorm(max(low, high / 10**DECADES), high, clip=True)


def _draw_squares(axes: Axes, values: pd.Series, width: int, norm: Normalize) -> None:
    """One square per channel, grey where its value is NaN."""
    found = values.to_numpy(float)
    colours = COLOURS(norm(np.nan_to_num(found)))
    colours[np.isnan(found)] = (*(int(GREY[at : at + 2], 16) / 255 for at in (1, 3, 5)), 1)
    inch = PANEL / width
    axes.add_collection(PatchCollection(_squares(range(len(found)), width), fc=colours, ec="white", lw=min(1.5, 8 * inch)))
    rows = _rows(len(found), width)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(rows - 0.5, -0.5), aspect="equal", anchor="N")
    step = next(step for step in (1, 2, 4, 8, 16) if step * inch >= TICK_INCHES)
    axes.set_yticks(range(0, rows, step), [str(row * width) for row in range(0, rows, step)], fontsize=SMALL)
    axes.set_xticks(at := range(0, min(len(found), width), width // 8), [f"+{place}" for place in at], fontsize=SMALL)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _outline(axes: Axes, channels: Sequence[int], width: int) -> None:
    line = min(2.0, 14 * PANEL / width)
    axes.add_collection(PatchCollection(_squares(channels, width), fc="none", ec=OUTLINE, lw=line, clip_on=False))


def _squares(channels: Sequence[int], width: int) -> list[Rectangle]:
    return [Rectangle((channel % width - 0.5, channel // width - 0.5), 1, 1) for channel in channels]


def _behind(model: Channels) -> str:
    """What a model's squares were measured by."""
    known, injections = len(model.known), int(model.table["injections"].sum())
    few = len(model.table) - known
    grey = f"grey: fewer than {FEWEST} of them, in {few:,} of {len(model.table):,} channels; " if few else ""
    return (
        f"{injections:,} injections; {grey}outlined: more or less than chance explains, which alone would outline a channel in "
        f"{100 * (1 - model.confidence):.2g} % of such panels"
    )
