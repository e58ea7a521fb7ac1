"""Profile the value range of every layer and activation of one classifier over its training set, and learn thresholds there."""

import pandas as pd

from stages.loading import load_run, write_thresholds
from textguard.artifacts import write_csv
from textguard.errors import UnsupportedModel
from textguard.faults import learn_thresholds, profile_activations, profile_ranges
from textguard.params import Params
from textguard.runtime import announce
from textguard.vision.folding import fold_scale
from textguard.vision.transforms import image_loader

BATCH_SIZE = 256


def main(params: Params, key: str) -> None:
    run = load_run(params, key, "train")
    model = fold_scale(run.model) if params.head.fold_scale else run.model
    loader = image_loader(run.view, BATCH_SIZE)
    ranges = profile_ranges(model, loader, params.inject.kinds)
    try:
        bounds = profile_activations(model, loader)
    except UnsupportedModel as error:  # only mitigations need them, and say so
        announce(f"ranges {key}: no activation is profiled, and no mitigation can be used: {error}")
        bounds = pd.DataFrame(columns=["activation", "low", "high"])
    thresholds = learn_thresholds(model, loader) if params.learns_thresholds else {}
    write_csv(run.folder / "ranges.csv", ranges.assign(images=len(run.split)))
    write_csv(run.folder / "activations.csv", bounds)
    write_thresholds(run.folder / "clipping.csv", thresholds)
