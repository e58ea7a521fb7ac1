"""Treatments: each field does to a head, its training and its weights what it says; what cannot be is refused in one line."""

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dvc.utils.serialize import modify_yaml
from torch import nn
from torch.nn import functional as F

from conftest import REPOSITORY
from stages import heads, recipes
from stored_grid import run_of
from textguard.analysis.campaigns import place_weights
from textguard.analysis.files import compared_runs
from textguard.artifacts import parse_json, write_json
from textguard.errors import InvalidArtifact, InvalidEmbeddings, InvalidParameter, UnknownName
from textguard.params import Params, TreatmentParams, load_params
from textguard.report.theme import styles
from textguard.text.embeddings import ClassEmbeddings, EmbeddingOptions, load_head, save_class_embeddings
from textguard.text.starts import start_rows
from textguard.vision.classifiers import (
    ClassifierSpec,
    PlainHeadClassifier,
    TextGuidedClassifier,
    load_classifier,
    save_classifier,
)
from textguard.vision.evaluation import score_scale
from textguard.vision.optimisation import make_optimizer
from textguard.vision.recipe import load_recipe
from textguard.vision.training import Trainer
from textguard.vision.treating import after_training, before_training
from textguard.vision.treatment import library_treatment

CLASSES, WIDTH = ("a", "b", "c"), 5
RECIPE = load_recipe("resnet", {"batch_size": 8, "epochs": 1, "warmup_epochs": 0, "weight_decay": 0.1, "learning_rate": 0.1})
IMAGES, LABELS = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def treatment(**fields: Any) -> TreatmentParams:
    return TreatmentParams(**library_treatment() | fields)


NORMALISED, PLAIN = {"width": WIDTH, "normalise": True}, {"width": WIDTH}
HEADS = {"none": {}, "plain": PLAIN, "normalised": NORMALISED}


def classifier(fields: dict[str, Any]) -> nn.Module:
    torch.manual_seed(1)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, fields.get("width") or 3))
    if not fields.get("width"):
        return backbone
    return (TextGuidedClassifier if fields.get("normalise") else PlainHeadClassifier)(backbone, 3, WIDTH, None)


def trained(model: nn.Module, wanted: TreatmentParams, steps: int = 1) -> Trainer:
    before_training(model, wanted)
    trainer = Trainer(model, 8, 3, RECIPE, seed=0, label="test", treatment=wanted)
    for _ in range(steps):
        trainer.step(IMAGES, LABELS)
    return trainer


@pytest.mark.parametrize("fields", [PLAIN, NORMALISED], ids=["plain", "normalised"])
def test_a_frozen_head_stays_and_has_no_state(fields):
    model = classifier(fields)
    start = model.head.weight.detach().clone()
    trainer = trained(model, treatment(**fields, frozen=True), steps=3)
    assert torch.equal(model.head.weight, start)
    assert model.head.weight not in {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not torch.equal(model.backbone[1].weight, classifier(fields).backbone[1].weight)
    free = classifier(fields)
    trained(free, treatment(**fields))
    assert not torch.equal(free.head.weight, start)


@pytest.mark.parametrize(("scale", "moves"), [("fixed", False), ("learned", True)])
def test_a_scale_starts_where_it_is_told_and_stays_there_if_fixed(scale, moves):
    model = classifier(NORMALISED)
    trained(model, treatment(**NORMALISED, scale=scale, scale_start=50.0))
    assert (model.logit_scale.item() == pytest.approx(math.log(50), abs=1e-7)) is not moves
    assert model.logit_scale.item() == pytest.approx(math.log(50), rel=0.2)


def test_the_usual_start_of_the_scale_is_that_of_clip_to_the_last_bit():
    before, model = classifier(NORMALISED), classifier(NORMALISED)
    before_training(model, treatment(**NORMALISED, scale_start=1 / 0.07, scale="fixed"))
    assert torch.equal(model.logit_scale, before.logit_scale)


@pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)
def test_the_penalty_adds_its_gradient_and_leaves_the_reported_loss(fields):
    model, other = classifier(fields), classifier(fields)
    trainer = Trainer(model, 8, 3, RECIPE, seed=0, label="test", treatment=treatment(**fields, logit_penalty=0.3))
    reported = trainer.step(IMAGES, LABELS)
    logits = other.train()(IMAGES)
    loss = F.cross_entropy(logits, LABELS)
    (loss + 0.3 * logits.square().mean(dim=1).mean()).backward()
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)
    assert reported == pytest.approx(loss.item(), rel=1e-6)


