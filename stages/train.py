"""Train one classifier of the grid, or take its weights from elsewhere."""

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pandas as pd
from torch import Tensor, nn

from stages.rehearsal import rehearse
from textguard.artifacts import fingerprint, read_json, reading, sha256_of_file, work_dir, write_csv
from textguard.errors import InvalidArtifact
from textguard.params import Params, RunParams
from textguard.runtime import announce, make_deterministic, pick_device
from textguard.text.embeddings import load_class_embeddings, load_text_features
from textguard.vision.checkpoints import load_checkpoint
from textguard.vision.classifiers import ClassifierSpec, build_classifier, save_classifier
from textguard.vision.datasets import data_root, load_split, split_file
from textguard.vision.training import Epoch, train
from textguard.vision.transforms import training_view

if TYPE_CHECKING:
    from dvclive import Live

HEAD_MAKERS = {"baseline": "data", "random": "encoder"}


def main(params: Params, key: str) -> None:
    run = params.runs[key]
    recipe, head_file, checkpoint = params.recipes[run.recipe], Path(run.head_from), run.checkpoint
    folder, dataset = Path("data") / run.dataset, params.datasets[run.dataset]
    split = load_split(folder, "train", data_root(dataset.source, dataset.folder, Path(params.root)))
    prepared = recipe.image_size, recipe.resize_size, recipe.interpolation
    width, class_embeddings = (0, None) if checkpoint else load_head(run, head_file, split.classes)
    spec = ClassifierSpec(run.dataset, run.backbone, run.variant, *prepared, width, tuple(split.classes))
    mark = fingerprint(
        run=run,
        recipe=recipe,
        data=sha256_of_file(split_file(folder, "train"), "data"),
        head=sha256_of_file(head_file, "" if run.told_by_file else HEAD_MAKERS.get(run.variant, "embeddings")),
    )
    first = os.environ.get("RANK", "0") == "0"
    if checkpoint:
        if first:
            save(key, *load_checkpoint(checkpoint, spec), mark, [])
        return

    device = pick_device()
    make_deterministic(run.seed)
    model = build_classifier(spec, class_embeddings, recipe.drop_path).to(device)
    view, label = training_view(split, recipe, run.seed), f"train {key}"
    with work_dir("train", key, mark) as work:
        if first and not any(work.glob("checkpoint-*")):
            rehearse(model, view, recipe, params.inject)
        with LiveCurve(key, shown=first) as curve:
            history = train(model, view, len(split.classes), recipe, seed=run.seed, work=work, label=label, report=curve.add)
        if first:
            save(key, model, spec, mark, history)


def save(key: str, model: nn.Module, spec: ClassifierSpec, mark: str, history: list[Epoch]) -> None:
    """Write models/KEY.safetensors and the curve of the training, which is empty where there was none."""
    save_classifier(Path("models") / f"{key}.safetensors", model, spec, {"inputs": mark})
    columns = [column.name for column in fields(Epoch)]
    curve = pd.DataFrame([asdict(epoch) for epoch in history], columns=columns)
    write_csv(Path("metrics") / "runs" / key / "training.csv", curve)


class LiveCurve:
    """Shows each epoch as it ends, in metrics/live/KEY, as DVCLive does: DVC's extension for VS Code draws it.

    It is given all epochs of a training, those before an interruption included, and begins anew with the first: so no point is
    missing or there twice. Where DVCLive cannot work, as in a git repository without a commit, the training does without.
    """

    def __init__(self, key: str, *, shown: bool) -> None:
        self.key, self.shown = key, shown
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.end()

    def add(self, epoch: Epoch) -> None:
        """Show the next epoch."""
        if self.shown and epoch.epoch == 1:
            self._live = self._start()
        if self._live:
            for name in ("loss", "accuracy", "learning_rate"):
                self._live.log_metric(name, getattr(epoch, name))
            self._live.next_step()

    def _start(self) -> "Live | None":
        from dvclive import Live  # only where it is used: importing it takes most of a second

        try:
            return Live(str(Path("metrics") / "live" / self.key), save_dvc_exp=False, dvcyaml=None)
        except Exception as error:  # of git, of DVC or of the disk: no reason to stop a training
            announce(f"train {self.key}: no live curve ({error})")
            return None


def load_head(run: RunParams, path: Path, classes: list[str]) -> tuple[int, Tensor | None]:
    """Width E and first weights [C, E] of the text-guided head: (0, None) for a baseline, (E, None) for a random head."""
    if run.variant == "baseline":
        return 0, None
    if run.variant == "random":
        stated = read_json(path, "encoder")
        with reading(path, "encoder"):
            if int(stated["width"]) < 1:
                raise InvalidArtifact("states a width below 1")
            return int(stated["width"]), None
    if run.told_by_file:
        matrix_ce = load_text_features(path, classes)
    else:
        matrix_ce = load_class_embeddings(path, run.dataset, classes).matrix
    return matrix_ce.shape[1], matrix_ce
