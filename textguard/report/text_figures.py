"""Figures of class embeddings: how similar classes are, and how their texts lie.

Class names come from data sets: they are drawn as they are, and never read as markup.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from textguard.report.drawing import STYLE, save_figure

MOST_LABELS = 40  # class names that an axis holds
AS_IS = {"parse_math": False}


def draw_similarity(similarity_cc: np.ndarray, classes: Sequence[str], title: str, stem: Path, dpi: int) -> None:
    """A heat map of the cosines [C, C] of class embeddings."""
    with matplotlib.rc_context({"axes.grid": False}, fname=STYLE):
        side = 3.2 + 0.13 * min(len(classes), MOST_LABELS)
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        axes = figure.add_subplot()
        diagonal = np.eye(len(classes), dtype=bool)
        off_diagonal = similarity_cc[~diagonal]
        # Without the diagonal, which is 1 and would leave no colours for the rest.
        colours = matplotlib.colormaps["viridis"].with_extremes(bad="#d9d9d9")
        image = axes.imshow(np.ma.array(similarity_cc, mask=diagonal), cmap=colours, interpolation="nearest")
        figure.colorbar(image, ax=axes, label="cosine of class embeddings")
        _label(axes, classes)
        axes.set_title(title, **AS_IS)
        figure.supxlabel(f"{len(off_diagonal) // 2} pairs, mean cosine {off_diagonal.mean():.3f}", fontsize=7)
        save_figure(figure, pd.DataFrame(similarity_cc, columns=list(classes)).round(6), stem, dpi)


def draw_projection(
    texts_n2: np.ndarray,
    owners_n: np.ndarray,
    means_c2: np.ndarray,
    classes: Sequence[str],
    shown: float,
    title: str,
    stem: Path,
    dpi: int,
) -> None:
    """Texts [N, 2] and class means [C, 2] on the two principal axes, which show a share `shown` of the variance."""
    with matplotlib.rc_context(fname=STYLE):
        figure = Figure(figsize=(5.6, 4.6), layout="constrained")
        axes = figure.add_subplot()
        colours = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(classes)))
        axes.scatter(*texts_n2.T, s=10, color=colours[owners_n], alpha=0.7, linewidths=0)
        axes.scatter(*means_c2.T, s=36, color=colours, edgecolors="black", linewidths=0.6)
        if len(classes) <= MOST_LABELS:
            for (x, y), name in zip(means_c2, classes, strict=True):
                axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7, **AS_IS)
        axes.set(xlabel="first principal component", ylabel="second principal component")
        axes.set_title(title, **AS_IS)
        note = f"{len(texts_n2)} texts (small), {len(classes)} class means (large); {100 * shown:.0f} % of the variance"
        figure.supxlabel(note, fontsize=7)
        points = np.vstack([texts_n2, means_c2]).round(6)
        kinds = ["text"] * len(texts_n2) + ["class mean"] * len(classes)
        names = [classes[owner] for owner in owners_n] + list(classes)
        save_figure(figure, pd.DataFrame({"kind": kinds, "class": names, "x": points[:, 0], "y": points[:, 1]}), stem, dpi)


def _label(axes: Axes, classes: Sequence[str]) -> None:
    if len(classes) > MOST_LABELS:
        axes.set(xlabel=f"{len(classes)} classes, in label order", ylabel="the same classes")
        return
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7, **AS_IS)
    axes.set_yticks(range(len(classes)), classes, fontsize=7, **AS_IS)
