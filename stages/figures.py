"""Draw the figures of a grid."""

from pathlib import Path

from textguard.params import Params
from textguard.report.figures import write_figures
from textguard.report.results import load_cells, load_result


def main(params: Params) -> None:
    results = [load_result(key, run) for key, run in params.runs.items()]
    write_figures(results, load_cells(params.runs), params, Path("plots") / "figures")
