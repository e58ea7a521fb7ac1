"""params.yaml as typed, frozen dataclasses: one per stage, every key required, unknown keys refused.

There are no defaults in the code: a value that is not in params.yaml could change a result without DVC noticing. A recipe's
fields are in its file of textguard/vision/recipes, which DVC watches as well; params.yaml overrides them.
"""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from textguard.errors import InvalidParameter, UnknownName
from textguard.vision.recipe import Recipe, library_fields

PARAMS_FILE = Path("params.yaml")
UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")
ENCODER_FILE = "embeddings/encoder.json"
PUBLISHED = "published:"

_strict = ConfigDict(extra="forbid", strict=True)
Key = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(gt=0)]
Flag = Literal["duplicate", "too_short", "unnamed", "not_english", "cut", "filtered", "refused"]
Colour = Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")]
Checked = TypeVar("Checked")


@dataclass(frozen=True, config=_strict)
class DatasetParams:
    """How one data set is read and split.

    source, folder: see textguard.vision.datasets.data_root. test_share, split_seed: for sources that come without a split.
    limit_train, limit_test: images kept of each split, stratified; 0 keeps all. checksum: the SHA-256 of every file that is
    left where it is. corrupt_share: of such files, that may be unreadable.
    """

    source: str
    folder: Annotated[str, Field(min_length=1)] | None
    test_share: Annotated[float, Field(gt=0, lt=1)]
    split_seed: Seed
    limit_train: Annotated[int, Field(ge=0)]
    limit_test: Annotated[int, Field(ge=0)]
    checksum: bool
    corrupt_share: Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=_strict)
