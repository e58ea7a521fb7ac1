"""What hostile input must never do to a stage: the grid that it is tried on, the inputs, and what is asked of every run.

A run that takes an input ends with exit code 0 and sane outputs, and a run that refuses it with one line and all files as they
were. No run hangs, leaves temporary files, writes outside of the grid, or does what a file says. See tests/fuzz.py.
"""

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load

import mutations
from answer_server import SECRET, Handler, Server
from fuzz_server import REPOSITORY, Reply, Request
from mutations import MARKER, NUMBERS, SPECIALS, TEXTS, Choices, Raw, put, replayed
from textguard.errors import TextguardError
from textguard.schema.campaign import StoredCampaign
from textguard.schema.closeup import CloseUp
from textguard.schema.evaluation import Evaluation
from textguard.schema.results import Cell, RunResult
from textguard.schema.texts import TextQuality
from textguard.schema.times import RunTimes
from textguard.text.cache import StoredAnswer, answer_key, to_line

RUN, GUIDED, OWN = "digits-net-baseline-0", "digits-net-descriptions-0", "own-net-baseline-0"
TEXT = "digits-descriptions"
GATE = "gate base metrics/results"
PER_RUN = ("train", "evaluate", "ranges", "inject", "hardware", "closeup")
# Everything that a finished grid of two data sets, two variants and one seed needs, in order.
BUILD = [
    *("check", "data digits", "data own", "recipes"),
    *(
        f"{stage} {data}-descriptions"
        for data in ("digits", "own")
        for stage in ("prompts", "responses", "embeddings", "text_quality")
    ),
    *("prompts digits-published", "responses digits-published", "prompts digits-featured", "responses digits-featured"),
    *("embeddings digits-featured", "prompts digits-asked", "responses digits-asked"),
    *("heads digits", "heads own"),  # which start from texts
    *(f"{stage} {run}" for run in (RUN, GUIDED, OWN, "own-net-descriptions-0") for stage in PER_RUN),
    *("results", "effects", "tables", "figures", "report", GATE),
]
SECONDS = 20.0  # beside ten times what the command takes undisturbed
LONGEST_LINE = 1000
ERRORS = {kind.__name__ for kind in TextguardError.__subclasses__()} | {"OutOfMemory", "BudgetExhausted", "UnreadableImage"}
PROGRESS = re.compile(rf"({'|'.join({command.split()[0] for command in BUILD})}|enumerate|download|resume)\b[^\n]*:")
SCHEMAS = {
    r"metrics/runs/[^/]+/evaluation\.json": Evaluation,
    r"metrics/runs/[^/]+/campaign\.json": StoredCampaign,
    r"metrics/closeup/[^/]+\.json": CloseUp,
    r"metrics/results/[^/]+\.json": RunResult,
    r"metrics/cells\.json": list[Cell],
    r"metrics/texts/[^/]+\.json": TextQuality,
    r"metrics/run\.json": RunTimes,
}
SHARES = ("top1", "top2diff", "sdc", "mismatch", "nonfinite", "overlap")

Spoil = Callable[[bytes, Choices], bytes]


@dataclass(frozen=True)
class Target:
    """A file that stages read: how it is spoiled, and the commands that read it."""

    file: str
    spoil: Spoil
    commands: tuple[str, ...]
    before: Callable[[Path], None] = lambda folder: None  # after the file was spoiled, before the command


@dataclass
class Example:
    """One hostile input. variables: of the environment. expensive: it may rightly take longer than there is time."""

    command: str
    variables: dict[str, str] = field(default_factory=dict)
    swapped: bool = False
    expensive: bool = False


@dataclass
class Fault:
    """Something that must not happen. signature: faults of one signature are one. numbers: the choices that repeat it."""

    kind: str
    signature: str
    told: str
    numbers: list[int]
    said: list[str]
    times: int = 1


def seal(row: dict[str, Any]) -> str:
    """A stored answer as a line, with the right checksum where there can be one."""
    row.pop("checksum", None)
    try:
        return to_line(StoredAnswer(**row)).decode().removesuffix("\n")
    except (TypeError, ValueError):
        return mutations.dumps(row)


def _weights(source: str) -> Callable[[Path], None]:
    """Have the first variant's weights come from a file."""

    def change(folder: Path) -> None:
        from hashlib import sha256

        file = folder / source.removeprefix("published:")
        digest = sha256(file.read_bytes()).hexdigest() if file.is_file() else "0" * 64
        params = json.loads((folder / "params.yaml").read_text(encoding="utf-8"))
        params["weights"] = {"net-baseline": {"source": source, "sha256": digest}}
        put(folder / "params.yaml", json.dumps(params).encode())

    return change