def test_the_latent_layer_has_a_weight_decay_of_its_own():
    model = classifier(PLAIN)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, RECIPE, 0.01).param_groups
    found = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
    assert {name for name, decay in found.items() if decay == 0.01} == {"backbone.3.weight"}
    assert found["head.weight"] == 0.1
    trainer = trained(model, treatment(**PLAIN, latent_weight_decay=0.02))
    assert 0.02 in {group["weight_decay"] for group in trainer.optimizer.param_groups}


@pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)
def test_a_temperature_divides_the_logits(fields):
    model = classifier(fields).eval()
    logits = model(IMAGES)
    cooled = after_training(model, treatment(**fields, temperature=4.7), IMAGES[0])
    torch.testing.assert_close(cooled(IMAGES), logits / 4.7)
    if fields == NORMALISED:
        assert score_scale(cooled) == pytest.approx(1 / 0.07 / 4.7)


def test_a_temperature_without_a_layer_for_it_is_refused():
    behind = nn.Sequential(classifier({}), nn.Softmax(dim=1))
    with pytest.raises(InvalidParameter, match=r"temperature cannot go into this network's last layer.*set it to 1"):
        after_training(behind, treatment(temperature=2.0), IMAGES[0])
    with pytest.raises(InvalidParameter, match="temperature needs a network with a fully connected layer"):
        after_training(nn.Sequential(nn.Conv2d(3, 3, 4), nn.Flatten()), treatment(temperature=2.0), IMAGES[0])


def test_a_folded_scale_leaves_the_logits_and_is_one():
    model = classifier(NORMALISED).eval()
    logits = model(IMAGES)
    folded = after_training(model, treatment(**NORMALISED, fold_scale=True, temperature=2.0), IMAGES[0])
    torch.testing.assert_close(folded(IMAGES), logits / 2)
    assert score_scale(folded) == 1


def test_starts_are_what_they_are_called():
    text = F.normalize(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), dim=1)
    unit, orthogonal, one_hot = (start_rows(kind, 6, 9, None, 0) for kind in ("unit", "orthogonal", "one_hot"))
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(6))
    assert (unit @ unit.T - torch.eye(6)).abs().max() > 0.1
    torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(6), atol=1e-6, rtol=0)
    assert not torch.equal(orthogonal, one_hot)
    assert torch.equal(one_hot, torch.eye(6, 9))
    turned = start_rows("cosines:told", 6, 9, text, 3)
    torch.testing.assert_close(turned @ turned.T, text @ text.T)
    assert (turned - text).abs().max() > 0.1
    shuffled = start_rows("shuffled:told", 6, 9, text, 3)
    order = [(text == row).all(dim=1).nonzero().item() for row in shuffled]
    assert sorted(order) == list(range(6))
    assert all(place != number for number, place in enumerate(order))
    assert torch.equal(start_rows("told", 6, 9, text, 3), text)
    for kind, rows in (("unit", None), ("orthogonal", None), ("cosines:told", text)):
        assert torch.equal(start_rows(kind, 6, 9, rows, 1), start_rows(kind, 6, 9, rows, 1))
        assert not torch.equal(start_rows(kind, 6, 9, rows, 1), start_rows(kind, 6, 9, rows, 2))


@pytest.mark.parametrize("kind", ["orthogonal", "one_hot"])
def test_as_many_directions_as_classes_need_a_width(kind):
    with pytest.raises(InvalidEmbeddings, match=f"start '{kind}' needs a width of 6 or more for 6 classes, not 5"):
        start_rows(kind, 6, 5, None, 0)


SPEC = ClassifierSpec("d", "resnet18", "treated", 32, 32, "bilinear", WIDTH, CLASSES)


