"""Pictures of classifiers under faults: where they look, and the values of their last layer."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, StrMethodFormatter
from PIL import Image

from textguard.analysis.files import CLOSEUP_DIR, LOOKS_DIR, load_closeup, load_looks
from textguard.artifacts import reading
from textguard.errors import InvalidArtifact
from textguard.report.drawing import add_note, drawable
from textguard.report.variants import Variant
from textguard.schema.closeup import Cam
from textguard.schema.results import BASELINE, PROPOSED

SHOWN = 4  # images, of those that were drawn
LONGEST = 12  # characters of a class's name
STATES = {"golden": "no fault", "weights": "{flips:,} weight bits", "worst": "worst single fault"}


def draw_attention(variants: Sequence[Variant], title: str) -> tuple[Figure, pd.DataFrame]:
    """Ablation-CAM of the baseline and of the text-guided classifier on the same images, without faults and with them."""
    chosen = [variant for variant in variants if variant.key == BASELINE]
    chosen += [variant for variant in variants if variant.key == PROPOSED] or [
        variant for variant in variants if variant.key != BASELINE
    ][-1:]
    looks = {variant.key: _load_looks(variant.results[0].run) for variant in chosen}
    drawn = [variant for variant in chosen if not looks[variant.key].empty]
    if not drawn:
        figure = Figure(figsize=(5.2, 1.2), layout="constrained")
        figure.text(0.5, 0.5, f"{title}: there are no maps", ha="center", va="center")
        return figure, pd.DataFrame(columns=["variant"])
    first = looks[drawn[0].key]
    for variant in drawn[1:]:
        _check_same_images(variant, looks[variant.key], first)
    images = first["image"].unique()
    shown = images[:SHOWN]
    # Laid out by hand: what solves constraints moves images by a last digit from one drawing to the next.
    width, height = 1.2 + 3.3 * len(drawn), 1.25 + 1.2 * len(shown)
    figure = Figure(figsize=(width, height))
    frame = {"left": 0.01, "right": 0.99, "bottom": 0.45 / height, "top": 1 - 0.95 / height, "wspace": 0.08, "hspace": 0.25}
    gap = 0.15  # between the variants, in panels
    widths = [1, *[width for _ in drawn for width in (gap, *[1] * len(STATES))]]
    panels = figure.subplots(len(shown), len(widths), squeeze=False, width_ratios=widths, gridspec_kw=frame)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
        axes.axis("off")
    _head(panels[0, 0], "image")
    for axes, image in zip(panels[:, 0], shown, strict=True):
        golden = first[(first["image"] == image) & (first["state"] == "golden")].iloc[0]
        _show(axes, golden["picture"], None)
        axes.set_title(drawable(golden["class"], LONGEST), fontsize=7, pad=2)
    cams = [_load_cam(variant) for variant in drawn]
    for number, (variant, cam) in enumerate(zip(drawn, cams, strict=True)):
        found = looks[variant.key]
        own = panels[:, 2 + number * (1 + len(STATES)) :]
        _head(own[0, 1], variant.style.name, 1.4, fontsize=9, color=variant.style.colour, fontweight="bold", style="normal")
        for column, (state, heading) in enumerate(STATES.items()):
            if state != "golden" and getattr(cam, state) is None:
                continue
            _head(own[0, column], heading.format(flips=cam.weights.flips) if state == "weights" else heading)
            for axes, image in zip(own[:, column], shown, strict=True):
                rows = found[found["image"] == image].set_index("state")
                _show(axes, rows.loc["golden", "picture"], rows.loc[state])
    figure.suptitle(f"{title}: where the classifiers look (Ablation-CAM)", y=1 - 0.08 / height, va="top")
    sides = sorted({round(cam.places**0.5) for cam in cams})
    add_note(
        figure,
        f"bright: speaks most for the true class, of {' or '.join(f'{side} x {side}' for side in sides)} places; "
        "above: prediction and its probability, red where wrong\n"
        f"first {len(shown)} of {len(images)} images drawn at random; one training each; range detector {cams[-1].detector}; "
        "the worst fault is each campaign's own",
        y=0.06 / height,
    )
    return figure, pd.concat(
        [looks[variant.key].drop(columns=["picture", "map"]).assign(variant=variant.key) for variant in drawn]
    )


def _load_looks(key: str) -> pd.DataFrame:
    """What stage closeup saw, with pictures that can be drawn. Raises InvalidArtifact."""
    looks = load_looks(key)
    with reading(LOOKS_DIR / f"{key}.parquet", "closeup"):
        for picture in looks.loc[looks["state"] == "golden", "picture"]:
            Image.open(io.BytesIO(picture), formats=["PNG"]).load()
    return looks


def _check_same_images(variant: Variant, looks: pd.DataFrame, first: pd.DataFrame) -> None:
    """Raises InvalidArtifact where a variant's maps are of other images than the first variant's."""
    named = [table.loc[table["state"] == "golden", ["image", "label", "class"]].to_numpy().tolist() for table in (looks, first)]
    file = LOOKS_DIR / f"{variant.results[0].run}.parquet"
    with reading(file, "closeup"):
        if named[0] != named[1]:
            raise InvalidArtifact("is of other images than the maps of another variant")


def _load_cam(variant: Variant) -> Cam:
    """What is said of the maps of a variant's first training, which has some. Raises InvalidArtifact."""
    key = variant.results[0].run
    cam = load_closeup(key).cam
    if not isinstance(cam, Cam):
        raise InvalidArtifact(
            f"{CLOSEUP_DIR / key}.json has no maps, and {LOOKS_DIR / key}.parquet has; "
            "delete both and run 'dvc repro': stage 'closeup' writes them"
        )
    return cam