JSON, LINES, CSV, PARQUET, TENSORS = (
    mutations.spoil_json,
    mutations.spoil_lines,
    mutations.spoil_csv,
    mutations.spoil_parquet,
    mutations.spoil_safetensors,
)
RUNS, RECORDS = f"metrics/runs/{RUN}", f"metrics/records/{RUN}"
TARGETS: dict[str, list[Target]] = {
    "own pictures": [
        Target("pictures/cat/0.png", mutations.spoil_picture, ("data own",)),
        Target("pictures/classes.json", JSON, ("data own",)),
    ],
    "classes": [Target("data/digits/classes.json", JSON, (f"prompts {TEXT}", "heads digits", f"embeddings {TEXT}"))],
    "packed images": [
        Target("data/digits/test/images.safetensors", TENSORS, (f"evaluate {RUN}", f"inject {RUN}", f"closeup {RUN}")),
        Target("data/digits/train/images.safetensors", TENSORS, (f"ranges {RUN}", f"train {RUN}")),
    ],
    "indexed images": [
        Target("data/own/test/index.parquet", PARQUET, (f"evaluate {OWN}", f"inject {OWN}")),
        Target("data/own/train/index.parquet", PARQUET, (f"ranges {OWN}", f"train {OWN}")),
        Target("pictures/dog/1.png", mutations.spoil_picture, (f"ranges {OWN}", f"train {OWN}")),
    ],
    "questions": [Target(f"prompts/texts/{TEXT}/questions.jsonl", LINES, (f"responses {TEXT}",))],
    "answers": [Target(f"prompts/texts/{TEXT}/responses.jsonl", LINES, (f"embeddings {TEXT}", f"text_quality {TEXT}"))],
    "stored answers": [
        Target("prompts/cache/digits.jsonl", LINES, (f"responses {TEXT}",)),
        Target("prompts/cache/digits.jsonl", partial(LINES, seal=seal), (f"responses {TEXT}",)),
        Target("prompts/live/answers.jsonl", partial(LINES, seal=seal), ("responses digits-asked",)),
    ],
    "published texts": [Target("published/digits.json", JSON, ("responses digits-published",))],
    "text features": [Target("features/digits.pth", mutations.spoil_pth, ("embeddings digits-featured",))],
    "class embeddings": [
        Target("embeddings/digits/descriptions.safetensors", TENSORS, (f"text_quality {TEXT}", "heads digits")),
        Target("embeddings/digits/descriptions.texts.safetensors", TENSORS, (f"text_quality {TEXT}",)),
        Target("models/heads/digits/baseline.safetensors", TENSORS, (f"train {RUN}",)),
        Target("models/heads/digits/descriptions.safetensors", TENSORS, (f"train {GUIDED}",)),
    ],
    "classifiers": [
        Target(f"models/{RUN}.safetensors", TENSORS, (f"evaluate {RUN}", f"ranges {RUN}", f"inject {RUN}")),
        Target(f"models/{GUIDED}.safetensors", TENSORS, (f"evaluate {GUIDED}", f"closeup {GUIDED}")),
    ],
    "weights from elsewhere": [
        Target("foreign/net.pth", mutations.spoil_pth, (f"train {RUN}",), _weights("published:foreign/net.pth")),
        Target("foreign/net.safetensors", TENSORS, (f"train {RUN}",), _weights("foreign/net.safetensors")),
    ],
    "ranges": [
        Target(f"{RUNS}/ranges.csv", CSV, (f"inject {RUN}", "results", f"closeup {RUN}")),
        Target(f"{RUNS}/activations.csv", CSV, (f"inject {RUN}", f"closeup {RUN}")),
    ],
    "records": [
        Target(f"{RUNS}/evaluation.json", JSON, ("results",)),
        Target(f"{RUNS}/campaign.json", JSON, ("results",)),
        Target(f"{RECORDS}/injections.parquet", PARQUET, ("results", f"closeup {RUN}")),
        Target(f"{RECORDS}/detectors.parquet", PARQUET, ("results",)),
        Target(f"{RECORDS}/predictions.parquet", PARQUET, ("results",)),
    ],
    "results": [
        Target(f"metrics/results/{GUIDED}.json", JSON, ("tables", "report", GATE)),
        Target("metrics/cells.json", JSON, ("tables", "report")),
        Target("metrics/summary.json", JSON, ("report",)),
        Target(f"metrics/closeup/{RUN}.json", JSON, ("tables",)),
        Target(f"metrics/texts/{TEXT}.json", JSON, ("report", "tables")),
        Target(f"metrics/texts/{TEXT}.csv", CSV, ("report",)),
    ],
    "what is shown": [
        Target("plots/figures/layers-digits-net.csv", CSV, ("report",)),
        Target(f"plots/texts/{TEXT}/similarity.csv", CSV, ("report",)),
        Target("plots/figures/layers-digits-net.svg", mutations.spoil_bytes, ("report",)),
        Target(f"prompts/texts/{TEXT}/responses.jsonl", LINES, ("report",)),
    ],
    "gate": [
        Target(f"base/{RUN}.json", JSON, (GATE,)),
        Target(f"metrics/results/{RUN}.json", JSON, (GATE,)),
    ],
    "figures": [
        Target(f"{RUNS}/training.csv", CSV, ("figures",)),
        Target(f"{RUNS}/thresholds.csv", CSV, ("figures",)),
        Target(f"{RUNS}/ranges.csv", CSV, ("figures",)),
        Target(f"metrics/closeup/{RUN}.json", JSON, ("figures",)),
        Target(f"metrics/looks/{RUN}.parquet", PARQUET, ("figures",)),
        Target(f"metrics/results/{RUN}.json", JSON, ("figures",)),
        Target("metrics/cells.json", JSON, ("figures",)),
        Target(f"metrics/texts/{TEXT}.json", JSON, ("figures",)),
    ],
}
# Files that say nothing of whose they are, so that their swap cannot be told. Of weights, params.yaml states the hash.
UNTELLABLE = ("data/digits/classes.json", "pictures/", "published/", "features/", "foreign/", "prompts/cache", "metrics/tables")
UNTELLABLE += ("plots/", "metrics/closeup/", "metrics/looks/", "metrics/texts/digits-descriptions.json", "activations.csv")
# Files that earlier stages compare with what they know, and that these only show.
UNTOLD = {("report", "responses.jsonl"), ("results", "ranges.csv"), ("figures", "training.csv")}
SECTIONS = {
    "root": ("data own", f"responses {TEXT}"),
    "encoder": ("heads digits", f"embeddings {TEXT}"),
    "datasets": ("data digits", "data own", f"prompts {TEXT}", f"evaluate {OWN}"),
    "backbones": ("recipes", f"train {RUN}"),
    "variants": ("recipes", "results", "tables"),
    "seeds": ("results", "tables"),
    "weights": ("recipes", f"train {RUN}"),
    "texts": (f"prompts {TEXT}", f"responses {TEXT}", f"embeddings {TEXT}", "responses digits-published"),
    "network": ("responses digits-asked",),
    "inject": (f"inject {RUN}", f"ranges {RUN}", f"closeup {RUN}"),
    "hardware": (f"hardware {RUN}", "tables"),
    "closeup": (f"closeup {RUN}",),
    "statistics": ("results", f"closeup {RUN}"),
    "figures": (f"text_quality {TEXT}",),
    "gate": (GATE,),
}
MACHINE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
VARIABLES = {
    "TEXTGUARD_DEVICE": (f"evaluate {RUN}", f"inject {RUN}", f"embeddings {TEXT}"),
    "TEXTGUARD_PROCESSES": (f"evaluate {RUN}",),
    "TEXTGUARD_WORKERS": (f"evaluate {OWN}", "data own"),
    "TEXTGUARD_CHECKPOINT": (f"train {RUN}",),
    "TEXTGUARD_CHANNELS_LAST": (f"train {RUN}",),
    "TEXTGUARD_COMPILE": (f"train {RUN}",),
    "TEXTGUARD_PROGRESS": (f"evaluate {RUN}", "data own"),
    "TEXTGUARD_DATA": ("data own", "data digits"),
    **dict.fromkeys(MACHINE, (f"evaluate {RUN}", f"inject {RUN}", f"train {RUN}", "data own", "results")),
    **dict.fromkeys(("MASTER_ADDR", "MASTER_PORT"), (f"evaluate {RUN}",)),
    **dict.fromkeys(("OPENAI_API_KEY", "ALL_PROXY", "HTTP_PROXY", "SSL_CERT_FILE", "OPENAI_LOG"), ("responses digits-asked",)),
    **dict.fromkeys(("HOME", "PATH", "TZ", "COLUMNS", "LINES"), ("report", f"evaluate {RUN}")),
}
# They ask for many processes, a compiler, or for processes that nobody starts; all of that is allowed.
ASKS_FOR_MUCH = {name: re.compile(r"0*([1-9]\d+|[2-9])") for name in ("TEXTGUARD_PROCESSES", "TEXTGUARD_WORKERS", "WORLD_SIZE")}
ASKS_FOR_MUCH["TEXTGUARD_COMPILE"] = re.compile("1")
KINDS = (*TARGETS, "own folder", "params.yaml", "environment", "replies")


