"""Read one data set, split it, store both splits and the class names."""

from dataclasses import asdict
from pathlib import Path

from textguard.params import Params
from textguard.vision.datasets import make_splits, save_splits


def main(params: Params, dataset: str) -> None:
    train, test = make_splits(**asdict(params.datasets[dataset]))
    save_splits(Path("data") / dataset, train, test)
