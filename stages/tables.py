"""Write the tables of a grid."""

from pathlib import Path

from textguard.params import Params
from textguard.report.tables import tables_of, write_table


def main(params: Params) -> None:
    for table in tables_of(params):
        write_table(table, Path("metrics") / "tables")
