"""params.yaml as typed, frozen dataclasses: one per stage, every key required, unknown keys refused.

Nothing that can change a result has a default in the code, because DVC would not see it. Three sections say only what differs,
`backbones` from the recipe of their family (textguard/vision/recipes), `texts` from the settings of their provider
(textguard/text/providers.yaml), and `treatments` from the baseline (textguard/vision/treatments.yaml): DVC watches these files
as well. What changes no number (`network`, `gate`, colours) has defaults, and a grid may leave it out.
"""

import itertools
import json
import math
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from textguard import strict_yaml
from textguard.artifacts import absolute, expanded
from textguard.errors import InvalidParameter, UnknownName, printable
from textguard.text.providers import FEATURES, check_base_url, with_defaults
from textguard.vision.recipe import FAMILIES, Recipe, library_fields
from textguard.vision.treatment import STARTS, Treatment, library_treatment

PARAMS_FILE = Path("params.yaml")
LARGEST_FILE = 1 << 20  # bytes
MOST_RUNS = 10_000  # of a grid: DVC takes minutes for a tenth of them
MOST_DRAWN = 8  # variants of one figure, where params.yaml names none
UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")
BASELINE, RANDOM = "baseline", "random"  # the variants that no text tells anything
TORCHVISION, PUBLISHED = "torchvision", "published:"

_strict = ConfigDict(extra="forbid", strict=True)
# Parts of names of stages and files: no dot, at which DVC would split them, and nothing that a shell or a file system minds.
# The longest name, DATASET-BACKBONE-VARIANT-SEED.safetensors, stays below 255 characters.
Key = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=60)]
Line = Annotated[str, Field(pattern=r"^[^\n\r]*$", min_length=1, max_length=4000)]  # a path or a name
# The way to the code that every stage runs: nothing that ends the quotes which dvc.yaml puts it in.
Root = Annotated[str, Field(pattern=r"^[^'\n\r]+$", max_length=4000)]
# Upper bounds are far above what anybody runs: they keep numbers out that are slips, or that floats or memory cannot hold.
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(gt=0, le=10**9)]
Limit = Annotated[int, Field(ge=0, le=10**9)]
Batch = Annotated[int, Field(gt=0, le=2**20)]
Confidence = Annotated[float, Field(ge=0.5, le=0.9999)]
Severity = Annotated[int, Field(ge=1, le=5)]
Percent = Annotated[float, Field(ge=0, le=10**6)]
Flag = Literal["duplicate", "too_short", "unnamed", "not_english", "cut", "filtered", "refused"]
Title = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", min_length=1, max_length=60)]  # as tables and figures show it
Pair = Annotated[list[Key], Field(min_length=2, max_length=2)]
Level = bool | int | float | str | None
Levels = Annotated[list[Level], Field(min_length=2, max_length=2)]
Colour = Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")]
Checked = TypeVar("Checked")


def _distinct(values: list[Any]) -> list[Any]:
    if (twice := _repeated(values)) is not None:
        raise PydanticCustomError("distinct", "Input should hold {value} once", {"value": repr(twice)})
    return values


Distinct = AfterValidator(_distinct)


@dataclass(frozen=True, config=_strict)
class DatasetParams:
    """How one data set is read and split, and how its classes are spoken of.

    source, folder: see textguard.vision.datasets.data_root. test_share, split_seed: for sources that come without a split.
    limit_train, limit_test: images kept of each split, stratified; 0 keeps all. checksum: the SHA-256 of every file that is
    left where it is. corrupt_share: of such files, that may be unreadable. orientation: whether such files are turned as their
    EXIF says; see textguard.vision.image_files.decode. context, phrases: see textguard.text.questions.Wording.
    """

    source: Line
    folder: Line | None
    test_share: Annotated[float, Field(gt=0, lt=1)]
    split_seed: Annotated[int, Field(ge=0, lt=2**32)]  # as scikit-learn takes them
    limit_train: Limit
    limit_test: Limit
    checksum: bool
    corrupt_share: Annotated[float, Field(ge=0, lt=1)]
    orientation: Literal["stored", "exif"]
    context: str
    phrases: dict[str, str]


