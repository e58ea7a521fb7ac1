"""Bad input: params.yaml and the command line."""

import datetime
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from dvc.repo import Repo
from dvc.utils.serialize import modify_yaml
from pydantic import TypeAdapter

from bad_input_grid import REMOVED, says
from conftest import REPOSITORY
from smoke_grid import BASELINE, GUIDED, TEXT
from textguard.errors import InvalidParameter
from textguard.params import Params, load_params

TEMPLATE = {"provider": "template", "questions": ["a photo of a {class}"]}

WRONG_VALUES = {
    "text for an integer": ("backbones.resnet18.epochs", "1", ['"1"', "valid integer"]),
    "fraction for an integer": ("backbones.resnet18.batch_size", 0.5, ["0.5", "valid integer"]),
    "true for an integer": ("inject.seed", True, ["true", "valid integer"]),
    "text for a number": ("backbones.resnet18.learning_rate", "fast", ['"fast"', "valid number"]),
    "number for a text": ("encoder", 7, ["7", "valid string"]),
    "nothing for a section": ("inject", None, ["null", "object"]),
    "a list for a section": ("datasets", [], ["[]", "object"]),
    "no injections": ("inject.injections_per_layer", 0, ["0", "greater than 0"]),
    "negative injections": ("inject.injections_per_layer", -1, ["-1", "greater than 0"]),
    "unknown kind of site": ("inject.kinds", ["Pools"], ['"Pools"', "'Conv2d'", "'MatMul'"]),
    "no kind of site": ("inject.kinds", [], ["at least 1"]),
    "unknown plan": ("inject.plan", "sobol", ['"sobol"', "'uniform', 'proportional', 'neyman' or 'guided'"]),
    "unknown images": ("inject.images", "best", ['"best"', "'uniform', 'importance' or 'shared'"]),
    "no pilot": ("inject.pilot", 0, ["0", "greater than 0"]),
    "certainty": ("statistics.confidence", 1.0, ["1.0", "less than or equal to 0.9999"]),
    "few resamples": ("statistics.bootstrap", 10, ["10", "greater than or equal to 200"]),
    "no failures": ("statistics.fit_per_bit", 0.0, ["0.0", "greater than 0"]),
    "less than no images": ("closeup.images", -1, ["-1", "greater than or equal to 0"]),
    "a number for true": ("head.fold_scale", 1, ["1", "valid boolean"]),
    "maps of one place": ("closeup.smallest_map", 1, ["1", "greater than or equal to 2"]),
    "unknown exposure": ("statistics.fit_exposure", "bits", ['"bits"', "'neurons' or 'multiply_adds'"]),
    "unknown mitigation": ("inject.mitigation", "tmr", ['"tmr"', "'none', 'ranger', 'clip_to_zero' or 'learned'"]),
    "unknown target": ("inject.faults.target", "input", ['"input"', "'neuron', 'weight' or 'metadata'"]),
    "unknown operation": ("inject.faults.operation", "set", ['"set"', "'flip', 'stuck_at_0' or 'stuck_at_1'"]),
    "no bits": ("inject.faults.bits", 0, ["0", "greater than 0"]),
    "share of 1": ("datasets.digits.test_share", 1.0, ["1.0", "less than 1"]),
    "share of all": ("datasets.digits.corrupt_share", 1.0, ["1.0", "less than 1"]),
    "negative limit": ("datasets.digits.limit_train", -5, ["-5", "greater than or equal to 0"]),
    "more warm-up than epochs": ("backbones.resnet18.warmup_epochs", 2, ["is 2", "below epochs, 2"]),
    "larger than resized": ("backbones.resnet18.resize_size", 31, ["is 31", "below image_size, 32"]),
    "scales the wrong way round": ("backbones.resnet18.crop_scale", [1.0, 0.5], ["[1.0, 0.5]", "minimum comes first"]),
    "no fields of a backbone": ("backbones.resnet18", None, ["null", "object"]),
    "unknown schedule": ("backbones.resnet18.schedule", "linear", ['"linear"', "'step', 'cosine' or 'exponential'"]),
    "unknown weights": ("statistics.last_layer_weights", "all", ['"all"', "'neurons', 'equal' or 'head_only'"]),
    "unknown vectors": (
        "texts.descriptions.embedding.vectors",
        "zeros",
        ['"zeros"', "'encoder', 'shuffled', 'random' or 'one"],
    ),
    "more questions than there are": ("texts.descriptions.limit_questions", 3, ["3", "there are 2 questions"]),
    "unknown flag": ("texts.descriptions.drop", ["boring"], ['"boring"', "'duplicate'", "'not_english'"]),
    "weight above 1": ("texts.descriptions.embedding.template_weight", 1.5, ["1.5", "less than or equal to 1"]),
    "no data sets": ("datasets", {}, ["{}", "at least 1"]),
    "no backbones": ("backbones", {}, ["{}", "at least 1"]),
    "no variants": ("variants", [], ["[]", "at least 1"]),
    "no seeds": ("seeds", [], ["[]", "at least 1"]),
    "a list of backbones": ("backbones", ["resnet18"], ['["resnet18"]', "object"]),
    "text for a seed": ("seeds", ["0"], ["seeds.0", '"0"', "valid integer"]),
    "number for a network": ("backbones.resnet18.network", 7, ["7", "valid string"]),
    "nothing for a recipe": ("backbones.resnet18.recipe", None, ["null", "valid string"]),
    "nothing for a provider": ("texts.descriptions.provider", None, ["null", "valid string"]),
    "nothing for an embedding": ("texts.descriptions.embedding", None, ["null", "object"]),
    "no questions": ("texts.descriptions.questions", [], ["at least 1"]),
    "colour without a number": ("figures.colours.baseline", "red", ['"red"', "#"]),
    "kind twice": ("inject.kinds", ["Conv2d", "Linear", "Conv2d"], ["'Conv2d' once"]),
    "detector twice": ("inject.compare_detectors", ["off", "off"], ["'off' once"]),
    "flag twice": ("texts.descriptions.drop", ["cut", "cut"], ["'cut' once"]),
    "question twice": ("texts.descriptions.questions", ["a {class}", "a {class}"], ["'a {class}' once"]),
    "file twice": ("texts.descriptions.cache", ["a.jsonl", "a.jsonl"], ["'a.jsonl' once"]),
    "two lines for an encoder": ("encoder", "minilm\n", ["minilm", "pattern"]),
    "two lines for a folder": ("datasets.digits.folder", "a\nb", ["pattern"]),
    "two lines for a file": ("texts.descriptions.cache", ["a\nb"], ["pattern"]),
    "no way to the code": ("root", "", ["pattern"]),
    "quotes in the way to the code": ("root", "..'; ls; '", ["pattern"]),
    "home of nobody": ("datasets.digits.folder", "~nobody-of-this-name/x", ["home directory"]),
}
# The largest values that are taken, and something above them.
LARGEST = {
    "datasets.digits.split_seed": (2**32 - 1, 2**32),
    "datasets.digits.limit_train": (10**9, 10**30),
    "datasets.digits.limit_test": (10**9, 10**30),
    "backbones.resnet18.epochs": (10**6, 10**30),
    "backbones.resnet18.batch_size": (10**6, 10**30),
    "backbones.resnet18.base_batch_size": (10**6, 10**30),
    "backbones.resnet18.learning_rate": (1e6, 1e308),
    "backbones.resnet18.min_learning_rate": (1e6, math.inf),
    "backbones.resnet18.weight_decay": (1e6, math.inf),
    "backbones.resnet18.mixup": (1e6, math.inf),
    "backbones.resnet18.cutmix": (1e6, math.inf),
    "backbones.resnet18.clip_norm": (1e6, math.inf),
    "backbones.resnet18.eps": (1.0, math.inf),
    "backbones.resnet18.repeated_augmentation": (1000, 10**12),
    "backbones.resnet18.crop_padding": (31, 10**9),
    "backbones.resnet18.step_epochs": (10**6, 10**30),
    "backbones.resnet18.ema_steps": (10**6, 10**30),
    "texts.descriptions.samples": (10_000, 10**18),
    "inject.injections_per_layer": (10**9, 2 * 10**14),
    "inject.pilot": (10**9, 10**30),
    "inject.confidence": (0.9999, 0.9999999999999999),
    "inject.enumerate_up_to": (10**12, 10**30),
    "inject.batch_size": (2**20, 10**30),
    "inject.image_batch": (2**20, 10**30),
    "inject.faults.bits": (64, 10**30),
    "inject.faults.values": (10**6, 64 * 10**9),
    "closeup.images": (10**9, 10**30),
    "closeup.weight_flips": (10**9, 10**30),
    "closeup.smallest_map": (4096, 10**30),
    "statistics.confidence": (0.9999, 0.9999999999999999),
    "statistics.bootstrap": (100_000, 10**30),
    "statistics.fit_per_bit": (1e12, math.inf),
    "figures.dpi": (600, 10**30),
    "network.timeout_s": (86_400, math.inf),
    "network.backoff_s": (3600, math.inf),
    "network.attempts": (100, 10**30),
    "network.concurrency": (256, 10**30),
    "network.max_requests": (10**9, 10**30),
    "network.max_usd": (10**6, math.inf),
    "gate.delta_loss_percent": (10**6, math.inf),
    "gate.sdc_percent": (10**6, math.inf),
}


