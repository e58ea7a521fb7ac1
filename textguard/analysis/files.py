"""Where the stages leave what is analysed and shown, and readers of it. Each raises InvalidArtifact."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from textguard.artifacts import read_csv, read_parquet
from textguard.params import Run
from textguard.schema.base import read
from textguard.schema.closeup import CloseUp
from textguard.schema.results import Cell, RunResult
from textguard.schema.texts import TextQuality

METRICS_DIR = Path("metrics")
RUNS_DIR = METRICS_DIR / "runs"
RECORDS_DIR = METRICS_DIR / "records"
CLOSEUP_DIR = METRICS_DIR / "closeup"
TEXTS_DIR = METRICS_DIR / "texts"
RESULTS_DIR = METRICS_DIR / "results"
CELLS_FILE = METRICS_DIR / "cells.json"
SUMMARY_FILE = METRICS_DIR / "summary.json"


def load_result(key: str) -> RunResult:
    """One run's estimates."""
    return read(RESULTS_DIR / f"{key}.json", "results", RunResult)


def load_results(keys: Iterable[str]) -> dict[str, RunResult]:
    """The estimates of these runs, by key."""
    return {key: load_result(key) for key in keys}


def load_cells(runs: Mapping[str, Run]) -> list[Cell]:
    """The cells of these runs beside their baselines."""
    wanted = {(run.dataset, run.backbone, run.variant) for run in runs.values()}
    cells = read(CELLS_FILE, "results", list[Cell])
    return [cell for cell in cells if (cell.dataset, cell.backbone, cell.variant) in wanted]


def load_closeup(key: str) -> CloseUp:
    """What stage closeup says of one run."""
    return read(CLOSEUP_DIR / f"{key}.json", "closeup", CloseUp)


def load_looks(key: str) -> pd.DataFrame:
    """What stage closeup saw: one row per image and state, see stages/closeup.py."""
    columns = ["image", "label", "class", "state", "finite", "prediction", "predicted", "confidence", "map", "picture"]
    return read_parquet(CLOSEUP_DIR / f"{key}.parquet", "closeup", columns)


def load_text_quality(key: str) -> TextQuality:
    """What stage text_quality says of one text variant."""
    return read(TEXTS_DIR / f"{key}.json", "text_quality", TextQuality)


def load_ranges(key: str) -> pd.DataFrame:
    """One run's value ranges: layer (without the prefix `backbone.`), max_abs, mean_abs, images."""
    table = read_csv(RUNS_DIR / key / "ranges.csv", "ranges", ["layer"], ["max_abs", "mean_abs", "images"])
    return table.assign(layer=table["layer"].str.removeprefix("backbone."))


def load_threshold_curve(key: str) -> pd.DataFrame:
    """One run's accuracy against Top2Diff threshold, both in percent."""
    return read_csv(RUNS_DIR / key / "thresholds.csv", "evaluate", [], ["threshold_percent", "accuracy_percent"])


def load_training(key: str) -> pd.DataFrame:
    """One run's epochs: epoch, loss (nats), accuracy (0 to 1), learning_rate."""
    return read_csv(RUNS_DIR / key / "training.csv", "train", [], ["epoch", "loss", "accuracy", "learning_rate"])