class Workplace:
    """A finished grid that is put back after every example, the server of stages, and a language model's server."""

    def __init__(self, folder: Path, *, figures: bool = True) -> None:
        self.commands = [command for command in BUILD if figures or command not in ("figures", "report")]
        self.base, self.grid, self.scratch = folder / "base", folder / "grid", folder / "scratch"
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.clean: dict[str, dict[str, bytes]] = {}  # command -> what it writes
        self.took: dict[str, float] = {}
        self.model = Server()
        threading.Thread(target=self.model.serve_forever, daemon=True).start()
        steady = {"OMP_NUM_THREADS": "1", "TEXTGUARD_DEVICE": "cpu", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TEXTGUARD_", "OPENAI_"))}
        self.server = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests" / "fuzz_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={**inherited, **steady, "OPENAI_API_KEY": SECRET, "GOMP_SPINCOUNT": "20000"},
            start_new_session=True,  # Ctrl-C is for the process that asks
        )
        assert self.server.stdout.readline() == "{}\n", "the server of stages does not start"
        self._build()

    def commands_of(self, target: Target) -> list[str]:
        """The commands that read a file, in this grid."""
        return [command for command in target.commands if command in self.commands]

    @property
    def kinds(self) -> list[str]:
        """The kinds of input that this grid can be tried with."""
        return [
            kind for kind in KINDS if any(self.commands_of(target) for target in TARGETS.get(kind, ())) or kind not in TARGETS
        ]

    def close(self) -> None:
        """End both servers."""
        self.server.communicate()
        self.model.shutdown()
        self.model.server_close()

    def run(self, command: str, variables: dict[str, str] | None = None, seconds: float = 0) -> Reply:
        """Run a stage, or the gate, in the grid's folder."""
        first, *rest = command.split()
        seconds = seconds or SECONDS + 10 * self.took[command]
        if first == "gate":
            return self.ask(rest, "textguard.report.gate", seconds, variables)
        return self.ask([first, *rest], "stages.__main__", seconds, variables)

    def ask(self, arguments: list[str], module: str, seconds: float, variables: dict[str, str] | None = None) -> Reply:
        """Have a module's `main` called in the grid's folder."""
        request = Request(arguments, str(self.grid), str(self.scratch), variables or {}, module, seconds)
        print(json.dumps(asdict(request)), file=self.server.stdin, flush=True)
        reply = json.loads(self.server.stdout.readline())
        return Reply(**{**reply, "outside": tuple(reply["outside"])})

    def _build(self) -> None:
        """Run the pipeline, or take the grid that an earlier call left in the same folder."""
        known = self.base.parent / "built.json"
        if known.exists():
            self.took, written = json.loads(known.read_text(encoding="utf-8"))
            self.clean = {
                command: {name: (self.base / name).read_bytes() for name in names} for command, names in written.items()
            }
            shutil.rmtree(self.grid, ignore_errors=True)
            # The language model's server has another address now.
            put(self.base / "params.yaml", json.dumps(parameters(self.model.url)).encode())
            put(self.base / "prompts/live/answers.jsonl", b"")
            shutil.copytree(self.base, self.grid)
            again = ["responses digits-asked", *(command for command in self.commands if command not in self.took)]
        else:
            self.grid.mkdir()
            write_inputs(self.grid, self.model.url)
            again = self.commands
        for command in again:
            if command == "responses own-descriptions":
                _answer_own(self.grid)
            if command == GATE:
                shutil.copytree(self.grid / "metrics/results", self.grid / "base")
            _fit(self.grid, command, self.model.url)
            before = self.files_of(self.grid)
            reply = self.run(command, seconds=600)
            assert reply.code == 0, (command, reply)
            after = self.files_of(self.grid)
            self.took[command] = reply.seconds
            changed = (name for name in after if after[name] != before.get(name) and name != "metrics/run.json")  # times
            self.clean[command] = {name: (self.grid / name).read_bytes() for name in changed}
        put(self.grid / "params.yaml", json.dumps(parameters(self.model.url)).encode())
        model = (self.grid / f"models/{RUN}.safetensors").read_bytes()
        put(self.grid / "foreign/net.safetensors", model)
        torch.save(load(model), self.grid / "foreign/net.pth")
        shutil.rmtree(self.grid / ".work", ignore_errors=True)
        shutil.rmtree(self.base, ignore_errors=True)
        shutil.copytree(self.grid, self.base)
        files = [target.file for targets in TARGETS.values() for target in targets if self.commands_of(target)]
        missing = [file for file in files if not (self.grid / file).exists()]
        assert not missing, missing
        written = {command: list(files) for command, files in self.clean.items()}
        known.write_text(json.dumps([self.took, written]), encoding="utf-8")
        self.states = self.files_of(self.grid)

    @staticmethod
    def files_of(folder: Path) -> dict[str, tuple[int, ...]]:
        """Every file below a folder but partial results, with what changes when it is written."""
        found = {}
        for parent, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if (parent, name) != (str(folder), ".work")]
            for name in [*files, *(name for name in folders if os.path.islink(os.path.join(parent, name)))]:
                path = os.path.join(parent, name)
                state = os.lstat(path)
                found[os.path.relpath(path, folder)] = (state.st_ino, state.st_size, state.st_mtime_ns, state.st_mode)
        return found

    def restore(self) -> None:
        """Make the grid what it was."""
        shutil.rmtree(self.grid / ".work", ignore_errors=True)
        now = self.files_of(self.grid)
        for name in now.keys() - self.states.keys():
            (self.grid / name).unlink()
        wrong = [name for name, state in self.states.items() if now.get(name) != state]
        for name in wrong:
            path = self.grid / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.base / name, path)
        for parent, folders, _ in os.walk(self.grid, topdown=False):
            for name in folders:
                folder = os.path.join(parent, name)
                if not (self.base / os.path.relpath(folder, self.grid)).exists() and not os.listdir(folder):
                    os.rmdir(folder)
        if wrong:
            after = self.files_of(self.grid)
            self.states |= {name: after[name] for name in wrong}
        for file in self.scratch.iterdir():
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        self.model.fault = lambda request, attempt: None


