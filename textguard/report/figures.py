"""Figures as PNG, SVG and PDF, with the numbers behind each as CSV. Same input, same bytes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from textguard.artifacts import read_csv, write_csv
from textguard.params import Params
from textguard.report.architecture import draw_architecture
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
from textguard.report.results import RUNS_DIR, Result
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
# Those whose numbers DVC draws as well, of all networks in one file: NAME.csv (dvc.yaml, plots).
DRAWN_BY_DVC = ("accuracy_by_top2diff", "delta_loss", "value_ranges")


def write_figures(results: Sequence[Result], compared: Sequence[Mapping[str, Any]], params: Params, folder: Path) -> None:
    """Draw every figure and write it to `folder`. compared: the grid's cells, as `load_cells` returns them.

    Raises InvalidArtifact.
    """
    colours, dpi = params.figures.colours, params.figures.dpi
    groups: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for result in results:
        run = result.run
        groups.setdefault((run.dataset, run.backbone), {}).setdefault(run.variant, []).append(result)
    cells = {
        name: [Cell(variant, colours[variant], members) for variant, members in variants.items()]
        for name, variants in groups.items()
    }
    together: dict[str, list[pd.DataFrame]] = {name: [] for name in ("training", *DRAWN_BY_DVC)}
    with matplotlib.rc_context(fname=STYLE):
        for (dataset, backbone), members in cells.items():
            stem, title = f"{dataset}-{backbone}", f"{backbone} on {dataset}"
            save_figure(*draw_architecture(members, title, params), folder / f"architecture-{stem}", dpi)
            for name, draw in PER_BACKBONE.items():
                figure, numbers = draw(members, title)
                save_figure(figure, numbers, folder / f"{name}-{stem}", dpi)
                if name in together:
                    together[name].append(numbers.assign(dataset=dataset, backbone=backbone))
        everything = [cell for members in cells.values() for cell in members]
        save_figure(*draw_tradeoff(everything), folder / "tradeoff", dpi)
        if compared:
            save_figure(*draw_improvement(compared, colours), folder / "improvement", dpi)
    together["training"] = [load_training(result) for result in results]
    for name, tables in together.items():
        write_csv(folder / f"{name}.csv", pd.concat(tables, ignore_index=True))


def load_training(result: Result) -> pd.DataFrame:
    """Read one run's epochs: loss (nats), accuracy (0 to 1), learning_rate, and whose they are. Raises InvalidArtifact."""
    curve = read_csv(RUNS_DIR / result.key / "training.csv", "train", [], ["epoch", "loss", "accuracy", "learning_rate"])
    run = result.run
    return curve.assign(run=result.key, variant=run.variant, dataset=run.dataset, backbone=run.backbone)
