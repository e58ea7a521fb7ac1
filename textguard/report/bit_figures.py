"""The figure of what faults do by the bit that they hit, of one backbone on one data set."""

import math
import re
import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from textguard.analysis.layers import CLASSIFIER_PARTS, Aligned, BitMean, align, bit_means, loss_by_bit
from textguard.report.drawing import AS_IS, SMALL, add_note, drawable, logarithmic, mark, state
from textguard.report.layer_figures import LONGEST, ROW_INCHES, shift
from textguard.report.legend import name_styles
from textguard.report.rendering import show_estimate, show_number
from textguard.report.variants import Variant, trainings

FEWEST = 32  # injections in a cell of a heat map that is drawn
SPOKEN = dict(zip(CLASSIFIER_PARTS, ("class scores", "layers before them"), strict=True))
MEASURES = {"sdc": (100, "SDC (%)"), "delta_loss": (1, "DeltaLoss (nats)")}
# Exponent and mantissa bits of formats that do not have them in their names.
FLOATS = {"fp32": (8, 23), "fp16": (5, 10), "bf16": (8, 7), "fp8_e5m2": (5, 2), "fp8_e4m3": (4, 3)}
ENDS = {"": "value", "_low": "low", "_high": "high"}
TITLE = 16  # letters in a line above a map
DECADES = 6  # of an axis at most, down from its largest value


def draw_bits(variants: Sequence[Variant], title: str) -> tuple[Figure, pd.DataFrame]:
    """SDC and DeltaLoss by bit, of the class scores and pooled over the layers before them; below, DeltaLoss by layer and bit.

    Numbers: one row per variant, part and bit, and of the maps, per variant, layer and bit.
    """
    results = [result for variant in variants for result in variant.results]
    aligned = align(results)
    bits = max(len(layer.by_bit.n) for result in results for layer in result.layers)
    fields = bit_fields(str(results[0].settings.get("format")), bits)
    parts = [part for part in CLASSIFIER_PARTS if part == "scores" or len(aligned.names) > 1]
    losses = [loss_by_bit(variant.results, FEWEST) for variant in variants]
    lowest = _lowest(variants, losses)
    heights = [1.55 * len(parts) * len(MEASURES), 0.75 + ROW_INCHES * len(aligned.names)][: 1 + (lowest is not None)]
    width = max(10.2, 2.8 + 1.2 * len(variants))
    figure = Figure(figsize=(width, 1.0 + sum(heights)), layout="constrained")
    curves, *maps = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    panels = curves.subplots(len(parts) * len(MEASURES), 1, sharex=True)
    worst, rows = {}, []
    for row, part in enumerate(parts):
        found = [bit_means(variant.results, part) for variant in variants]
        worst[part] = [_worst(own) for own in found]
        rows += [
            {"variant": variant.key, "part": SPOKEN[part], "layer": "", "bit": bit}
            | {f"{measure}{end}": getattr(getattr(one, measure), name) for measure in MEASURES for end, name in ENDS.items()}
            for variant, own in zip(variants, found, strict=True)
            for bit, one in enumerate(own)
        ]
        for axes, (measure, (factor, label)) in zip(panels[len(MEASURES) * row :], MEASURES.items(), strict=False):
            _draw_curves(axes, variants, found, measure, factor)
            axes.set_ylabel(f"{SPOKEN[part]}\n{label}")
            _name_fields(axes, fields, named=axes is panels[0])
    panels[-1].set(xlim=(bits - 0.4, -0.6), xlabel="bit that is flipped", xticks=[*range(0, bits, 4), bits - 1])
    name_styles(curves, [variant.style for variant in variants])
    for place in maps:
        _draw_maps(place, variants, aligned, losses, (lowest, bits))
    state(figure, f"{title}: {_in_words(worst, fields)}")
    several = any(len(variant.results) > 1 for variant in variants)
    bars = f"bars: intervals over {variants[0].each}s, cut at the edge" if several else "one alone has no interval"
    shown = f"maps: where {FEWEST} injections or more hit the bit of a layer; grey: fewer, or no such layer"
    beyond = f"; bits below {lowest} were hit so often in the class scores alone" if lowest else ""
    add_note(
        figure,
        f"means over the layers in which a bit was hit, {trainings(variants)} each; {bars}; no mark: nothing seen\n"
        + (shown + beyond if maps else f"no bit of a layer before the class scores was hit by {FEWEST} injections or more"),
    )
    rows += [
        {"variant": variant.key, "part": "", "layer": layer, "bit": bit, "delta_loss": loss}
        for variant, own in zip(variants, losses, strict=True)
        for layer, found in own.items()
        for bit, loss in enumerate(found)
        if math.isfinite(loss)
    ]
    return figure, pd.DataFrame(rows)


def _lowest(variants: Sequence[Variant], losses: Sequence[dict[str, np.ndarray]]) -> int | None:
    """The lowest bit that was hit often enough in a layer before the class scores."""
    found = [
        int(np.isfinite(own).argmax())
        for variant, layers in zip(variants, losses, strict=True)
        for layer, own in layers.items()
        if layer != variant.results[0].layers[-1].layer and np.isfinite(own).any()
    ]
    return min(found, default=None)


