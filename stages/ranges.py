"""Profile the value range of every layer and activation of one classifier over its training set."""

from pathlib import Path

from textguard.artifacts import write_csv
from textguard.faults.campaign import loader_of, profile_activations, profile_ranges
from textguard.params import Params
from textguard.runtime import pick_device
from textguard.vision.classifiers import load_classifier
from textguard.vision.datasets import load_split

BATCH_SIZE = 256


def main(params: Params, key: str) -> None:
    model, _ = load_classifier(Path("models") / f"{key}.safetensors")
    model.to(pick_device())
    split = load_split(Path("data") / params.runs[key].dataset, "train")
    loader = loader_of(split.images, split.labels, BATCH_SIZE)
    ranges, bounds = profile_ranges(model, loader, params.inject.kinds), profile_activations(model, loader)
    write_csv(Path("metrics") / "runs" / key / "ranges.csv", ranges.assign(images=len(split.images)))
    write_csv(Path("metrics") / "runs" / key / "activations.csv", bounds)