def parameters(url: str) -> dict[str, Any]:
    """The grid's parameters. url: of the language model's server."""
    params = yaml.safe_load((REPOSITORY / "grids/smoke/params.yaml").read_text(encoding="utf-8"))
    digits = {**params["datasets"]["digits"], "limit_train": 60, "limit_test": 40}
    own = {**digits, "source": "folder", "folder": "pictures", "test_share": 0.34, "limit_train": 0, "limit_test": 0}
    question = ["What does {class} look like?"]
    descriptions = {**params["texts"]["descriptions"], "cache": ["prompts/cache/digits.jsonl", "prompts/cache/own.jsonl"]}
    model = {"model": "gpt-4.1-mini", "base_url": url}  # which has a price
    recipe = {**params["backbones"]["resnet18"], "epochs": 1, "warmup_epochs": 0, "batch_size": 20}
    params |= {
        "root": ".",
        "datasets": {"digits": digits, "own": own},
        "backbones": {"net": {"network": "timm:test_resnet", "recipe": "resnet", **recipe}},
        "texts": {
            "descriptions": {**descriptions, "templates": ["a photo of a {class}"]},
            "asked": {"provider": "openai", "questions": question, "model": model},
            "published": {"provider": "import", "questions": question, "cache": ["published/{dataset}.json"]},
            "featured": {"provider": "features", "questions": question, "cache": ["features/{dataset}.pth"]},
        },
        "network": {"concurrency": 4, "timeout_s": 2, "attempts": 2, "backoff_s": 0.001, "max_requests": 50, "max_usd": 1},
        "figures": {"dpi": 50, "colours": {"descriptions": "#123456"}},
        "gate": {"top1_points": 1.0},
    }
    params["inject"] |= {"injections_per_layer": 16, "image_batch": 4, "compare_detectors": ["off"]}
    params["closeup"] |= {"images": 4, "weight_flips": 100}
    params["hardware"] |= {"injections_per_layer": 4}
    return params


