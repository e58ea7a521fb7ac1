"""What the stages of one classifier read: its weights, a split of its data set, its profiled ranges."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from textguard.artifacts import FP32_MAX, check_names, read_csv, read_ranges, reading, sha256_of_file, write_csv
from textguard.errors import InvalidArtifact, printable
from textguard.params import Params
from textguard.runtime import pick_device
from textguard.vision.classifiers import ClassifierSpec, load_classifier
from textguard.vision.datasets import Split, read_split, split_file
from textguard.vision.transforms import EvaluationView, evaluation_view


@dataclass(frozen=True)
class LoadedRun:
    """A classifier of the grid in evaluation mode on `device`, and the view of a split. Profiles are read when they are used.

    files: what can be read for the run, by name; see `checksums`. folder, records: where its results and its records lie.
    """

    key: str
    device: torch.device
    model: nn.Module
    spec: ClassifierSpec
    split: Split
    view: EvaluationView
    files: dict[str, Path]
    folder: Path
    records: Path

    @property
    def image(self) -> Tensor:
        """The first image [3, S, S], on the device."""
        return self.view[0][0].to(self.device)

    @cached_property
    def ranges(self) -> pd.DataFrame:
        """The layers' profiled ranges, see `read_ranges`. Raises InvalidArtifact."""
        return read_ranges(self.files["ranges"])

    @cached_property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """Activation -> its lowest and highest profiled value. Raises InvalidArtifact."""
        path = self.files["bounds"]
        table = read_csv(path, "ranges", ["activation"], ["low", "high"])
        with reading(path, "ranges"):
            if not table.empty:  # as for a model that cannot be traced
                check_names(table["activation"], "activation")
            bad = table[(table["low"] > table["high"]) | (table[["low", "high"]].abs() > FP32_MAX).any(axis=1)]
            if not bad.empty:
                name, low, high = bad[["activation", "low", "high"]].iloc[0]
                raise InvalidArtifact(f"has the impossible range {low} to {high} for activation {name!r}")
        return {name: (low, high) for name, low, high in table[["activation", "low", "high"]].itertuples(index=False)}

    @cached_property
    def thresholds(self) -> dict[str, tuple[float, Tensor]]:
        """Activation -> its lowest value, and the threshold of each channel [C]. Raises InvalidArtifact."""
        path = self.files["thresholds"]
        limits = {"low": (-FP32_MAX, FP32_MAX), "high": (-FP32_MAX, FP32_MAX)}
        table = read_csv(path, "ranges", ["activation"], ["channel", "low", "high"], limits)
        found = {}
        with reading(path, "ranges"):
            for name, rows in table.groupby("activation", sort=False):
                if rows["channel"].tolist() != list(range(len(rows))) or rows["low"].nunique() != 1:
                    raise InvalidArtifact(
                        f"does not have the channels of activation {printable(repr(name), 80)} from 0 up, with one lowest value"
                    )
                high = torch.tensor(rows["high"].to_numpy(), dtype=torch.float32, device=self.device)
                found[name] = (float(rows["low"].iloc[0]), high)
        return found

    def check_layers(self, layers: Iterable[tuple[str, str, int]]) -> None:
        """Raises InvalidArtifact where the ranges are of other layers than these: (name, kind, neurons), in order."""
        path, columns = self.files["ranges"], ["layer", "kind", "neurons"]
        with reading(path, "ranges"):
            for one, other in itertools.zip_longest(self.ranges[columns].itertuples(index=False, name=None), layers):
                if one != other:
                    raise InvalidArtifact(
                        f"is of another classifier, or other inject.kinds: it has {_layer(one)} where the classifier has "
                        f"{_layer(other)}"
                    )

    def checksums(self, names: Iterable[str]) -> dict[str, str]:
        """Name -> SHA-256 of some of `files`: model, data (the split), ranges, bounds, thresholds. Raises InvalidArtifact."""
        makers = {"model": "train", "data": "data", **dict.fromkeys(("ranges", "bounds", "thresholds"), "ranges")}
        return {name: sha256_of_file(self.files[name], makers[name]) for name in names}


def _layer(layer: tuple[str, str, int] | None) -> str:
    return "no layer" if layer is None else printable("{!r} ({}, {} neurons)".format(*layer))


def write_thresholds(path: Path, thresholds: Mapping[str, tuple[float, Tensor]]) -> None:
    """Write what `learn_thresholds` returned: one row per channel, and none where nothing was learned."""
    rows = [(name, place, low, most) for name, (low, high) in thresholds.items() for place, most in enumerate(high.tolist())]
    write_csv(path, pd.DataFrame(rows, columns=["activation", "channel", "low", "high"]))


def load_run(params: Params, key: str, split: str = "test") -> LoadedRun:
    """Read the classifier `key` and a split of its data set. Raises InvalidArtifact."""
    run, device = params.runs[key], pick_device()
    dataset, data, folder = params.datasets[run.dataset], Path("data") / run.dataset, Path("metrics") / "runs" / key
    model_file = Path("models") / f"{key}.safetensors"
    images = read_split(data, split, dataset, Path(params.root))
    recipe, treatment = params.recipe(run), params.treatment(run.variant)
    prepared = recipe.image_size, recipe.resize_size, recipe.interpolation
    classes, plain = tuple(images.classes), treatment.latent and not treatment.normalise
    wanted = ClassifierSpec(run.dataset, recipe.network, run.variant, *prepared, width=0, classes=classes, plain=plain)
    model, spec = load_classifier(model_file, wanted, treatment.latent)
    return LoadedRun(
        key=key,
        device=device,
        model=model.to(device),
        spec=spec,
        split=images,
        view=evaluation_view(images, spec.image_size, spec.resize_size, spec.interpolation),
        files={
            "model": model_file,
            "data": split_file(data, split),
            "ranges": folder / "ranges.csv",
            "bounds": folder / "activations.csv",
            "thresholds": folder / "clipping.csv",
        },
        folder=folder,
        records=Path("metrics") / "records" / key,
    )
