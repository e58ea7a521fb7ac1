"""Estimate what the grid's campaigns say: per run, per cell, and the headline numbers."""

from textguard.analysis.results import write_results
from textguard.params import Params


def main(params: Params) -> None:
    write_results(params.runs, params.statistics, params.inject, params.corrupted, params.treatments)
