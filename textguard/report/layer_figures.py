"""Figures with one place per layer, of one backbone on one data set."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from textguard.analysis.files import RESULTS_DIR, RUNS_DIR, load_ranges
from textguard.errors import InvalidArtifact, printable
from textguard.report.drawing import AS_IS, add_note, drawable, logarithmic
from textguard.report.variants import Variant, trainings
from textguard.schema.base import Measured
from textguard.schema.results import BASELINE, Layer, RunResult

LABEL_INCHES = 0.13  # the least room in which a layer's name can be read
WIDEST_INCHES = 24.0
LONGEST = 60  # characters of a layer's name that are drawn
# Light to dark in the order of harm, told apart without colours too.
OUTCOMES = {
    "masked": ("#e8e8e8", "masked: no trace"),
    "benign": ("#a6c8e0", "benign: same class"),
    "sdc": ("#e66100", "SDC: another class"),
    "nonfinite": ("#1a1a1a", "loss not finite"),
}


def draw_delta_loss(variants: Sequence[Variant], title: str) -> tuple[Figure, pd.DataFrame]:
    """Mean DeltaLoss per layer, with intervals over injections; with several trainings, their mean and their range."""
    return _draw_measure(variants, f"{title}: DeltaLoss of faults per layer", "delta_loss", "mean DeltaLoss (nats)")


def draw_sdc(variants: Sequence[Variant], title: str) -> tuple[Figure, pd.DataFrame]:
    """The same of SDC."""
    return _draw_measure(variants, f"{title}: SDC per layer", "sdc", "SDC (share of faults)")


def _draw_measure(variants: Sequence[Variant], title: str, measure: str, label: str) -> tuple[Figure, pd.DataFrame]:
    """measure: a field of `Layer`. label: of its axis."""
    layers = layer_axis(variants)
    figure, (axes,) = _panels(layers, 1, height=2.7)
    rows, means = [], []
    for number, variant in enumerate(variants):
        at = {name: [] for name in layers}
        for result in variant.results:
            for layer in result.layers:
                found = getattr(layer, measure)
                at[layer.layer].append(found)
                rows.append(_row(variant, result, layer, exact=layer.method == "exact", **found.as_json()))
        shift = 0.5 * ((number + 0.5) / len(variants) - 0.5)
        points = [(layers.index(name) + shift, *_point(found)) for name, found in at.items() if found]
        x, y, low, high = np.array(points).T
        means += list(y)
        # An interval that reaches below 0 has no place on a logarithmic axis: it is cut at a thousandth of the mean.
        bars = [y - np.maximum(low, y / 1000), high - y]
        axes.errorbar(x, y, yerr=bars, linestyle="none", elinewidth=0.8, **_style(variant))
    injections = sorted(
        {
            getattr(layer, measure).n
            for variant in variants
            for result in variant.results
            for layer in result.layers
            if layer.method == "sampled"
        }
    )
    several = any(len(variant.results) > 1 for variant in variants)
    bars = "lowest to highest training" if several else "interval over injections, cut where it reaches 0; without: exact"
    unseen = logarithmic(axes, "y", means)
    axes.set(ylabel=label, title=title)
    _finish(figure, axes, layers, f"{_range(injections)} injections per layer, {trainings(variants)}; bars: {bars}{unseen}")
    axes.legend(ncols=4)
    return figure, pd.DataFrame(rows)


def draw_value_ranges(variants: Sequence[Variant], title: str) -> tuple[Figure, pd.DataFrame]:
    """The largest and the mean absolute value of every layer's outputs, without faults."""
    found = {variant.key: [_ranges(result) for result in variant.results] for variant in variants}
    layers = layer_axis(variants)
    profiled = dict.fromkeys(name for tables in found.values() for table in tables for name in table["layer"])
    layers += [name for name in profiled if name not in layers]
    figure, panels = _panels(layers, 2)
    tables, drawn = [], []
    for variant in variants:
        ranges = found[variant.key]
        tables += [
            table.assign(run=result.run, variant=variant.key) for table, result in zip(ranges, variant.results, strict=True)
        ]
        means = pd.concat(ranges).groupby("layer", sort=False)[["max_abs", "mean_abs"]].mean()
        drawn.append(means)
        x = [layers.index(name) for name in means.index]
        for axes, column in zip(panels, means.columns, strict=True):
            axes.plot(x, means[column], linewidth=0.8, **_style(variant))
    unseen = {
        logarithmic(axes, "y", pd.concat(drawn)[name]) for axes, name in zip(panels, ("max_abs", "mean_abs"), strict=True)
    }
    panels[0].set(ylabel="largest |value|", title=f"{title}: neuron values per layer, without faults")
    panels[1].set(ylabel="mean |value|")
    panels[0].legend(ncols=4)
    images = int(tables[0]["images"].iloc[0])
    note = f"{images:,} training images, {trainings(variants)}; outputs before activation; only text-guided models have a head"
    _finish(figure, panels[-1], layers, note + "".join(sorted(unseen)))
    return figure, pd.concat(tables, ignore_index=True)


