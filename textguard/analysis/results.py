"""Stage `results`: estimates of every run, of every cell beside its baseline, and the grid's summary."""

from collections.abc import Collection, Mapping
from types import MappingProxyType

from textguard.analysis.campaigns import load_campaign
from textguard.analysis.comparison import Comparison, Side, compare, describe_cell, side_of, with_improvement
from textguard.analysis.corruptions import compare_corruptions
from textguard.analysis.files import (
    CELLS_FILE,
    CONTRASTS_FILE,
    CORRUPTIONS_FILE,
    HARDWARE_FILE,
    RECORDS_DIR,
    RESULTS_DIR,
    SUMMARY_FILE,
    compared_runs,
)
from textguard.analysis.hardware import compare_hardware
from textguard.analysis.runs import describe_run
from textguard.analysis.summary import summarise_grid
from textguard.artifacts import reading, write_json
from textguard.errors import InvalidArtifact
from textguard.params import InjectParams, Run, StatisticsParams, TreatmentParams
from textguard.schema.results import BASELINE, RunResult

NO_TREATMENTS: Mapping[str, TreatmentParams] = MappingProxyType({})


def write_results(
    runs: Mapping[str, Run],
    statistics: StatisticsParams,
    inject: InjectParams,
    corrupted: Collection[str] = (),
    treatments: Mapping[str, TreatmentParams] = NO_TREATMENTS,
) -> None:
    """Write metrics/results/RUN.json for every run, and metrics/cells.json, contrasts.json, hardware.json, corruptions.json and
    summary.json.

    inject: what the runs' campaigns must have been made with. corrupted: keys of the runs that were tested on corrupted images.
    treatments: those among the variants. Raises InvalidArtifact, InvalidParameter.
    """
    sides = {}
    for key, run in runs.items():
        campaign = load_campaign(key, run, statistics, inject, treatments)
        sides[key] = side_of(campaign, describe_run(key, run, campaign, statistics), statistics)
    results = {key: side.result for key, side in sides.items()}
    _check_images(runs, results)
    cells: dict[tuple[str, ...], list[tuple[Side, Side, Comparison]]] = {}
    for name, pairs in compared_runs(runs, treatments).items():
        for first, second in pairs:
            baseline, own = sides[first], sides[second]
            compared = compare(baseline, own)
            if runs[first].variant == BASELINE:
                results[second] = with_improvement(own.result, baseline.result, compared)
            cells.setdefault(name, []).append((baseline, own, compared))
    described = [
        describe_cell(
            [baseline.result for baseline, _, _ in found],
            [own.result for _, own, _ in found],
            [compared for _, _, compared in found],
        )
        for found in cells.values()
    ]
    other_faults = compare_hardware(runs, statistics.confidence)
    tested = {key: run for key, run in runs.items() if key in corrupted}
    worse_images = compare_corruptions(tested, results, statistics.confidence)
    against_baseline = [cell for cell in described if cell.against == BASELINE]
    for key, result in results.items():
        write_json(RESULTS_DIR / f"{key}.json", result.as_json())
    write_json(CELLS_FILE, [cell.as_json() for cell in against_baseline])
    write_json(CONTRASTS_FILE, [cell.as_json() for cell in described if cell.against != BASELINE])
    write_json(HARDWARE_FILE, [cell.as_json() for cell in other_faults])
    write_json(CORRUPTIONS_FILE, worse_images.as_json())
    write_json(
        SUMMARY_FILE,
        {
            dataset: {
                backbone: {variant: line.as_json() for variant, line in variants.items()}
                for backbone, variants in backbones.items()
            }
            for dataset, backbones in summarise_grid(list(results.values()), against_baseline).items()
        },
    )


def _check_images(runs: Mapping[str, Run], results: Mapping[str, RunResult]) -> None:
    """Runs on one data set were tested on the same images. Raises InvalidArtifact."""
    first: dict[str, str] = {}
    for key, run in runs.items():
        other = first.setdefault(run.dataset, key)
        if results[key].images != results[other].images:
            with reading(RECORDS_DIR / key / "predictions.parquet", "evaluate"):
                raise InvalidArtifact(f"has other labels than run {other!r} on the same data set")
