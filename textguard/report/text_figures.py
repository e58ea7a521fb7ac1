"""The figure of class embeddings: how similar classes are.

Class names come from data sets: they are drawn as they are, if not in full length, and never read as markup.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from textguard.report.drawing import AS_IS, STYLE, add_note, drawable, save_figure, state

MOST_LABELS = 40  # class names that an axis holds
LONGEST = 40  # characters of a class name that are drawn
USUAL = 20  # characters for which an axis has room


def draw_similarity(similarity_cc: np.ndarray, classes: Sequence[str], title: str, stem: Path, dpi: int) -> None:
    """A heat map of the cosines [C, C] of class embeddings."""
    with matplotlib.rc_context({"axes.grid": False}, fname=STYLE):
        named = [drawable(name, LONGEST) for name in classes] if len(classes) <= MOST_LABELS else []
        room = 0.05 * max(0, max(map(len, named), default=0) - USUAL)
        side = 3.2 + 0.13 * min(len(classes), MOST_LABELS) + room
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        axes = figure.add_subplot()
        diagonal = np.eye(len(classes), dtype=bool)
        off_diagonal = similarity_cc[~diagonal]
        # Without the diagonal, which is 1 and would leave no colours for the rest.
        colours = matplotlib.colormaps["viridis"].with_extremes(bad="#d9d9d9")
        image = axes.imshow(np.ma.array(similarity_cc, mask=diagonal), cmap=colours, interpolation="nearest")
        figure.colorbar(image, ax=axes, label="cosine of class embeddings")
        _label(axes, named, len(classes))
        first, second = np.unravel_index(np.where(diagonal, -np.inf, similarity_cc).argmax(), similarity_cc.shape)
        pair = " and ".join(drawable(classes[number], USUAL) for number in (first, second))
        alike = f"classes have a cosine of {off_diagonal.mean():.2f} on average, and {off_diagonal.max():.2f} at most: {pair}"
        state(figure, f"{drawable(title, LONGEST)}: {alike}")
        add_note(figure, f"{len(off_diagonal) // 2} pairs of classes; the diagonal is 1")
        save_figure(figure, pd.DataFrame(similarity_cc, columns=list(classes)).round(6), stem, dpi)


def _label(axes: Axes, names: Sequence[str], count: int) -> None:
    if not names:
        axes.set(xlabel=f"{count} classes, in label order", ylabel="the same classes")
        return
    axes.set_xticks(range(count), names, rotation=90, fontsize=7.5, **AS_IS)
    axes.set_yticks(range(count), names, fontsize=7.5, **AS_IS)
