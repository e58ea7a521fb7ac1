"""Bad input: files of other stages that are missing, damaged, or of something else."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from bad_input_grid import DIGITS, EMBEDDINGS, GUIDED_HEAD, HEAD, MODEL, QUESTIONS, RECORDS, RUN, WIDTH, Grid, embeddings, says
from smoke_grid import BASELINE, GUIDED, TEXT
from textguard.analysis.files import load_ranges, load_threshold_curve, load_training
from textguard.artifacts import read_safetensors, write_safetensors
from textguard.errors import InvalidArtifact
from textguard.text.embeddings import ClassEmbeddings, save_class_embeddings, save_width

MISSING = [
    ("prompts", TEXT, "data/digits/classes.json", "data"),
    ("responses", TEXT, QUESTIONS, "prompts"),
    ("text_quality", TEXT, "embeddings/digits/descriptions.texts.safetensors", "embeddings"),
    ("embeddings", TEXT, f"prompts/texts/{TEXT}/responses.jsonl", "responses"),
    ("train", BASELINE, "data/digits/train/images.safetensors", "data"),
    ("train", BASELINE, HEAD, "heads"),
    ("train", GUIDED, GUIDED_HEAD, "heads"),
    ("heads", "digits", EMBEDDINGS, "embeddings"),
    ("evaluate", BASELINE, MODEL, "train"),
    ("evaluate", BASELINE, "data/digits/test/images.safetensors", "data"),
    ("ranges", BASELINE, MODEL, "train"),
    ("inject", BASELINE, f"{RUN}/ranges.csv", "ranges"),
    ("inject", BASELINE, f"{RUN}/activations.csv", "ranges"),
    ("closeup", BASELINE, f"{RUN}/ranges.csv", "ranges"),
    ("closeup", BASELINE, f"{RECORDS}/injections.parquet", "inject"),
    ("hardware", BASELINE, f"{RUN}/ranges.csv", "ranges"),
    ("hardware", BASELINE, f"{RUN}/clipping.csv", "ranges"),
    ("results", None, f"metrics/hardware/{BASELINE}.json", "hardware"),
    ("results", None, f"{RUN}/evaluation.json", "evaluate"),
    ("results", None, f"{RUN}/ranges.csv", "ranges"),
    ("results", None, f"{RUN}/campaign.json", "inject"),
    ("results", None, f"{RECORDS}/injections.parquet", "inject"),
    ("results", None, f"{RECORDS}/detectors.parquet", "inject"),
    ("results", None, f"{RECORDS}/predictions.parquet", "evaluate"),
    ("tables", None, f"metrics/results/{BASELINE}.json", "results"),
    ("tables", None, "metrics/cells.json", "results"),
    ("tables", None, "metrics/hardware.json", "results"),
    ("tables", None, f"metrics/closeup/{BASELINE}.json", "closeup"),
    ("figures", None, f"metrics/looks/{BASELINE}.parquet", "closeup"),
    ("heads", "digits", "data/digits/classes.json", "data"),
    ("embeddings", TEXT, "data/digits/classes.json", "data"),
]


@pytest.mark.parametrize(("stage", "key", "name", "maker"), MISSING)
def test_a_missing_file_is_named_with_the_stage_that_makes_it(grid, stage, key, name, maker):
    (grid.folder / name).unlink()
    if not key:
        grid.change("variants", ["baseline"])  # the other never ran
    line = grid.fails(stage, *([key] if key else []))
    says(line, "InvalidArtifact", f"{name} is missing", f"stage '{maker}' writes it", "dvc repro")


def changed(**fields: Any) -> Callable[[ClassEmbeddings], ClassEmbeddings]:
    return lambda good: replace(good, **fields)


def with_row(value: float) -> Callable[[ClassEmbeddings], ClassEmbeddings]:
    def change(good: ClassEmbeddings) -> ClassEmbeddings:
        matrix = good.matrix.clone()
        matrix[3] = value
        return replace(good, matrix=matrix)

    return change


EMBEDDED = {
    "other data set": (changed(dataset="cifar10"), ["'cifar10'", "'digits'"]),
    "other order": (changed(classes=tuple(reversed(DIGITS))), ["another order", "'nine' instead of 'zero'"]),
    "fewer classes": (changed(classes=tuple(DIGITS[:9])), ["9 classes instead of 10"]),
    "NaN": (with_row(float("nan")), ["NaN"]),
    "infinity": (with_row(float("inf")), ["infinity"]),
    "zero row": (with_row(0.0), ["zero"]),
    "long rows": (lambda good: replace(good, matrix=2 * good.matrix), ["not of length 1"]),
    "other width": (changed(width=WIDTH - 1), [f"[10, {WIDTH}]", f"expected float32 [10, {WIDTH - 1}]"]),
    "fewer rows": (lambda good: replace(good, matrix=good.matrix[:9]), [f"[9, {WIDTH}]", f"expected float32 [10, {WIDTH}]"]),
    "other type": (lambda good: replace(good, matrix=good.matrix.double()), ["torch.float64", "expected float32"]),
}


@pytest.mark.parametrize(("spoil", "parts"), EMBEDDED.values(), ids=EMBEDDED)
def test_unusable_class_embeddings_are_named(grid, spoil, parts):
    for name, stage in ((EMBEDDINGS, ("heads", "digits")), (GUIDED_HEAD, ("train", GUIDED))):
        save_class_embeddings(grid.folder / name, spoil(embeddings()))
        says(grid.fails(*stage), "InvalidEmbeddings", name, "dvc repro", *parts)


def test_texts_that_belong_to_other_class_embeddings_are_refused(grid):
    name = "embeddings/digits/descriptions.texts.safetensors"
    for texts in (torch.arange(19), torch.arange(20) + 1):
        write_safetensors(grid.folder / name, {"vectors": torch.ones(len(texts), WIDTH), "rows": texts})
        says(grid.fails("text_quality", TEXT), "InvalidArtifact", name, "other texts", "'embeddings'")


def test_other_tensors_are_no_class_embeddings(grid):
    for name, stage, maker in ((EMBEDDINGS, ("heads", "digits"), "'embeddings'"), (GUIDED_HEAD, ("train", GUIDED), "'heads'")):
        write_safetensors(grid.folder / name, {"weights": torch.zeros(2)})
        says(grid.fails(*stage), "InvalidEmbeddings", name, "no class embeddings", maker)


STATED = {
    "no JSON": ('{"width": 3', "cannot be read"),
    "a list": ("[]", "cannot be read"),
    "no keys": ("{}", "cannot be read"),
    "no number": (json.dumps({"dataset": "digits", "classes": DIGITS, "width": "wide"}), "states the width wide"),
}


@pytest.mark.parametrize(("stated", "problem"), STATED.values(), ids=STATED)
@pytest.mark.parametrize("variant", ["baseline", "random"])
def test_a_head_without_a_width_is_refused(grid, variant, stated, problem):
    grid.change("variants", [variant])
    name = f"models/heads/digits/{variant}.safetensors"
    write_safetensors(grid.folder / name, {}, {"head": stated})
    line = grid.fails("train", f"digits-resnet18-{variant}-0")
    says(line, "InvalidArtifact", name, problem, "delete it and run 'dvc repro': stage 'heads' writes it")


def test_a_truncated_head_is_named(grid):
    grid.cut(HEAD)
    says(grid.fails("train", BASELINE), "InvalidArtifact", HEAD, "cannot be read", "'heads'")


@pytest.mark.parametrize(("dataset", "classes"), [("cifar10", DIGITS), ("digits", DIGITS[:9]), ("digits", DIGITS[::-1])])
def test_a_head_for_other_classes_is_refused(grid, dataset, classes):
    save_width(grid.folder / HEAD, dataset, classes, 0)
    line = grid.fails("train", BASELINE)
    says(line, "InvalidArtifact", HEAD, f"was made for other classes, of data set '{dataset}'; delete it and run 'dvc repro'")


@pytest.mark.parametrize("stage", ["evaluate", "inject", "closeup"])
def test_a_truncated_classifier_is_named(grid, stage):
    grid.cut(MODEL)
    says(grid.fails(stage, BASELINE), "InvalidArtifact", MODEL, "cannot be read", "delete it", "'train'")


@pytest.mark.parametrize("stage", ["evaluate", "inject", "closeup"])
def test_a_classifier_of_another_shape_is_named_with_both_shapes(grid, stage):
    tensors, metadata = read_safetensors(grid.folder / MODEL, "train")
    write_safetensors(grid.folder / MODEL, {**tensors, "fc.weight": torch.zeros(10, 7)}, metadata)
    line = grid.fails(stage, BASELINE)
    says(line, "InvalidArtifact", MODEL, "resnet18", "fc.weight is [10, 7] instead of [10, 512]", "dvc repro")


def test_other_tensors_are_no_classifier(grid):
    write_safetensors(grid.folder / MODEL, {"weights": torch.zeros(2)})
    says(grid.fails("evaluate", BASELINE), "InvalidArtifact", MODEL, "does not say which classifier", "'train'")


def test_another_classifier_is_not_the_runs(grid):
    """As when two model files were swapped, or the classes were renamed or sorted anew."""
    tensors, metadata = read_safetensors(grid.folder / MODEL, "train")
    spec = json.loads(metadata["spec"])
    for stage, changed_fields, parts in (
        (
            "evaluate",
            {"variant": "random", "dataset": "cifar10"},
            ["dataset cifar10 instead of digits; variant random instead"],
        ),
        ("ranges", {"classes": DIGITS[::-1]}, ["classes in another order, or others, nine instead of zero"]),
        ("inject", {"image_size": 64}, ["image_size 64 instead of 32"]),
        ("closeup", {"width": "wide"}, ["does not say which classifier it holds (width: "]),
    ):
        grid.put(MODEL, b"")
        write_safetensors(grid.folder / MODEL, tensors, {**metadata, "spec": json.dumps(spec | changed_fields)})
        says(grid.fails(stage, BASELINE), "InvalidArtifact", MODEL, "delete it and run 'dvc repro': stage 'train'", *parts)


@pytest.mark.parametrize("name", ["train", "test"])
def test_truncated_images_are_named(grid, name):
    grid.cut(f"data/digits/{name}/images.safetensors")
    line = grid.fails({"train": "ranges", "test": "evaluate"}[name], BASELINE)
    says(line, "InvalidArtifact", f"data/digits/{name}/images.safetensors", "cannot be read", "'data'")


@pytest.mark.parametrize("content", ["[]", '["zero"]', '["zero", 1]', '{"zero": 0}', '["zero", "one"'])
def test_class_names_that_are_none_are_refused(grid, content):
    grid.put("data/digits/classes.json", content)
    says(grid.fails("prompts", TEXT), "InvalidArtifact", "data/digits/classes.json", "'data'")


def without_layer(table: pd.DataFrame) -> str:
    return table[table["layer"] != "fc"].to_csv(index=False)


def without_numbers(value: str) -> Callable[[pd.DataFrame], str]:
    return lambda table: table.assign(max_abs=value).to_csv(index=False)


RANGES = {
    "no table": (lambda _: "\x00\x01", ["lacks the columns layer, kind, neurons, max_abs"]),
    "empty": (lambda _: "", ["cannot be read", "EmptyDataError"]),
    "no maximum": (lambda table: table.drop(columns="max_abs").to_csv(index=False), ["lacks the columns max_abs;"]),
    "words": (without_numbers("large"), ["ValueError"]),
    "blanks": (without_numbers(""), ["max_abs that is no finite number"]),
    "negative": (without_numbers("-1"), ["impossible numbers for layer 'conv1'", "max_abs -1"]),
    "one layer more": (
        lambda table: pd.concat([table, table.tail(1).assign(layer="foo")]).to_csv(index=False),
        ["of another classifier, or other inject.kinds: it has 'foo' (Linear, 10 neurons) where the classifier has no layer"],
    ),
    "other neurons": (
        lambda table: table.assign(neurons=table["neurons"] + 1).to_csv(index=False),
        ["of another classifier", "'conv1' (Conv2d, 16385 neurons) where the classifier has 'conv1' (Conv2d, 16384 neurons)"],
    ),
}


@pytest.mark.parametrize(("spoil", "parts"), RANGES.values(), ids=RANGES)
def test_damaged_ranges_are_named(grid, spoil, parts):
    file = f"{RUN}/ranges.csv"
    grid.put(file, spoil(pd.read_csv(grid.folder / file)))
    says(grid.fails("inject", BASELINE), "InvalidArtifact", file, "'ranges'", *parts)


def test_a_layer_without_a_range_is_named(grid):
    file = f"{RUN}/ranges.csv"
    grid.put(file, without_layer(pd.read_csv(grid.folder / file)))
    says(grid.fails("inject", BASELINE), "layer 'fc' has no profiled range", "stage 'ranges'")


def test_an_activation_without_a_range_is_named(grid):
    file = f"{RUN}/activations.csv"
    grid.put(file, pd.read_csv(grid.folder / file).query("activation != 'relu'").to_csv(index=False))
    grid.change("inject.mitigation", "ranger")
    says(grid.fails("inject", BASELINE), "activation 'relu' has no profiled range", "stage 'ranges'")


def test_bounds_that_cannot_be_are_named(grid):
    file = f"{RUN}/activations.csv"
    good = pd.read_csv(grid.folder / file)
    grid.change("inject.mitigation", "ranger")
    for bad, part in (
        (good.assign(low=good["high"] + 1), "impossible range"),
        (good.assign(high=1e300), "impossible range 0.0 to 1e+300 for activation 'relu'"),
        (pd.concat([good, good.head(1)]), "names activation 'relu' twice"),
        (good.assign(activation=""), "without its activation"),
    ):
        grid.put(file, bad.to_csv(index=False))
        says(grid.fails("inject", BASELINE), "InvalidArtifact", file, part, "'ranges'")
    grid.put(file, pd.concat([good, good.head(1).assign(activation="foo")]).to_csv(index=False))
    says(grid.fails("inject", BASELINE), "the model has no activation 'foo'", "stage 'ranges'")


CURVES = {
    "no thresholds": (load_threshold_curve, "thresholds.csv", "threshold_percent,accuracy_percent\n", "no curve"),
    "falling thresholds": (
        load_threshold_curve,
        "thresholds.csv",
        "threshold_percent,accuracy_percent\n1,5\n0,5\n",
        "no curve",
    ),
    "accuracy": (load_threshold_curve, "thresholds.csv", "threshold_percent,accuracy_percent\n0,101\n", "0 to 100 percent"),
    "growing": (load_threshold_curve, "thresholds.csv", "threshold_percent,accuracy_percent\n0,5\n1,6\n", "grows with"),
    "epochs": (load_training, "training.csv", "epoch,loss,accuracy,learning_rate\n2,1,0.5,0.1\n", "count its epochs from 1"),
    "hits": (load_training, "training.csv", "epoch,loss,accuracy,learning_rate\n1,1,1.5,0.1\n", "accuracy beyond 0 to 1"),
    "loss": (load_training, "training.csv", "epoch,loss,accuracy,learning_rate\n1,-1,0.5,0.1\n", "loss or learning rate below"),
    "zeros": (
        load_ranges,
        "ranges.csv",
        "fc,Linear,10,0,0.5,9",
        "for layer 'fc': neurons 10, max_abs 0, mean_abs 0.5, images 9",
    ),
    "beyond fp32": (load_ranges, "ranges.csv", "fc,Linear,10,1e300,0.5,9", "max_abs 1e"),
    "no neurons": (load_ranges, "ranges.csv", "fc,Linear,0,1,0.5,9", "neurons 0"),
    "half a neuron": (load_ranges, "ranges.csv", "fc,Linear,10.5,1,0.5,9", "neurons 10.5"),
    "other images": (load_ranges, "ranges.csv", "a,Linear,1,1,0.5,9\nfc,Linear,10,1,0.5,8", "for layer 'fc': .* images 8"),
    "no images": (load_ranges, "ranges.csv", "fc,Linear,10,1,0.5,0", "images 0"),
    "no name": (load_ranges, "ranges.csv", ",Linear,10,1,0.5,1\nfc,Linear,10,1,0.5,1", "without its layer"),
    "no layer": (load_ranges, "ranges.csv", "", "names no layer"),
    "twice": (load_ranges, "ranges.csv", "fc,Linear,10,1,0.5,1\nfc,Linear,10,1,0.5,1", "names layer 'fc' twice"),
}


@pytest.mark.parametrize(("read", "name", "content", "message"), CURVES.values(), ids=CURVES)
def test_tables_that_cannot_be_are_named(tmp_path, monkeypatch, read, name, content, message):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "metrics" / "runs" / "r" / name
    file.parent.mkdir(parents=True)
    header = "layer,kind,neurons,max_abs,mean_abs,images\n" if read is load_ranges else ""
    file.write_text(header + content, encoding="utf-8")
    with pytest.raises(InvalidArtifact, match=rf"metrics/runs/r/{name} .*{message}.*; delete it and run 'dvc repro': stage"):
        read("r")


def test_a_layer_without_any_output_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "metrics" / "runs" / "r" / "ranges.csv"
    file.parent.mkdir(parents=True)
    file.write_text("layer,kind,neurons,max_abs,mean_abs,images\nfc,Linear,10,0.0,0.0,9\n", encoding="utf-8")
    assert load_ranges("r")["max_abs"].tolist() == [0]


RESULTS = {
    "truncated": ("campaign.json", '{"layers": [', "inject"),
    "other keys": ("campaign.json", "{}", "inject"),
    "no object": ("campaign.json", "[1]", "inject"),
    "no layers": ("campaign.json", '{"layers": [], "detectors": [], "exact": {}, "strata": 0, "bits": 32}', "inject"),
    "evaluation": ("evaluation.json", '{"top1": 0.5}', "evaluate"),
    "no range of the last layer": ("ranges.csv", "layer,max_abs,mean_abs,images\nconv1,1,1,1\n", "ranges"),
}


@pytest.mark.parametrize(("name", "content", "maker"), RESULTS.values(), ids=RESULTS)
def test_damaged_results_are_named(grid, name, content, maker):
    grid.change("variants", ["baseline"])  # the other never ran
    grid.put(f"{RUN}/{name}", content)
    says(grid.fails("results"), "InvalidArtifact", f"{RUN}/{name}", f"'{maker}'", "delete it")


@pytest.fixture
def interrupted(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Path]]:
    """Stops a stage of the baseline before the named function of its module; returns the folder with its partial results."""

    def interrupt(stage: str, function: str) -> Path:
        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(f"stages.{stage}.{function}", stop)
            code, lines = grid.run(stage, BASELINE)
        assert code == 130, lines
        (work,) = (path for path in (grid.folder / ".work" / stage / BASELINE).iterdir() if path.is_dir())
        return work

    return interrupt


def test_damaged_shards_of_an_interrupted_campaign_are_run_again(grid, interrupted):
    work = interrupted("inject", "write_parquet")
    first, second, *_ = sorted((work / "round-0").glob("shard-*.parquet"))
    first.write_bytes(first.read_bytes()[:100])
    pd.DataFrame({"layer": ["fc"]}).to_parquet(second)
    records = grid.folder / RECORDS / "injections.parquet"
    undamaged = pd.read_parquet(records)
    records.unlink()
    code, lines = grid.run("inject", BASELINE)
    assert code == 0, lines
    pd.testing.assert_frame_equal(pd.read_parquet(records), undamaged)
    assert not work.exists()


def test_a_damaged_checkpoint_of_an_interrupted_training_is_named_and_left(grid, interrupted):
    checkpoint = max(interrupted("train", "save_classifier").glob("checkpoint-*"))
    grid.cut(str(checkpoint.relative_to(grid.folder)))
    code, lines = grid.run("train", BASELINE)
    assert code == 0
    assert any(checkpoint.name in line and "cannot be read" in line and "the checkpoint before" in line for line in lines)
