"""The legend of variants, the same beside all figures."""

from collections.abc import Iterable, Mapping

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from textguard.report.drawing import SMALL
from textguard.report.theme import NO_FILLS, Style, place_name


def name_styles(figure: Figure, styles: Iterable[Style], fill: Mapping[tuple[str, str], str] = NO_FILLS) -> None:
    """A legend of variants beside the panels, and of places where one panel holds several: see `theme.fills`."""
    look = {"linestyle": "none", "markersize": 5.5}
    handles = [Line2D([], [], marker=style.marker, color=style.colour, label=style.name, **look) for style in styles]
    if len(fill) > 1:
        look |= {"color": "black", "markerfacecoloralt": "white"}
        handles += [Line2D([], [], marker="o", fillstyle=way, label=place_name(*place), **look) for place, way in fill.items()]
    figure.legend(handles=handles, loc="outside right center", fontsize=SMALL)  # the title is above