@dataclass(frozen=True, config=_strict)
class LanguageModelParams:
    """A language model, and how it is asked; see textguard.text.language_models.LanguageModel."""

    endpoint: Literal["responses", "chat.completions", "completions"]
    base_url: Annotated[str, AfterValidator(check_base_url)]
    model: Line
    system: str | None
    temperature: Annotated[float, Field(ge=0, le=100)] | None
    max_tokens: Count
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Distinct]
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
    """The texts of one variant: D questions about each class of each data set, and who answers them.

    questions: templates, of which the first `limit_questions` are asked (0: all). samples: answers per question. provider,
    model: see textguard.text.responses. cache: files with stored answers, published descriptions or text features, relative to
    the repository's root, in which {dataset} stands for the data set. templates: texts that stand for themselves, beside the
    answers. drop: which flags keep a text out of the embeddings; see textguard.text.cleaning.
    """

    provider: Line
    questions: Annotated[list[str], Field(min_length=1), Distinct]
    limit_questions: Limit
    samples: Annotated[int, Field(gt=0, le=10_000)]
    model: LanguageModelParams | None
    cache: Annotated[list[Line], Distinct]
    templates: Annotated[list[str], Distinct]
    drop: Annotated[list[Flag], Distinct]
    embedding: EmbeddingParams


@dataclass(frozen=True, config=_strict)
class TreatmentParams(Treatment):
    """A variant that differs from the baseline in its head or its training; see textguard.vision.treatment.Treatment."""


@dataclass(frozen=True, config=_strict)
class NetworkParams:
    """How language models are asked; see textguard.text.language_models.Network.

    Changes no answer, so no stage but `check` runs again when it changes.
    """

    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 60
    attempts: Annotated[int, Field(ge=1, le=100)] = 8
    backoff_s: Annotated[float, Field(ge=0, le=3600)] = 1
    max_requests: Limit | None = 5000
    max_usd: Annotated[float, Field(ge=0, le=10**6)] | None = 5


@dataclass(frozen=True, config=_strict)
class BackboneParams(Recipe):
    """A backbone, and how it is trained.

    network: its name in textguard.vision.backbones, by default the key. recipe: the library's that the other fields come
    from, by default that of the network's family.
    """

    network: Line
    recipe: Line


@dataclass(frozen=True, config=_strict)
class WeightsParams:
    """Weights from elsewhere: where they come from (see textguard.vision.checkpoints), and the SHA-256 of the file."""

    source: Line
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None

    @property
    def file(self) -> str | None:
        """The file that holds them; None for those that torchvision brings."""
        return None if self.source == TORCHVISION else self.source.removeprefix(PUBLISHED)


@dataclass(frozen=True)
class Run:
    """One classifier of the grid: trained, evaluated, profiled, injected."""

    dataset: str
    backbone: str
    variant: str
    seed: int

    @property
    def key(self) -> str:
        """Its name in stages and files, as DVC's matrix forms it."""
        return f"{self.dataset}-{self.backbone}-{self.variant}-{self.seed}"

    @property
    def weights_key(self) -> str:
        """What its weights from elsewhere, if any, are called in params.yaml."""
        return f"{self.backbone}-{self.variant}"


@dataclass(frozen=True)
class ClassTexts:
    """What one text variant says of the classes of one data set. files: TextParams.cache, for this data set."""

    dataset: str
    variant: str
    params: TextParams

    @property
    def key(self) -> str:
        """Its name in stages and files."""
        return f"{self.dataset}-{self.variant}"

    @property
    def files(self) -> list[str]:
        """The files that answers come from, relative to the repository's root."""
        return [file.replace("{dataset}", self.dataset) for file in self.params.cache]

    @property
    def features(self) -> str | None:
        """The file of published text features that takes the place of encoded texts; None where texts are encoded."""
        return self.files[0] if self.params.provider == FEATURES else None

    @property
    def row_map(self) -> str | None:
        """The file that says which of those features stand for each class; None where each class has its own row."""
        return self.files[1] if self.params.provider == FEATURES and len(self.files) == 2 else None


@dataclass(frozen=True, config=_strict)
class FaultParams:
    """What one injection is; see textguard.faults.damage.FaultModel."""

    target: Literal["neuron", "weight", "metadata"]
    operation: Literal["flip", "stuck_at_0", "stuck_at_1"]
    bits: Annotated[int, Field(gt=0, le=64)]
    values: Annotated[int, Field(gt=0, le=10**6)]
    pattern: Literal["value", "adjacent", "channel", "row", "column", "block"]
    block: Annotated[list[Annotated[int, Field(gt=0, le=10**6)]], Field(min_length=2, max_length=2)]
    damage: Literal["equal", "random"]
    lasts: Literal["inference", "forever"]


