"""A user's mistake ends in one line: what was found, what is allowed, where to change it. Exit code 1, nothing half-written.

Most cases run the command line inside this process, because a new interpreter takes seconds to import torch. The cases at the
end, and all that the operating system refuses, run it as users do.
"""

import ctypes
import datetime
import functools
import io
import json
import operator
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from conftest import REPOSITORY
from smoke_grid import environment
from textguard.artifacts import read_safetensors, write_safetensors
from textguard.text.cache import StoredAnswer, answer_key, to_line
from textguard.text.embeddings import ClassEmbeddings, EmbeddingOptions, save_class_embeddings

SMOKE = REPOSITORY / "grids" / "smoke" / "params.yaml"
BASELINE, GUIDED, TEXT = "digits-resnet18-baseline-s0", "digits-resnet18-descriptions-s0", "digits-descriptions"
MODEL, RUN, RECORDS = f"models/{BASELINE}.safetensors", f"metrics/runs/{BASELINE}", f"metrics/records/{BASELINE}"
EMBEDDINGS, QUESTIONS = f"embeddings/{TEXT}.safetensors", f"prompts/{TEXT}/questions.jsonl"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
OUTPUTS = ("data/digits/train/images.safetensors", "data/digits/test/images.safetensors", "data/digits/classes.json")
WIDTH = 16
REMOVED = object()
# In bytes, less than the training images: the first file that stage `data` writes is cut off halfway.
SMALL_DISK, SMALL_FILE = 65536, 50000
CAP_DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24


