"""What all figures share: their style, and files whose bytes depend on nothing but the numbers."""

import functools
import re
import textwrap
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Tick
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from textguard.artifacts import write_bytes, write_csv
from textguard.report.escaping import one_line, shortened, spelled_out, visible

AS_IS = {"parse_math": False}  # of names on an axis: "$" is a dollar
STYLE = Path(__file__).with_name("textguard.mplstyle")
SMALL = 7.5  # points: no text is smaller
NOTE_SIZE = SMALL
# Dates and version strings in the files would change their bytes from run to run.
WITHOUT_DATES = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
LETTER_POINTS = 0.51 * NOTE_SIZE  # how wide a letter of a note is
TITLE_SIZE = 10
TITLE_LETTER_POINTS = 0.58 * TITLE_SIZE
LONGEST_AXIS = 1e200  # the quotient of a logarithmic axis's ends; of longer ones, ticks are larger than a float can be
MARK = "mark|"  # begins the id of what `mark` has named


def state(figure: Figure, finding: str, **place: float) -> Text:
    """Write the finding, a sentence, above a figure. Its files hold it as their title. place: passed on to `suptitle`."""
    figure.set_label(finding)
    room = int(figure.get_figwidth() * 72 / TITLE_LETTER_POINTS)
    lines = textwrap.wrap(finding.replace(" %", "\N{NO-BREAK SPACE}%"), room)
    said = "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")
    return figure.suptitle(said, fontsize=TITLE_SIZE, fontweight="bold", **place)


def mark(artist: Artist, key: str, said: str = "") -> None:
    """Name what is drawn, so that a page can find it by `key`, and says `said` of it where the pointer rests.

    key: `theme.element_key` of what is drawn. said: value, interval and n, as in "1.9x fewer SDC [1.2, 3.1], 3 trainings".
    Empty for what belongs to marks that say it, such as all their intervals in one.
    """
    artist.set_gid(f"{MARK}{key}|{said}".replace('"', "”"))  # or matplotlib would quote it otherwise


def add_note(figure: Figure, note: str, **place: float) -> Text:
    """Write a caption below a figure, its lines broken where they would leave it. place: passed on to `supxlabel`."""
    room = int(figure.get_figwidth() * 72 / LETTER_POINTS)
    lines = [part for line in note.split("\n") for part in textwrap.wrap(line, room)]
    return figure.supxlabel("\n".join(lines), fontsize=NOTE_SIZE, **place)


def drawable(text: str, most: int) -> str:
    """Foreign text as a figure shows it: one line of at most `most` characters, and those without a glyph spelled out."""
    return shortened(_with_glyphs(one_line(text)), most)


def _with_glyphs(text: str) -> str:
    known = _glyphs(findfont(FontProperties()))
    return "".join(letter if ord(letter) in known or letter == "\n" else spelled_out(letter) for letter in text)


@functools.cache
def _glyphs(font: str) -> frozenset[int]:
    return frozenset(get_font(font).get_charmap())


def _take_texts_as_they_are(figure: Figure) -> None:
    """No text of a figure is a formula, but the numbers on its axes; and none holds what SVG or the font has no place for."""
    on_axes = {label for tick in figure.findobj(Tick) for label in (tick.label1, tick.label2)}
    for text in figure.findobj(Text):
        if text not in on_axes:
            text.set_parse_math(False)
            text.set_text(_with_glyphs(visible(text.get_text())))


def logarithmic(axes: Axes, side: str, values: ArrayLike) -> str:
    """Give axis `side` ("x" or "y") a logarithmic scale, or leave it as it is where no value is above 0.

    Returns what a note has to say of values for which such an axis has no place; empty where there are none.
    """
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    if not (finite > 0).any():
        return ""
    axes.set(**{f"{side}scale": "log"})
    zeros = int((finite <= 0).sum())
    return f"; {zeros} of {len(finite)} points are 0, which has no place on a logarithmic axis" if zeros else ""


def plain_ticks(axes: Axes, side: str) -> None:
    """Write the numbers of a logarithmic axis out where it is short, with ticks also between powers of ten.

    To be called when all is drawn. A linear axis is left as it is.
    """
    if getattr(axes, f"get_{side}scale")() != "log":
        return
    axis, (low, high) = getattr(axes, f"{side}axis"), getattr(axes, f"get_{side}lim")()
    if high / low < 300:
        axis.set_major_locator(MaxNLocator(5) if high / low < 8 else LogLocator(subs=(1, 2, 5), numticks=9))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def ratio_axis(axes: Axes, label: str) -> None:
    """Give ratios, which are drawn already, a logarithmic x axis with a line at 1, and ticks also where it is short."""
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel=label)
    low, high = axes.get_xlim()
    if high < 100 * low:  # too few powers of ten for ticks
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=5))
        axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def save_figure(figure: Figure, numbers: pd.DataFrame, stem: Path, dpi: int) -> None:
    """Write STEM.png, STEM.svg, STEM.pdf, and the numbers behind them as STEM.csv."""
    for suffix in WITHOUT_DATES:
        write_bytes(stem.with_name(f"{stem.name}.{suffix}"), draw(figure, suffix, dpi))
    write_csv(stem.with_name(f"{stem.name}.csv"), numbers)


def draw(figure: Figure, suffix: str, dpi: int) -> bytes:
    """The figure as a file of this kind, one of WITHOUT_DATES."""
    FigureCanvasAgg(figure)
    _take_texts_as_they_are(figure)
    buffer = BytesIO()
    titled = {"Title": figure.get_label()} if figure.get_label() else {}
    with np.errstate(over="ignore"):  # of an axis that ends near the largest float there is
        figure.savefig(buffer, format=suffix, dpi=dpi, metadata=WITHOUT_DATES[suffix] | titled)
    content = buffer.getvalue()
    return _with_marks(content) if suffix == "svg" else content


def _with_marks(content: bytes) -> bytes:
    """An SVG whose marks have what they say as their title, which browsers show. Marks may share a key, unlike an id."""
    pattern = rb'<g id="' + re.escape(MARK.encode()) + rb'([^"|]*)\|([^"]*)">'
    content = re.sub(pattern, rb'<g class="mark" data-mark="\1"><title>\2</title>', content)
    return content.replace(b"<title></title>", b"")
