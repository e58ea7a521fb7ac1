"""Stage `results`: estimates of every run, of every cell beside its baseline, and the grid's summary."""

from collections.abc import Mapping

import numpy as np

from textguard.analysis.campaigns import load_campaign
from textguard.analysis.comparison import Comparison, compare, describe_cell, with_improvement
from textguard.analysis.files import CELLS_FILE, RECORDS_DIR, RESULTS_DIR, SUMMARY_FILE
from textguard.analysis.runs import describe_run
from textguard.analysis.summary import summarise_grid
from textguard.artifacts import reading, write_json
from textguard.errors import InvalidArtifact
from textguard.estimates.statistics import paired_difference
from textguard.params import InjectParams, Run, StatisticsParams
from textguard.schema.records import read_columns
from textguard.schema.results import BASELINE, RunResult


def write_results(runs: Mapping[str, Run], statistics: StatisticsParams, inject: InjectParams) -> None:
    """Write metrics/results/RUN.json for every run, metrics/cells.json, and metrics/summary.json.

    inject: what the runs' campaigns must have been made with. Raises InvalidArtifact, InvalidParameter.
    """
    campaigns = {key: load_campaign(key, run, statistics, inject) for key, run in runs.items()}
    results = {key: describe_run(key, run, campaigns[key], statistics) for key, run in runs.items()}
    _check_images(runs, results)
    baselines = {(run.dataset, run.backbone, run.seed): key for key, run in runs.items() if run.variant == BASELINE}
    cells: dict[tuple[str, str, str], list[tuple[str, str, Comparison]]] = {}
    for key, run in runs.items():
        baseline = baselines.get((run.dataset, run.backbone, run.seed))
        if run.variant == BASELINE or baseline is None:
            continue
        compared = compare(runs[baseline], campaigns[baseline], run, campaigns[key], statistics)
        top2diff = paired_difference(_top2diff(results[key]), _top2diff(results[baseline]), statistics.confidence)
        results[key] = with_improvement(results[key], results[baseline], compared, top2diff)
        cells.setdefault((run.dataset, run.backbone, run.variant), []).append((baseline, key, compared))
    described = [
        describe_cell(
            [results[baseline] for baseline, _, _ in pairs],
            [results[key] for _, key, _ in pairs],
            [compared for _, _, compared in pairs],
        )
        for pairs in cells.values()
    ]
    for key, result in results.items():
        write_json(RESULTS_DIR / f"{key}.json", result.as_json())
    write_json(CELLS_FILE, [cell.as_json() for cell in described])
    write_json(
        SUMMARY_FILE,
        {
            dataset: {
                backbone: {variant: line.as_json() for variant, line in variants.items()}
                for backbone, variants in backbones.items()
            }
            for dataset, backbones in summarise_grid(list(results.values()), described).items()
        },
    )


def _top2diff(result: RunResult) -> np.ndarray:
    """A run's Top2Diff, float [images]. Runs on one data set have the same images, in their order."""
    table = RECORDS_DIR / result.run / "predictions.parquet"
    return read_columns(table, "evaluate", ["top2diff"], result.top1.n)["top2diff"].to_numpy(float)


def _check_images(runs: Mapping[str, Run], results: Mapping[str, RunResult]) -> None:
    """Runs on one data set were tested on the same images. Raises InvalidArtifact."""
    first: dict[str, str] = {}
    for key, run in runs.items():
        other = first.setdefault(run.dataset, key)
        if results[key].images != results[other].images:
            with reading(RECORDS_DIR / key / "predictions.parquet", "evaluate"):
                raise InvalidArtifact(f"has other labels than run {other!r} on the same data set")
