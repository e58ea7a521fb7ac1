"""Results that are odd, and right: every figure is drawn, with all that it can show."""

import math
import warnings
from collections.abc import Callable

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from textguard.analysis.files import load_cells, load_results
from textguard.report.architecture import draw_architecture
from textguard.report.figures import PER_BACKBONE, group
from textguard.report.grid_figures import draw_improvement, draw_tradeoff
from textguard.report.theme import styles
from textguard.schema.base import Measured
from textguard.schema.results import RunResult

NOTHING = Measured(math.nan, math.nan, math.nan, 0)


def estimate(value: float, low: float = math.nan, high: float = math.nan) -> Measured:
    return Measured(value, low, high, 1)


def everywhere(delta_loss: Measured) -> Callable[[RunResult], RunResult]:
    """All DeltaLoss is this."""

    def change(result: RunResult) -> RunResult:
        bits = len(result.layers[0].by_bit.delta_loss)
        by_bit = {"delta_loss": [delta_loss.value] * bits}
        layers = [
            layer.model_copy(update={"delta_loss": delta_loss, "by_bit": layer.by_bit.model_copy(update=by_bit)})
            for layer in result.layers
        ]
        means = {"delta_loss": delta_loss, "delta_loss_by_neurons": delta_loss}
        points = [
            point.model_copy(update={name: getattr(delta_loss, name) for name in ("value", "low", "high")})
            for point in result.convergence
        ]
        overall = result.overall.model_copy(update=means)
        return result.model_copy(update={"layers": layers, "overall": overall, "convergence": points})

    return change


def one_layer(result: RunResult) -> RunResult:
    return result.model_copy(update={"layers": result.layers[-1:], "convergence": []})


def never_hit(result: RunResult) -> RunResult:
    """No bit was hit, and there is no accuracy either."""
    layers = everywhere(NOTHING)(result).layers
    return result.model_copy(update={"layers": layers, "top1": NOTHING})


def named(name: str) -> Callable[[RunResult], RunResult]:
    def change(result: RunResult) -> RunResult:
        layers = [layer.model_copy(update={"layer": f"{name}{place}"}) for place, layer in enumerate(result.layers)]
        return result.model_copy(update={"layers": layers})

    return change


ODD = {
    "one injection, and so no interval": everywhere(estimate(0.5)),
    "unbounded intervals": everywhere(estimate(0.5, low=0.1)),
    "no DeltaLoss at all": everywhere(estimate(0.0, 0.0, 0.0)),
    "no DeltaLoss, and no interval": everywhere(estimate(0.0)),
    "zero with an interval": everywhere(estimate(0.0, 0.0, 0.1)),
    "huge": everywhere(estimate(1e300, 1e299, 1e301)),
    "tiny": everywhere(estimate(1e-300, 0.0, 1e-299)),
    "nothing finite": everywhere(NOTHING),
    "never hit": never_hit,
    "one layer": one_layer,
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
@pytest.mark.parametrize("which", ["all", "the baseline"])
def test_odd_results_are_drawn(runs, params, change, which):
    results = [
        change(result) if which == "all" or result.variant == "baseline" else result for result in load_results(runs).values()
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        places = group(results, params)
        for variants in places.values():
            for name, draw in PER_BACKBONE.items():
                try:
                    figure, numbers = draw(variants, "a title")
                    FigureCanvasAgg(figure).draw()
                    assert len(numbers) or name == "convergence"
                except Exception as e:
                    print("XXX", name, type(e), e)
        everything = [variant for variants in places.values() for variant in variants]
        figure, numbers = draw_tradeoff(everything)
        FigureCanvasAgg(figure).draw()
        assert len(numbers) == len(results)
