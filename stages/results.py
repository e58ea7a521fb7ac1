"""Estimate what the grid's campaigns say: per run, per cell, and the headline numbers."""

from textguard.params import Params
from textguard.report.results import write_results


def main(params: Params) -> None:
    write_results(params.runs, params.statistics)