@pytest.mark.parametrize(("place", "values"), LARGEST.items(), ids=LARGEST)
def test_a_number_that_no_grid_has_is_refused(untouched, place, values):
    largest, larger = values
    untouched.change(place, largest)
    load_params(untouched.folder / "params.yaml")
    untouched.change(place, larger)
    with pytest.raises(InvalidParameter, match="should be less than") as refused:
        load_params(untouched.folder / "params.yaml")
    says(str(refused.value), place, "params.yaml", json.dumps(larger)[:20])


def numbers_of(schema: dict, defined: dict) -> Iterator[dict]:
    """Every number of a JSON schema but the levels of factors."""
    if schema.get("type") in ("integer", "number"):
        yield schema
    if reference := schema.get("$ref"):
        yield from numbers_of(defined[reference.rpartition("/")[2]], defined)
    for name in ("properties", "patternProperties"):
        for key, part in schema.get(name, {}).items():
            if key != "factors":  # the levels of a treatment's fields, which have bounds of their own
                yield from numbers_of(part, defined)
    inner = [schema.get("items"), schema.get("additionalProperties"), *schema.get("anyOf", []), *schema.get("prefixItems", [])]
    for part in inner:
        if isinstance(part, dict):
            yield from numbers_of(part, defined)


def test_every_number_has_bounds():
    schema = TypeAdapter(Params).json_schema()
    found = list(numbers_of(schema, schema["$defs"]))
    assert len(found) > len(LARGEST)
    for number in found:
        assert {"minimum", "exclusiveMinimum"} & number.keys(), number
        assert {"maximum", "exclusiveMaximum"} & number.keys(), number


