"""Draw the figures of a grid."""

import shutil
from pathlib import Path

from textguard.analysis.files import load_cells, load_results
from textguard.artifacts import WORK_DIR, locked
from textguard.params import Params
from textguard.report.figures import write_figures

FIGURES_DIR = Path("plots") / "figures"


def main(params: Params) -> None:
    results = list(load_results(params.runs).values())
    # All or nothing: where the numbers of one figure are missing, the others stay what they were.
    drawn = FIGURES_DIR.with_name(".figures.tmp")
    with locked(WORK_DIR / "figures" / "lock", "figures"):
        shutil.rmtree(drawn, ignore_errors=True)  # of a process that was killed: none that lives can hold the lock as well
        try:
            write_figures(results, load_cells(params.runs), params, drawn)
            FIGURES_DIR.mkdir(parents=True, exist_ok=True)
            for file in drawn.iterdir():
                file.replace(FIGURES_DIR / file.name)
        finally:
            shutil.rmtree(drawn, ignore_errors=True)
