"""Where the stages leave what is analysed and shown, and readers of it. Each raises InvalidArtifact."""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from textguard.artifacts import read_csv, read_ranges, reading
from textguard.errors import InvalidArtifact
from textguard.params import Params, Run
from textguard.schema.base import read
from textguard.schema.closeup import Cam, CloseUp
from textguard.schema.corruptions import CLEAN, ComparedCorruptions, Corruptions
from textguard.schema.effects import Effects
from textguard.schema.hardware import Hardware, HardwareCell
from textguard.schema.records import read_columns
from textguard.schema.results import BASELINE, Cell, RunResult
from textguard.schema.texts import TextQuality

METRICS_DIR = Path("metrics")
RUNS_DIR = METRICS_DIR / "runs"
RECORDS_DIR = METRICS_DIR / "records"
CLOSEUP_DIR = METRICS_DIR / "closeup"
LOOKS_DIR = METRICS_DIR / "looks"  # what git does not keep, apart from what it keeps
TEXTS_DIR = METRICS_DIR / "texts"
RESULTS_DIR = METRICS_DIR / "results"
CELLS_FILE = METRICS_DIR / "cells.json"
HARDWARE_DIR = METRICS_DIR / "hardware"
HARDWARE_FILE = METRICS_DIR / "hardware.json"
CORRUPTIONS_DIR = METRICS_DIR / "corruptions"
CORRUPTIONS_FILE = METRICS_DIR / "corruptions.json"
CONTRASTS_FILE = METRICS_DIR / "contrasts.json"
SUMMARY_FILE = METRICS_DIR / "summary.json"
EFFECTS_FILE = METRICS_DIR / "effects.json"


def load_result(key: str) -> RunResult:
    """One run's estimates."""
    file = RESULTS_DIR / f"{key}.json"
    result = read(file, "results", RunResult)
    with reading(file, "results"):
        if result.run != key:
            raise InvalidArtifact(f"is of run {result.run!r}")
    return result


def load_results(keys: Iterable[str]) -> dict[str, RunResult]:
    """The estimates of these runs, by key. Where their parameters are given too, the files must be of the same runs."""
    results = {key: load_result(key) for key in keys}
    for key, run in keys.items() if isinstance(keys, Mapping) else ():
        for name, value in vars(run).items():
            with reading(RESULTS_DIR / f"{key}.json", "results"):
                if getattr(results[key], name) != value:
                    raise InvalidArtifact(f"is of {name} {getattr(results[key], name)!r}; params.yaml has {value!r}")
    return results


def compared_runs(
    runs: Mapping[str, Run], treatments: Collection[str] = ()
) -> dict[tuple[str, str, str, str], list[tuple[str, str]]]:
    """(data set, backbone, variant, other variant) -> keys of the runs with one seed: each against the baseline where there is
    one, and text-guided ones against each other, which shows what a text does beyond the rest of the recipe. treatments: those
    among the variants, which are many, and compared with the baseline alone.
    """
    places: dict[tuple[str, str, int], dict[str, str]] = {}
    for key, run in runs.items():
        places.setdefault((run.dataset, run.backbone, run.seed), {})[run.variant] = key
    found: dict[tuple[str, str, str, str], list[tuple[str, str]]] = {}
    for (dataset, backbone, _), variants in places.items():
        for first, second in itertools.combinations(sorted(variants, key=lambda variant: variant != BASELINE), 2):
            if first != BASELINE and (first in treatments or second in treatments):
                continue
            found.setdefault((dataset, backbone, first, second), []).append((variants[first], variants[second]))
    return found


def load_cells(runs: Mapping[str, Run], contrasts: bool = False, treatments: Collection[str] = ()) -> list[Cell]:
    """The cells of these runs beside their baselines; contrasts: beside other text-guided ones, see `compared_runs`."""
    file, cells = CONTRASTS_FILE if contrasts else CELLS_FILE, {}
    with reading(file, "results"):
        for cell in read(file, "results", list[Cell]):
            name = (cell.dataset, cell.backbone, cell.against, cell.variant)
            if name in cells:
                raise InvalidArtifact(f"has the cell {'-'.join(name)} twice")
            cells[name] = cell
        wanted = {name: pairs for name, pairs in compared_runs(runs, treatments).items() if (name[2] != BASELINE) == contrasts}
        for name, pairs in wanted.items():
            seeds = [runs[key].seed for _, key in pairs]
            if name not in cells or cells[name].seeds != seeds:
                raise InvalidArtifact(
                    f"does not have the cell {'-'.join(name)} with the seeds {seeds} that params.yaml asks for"
                )
    return [cells[name] for name in wanted]