def test_a_grid_has_an_end(untouched):
    untouched.change("seeds", list(range(5001)))
    says(untouched.fails("check"), "InvalidParameter", "params.yaml", "10,002 runs", "at most 10,000")


def test_a_folder_in_ones_home_is_taken(untouched):
    untouched.change("datasets.digits.folder", "~/digits")
    assert untouched.run("check") == (0, [])


@pytest.mark.parametrize(("place", "value", "parts"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_a_wrong_value_is_named_with_its_place_and_what_is_allowed(untouched, place, value, parts):
    untouched.change(place, value)
    says(untouched.fails("check"), "InvalidParameter", place, "params.yaml", *parts)


@pytest.mark.parametrize(
    ("place", "known"),
    [
        ("colour", ["encoder", "figures", "texts"]),
        ("inject.bits", ["batch_size", "detector", "engine", "seed"]),
        ("inject.faults.colour", ["bits", "block", "operation", "pattern", "target", "values"]),
        ("datasets.digits.colour", ["limit_test", "source"]),
        ("backbones.resnet18.epoch", ["epochs", "learning_rate", "network", "random_erasing", "recipe"]),
        ("texts.descriptions.colour", ["embedding", "provider", "templates"]),
        ("texts.descriptions.embedding.colour", ["template_weight", "unit_after", "vectors"]),
        ("network.colour", ["attempts", "max_usd"]),
        ("gate.colour", ["sdc_percent", "significance"]),
        ("runs", ["backbones", "seeds", "variants"]),
    ],
)
def test_an_unknown_key_is_named_with_the_known_ones(untouched, place, known):
    untouched.change(place, 1)
    says(untouched.fails("check"), f"unknown key {place!r}", "params.yaml", *known)


@pytest.mark.parametrize("place", ["encoder", "seeds", "inject.seed", "datasets.digits.source", "texts.descriptions.provider"])
def test_a_missing_key_is_named(untouched, place):
    untouched.change(place, REMOVED)
    says(untouched.fails("check"), f"key {place!r} is missing", "params.yaml")


def test_a_misspelt_key_is_named(untouched):
    untouched.change("inject.seed", REMOVED)
    untouched.change("inject.sed", 1)
    says(untouched.fails("check"), "'inject.sed'")


RECIPES = "alexnet, focalnet, maxvit, mobilenet, resnet, swin, vgg"
REFERENCES = {
    "variant without texts": (
        "variants",
        ["baseline", "photos"],
        ["variant 'photos'", "variants.1", "known: baseline, descriptions, random"],
    ),
    "recipe": ("backbones.resnet18.recipe", "long", ["recipe 'long'", f"known: {RECIPES}"]),
    "network without a recipe": (
        "backbones.lenet",
        {},
        ["network 'lenet'", f"set backbones.lenet.recipe to one of {RECIPES};", "that have one: alexnet, focalnet_s,"],
    ),
    "network of a library without a recipe": (
        "backbones.small",
        {"network": "timm:resnet18d"},
        ["network 'timm:resnet18d'", f"set backbones.small.recipe to one of {RECIPES};"],
    ),
    "provider": (
        "texts.descriptions.provider",
        "gpt",
        ["provider 'gpt'", "known: features, import, openai, replay, template"],
    ),
    "colour of a variant": (
        "figures.colours",
        {"photos": "#000000"},
        ["variant 'photos'", "known: baseline, descriptions, random"],
    ),
}


@pytest.mark.parametrize(("place", "value", "parts"), REFERENCES.values(), ids=REFERENCES)
def test_a_reference_to_nothing_is_named_with_the_known_names(untouched, place, value, parts):
    untouched.change(place, value)
    says(untouched.fails("check"), place, "params.yaml", *parts)


@pytest.mark.parametrize("name", ["baseline", "random"])
def test_a_variant_that_no_text_tells_anything_has_no_texts(untouched, name):
    untouched.change(f"texts.{name}", {"provider": "template", "questions": ["a photo of a {class}"]})
    says(untouched.fails("check"), "InvalidParameter", "params.yaml", f"texts.{name}", "call it something else")


@pytest.mark.parametrize(
    ("place", "values", "twice"),
    [("seeds", [3, 0, 0], "0"), ("variants", ["descriptions", "baseline", "descriptions"], "'descriptions'")],
)
def test_what_would_run_twice_is_refused(untouched, place, values, twice):
    untouched.change(place, values)
    says(untouched.fails("check"), "InvalidParameter", f"params.yaml {place} holds {twice} twice")


NAMES = {
    "dot in a backbone": ("backbones", "a.b", {"network": "resnet18"}),
    "slash in a data set": ("datasets", "a/b", {}),
    "space in a variant": ("texts", "a b", {"provider": "template", "questions": ["{class}"]}),
    "capital": ("backbones", "ResNet18", {"network": "resnet18"}),
    "option": ("backbones", "-s", {"network": "resnet18"}),
    "nothing": ("figures", "colours", {"": "#000000"}),
}


@pytest.mark.parametrize(("section", "name", "content"), NAMES.values(), ids=NAMES)
def test_a_name_that_files_and_stages_cannot_have_is_refused(untouched, section, name, content):
    with modify_yaml(str(untouched.folder / "params.yaml")) as params:
        params[section][name] = content or params[section]["digits"]
    place, name = ("figures.colours", "") if section == "figures" else (section, name)
    says(untouched.fails("check"), "InvalidParameter", f'a name in {place} is "{name}" in params.yaml', "a-z0-9")


COLLIDING = {
    "runs": (
        {"datasets": ["a", "a-b"], "backbones": ["c", "b-c"], "texts": ["descriptions"]},
        "two runs DATASET-BACKBONE-VARIANT-SEED have the name 'a-b-c-baseline-0'",
    ),
    "texts": (
        {"datasets": ["a", "a-b"], "backbones": ["resnet18"], "texts": ["b-c", "c"]},
        "two heads DATASET-VARIANT have the name 'a-b-c'",
    ),
    "texts and a random start": (
        {"datasets": ["a", "a-b"], "backbones": ["resnet18"], "texts": ["b-random"]},
        "two heads DATASET-VARIANT have the name 'a-b-random'",
    ),
}


@pytest.mark.parametrize(("names", "message"), COLLIDING.values(), ids=COLLIDING)
def test_names_whose_hyphens_make_two_into_one_are_refused(untouched, names, message):
    smoke = load_params(untouched.folder / "params.yaml")
    filled = {"datasets": asdict(smoke.datasets["digits"]), "backbones": {"network": "resnet18"}, "texts": TEMPLATE}
    untouched.change("variants", ["baseline"])
    for section, keys in names.items():
        untouched.change(section, {key: dict(filled[section]) for key in keys})
    says(untouched.fails("check"), "InvalidParameter", "params.yaml", message, "hyphen")


RIGHT_VALUES = {
    "variants without and with texts": ("variants", ["random", "descriptions", "baseline"]),
    "several seeds": ("seeds", [1, 0, 2**63 - 1]),
    "nothing but a recipe's fields": ("backbones.resnet18", {}),
    "recipe of another family": ("backbones.resnet18.recipe", "mobilenet"),
    "network of a library with a recipe": ("backbones.small", {"network": "timm:resnet18d", "recipe": "resnet"}),
    "two backbones of one network": ("backbones.resnet-18_b", {"network": "resnet18", "epochs": 7}),
    "hyphens that keep names apart": ("backbones", {"a-b": {"network": "resnet18"}, "a": {"network": "resnet34"}}),
    "nothing but a provider and questions": ("texts.descriptions", TEMPLATE),
    "texts that no run needs": ("texts.template", TEMPLATE),
    "colour of a variant": ("figures.colours", {"descriptions": "#0072B2", "random": "#000000"}),
}


@pytest.mark.parametrize(("place", "value"), RIGHT_VALUES.values(), ids=RIGHT_VALUES)
def test_a_right_value_is_taken(untouched, place, value):
    untouched.change(place, value)
    assert untouched.run("check") == (0, [])


def test_a_number_is_one_as_dvc_writes_it(untouched):
    untouched.change("backbones.resnet18.learning_rate", 1e-5)
    assert "learning_rate: 1e-05\n" in (untouched.folder / "params.yaml").read_text(encoding="utf-8")
    assert load_params(untouched.folder / "params.yaml").backbones["resnet18"].learning_rate == 1e-5
    untouched.change("backbones.resnet18.learning_rate", "1e-5")
    says(untouched.fails("check"), 'backbones.resnet18.learning_rate is "1e-5" in params.yaml', "valid number")


FILES = {
    "broken YAML": (b"root: ../..\nseeds: [\n", ["cannot be read as YAML", "line 3"]),
    "tabs": (b"inject:\n\tseed: 0\n", ["cannot be read as YAML", "line 2"]),
    "no text": (b"\xff\xfe\x00", ["cannot be read as YAML", "byte 0 is no UTF-8"]),
    "UTF-16": ("root: .".encode("utf-16"), ["cannot be read as YAML", "save it as UTF-8"]),
    "Latin-1": ("root: é".encode("latin-1"), ["cannot be read as YAML", "byte 6 is no UTF-8"]),
    "empty": (b"", ["null", "object"]),
    "a list": (b"- 1\n- 2\n", ["[1, 2]", "object"]),
    "a section twice": (b"inject: {}\ninject: {}\n", ["inject is there twice", "line 2"]),
    "names that are no texts": (b"datasets: {2024-01-01: {}}\n", ["a name in datasets in line 1 is '2024-01-01'"]),
    "too large": (b"# " + b"x" * 2**20, ["larger than 1 MB"]),
    "a long name": (b"x" * 1000 + b": 1\n", ["unknown key 'xxx", "known: backbones"]),
}


@pytest.mark.parametrize(("content", "parts"), FILES.values(), ids=FILES)
def test_a_parameter_file_that_is_none_is_refused(untouched, content, parts):
    untouched.put("params.yaml", content)
    line = untouched.fails("check")
    says(line, "InvalidParameter", "params.yaml", *parts)
    assert len(line) < 1000


def test_a_date_is_no_number(untouched):
    untouched.change("datasets.digits.split_seed", datetime.date(2024, 1, 1))
    says(untouched.fails("check"), "InvalidParameter", "datasets.digits.split_seed", "2024-01-01", "params.yaml")


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.mkdir()


def an_endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (a_pipe, ["no regular file"]),
        (a_folder, ["no regular file"]),
        (an_endless_device, ["no regular file"]),
        (itself, ["levels"]),
    ],
)
def test_something_else_than_a_parameter_file_is_named(tmp_path, make, parts):
    make(tmp_path / "params.yaml")
    with pytest.raises(InvalidParameter) as refused:
        load_params(tmp_path / "params.yaml")
    says(str(refused.value), "params.yaml", *parts)


