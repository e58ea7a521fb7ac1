"""Figures as PNG, SVG and PDF, with the numbers behind each as CSV. Same input, same bytes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from textguard.params import FiguresParams
from textguard.report.cells import Cell
from textguard.report.closeup_figures import draw_attention, draw_last_layer
from textguard.report.drawing import STYLE, save_figure
from textguard.report.grid_figures import draw_improvement, draw_tradeoff
from textguard.report.layer_figures import (
    draw_bits,
    draw_delta_loss,
    draw_outcomes,
    draw_range_effect,
    draw_value_ranges,
)
from textguard.report.results import Result
from textguard.report.run_figures import draw_accuracy, draw_convergence

# Of one backbone on one data set; each takes its cells, the variants, and a title.
PER_BACKBONE: dict[str, Callable[[Sequence[Cell], str], tuple[Figure, pd.DataFrame]]] = {
    "delta_loss": draw_delta_loss,
    "value_ranges": draw_value_ranges,
    "range_effect": draw_range_effect,
    "outcomes": draw_outcomes,
    "bits": draw_bits,
    "accuracy_by_top2diff": draw_accuracy,
    "convergence": draw_convergence,
    "last_layer": draw_last_layer,
    "attention": draw_attention,
}


def write_figures(
    results: Sequence[Result], compared: Sequence[Mapping[str, Any]], params: FiguresParams, folder: Path
) -> None:
    """Draw every figure and write it to `folder`. compared: the grid's cells, as `load_cells` returns them."""
    groups: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for result in results:
        run = result.run
        groups.setdefault((run.dataset, run.backbone), {}).setdefault(run.variant, []).append(result)
    cells = {
        name: [Cell(variant, params.colours[variant], members) for variant, members in variants.items()]
        for name, variants in groups.items()
    }
    with matplotlib.rc_context(fname=STYLE):
        for (dataset, backbone), members in cells.items():
            for name, draw in PER_BACKBONE.items():
                drawn = draw(members, f"{backbone} on {dataset}")
                save_figure(*drawn, folder / f"{name}-{dataset}-{backbone}", params.dpi)
        everything = [cell for members in cells.values() for cell in members]
        save_figure(*draw_tradeoff(everything), folder / "tradeoff", params.dpi)
        if compared:
            save_figure(*draw_improvement(compared, params.colours), folder / "improvement", params.dpi)
