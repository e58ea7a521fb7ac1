"""Train one classifier of the grid."""

from dataclasses import asdict, fields
from pathlib import Path

import pandas as pd
from torch import Tensor

from textguard.artifacts import fingerprint, read_json, reading, sha256_of_file, work_dir, write_csv
from textguard.errors import InvalidArtifact
from textguard.params import Params, RunParams
from textguard.runtime import make_deterministic, pick_device
from textguard.text.embeddings import load_class_embeddings
from textguard.vision.checkpoints import read_checkpoint, read_text_features
from textguard.vision.classifiers import ClassifierSpec, build_classifier, fill, save_classifier
from textguard.vision.datasets import data_root, load_split, split_file
from textguard.vision.training import Epoch, train
from textguard.vision.transforms import evaluation_view, image_loader

HEAD_MAKERS = {"baseline": "data", "random": "encoder"}


def main(params: Params, key: str) -> None:
    run = params.runs[key]
    recipe = params.recipes[run.recipe]
    folder = Path("data") / run.dataset
    dataset = params.datasets[run.dataset]
    split = load_split(folder, "train", data_root(dataset.source, dataset.folder, Path(params.root)))
    state = read_checkpoint(run.checkpoint, run.backbone) if run.checkpoint else {}
    width, class_embeddings = head_of(state, run) if state else load_head(run, split.classes)
    prepared = recipe.image_size, recipe.resize_size, recipe.interpolation
    spec = ClassifierSpec(run.dataset, run.backbone, run.variant, *prepared, width, tuple(split.classes))
    model_file, curve_file = Path("models") / f"{key}.safetensors", Path("metrics") / "runs" / key / "training.csv"
    if state:
        model = build_classifier(spec)
        try:
            fill(model, state)
        except InvalidArtifact as error:
            raise InvalidArtifact(f"{run.checkpoint} {error}; name another in params.yaml runs.{key}.checkpoint") from error
        save_classifier(model_file, model, spec, {"checkpoint": str(run.checkpoint)})
        write_csv(curve_file, pd.DataFrame(columns=[field.name for field in fields(Epoch)]))
        return

    view = evaluation_view(split, *prepared)
    images, labels = next(iter(image_loader(view, len(view))))
    device = pick_device()
    make_deterministic(run.seed)
    model = build_classifier(spec, class_embeddings).to(device)
    mark = fingerprint(
        run=run,
        recipe=recipe,
        data=sha256_of_file(split_file(folder, "train"), "data"),
        head=sha256_of_file(Path(run.head_from), HEAD_MAKERS.get(run.variant, "embeddings")),
    )
    with work_dir("train", key, mark) as work:
        history = train(
            model,
            images.to(device),
            labels.to(device),
            recipe,
            seed=run.seed,
            checkpoint=work / "checkpoint.safetensors",
            label=f"train {key}",
        )
        save_classifier(model_file, model, spec, {"inputs": mark})
        write_csv(curve_file, pd.DataFrame(asdict(epoch) for epoch in history))


def head_of(state: dict[str, Tensor], run: RunParams) -> tuple[int, None]:
    """Width E of the head among stored weights, 0 for a baseline. Raises InvalidArtifact."""
    if run.variant == "baseline":
        return 0, None
    if "head.weight" not in state or state["head.weight"].ndim != 2:
        raise InvalidArtifact(f"{run.checkpoint} holds no text-guided classifier: 'head.weight' is missing or no matrix")
    return state["head.weight"].shape[1], None


def load_head(run: RunParams, classes: list[str]) -> tuple[int, Tensor | None]:
    """Width E and first weights [C, E] of the text-guided head: (0, None) for a baseline, (E, None) for a random head."""
    path = Path(run.head_from)
    if run.variant == "baseline":
        return 0, None
    if path.suffix == ".pth":
        features = read_text_features(path, len(classes))
        return features.shape[1], features
    if run.variant == "random":
        stated = read_json(path, "encoder")
        with reading(path, "encoder"):
            if int(stated["width"]) < 1:
                raise InvalidArtifact("states a width below 1")
            return int(stated["width"]), None
    matrix_ce = load_class_embeddings(path, run.dataset, classes).matrix
    return matrix_ce.shape[1], matrix_ce
