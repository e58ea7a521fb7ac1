"""The paper's Figure 1 for the classifiers of a grid: what they are made of, in their own numbers.

C classes, D questions about each, E numbers per vector of a text; see README.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import wrap

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from textguard.analysis.files import load_text_quality
from textguard.params import Params, TextParams
from textguard.report.drawing import AS_IS, NOTE_SIZE, drawable
from textguard.report.theme import backbone_name
from textguard.report.variants import Variant
from textguard.schema.results import BASELINE, RunResult

INK = "#333333"
WIDTH = 7.8  # inches, as is every length below
BOX, GAP, CAPTION = 0.58, 0.13, 0.24  # heights: of a box, between two rows, of the line below a network
# Left and right ends of the columns.
NETWORK = {
    "images": (0.1, 1.0),
    "backbone": (1.24, 2.64),
    "normalise": (2.88, 4.02),
    "head": (4.26, 5.56),
    "scale": (5.8, 6.62),
    "logits": (6.86, 7.7),
}
TEXT = {
    "variant": (0.1, 1.0),
    "questions": (1.24, 2.64),
    "texts": (2.82, 3.92),
    "encoder": (4.1, 5.2),
    "mean": (5.38, 6.48),
}
LONGEST = 300  # characters of a line that are drawn, however small
TRUNK = 6.66  # where the vectors of all variants come down to the head
TEMPLATE, FILE = "a template", "a file"
CONTROLS = {"shuffled": "shuffled among classes", "random": "replaced by random ones", "one_hot": "replaced by one-hot ones"}


@dataclass(frozen=True)
class Texts:
    """What a variant knows of its classes. questions: D, about each class. answers, embedded: texts, of all classes.

    written_by: the language model, "a person", "a template" or "a file". example: the only question, where there is one.
    unit: whether the classes' means are brought to length 1. control: what became of the vectors in a run that is only to
    compare with; else empty.
    """

    questions: int
    samples: int
    answers: int
    embedded: int
    encoder: str
    written_by: str
    example: str
    unit: bool
    control: str


@dataclass(frozen=True)
class Network:
    """A variant of a backbone on a data set; its runs differ in their seeds alone, so the first one tells.

    classes, features, width: C; what the backbone's last layer takes; E, which a baseline has none of. Each is None where
    the campaign left out the layers that would tell. source: of weights or vectors that come from a file; else empty.
    trained: whether this grid trained it, or took its weights from elsewhere.
    """

    variant: Variant
    image_size: int
    classes: int | None
    features: int | None
    width: int | None
    texts: Texts | None
    source: str
    trained: bool

    @property
    def result(self) -> RunResult:
        """The run that tells."""
        return self.variant.results[0]


def load_network(variant: Variant, params: Params) -> Network:
    """Put together what metrics/results, metrics/texts and params.yaml say of a variant. Raises InvalidArtifact."""
    result, guided = variant.results[0], variant.key != BASELINE
    source = _source(result, params)
    linear = [layer for layer in result.layers if layer.kind == "Linear"]
    own = linear[-1 - guided] if len(linear) > guided else None  # the backbone's own last layer; behind it is the head
    return Network(
        variant,
        image_size=params.backbones[result.backbone].image_size,
        classes=linear[-1].neurons if own else None,
        features=own.multiply_adds // own.neurons if own and own.multiply_adds else None,
        width=own.neurons if own and guided else None,
        texts=None if source else _load_texts(result, params),
        source=source,
        trained=f"{result.backbone}-{result.variant}" not in params.weights,
    )


def _load_texts(run: RunResult, params: Params) -> Texts | None:
    key = f"{run.dataset}-{run.variant}"
    if key not in params.class_texts:
        return None
    text, quality = params.texts[run.variant], load_text_quality(key)
    questions = text.questions[: text.limit_questions or None]
    return Texts(
        questions=len(questions),
        samples=text.samples,
        answers=quality.answers,
        embedded=quality.embedded,
        encoder=quality.encoder,
        written_by=_author(text),
        example=questions[0].replace("{class}", "[class]") if len(questions) == 1 else "",
        unit=text.embedding.unit_after,
        control=CONTROLS.get(text.embedding.vectors, ""),
    )


def _author(text: TextParams) -> str:
    by_provider = {"template": TEMPLATE, "import": FILE}
    return by_provider.get(text.provider, text.model.model if text.model else "a person")


def _source(run: RunResult, params: Params) -> str:
    """The file that weights or vectors come from; empty where texts say them."""
    if weights := params.weights.get(f"{run.backbone}-{run.variant}"):
        return Path(weights.file or weights.source).name
    texts = params.class_texts.get(f"{run.dataset}-{run.variant}")
    return Path(texts.features).name if texts and texts.features else ""


def draw_architecture(variants: Sequence[Variant], title: str, params: Params) -> tuple[Figure, pd.DataFrame]:
    """How texts become the first weights of the head, the network behind them, and the baseline; and their numbers.

    Raises InvalidArtifact.
    """
    networks = [load_network(variant, params) for variant in variants]
    baselines = [network for network in networks if network.variant.key == BASELINE]
    guided = [network for network in networks if network.variant.key != BASELINE]
    lanes = bool(baselines) + bool(guided)
    height = 0.4 + len(guided) * (BOX + GAP) + bool(guided) * 0.38 + lanes * (BOX + CAPTION) + (lanes - 1) * 0.12 + 0.52
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)  # measures texts
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.axis("off")
    axes.text(WIDTH / 2, height - 0.2, f"{title}: architecture", ha="center", va="center", fontsize=9)

    top = height - 0.4
    if guided:
        lane = top - len(guided) * (BOX + GAP) - 0.38
        for network in guided:
            _draw_start(axes, network, top)
            top -= BOX + GAP
        _draw_trunk(axes, guided, height - 0.4, lane)
        _draw_guided(axes, guided, lane, baselines)
        top = lane - BOX - CAPTION - 0.12
    if baselines:
        _draw_baseline(axes, baselines[0], top)
    _note(axes, guided, baselines)
    return figure, pd.DataFrame([_numbers(network, baselines) for network in networks])


def _draw_start(axes: Axes, network: Network, top: float) -> None:
    """One variant's way to the head's first weights, from left to right."""
    texts, colour = network.texts, network.variant.style.colour
    _box(axes, TEXT["variant"], top, [network.variant.style.name], colour, filled=True)
    shape = f"{_show(network.classes, 'C')} x {_show(network.width, 'E')}"
    if texts is None:
        said = f"from the file {network.source}" if network.source else "no text: nothing is asked, nothing encoded"
        _fit(axes, TEXT["questions"][0], TEXT["encoder"][1], top - BOX / 2, said, 8, style="italic", color=INK)
        what = "weights" if not network.trained else "vectors" if network.source else "random numbers"
        _box(axes, TEXT["mean"], top, [what, shape], colour)
    else:
        classes = f"{_show(network.classes, 'C')} classes"
        asked = [f"{classes} x {texts.questions} question{'s' * (texts.questions > 1)}"]
        asked += [f"x {texts.samples} answers"] * (texts.samples > 1)
        author = f"by {texts.written_by}"
        if texts.written_by == TEMPLATE:
            asked = [f"{classes} x {texts.questions} sentence{'s' * (texts.questions > 1)}"]
            asked += wrap(f"“{texts.example}”", 24, max_lines=4, placeholder="…") if texts.example else []
            author = "no model asked"
        elif texts.written_by == FILE:
            asked = [classes, "described in a file"]
        kept = [f"{texts.embedded:,} kept"] * (texts.embedded != texts.answers)
        means = ["mean per class", *(["to length 1"] * texts.unit), *([texts.control] * bool(texts.control)), shape]
        _box(axes, TEXT["questions"], top, asked, colour)
        _box(axes, TEXT["texts"], top, [f"{texts.answers:,} texts", author, *kept], colour)
        _box(axes, TEXT["encoder"], top, ["text encoder", _encoder(texts.encoder)], colour)
        _box(axes, TEXT["mean"], top, means, colour)
        for left, right in (("questions", "texts"), ("texts", "encoder"), ("encoder", "mean")):
            _arrow(axes, (TEXT[left][1], top - BOX / 2), (TEXT[right][0], top - BOX / 2), colour)
    axes.plot([TEXT["mean"][1], TRUNK], [top - BOX / 2] * 2, color=colour, linewidth=1.2, solid_capstyle="butt")


def _draw_trunk(axes: Axes, guided: Sequence[Network], top: float, lane: float) -> None:
    """The line that leads from the variants' vectors to the head; which of them it is, is the variant's choice."""
    colour, elbow = _shared_colour(guided), lane + 0.22
    head = sum(NETWORK["head"]) / 2
    axes.plot([TRUNK, TRUNK, head], [top - BOX / 2, elbow, elbow], color=colour, linewidth=1.2)
    _arrow(axes, (head, elbow), (head, lane), colour)
    several = len(guided) > 1
    lines = ["one of these", "is what the"] if several else ["this is what", "the"]
    lines[-1] += " head"
    lines += ["starts from;", "then all is", "trained"] if any(network.trained for network in guided) else ["is made of"]
    middle = (top - BOX / 2 + elbow) / 2 if several else top - BOX / 2
    axes.text(TRUNK + 0.1, middle, "\n".join(lines), ha="left", va="center", fontsize=8, color=INK, linespacing=1.25)


def _draw_guided(axes: Axes, guided: Sequence[Network], top: float, baselines: Sequence[Network]) -> None:
    colour = _shared_colour(guided)
    classes, width = (_several(guided, name, symbol) for name, symbol in (("classes", "C"), ("width", "E")))
    features = _several(guided, "features", "")
    last = f"last layer: {features} to {width}" if features else f"last layer gives {width}"
    _box(axes, NETWORK["images"], top, ["images", _pixels(guided)], colour)
    _box(axes, NETWORK["backbone"], top, [backbone_name(guided[0].result.backbone), last], colour)
    _box(axes, NETWORK["normalise"], top, ["normalise", "to length 1"], colour)
    _box(axes, NETWORK["head"], top, ["head", f"{classes} x {width}"], colour, filled=True)
    _box(axes, NETWORK["scale"], top, ["times", "exp(scale)"], colour)
    _box(axes, NETWORK["logits"], top, [f"{classes} logits"], colour)
    names = list(NETWORK)
    for left, right in pairwise(names):
        _arrow(axes, (NETWORK[left][1], top - BOX / 2), (NETWORK[right][0], top - BOX / 2), colour)
    _caption(axes, f"text-guided ({', '.join(network.variant.style.name for network in guided)})", guided, top, baselines)


def _draw_baseline(axes: Axes, network: Network, top: float) -> None:
    colour, classes = network.variant.style.colour, _show(network.classes, "C")
    last = f"{network.features:,} to {classes}" if network.features else f"gives {classes}"
    _box(axes, NETWORK["images"], top, ["images", _pixels([network])], colour)
    _box(axes, NETWORK["backbone"], top, [backbone_name(network.result.backbone), "but for its last layer"], colour)
    _box(axes, NETWORK["head"], top, ["its own last layer", f"{last}"], colour, filled=True)
    _box(axes, NETWORK["logits"], top, [f"{classes} logits"], colour)
    for left, right in (("images", "backbone"), ("backbone", "head"), ("head", "logits")):
        _arrow(axes, (NETWORK[left][1], top - BOX / 2), (NETWORK[right][0], top - BOX / 2), colour)
    _caption(axes, BASELINE, [network], top, [])


def _caption(axes: Axes, name: str, networks: Sequence[Network], top: float, baselines: Sequence[Network]) -> None:
    """What a network costs, and how much more than the baseline."""
    said = []
    for cost, unit in (("parameters", "parameters"), ("multiply_adds", "multiply-adds per image")):
        beside = (
            " or ".join(dict.fromkeys(f"{getattr(n.result, cost) - getattr(baselines[0].result, cost):+,}" for n in networks))
            if baselines
            else ""
        )
        own = " or ".join(dict.fromkeys(f"{getattr(n.result, cost):,}" for n in networks))
        said.append(f"{own} {unit}" + f" ({beside})" * bool(beside))
    if not any(network.trained for network in networks):
        said.append(f"weights from {networks[0].source}, not trained here")
    y = top - BOX - 0.13
    _fit(axes, NETWORK["images"][0], NETWORK["logits"][1], y, f"{name}: {', '.join(said)}", 8, ha="left", color=INK)


def _note(axes: Axes, guided: Sequence[Network], baselines: Sequence[Network]) -> None:
    """What the numbers and words in the boxes mean; letters as the paper has them."""
    lines = ["logits: one score per class, before the softmax"]
    if guided:
        told = [network.texts for network in guided if network.texts and network.texts.written_by not in (TEMPLATE, FILE)]
        questions = " or ".join(dict.fromkeys(f"{texts.questions:,}" for texts in told))
        letters = [f"C = {_several(guided, 'classes', '?')} classes", *([f"D = {questions} questions"] * bool(told))]
        letters += [f"E = {_several(guided, 'width', '?')} numbers per vector; the head is C x E"]
        lines[:0] = [", ".join(letters)]
        lines[-1] = "scale: one number, trained; " + lines[-1] + "; brackets: more than the baseline has" * bool(baselines)
    axes.text(WIDTH / 2, 0.1, "\n".join(lines), ha="center", va="bottom", fontsize=NOTE_SIZE, color="black")


def _numbers(network: Network, baselines: Sequence[Network]) -> dict[str, object]:
    result, texts = network.result, network.texts
    extra = {
        f"extra_{name}": getattr(result, name) - getattr(baselines[0].result, name) if baselines else None
        for name in ("parameters", "multiply_adds")
    }
    return {
        **{name: getattr(result, name) for name in ("dataset", "backbone", "variant")},
        "trainings": len(network.variant.results) if network.trained else 0,
        "image_size": network.image_size,
        **{name: getattr(network, name) for name in ("classes", "features", "width")},
        **{name: getattr(result, name) for name in ("parameters", "multiply_adds")},
        **extra,
        "encoder": texts.encoder if texts else None,
        **{name: getattr(texts, name) if texts else 0 for name in ("questions", "samples", "answers", "embedded")},
        "written_by": texts.written_by if texts else None,
    }


def _shared_colour(networks: Sequence[Network]) -> str:
    """The variant's colour; of several variants that share a network, no one's."""
    return networks[0].variant.style.colour if len(networks) == 1 else INK


def _several(networks: Sequence[Network], name: str, symbol: str) -> str:
    return " or ".join(dict.fromkeys(_show(getattr(network, name), symbol) for network in networks))


def _show(number: int | None, symbol: str) -> str:
    return symbol if number is None else f"{number:,}"


def _pixels(networks: Sequence[Network]) -> str:
    return " or ".join(dict.fromkeys(f"{network.image_size} x {network.image_size}" for network in networks))


def _encoder(name: str) -> str:
    """An encoder's name without what is before the model's, and of paths their ends."""
    parts = [part.rstrip("/").rpartition("/")[2] for part in name.split(":")]
    return " ".join(parts[1:]) or name


def _box(axes: Axes, ends: tuple[float, float], top: float, lines: Sequence[str], colour: str, *, filled: bool = False) -> None:
    """A box with a line in 8 pt, and smaller ones below it."""
    left, right = ends
    shape = "round,pad=0,rounding_size=0.06"
    face = {"alpha": 0.22, "linewidth": 0} if filled else {"alpha": 0}
    for look in ({"facecolor": colour, **face}, {"facecolor": "none", "edgecolor": colour, "linewidth": 1.2}):
        axes.add_patch(FancyBboxPatch((left, top - BOX), right - left, BOX, boxstyle=shape, **look))
    step = min(0.155, 0.9 * BOX / len(lines))
    for number, line in enumerate(lines):
        y = top - BOX / 2 + step * ((len(lines) - 1) / 2 - number)
        _fit(axes, left + 0.04, right - 0.04, y, line, 8, color="black")


def _fit(axes: Axes, left: float, right: float, y: float, text: str, size: float, *, ha: str = "center", **look: str) -> None:
    """A line of text between two ends, smaller where it would be too long."""
    x = left if ha == "left" else (left + right) / 2
    drawn = axes.text(x, y, drawable(text, LONGEST), ha=ha, va="center", fontsize=size, **AS_IS, **look)
    width = drawn.get_window_extent().width / axes.figure.dpi
    if width > right - left:
        drawn.set_fontsize(size * (right - left) / width)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=8, color=colour, linewidth=1.2, shrinkA=0, shrinkB=0)
    )