def test_files_name_a_plain_head_and_older_ones_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("textguard.vision.classifiers.build_backbone", lambda name, outputs, *_: nn.Linear(4, outputs))
    plain, guided = (kind(nn.Linear(4, WIDTH), 3, WIDTH, None) for kind in (PlainHeadClassifier, TextGuidedClassifier))
    for name, model, spec in (("plain", plain, replace(SPEC, plain=True)), ("guided", guided, SPEC)):
        save_classifier(tmp_path / name, model, spec, {})
        assert (b"plain" in (tmp_path / name).read_bytes()) == spec.plain
        found, stated = load_classifier(tmp_path / name, spec, latent=True)
        assert (type(found), stated) == (type(model), spec)
        with pytest.raises(InvalidArtifact, match=r"is another classifier than the run's: plain"):
            load_classifier(tmp_path / name, replace(spec, plain=not spec.plain), latent=True)
        with pytest.raises(InvalidArtifact, match=r"states the width 5 and 3 classes for variant treated"):
            load_classifier(tmp_path / name, spec, latent=False)
    alone = replace(SPEC, width=0)
    save_classifier(tmp_path / "none", nn.Linear(4, 3), alone, {})
    assert load_classifier(tmp_path / "none", alone, latent=False)[1] == alone
    with pytest.raises(InvalidArtifact, match=r"states the width 0"):
        load_classifier(tmp_path / "none", alone)


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Params]:
    """The smoke grid in a folder of its own, the working directory, with these treatments as variants behind its own."""

    def write(**treatments: dict[str, Any]) -> Params:
        shutil.copy(REPOSITORY / "grids" / "smoke" / "params.yaml", tmp_path)
        with modify_yaml("params.yaml") as params:
            params["treatments"] = treatments
            params["variants"] += [name for name in treatments if name not in params["variants"]]
        return load_params()

    monkeypatch.chdir(tmp_path)
    return write


REFUSED = {
    "a text's name": ({"descriptions": {}}, r"treatments\.descriptions: a variant of this name is in texts already"),
    "baseline": ({"baseline": {}}, r"treatments\.baseline: a variant of this name is in every grid already"),
    "random": ({"random": {}}, r"treatments\.random: a variant of this name is in every grid already"),
    "unknown key": ({"t": {"smoothing": 0.1}}, r"unknown key 'treatments\.t\.smoothing' .*; known: fold_scale, frozen, label"),
    "unknown start": ({"t": {"start": "told", "width": 8}}, r"start 'told' .*; known: cosines:TEXT, descriptions, one_hot"),
    "unknown text": ({"t": {"start": "cosines:told", "width": 8}}, r"start 'cosines:told' in .*treatments\.t\.start"),
    "start": ({"t": {"start": "unit"}}, r"start is 'unit', which needs a latent layer, and width is 0; set width to its E"),
    "frozen": ({"t": {"frozen": True}}, "frozen is true, which needs a latent layer"),
    "normalise": ({"t": {"normalise": True}}, "normalise is true, which needs a latent layer"),
    "decay": ({"t": {"latent_weight_decay": 0.1}}, "latent_weight_decay is 0.1, which needs a latent layer"),
    "scale": ({"t": {"width": 8, "scale": "fixed"}}, "scale is 'fixed', and without normalise there is no scale"),
    "scale's start": ({"t": {"scale_start": 50.0}}, "scale_start is 50.0, and without normalise there is no scale"),
    "fold": ({"t": {"width": 8, "fold_scale": True}}, "fold_scale is true, and without normalise there is no scale"),
    "recipe's value": ({"t": {"recipe": {"label_smoothing": 2}}}, r"treatments\.t\.recipe\.label_smoothing is 2"),
    "recipe's key": ({"t": {"recipe": {"smoothing": 0.1}}}, r"unknown key 'treatments\.t\.recipe\.smoothing'"),
    "network": ({"t": {"recipe": {"network": "resnet34"}}}, r"treatments\.t\.recipe\.network cannot differ between variants"),
    "label": ({"t": {"label": "random"}}, "two variants are called 'random'; change the label of one"),
    "temperature": ({"t": {"temperature": 0}}, r"treatments\.t\.temperature is 0"),
}