def test_a_name_that_looks_like_a_number_is_one_for_dvc_too(untouched):
    """In quotes: the stages of DVC's matrix have it, and their parameters are found."""
    untouched.change("datasets", {"1e3": asdict(load_params(untouched.folder / "params.yaml").datasets["digits"])})
    assert untouched.run("check") == (0, [])
    shutil.copy(REPOSITORY / "dvc.yaml", untouched.folder)
    with Repo.init(str(untouched.folder), no_scm=True) as repo:
        stages = {stage.name: stage for stage in repo.index.stages}
    assert {"data@1e3", "train@1e3-resnet18-baseline-0"} <= stages.keys()
    for param in stages["data@1e3"].params:
        param.get_hash()  # or DVC says that it is missing


def test_a_missing_parameter_file_is_named(untouched):
    (untouched.folder / "params.yaml").unlink()
    says(untouched.fails("check"), str(untouched.folder / "params.yaml"), "does not exist", "run this in a folder")


COMMANDS = {
    "unknown run": (["train", "resnet18"], ["key 'resnet18'", "known:", BASELINE, GUIDED, "params.yaml names them"]),
    "run of an unknown seed": (["train", "digits-resnet18-baseline-1"], ["-1'", f"known: {BASELINE}"]),
    "unknown data set": (["data", "svhn"], ["key 'svhn'", "known: digits", "params.yaml names them"]),
    "unknown texts": (["prompts", "svhn-descriptions"], ["key 'svhn-descriptions'", f"known: {TEXT}"]),
    "key of a thousand letters": (["train", "x" * 1000], [f"'{'x' * 90}", "...", "known:"]),
    "key that moves the cursor": (["train", "\x1b[2J\n"], ["'\\x1b[2J\\n'", "known:"]),
    "unknown stage": (["paint"], ["stage 'paint'", "known:", "check", "train"]),
    "no stage": ([], ["stage ''", "known:", "python stages NAME"]),
    "no key": (["train"], ["'train' takes one key", "'none'"]),
    "two keys": (["data", "digits", "svhn"], ["'data' takes one key", "'digits svhn'"]),
    "key for a stage without": (["tables", "digits"], ["'tables' takes no key", "'digits'"]),
}


@pytest.mark.parametrize(("arguments", "parts"), COMMANDS.values(), ids=COMMANDS)
def test_a_wrong_command_line_is_answered_with_the_right_one(untouched, arguments, parts):
    says(untouched.fails(*arguments), *parts)
