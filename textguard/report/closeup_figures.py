"""Pictures of classifiers under faults: where they look, and the values of their last layer."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, StrMethodFormatter
from PIL import Image

from textguard.analysis.files import CLOSEUP_DIR, LOOKS_DIR, load_closeup
from textguard.analysis.looks import compare_looks
from textguard.artifacts import reading
from textguard.errors import InvalidArtifact
from textguard.report import drawing
from textguard.report.drawing import AS_IS, SMALL, add_note, drawable, mark
from textguard.report.rendering import show_estimate, show_number
from textguard.report.variants import Variant
from textguard.schema.closeup import Cam, LastLayerValues
from textguard.schema.results import BASELINE, PROPOSED

SHOWN = 2  # images, of those that were drawn
LONGEST = 12  # characters of a class's name
NAMED_BITS = (30, 29, 28, 27)  # whose peaks stand apart from the values without faults
WIDTH, PEAK = 2.0, 0.05  # powers of ten around where a peak is to be, and percent that it must have
WRONG = "#c1121f"
PIXELS, HEAT = 96, 0.6  # a side of a picture with a map, and how much of it is the map's colour
GOLDEN = (math.sqrt(5) - 1) / 2  # whose multiples, without what is before the point, lie far from each other
STATES = {"golden": "no fault", "weights": "{flips:,} weight bits", "worst": "worst single fault"}
FAULTS = ("weights", "worst")


def draw_attention(variants: Sequence[Variant], title: str) -> tuple[Figure, pd.DataFrame]:
    """Ablation-CAM of the baseline and of the text-guided classifier on two images, and how far faults move it on all of them.

    Numbers: one row per variant, image and state, with the rank correlation of its map with that without faults.
    """
    chosen = _chosen(variants)
    looks = {variant.key: _load_looks(variant.results[0].run) for variant in chosen}
    drawn = [variant for variant in chosen if not looks[variant.key].empty]
    if not drawn:
        figure = Figure(figsize=(5.2, 1.2), layout="constrained")
        figure.text(0.5, 0.5, f"{title}: there are no maps", ha="center", va="center")
        return figure, pd.DataFrame(columns=["variant"])
    first = looks[drawn[0].key]
    for variant in drawn[1:]:
        _check_same_images(variant, looks[variant.key], first)
    shown = first["image"].unique()[:SHOWN]
    cams = [_load_cam(variant) for variant in drawn]
    # Laid out by hand, in inches: what solves constraints moves images by a last digit from one drawing to the next.
    figure = Figure(figsize=(1.2 + 3.3 * max(len(drawn), 2), 1))
    finding = drawing.state(figure, f"{title}, {_agreement_in_words(drawn, cams)}", va="top")
    rows = [(variant, cam, state) for state in FAULTS for variant, cam in zip(drawn, cams, strict=True) if getattr(cam, state)]
    groups = len({state for _, _, state in rows})
    head, pictures, strips = 0.85 + 0.17 * finding.get_text().count("\n"), 1.2 * len(shown), 0.27 * (len(rows) + groups)
    foot = 1.0 if rows else 0.45  # the axis, and the note below it
    width, height = figure.get_figwidth(), head + pictures + strips + foot
    figure.set_size_inches(width, height)
    finding.set_y(1 - 0.08 / height)
    frame = {"left": 0.08 / width, "right": (1.1 + 3.3 * len(drawn)) / width, "top": 1 - head / height}
    frame |= {"bottom": 1 - (head + pictures - 0.2) / height, "wspace": 0.08, "hspace": 0.25}
    _draw_pictures(figure, frame, shown, drawn, cams, looks)
    if rows:
        axes = figure.add_axes((1.5 / width, foot / height, (width - 4.1) / width, strips / height))
        _draw_strips(axes, rows, looks)
    sides = sorted({round(cam.places**0.5) for cam in cams})
    places = " or ".join(f"{side} x {side}" for side in sides)
    dots = "dots: one image each; red crosses: with another class, or values that are not finite; large: their mean"
    add_note(
        figure,
        f"bright: speaks most for the true class (Ablation-CAM, {places} places); above: prediction and its probability, "
        f"red where wrong\npictures: the first {len(shown)} of {cams[0].images} images drawn at random; one training each; "
        f"range detector {cams[-1].detector}; the worst fault is each campaign's own\n{dots if rows else ''}",
        y=0.06 / height,
    )
    return figure, pd.concat(
        [looks[variant.key].drop(columns=["picture", "map"]).assign(variant=variant.key) for variant in drawn]
    )


def _agreement_in_words(drawn: Sequence[Variant], cams: Sequence[Cam]) -> str:
    """How far maps stay what they were under flipped weight bits, which are the same in all variants; else, of one alone."""
    found = [(variant.style.name, cam.weights) for variant, cam in zip(drawn, cams, strict=True) if cam.weights]
    if not found:
        return "where the classifiers look (Ablation-CAM)"
    means = [shift.rank_correlation for _, shift in found]
    said = " and ".join(f"{show_number(mean.value)} ({name})" for (name, _), mean in zip(found, means, strict=True))
    keep = f"{found[0][1].flips:,} weight bits flipped: maps keep a rank correlation of {said}"
    if len(means) < 2:
        return f"{keep} in one training"
    apart = means[0].low > means[1].high or means[0].high < means[1].low
    return f"{keep}, {'' if apart else 'not '}told apart over {means[0].n} images of one training each"


def _draw_pictures(
    figure: Figure,
    frame: Mapping[str, float],
    shown: Sequence[int],
    drawn: Sequence[Variant],
    cams: Sequence[Cam],
    looks: Mapping[str, pd.DataFrame],
) -> None:
    """A row per image: itself, and of each variant where it looks in each state. frame: of all panels, for `subplots`."""
    gap = 0.15  # between the variants, in panels
    widths = [1, *[width for _ in drawn for width in (gap, *[1] * len(STATES))]]
    panels = figure.subplots(len(shown), len(widths), squeeze=False, width_ratios=widths, gridspec_kw=frame)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
        axes.axis("off")
    _head(panels[0, 0], "image")
    first = looks[drawn[0].key]
    for axes, image in zip(panels[:, 0], shown, strict=True):
        golden = first[(first["image"] == image) & (first["state"] == "golden")].iloc[0]
        _show(axes, golden["picture"], None)
        axes.set_title(drawable(golden["class"], LONGEST), fontsize=SMALL, pad=2)
    for number, (variant, cam) in enumerate(zip(drawn, cams, strict=True)):
        found = looks[variant.key]
        own = panels[:, 2 + number * (1 + len(STATES)) :]
        _head(own[0, 1], variant.style.name, 1.4, fontsize=9, color=variant.style.colour, fontweight="bold", style="normal")
        for column, state in enumerate(STATES):
            if state != "golden" and getattr(cam, state) is None:
                continue
            _head(own[0, column], _spoken(state, cam))
            for axes, image in zip(own[:, column], shown, strict=True):
                rows = found[found["image"] == image].set_index("state")
                _show(axes, rows.loc["golden", "picture"], rows.loc[state])


def _spoken(state: str, cam: Cam) -> str:
    return STATES[state].format(flips=cam.weights.flips) if state == "weights" else STATES[state]


def _draw_strips(axes: Axes, rows: Sequence[tuple[Variant, Cam, str]], looks: Mapping[str, pd.DataFrame]) -> None:
    """A line of dots per kind of faults and variant, one per image, with their mean and its interval; numbers beside it.

    rows: variant, what is said of its maps, and the state that is shown.
    """
    place, group, names = 0, "", {}
    look = {"transform": axes.get_yaxis_transform(), "fontsize": SMALL, "va": "center"}
    axes.text(1.03, 0, "mean [interval]", color="#404040", **look)
    for variant, cam, state in rows:
        if state != group:
            axes.text(-0.03, place, _spoken(state, cam), ha="right", style="italic", **look)
            place, group = place + 1, state
        found, shift = looks[variant.key], getattr(cam, state)
        mean, colour = shift.rank_correlation, variant.style.colour
        own = found[found["state"] == state]
        # Beside each other where they are equal, always in the same way.
        x, y = own["rank_correlation"].to_numpy(), place + 0.6 * (np.arange(len(own)) * GOLDEN % 1 - 0.5)
        changed = own["changed"].to_numpy()
        dots = [
            *axes.plot(x[~changed], y[~changed], marker=".", color=colour, linestyle="none", markersize=4, alpha=0.6),
            *axes.plot(x[changed], y[changed], marker="x", color=WRONG, linestyle="none", markersize=4),
            *axes.plot([mean.low, mean.high], [place, place], color=colour, linewidth=1.3),
            *axes.plot(mean.value, place, marker=variant.style.marker, color=colour, markeredgecolor="white", markersize=6),
        ]
        printed = f"{show_estimate(mean)}; {changed.sum()} of {len(own)} changed"
        for artist in dots:
            said = f"rank correlation {printed}, {len(own)} images, 1 training"
            mark(artist, variant.element, f"{variant.style.name}, {_spoken(state, cam)}: {said}")
        axes.text(1.03, place, printed, **look)
        names[place] = drawable(variant.style.name, 2 * LONGEST)
        place += 1
    lowest = min(axes.dataLim.x0, 0.0)
    axes.set(ylim=(place - 0.5, -0.5), xlim=(lowest - 0.03, 1.03), xlabel="rank correlation of maps with and without the fault")
    axes.set_yticks(list(names), list(names.values()), fontsize=SMALL, **AS_IS)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def _chosen(variants: Sequence[Variant]) -> list[Variant]:
    """The baseline, and the proposed variant or else the last one."""
    others = [variant for variant in variants if variant.key != BASELINE]
    proposed = [variant for variant in others if variant.key == PROPOSED] or others[-1:]
    return [*(variant for variant in variants if variant.key == BASELINE), *proposed]


def _load_looks(key: str) -> pd.DataFrame:
    """What stage closeup saw, with pictures that can be drawn. Raises InvalidArtifact."""
    looks = compare_looks(key)
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
    axes.text(0.5, height, text, transform=axes.transAxes, ha="center", **{"fontsize": SMALL, "style": "italic"} | style)


def _show(axes: Axes, picture: bytes, look: Any) -> None:
    """A picture, and over it where a classifier looks."""
    image = Image.open(io.BytesIO(picture), formats=["PNG"])
    if look is None or not look["finite"]:
        shown = np.asarray(image.convert("RGB" if look is None else "L"))
    else:
        shown = _heat(image, np.array(look["map"]))
    axes.imshow(shown, cmap="gray", extent=(0, 1, 0, 1), interpolation="none")
    if look is None:
        return
    said = f"{drawable(look['predicted'], LONGEST)} {100 * look['confidence']:.0f} %" if look["finite"] else "not finite"
    right = look["finite"] and look["prediction"] == look["label"]
    axes.set_title(said, fontsize=SMALL, pad=2, color="#1a1a1a" if right else WRONG)


def _heat(image: Image.Image, values: np.ndarray) -> np.ndarray:
    """A square map's values in colours over an image, RGB from 0 to 1.

    One picture, because matplotlib's SVG and PDF files mix one with another that is transparent darker than its PNG files do.
    """
    side = math.isqrt(len(values))
    # Without Ablation-CAM's last step, which makes negative values zero: of some maps it would leave nothing to compare.
    scaled = values / (np.abs(values).max() or 1.0)
    scaled = (scaled - scaled.min()) / (np.ptp(scaled) or 1.0)
    smooth = Image.fromarray(scaled.reshape(side, side).astype(np.float32)).resize((PIXELS, PIXELS), Image.Resampling.BILINEAR)
    below = np.asarray(image.convert("L").resize((PIXELS, PIXELS), Image.Resampling.BOX)) / 255
    return HEAT * colormaps["viridis"](np.asarray(smooth))[..., :3] + (1 - HEAT) * below[..., None]


def draw_last_layer(variants: Sequence[Variant], title: str) -> tuple[Figure, pd.DataFrame]:
    """How large the values of the last layer are, golden and after one flip of a bit; of the baseline and of another variant.

    Numbers: of all variants.
    """
    seen = {variant.key: load_closeup(variant.results[0].run).last_layer for variant in variants}
    chosen = _chosen(variants)
    figure = Figure(figsize=(2.0 + 4.0 * len(chosen), 3.7), layout="constrained")
    panels = figure.subplots(1, len(chosen), sharex=True, sharey=True, squeeze=False)[0]
    for axes, variant in zip(panels, chosen, strict=True):
        found = seen[variant.key]
        edges = [*found.powers, found.powers[-1] + 1]
        golden, faulty = (100 * np.array(shares) for shares in (found.golden, found.faulty))
        axes.stairs(golden, edges, fill=True, color="#c9c9c9", label="no fault")
        line = axes.stairs(faulty, edges, color=variant.style.colour, linewidth=1.3, label="one bit flipped")
        first, beyond, lost = variant.results[0], f"{100 * found.beyond:.2g} %", f"{100 * found.not_finite:.2g} %"
        mark(
            line,
            variant.element,
            f"{variant.style.name}: {beyond} beyond the largest profiled, {found.images:,} images, 1 training",
        )
        axes.axvline(math.log10(found.profiled), color="#1a1a1a", linewidth=0.9, linestyle="--")
        clamped = "the detector clamps here" if first.plan.detector == "profiled" else "largest profiled"
        said = f" {clamped}\n beyond: {beyond}\n not finite: {lost}"
        axes.text(math.log10(found.profiled), 4000, said, fontsize=SMALL, ha="left", va="top")
        if first.settings.get("format") == "fp32":
            _name_peaks(axes, found.powers, golden, faulty)
        name = f"{variant.style.name}: {drawable(found.layer, LONGEST)}"
        axes.set_title(name, color=variant.style.colour, fontsize=8, fontweight="bold")
        axes.set_xlabel("magnitude of a value")
        axes.legend(loc="upper left", bbox_to_anchor=(0, 0.92))
    panels[0].set(yscale="log", ylim=(0.01, 8000), yticks=[0.01, 0.1, 1, 10, 100], ylabel="share of the values (%)")
    panels[0].yaxis.set_minor_locator(NullLocator())
    panels[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panels[0].xaxis.set_major_formatter(FuncFormatter(lambda power, _: f"$10^{{{power:.0f}}}$"))
    drawing.state(figure, f"{title}: {_beyond_in_words(chosen, seen)}")
    images = sorted({found.images for found in seen.values()})
    flips = f"{images[-1]:,} test images, every bit as likely, shown without a range detector, one training each"
    add_note(figure, f"{flips}\nnumbers above peaks: the exponent bit that makes them")
    tables = [
        pd.DataFrame({"power": found.powers, "golden": found.golden, "faulty": found.faulty}).assign(
            run=variant.results[0].run, variant=variant.key
        )
        for variant, found in zip(variants, seen.values(), strict=True)
    ]
    return figure, pd.concat(tables, ignore_index=True)


def _name_peaks(axes: Axes, powers: Sequence[int], golden: np.ndarray, faulty: np.ndarray) -> None:
    """Write above each peak which exponent bit of fp32 makes it: bit b moves a value by 2^(b - 23) powers of two."""
    places = np.array(powers) + 0.5
    middle = float(np.average(places, weights=golden))
    beside = np.pad(faulty, 1)
    peaks = (faulty > PEAK) & (faulty >= beside[:-2]) & (faulty >= beside[2:])
    for bit in NAMED_BITS:
        for way in (-1, 1):
            near = peaks & (np.abs(places - middle - way * 2 ** (bit - 23) * math.log10(2)) < WIDTH)
            if near.any():
                height = float(faulty[near].max())
                at = float(places[near][faulty[near].argmax()])
                axes.text(at, 1.25 * height, str(bit), fontsize=SMALL, ha="center", va="bottom")


def _beyond_in_words(chosen: Sequence[Variant], seen: Mapping[str, LastLayerValues]) -> str:
    parts = [f"{100 * seen[variant.key].beyond:.2g} % ({variant.style.name})" for variant in chosen]
    return f"a flipped bit takes {' and '.join(parts)} of the last values out of range"