def write_inputs(folder: Path, url: str) -> None:
    """Parameters and a person's own files: all that a grid begins with."""
    put(folder / "params.yaml", json.dumps(parameters(url)).encode())
    put(folder / "prompts/cache/digits.jsonl", (REPOSITORY / "prompts/cache/digits.jsonl").read_bytes())
    put(folder / "prompts/cache/own.jsonl", b"")
    classes = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    put(folder / "published/digits.json", json.dumps({name: [f"A {name}."] for name in classes}).encode())
    (folder / "features").mkdir()
    torch.save(torch.eye(10, 12), folder / "features/digits.pth")
    for name, red in (("cat", 40), ("dog", 200)):
        (folder / "pictures" / name).mkdir(parents=True)
        for number in range(6):
            picture = Image.new("RGB", (40, 34), (red, 20 * number, 100))
            picture.save(folder / "pictures" / name / f"{number}.{'png' if number % 2 == 0 or name == 'dog' else 'jpg'}")
    put(folder / "pictures/classes.json", b'{"cat": "cat", "dog": "dog"}')


def _fit(folder: Path, command: str, url: str) -> None:
    """The page wants the quality of all texts; only those of one variant went through all stages."""
    params = parameters(url)
    if command == "report":
        params["texts"] = {"descriptions": params["texts"]["descriptions"]}
    put(folder / "params.yaml", json.dumps(params).encode())


def _answer_own(folder: Path) -> None:
    """Store an answer to every question about the own pictures."""
    asked = [
        json.loads(line)["text"]
        for line in (folder / "prompts/texts/own-descriptions/questions.jsonl").read_text("utf-8").splitlines()
    ]
    rest = ("a person", None, None, None, None, None, None)
    lines = [
        to_line(StoredAnswer(answer_key(text, 0, None), text, 0, *rest, f"About {number}: fur."))
        for number, text in enumerate(asked)
    ]
    put(folder / "prompts/cache/own.jsonl", b"".join(lines))


def example_of(kind: str, place: Workplace, choices: Choices) -> Example:
    """Make the grid hostile."""
    if kind in TARGETS:
        return _hostile_file(kind, place, choices)
    make = {"own folder": _own_folder, "params.yaml": _params, "environment": _environment, "replies": _replies}
    return make[kind](place, choices)


def _hostile_file(kind: str, place: Workplace, choices: Choices) -> Example:
    target = choices.of([target for target in TARGETS[kind] if place.commands_of(target)])
    command = choices.of(place.commands_of(target))
    path = place.grid / target.file
    choices.say(target.file)
    content = path.read_bytes()
    way = choices.of(["format"] * 6 + ["bytes", "bytes", "special", "sibling"])
    if way == "format":
        try:
            put(path, target.spoil(content, choices))
        except Exception as error:  # of a library that refuses to write what is asked
            choices.say("cannot be written:", type(error).__name__)
            put(path, content)
    elif way == "bytes":
        put(path, mutations.spoil_bytes(content, choices))
    elif way == "special":
        name = choices.of(list(SPECIALS))
        choices.say(name)
        put(path, SPECIALS[name])
    elif others := _siblings(place.base, target.file):
        other = choices.of(others)
        choices.say("swapped with", other)
        put(path, (place.base / other).read_bytes())
    _fit(place.grid, command, place.model.url)
    target.before(place.grid)
    swapped = way == "sibling" and not target.file.startswith(UNTELLABLE) and not target.file.endswith(UNTELLABLE)
    swapped = swapped and (command, target.file.rpartition("/")[2]) not in UNTOLD
    return Example(command, swapped=swapped)


def _siblings(base: Path, name: str) -> list[str]:
    """Files of the grid that lie where this one lies, or are called alike beside its folder."""
    path = base / name
    near = [*path.parent.glob(f"*{path.suffix}"), *path.parent.parent.glob(f"*/{path.name}")]
    return sorted({str(file.relative_to(base)) for file in near if file.is_file()} - {name})


