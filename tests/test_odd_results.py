"""Results that are odd, and right: every figure is drawn, with all that it can show."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from conftest import REPOSITORY
from stored_grid import INJECT, STATISTICS, store_grid
from textguard.analysis.files import load_cells, load_results
from textguard.analysis.results import write_results
from textguard.params import Params, load_params
from textguard.report.figures import PER_BACKBONE, group
from textguard.report.grid_figures import draw_improvement, draw_range_effect, draw_tradeoff
from textguard.report.layer_figures import draw_layers
from textguard.report.theme import styles
from textguard.schema.base import Measured
from textguard.schema.results import MEASURES, PLACES, ByBit, Cell, Improved, PlaceRatios, RunResult

NOTHING = Measured(math.nan, math.nan, math.nan, 0)
FROM_RESULTS = ("outcomes", "bits", "convergence")  # the rest does not look at DeltaLoss, but for the layers
VARIANTS = ["baseline", "template", "descriptions"]


@dataclass(frozen=True)
class Stored:
    """A small grid's results, and the folder in which they lie."""

    folder: Path
    results: list[RunResult]
    cells: list[Cell]
    params: Params


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    folder = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runs = {key: run for key, run in store_grid().items() if run.dataset == "d"}
        write_results(runs, STATISTICS, INJECT)
        found = list(load_results(runs).values()), load_cells(runs)
    return Stored(folder, *found, replace(load_params(REPOSITORY / "params.yaml"), variants=VARIANTS))


@pytest.fixture
def here(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stored]:
    """The grid as the current folder; a warning, which users would see, is an error."""
    monkeypatch.chdir(stored.folder)
    with warnings.catch_warnings(), np.errstate(over="ignore"):  # the latter as `save_figure` has it
        warnings.simplefilter("error")
        yield stored


def drawn(figure: Figure) -> list[str]:
    """Draw a figure. Returns its texts."""
    figure.set_dpi(30)
    FigureCanvasAgg(figure).draw()
    return [" ".join(text.get_text().split()) for text in figure.findobj(Text)]


def estimate(value: float, low: float = math.nan, high: float = math.nan) -> Measured:
    return Measured(value, low, high, 1)


def everywhere(delta_loss: Measured) -> Callable[[RunResult], RunResult]:
    """All DeltaLoss is this."""

    def change(result: RunResult) -> RunResult:
        by_bit = {"delta_loss": [delta_loss.value] * len(result.layers[0].by_bit.delta_loss)}
        layers = [
            layer.model_copy(update={"delta_loss": delta_loss, "by_bit": layer.by_bit.model_copy(update=by_bit)})
            for layer in result.layers
        ]
        numbers = {name: getattr(delta_loss, name) for name in ("value", "low", "high")}
        points = [point.model_copy(update=numbers) for point in result.convergence]
        overall = result.overall.model_copy(update={"delta_loss": delta_loss})
        return result.model_copy(update={"layers": layers, "overall": overall, "convergence": points})

    return change


def one_point(result: RunResult) -> RunResult:
    """One injection per layer: convergence is a point without an interval."""
    point = result.convergence[0].model_copy(update={"injections_per_layer": 1, "low": math.nan, "high": math.nan})
    return everywhere(estimate(0.5))(result).model_copy(update={"convergence": [point]})


def one_bit(result: RunResult) -> RunResult:
    """A number format of one bit."""
    by_bit = ByBit(n=[1], delta_loss=[1.0], sdc=[0.0])
    return result.model_copy(update={"layers": [layer.model_copy(update={"by_bit": by_bit}) for layer in result.layers]})


ODD = {
    "one injection": one_point,
    "unbounded intervals": everywhere(estimate(0.5, low=0.1)),
    "no DeltaLoss": everywhere(estimate(0.0, 0.0, 0.0)),
    "no DeltaLoss, and no interval": everywhere(estimate(0.0)),
    "huge": everywhere(estimate(1e299, 1e298, 1e300)),
    "tiny": everywhere(estimate(1e-300, 0.0, 1e-299)),
    "nothing finite": everywhere(NOTHING),
    "no accuracy": lambda result: result.model_copy(update={"top1": NOTHING}),
    "one bit": one_bit,
}


@pytest.mark.parametrize(
    ("odd", "of"), [*((odd, VARIANTS) for odd in ODD), ("huge", ["baseline"]), ("no DeltaLoss", ["baseline"])]
)
def test_odd_results_are_drawn(here, odd, of):
    results = [ODD[odd](result) if result.variant in of else result for result in here.results]
    (variants,) = group(results, here.params).values()
    for name in FROM_RESULTS:
        figure, numbers = PER_BACKBONE[name](variants, "a title")
        drawn(figure)
        assert set(numbers["variant"]) == set(VARIANTS), name
    for draw_all in (
        lambda: draw_tradeoff(variants, here.cells),
        lambda: draw_range_effect(variants),
        lambda: draw_layers(variants, "a title", here.cells),
    ):
        figure, numbers = draw_all()
        drawn(figure)
        assert set(numbers["variant"]) >= {"template", "descriptions"}


@pytest.mark.parametrize(
    "found",
    [NOTHING, estimate(0.0, 0.0, 0.0), estimate(1e299, 1e298, 1e300), estimate(2.0), estimate(math.nan, math.nan, 3.0)],
    ids=["nothing", "zero", "huge", "no interval", "below a bound"],
)
def test_odd_improvements_are_drawn(here, found):
    ratios = PlaceRatios(**dict.fromkeys(PLACES, found))
    odd = here.cells[0].first.model_copy(update={"improvement": Improved(**dict.fromkeys(MEASURES, ratios))})
    cells = [cell.model_copy(update={"detectors": {"profiled": odd}}) for cell in here.cells]
    figure, numbers = draw_improvement(cells, styles(VARIANTS, {}))
    drawn(figure)
    assert len(numbers) == len(MEASURES) * len(PLACES) * len(cells)


def test_a_layer_that_only_one_variant_has_finds_its_place(here):
    changed = [here.results[0].model_copy(update={"layers": here.results[0].layers[:1]}), *here.results[1:]]
    for results in (changed, [here.results[0], *(r.model_copy(update={"layers": r.layers[-1:]}) for r in here.results[1:])]):
        (variants,) = group(results, here.params).values()
        labels = drawn(PER_BACKBONE["outcomes"](variants, "t")[0])
        assert all(any(name in label for label in labels) for name in ("conv1", "head"))  # a row may be of both
