"""Figures of class embeddings: how similar classes are, and how their texts lie.

Class names come from data sets: they are drawn as they are, if not in full length, and never read as markup.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from textguard.report.drawing import AS_IS, STYLE, add_note, drawable, save_figure

MOST_LABELS = 40  # class names that a figure or an axis holds
LABEL_DISTANCES = (6, 14, 24, 36)  # of a name from its point, in points
LABEL_DIRECTIONS = (45, 0, 90, 135, 180, 225, 270, 315)  # in degrees
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
        axes.set_title(title)
        add_note(figure, f"{len(off_diagonal) // 2} pairs, mean cosine {off_diagonal.mean():.3f}")
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
    """Texts [N, 2] and class means [C, 2] on the two principal axes, which show a share `shown` of the variance.

    Where names would hide one another, the classes farthest from the middle are named, and how many are is said.
    """
    with matplotlib.rc_context(fname=STYLE):
        figure = Figure(figsize=(5.6, 4.6), layout="constrained")
        axes = figure.add_subplot()
        colours = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(classes)))
        axes.scatter(*texts_n2.T, s=10, color=colours[owners_n], alpha=0.7, linewidths=0)
        axes.scatter(*means_c2.T, s=36, color=colours, edgecolors="black", linewidths=0.6)
        axes.set(xlabel="first principal component", ylabel="second principal component")
        axes.set_title(title)
        note = f"{len(texts_n2)} texts (small), {len(classes)} class means (large); {100 * shown:.0f} % of the variance"
        add_note(figure, note)
        named = _name_points(axes, means_c2, classes)
        if named < len(classes):
            add_note(figure, f"{note}; {named} classes are named")  # instead of the first
        points = np.vstack([texts_n2, means_c2]).round(6)
        kinds = ["text"] * len(texts_n2) + ["class mean"] * len(classes)
        names = [classes[owner] for owner in owners_n] + list(classes)
        save_figure(figure, pd.DataFrame({"kind": kinds, "class": names, "x": points[:, 0], "y": points[:, 1]}), stem, dpi)


def _name_points(axes: Axes, points_n2: np.ndarray, names: Sequence[str]) -> int:
    """Write names beside points [N, 2], from the outside in, each at the nearest place that hides no name and no point.

    A name that is not next to its point has a line to it. Returns how many found a place; MOST_LABELS at most.
    """
    figure = axes.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # which lays it out: from here on, points have their places
    pixels, frame = figure.dpi / 72, axes.bbox
    centres = axes.transData.transform(points_n2) / pixels
    places = [(far, np.radians(angle)) for far in LABEL_DISTANCES for angle in LABEL_DIRECTIONS]
    taken: list[Bbox] = []
    outermost = np.argsort(-np.linalg.norm(points_n2 - points_n2.mean(axis=0), axis=1), kind="stable")
    for index in outermost[: 2 * MOST_LABELS]:  # further in, there is hardly a place, and looking for it takes time
        text = axes.annotate(
            drawable(names[index], LONGEST),
            points_n2[index],
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=7,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "#555555", "shrinkA": 0, "shrinkB": 3},
            **AS_IS,
        )
        text.set_in_layout(False)
        size = text.get_window_extent(renderer).size / pixels + 1
        for far, angle in places if len(taken) < MOST_LABELS else ():
            direction = np.array([np.cos(angle), np.sin(angle)]).round(9)
            corner = direction * far + (np.sign(direction) - 1) / 2 * size
            box = Bbox.from_bounds(*(centres[index] + corner), *size)
            inside = (frame.min <= box.min * pixels).all() and (box.max * pixels <= frame.max).all()
            covers = ((centres >= box.min - 3) & (centres <= box.max + 3)).all(axis=1).any()
            if inside and not covers and not any(box.overlaps(other) for other in taken):
                text.set_position(corner)
                text.arrow_patch.set_visible(far > LABEL_DISTANCES[0])
                taken.append(box)
                break
        else:
            text.remove()
    return len(taken)


def _label(axes: Axes, names: Sequence[str], count: int) -> None:
    if not names:
        axes.set(xlabel=f"{count} classes, in label order", ylabel="the same classes")
        return
    axes.set_xticks(range(count), names, rotation=90, fontsize=7, **AS_IS)
    axes.set_yticks(range(count), names, fontsize=7, **AS_IS)
