"""Write the tables of a grid."""

from pathlib import Path

from textguard.params import Params
from textguard.report.rendering import write_table
from textguard.report.tables import tables_of


def main(params: Params) -> None:
    for table in tables_of(params):
        write_table(table, Path("metrics") / "tables")