def load_effects(params: Params) -> list[Effects]:
    """What stage effects says of each backbone on each data set; nothing where params.yaml asks for no effects."""
    wanted = params.effects
    if not (wanted.contrasts or wanted.design):
        return []
    found = read(EFFECTS_FILE, "effects", list[Effects])
    with reading(EFFECTS_FILE, "effects"):
        if [(each.dataset, each.backbone) for each in found] != list(itertools.product(params.datasets, params.backbones)):
            raise InvalidArtifact("is not of the data sets and backbones that params.yaml asks for")
        for each in found:
            contrasts = {contrast.name: [contrast.variant, contrast.against] for contrast in each.contrasts}
            design = (each.factorial.factors, each.factorial.variants) if each.factorial else ({}, [])
            if contrasts != wanted.contrasts or design != (wanted.factors, wanted.design):
                raise InvalidArtifact("does not have the contrasts and the design that params.yaml asks for")
    return found


def load_hardware(key: str) -> Hardware:
    """What stage hardware says of one run."""
    return read(HARDWARE_DIR / f"{key}.json", "hardware", Hardware)


def load_hardware_cells(runs: Mapping[str, Run]) -> list[HardwareCell]:
    """How these runs compare under the faults of section hardware."""
    compared = {name: pairs for name, pairs in compared_runs(runs).items() if name[2] == BASELINE}
    wanted = {(*name[:2], name[3]): [runs[key].seed for _, key in pairs] for name, pairs in compared.items()}
    found = {(cell.dataset, cell.backbone, cell.variant): cell for cell in read(HARDWARE_FILE, "results", list[HardwareCell])}
    with reading(HARDWARE_FILE, "results"):
        for name, seeds in wanted.items():
            if name not in found or found[name].seeds != seeds:
                raise InvalidArtifact(
                    f"does not have the cell {'-'.join(name)} with the seeds {seeds} that params.yaml asks for"
                )
    return [found[name] for name in wanted]


def load_corruptions(key: str) -> Corruptions:
    """What stage corruptions says of one run."""
    file = CORRUPTIONS_DIR / f"{key}.json"
    found = read(file, "corruptions", Corruptions)
    with reading(file, "corruptions"):
        places = [(images.kind, images.severity) for images in found.conditions]
        if len(set(places)) != len(places) or not places or places[0] != (CLEAN, 0):
            raise InvalidArtifact("must have clean images first, and every kind and severity once")
    return found


def load_compared_corruptions(runs: Mapping[str, Run]) -> ComparedCorruptions:
    """How these runs, which were tested on corrupted images, compare there."""
    if not runs:  # as in most grids
        return ComparedCorruptions(cells=[], classifiers=[], together=[])
    compared = {name: pairs for name, pairs in compared_runs(runs).items() if name[2] == BASELINE}
    wanted = [(*name[:2], name[3], [runs[key].seed for _, key in pairs]) for name, pairs in compared.items()]
    found = read(CORRUPTIONS_FILE, "results", ComparedCorruptions)
    with reading(CORRUPTIONS_FILE, "results"):
        if [(cell.dataset, cell.backbone, cell.variant, cell.seeds) for cell in found.cells] != wanted:
            raise InvalidArtifact("does not have the cells, one by one, that params.yaml asks for")
        if not {both.run for both in found.classifiers} <= set(runs):
            raise InvalidArtifact("has other runs than params.yaml")
    return found


def short_names(layers: Sequence[str]) -> list[str]:
    """Layers of a classifier as results name them: those of a text-guided classifier's backbone as the backbone has them.

    Only a layer whose name there is that of the classifier's own head keeps its whole name.
    """
    return [whole if (short := whole.removeprefix("backbone.")) in layers else short for whole in layers]