def _own_folder(place: Workplace, choices: Choices) -> Example:
    """A folder of pictures with other names, links, pipes or too few files."""
    pictures = place.grid / "pictures"
    source = (pictures / "cat/0.png").read_bytes()
    way = choices.of(
        ["file", "class", "link to a folder", "loop", "pipe", "hidden", "empty class", "bytes", "train", "few", "case"]
    )
    texts = {
        name: text
        for name, text in TEXTS.items()
        if "/" not in text and "\0" not in text and len(text) < 200 and text not in ("", ".")
    }
    name = choices.of(list(texts))
    choices.say(way, name)
    text = os.fsencode(texts[name]) if name != "surrogate" else b"caf\xe9"
    folder = os.fsencode(pictures)
    if way == "file":
        Path(os.fsdecode(folder + b"/cat/" + text + b".png")).write_bytes(source)
    elif way == "class":
        os.rename(folder + b"/cat", folder + b"/" + text)
    elif way == "link to a folder":
        (pictures / "cat/again").symlink_to(choices.of(["../dog", "../..", "/", "/proc"]))
    elif way == "loop":
        for number in range(1 + choices.number(3)):
            (pictures / f"cat/loop{number}").symlink_to(".")
    elif way == "pipe":
        os.mkfifo(pictures / "cat/pipe.png")
    elif way == "hidden":
        (pictures / ".hidden").mkdir()
        (pictures / ".hidden/x.png").write_bytes(source)
    elif way == "empty class":
        (pictures / "eel").mkdir()
    elif way == "bytes":
        Path(os.fsdecode(folder + b"/dog/\xff\xfe.png")).write_bytes(source)
    elif way == "train":
        (pictures / choices.of(["train", "test", "val"])).mkdir()
    elif way == "few":
        for file in list((pictures / "cat").iterdir())[choices.number(2) :]:
            file.unlink()
    else:
        shutil.copytree(pictures / "cat", pictures / choices.of(["Cat", "cat ", "cat_", "c a t"]))
    if choices.number(2):
        (pictures / "classes.json").unlink()
        choices.say("without classes.json")
    return Example("data own")


def _params(place: Workplace, choices: Choices) -> Example:
    """Any place of params.yaml, or its bytes; then whatever reads it."""
    path = place.grid / "params.yaml"
    content = path.read_bytes()
    if choices.number(8) < 7:
        whole = json.loads(content)
        section = choices.of(sorted(whole)) if choices.number(10) else None
        if section is None:
            changed = mutations.spoil_yaml(content, choices)
        else:
            choices.say(section)
            marked = json.dumps({section: whole[section]}).encode()
            part = mutations.spoil_yaml(marked, choices).decode()
            rest = json.dumps({name: value for name, value in whole.items() if name != section})
            changed = (
                rest[:-1] + ", " + part.strip()[1:] if part.strip().startswith("{") and len(part.strip()) > 2 else part
            ).encode()
        put(path, changed)
    else:
        section = None
        put(path, mutations.spoil_bytes(json.dumps(json.loads(content), indent=1).encode(), choices))
    commands = SECTIONS.get(section, ()) or ("results", "tables", f"prompts {TEXT}", "recipes")
    command = choices.of(["check", *commands])
    if command.startswith("gate"):
        command = GATE
    large = any(re.search(r"2\^|10\^|1e308|5000|99\b", word) for word in choices.said)  # of which there may rightly be as many
    return Example(command, expensive=large and command != "check")


def _environment(place: Workplace, choices: Choices) -> Example:
    """One variable of the environment, or two of those that torchrun sets."""
    variables = {}
    names = [choices.of(list(VARIABLES))]
    if names[0] in MACHINE and choices.number(2):
        names.append(choices.of(MACHINE))
    numbers = {
        name: value.text if isinstance(value, Raw) else str(value) for name, value in NUMBERS.items() if name != "10^400"
    }
    texts = {name: text for name, text in TEXTS.items() if name not in ("NUL", "surrogate", "home")}
    devices = {
        name: name
        for name in ("cuda:99", "hpu", "meta", "mps", "cpu:1", "privateuseone", "cuda:-1", "CPU", "socks5://x:1", "ftp://x")
    }
    pool = numbers | devices | texts
    for name in names:
        value = pool[choices.of(list(pool))]
        choices.say(f"{name}={value!r}")
        if name not in ASKS_FOR_MUCH or not ASKS_FOR_MUCH[name].fullmatch(value):
            variables[name] = value
    command = choices.of([command for command in VARIABLES[names[0]] if command in place.commands])
    _fit(place.grid, command, place.model.url)
    return Example(command, variables)


def _replies(place: Workplace, choices: Choices) -> Example:
    """A language model's server that replies with anything."""
    put(place.grid / "prompts/live/answers.jsonl", b"")
    way = choices.of(["tree", "tree", "tree", "bytes", "status", "header"])
    good = {
        "model": "small-2-0901",
        "choices": [{"message": {"role": "assistant", "content": "It is round."}, "finish_reason": "stop"}],
    }
    good["usage"] = {"prompt_tokens": 11, "completion_tokens": 7}
    whole = json.dumps(good).encode()
    status, headers = 200, {}
    if way == "tree":
        whole = mutations.dumps(mutations.in_tree(good, choices)).encode()
    elif way == "bytes":
        whole = mutations.spoil_bytes(whole, choices)
    elif way == "status":
        status = choices.of([201, 204, 301, 302, 307, 400, 401, 403, 404, 408, 413, 418, 422, 429, 451, 500, 503, 599, 999])
        whole = choices.of(
            [b'{"error": {"message": "no", "code": "x"}}', b'{"error": 7}', b'{"error": {"message": {}}}', b"[]", whole]
        )
        choices.say(status, whole)
        headers = {"Location": "http://127.0.0.1:9/v1"} if 300 <= status < 400 else {}
    else:
        headers = choices.of(
            [{"Retry_After": "nan"}, {"Retry_After": "-1"}, {"Content_Encoding": "gzip"}, {"Content_Type": "x"}]
        )
        status = choices.of([200, 429])
        choices.say(headers, status)

    def fault(handler: Handler) -> None:
        handler.send(status, whole, **headers)

    place.model.fault = lambda request, attempt: fault
    return Example("responses digits-asked")


