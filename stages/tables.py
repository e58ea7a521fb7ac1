"""Write Tables 1 to 3 and the grid's headline numbers."""

from pathlib import Path

from textguard.artifacts import write_json
from textguard.params import Params
from textguard.report.results import compare, load_result
from textguard.report.tables import summary, table1, table2, table3, write_table


def main(params: Params) -> None:
    weights = params.tables.last_layer_weights
    results = [load_result(key, run) for key, run in params.runs.items()]
    comparisons = compare(results, weights)
    for table in (table1(comparisons, params.tables.main_dataset), table2(comparisons), table3(comparisons)):
        write_table(table, Path("metrics") / "tables")
    write_json(Path("metrics") / "summary.json", summary(results, comparisons, weights))
