"""Train one classifier of the grid, or take its weights from elsewhere."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pandas as pd
from torch import Tensor, nn

from stages.rehearsal import rehearse
from textguard.artifacts import fingerprint, sha256_of_file, work_dir, write_csv
from textguard.environment import process_group
from textguard.errors import InvalidArtifact
from textguard.params import Params, Run, head_file
from textguard.runtime import announce, make_deterministic, pick_device
from textguard.text.embeddings import load_head
from textguard.vision.checkpoints import load_checkpoint
from textguard.vision.classifiers import ClassifierSpec, build_classifier, save_classifier
from textguard.vision.datasets import read_split, split_file
from textguard.vision.training import Epoch, train
from textguard.vision.transforms import training_view
from textguard.vision.treating import after_training, before_training

if TYPE_CHECKING:
    from dvclive import Live


def main(params: Params, key: str) -> None:
    run = params.runs[key]
    recipe, weights, head = params.recipe(run), params.weights.get(run.weights_key), head_file(run)
    treatment, treated = params.treatment(run.variant), run.variant in params.treatments
    folder, dataset = Path("data") / run.dataset, params.datasets[run.dataset]
    split = read_split(folder, "train", dataset, Path(params.root))
    prepared = recipe.image_size, recipe.resize_size, recipe.interpolation
    width, rows = (0, None) if weights else _load_start(params, run, split.classes)
    plain = treatment.latent and not treatment.normalise
    spec = ClassifierSpec(run.dataset, recipe.network, run.variant, *prepared, width, tuple(split.classes), plain)
    mark = fingerprint(
        run=run,
        recipe=recipe,
        weights=weights,
        data=sha256_of_file(split_file(folder, "train"), "data"),
        head=sha256_of_file(head, "heads"),
        **({"treatment": treatment.in_training} if treated else {}),
    )
    first = process_group()[0] == 0
    if weights:
        if first:
            check_sha256(weights.file, weights.sha256, f"params.yaml weights.{run.weights_key}.sha256")
            save(key, *load_checkpoint(weights.source, spec), mark, [])
        return

    device = pick_device()
    make_deterministic(run.seed)
    model = build_classifier(spec, rows, recipe.drop_path).to(device)
    before_training(model, treatment)
    view, label = training_view(split, recipe, run.seed), f"train {key}"
    with work_dir("train", key, mark) as work:
        if first and not any(work.glob("checkpoint-*")):
            rehearse(model, view, recipe, params.inject, params.closeup)
        with LiveCurve(key, shown=first) as curve:
            how = {"seed": run.seed, "work": work, "label": label, "treatment": treatment, "report": curve.add}
            history = train(model, view, len(split.classes), recipe, **how)
        if first:
            save(key, after_training(model, treatment, view[(0, 0)][0]), spec, mark, history)


def _load_start(params: Params, run: Run, classes: list[str]) -> tuple[int, Tensor | None]:
    """Width and first rows of a run's head, see `load_head`."""
    treatment, texts = params.treatment(run.variant), params.class_texts.get(f"{run.dataset}-{run.variant}")
    start = "text" if texts else "torch" if treatment.start == "torch" else "rows"
    encoder = params.encoder_of(texts.key) if texts else ""
    return load_head(head_file(run), run.dataset, classes, start, latent=treatment.latent, encoder=encoder)


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


def check_sha256(file: str | None, wanted: str | None, where: str) -> None:
    """Raises InvalidArtifact where the file's content is another than params.yaml says. None: there is no file."""
    if file and (found := sha256_of_file(Path(file), "")) != wanted:
        raise InvalidArtifact(f"{file} has the SHA-256 {found}, not {wanted}; name another file, or change {where}")