@dataclass(frozen=True)
class Grid:
    """A grid in a folder of its own, to make mistakes in."""

    folder: Path

    def change(self, place: str, value: Any) -> None:
        """Set one value of params.yaml, or take it out (REMOVED). place: keys joined by dots."""
        file = self.folder / "params.yaml"
        params = yaml.safe_load(file.read_text())
        *parents, last = place.split(".")
        section = functools.reduce(operator.getitem, parents, params)
        section[last] = value
        if value is REMOVED:
            del section[last]
        file.write_text(yaml.safe_dump(params, sort_keys=False))

    def put(self, name: str, content: bytes | str) -> Path:
        """Replace a file; models are links to other grids' and must not be written to in place."""
        file = self.folder / name
        file.unlink(missing_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    def cut(self, name: str) -> Path:
        """Keep the first half of a file."""
        content = (self.folder / name).read_bytes()
        return self.put(name, content[: len(content) // 2])

    def files(self) -> dict[Path, tuple[int, int, int]]:
        """Every file but the partial results, with what changes when it is written."""
        found = {path: path.stat() for path in self.folder.rglob("*") if path.is_file()}
        assert not [path for path in found if path.suffix == ".tmp"]
        states = {path.relative_to(self.folder): (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in found.items()}
        return {path: state for path, state in states.items() if path.parts[0] != ".work"}

    def run(self, *arguments: str, **variables: str) -> tuple[int, list[str]]:
        """Do what `python stages ARGUMENTS` does. Returns the exit code and the lines on stderr."""
        stderr = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"TEXTGUARD_DEVICE": "cpu", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **variables}.items():
                patch.setenv(name, value)
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", ["stages", *arguments])
            patch.setattr(sys, "path", ["stages", *sys.path])
            patch.setattr(sys, "stderr", stderr)
            patch.setattr(signal, "signal", lambda *_: None)
            try:
                with pytest.raises(SystemExit) as ended:
                    runpy.run_path(str(REPOSITORY / "stages" / "__main__.py"), run_name="__main__")
            finally:
                torch.use_deterministic_algorithms(False)
        return ended.value.code, stderr.getvalue().splitlines()

    def fails(self, *arguments: str, **variables: str) -> str:
        """Run a stage that must end in one line before it writes anything. Returns the line."""
        before = self.files()
        code, lines = self.run(*arguments, **variables)
        assert (code, len(lines)) == (1, 1), (code, lines)
        assert self.files() == before
        return lines[0]

    def start(self, *arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run `python stages ARGUMENTS` in a process of its own."""
        command = [sys.executable, str(REPOSITORY / "stages"), *arguments]
        variables = environment(TEXTGUARD_DEVICE="cpu", OMP_NUM_THREADS="1")
        return subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True, check=False, **settings)


def says(line: str, *parts: str) -> None:
    missing = [part for part in parts if part not in line]
    assert not missing, f"{missing} not in: {line}"


def fails_in_one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout) == (1, ""), done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On models this small, threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny grid whose baseline went through every stage up to its campaign. Nobody writes to it."""
    grid = Grid(tmp_path_factory.mktemp("finished"))
    shutil.copy(SMOKE, grid.folder / "params.yaml")
    small = {
        "root": str(REPOSITORY),
        "datasets.digits.limit_train": 60,
        "datasets.digits.limit_test": 40,
        "recipes.resnet.epochs": 1,
        "recipes.resnet.warmup_epochs": 0,
        "recipes.resnet.batch_size": 20,
        "inject.injections_per_layer": 4,
        "inject.image_batch": 2,
    }
    for place, value in small.items():
        grid.change(place, value)
    stages = ["data digits", f"prompts {TEXT}", f"responses {TEXT}", "encoder"]
    stages += [f"{stage} {BASELINE}" for stage in ("train", "evaluate", "ranges", "inject", "closeup")]
    for stage in stages:
        code, lines = grid.run(*stage.split())
        assert code == 0, lines
    guided = yaml.safe_load((grid.folder / "params.yaml").read_text())["runs"][GUIDED]
    grid.change(f"runs.{GUIDED}", REMOVED)
    code, lines = grid.run("results")
    assert code == 0, lines
    grid.change(f"runs.{GUIDED}", guided)
    save_class_embeddings(grid.folder / EMBEDDINGS, embeddings())
    texts = {"vectors": torch.ones(20, WIDTH), "rows": torch.arange(20)}
    write_safetensors(grid.folder / f"embeddings/{TEXT}.texts.safetensors", texts)
    return grid.folder


@pytest.fixture
def grid(finished: Path, tmp_path: Path) -> Grid:
    """The finished grid, to break. Its models are links, as they are large."""
    folder = tmp_path / "grid"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns(".work", "models"))
    shutil.copytree(finished / "models", folder / "models", copy_function=os.link)
    return Grid(folder)


@pytest.fixture
def untouched(tmp_path: Path) -> Grid:
    """A grid of which nothing has run: all that the checks of params.yaml need."""
    grid = Grid(tmp_path)
    shutil.copy(SMOKE, tmp_path / "params.yaml")
    grid.change("root", str(REPOSITORY))
    return grid


def embeddings() -> ClassEmbeddings:
    matrix = torch.nn.functional.normalize(torch.randn(len(DIGITS), WIDTH, generator=torch.Generator().manual_seed(0)))
    options = EmbeddingOptions(unit_before=True, unit_after=True, vectors="encoder", seed=0, template_weight=0.5)
    return ClassEmbeddings(matrix, "digits", tuple(DIGITS), "minilm", "0" * 64, WIDTH, 20, 0, options)


WRONG_VALUES = {
    "text for an integer": ("recipes.resnet.epochs", "1", ['"1"', "valid integer"]),
    "fraction for an integer": ("recipes.resnet.batch_size", 0.5, ["0.5", "valid integer"]),
    "true for an integer": ("inject.seed", True, ["true", "valid integer"]),
    "text for a number": ("recipes.resnet.learning_rate", "fast", ['"fast"', "valid number"]),
    "number for a text": ("encoder", 7, ["7", "valid string"]),
    "nothing for a section": ("inject", None, ["null", "object"]),
    "a list for a section": ("datasets", [], ["[]", "object"]),
    "no injections": ("inject.injections_per_layer", 0, ["0", "greater than 0"]),
    "negative injections": ("inject.injections_per_layer", -1, ["-1", "greater than 0"]),
    "unknown kind of site": ("inject.kinds", ["Pool"], ['"Pool"', "'Conv2d'", "'MatMul'"]),
    "no kind of site": ("inject.kinds", [], ["at least 1"]),
    "unknown plan": ("inject.plan", "sobol", ['"sobol"', "'uniform', 'proportional' or 'neyman'"]),
    "unknown images": ("inject.images", "best", ['"best"', "'uniform' or 'importance'"]),
    "no pilot": ("inject.pilot", 0, ["0", "greater than 0"]),
    "certainty": ("statistics.confidence", 1.0, ["1.0", "less than 1"]),
    "few resamples": ("statistics.bootstrap", 10, ["10", "greater than or equal to 200"]),
    "no failures": ("statistics.fit_per_bit", 0.0, ["0.0", "greater than 0"]),
    "no images": ("closeup.images", 0, ["0", "greater than 0"]),
    "maps of one place": ("closeup.smallest_map", 1, ["1", "greater than or equal to 2"]),
    "unknown exposure": ("statistics.fit_exposure", "bits", ['"bits"', "'neurons' or 'multiply_adds'"]),
    "unknown mitigation": ("inject.mitigation", "tmr", ['"tmr"', "'none', 'ranger' or 'clip_to_zero'"]),
    "unknown target": ("inject.faults.target", "input", ['"input"', "'neuron', 'weight' or 'metadata'"]),
    "unknown operation": ("inject.faults.operation", "set", ['"set"', "'flip', 'stuck_at_0' or 'stuck_at_1'"]),
    "no bits": ("inject.faults.bits", 0, ["0", "greater than 0"]),
    "share of 1": ("datasets.digits.test_share", 1.0, ["1.0", "less than 1"]),
    "share of all": ("datasets.digits.corrupt_share", 1.0, ["1.0", "less than 1"]),
    "negative limit": ("datasets.digits.limit_train", -5, ["-5", "greater than or equal to 0"]),
    "more warm-up than epochs": ("recipes.resnet.warmup_epochs", 2, ["is 2", "below epochs, 2"]),
    "larger than resized": ("recipes.resnet.resize_size", 31, ["is 31", "below image_size, 32"]),
    "scales the wrong way round": ("recipes.resnet.crop_scale", [1.0, 0.5], ["[1.0, 0.5]", "minimum comes first"]),
    "no recipe": ("recipes.resnet", None, ["null", "object"]),
    "unknown schedule": ("recipes.resnet.schedule", "linear", ['"linear"', "'step', 'cosine' or 'exponential'"]),
    "unknown weights": ("statistics.last_layer_weights", "all", ['"all"', "'neurons', 'equal' or 'head_only'"]),
    "unknown vectors": (f"texts.{TEXT}.embedding.vectors", "zeros", ['"zeros"', "'encoder', 'shuffled', 'random' or 'one"]),
    "more questions than there are": (f"texts.{TEXT}.limit_questions", 3, ["3", "there are 2 questions"]),
    "unknown flag": (f"texts.{TEXT}.drop", ["boring"], ['"boring"', "'duplicate'", "'not_english'"]),
    "weight above 1": (f"texts.{TEXT}.embedding.template_weight", 1.5, ["1.5", "less than or equal to 1"]),
    "no questions": (f"texts.{TEXT}.questions", [], ["at least 1"]),
    "colour without a number": ("figures.colours.baseline", "red", ['"red"', "#"]),
}


@pytest.mark.parametrize(("place", "value", "parts"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_a_wrong_value_is_named_with_its_place_and_what_is_allowed(untouched, place, value, parts):
    untouched.change(place, value)
    says(untouched.fails("check"), "InvalidParameter", place, "params.yaml", *parts)


@pytest.mark.parametrize(
    ("place", "known"),
    [
        ("colour", ["encoder", "figures", "texts"]),
        ("inject.bits", ["batch_size", "detector", "engine", "seed"]),
        pytest.param("datasets.digits.colour", ["limit_test", "source"]),
        pytest.param(f"runs.{BASELINE}.depth", ["backbone", "variant"]),
        pytest.param("recipes.resnet.epoch", ["epochs", "learning_rate", "random_erasing"]),
    ],
)
def test_an_unknown_key_is_named_with_the_known_ones(untouched, place, known):
    untouched.change(place, 1)
    says(untouched.fails("check"), f"unknown key {place!r}", "params.yaml", *known)


@pytest.mark.parametrize("place", ["encoder", "tables", "inject.seed", f"runs.{BASELINE}.recipe"])
def test_a_missing_key_is_named(untouched, place):
    untouched.change(place, REMOVED)
    says(untouched.fails("check"), f"key {place!r} is missing", "params.yaml")


def test_a_misspelt_key_is_named(untouched):
    untouched.change("inject.seed", REMOVED)
    untouched.change("inject.sed", 1)
    says(untouched.fails("check"), "'inject.sed'")


REFERENCES = {
    "variant": (f"runs.{BASELINE}.variant", "photos", ["variant 'photos'", "known: baseline, descriptions, random"]),
    "recipe of the library": ("recipes.long", {}, ["recipe 'long'", "known:", "mobilenet, resnet"]),
    "recipe of a run": (f"runs.{BASELINE}.recipe", "long", ["recipe 'long'", "known: resnet"]),
    "data set of a run": (f"runs.{BASELINE}.dataset", "svhn", ["data set 'svhn'", "known: digits"]),
    "data set of texts": (f"texts.{TEXT}.dataset", "svhn", ["data set 'svhn'", "known: digits"]),
    "data set of a table": ("tables.main_dataset", "svhn", ["data set 'svhn'", "known: digits"]),
    "colour of a variant": ("figures.colours", {"baseline": "#000000"}, ["variant 'descriptions'", "known: baseline"]),
    "start of a head": (f"runs.{GUIDED}.head_from", "x.json", ["'x.json'", f"'embeddings/{TEXT}.safetensors'"]),
}


@pytest.mark.parametrize(("place", "value", "parts"), REFERENCES.values(), ids=REFERENCES)
def test_a_reference_to_nothing_is_named_with_the_known_names(untouched, place, value, parts):
    untouched.change(place, value)
    says(untouched.fails("check"), place, "params.yaml", *parts)


def test_texts_that_do_not_say_their_data_set_are_refused(untouched):
    texts = yaml.safe_load(SMOKE.read_text())["texts"][TEXT]
    untouched.change("texts", {"stories": texts})
    says(untouched.fails("check"), "texts.stories", "'digits-VARIANT'", "params.yaml")


FILES = {
    "broken YAML": (b"root: ../..\nruns: [\n", ["cannot be read as YAML", "line 3"]),
    "tabs": (b"runs:\n\tseed: 0\n", ["cannot be read as YAML", "line 2"]),
    "no text": (b"\xff\xfe\x00", ["cannot be read as YAML"]),
    "empty": (b"", ["null", "object"]),
    "a list": (b"- 1\n- 2\n", ["[1, 2]", "object"]),
}


@pytest.mark.parametrize(("content", "parts"), FILES.values(), ids=FILES)
def test_a_parameter_file_that_is_none_is_refused(untouched, content, parts):
    untouched.put("params.yaml", content)
    says(untouched.fails("check"), "InvalidParameter", "params.yaml", *parts)


def test_a_date_is_no_number(untouched):
    untouched.change("datasets.digits.split_seed", datetime.date(2024, 1, 1))
    says(untouched.fails("check"), "InvalidParameter", "datasets.digits.split_seed", "2024-01-01", "params.yaml")


def test_a_missing_parameter_file_is_named(untouched):
    (untouched.folder / "params.yaml").unlink()
    says(untouched.fails("check"), str(untouched.folder / "params.yaml"), "does not exist", "run this in a folder")


COMMANDS = {
    "unknown run": (["train", "resnet18"], ["key 'resnet18'", "known:", BASELINE, GUIDED, "params.yaml runs"]),
    "unknown stage": (["paint"], ["stage 'paint'", "known:", "check", "train"]),
    "no stage": ([], ["stage ''", "known:", "python stages NAME"]),
    "no key": (["train"], ["'train' takes one key", "'none'"]),
    "two keys": (["data", "digits", "svhn"], ["'data' takes one key", "'digits svhn'"]),
    "key for a stage without": (["tables", "digits"], ["'tables' takes no key", "'digits'"]),
}


@pytest.mark.parametrize(("arguments", "parts"), COMMANDS.values(), ids=COMMANDS)
def test_a_wrong_command_line_is_answered_with_the_right_one(untouched, arguments, parts):
    says(untouched.fails(*arguments), *parts)


NAMES = {
    "source": (
        "datasets.digits.source",
        "mnist",
        "data digits",
        ["data set 'mnist'", "known: cifar10", "datasets.*.source"],
    ),
    "backbone": (
        f"runs.{BASELINE}.backbone",
        "lenet",
        f"train {BASELINE}",
        ["backbone 'lenet'", "known: alexnet, focalnet_s,", "vgg19_bn", "runs.*.backbone"],
    ),
    "data that is nowhere": ("datasets.digits.folder", "nowhere", "data digits", ["nowhere is no folder", "datasets.*.folder"]),
    "data that nobody can download": ("datasets.digits.source", "imagenet", "data digits", ["datasets.*.folder", "train/WNID"]),
    "small images": (
        f"runs.{BASELINE}.backbone",
        "alexnet",
        f"train {BASELINE}",
        ["alexnet", "63 to 4096 pixels", "not 32", "recipes.*.image_size"],
    ),
    "provider": (
        f"texts.{TEXT}.provider",
        "gpt",
        f"responses {TEXT}",
        ["provider 'gpt'", "known: import, openai, replay, template", "texts"],
    ),
    "encoder": ("encoder", "word2vec", "encoder", ["encoder 'word2vec'", "known: minilm, open_clip:MODEL:PRETRAINED"]),
    "encoder without a tag": ("encoder", "open_clip:RN50", "encoder", ["'open_clip:RN50'", "open_clip:MODEL:PRETRAINED"]),
    "OpenCLIP model": ("encoder", "open_clip:ViT-Z:openai", "encoder", ["OpenCLIP model 'ViT-Z'", "ViT-B-32"]),
    "OpenCLIP tag": ("encoder", "open_clip:RN50:mine", f"embeddings {TEXT}", ["tag of RN50 'mine'", "known:", "openai"]),
    "sentence-transformers folder": (
        "encoder",
        "sentence_transformers:/none",
        "encoder",
        ["/none/modules.json", "No such file"],
    ),
    "encoder folder": ("encoder", "open_clip:local-dir:/none", "encoder", ["/none/open_clip_config.json", "No such file"]),
    "engine": ("inject.engine", "hooks", f"inject {BASELINE}", ["engine 'hooks'", "known: pytorchfi, replay, whole"]),
    "detector": ("inject.detector", "clamp", f"inject {BASELINE}", ["detector 'clamp'", "known: fixed:X, off, profiled"]),
    "detector without a number": ("inject.detector", "fixed:", f"inject {BASELINE}", ["'fixed:'", "number above 0"]),
    "detector with a word": ("inject.detector", "fixed:ten", f"inject {BASELINE}", ["'fixed:ten'", "number above 0"]),
    "detector below 0": ("inject.detector", "fixed:-1", f"inject {BASELINE}", ["'fixed:-1'", "number above 0"]),
    "detector at NaN": ("inject.detector", "fixed:nan", f"inject {BASELINE}", ["'fixed:nan'", "number above 0"]),
    "format": ("inject.format", "posit8", f"inject {BASELINE}", ["number format 'posit8'", "known:", "bf16", "inject.format"]),
    "format's sizes": ("inject.format", "int(1)", f"inject {BASELINE}", ["'int(1)'", "B from 2 to 16", "inject.format"]),
    "metadata of fp32": (
        "inject.faults.target",
        "metadata",
        f"inject {BASELINE}",
        ["fp32 has no metadata", "inject.faults.target"],
    ),
    "too many bits": ("inject.faults.bits", 33, f"inject {BASELINE}", ["inject.faults.bits is 33", "32 to choose from"]),
    "no such layers": ("inject.kinds", ["Conv3d"], f"inject {BASELINE}", ["no Conv3d output"]),
    "more flips than weights": (
        "closeup.weight_flips",
        10**9,
        f"closeup {BASELINE}",
        ["closeup.weight_flips is 1000000000", "there are 11166912 weights"],
    ),
    "few training images": ("datasets.digits.limit_train", 5, "data digits", ["digits cannot be split", "datasets", "5"]),
    "many test images": ("datasets.digits.limit_test", 999, "data digits", ["digits cannot be split", "datasets", "999"]),
}


@pytest.mark.parametrize(("place", "value", "stage", "parts"), NAMES.values(), ids=NAMES)
def test_what_a_stage_does_not_know_is_named_with_what_it_knows(grid, place, value, stage, parts):
    grid.change(place, value)
    says(grid.fails(*stage.split()), "params.yaml", *parts)


def test_an_encoder_folder_without_a_width_is_refused(grid):
    grid.put("open_clip_config.json", '{"model_cfg": {}}')
    grid.change("encoder", f"open_clip:local-dir:{grid.folder}")
    says(grid.fails("encoder"), "open_clip_config.json", "params.yaml encoder")


def test_a_diverging_training_says_when_and_what_to_lower(grid):
    grid.change("recipes.resnet.learning_rate", 1e30)
    before = grid.files()
    code, lines = grid.run("train", BASELINE)
    assert code == 1
    says(lines[-1], "InvalidParameter", BASELINE, "the loss is", "in epoch 1", "lower params.yaml recipes.*.learning_rate")
    assert grid.files() == before


def test_an_unknown_device_is_named(grid):
    line = grid.fails("evaluate", BASELINE, TEXTGUARD_DEVICE="abacus")
    says(line, "TEXTGUARD_DEVICE='abacus'", "allowed: cpu")


def test_a_progress_interval_that_is_no_number_is_named(grid):
    says(grid.fails("inject", BASELINE, TEXTGUARD_PROGRESS="often"), "TEXTGUARD_PROGRESS", "'often'")


TEMPLATES = {
    "other field": (["What is {name}?"], ["'What is {name}?'", "{class} or {a_class}"]),
    "no field": (["What is it?"], ["'What is it?'", "{class} or {a_class}"]),
    "open brace": (["What is {class?"], ["'What is {class?'", "is no template"]),
    "twice": (["{class}?", "{class}?"], ["the same question twice"]),
    "number format": (["What is {class:d}?"], ["'What is {class:d}?'"]),
    "conversion": (["What is {class!z}?"], ["'What is {class!z}?'"]),
}


@pytest.mark.parametrize(
    ("questions", "parts"),
    TEMPLATES.values(),
    ids=TEMPLATES,
)
def test_a_question_that_cannot_be_asked_is_named(grid, questions, parts):
    grid.change(f"texts.{TEXT}.questions", questions)
    says(grid.fails("prompts", TEXT), f"params.yaml texts.{TEXT}.questions", *parts)


def test_a_class_without_an_answer_is_named_with_its_question(grid):
    grid.change(f"texts.{TEXT}.questions", ["Where does {a_class} live?"])
    assert grid.run("prompts", TEXT)[0] == 0
    line = grid.fails("responses", TEXT)
    says(line, "MissingAnswer", "class 'zero'", "'Where does a zero live?'", "prompts/cache/digits.jsonl", "params.yaml texts")


def test_more_samples_than_answers_are_named(grid):
    grid.change(f"texts.{TEXT}.samples", 99)
    says(grid.fails("responses", TEXT), "MissingAnswer", "class 'zero'", "of 99", "params.yaml texts")


def stored(question: str, text: str) -> bytes:
    """A line of a file of stored answers: the first answer of a person to a question."""
    return to_line(StoredAnswer(answer_key(question, 0, None), question, 0, "a test", None, None, None, None, None, None, text))


CACHES = {
    "half a line": (lambda line: line[:40], "is no JSON"),
    "no object": (lambda line: b"[1]\n", "is no stored answer"),
    "other fields": (lambda line: b'{"question": "What?"}\n', "is no stored answer"),
    "a changed letter": (lambda line: line.replace(b"Round", b"Found"), "its checksum does not match"),
    "no text": (lambda line: b"\xff\xfe" + line, "is no JSON"),
}


@pytest.mark.parametrize(("spoil", "reason"), CACHES.values(), ids=CACHES)
def test_a_damaged_answer_is_named_with_file_and_line(grid, spoil, reason):
    questions = [json.loads(line)["text"] for line in (grid.folder / QUESTIONS).read_text().splitlines()]
    lines = [stored(question, "Round and white.") for question in questions]
    file = grid.put("answers.jsonl", b"".join([*lines[1:], spoil(lines[0])]))
    grid.change(f"texts.{TEXT}.cache", [str(file)])
    says(grid.fails("responses", TEXT), "MissingAnswer", repr(questions[0]), f"{file} line {len(lines)} ({reason})")


def test_a_missing_answers_file_is_named_with_the_parameter(grid):
    grid.change(f"texts.{TEXT}.cache", ["prompts/cache/none.jsonl"])
    says(grid.fails("responses", TEXT), "prompts/cache/none.jsonl is missing", "params.yaml texts")


def test_an_answer_with_a_line_separator_can_be_read_again(grid):
    questions = [json.loads(line)["text"] for line in (grid.folder / QUESTIONS).read_text().splitlines()]
    file = grid.put("answers.jsonl", b"".join(stored(question, "One.\u2028Two.") for question in questions))
    grid.change(f"texts.{TEXT}.cache", [str(file)])
    grid.change("encoder", "nobody")
    assert grid.run("responses", TEXT)[0] == 0
    says(grid.fails("embeddings", TEXT), "encoder 'nobody'")


PUBLISHED = {
    "no JSON": ("{", ["cannot be read", "JSONDecodeError"]),
    "a list": ("[]", ["must be a JSON object"]),
    "no lists": ('{"zero": "round"}', ["'zero' a list of sentences"]),
    "missing classes": (
        '{"Zero": ["Round."]}',
        ["9 of 10 classes have fewer than 1 sent", "'one' (0)", "texts.*.samples"],
    ),
}


@pytest.mark.parametrize(("content", "parts"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_descriptions_that_are_none_are_named(grid, content, parts):
    grid.change(f"texts.{TEXT}.provider", "import")
    grid.change(f"texts.{TEXT}.questions", ["A published description of the digit {class}."])
    assert grid.run("prompts", TEXT)[0] == 0
    file = grid.put("published.json", content)
    grid.change(f"texts.{TEXT}.cache", [str(file)])
    says(grid.fails("responses", TEXT), str(file), *parts)


LANGUAGE_MODEL = {
    "endpoint": "responses",
    "base_url": "http://127.0.0.1:9/v1",
    "model": "m",
    "system": None,
    "temperature": None,
    "max_tokens": 10,
    "stop": [],
    "seed": None,
}
MODELS = {
    "endpoint": ({"endpoint": "chat"}, ["model.endpoint", '"chat"', "'chat.completions'"]),
    "password in the URL": ({"base_url": "https://me:secret@host/v1"}, ["model.base_url"]),
    "key in the URL": ({"base_url": "https://host/v1?key=secret"}, ["model.base_url"]),
    "no limit": ({"max_tokens": 0}, ["model.max_tokens", "greater than 0"]),
    "one stop": ({"stop": "x"}, ["model.stop", "valid array"]),
    "empty stop": ({"stop": [""]}, ["model.stop", "at least 1"]),
    "unknown key": ({"top_p": 1.0}, ["unknown key", "model.top_p", "known: base_url, endpoint"]),
}


@pytest.mark.parametrize(("changes", "parts"), MODELS.values(), ids=MODELS)
def test_a_language_model_that_cannot_be_asked_is_refused(untouched, changes, parts):
    untouched.change(f"texts.{TEXT}.model", LANGUAGE_MODEL | changes)
    says(untouched.fails("check"), "InvalidParameter", f"texts.{TEXT}", "params.yaml", *parts)


def test_a_class_that_loses_all_its_texts_is_named(grid):
    questions = [json.loads(line)["text"] for line in (grid.folder / QUESTIONS).read_text().splitlines()]
    file = grid.put("answers.jsonl", b"".join(stored(question, "Round.") for question in questions))
    grid.change(f"texts.{TEXT}.cache", [str(file)])
    grid.change(f"texts.{TEXT}.drop", ["too_short"])
    assert grid.run("responses", TEXT)[0] == 0
    before = grid.files()
    code, lines = grid.run("embeddings", TEXT)
    assert code == 1
    says(lines[-1], "class 'zero' has no text left", f"params.yaml texts.{TEXT}.drop")
    assert grid.files() == before


def test_a_language_model_that_lacks_something_is_named(grid):
    grid.change(f"texts.{TEXT}.provider", "openai")
    says(grid.fails("responses", TEXT), "'openai' needs a language model", "params.yaml texts")
    grid.change(f"texts.{TEXT}.model", {**LANGUAGE_MODEL, "seed": 1})
    says(grid.fails("responses", TEXT), "responses takes no seed", "params.yaml texts")


DAMAGED_LINES = {
    "no JSON": ('{"id": "1"', ["line 2 is no JSON"]),
    "no object": ("7", ["line 2 is no JSON object"]),
    "other fields": ('{"id": "1"}', ["line 2 must have class_name, id, text"]),
    "no text": (b"\xff\xfe", ["cannot be read", "UnicodeDecodeError"]),
}


@pytest.mark.parametrize(("line", "parts"), DAMAGED_LINES.values(), ids=DAMAGED_LINES)
def test_damaged_questions_are_named_with_the_line(grid, line, parts):
    first, *_ = (grid.folder / QUESTIONS).read_bytes().splitlines()
    grid.put(QUESTIONS, first + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    says(grid.fails("responses", TEXT), "InvalidArtifact", QUESTIONS, "'prompts'", *parts)


MISSING = [
    ("prompts", TEXT, "data/digits/classes.json", "data"),
    ("responses", TEXT, QUESTIONS, "prompts"),
    ("text_quality", TEXT, f"embeddings/{TEXT}.texts.safetensors", "embeddings"),
    ("embeddings", TEXT, f"prompts/{TEXT}/responses.jsonl", "responses"),
    ("train", BASELINE, "data/digits/train/images.safetensors", "data"),
    ("train", GUIDED, EMBEDDINGS, "embeddings"),
    ("evaluate", BASELINE, MODEL, "train"),
    ("evaluate", BASELINE, "data/digits/test/images.safetensors", "data"),
    ("ranges", BASELINE, MODEL, "train"),
    ("inject", BASELINE, f"{RUN}/ranges.csv", "ranges"),
    ("inject", BASELINE, f"{RUN}/activations.csv", "ranges"),
    ("closeup", BASELINE, f"{RUN}/ranges.csv", "ranges"),
    ("closeup", BASELINE, f"{RECORDS}/injections.parquet", "inject"),
    ("results", None, f"{RUN}/evaluation.json", "evaluate"),
    ("results", None, f"{RUN}/ranges.csv", "ranges"),
    ("results", None, f"{RUN}/campaign.json", "inject"),
    ("results", None, f"{RECORDS}/injections.parquet", "inject"),
    ("results", None, f"{RECORDS}/detectors.parquet", "inject"),
    ("results", None, f"{RECORDS}/predictions.parquet", "evaluate"),
    ("tables", None, f"metrics/results/{BASELINE}.json", "results"),
    ("tables", None, "metrics/cells.json", "results"),
    ("tables", None, f"metrics/closeup/{BASELINE}.json", "closeup"),
    ("figures", None, f"metrics/closeup/{BASELINE}.parquet", "closeup"),
    pytest.param("train", BASELINE, "data/digits/classes.json", "data"),
]


@pytest.mark.parametrize(("stage", "key", "name", "maker"), MISSING)
def test_a_missing_file_is_named_with_the_stage_that_makes_it(grid, stage, key, name, maker):
    (grid.folder / name).unlink()
    if not key:
        grid.change(f"runs.{GUIDED}", REMOVED)  # which never ran
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
    save_class_embeddings(grid.folder / EMBEDDINGS, spoil(embeddings()))
    says(grid.fails("train", GUIDED), "InvalidEmbeddings", EMBEDDINGS, "dvc repro", *parts)


def test_texts_that_belong_to_other_class_embeddings_are_refused(grid):
    name = f"embeddings/{TEXT}.texts.safetensors"
    for texts in (torch.arange(19), torch.arange(20) + 1):
        write_safetensors(grid.folder / name, {"vectors": torch.ones(len(texts), WIDTH), "rows": texts})
        says(grid.fails("text_quality", TEXT), "InvalidArtifact", name, "other texts", "'embeddings'")


def test_other_tensors_are_no_class_embeddings(grid):
    write_safetensors(grid.folder / EMBEDDINGS, {"weights": torch.zeros(2)})
    says(grid.fails("train", GUIDED), "InvalidEmbeddings", EMBEDDINGS, "no class embeddings", "'embeddings'")


@pytest.mark.parametrize("content", ["{}", '{"width": "wide"}', "[]", '{"width": 3'])
def test_an_encoder_file_without_a_width_is_refused(grid, content):
    grid.change(f"runs.{BASELINE}.variant", "random")
    grid.change(f"runs.{BASELINE}.head_from", "embeddings/encoder.json")
    grid.change("figures.colours.random", "#000000")
    grid.put("embeddings/encoder.json", content)
    says(grid.fails("train", BASELINE), "InvalidArtifact", "embeddings/encoder.json", "'encoder'")


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
    "no table": (lambda _: "\x00\x01", ["lacks the columns layer, max_abs"]),
    "empty": (lambda _: "", ["cannot be read", "EmptyDataError"]),
    "no maximum": (lambda table: table[["layer"]].to_csv(index=False), ["lacks the columns max_abs"]),
    "words": (without_numbers("large"), ["ValueError"]),
    "blanks": (without_numbers(""), ["max_abs that is no finite number"]),
}


@pytest.mark.parametrize(
    ("spoil", "parts"),
    RANGES.values(),
    ids=RANGES,
)
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


@pytest.mark.parametrize("number", ["0", "two", "9999"])
def test_a_wrong_number_of_processes_is_named(grid, number):
    says(grid.fails("inject", BASELINE, TEXTGUARD_PROCESSES=number), f"TEXTGUARD_PROCESSES='{number}'", "1 to 1024")


RESULTS = {
    "truncated": ("campaign.json", '{"layers": [', "inject"),
    "other keys": ("campaign.json", "{}", "inject"),
    "no object": ("campaign.json", "[1]", "inject"),
    "no layers": ("campaign.json", '{"layers": [], "detectors": [], "exact": {}, "strata": 0, "bits": 32}', "inject"),
    "evaluation": ("evaluation.json", '{"top1": 0.5}', "evaluate"),
    "no range of the last layer": ("ranges.csv", "layer,max_abs,mean_abs,images\nconv1,1,1,1\n", "ranges"),
}


@pytest.mark.parametrize(
    ("name", "content", "maker"),
    RESULTS.values(),
    ids=RESULTS,
)
def test_damaged_results_are_named(grid, name, content, maker):
    grid.put(f"{RUN}/{name}", content)
    says(grid.fails("results"), "InvalidArtifact", f"{RUN}/{name}", f"'{maker}'", "delete it")


PLANS = {
    "few for each bit": ({"plan": "proportional"}, "injections_per_layer is 4; a plan by bit needs 2 for each of 32 bits"),
    "small pilot": (
        {"plan": "neyman", "pilot": 8, "injections_per_layer": 99},
        "pilot is 8; a plan by bit needs 2 for each of 32 bits",
    ),
    "several bits": (
        {"plan": "neyman", "injections_per_layer": 99, "faults.bits": 2},
        "only faults of one bit in one value can be planned by bit",
    ),
    "no end": ({"stop_at": "soon"}, "stop_at is 'soon'; allowed: never, a half-width in nats as 0.001, or in percent"),
    "negative end": ({"stop_at": "-5%"}, "stop_at is '-5%'; allowed"),
    "other detector": ({"compare_detectors": ["tmr"]}, "detector 'tmr'"),
    "negative detector": ({"compare_detectors": ["fixed:-1"]}, "'fixed:-1'; X must be an fp32 number above 0"),
}


@pytest.mark.parametrize(("settings", "message"), PLANS.values(), ids=PLANS)
def test_plans_that_cannot_be_carried_out_are_named(grid, settings, message):
    for name, value in settings.items():
        grid.change(f"inject.{name}", value)
    says(grid.fails("inject", BASELINE), message)


@pytest.mark.parametrize("policy", ["drop", "cap:0", "cap:"])
def test_an_unknown_policy_for_non_finite_losses_is_named(grid, policy):
    grid.change("statistics.nonfinite", policy)
    says(grid.fails("results"), f"statistics.nonfinite is '{policy}'", "goldeneye, or cap:X")


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


def a_file_for_a_folder(grid: Grid) -> None:
    shutil.rmtree(grid.folder / "data")
    grid.put("data", "a file")


def a_folder_for_a_file(grid: Grid) -> None:
    (grid.folder / OUTPUTS[0]).unlink()
    (grid.folder / OUTPUTS[0]).mkdir()


@pytest.mark.parametrize("block", [a_file_for_a_folder, a_folder_for_a_file])
def test_something_in_the_way_of_an_output_is_named(grid, block):
    block(grid)
    says(grid.fails("data", "digits"), "CannotWrite", OUTPUTS[0], "nothing was written", "work in another one")


def test_something_in_the_way_of_the_partial_results_is_named(grid):
    grid.put(".work", "a file")
    says(grid.fails("train", BASELINE), "CannotWrite", f".work/train/{BASELINE}")


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, SMALL_FILE))


def obey_permissions() -> None:
    """Take from root what lets it write to read-only folders."""
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot drop CAP_DAC_OVERRIDE")


def put_older(grid: Grid) -> None:
    """Leave other files where stage `data` writes, all of the digits this time."""
    grid.change("datasets.digits.limit_train", 0)
    for name in OUTPUTS:
        grid.put(name, f"an older {name}")


def assert_only_older(grid: Grid) -> None:
    """The files of put_older are as they were, and nothing lies beside them."""
    files = [path for path in (grid.folder / "data" / "digits").rglob("*") if path.is_file()]
    found = {str(path.relative_to(grid.folder)): path.read_text() for path in files}
    assert found == {name: f"an older {name}" for name in OUTPUTS}


def test_a_file_size_limit_leaves_the_older_files(grid):
    put_older(grid)
    line = fails_in_one_line(grid.start("data", "digits", preexec_fn=limit_file_size))
    says(line, "CannotWrite", OUTPUTS[0], "File too large", "nothing was written", "ulimit -f")
    assert_only_older(grid)


def test_a_read_only_folder_leaves_the_older_files(grid):
    put_older(grid)
    folder = (grid.folder / OUTPUTS[0]).parent
    folder.chmod(0o555)
    try:
        done = grid.start("data", "digits", preexec_fn=obey_permissions)
    except subprocess.SubprocessError:
        pytest.skip("root writes to read-only folders, and cannot give that up here")
    finally:
        folder.chmod(0o755)
    line = fails_in_one_line(done)
    says(line, "CannotWrite", OUTPUTS[0], "Permission denied", "nothing was written", "make the folder writable")
    assert_only_older(grid)


@pytest.fixture
def small_disk(grid: Grid) -> Iterator[None]:
    """A file system of a few kilobytes where stage `data` writes."""
    folder = grid.folder / "data" / "digits"
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_older_files(grid, small_disk):
    put_older(grid)
    line = fails_in_one_line(grid.start("data", "digits"))
    says(line, "CannotWrite", OUTPUTS[0], "No space left on device", "nothing was written", "free space")
    assert_only_older(grid)


WHOLE = {
    "parameters": ("inject.injections_per_layer", 0, ["check"], ["injections_per_layer", "greater than 0"]),
    "campaign": ("inject.detector", "fixed:ten", ["inject", BASELINE], ["'fixed:ten'", "number above 0"]),
}


@pytest.mark.parametrize(("place", "value", "arguments", "parts"), WHOLE.values(), ids=WHOLE)
def test_a_process_of_its_own_prints_nothing_else(grid, place, value, arguments, parts):
    grid.change(place, value)
    before = grid.files()
    says(fails_in_one_line(grid.start(*arguments)), "params.yaml", *parts)
    assert grid.files() == before


def test_a_process_of_its_own_names_a_truncated_classifier(grid):
    grid.cut(MODEL)
    before = grid.files()
    says(fails_in_one_line(grid.start("evaluate", BASELINE)), "InvalidArtifact", MODEL, "'train'")
    assert grid.files() == before