def _head(axes: Axes, text: str, height: float = 1.22, **style: Any) -> None:
    """A heading above a column of panels."""
    axes.text(0.5, height, text, transform=axes.transAxes, ha="center", **{"fontsize": 7, "style": "italic"} | style)


def _show(axes: Axes, picture: bytes, look: Any) -> None:
    """A picture, and over it where a classifier looks."""
    pixels = np.asarray(Image.open(io.BytesIO(picture), formats=["PNG"]).convert("L" if look is not None else "RGB"))
    axes.imshow(pixels, cmap="gray", extent=(0, 1, 0, 1), interpolation="nearest")
    if look is None:
        return
    said = f"{drawable(look['predicted'], LONGEST)} {100 * look['confidence']:.0f} %"
    axes.set_title(said, fontsize=7, pad=2)
    axes.title.set_color("#1a1a1a" if look["prediction"] == look["label"] else "#c1121f")
    if not look["finite"]:
        axes.set_title("not finite", fontsize=7, pad=2, color="#c1121f")
        return
    side = round(len(look["map"]) ** 0.5)
    # Without Ablation-CAM's last step, which makes negative values zero: of some maps it would leave nothing to compare.
    values = np.array(look["map"]).reshape(side, side)
    axes.imshow(values, cmap="viridis", alpha=0.6, extent=(0, 1, 0, 1), interpolation="bilinear")


def draw_last_layer(variants: Sequence[Variant], title: str) -> tuple[Figure, pd.DataFrame]:
    """How large the values of the last layer are, golden and after one flip of a bit."""
    figure = Figure(figsize=(1.2 + 2.4 * len(variants), 2.9), layout="constrained")
    panels = figure.subplots(1, len(variants), sharex=True, sharey=True, squeeze=False)[0]
    tables, images = [], 0
    for axes, variant in zip(panels, variants, strict=True):
        found = load_closeup(variant.results[0].run).last_layer
        powers, images = found.powers, found.images
        edges = [*powers, powers[-1] + 1]
        golden, faulty = np.array(found.golden), np.array(found.faulty)
        axes.stairs(100 * golden, edges, fill=True, color="#c9c9c9", label="golden")
        axes.stairs(100 * faulty, edges, color=variant.style.colour, linewidth=1.2, label="one bit flipped")
        limit = math.log10(found.profiled)
        axes.axvline(limit, color="#1a1a1a", linewidth=0.8, linestyle=":", label="largest profiled")
        beyond, lost = 100 * found.beyond, 100 * found.not_finite
        axes.set_title(f"{variant.style.name}: {found.layer}", color=variant.style.colour, fontsize=8)
        said = f"above it: {beyond:.2g} %\nnot finite: {lost:.2g} %"
        axes.text(0.98, 0.97, said, fontsize=6.5, ha="right", va="top", transform=axes.transAxes)
        numbers = {"power": powers, "golden": found.golden, "faulty": found.faulty}
        tables.append(pd.DataFrame(numbers).assign(run=variant.results[0].run, variant=variant.key))
    panels[0].set(yscale="log", ylim=(0.01, 5000), yticks=[0.01, 0.1, 1, 10, 100], ylabel="share of the values (%)")
    panels[0].yaxis.set_minor_locator(NullLocator())
    panels[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panels[0].xaxis.set_major_formatter(FuncFormatter(lambda power, _: f"$10^{{{power:.0f}}}$"))
    panels[0].legend(loc="upper left", fontsize=6.5)
    figure.suptitle(f"{title}: values of the last layer")
    add_note(
        figure,
        f"magnitude of a value; {images:,} test images, every bit as likely, range detector off, one training each",
    )
    return figure, pd.concat(tables, ignore_index=True)
