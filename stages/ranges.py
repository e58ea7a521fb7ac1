"""Profile the value range of every layer of one classifier over its training set."""

from pathlib import Path

from textguard.artifacts import write_csv
from textguard.faults.campaign import profile_ranges
from textguard.params import Params
from textguard.runtime import pick_device
from textguard.vision.classifiers import load_classifier
from textguard.vision.datasets import load_split

BATCH_SIZE = 256


def main(params: Params, key: str) -> None:
    device = pick_device()
    model, _ = load_classifier(Path("models") / f"{key}.safetensors")
    images = load_split(Path("data") / params.runs[key].dataset, "train").images
    ranges = profile_ranges(model.to(device), images.to(device), BATCH_SIZE)
    write_csv(Path("metrics") / "runs" / key / "ranges.csv", ranges.assign(images=len(images)))
