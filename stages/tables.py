"""Write the tables of a grid."""

from dataclasses import asdict
from pathlib import Path

from textguard.params import Params
from textguard.report.results import load_cells, load_run
from textguard.report.tables import make_tables, write_table


def main(params: Params) -> None:
    cells, runs = load_cells(params.runs), {key: load_run(key) for key in params.runs}
    sources = {key: dataset.source for key, dataset in params.datasets.items()}
    recipes = {run.recipe: asdict(params.recipes[run.recipe]) for run in params.runs.values()}
    for table in make_tables(cells, runs, params.tables.main_dataset, sources, recipes, library={}):
        write_table(table, Path("metrics") / "tables")
