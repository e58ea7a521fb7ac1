"""Profile the value range of every layer and activation of one classifier over its training set."""

from pathlib import Path

from textguard.artifacts import write_csv
from textguard.faults.campaign import profile_activations, profile_ranges
from textguard.params import Params
from textguard.runtime import pick_device
from textguard.vision.classifiers import load_classifier
from textguard.vision.datasets import data_root, load_split
from textguard.vision.transforms import evaluation_view, image_loader

BATCH_SIZE = 256


def main(params: Params, key: str) -> None:
    run = params.runs[key]
    dataset = params.datasets[run.dataset]
    model, spec = load_classifier(Path("models") / f"{key}.safetensors")
    model.to(pick_device())
    split = load_split(Path("data") / run.dataset, "train", data_root(dataset.source, dataset.folder, Path(params.root)))
    loader = image_loader(evaluation_view(split, spec.image_size, spec.resize_size, spec.interpolation), BATCH_SIZE)
    ranges, bounds = profile_ranges(model, loader, params.inject.kinds), profile_activations(model, loader)
    write_csv(Path("metrics") / "runs" / key / "ranges.csv", ranges.assign(images=len(split)))
    write_csv(Path("metrics") / "runs" / key / "activations.csv", bounds)