@dataclass(frozen=True, config=_strict)
class InjectParams:
    """A campaign. batch_size: faults per forward pass. image_batch: images per golden run, and per shard on disk.

    compare_detectors: others that the same faults are set against. plan, injections_per_layer, pilot, stop_at, confidence: see
    textguard.faults.sampling.Design. images: how they are drawn. enumerate_up_to: see textguard.faults.exact.affordable.
    """

    engine: Line
    format: Line
    detector: Line
    compare_detectors: Annotated[list[Line], Distinct]
    mitigation: Literal["none", "ranger", "clip_to_zero", "learned"]
    kinds: Annotated[
        list[
            Literal[
                *("Conv1d", "Conv2d", "Conv3d", "Linear", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Bilinear"),
                *("Recurrent", "Embedding", "MatMul", "Add", "LayerNorm", "BatchNorm", "GroupNorm", "Softmax", "Activation"),
                "Pool",
            ]
        ],
        Field(min_length=1),
        Distinct,
    ]
    faults: FaultParams
    plan: Literal["uniform", "proportional", "neyman", "guided"]
    images: Literal["uniform", "importance", "shared"]
    injections_per_layer: Count
    pilot: Count
    stop_at: Line
    confidence: Confidence
    enumerate_up_to: Annotated[int, Field(ge=0, le=10**12)]
    batch_size: Batch
    image_batch: Batch
    seed: Seed


@dataclass(frozen=True, config=_strict)
class HardwareParams:
    """Other faults that all runs are compared under, see docs/faults.md.

    models: name -> what one fault is; what a file leaves out is that of inject.faults. injections_per_layer: of each of them.
    images: of the test set, that faults which stay are seen on; 0 for all. faults_per_place: of those, in each stored tensor or
    layer. rates: bit errors per stored bit. memories: draws of all bit errors, for each rate. protections: of the words that
    hold the parameters. mitigations: of neurons, each under the faults of inject.faults without a range detector.
    """

    models: dict[Key, FaultParams]
    injections_per_layer: Count
    images: Limit
    faults_per_place: Count
    rates: Annotated[list[Annotated[float, Field(gt=0, le=0.5)]], Distinct]
    memories: Annotated[int, Field(ge=2, le=10**6)]
    protections: Annotated[list[Line], Distinct]
    mitigations: Annotated[list[Literal["ranger", "clip_to_zero", "learned"]], Distinct]
    seed: Seed


@dataclass(frozen=True, config=_strict)
class CorruptionsParams:
    """Corrupted images that classifiers are tested on, with faults and without; see textguard.vision.corruptions.

    datasets: those of the grid that are studied; of others nothing is run. campaign_severities: those of each kind under which
    faults are injected too. injections_per_layer: of each of these campaigns, and of the one on clean images beside them.
    seed: of noise.
    """

    datasets: Annotated[list[Key], Distinct]
    kinds: Annotated[list[Literal["noise", "blur", "contrast", "brightness", "jpeg"]], Field(min_length=1), Distinct]
    severities: Annotated[list[Severity], Field(min_length=1), Distinct]
    campaign_severities: Annotated[list[Severity], Distinct]
    injections_per_layer: Count
    seed: Seed


@dataclass(frozen=True, config=_strict)
class HeadParams:
    """How a text-guided head is deployed. fold_scale: whether faults hit it with its scale in its weights, see
    textguard.vision.folding.
    """

    fold_scale: bool


@dataclass(frozen=True, config=_strict)
class CloseupParams:
    """What each classifier is looked at with. images: of the test set, the same for all runs; 0 for no maps. weight_flips: bits
    flipped at once, in different weights. smallest_map: places in a row of a class activation map, at least.
    """

    images: Limit
    weight_flips: Count
    smallest_map: Annotated[int, Field(ge=2, le=4096)]
    seed: Seed


@dataclass(frozen=True, config=_strict)
class StatisticsParams:
    """What is made of the records.

    confidence: of every interval. bootstrap: resamples. nonfinite: `goldeneye` or `cap:X`, see textguard.estimates.summary.
    last_layer_weights: how latent layer and head make one last layer. fit_per_bit: raw failures per bit in 10^9 hours.
    fit_exposure: what holds the bits, neurons or the results of multiply-adds.
    """

    confidence: Confidence
    bootstrap: Annotated[int, Field(ge=200, le=100_000)]
    nonfinite: Line
    last_layer_weights: Literal["neurons", "equal", "head_only"]
    fit_per_bit: Annotated[float, Field(gt=0, le=10**12)]
    fit_exposure: Literal["neurons", "multiply_adds"]


@dataclass(frozen=True, config=_strict)
class EffectsParams:
    """Which effects stage `effects` estimates. contrasts: name -> a variant, and the one that it is set against.

    factors, design: of a factorial design. factors: field of a treatment, with dots where it lies deeper -> its low and its
    high level. design: the treatments that make it.
    """

    contrasts: dict[Title, Pair]
    factors: dict[Title, Levels]
    design: Annotated[list[Key], Distinct]


@dataclass(frozen=True, config=_strict)
class FiguresParams:
    """dpi: dots per inch of the PNG files. colours: variant -> #rrggbb, where it is not textguard.report.theme's. shown: the
    variants that figures with a mark or line for each variant show, beside the baseline; see `Params.drawn`.
    """

    dpi: Annotated[int, Field(ge=50, le=600)]
    colours: dict[Key, Colour] = field(default_factory=dict)
    shown: Annotated[list[Key], Distinct] = field(default_factory=list)


@dataclass(frozen=True, config=_strict)
class GateParams:
    """When `textguard.report.gate` calls a run worse: by more than a tolerance, and significantly so.

    top1_points: percentage points of accuracy. delta_loss_percent, sdc_percent (also of mismatch): of the base's value.
    significance: the chance that a comparison of two equal sets of runs calls anything worse.
    """

    top1_points: Annotated[float, Field(ge=0, le=100)] = 1.0
    delta_loss_percent: Percent = 10
    sdc_percent: Percent = 10
    significance: Annotated[float, Field(gt=0, lt=1)] = 0.01


@dataclass(frozen=True, config=_strict)
class Params:
    """The whole params.yaml of one grid, whose runs are all combinations of data set, backbone, variant and seed.

    weights: of all runs of one BACKBONE-VARIANT, that are not trained then.
    """

    root: Root
    encoder: Line
    datasets: Annotated[dict[Key, DatasetParams], Field(min_length=1)]
    backbones: Annotated[dict[Key, BackboneParams], Field(min_length=1)]
    variants: Annotated[list[Key], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    weights: dict[str, WeightsParams]
    texts: dict[Key, TextParams]
    treatments: dict[Key, TreatmentParams]
    head: HeadParams
    inject: InjectParams
    hardware: HardwareParams
    corruptions: CorruptionsParams
    closeup: CloseupParams
    statistics: StatisticsParams
    effects: EffectsParams
    figures: FiguresParams
    network: NetworkParams = field(default_factory=NetworkParams)
    gate: GateParams = field(default_factory=GateParams)

    @property
    def main_dataset(self) -> str:
        """The data set of Table 1: the first."""
        return next(iter(self.datasets))

    @cached_property
    def runs(self) -> dict[str, Run]:
        """Key -> run, in DVC's order."""
        return {run.key: run for run in self.all_runs()}

    @property
    def drawn(self) -> list[str]:
        """The variants that figures tell apart: the baseline and those of figures.shown, or else the first of all."""
        shown = [BASELINE, *self.figures.shown] if self.figures.shown else self.variants[:MOST_DRAWN]
        return [variant for variant in self.variants if variant in shown]

    @property
    def learns_thresholds(self) -> bool:
        """Whether a stage uses the thresholds of mitigation `learned`."""
        return "learned" in (self.inject.mitigation, *self.hardware.mitigations)

    @property
    def looked_at(self) -> list[str]:
        """Keys of the runs that have a close-up: those with the first seed."""
        return [key for key, run in self.runs.items() if run.seed == self.seeds[0]]

    @property
    def corrupted(self) -> dict[str, Run]:
        """Key -> run, of those that are tested on corrupted images."""
        return {key: run for key, run in self.runs.items() if run.dataset in self.corruptions.datasets}

    def all_runs(self) -> Iterator[Run]:
        """The product, in which two runs may have the same key until load_params has refused that."""
        return itertools.starmap(Run, itertools.product(self.datasets, self.backbones, self.variants, self.seeds))

    @cached_property
    def class_texts(self) -> dict[str, ClassTexts]:
        """Key -> what each text variant says of each data set, in DVC's order."""
        pairs = itertools.product(self.datasets, self.texts)
        found = [ClassTexts(dataset, variant, self.texts[variant]) for dataset, variant in pairs]
        return {texts.key: texts for texts in found}

    def treatment(self, variant: str) -> TreatmentParams:
        """What distinguishes a variant of any kind from the baseline: of a text, the start of its normalised head."""
        if variant in self.treatments:
            return self.treatments[variant]
        guided = {"start": variant if variant in self.texts else "torch", "width": None, "normalise": True}
        return TreatmentParams(**library_treatment() | (guided if variant != BASELINE else {}))

    def recipe(self, run: Run) -> BackboneParams:
        """How a run's classifier is trained: as its backbone's is, but for what its treatment has otherwise."""
        usual = self.backbones[run.backbone]
        return _treated(usual, self, run.variant, PARAMS_FILE) if run.variant in self.treatments else usual

    @property
    def labels(self) -> dict[str, str]:
        """Variant -> how tables and figures call it, for treatments."""
        return {name: treatment.label or name for name, treatment in self.treatments.items()}

    def encoder_of(self, key: str) -> str:
        """What the class embeddings of a text variant say they were encoded with."""
        features = self.class_texts[key].features
        return f"features:{Path(features).name}" if features else self.encoder


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check a grid's params.yaml. Raises InvalidParameter or UnknownName, in one line."""
    params = _check(_with_defaults(_read(path), path), Params, path)
    _check_references(params, path)
    return params


def load_gate_params(path: Path = PARAMS_FILE) -> GateParams:
    """Read and check section `gate` alone, whatever the other sections hold. Raises InvalidParameter, in one line."""
    content = _read(path)
    return _check(content.get("gate", {}) if isinstance(content, dict) else content, GateParams, path, "gate")


def _read(path: Path) -> Any:
    try:
        # Neither a device, which has no end, nor a pipe, which nobody may ever write to.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InvalidParameter(f"{path} is no regular file; put a grid's params.yaml there")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError as error:
        raise InvalidParameter(
            f"{absolute(path)} does not exist; run this in a folder that holds a grid's params.yaml"
        ) from error
    except OSError as error:
        raise InvalidParameter(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) > LARGEST_FILE:
        raise InvalidParameter(f"{path} is larger than {LARGEST_FILE >> 20} MB, which no grid's params.yaml is")
    try:
        return strict_yaml.parse(content.decode())
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is no UTF-8; save it as UTF-8"
        raise InvalidParameter(f"{path} cannot be read as YAML: {reason}") from error
    except ValueError as error:
        raise InvalidParameter(f"{path} cannot be read as YAML: {error}") from error


def _with_defaults(content: Any, path: Path) -> Any:
    """A file's content whose backbones, texts and treatments have all fields, where the file's own replace the library's."""
    if not isinstance(content, dict):
        return content  # refused by the checks that follow, as all that is passed through here
    backbones, texts, treatments = (content.get(name) for name in ("backbones", "texts", "treatments"))
    if isinstance(backbones, dict):
        backbones = {
            name: _with_recipe(str(name), fields, path) if isinstance(fields, dict) else fields
            for name, fields in backbones.items()
        }
    if isinstance(texts, dict):
        texts = {
            name: with_defaults(fields, f"{path} texts.{name}.provider") if isinstance(fields, dict) else fields
            for name, fields in texts.items()
        }
    if isinstance(treatments, dict):
        treatments = {
            name: library_treatment() | fields if isinstance(fields, dict) else fields for name, fields in treatments.items()
        }
    whole = {"backbones": backbones, "texts": texts, "treatments": treatments, "hardware": _with_usual_faults(content)}
    return content | {key: value for key, value in whole.items() if key in content}


def _with_usual_faults(content: dict[str, Any]) -> Any:
    """Section hardware, whose models have what they leave out from inject.faults."""
    hardware, inject = content.get("hardware"), content.get("inject")
    models = hardware.get("models") if isinstance(hardware, dict) else None
    usual = inject.get("faults") if isinstance(inject, dict) else None
    if not isinstance(models, dict) or not isinstance(usual, dict):
        return hardware
    single = {"values": 1, "pattern": "value", "damage": "equal"}  # as faults that stay are
    return hardware | {
        "models": {
            name: usual | (single if fields.get("lasts") == "forever" else {}) | fields if isinstance(fields, dict) else fields
            for name, fields in models.items()
        }
    }


def _with_recipe(name: str, fields: dict[str, Any], path: Path) -> dict[str, Any]:
    place = f"backbones.{name}"
    network = _check(fields.get("network", name), str, path, f"{place}.network")
    if "recipe" in fields:
        recipe = _check(fields["recipe"], str, path, f"{place}.recipe")
    elif network in FAMILIES:
        recipe = FAMILIES[network]
    else:
        raise InvalidParameter(
            f"network {network!r} in {path} {place} has no recipe of its own; set {place}.recipe to one of "
            f"{', '.join(sorted(set(FAMILIES.values())))}; networks that have one: {', '.join(sorted(FAMILIES))}"
        )
    return {"network": network, "recipe": recipe} | library_fields(recipe, f"{path} {place}.recipe") | fields


def library_recipes(params: Params) -> dict[str, dict[str, Any]]:
    """Backbone -> its recipe as the library has it, before params.yaml overrides some fields."""
    return {name: library_fields(backbone.recipe, "params.yaml backbones") for name, backbone in params.backbones.items()}


def _check(content: Any, kind: type[Checked], path: Path, *section: str) -> Checked:
    """The content of a file, or of one of its sections, as a dataclass."""
    try:
        # As JSON, since a strict dataclass takes no dict in Python: no "1" for 1, no 1 for true, no 0.5 for an integer.
        return TypeAdapter(kind).validate_json(json.dumps(content))
    except ValidationError as error:
        raise InvalidParameter(_one_line(error, kind, path, section)) from error


def lookup(entries: dict[str, Any], kind: str, name: str, where: str) -> Any:
    """entries[name]. Raises UnknownName with the known names."""
    if name not in entries:
        raise UnknownName(kind, name, entries, where)
    return entries[name]


def embedding_file(dataset: str, variant: str) -> Path:
    """The class embeddings of one text variant; beside it, as VARIANT.texts.safetensors, the vectors of its texts."""
    return Path("embeddings") / dataset / f"{variant}.safetensors"


def head_file(run: Run) -> Path:
    """The file that a run's last layer starts from: its first rows, or only the width of a head that torch starts."""
    return Path("models") / "heads" / run.dataset / f"{run.variant}.safetensors"


def _check_references(params: Params, path: Path) -> None:
    for name, dataset in params.datasets.items():
        expanded(dataset.folder or "", f"{path} datasets.{name}.folder")
    for name, text in params.texts.items():
        if name in (BASELINE, RANDOM):
            raise InvalidParameter(f"{path} texts.{name}: a variant of this name has no texts; call it something else")
        if text.limit_questions > len(text.questions):
            given = f"texts.{name}.limit_questions is {text.limit_questions}"
            raise InvalidParameter(f"{path} {given}, but there are {len(text.questions)} questions")
        if text.provider == FEATURES and (
            len(text.cache) not in (1, 2) or not all(n.endswith(".json") for n in text.cache[1:])
        ):
            raise InvalidParameter(
                f"{path} texts.{name}.cache must name one .pth file, whose vectors {FEATURES!r} takes, and may name a .json "
                "file behind it that maps classes to rows"
            )
        if text.provider == FEATURES and text.templates:
            raise InvalidParameter(
                f"{path} texts.{name}.templates must be []: {FEATURES!r} has vectors, which no text can join"
            )
    if params.inject.faults.lasts != "inference":
        raise InvalidParameter(f"{path} inject.faults.lasts must be inference: faults that stay go into hardware.models")
    for name, faults in params.hardware.models.items():
        if faults.lasts == "forever" and (faults.target == "metadata" or faults.pattern != "value" or faults.values > 1):
            raise InvalidParameter(
                f"{path} hardware.models.{name}: faults that stay are in one neuron or weight each: set target to neuron or "
                "weight, pattern to value and values to 1"
            )
    for number, dataset in enumerate(params.corruptions.datasets):
        lookup(params.datasets, "data set", dataset, f"{path} corruptions.datasets.{number}; one of this grid's, or none: []")
    for number, severity in enumerate(params.corruptions.campaign_severities):
        if severity not in params.corruptions.severities:
            raise InvalidParameter(
                f"{path} corruptions.campaign_severities.{number} is {severity}; it must be one of corruptions.severities, "
                f"{', '.join(map(str, params.corruptions.severities))}"
            )
    _check_treatments(params, path)
    known = dict.fromkeys([BASELINE, RANDOM, *params.texts, *params.treatments])
    for number, variant in enumerate(params.variants):
        where = f"{path} variants.{number}; all but baseline and random are described in texts or treatments"
        lookup(known, "variant", variant, where)
    for variant in params.figures.colours:
        lookup(known, "variant", variant, f"{path} figures.colours")
    for variant in params.figures.shown:
        lookup(dict.fromkeys(params.variants), "variant", variant, f"{path} figures.shown")
    for name, values in (("variants", params.variants), ("seeds", params.seeds)):
        if (twice := _repeated(values)) is not None:
            raise InvalidParameter(f"{path} {name} holds {twice!r} twice; every run needs a name of its own")
    count = math.prod(len(part) for part in (params.datasets, params.backbones, params.variants, params.seeds))
    if count > MOST_RUNS:
        raise InvalidParameter(
            f"{path}: datasets, backbones, variants and seeds make {count:,} runs, and a grid has at most {MOST_RUNS:,}"
        )
    runs = [run.key for run in params.all_runs()]
    heads = [f"{dataset}-{variant}" for dataset, variant in itertools.product(params.datasets, known)]
    for kind, keys in (("runs DATASET-BACKBONE-VARIANT-SEED", runs), ("heads DATASET-VARIANT", heads)):
        if twice := _repeated(keys):
            raise InvalidParameter(
                f"{path}: two {kind} have the name {twice!r}; rename a data set, backbone or variant with a hyphen in its name"
            )
    _check_weights(params, path)
    _check_effects(params, path)


def _repeated(values: Iterable[Any]) -> Any:
    """The first of those values that are there several times, or None."""
    return next((value for value, count in Counter(values).items() if count > 1), None)


def _check_treatments(params: Params, path: Path) -> None:
    for name, treatment in params.treatments.items():
        where = f"{path} treatments.{name}"
        if name in (BASELINE, RANDOM) or name in params.texts:
            other = "texts" if name in params.texts else "every grid"
            raise InvalidParameter(f"{where}: a variant of this name is in {other} already; call it something else")
        if treatment.start in STARTS and treatment.start in params.texts:
            raise InvalidParameter(f"{where}.start is {treatment.start!r}, which is a key of texts as well; rename the text")
        if (text := treatment.text) is not None and text not in params.texts:
            known = [*STARTS, *params.texts, "shuffled:TEXT", "cosines:TEXT"]
            raise UnknownName("start", treatment.start, known, f"{where}.start")
        for usual in params.backbones.values():
            _treated(usual, params, name, path)
    known = [BASELINE, RANDOM, *params.texts, *params.labels.values()]
    if (twice := _repeated(known)) is not None:
        raise InvalidParameter(f"{path} treatments: two variants are called {twice!r}; change the label of one of them")


def _treated(usual: BackboneParams, params: Params, treatment: str, path: Path) -> BackboneParams:
    fields = asdict(usual) | params.treatments[treatment].recipe
    return _check(fields, BackboneParams, path, "treatments", treatment, "recipe")


def _check_weights(params: Params, path: Path) -> None:
    classifiers = {run.weights_key: run.variant for run in params.runs.values()}
    for name, weights in params.weights.items():
        where = f"{path} weights.{name}"
        variant = lookup(classifiers, "classifier BACKBONE-VARIANT", name, where)
        if variant in params.treatments:
            raise InvalidParameter(f"{where}: {variant!r} is a treatment, which is trained here; leave its weights out")
        if weights.source == TORCHVISION:
            if variant != BASELINE:
                raise InvalidParameter(f"{where}.source is {TORCHVISION!r}, whose networks are baselines, not {variant!r}")
            if weights.sha256 is not None:
                raise InvalidParameter(f"{where}.sha256 must be null: {TORCHVISION!r} checks its files itself")
        elif not weights.source.endswith(".pth" if weights.source.startswith(PUBLISHED) else ".safetensors"):
            allowed = f"{TORCHVISION}, {PUBLISHED}PATH.pth, PATH.safetensors"
            raise InvalidParameter(f"{where}.source is {weights.source!r}; allowed: {allowed}")
        elif weights.sha256 is None:
            raise InvalidParameter(f"{where}.sha256 is null; give the SHA-256 of {weights.file}, as sha256sum prints it")


def _check_effects(params: Params, path: Path) -> None:
    effects, run_here = params.effects, dict.fromkeys(params.variants)
    for name, pair in effects.contrasts.items():
        for variant in pair:
            lookup(run_here, "variant", variant, f"{path} effects.contrasts.{name}; name two of variants")
        if pair[0] == pair[1]:
            raise InvalidParameter(f"{path} effects.contrasts.{name} sets {pair[0]!r} against itself; name two variants")
    if bool(effects.factors) != bool(effects.design):
        raise InvalidParameter(f"{path} effects.factors and effects.design belong together: give both or neither")
    if not effects.design:
        return
    for variant in effects.design:
        lookup(run_here, "variant", variant, f"{path} effects.design; name some of variants")
    for name, (low, high) in effects.factors.items():
        if low == high:
            raise InvalidParameter(f"{path} effects.factors.{name} has {json.dumps(low)} as both levels; give two")
    if flaw := _flaw_of(design_levels(params, path), list(effects.factors), len(params.seeds)):
        raise InvalidParameter(f"{path} effects.design: {flaw}")


def _flaw_of(levels: list[list[int]], factors: list[str], blocks: int) -> str:
    """Why a design does not tell its main effects and two-way interactions, where none shares a column; empty where it does.

    levels: see `design_levels`. blocks: how often the whole design is run.
    """
    columns = list(zip(*levels, strict=True))
    for name, column in zip(factors, columns, strict=True):
        if sum(column):
            low, high = (column.count(sign) for sign in (-1, 1))
            return f"factor {name!r} is not balanced: {low} variants have its low level and {high} its high one"
    products = []
    for (first, one), (second, other) in itertools.combinations(zip(factors, columns, strict=True), 2):
        products.append(tuple(a * b for a, b in zip(one, other, strict=True)))
        if sum(products[-1]):
            return f"factors {first!r} and {second!r} are not orthogonal; have each combination of their levels equally often"
    # Of columns that are each other's negatives one is kept, and none that is constant.
    kept = {tuple(sign * column[0] for sign in column) for column in [*columns, *products]} - {(1,) * len(levels)}
    import numpy as np  # which grids without a design need not wait for here

    if np.linalg.matrix_rank(np.array([(1,) * len(levels), *sorted(kept)])) <= len(kept):
        return "it has too few variants to tell interactions from one another; add variants, or leave a factor out"
    if len(levels) * blocks - blocks - len(kept) < 1:
        return f"its {len(levels) * blocks} trainings leave none to estimate the spread from; add seeds or variants"
    return ""


def design_levels(params: Params, path: Path = PARAMS_FILE) -> list[list[int]]:
    """Of each variant of the factorial design, -1 where a factor is low and 1 where it is high: V variants of F factors.

    Raises InvalidParameter where a variant has neither level.
    """
    return [
        [_level(params, variant, name, levels, path) for name, levels in params.effects.factors.items()]
        for variant in params.effects.design
    ]


def _level(params: Params, variant: str, factor: str, levels: list[Level], path: Path) -> int:
    treatment = lookup(params.treatments, "treatment", variant, f"{path} effects.design; a factor is a field of treatments")
    value: Any = asdict(treatment)
    for part in factor.split("."):
        if not isinstance(value, dict) or part not in value:
            raise InvalidParameter(
                f"{path} treatments.{variant} has no field {factor!r}, which is one of effects.factors; say it there, as in "
                "recipe.label_smoothing, or leave the factor out"
            )
        value = value[part]
    for sign, level in zip((-1, 1), levels, strict=True):
        if value == level and isinstance(value, bool) == isinstance(level, bool):
            return sign
    allowed = " or ".join(map(json.dumps, levels))
    raise InvalidParameter(
        f"{path} treatments.{variant}.{factor} is {json.dumps(value)}, and effects.factors allows {allowed}; change one of "
        "them, or leave the variant out of effects.design"
    )


def _one_line(error: ValidationError, kind: type, path: Path, section: tuple[str, ...]) -> str:
    """The first problem of a validation, with what is allowed and how many more there are."""
    # A misspelt key is also a missing one: say how it is spelt.
    first, *more = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] not in UNKNOWN_KEY)
    loc = [str(part) for part in (*section, *first["loc"])]
    place = printable(".".join(loc)) or "the file"
    if loc[-1:] == ["[key]"]:  # as pydantic calls what is wrong with the key itself
        place = f"a name in {printable('.'.join(loc[:-2]))}"
    if first["type"] in UNKNOWN_KEY:
        known = _known_keys(TypeAdapter(kind).json_schema(), first["loc"][:-1])
        message = f"unknown key {place!r} in {path}; known: {', '.join(known)}"
    elif first["type"] in ("missing", "missing_argument"):
        message = f"key {place!r} is missing in {path}"
    elif first["type"] == "value_error" and loc[-1:] == ["base_url"]:  # which may hold a secret, and is not shown
        message = f"{place} in {path} cannot be used: {first['ctx']['error']}"
    elif first["type"] == "value_error":  # of a dataclass's own check, which names the key
        message = f"{place}.{first['ctx']['error']}, in {path}"
    else:
        message = f"{place} is {json.dumps(first['input'])[:60]} in {path}: {first['msg']}"
    return message + (f" (and {len(more)} more)" if more else "")


def _known_keys(schema: dict[str, Any], loc: tuple[int | str, ...]) -> list[str]:
    node = schema
    for part in loc:
        patterns = list(node.get("patternProperties", {}).values())
        node = node.get("properties", {}).get(part) or next(iter(patterns), node.get("additionalProperties", {}))
        node = next((kind for kind in node.get("anyOf", []) if "$ref" in kind), node)  # X | None
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]] if "$ref" in node else node
    return sorted(node.get("properties", {}))
