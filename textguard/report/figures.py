"""Figures as PNG and SVG, with the numbers behind each as CSV. Same input, same bytes."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from textguard.params import FiguresParams
from textguard.report.drawing import STYLE, save_figure
from textguard.report.results import BASELINE, Result, load_ranges, load_threshold_curve

MARKERS = "osD^vPX*"


def write_figures(results: Sequence[Result], params: FiguresParams, folder: Path) -> None:
    """Draw every figure for every (data set, backbone) of the results, and write them to `folder`."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.run.dataset, result.run.backbone), []).append(result)
    with matplotlib.rc_context(fname=STYLE):
        drawn = [
            (f"{kind}-{dataset}-{backbone}", *draw(group, _pens(group, params), f"{backbone} on {dataset}"))
            for (dataset, backbone), group in groups.items()
            for kind, draw in FIGURES.items()
        ]
        for name, figure, numbers in drawn:
            save_figure(figure, numbers, folder / name, params.dpi)


Pens = dict[str, dict]  # run key -> keyword arguments for matplotlib


def _pens(group: Sequence[Result], params: FiguresParams) -> Pens:
    """One colour per variant, everywhere the same; one marker per seed."""
    seeds = sorted({result.run.seed for result in group})
    pens = {}
    for result in group:
        label = result.run.variant + (f", seed {result.run.seed}" if len(seeds) > 1 else "")
        marker = MARKERS[seeds.index(result.run.seed) % len(MARKERS)]
        pens[result.key] = {"color": params.colours[result.run.variant], "marker": marker, "label": label}
    return pens


def _delta_loss(group: Sequence[Result], pens: Pens, title: str) -> tuple[Figure, pd.DataFrame]:
    layers = _layer_axis(group)
    figure, axes = _layer_panels(layers, 1)
    rows = []
    for index, result in enumerate(group):
        shift = 0.5 * ((index + 0.5) / len(group) - 0.5)
        x = [layers.index(layer.name) + shift for layer in result.layers]
        y = [layer.delta_loss.value for layer in result.layers]
        # An interval that reaches below 0 has no place on a logarithmic axis: it is cut at a thousandth of the mean.
        below = [layer.delta_loss.value - max(layer.delta_loss.low, layer.delta_loss.value / 1000) for layer in result.layers]
        above = [layer.delta_loss.high - layer.delta_loss.value for layer in result.layers]
        axes[0].errorbar(x, y, yerr=[below, above], linestyle="none", elinewidth=0.8, **pens[result.key])
        for layer in result.layers:
            estimate = {"exact": layer.exact, **layer.delta_loss.as_json()}
            rows.append({"run": result.key, "variant": result.run.variant, "layer": layer.name, **estimate})
    injections = sorted({layer.delta_loss.n for result in group for layer in result.layers if not layer.exact}) or [0]
    counts = f"n = {injections[0]}" + (f" to {injections[-1]}" if len(injections) > 1 else "")
    axes[0].set(yscale="log", ylabel="mean DeltaLoss (nats)", title=f"{title}: DeltaLoss of single bit flips per layer")
    note = f"{counts} injections per point; bars: interval over injections, cut where it reaches 0; points without: exact"
    _finish(figure, axes, layers, note)
    return figure, pd.DataFrame(rows)


def _value_ranges(group: Sequence[Result], pens: Pens, title: str) -> tuple[Figure, pd.DataFrame]:
    layers = _layer_axis(group)
    figure, axes = _layer_panels(layers, 2)
    tables = []
    for result in group:
        ranges = load_ranges(result.key)
        x = [layers.index(name) for name in ranges["layer"]]
        for panel, column in zip(axes, ("max_abs", "mean_abs"), strict=True):
            panel.plot(x, ranges[column], linewidth=0.8, markersize=3.5, **pens[result.key])
        tables.append(ranges.assign(run=result.key, variant=result.run.variant))
    axes[0].set(yscale="log", ylabel="largest |value|", title=f"{title}: neuron values per layer, without faults")
    axes[1].set(yscale="log", ylabel="mean |value|")
    images = int(tables[0]["images"].iloc[0])
    _finish(
        figure,
        axes,
        layers,
        f"n = {images} training images; layer outputs before activation; only text-guided models have a head",
    )
    return figure, pd.concat(tables, ignore_index=True)


def _accuracy_by_top2diff(group: Sequence[Result], pens: Pens, title: str) -> tuple[Figure, pd.DataFrame]:
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    tables = []
    for result in group:
        curve = load_threshold_curve(result.key)
        pen = {**pens[result.key], "marker": ""}
        axes.plot(curve["threshold_percent"], curve["accuracy_percent"], linewidth=1.4, **pen)
        tables.append(curve.assign(run=result.key, variant=result.run.variant))
    axes.set(
        xlabel="Top2Diff threshold (%): images below it count as wrong",
        ylabel="top-1 accuracy (%)",
        title=f"{title}: accuracy against Top2Diff",
    )
    axes.legend()
    figure.supxlabel(f"n = {group[0].top1.n} test images, one training per line", fontsize=7)
    return figure, pd.concat(tables, ignore_index=True)


FIGURES = {"delta_loss": _delta_loss, "value_ranges": _value_ranges, "accuracy_by_top2diff": _accuracy_by_top2diff}


def _layer_axis(group: Sequence[Result]) -> list[str]:
    """All layers' names in order of execution; the text-guided head comes last."""
    longest = max(group, key=lambda result: (len(result.layers), result.run.variant != BASELINE))
    return [layer.name for layer in longest.layers]


def _layer_panels(layers: Sequence[str], panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(max(6.0, 1.5 + 0.19 * len(layers)), 1.6 + 2.3 * panels), layout="constrained")
    return figure, list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])


def _finish(figure: Figure, axes: Sequence[Axes], layers: Sequence[str], note: str) -> None:
    axes[-1].set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes[-1].set_xlim(-0.6, len(layers) - 0.4)
    axes[0].legend(ncols=4)
    figure.supxlabel(note, fontsize=7)
