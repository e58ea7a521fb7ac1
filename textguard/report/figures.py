"""Figures as PNG, SVG and PDF, with the numbers behind each as CSV. Same input, same bytes."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from textguard.analysis.files import (
    RUNS_DIR,
    load_compared_corruptions,
    load_corruptions,
    load_effects,
    load_hardware,
    load_hardware_cells,
    load_training,
)
from textguard.artifacts import write_csv
from textguard.errors import InvalidArtifact
from textguard.params import Params
from textguard.report.architecture import draw_architecture
from textguard.report.bit_figures import draw_bits
from textguard.report.closeup_figures import draw_attention, draw_last_layer
from textguard.report.corruption_figures import draw_corruptions, draw_together
from textguard.report.drawing import STYLE, save_figure
from textguard.report.effect_figures import draw_effects
from textguard.report.grid_figures import draw_improvement, draw_range_effect, draw_tradeoff
from textguard.report.hardware_figures import draw_error_rates, draw_fault_models, draw_protection_cost
from textguard.report.layer_figures import draw_layers, draw_outcomes
from textguard.report.run_figures import draw_accuracy, draw_convergence
from textguard.report.theme import Style, place_name, styles
from textguard.report.variants import Variant
from textguard.schema.results import Cell, RunResult

# Of one backbone on one data set; each takes its variants and a title.
PER_BACKBONE: dict[str, Callable[[Sequence[Variant], str], tuple[Figure, pd.DataFrame]]] = {
    "outcomes": draw_outcomes,
    "bits": draw_bits,
    "accuracy_by_top2diff": draw_accuracy,
    "protection_cost": draw_protection_cost,
    "convergence": draw_convergence,
    "last_layer": draw_last_layer,
    "attention": draw_attention,
}
# Those whose numbers DVC draws as well, of all networks in one file: NAME.csv (dvc.yaml, plots).
DRAWN_BY_DVC = ("accuracy_by_top2diff", "layers")


def write_figures(results: Sequence[RunResult], cells: Sequence[Cell], params: Params, folder: Path) -> None:
    """Draw every figure and write it to `folder`. Raises InvalidArtifact."""
    results = [result for result in results if result.variant in params.drawn]
    dpi, places = params.figures.dpi, group(results, params)
    compared = load_compared_corruptions(params.corrupted)
    together: dict[str, list[pd.DataFrame]] = {name: [] for name in DRAWN_BY_DVC}
    with matplotlib.rc_context(fname=STYLE):
        for (dataset, backbone), variants in places.items():
            stem, title = f"{dataset}-{backbone}", place_name(dataset, backbone)
            if untreated := [variant for variant in variants if variant.key not in params.treatments]:
                save_figure(*draw_architecture(untreated, title, params), folder / f"architecture-{stem}", dpi)
            here = [cell for cell in cells if (cell.dataset, cell.backbone) == (dataset, backbone)]
            for name, draw in ({"layers": partial(draw_layers, cells=here)} | PER_BACKBONE).items():
                figure, numbers = draw(variants, title)
                save_figure(figure, numbers, folder / f"{name}-{stem}", dpi)
                if name in together:
                    together[name].append(numbers.assign(dataset=dataset, backbone=backbone))
            _draw_hardware(variants, cells, params, folder, (dataset, backbone))
            if dataset in params.corruptions.datasets:
                corrupted = {result.run: load_corruptions(result.run) for variant in variants for result in variant.results}
                beside = [cell for cell in compared.cells if (cell.dataset, cell.backbone) == (dataset, backbone)]
                save_figure(*draw_corruptions(variants, corrupted, beside, title), folder / f"corruptions-{stem}", dpi)
        everything = [variant for variants in places.values() for variant in variants]
        save_figure(*draw_range_effect(everything), folder / "range_effect", dpi)
        for found in load_effects(params):
            place = found.dataset, found.backbone
            save_figure(*draw_effects(found, place_name(*place)), folder / f"effects-{'-'.join(place)}", dpi)
        if compared.classifiers:
            save_figure(*draw_together(everything, compared), folder / "faults_and_corruptions", dpi)
        if cells:
            save_figure(*draw_improvement(cells, _styles(params), params.drawn), folder / "improvement", dpi)
            save_figure(*draw_tradeoff(everything, cells), folder / "tradeoff", dpi)
    together["training"] = [training_curve(result, params) for result in results]
    for name, tables in together.items():
        write_csv(folder / f"{name}.csv", pd.concat(tables, ignore_index=True))


def _styles(params: Params) -> dict[str, Style]:
    """Of all variants; those that figures tell apart get theirs first."""
    return styles(list(dict.fromkeys([*params.drawn, *params.variants])), params.figures.colours, params.labels)


def _draw_hardware(
    variants: Sequence[Variant], cells: Sequence[Cell], params: Params, folder: Path, place: tuple[str, str]
) -> None:
    """Figures of the faults of section hardware, where it names some."""
    stem, title = "-".join(place), place_name(*place)
    usual, hardware = (
        [cell for cell in every if (cell.dataset, cell.backbone) == place and cell.variant in params.drawn]
        for every in (cells, load_hardware_cells(params.runs))
    )
    if params.hardware.models and usual:
        save_figure(
            *draw_fault_models(hardware, usual, _styles(params), title), folder / f"fault_models-{stem}", params.figures.dpi
        )
    if params.hardware.rates and params.hardware.protections:
        runs = {result.run: load_hardware(result.run) for variant in variants for result in variant.results}
        save_figure(*draw_error_rates(variants, runs, hardware, title), folder / f"error_rates-{stem}", params.figures.dpi)


def group(results: Sequence[RunResult], params: Params) -> dict[tuple[str, str], list[Variant]]:
    """(Data set, backbone) -> its variants, as figures take them."""
    style, groups = _styles(params), {}
    for result in results:
        groups.setdefault((result.dataset, result.backbone), {}).setdefault(result.variant, []).append(result)
    return {
        place: [Variant(key, style[key], members) for key, members in variants.items()] for place, variants in groups.items()
    }


def training_curve(result: RunResult, params: Params) -> pd.DataFrame:
    """One run's epochs, and whose they are. Raises InvalidArtifact."""
    curve = load_training(result.run)
    trained = f"{result.backbone}-{result.variant}" not in params.weights
    epochs = params.recipe(params.runs[result.run]).epochs if trained else 0
    if curve["epoch"].to_list() != list(range(1, epochs + 1)):
        raise InvalidArtifact(
            f"{RUNS_DIR / result.run / 'training.csv'} does not hold the epochs 1 to {epochs}, as many as params.yaml "
            "asks for; delete it and run 'dvc repro': stage 'train' writes it"
        )
    return curve.assign(run=result.run, variant=result.variant, dataset=result.dataset, backbone=result.backbone)
