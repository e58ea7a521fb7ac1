"""Profile the value range of every layer and activation of one classifier over its training set."""

from stages.loading import load_run
from textguard.artifacts import write_csv
from textguard.faults import profile_activations, profile_ranges
from textguard.params import Params
from textguard.vision.transforms import image_loader

BATCH_SIZE = 256


def main(params: Params, key: str) -> None:
    run = load_run(params, key, "train")
    loader = image_loader(run.view, BATCH_SIZE)
    ranges, bounds = profile_ranges(run.model, loader, params.inject.kinds), profile_activations(run.model, loader)
    write_csv(run.folder / "ranges.csv", ranges.assign(images=len(run.split)))
    write_csv(run.folder / "activations.csv", bounds)