def _ranges(result: RunResult) -> pd.DataFrame:
    """The ranges of a run's layers, faulty or skipped. Raises InvalidArtifact."""
    table = load_ranges(result.run)
    own, found = {layer.layer for layer in result.layers}, set(table["layer"])
    known = own | {name.removeprefix("backbone.") for name in result.skipped}
    last = result.layers[-1].layer
    if wrong := sorted((own - found) | (found - known)):
        differ = f"are about different layers ({printable(wrong[0])!r})"
    elif math.isclose(result.scale * dict(zip(table["layer"], table["max_abs"], strict=True))[last], result.largest_logit):
        return table
    else:
        differ = f"are of different classifiers (the largest value of {printable(last)!r})"
    raise InvalidArtifact(
        f"{RUNS_DIR / result.run / 'ranges.csv'} and {RESULTS_DIR / result.run}.json {differ}; "
        "delete both and run 'dvc repro': stages 'ranges' and 'results' write them"
    )


def draw_outcomes(variants: Sequence[Variant], title: str) -> tuple[Figure, pd.DataFrame]:
    """What became of the injections into each layer, as shares; of one training per variant."""
    layers = layer_axis(variants)
    figure, panels = _panels(layers, len(variants), height=1.2)
    rows = []
    for axes, variant in zip(panels, variants, strict=True):
        result = variant.results[0]
        x = [layers.index(layer.layer) for layer in result.layers]
        bottom = np.zeros(len(x))
        for outcome, (colour, label) in OUTCOMES.items():
            share = np.array([100 * getattr(layer.outcomes, outcome) for layer in result.layers])
            axes.bar(x, share, bottom=bottom, width=0.85, color=colour, label=label, linewidth=0)
            bottom += share
        rows += [_row(variant, result, layer, **dict(layer.outcomes)) for layer in result.layers]
        axes.set(ylim=(0, 100), yticks=(0, 50, 100), ylabel=f"{variant.style.name}\n(%)")
        axes.grid(visible=False)
    panels[0].set_title(f"{title}: what became of the faults", pad=18)
    panels[0].legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 0.98))
    _finish(figure, panels[-1], layers, f"{_injections(variants)}; {_seeds(variants)}")
    return figure, pd.DataFrame(rows)