class LanguageModelParams:
    """A language model, and how it is asked; see textguard.text.language_models.LanguageModel."""

    endpoint: Literal["responses", "chat.completions", "completions"]
    # No name and password, no query: both would carry secrets into hashes and files.
    base_url: Annotated[str, Field(pattern=r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$")]
    model: Annotated[str, Field(min_length=1)]
    system: str | None
    temperature: Annotated[float, Field(ge=0)] | None
    max_tokens: Count
    stop: list[Annotated[str, Field(min_length=1)]]
    seed: Seed | None


@dataclass(frozen=True, config=_strict)
class EmbeddingParams:
    """How texts become class embeddings; see textguard.text.embeddings.EmbeddingOptions."""

    unit_before: bool
    unit_after: bool
    vectors: Literal["encoder", "shuffled", "random", "one_hot"]
    seed: Seed
    template_weight: Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=_strict)
class TextParams:
    """The texts of one data set: D questions per class, and who answers them.

    questions: templates, of which the first `limit_questions` are asked (0: all). context, phrases: see
    textguard.text.questions.Wording. samples: answers per question. provider, model: see textguard.text.responses. cache:
    files with stored answers or published descriptions, relative to the repository's root. templates: texts that stand for
    themselves, beside the answers. drop: which flags keep a text out of the embeddings; see textguard.text.cleaning.
    """

    dataset: Key
    questions: Annotated[list[str], Field(min_length=1)]
    limit_questions: Annotated[int, Field(ge=0)]
    context: str
    phrases: dict[str, str]
    samples: Count
    provider: str
    model: LanguageModelParams | None
    cache: list[str]
    templates: list[str]
    drop: list[Flag]
    embedding: EmbeddingParams


@dataclass(frozen=True, config=_strict)
class NetworkParams:
    """How language models are asked; see textguard.text.language_models.Network.

    Changes no answer, so no stage depends on it: `dvc repro` runs nothing when it changes.
    """

    concurrency: Annotated[int, Field(ge=1, le=256)]
    timeout_s: Annotated[float, Field(gt=0)]
    attempts: Annotated[int, Field(ge=1, le=100)]
    backoff_s: Annotated[float, Field(ge=0)]
    max_requests: Annotated[int, Field(ge=0)] | None
    max_usd: Annotated[float, Field(ge=0)] | None


@dataclass(frozen=True, config=_strict)
class RunParams:
    """One classifier of the grid.

    head_from: the file that its last layer starts from (see `head_source`), or published text features (.pth). checkpoint: null
    to train it, or where its weights come from; see textguard.vision.checkpoints.
    """

    dataset: Key
    backbone: str
    variant: str
    recipe: str
    seed: Seed
    head_from: str
    checkpoint: str | None

    @property
    def checkpoint_file(self) -> str | None:
        """The file that the checkpoint names; None for those that name none."""
        name = self.checkpoint or ""
        is_file = name.endswith(".safetensors") or (name.startswith(PUBLISHED) and name.endswith(".pth"))
        return name.removeprefix(PUBLISHED) if is_file else None

    @property
    def told_by_file(self) -> bool:
        """Whether a file of the user's takes the place of the text stages."""
        return bool(self.checkpoint_file) or (self.head_from.endswith(".pth") and self.variant not in ("baseline", "random"))


@dataclass(frozen=True, config=_strict)
class FaultParams:
    """What one injection is; see textguard.faults.damage.FaultModel."""

    target: Literal["neuron", "weight", "metadata"]
    operation: Literal["flip", "stuck_at_0", "stuck_at_1"]
    bits: Count
    values: Count


@dataclass(frozen=True, config=_strict)
class InjectParams:
    """A campaign. batch_size: faults per forward pass. image_batch: images per golden run, and per shard on disk.

    compare_detectors: others that the same faults are set against. plan, injections_per_layer, pilot, stop_at, confidence: see
    textguard.faults.sampling.Design. images: how they are drawn. enumerate_up_to: see textguard.faults.exact.affordable.
    """

    engine: str
    format: str
    detector: str
    compare_detectors: list[str]
    mitigation: Literal["none", "ranger", "clip_to_zero"]
    kinds: Annotated[
        list[Literal["Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "Linear", "MatMul", "Add"]], Field(min_length=1)
    ]
    faults: FaultParams
    plan: Literal["uniform", "proportional", "neyman"]
    images: Literal["uniform", "importance"]
    injections_per_layer: Count
    pilot: Count
    stop_at: str
    confidence: Annotated[float, Field(ge=0.5, lt=1)]
    enumerate_up_to: Annotated[int, Field(ge=0)]
    batch_size: Count
    image_batch: Count
    seed: Seed


@dataclass(frozen=True, config=_strict)
class CloseupParams:
    """What each classifier is looked at with. images: of the test set, the same for all runs. weight_flips: bits flipped at
    once, in different weights. smallest_map: places in a row of a class activation map, at least.
    """

    images: Count
    weight_flips: Count
    smallest_map: Annotated[int, Field(ge=2)]
    seed: Seed


@dataclass(frozen=True, config=_strict)
class StatisticsParams:
    """What is made of the records.

    confidence: of every interval. bootstrap: resamples. nonfinite: `goldeneye` or `cap:X`, see textguard.estimates.summary.
    last_layer_weights: how latent layer and head make one last layer. fit_per_bit: raw failures per bit in 10^9 hours.
    fit_exposure: what holds the bits, neurons or the results of multiply-adds.
    """

    confidence: Annotated[float, Field(ge=0.5, lt=1)]
    bootstrap: Annotated[int, Field(ge=200, le=100_000)]
    nonfinite: str
    last_layer_weights: Literal["neurons", "equal", "head_only"]
    fit_per_bit: Annotated[float, Field(gt=0)]
    fit_exposure: Literal["neurons", "multiply_adds"]


@dataclass(frozen=True, config=_strict)
class TablesParams:
    """main_dataset: the data set of Table 1."""

    main_dataset: Key


@dataclass(frozen=True, config=_strict)
class FiguresParams:
    """colours: variant -> #rrggbb. dpi: dots per inch of the PNG files."""

    colours: dict[str, Colour]
    dpi: Annotated[int, Field(ge=50, le=600)]


@dataclass(frozen=True, config=_strict)
class GateParams:
    """When `textguard.report.gate` calls a run worse: by more than a tolerance, and significantly so.

    top1_points: percentage points of accuracy. delta_loss_percent, sdc_percent, improvement_percent: of the base's value.
    significance: the chance that a comparison of two equal sets of runs calls anything worse.
    """

    top1_points: Annotated[float, Field(ge=0, le=100)]
    delta_loss_percent: Annotated[float, Field(ge=0)]
    sdc_percent: Annotated[float, Field(ge=0)]
    improvement_percent: Annotated[float, Field(ge=0, lt=100)]
    significance: Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, config=_strict)
class Params:
    """The whole params.yaml of one grid. recipes: the library's, with the file's overrides."""

    root: str
    encoder: str
    datasets: dict[Key, DatasetParams]
    texts: dict[Key, TextParams]
    network: NetworkParams
    recipes: dict[Key, Recipe]
    runs: dict[Key, RunParams]
    inject: InjectParams
    closeup: CloseupParams
    statistics: StatisticsParams
    tables: TablesParams
    figures: FiguresParams
    gate: GateParams


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's booleans, as DVC reads and writes them: true and false. In YAML 1.1 "off", a detector, is false."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as PyYAML has it)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check a grid's params.yaml. Raises InvalidParameter or UnknownName, in one line."""
    params = _check(_with_library_recipes(_read(path), path), Params, path)
    _check_references(params, path)
    return params


def load_gate_params(path: Path = PARAMS_FILE) -> GateParams:
    """Read and check section `gate` alone, whatever the other sections hold. Raises InvalidParameter, in one line."""
    content = _read(path)
    if not isinstance(content, dict) or "gate" not in content:
        raise InvalidParameter(f"key 'gate' is missing in {path}; README.md, \"Regression gate\", says what it holds")
    return _check(content["gate"], GateParams, path, "gate")


def _read(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(), _Yaml)
    except FileNotFoundError as error:
        raise InvalidParameter(
            f"{path.resolve()} does not exist; run this in a folder that holds a grid's params.yaml"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InvalidParameter(f"{path} cannot be read as YAML: {error}") from error


def _with_library_recipes(content: Any, path: Path) -> Any:
    """A file's content whose recipes have all fields: the library's, but for those that the file overrides."""
    if not isinstance(content, dict) or not isinstance(content.get("recipes"), dict):
        return content  # refused by the checks that follow
    recipes = {
        name: library_fields(name, f"{path} recipes.{name}") | overrides if isinstance(overrides, dict) else overrides
        for name, overrides in content["recipes"].items()
    }
    return content | {"recipes": recipes}


def library_recipes(params: Params) -> dict[str, dict[str, Any]]:
    """The recipes that the runs use, as the library has them, before params.yaml overrides some fields."""
    return {
        name: library_fields(name, "params.yaml recipes") for name in dict.fromkeys(run.recipe for run in params.runs.values())
    }


def _check(content: Any, kind: type[Checked], path: Path, *section: str) -> Checked:
    """The content of a file, or of one of its sections, as a dataclass."""
    try:
        # As JSON, since a strict dataclass takes no dict in Python: no "1" for 1, no 1 for true, no 0.5 for an integer.
        return TypeAdapter(kind).validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise InvalidParameter(_one_line(error, kind, path, section)) from error


def lookup(entries: dict[str, Any], kind: str, name: str, where: str) -> Any:
    """entries[name]. Raises UnknownName with the known names."""
    if name not in entries:
        raise UnknownName(kind, name, entries, where)
    return entries[name]


def head_source(run: RunParams) -> str:
    """The file a run's last layer starts from: its checkpoint's, published text features, the class list, the encoder's width,
    or the class embeddings of its texts.
    """
    if run.told_by_file:
        return run.checkpoint_file or run.head_from
    if run.variant == "baseline":
        return f"data/{run.dataset}/classes.json"
    if run.variant == "random":
        return ENCODER_FILE
    return f"embeddings/{run.dataset}-{run.variant}.safetensors"


def _check_references(params: Params, path: Path) -> None:
    for key, text in params.texts.items():
        lookup(params.datasets, "data set", text.dataset, f"{path} texts.{key}.dataset")
        if not key.startswith(f"{text.dataset}-"):
            raise InvalidParameter(f"{path} texts.{key}: the key must be '{text.dataset}-VARIANT'")
        if text.limit_questions > len(text.questions):
            given = f"texts.{key}.limit_questions is {text.limit_questions}"
            raise InvalidParameter(f"{path} {given}, but there are {len(text.questions)} questions")
    for key, run in params.runs.items():
        where = f"{path} runs.{key}"
        lookup(params.datasets, "data set", run.dataset, f"{where}.dataset")
        lookup(params.recipes, "recipe", run.recipe, f"{where}.recipe; one of the library needs NAME: {{}} under recipes")
        _check_checkpoint(run, where)
        told = [name.removeprefix(f"{text.dataset}-") for name, text in params.texts.items() if text.dataset == run.dataset]
        if not run.told_by_file:
            lookup(dict.fromkeys(["baseline", "random", *told]), "variant", run.variant, f"{where}.variant")
        lookup(params.figures.colours, "variant", run.variant, f"{where}.variant; colours are in figures.colours")
        if run.head_from != head_source(run):
            what = f"checkpoint {run.checkpoint!r}" if run.checkpoint_file else f"a {run.variant} run on {run.dataset}"
            raise InvalidParameter(f"{where}.head_from is {run.head_from!r}; {what} starts from {head_source(run)!r}")
    lookup(params.datasets, "data set", params.tables.main_dataset, f"{path} tables.main_dataset")


def _check_checkpoint(run: RunParams, where: str) -> None:
    if run.checkpoint not in (None, "torchvision") and not run.checkpoint_file:
        raise InvalidParameter(
            f"{where}.checkpoint is {run.checkpoint!r}; allowed: null, torchvision, published:PATH.pth, PATH.safetensors"
        )
    if run.checkpoint == "torchvision" and run.variant != "baseline":
        raise InvalidParameter(f"{where}.checkpoint is 'torchvision', whose networks are baselines; variant is {run.variant!r}")


def _one_line(error: ValidationError, kind: type, path: Path, section: tuple[str, ...]) -> str:
    """The first problem of a validation, with what is allowed and how many more there are."""
    # A misspelt key is also a missing one: say how it is spelt.
    first, *more = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] not in UNKNOWN_KEY)
    place = ".".join(str(part) for part in (*section, *first["loc"])) or "the file"
    if first["type"] in UNKNOWN_KEY:
        known = _known_keys(TypeAdapter(kind).json_schema(), first["loc"][:-1])
        message = f"unknown key {place!r} in {path}; known: {', '.join(known)}"
    elif first["type"] in ("missing", "missing_argument"):
        message = f"key {place!r} is missing in {path}"
    elif first["type"] == "float_type" and _is_number(first["input"]):
        message = f"{place} is {first['input']} in {path}, which YAML takes for a text; write 0.001 or 1.0e-3, not 1e-3"
    elif first["type"] == "value_error":  # of a dataclass's own check, which names the key
        message = f"{place}.{first['ctx']['error']}, in {path}"
    else:
        message = f"{place} is {json.dumps(first['input'])[:60]} in {path}: {first['msg']}"
    return message + (f" (and {len(more)} more)" if more else "")


def _is_number(text: object) -> bool:
    try:
        return math.isfinite(float(str(text)))
    except ValueError:
        return False


def _known_keys(schema: dict[str, Any], loc: tuple[int | str, ...]) -> list[str]:
    node = schema
    for part in loc:
        patterns = list(node.get("patternProperties", {}).values())
        node = node.get("properties", {}).get(part) or next(iter(patterns), node.get("additionalProperties", {}))
        node = next((kind for kind in node.get("anyOf", []) if "$ref" in kind), node)  # X | None
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]] if "$ref" in node else node
    return sorted(node.get("properties", {}))