def bit_fields(number_format: str, bits: int) -> list[tuple[str, int, int]]:
    """Name, lowest and highest bit of the fields of a format's values, the sign first; empty where they are not known."""
    sizes = FLOATS.get(number_format)
    if found := re.fullmatch(r"(?:fp|adaptivfloat)\((\d+),(\d+)\)", number_format):
        sizes = int(found[1]), int(found[2])
    if sizes is None or 1 + sum(sizes) != bits:
        return []
    mantissa = sizes[1]
    return [("sign", bits - 1, bits - 1), ("exponent", mantissa, bits - 2), ("mantissa", 0, mantissa - 1)]


def _worst(found: Sequence[BitMean]) -> int:
    """The bit with the largest SDC; -1 where there was none."""
    shares = [one.sdc.value if math.isfinite(one.sdc.value) else 0.0 for one in found]
    return int(np.argmax(shares)) if any(shares) else -1


def _in_words(worst: dict[str, list[int]], fields: Sequence[tuple[str, int, int]]) -> str:
    said = {}
    for part, found in worst.items():
        seen = sorted({bit for bit in found if bit >= 0}, reverse=True)
        kinds = list(dict.fromkeys(name for bit in seen for name, low, high in fields if low <= bit <= high))
        field = f" ({' or '.join(kinds)})" if kinds else ""
        at = f"at bit {' or '.join(map(str, seen))}{field}" if seen else "nowhere"
        said.setdefault(at, []).append(SPOKEN[part])
    return "SDC is largest " + ", ".join(f"{at} in the {' and the '.join(parts)}" for at, parts in said.items())


def _draw_curves(
    axes: Axes, variants: Sequence[Variant], found: Sequence[Sequence[BitMean]], measure: str, factor: float
) -> None:
    values = [getattr(one, measure).value * factor for own in found for one in own]
    logarithmic(axes, "y", values)
    largest = max((value for value in values if value > 0), default=1.0)
    low = largest / 10**DECADES
    low = max(low, min((value for value in values if value > low), default=low) / 2)
    for number, (variant, own) in enumerate(zip(variants, found, strict=True)):
        style, bars = variant.style, []
        for bit, one in enumerate(own):
            mean = getattr(one, measure).times(factor)
            if not mean.value > low:
                continue
            place = bit - shift(number, len(variants))
            if mean.low < mean.high:
                bars.append((place, max(mean.low, low), mean.high))
            (line,) = axes.plot(place, mean.value, marker=style.marker, color=style.colour, linestyle="none")
            shown = show_number(mean.value) if math.isnan(mean.low) else show_estimate(mean)
            mark(line, variant.element, f"{style.name}, bit {bit}: {MEASURES[measure][1]} {shown}, {trainings([variant])}")
        if bars:
            mark(axes.vlines(*zip(*bars, strict=True), color=style.colour, linewidth=0.9), variant.element)
    if axes.get_yscale() == "log":
        axes.set_ylim(low / 1.5, largest * 4)
        axes.yaxis.set_major_locator(LogLocator(numticks=4))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _name_fields(axes: Axes, fields: Sequence[tuple[str, int, int]], named: bool) -> None:
    for number, (name, low, high) in enumerate(fields):
        if number % 2:
            axes.axvspan(low - 0.5, high + 0.5, color="#f2f2f2", linewidth=0, zorder=0)
        if named:
            across = axes.get_xaxis_transform()
            axes.text((low + high) / 2, 1.02, name, transform=across, fontsize=SMALL, ha="center", va="bottom")


def _draw_maps(
    figure: SubFigure,
    variants: Sequence[Variant],
    aligned: Aligned,
    losses: Sequence[dict[str, np.ndarray]],
    shown: tuple[int, int],
) -> None:
    """Mean DeltaLoss by layer and bit, with one scale. shown: the lowest bit, and the one behind the highest."""
    low, bits = shown
    images = []
    for variant, own in zip(variants, losses, strict=True):
        image = np.full((len(aligned.names), bits), np.nan)
        for layer, found in own.items():
            image[aligned.at(variant.results[0], layer), : len(found)] = found
        images.append(image[:, low:])
    positive = np.concatenate([image[image > 0] for image in images])
    high = positive.max(initial=1e-6)
    norm = LogNorm(max(positive.min(initial=high), high * 1e-8), high, clip=True)
    panels = figure.subplots(1, len(variants), sharey=True, squeeze=False)[0]
    for axes, variant, image in zip(panels, variants, images, strict=True):
        axes.set_facecolor("#c9c9c9")
        # Zeros take the darkest colour.
        look = {"norm": norm, "cmap": "magma", "aspect": "auto", "interpolation": "nearest"}
        extent = (low - 0.5, bits - 0.5, len(image) - 0.5, -0.5)
        drawn = axes.imshow(np.maximum(image, norm.vmin), extent=extent, **look)
        axes.set(xlim=(bits - 0.5, low - 0.5), xlabel="bit")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_title(textwrap.fill(variant.style.name, TITLE), fontsize=8)
        axes.grid(visible=False)
    names = [drawable(name, LONGEST) for name in aligned.names]
    panels[0].set_yticks(range(len(names)), names, fontsize=SMALL, **AS_IS)
    figure.colorbar(drawn, ax=panels, label="mean DeltaLoss (nats)", pad=0.01)