def draw_bits(variants: Sequence[Variant], title: str) -> tuple[Figure, pd.DataFrame]:
    """Mean DeltaLoss by layer and bit, as heat maps with one scale; of one training per variant."""
    layers = layer_axis(variants)
    bits = max(len(layer.by_bit.delta_loss) for variant in variants for layer in variant.results[0].layers)
    figure, panels = _panels(layers, len(variants), height=0.55 + 0.055 * bits)
    maps, rows = [], []
    for variant in variants:
        image = np.full((bits, len(layers)), np.nan)
        for layer in variant.results[0].layers:
            found = pd.DataFrame(dict(layer.by_bit))
            image[: len(found), layers.index(layer.layer)] = found["delta_loss"]
            rows.append(found.assign(bit=range(len(found)), **_row(variant, variant.results[0], layer)))
        maps.append(image)
    positive = np.concatenate([image[image > 0] for image in maps])
    high = positive.max(initial=1e-6)
    norm = LogNorm(max(positive.min(initial=high), high * 1e-8), high, clip=True)
    for axes, variant, image in zip(panels, variants, maps, strict=True):
        axes.set_facecolor("#bdbdbd")
        # Zeros take the darkest colour, and what was never hit shows the ground.
        shown = np.maximum(image, norm.vmin)
        drawn = axes.imshow(shown, norm=norm, cmap="magma", aspect="auto", origin="lower", interpolation="nearest")
        axes.set(ylabel=f"{variant.style.name}\nbit", yticks=[*range(0, bits, 8), bits - 1])
        axes.grid(visible=False)
    figure.colorbar(drawn, ax=panels, label="mean DeltaLoss (nats)", pad=0.01)
    panels[0].set_title(f"{title}: DeltaLoss by layer and bit, the highest bit is the sign")
    _finish(
        figure,
        panels[-1],
        layers,
        f"{_injections(variants)}; {_seeds(variants)}; grey: never hit, or no such layer; infinite losses left out",
    )
    return figure, pd.concat(rows, ignore_index=True)


def layer_axis(variants: Sequence[Variant]) -> list[str]:
    """All layers' names in order of execution; the text-guided head comes last."""
    results = [result for variant in variants for result in variant.results]
    longest = max(results, key=lambda result: (len(result.layers), result.variant != BASELINE))
    names = [layer.layer for layer in longest.layers]
    others = dict.fromkeys(layer.layer for result in results for layer in result.layers if layer.layer not in names)
    return [*names[:-1], *others, names[-1]]


def _panels(layers: Sequence[str], count: int, height: float = 2.3) -> tuple[Figure, list[Axes]]:
    width = min(WIDEST_INCHES, max(6.0, 1.5 + max(LABEL_INCHES, 0.19 - 0.0004 * len(layers)) * len(layers)))
    figure = Figure(figsize=(width, 1.6 + height * count), layout="constrained")
    return figure, list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])


def _finish(figure: Figure, axes: Axes, layers: Sequence[str], note: str) -> None:
    names = [drawable(layer, LONGEST) for layer in layers]
    axes.set_xticks(range(len(layers)), names, rotation=90, fontsize=7 if len(layers) < 80 else 6, **AS_IS)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    add_note(figure, note)


def _point(found: Sequence[Measured]) -> tuple[float, float, float]:
    """Mean, lower and upper end of one layer's trainings; of a single one, with its interval."""
    values = [measured.value for measured in found]
    if len(found) == 1:
        return values[0], found[0].low, found[0].high
    return float(np.mean(values)), min(values), max(values)


def _row(variant: Variant, result: RunResult, layer: Layer, **numbers: object) -> dict[str, object]:
    return {"run": result.run, "variant": variant.key, "layer": layer.layer, **numbers}


def _style(variant: Variant) -> dict[str, str]:
    return {"color": variant.style.colour, "marker": variant.style.marker, "label": variant.style.name}


def _range(numbers: Sequence[int]) -> str:
    if not numbers:
        return "n = 0"
    return f"n = {numbers[0]:,}" + (f" to {numbers[-1]:,}" if len(numbers) > 1 else "")


def _injections(variants: Sequence[Variant]) -> str:
    counts = sorted({layer.injections for variant in variants for layer in variant.results[0].layers})
    return f"{_range(counts)} faults per layer"


def _seeds(variants: Sequence[Variant]) -> str:
    return f"one {variants[0].each} each, seed " + "/".join(sorted({str(variant.results[0].seed) for variant in variants}))
