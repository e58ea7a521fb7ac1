"""Write the page that shows the grid's results, plots/report.html."""

from pathlib import Path

from textguard.params import Params
from textguard.report.page import read_revision, write_page


def main(params: Params) -> None:
    write_page(Path("plots") / "report.html", params, read_revision())
