"""Draw the figures of a grid."""

from pathlib import Path
from tempfile import TemporaryDirectory

from textguard.analysis.files import load_cells, load_results
from textguard.params import Params
from textguard.report.figures import write_figures

FIGURES_DIR = Path("plots") / "figures"


def main(params: Params) -> None:
    results = list(load_results(params.runs).values())
    FIGURES_DIR.mkdir(parents=True, exist_ok=True)
    # All or nothing: where the numbers of one figure are missing, the others stay what they were.
    with TemporaryDirectory(dir=FIGURES_DIR.parent, suffix=".tmp") as drawn:
        write_figures(results, load_cells(params.runs), params, Path(drawn))
        for file in Path(drawn).iterdir():
            file.replace(FIGURES_DIR / file.name)