def try_one(kind: str, place: Workplace, choices: Choices) -> tuple[int | None, list[tuple[str, str]]]:
    """Run one example. Returns its exit code and, as (signature, what was seen), whatever must not happen."""
    try:
        example = example_of(kind, place, choices)
        choices.say(example.command)
        before = place.files_of(place.grid)
        reply = place.run(example.command, example.variables)
        return reply.code, list(judge(kind, example, reply, before, place))
    finally:
        place.restore()


def judge(kind: str, example: Example, reply: Reply, before: dict, place: Workplace) -> Iterator[tuple[str, str]]:
    stage = example.command.split()[0]
    lines = [line for line in reply.stderr.splitlines() if line.strip()]
    after = place.files_of(place.grid)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    for seen in reply.outside:
        if not re.match(r"subprocess.Popen (git|uname) ", seen):
            yield f"{stage}: outside: {re.sub('[0-9]+', 'N', seen)[:120]}", seen
    if any(Path(name).name == MARKER for name in after):
        yield f"{stage}: code of a file was run", str(changed)
    if left := [name for name in after if ".tmp" in name and name not in before]:
        yield f"{stage}: left a temporary file", str(left)
    if SECRET in reply.stderr + reply.stdout or any(
        SECRET.encode() in (place.grid / n).read_bytes() for n in changed if n in after
    ):
        yield f"{stage}: showed the key", reply.stderr[-300:]
    if reply.code is None:
        if not example.expensive:
            yield f"{stage}: does not end ({kind})", f"after {reply.seconds:.0f} s: {lines[-1:]}"
        return
    if reply.error:
        yield f"{reply.error} in {reply.place}", reply.stderr[-2000:]
    elif reply.code < 0:
        yield f"{stage}: ends with signal {-reply.code}", reply.stderr[-500:]
    elif reply.code == 0 or (stage == "gate" and reply.code == 1):
        if strays := [line for line in lines if not PROGRESS.match(line)]:
            yield f"{stage}: says {_normal(strays[0])}", "\n".join(strays)
        yield from _judge_outputs(kind, example, changed, place)
    else:
        wanted = 2 if stage == "gate" else 1
        if reply.code != wanted:
            yield f"{stage}: exit code {reply.code} instead of {wanted}", reply.stderr[-500:]
        ends = [line for line in lines if line.partition(":")[0] in ERRORS]
        strays = [line for line in lines if line not in ends and not PROGRESS.match(line)]
        if len(ends) != 1 or strays:
            yield f"{stage}: {len(ends)} error lines and {_normal((strays or ['no other'])[0])}", reply.stderr[-1000:]
        for line in ends:
            if len(line) > LONGEST_LINE:
                yield f"more than {LONGEST_LINE} letters: {_normal(line)[:40]}", f"{len(line)}: {line[:300]}"
            if not line.isprintable():
                yield f"{stage}: a line with control characters", ascii(line)[:500]
        if kept := [name for name in changed if not name.startswith("prompts/live/")]:
            yield f"{stage}: fails and has changed {_normal(kept[0])}", str(kept)


def _normal(text: str) -> str:
    """A line without what differs from run to run."""
    text = re.sub(r"/[^ :]*/", "", text)
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'", "'...'", text))[:100]


def _judge_outputs(kind: str, example: Example, changed: Sequence[str], place: Workplace) -> Iterator[tuple[str, str]]:
    stage = example.command.split()[0]
    usual = place.clean.get(example.command, {})
    for name in changed:
        path = place.grid / name
        if not path.exists():
            yield f"{stage}: removes {name}", name
            continue
        told = _wrong(name, path.read_bytes())
        if told and (name not in usual or told != _wrong(name, usual[name])):
            yield (
                f"{stage} accepts {kind}: {Path(name).name if stage != 'results' else 'a result'}: {_normal(told)}",
                f"{name}: {told[:500]}",
            )
    if example.swapped and any(
        (place.grid / name).read_bytes() != content for name, content in usual.items() if (place.grid / name).exists()
    ):
        yield f"{stage} accepts {kind}: another's file in silence", example.command


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} in JSON")


def _wrong(name: str, content: bytes) -> str:
    """What is damaged or makes no sense in an output file; empty where nothing is."""
    try:
        _check(name, content)
    except Exception as error:  # of the libraries that read it, or our own
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _check(name: str, content: bytes) -> None:
    suffix = Path(name).suffix
    if suffix == ".jsonl" and "/live/" not in name:  # in which damaged lines are left out
        for line in content.decode().removesuffix("\n").split("\n"):
            json.loads(line, parse_constant=_refuse)
    elif suffix == ".json":
        tree = json.loads(content, parse_constant=_refuse)
        for pattern, schema in SCHEMAS.items():
            if re.fullmatch(pattern, name):
                try:
                    TypeAdapter(schema).validate_json(content)
                except ValidationError as error:
                    first = error.errors(include_url=False)[0]
                    raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        _plausible(tree, "", SHARES if re.search(r"evaluation\.json$|/results/", name) else ())
        if name.endswith("evaluation.json") and None in (
            tree["top1"]["value"],
            tree["loss"]["value"],
            tree["top2diff"]["value"],
        ):
            raise ValueError("nothing was measured")
    elif suffix == ".safetensors":
        for tensor_name, tensor in load(content).items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"NaN or infinity in {tensor_name}")
    elif suffix == ".csv":
        if found := re.search(rb"(^|,)-?(nan|inf)(,|$)", content, re.MULTILINE | re.IGNORECASE):
            raise ValueError(f"{found[2].decode()} in a table")
    elif suffix == ".parquet":
        import pyarrow.parquet as pq

        if not len(pq.read_table(io.BytesIO(content))) and "detectors" not in name:
            raise ValueError("no rows")