def load_closeup(key: str) -> CloseUp:
    """What stage closeup says of one run."""
    return read(CLOSEUP_DIR / f"{key}.json", "closeup", CloseUp)


def load_looks(key: str) -> pd.DataFrame:
    """What stage closeup saw: one row per image and state, see stages/closeup.py. Empty where the network has no maps."""
    file, cam = LOOKS_DIR / f"{key}.parquet", load_closeup(key).cam
    states = ["golden", *(name for name in ("weights", "worst") if getattr(cam, name, None))] if isinstance(cam, Cam) else []
    images, places = (cam.images, cam.places) if isinstance(cam, Cam) else (0, 0)
    columns = ["image", "label", "class", "state", "finite", "prediction", "predicted", "confidence", "map", "picture"]
    looks = read_columns(file, "closeup", columns, images * len(states))
    with reading(file, "closeup"):
        per_image = looks.groupby("image", sort=False)["state"].agg(list).to_list()
        if per_image != [states] * images:
            raise InvalidArtifact(f"must have {images} images, each in the states {', '.join(states) or 'none'}")
        if any(
            len(values) != places or (finite and not np.isfinite(values).all())
            for finite, values in looks[["finite", "map"]].itertuples(index=False)
        ):
            raise InvalidArtifact(f"must have maps of {places} places, finite where it says so")
        if not all(picture.startswith(b"\x89PNG") for picture in looks.loc[looks["state"] == "golden", "picture"]):
            raise InvalidArtifact("must have a PNG picture in the rows of state golden")
        by_state = dict(iter(looks.groupby("state", sort=False)))
        for state in states[1:]:
            stays = by_state[state]["finite"] & by_state[state]["prediction"].eq(by_state["golden"]["prediction"].to_numpy())
            found, stated = (by_state[state]["finite"].sum(), images - stays.sum()), getattr(cam, state)
            if found != (stated.finite, round(stated.changed.value * images)):
                raise InvalidArtifact(f"has other maps of state {state} than {CLOSEUP_DIR / key}.json tells of")
    return looks


def load_text_quality(key: str) -> TextQuality:
    """What stage text_quality says of one text variant."""
    return read(TEXTS_DIR / f"{key}.json", "text_quality", TextQuality)


def load_ranges(key: str) -> pd.DataFrame:
    """One run's value ranges: layer (see `short_names`), max_abs, mean_abs, images."""
    file = RUNS_DIR / key / "ranges.csv"
    table = read_ranges(file)
    return table.assign(layer=short_names(table["layer"].to_list()))


def load_threshold_curve(key: str) -> pd.DataFrame:
    """One run's accuracy against Top2Diff threshold, both in percent."""
    path = RUNS_DIR / key / "thresholds.csv"
    curve = read_csv(path, "evaluate", [], ["threshold_percent", "accuracy_percent"])
    with reading(path, "evaluate"):
        accuracy = curve["accuracy_percent"]
        if curve.empty or not curve["threshold_percent"].is_monotonic_increasing or not accuracy.between(0, 100).all():
            raise InvalidArtifact("is no curve of accuracies, 0 to 100 percent, over ascending thresholds")
        if not accuracy.is_monotonic_decreasing:
            raise InvalidArtifact("has an accuracy that grows with the threshold")
    return curve


def load_training(key: str) -> pd.DataFrame:
    """One run's epochs: epoch, loss (nats), accuracy (0 to 1), learning_rate."""
    path = RUNS_DIR / key / "training.csv"
    curve = read_csv(path, "train", [], ["epoch", "loss", "accuracy", "learning_rate"])
    with reading(path, "train"):
        if curve["epoch"].tolist() != list(range(1, len(curve) + 1)):
            raise InvalidArtifact("does not count its epochs from 1, one after the other")
        if not (curve["accuracy"].between(0, 1) & (curve["loss"] >= 0) & (curve["learning_rate"] >= 0)).all():
            raise InvalidArtifact("has an accuracy beyond 0 to 1, or a loss or learning rate below 0")
    return curve