@pytest.mark.parametrize(("treatments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_in_one_line(grid, treatments, message):
    with pytest.raises((InvalidParameter, UnknownName), match=message) as raised:
        grid(**treatments)
    assert "\n" not in str(raised.value)


TREATED = {
    "smoothed": {"label": "label smoothing", "recipe": {"label_smoothing": 0.1}},
    "bottleneck": {"width": 64},
    "wide": {"width": None, "normalise": True},
    "one_hot": {"width": 12, "start": "one_hot"},
    "turned": {"width": None, "start": "cosines:descriptions", "normalise": True},
    "shuffled": {"width": 16, "start": "shuffled:descriptions", "start_seed": 4},
    "told": {"width": None, "start": "descriptions", "frozen": True, "normalise": True},
}


def test_stage_heads_and_recipes_write_what_every_variant_starts_from(grid, monkeypatch):
    params, classes = grid(**TREATED), [str(number) for number in range(10)]
    monkeypatch.setattr(heads, "encoder_width", lambda encoder: 384)
    matrix = F.normalize(torch.randn(10, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    options = EmbeddingOptions(unit_before=True, unit_after=True, vectors="encoder", seed=0, template_weight=0.0)
    text = Path("embeddings/digits/descriptions.safetensors")
    save_class_embeddings(text, ClassEmbeddings(matrix, "digits", tuple(classes), "e", "0" * 64, 16, 10, 0, options))
    write_json(Path("data/digits/classes.json"), classes)
    heads.main(params, "digits")
    recipes.main(params)
    folder = Path("models/heads/digits")
    assert {path.stem for path in folder.iterdir()} == set(params.variants)
    assert (folder / "descriptions.safetensors").read_bytes() == text.read_bytes()
    starts = {
        name: load_head(
            folder / f"{name}.safetensors",
            "digits",
            classes,
            "torch" if (wanted := params.treatment(name)).start == "torch" else "rows",
            latent=wanted.latent,
        )
        for name in ("baseline", *TREATED)
    }
    assert [width for width, _ in starts.values()] == [0, 0, 64, 384, 12, 16, 16, 16]
    assert {name for name, (_, rows) in starts.items() if rows is None} == {"baseline", "smoothed", "bottleneck", "wide"}
    assert torch.equal(starts["told"][1], matrix)
    torch.testing.assert_close(starts["turned"][1] @ starts["turned"][1].T, matrix @ matrix.T)
    assert torch.equal(starts["shuffled"][1], start_rows("shuffled:descriptions", 10, 16, matrix, 4))

    told = {path.stem: parse_json(path.read_text(encoding="utf-8")) for path in Path("models/recipes").iterdir()}
    assert told["resnet18-baseline"] == told["resnet18-descriptions"] == parse_json(recipe_text(params))
    usual, smoothed = told["resnet18-baseline"], told["resnet18-smoothed"]
    assert smoothed["treatment"] == params.treatments["smoothed"].in_training
    assert {name for name in usual if smoothed[name] != usual[name]} == {"label_smoothing"}
    assert "label" not in smoothed["treatment"]


def recipe_text(params: Params) -> str:
    write_json(Path("usual.json"), asdict(params.backbones["resnet18"]))
    return Path("usual.json").read_text(encoding="utf-8")


def test_a_start_that_has_no_place_is_named_before_anything_is_written(grid, monkeypatch):
    params = grid(tight={"width": 4, "start": "orthogonal"})
    params = replace(params, variants=["baseline", "tight"])
    write_json(Path("data/digits/classes.json"), [str(number) for number in range(10)])
    with pytest.raises(InvalidEmbeddings, match=r"params\.yaml treatments\.tight: start 'orthogonal' needs a width of 10"):
        heads.main(params, "digits")
    assert not Path("models").exists()


def test_variants_of_all_kinds_have_a_treatment_and_a_recipe(grid):
    params = grid(**TREATED)
    assert params.treatment("baseline").differing == {}
    assert params.treatment("descriptions").differing == {"start": "descriptions", "width": None, "normalise": True}
    assert params.treatment("told").text == params.treatment("turned").text == "descriptions"
    runs = {run.variant: run for run in params.runs.values()}
    assert params.recipe(runs["smoothed"]).label_smoothing == 0.1
    assert params.recipe(runs["bottleneck"]) == params.recipe(runs["baseline"]) == params.backbones["resnet18"]
    assert params.labels["smoothed"] == "label smoothing"
    assert params.labels["told"] == "told"


def test_treatments_are_compared_with_the_baseline_alone():
    runs = {name: run_of("d", "resnet18", name) for name in ("baseline", "random", "template", "one", "two")}
    pairs = {(against, variant) for _, _, against, variant in compared_runs(runs, ("one", "two"))}
    assert pairs == {*(("baseline", name) for name in ("random", "template", "one", "two")), ("random", "template")}


def test_thirty_variants_have_a_style():
    found = styles([f"v{number}" for number in range(30)], {}, {"v3": "third"})
    assert len(found) == 30
    assert found["v3"].name == "third"


def test_the_last_layer_is_the_head_and_its_latent_layer_where_there_is_one():
    class Layer:
        def __init__(self, neurons: int) -> None:
            self.neurons = neurons

    layers = [Layer(100), Layer(64), Layer(10)]
    assert place_weights(layers, "neurons", latent=False)["last_layer"] == [0, 0, 10]
    assert place_weights(layers, "neurons", latent=True)["last_layer"] == [0, 64, 10]
    assert place_weights(layers, "neurons", latent=False)["others"] == [1, 1, 0]
    assert place_weights(layers, "neurons", latent=True)["others"] == [1, 0, 0]