def _plausible(tree: Any, place: str, shares: Sequence[str]) -> None:
    """Raises ValueError for an interval that does not hold its value, and for one called as a share that is beyond 0 to 1."""
    if isinstance(tree, list):
        for part in tree:
            _plausible(part, place, shares)
    elif isinstance(tree, dict):
        if {"value", "low", "high", "n"} <= tree.keys():
            numbers = [tree[end] for end in ("low", "value", "high") if isinstance(tree[end], int | float)]
            slack = 1e-9 * max((abs(number) for number in numbers), default=0)
            if any(first > second + slack for first, second in itertools.pairwise(numbers)):
                raise ValueError(f"{place}: {numbers[0]:.6g} ... {numbers[-1]:.6g} is no interval around its value")
            if place in shares and any(not -1e-9 <= number <= 1 + 1e-9 for number in numbers):
                raise ValueError(f"{place} is no share")
            if tree["n"] < 0:
                raise ValueError(f"{place}: n below 0")
        for key, part in tree.items():
            _plausible(part, str(key), shares)


class Campaign:
    """Examples of all kinds, how they ended, and the distinct faults."""

    def __init__(self, place: Workplace) -> None:
        self.place = place
        self.faults: dict[str, Fault] = {}
        self.ends: dict[str, Counter[str]] = defaultdict(Counter)

    def round(self, kind: str, number: int, examples: int, *, shrink: bool) -> None:
        """Try so many examples of a kind, drawn from the seed `number`; make those of new faults smaller."""
        known = set(self.faults)

        @seed(number)
        @settings(
            max_examples=examples,
            database=None,
            deadline=None,
            verbosity=Verbosity.quiet,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def run(data: st.DataObject) -> None:
            # A fault does not stop the round, as a failing assertion would. Hypothesis begins each round with zeros.
            self._try(kind, Choices(lambda below: (data.draw(st.integers(0, below - 1)) + number) % below))

        run()
        for signature in self.faults.keys() - known if shrink else ():
            self._shrink(self.faults[signature])

    def _try(self, kind: str, choices: Choices) -> None:
        code, seen = try_one(kind, self.place, choices)
        self.ends[kind]["killed" if code is None else str(code)] += 1
        for signature, told in seen:
            self._note(kind, signature, told, choices)

    def _shrink(self, fault: Fault) -> None:
        """Set one choice after the other to the first that there is, as long as the fault stays."""
        if "does not end" in fault.signature:
            return  # each try would take as long as there is
        for place in range(len(fault.numbers)):
            if place < len(fault.numbers) and fault.numbers[place]:
                fewer = [*fault.numbers[:place], 0, *fault.numbers[place + 1 :]]
                self._try(fault.kind, replayed(fewer))

    def _note(self, kind: str, signature: str, told: str, choices: Choices) -> None:
        known = self.faults.get(signature)
        if known is None:
            self.faults[signature] = Fault(kind, signature, told, list(choices.drawn), list(choices.said))
            return
        known.times += 1
        if kind == known.kind and (len(choices.drawn), choices.drawn) < (len(known.numbers), known.numbers):
            known.told, known.numbers, known.said = told, list(choices.drawn), list(choices.said)

    def table(self) -> str:
        """Examples, exit codes and faults by kind."""
        rows = [f"{'kind':24} {'examples':>8} {'taken':>6} {'refused':>7} {'other':>6} {'faults':>6}"]
        for kind, ends in self.ends.items():
            taken, refused = ends["0"], ends["1"] + ends["2"]
            found = sum(fault.kind == kind for fault in self.faults.values())
            rows.append(f"{kind:24} {ends.total():8} {taken:6} {refused:7} {ends.total() - taken - refused:6} {found:6}")
        return "\n".join(rows)

    def report(self, signatures: Iterable[str]) -> str:
        """These faults, each with its smallest example, and how to repeat it."""
        parts = []
        for fault in (self.faults[signature] for signature in sorted(signatures)):
            again = json.dumps([fault.kind, *fault.numbers])
            end = fault.told.strip().splitlines()[-1:] or [""]
            told = (f"{fault.signature}  ({fault.times} times)", "; ".join(fault.said), end[0][:300], f"REPLAY='{again}'")
            parts.append("\n    ".join(told))
        return "\n".join(parts)


@contextmanager
def workplace(folder: Path, *, figures: bool = True) -> Iterator[Workplace]:
    """A finished grid and its servers in a folder. figures: those, which take the longest, and the page too."""
    place = Workplace(folder, figures=figures)
    try:
        yield place
    finally:
        place.close()
