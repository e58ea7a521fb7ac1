"""The page of one's own model: what an assessment found, alone or beside another one, in one HTML file."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from textguard.analysis.improvement import draw_layers, improvement, verdict, weigh
from textguard.artifacts import write_text
from textguard.assessment.advice import advise, in_percent, percent, tells_channels
from textguard.assessment.assessing import USUAL
from textguard.assessment.comparing import QUESTION, as_run
from textguard.assessment.result import Assessment
from textguard.errors import InvalidParameter, Setting, TextguardError, UnknownName
from textguard.estimates.chance import chance_limits
from textguard.estimates.channels import FEWEST
from textguard.estimates.groups import balanced
from textguard.estimates.statistics import Estimate, few_injections
from textguard.faults.checks import checked_name, folder_path
from textguard.report.escaping import shortened
from textguard.report.html import as_picture, as_shown, render
from textguard.report.rendering import Judged, Table, show_estimate, show_number
from textguard.schema.results import MEASURES, Layer, RunResult

PARTS = [
    ("came-out", "What came out"),
    ("run", "What was run"),
    ("figures", "Figures"),
    ("layers", "Layers"),
    ("protect", "What to protect"),
    ("not-hit", "What was not hit"),
    ("repeat", "How to repeat this"),
]
WAYS = {"layers": "all layers alike", "neurons": "all neurons alike"}  # to count layers
RESAMPLES = 1000  # of the bootstrap behind ratios
MOST_MAPS = 50  # feature maps that are listed
CHOSEN = "the layer was chosen for its share of all SDC in the same injections"
LONGEST = 40  # characters of a name in a figure
DPI = 150
LOOKS = (("#0072b2", "^"), ("#d55e00", "o"))  # of the two models in figures; see textguard.report.theme


@dataclass(frozen=True)
class Side:
    """A model on the page: what it is called, what was found, and the same as figures take it."""

    name: str
    found: Assessment
    run: RunResult


@dataclass(frozen=True)
class Mapped:
    """A layer whose channels are shown: of the models that have such a table, by name; and what is to be said of it."""

    layer: str
    tables: dict[str, pd.DataFrame]
    remarks: list[str]


def write_page(
    assessment: Assessment,
    file: str | os.PathLike[str],
    other: Assessment | None = None,
    names: tuple[str, str] = ("this model", "the other model"),
    mitigations: pd.DataFrame | None = None,
    layer: str | None = None,
) -> None:
    """Write an assessment as one HTML file that needs no network: tables, figures, and what they come to in a sentence.

    Parameters
    ----------
    assessment : Assessment
        What is shown.
    file : str or path-like
        The page's file.
    other : Assessment, optional
        What it is set beside, as of the model before a change: ratios with intervals, and the layers of both. Faults are
        compared in pairs where both have the same plan.
    names : (str, str), default ("this model", "the other model")
        What the page calls the two.
    mitigations : pandas.DataFrame, optional
        What `measure_mitigations` returned for the assessment.
    layer : str, optional
        The layer whose channels are drawn. By default that is the sampled layer with the largest share of all SDC, where each
        value is as likely to be hit, among those that have 8 injections in at least half of their channels.

    Raises
    ------
    InvalidArtifact
        An assessment has no eligible image.
    InvalidParameter
        The two are called the same; or nothing is known of the layer's channels: it was enumerated, faults hit other things
        than a neuron, or fewer than two channels have 8 injections.
    UnknownName
        There is no such layer.
    CannotWrite
        The file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.assessment import assess
    >>> from textguard.assessment.page import write_page
    >>> images = torch.rand(6, 1, 4, 4)
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    >>> found = assess(model, DataLoader(TensorDataset(images, model(images).argmax(dim=1))), injections_per_layer=20)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_page(found, Path(folder) / "page.html")
    ...     "What to protect" in (Path(folder) / "page.html").read_text(encoding="utf-8")
    True
    """
    path = folder_path(Setting("file"), file)
    if names[0] == names[1]:
        raise InvalidParameter(Setting("names"), f" are both {names[0]!r:.60}; call the two differently")
    sides = [_side(name, found) for name, found in zip(names, (assessment, other), strict=True) if found]
    mapped, unmapped = _mapped(sides, layer)
    ratios = _ratios(*sides) if other else {}
    content = render(
        "assessment.html",
        Path(__file__).parent,
        title=f"textguard: {' beside '.join(side.name for side in sides)}",
        parts=PARTS,
        sentences=[*_came_out(sides[0]), *(_compared(*sides, ratios) if other else [])],
        headline=as_shown(_headline(sides, ratios), "What faults do"),
        sides=[{"name": side.name, "facts": _facts(side)} for side in sides],
        figures=_figures(sides, mapped),
        unmapped=unmapped,
        layers=as_shown(_layers(sides, ratios), "Layers"),
        advice=_advice(sides[0], mitigations),
        skipped=as_shown(_skipped(assessment), "What was not hit"),
        call=_call(assessment),
    )
    write_text(path, content)


def _side(name: str, found: Assessment) -> Side:
    run = as_run(found, "model")
    # Results of the pipeline shorten the names of some layers.
    layers = [layer.model_copy(update={"layer": site.layer}) for layer, site in zip(run.layers, found.sites, strict=True)]
    return Side(name, found, run.model_copy(update={"layers": layers}))


def _ratios(own: Side, other: Side) -> dict[str, dict[str, Judged]]:
    """The other's / its own, above 1 is better: measure -> a layer that both have, or a way to count them -> the ratio."""
    sides, confidence = (other.found, own.found), own.found.confidence
    drawn = [draw_layers({"": list(side.layers.values())}, RESAMPLES, seed=0)[""] for side in sides]
    found: dict[str, dict[str, Judged]] = {}
    for measure in MEASURES:
        draws = [dict(zip(side.layers, part[measure], strict=True)) for side, part in zip(sides, drawn, strict=True)]
        pairs = {f"layer {name}": (draws[0][name], draw) for name, draw in draws[1].items() if name in draws[0]}
        for way in WAYS:
            weights = [[side.exposed_bits(name) if way == "neurons" else 1.0 for name in side.layers] for side in sides]
            pairs[way] = tuple(weigh(list(part.values()), each) for part, each in zip(draws, weights, strict=True))
        estimates = {name: improvement(*pair, confidence) for name, pair in pairs.items()}
        # Of these two networks: `verdict` is silent about single trainings, which stand for a method.
        found[measure] = {name: Judged(ratio, verdict(ratio, confidence, trainings=2)) for name, ratio in estimates.items()}
    return found


def _hit(found: Assessment) -> str:
    """What faults hit, in a word: neuron, weight, ..."""
    return found.fault_model.target


def _came_out(side: Side) -> list[str]:
    """What came out of one assessment."""
    found, sdc = side.found, side.found.mean("sdc", "neurons")
    what = f"changes the prediction of {side.name} or leaves no finite loss"
    if sdc.value > 0:
        often = f"about 1 in {round(1 / sdc.value):,}"
        sentences = [f"A fault in a {_hit(found)} drawn from all of them {what} in {in_percent(sdc)} of cases, {often}."]
        worst = max(side.run.layers, key=lambda layer: (layer.sdc.value, layer.delta_loss.value))
        sentences.append(f"Layer {worst.layer} is corrupted most easily: in {in_percent(worst.sdc)} of its faults.")
    else:
        sentences = [f"No fault {what}. Of a {_hit(found)} drawn from all of them, at most {percent(sdc.high)} do."]
    if found.skipped:
        count = len(found.skipped)
        said = "1 operation or module takes" if count == 1 else f"{count} operations or modules take"
        sentences.append(f"{said} no faults. Nothing here is about them.")
    sampled = [layer.injections for layer in side.run.layers if layer.method == "sampled"]
    return [*sentences, *filter(None, [few_injections(min(sampled), found.settings["plan"]) if sampled else ""])]


def _compared(own: Side, other: Side, ratios: dict[str, dict[str, Judged]]) -> list[str]:
    """What came out of two of them."""
    judged = ratios["sdc"]["neurons"]
    ratio, verdict_of_it = judged.estimate, judged.in_short
    if verdict_of_it == "better":
        said = f"better than {other.name}: its predictions are corrupted {show_estimate(ratio)} times less often"
    elif verdict_of_it == "worse":
        times = Estimate(*(1 / number if number else math.inf for number in (ratio.value, ratio.high, ratio.low)), ratio.n)
        said = f"worse than {other.name}: its predictions are corrupted {show_estimate(times)} times as often"
    elif math.isfinite(ratio.value):
        said = f"not to be told from {other.name} by SDC, which has {show_estimate(ratio)} times as much of it"
    else:
        said = f"not to be compared with {other.name} by SDC, because one of the two had none"
    same = own.found.plan.equals(other.found.plan)
    sentences = [
        f"{own.name[:1].upper()}{own.name[1:]} is {said}.",
        "Both took the same faults, which are compared in pairs."
        if same
        else "The two took different faults. With assess(plan=...) of one for the other, pairs of faults would tell more.",
    ]
    for name in QUESTION:
        asked, before = (_short(side.found.settings.get(name)) for side in (own, other))
        if asked != before:
            sentences.append(f"They were asked different questions: {name} is {asked} here, and {before} for {other.name}.")
    if own.found.weights == other.found.weights:
        sentences.append("Their weights are the same.")
    else:
        sentences.append("Their weights differ. These two are compared as they are: another training may differ by luck.")
    return sentences


def _headline(sides: Sequence[Side], ratios: dict[str, dict[str, Judged]]) -> Table:
    own = sides[0].found
    headers = ["What faults do", *(side.name for side in sides)]
    rows: list[list[Any]] = []
    for measure, called in MEASURES.items():
        for way, said in WAYS.items():
            unit = "nats" if measure == "delta_loss" else "%"
            numbers = [side.found.mean(measure, way).times(1 if unit == "nats" else 100) for side in sides]
            rows.append([f"{called}, {said} ({unit})", *numbers, *([ratios[measure][way]] if ratios else [])])
    if own.settings["fit_per_megabit"] is not None:
        rows.append(["FIT (failures in 10^9 hours)", *(side.run.overall.fit for side in sides), *([None] if ratios else [])])
    caption = f"Brackets are intervals of confidence {own.confidence:.4g}; exact means that every fault was tried."
    if ratios:
        headers.append(f"{sides[1].name} / {sides[0].name} (x)")
        caption += " Above 1 is better. A verdict is given only where the interval leaves 1 out."
    return Table("table-headline", caption, headers, rows)


def _facts(side: Side) -> list[tuple[str, str]]:
    found, faults = side.found, side.found.fault_model
    settings, plan = found.settings, side.run.plan
    drawn = (
        f"replayed, of plan {settings['plan']}" if "replayed" in settings else f"{settings['plan']}, seed {settings['seed']}"
    )
    counts = f"{plan.injections:,} injections, and {plan.enumerated:,} faults enumerated"
    return [
        ("Model", f"{found.parameters:,} parameters in {found.modules:,} modules, weights {found.weights}"),
        ("Images", f"{found.eligible:,} of {found.images:,} are eligible: predicted right without faults"),
        ("Top-1", f"{show_estimate(found.top1.times(100))} %"),
        ("Engine", f"{found.engine}{f', because replay cannot be used: {found.reason}' if found.reason else ''}"),
        ("Faults", f"{faults.words}, {settings['number_format']}"),
        ("Plan", f"{drawn}: {counts}"),
        ("Sites", f"{len(found.sites):,} of kinds {', '.join(settings['kinds'])}; {len(found.skipped):,} skipped"),
        ("Detector, mitigation", f"{settings['detector']}, {settings['mitigation']}"),
        ("Confidence", f"{found.confidence:.4g}"),
    ]


def _mapped(sides: Sequence[Side], layer: str | None) -> tuple[Mapped | None, str]:
    """The channels to show, of the layer that was asked for or of the one that matters most; or why there are none."""
    own, *others = sides
    if layer is None:
        if not tells_channels(own.found):
            return None, "No layer is shown by its channels: that takes sampled faults that hit one neuron each."
        layer, remarks = _most_fragile(own.found), [CHOSEN]
        if layer is None:
            return None, (
                f"No layer is shown by its channels: none that has SDC has {FEWEST} injections in half of its channels. "
                "It takes more injections, or the layer's name, as in: textguard report DIR --layer NAME."
            )
    else:
        remarks = []
    tables = {own.name: _channels(own.found, layer)}
    for other in others:
        try:
            tables[other.name] = _channels(other.found, layer)
        except UnknownName:
            remarks.append(f"{shortened(other.name, LONGEST)} has no such layer")
        except InvalidParameter:
            remarks.append(f"of {shortened(other.name, LONGEST)}, the layer's channels are not known")
    return Mapped(layer, tables, remarks), ""


def _channels(found: Assessment, layer: str) -> pd.DataFrame:
    """What faults do in each channel of a layer. Raises UnknownName; InvalidParameter where that is not known."""
    checked_name("layer", layer, list(found.layers), Setting("layer"))
    if found.layers[layer].method == "sampled" and not tells_channels(found):
        raise InvalidParameter(Setting("layer"), f" is {layer!r:.60}; only faults in one neuron have a channel")
    table = found.by("channel", layer)
    if table["sdc_low"].notna().sum() < 2:
        few = f"fewer than two of its channels have {FEWEST} injections; assess with more"
        raise InvalidParameter(Setting("layer"), f" is {layer!r:.60}; {few}")
    return table


def _most_fragile(found: Assessment) -> str | None:
    """The sampled layer with the largest share of all SDC, of those with enough injections in half of their channels."""
    share = {
        layer: found.exposed_bits(layer) * result.sdc.value
        for layer, result in found.layers.items()
        if result.method == "sampled" and result.sdc.value > 0
    }
    for layer in sorted(share, key=share.__getitem__, reverse=True):
        known = found.by("channel", layer)["sdc_low"].notna()
        if known.sum() >= 2 and known.mean() >= 0.5:
            return layer
    return None


def _figures(sides: Sequence[Side], mapped: Mapped | None) -> list[dict[str, Any]]:
    """The pictures of all sides together."""
    # Not before: a saved assessment is read, compared and advised on without matplotlib.
    import matplotlib

    from textguard.report.bit_figures import draw_bits
    from textguard.report.channel_figures import Channels, draw_channels
    from textguard.report.drawing import STYLE, draw
    from textguard.report.layer_figures import draw_outcomes
    from textguard.report.theme import Style
    from textguard.report.variants import Variant

    called = [shortened(side.name, LONGEST) for side in sides]
    variants = [
        Variant(str(number), Style(*look, name), [side.run], "model")
        for number, (side, look, name) in enumerate(zip(sides, LOOKS, called, strict=False))
    ][::-1]
    drawn = {
        "outcomes": (draw_outcomes, "What faults do in each layer", _outcomes),
        "bits": (draw_bits, "What faults do in each bit", _worst_bit),
    }
    pictures = []
    with matplotlib.rc_context(fname=STYLE):
        for name, (function, title, alt) in drawn.items():
            figure, _ = function(variants, " and ".join(called))
            seen = ". ".join(f"{side.name}: {alt(side)}" for side in sides)
            pictures.append(as_picture(draw(figure, "png", DPI), title, f"picture-{name}", alt=f"{title}. {seen}."))
        if mapped:
            shown = [
                Channels(name, *_channels_of(side, mapped), side.found.confidence)
                for side, name in zip(sides, called, strict=True)
                if side.name in mapped.tables
            ]
            figure, _ = draw_channels(mapped.layer, shown, mapped.remarks)
            title = f"What faults do in each channel of layer {mapped.layer}"
            seen = ". ".join(f"{one.name}: {one.finding}; {_worst_channel(one.known)}" for one in shown)
            pictures.append(as_picture(draw(figure, "png", DPI), title, "picture-channels", alt=f"{title}. {seen}."))
    return pictures


def _outcomes(side: Side) -> str:
    largest = [
        f"{name} largest in layer {layer.layer}, {show_number(getattr(layer, measure).value)} {unit}"
        for measure, name, unit in (("sdc", "SDC", "share of faults"), ("delta_loss", "DeltaLoss", "nats"))
        for layer in [max(side.run.layers, key=lambda one, measure=measure: getattr(one, measure).value)]
    ]
    masked = [layer.outcomes.masked for layer in side.run.layers]
    return f"{'; '.join(largest)}; from {min(masked):.0%} to {max(masked):.0%} of a layer's faults are masked"


def _worst_bit(side: Side) -> str:
    found = [(value, bit, layer.layer) for layer in side.run.layers for bit, value in enumerate(layer.by_bit.delta_loss)]
    value, bit, layer = max(one for one in found if math.isfinite(one[0]))
    return f"largest in bit {bit} of layer {layer}, {show_number(value)} nats"


def _channels_of(side: Side, mapped: Mapped) -> tuple[pd.DataFrame, dict[str, float], dict[str, tuple[float, float]]]:
    """The table of a layer's channels, the layer's own means, and what its channels have by chance."""
    found, table = side.found, mapped.tables[side.name]
    means = {measure: getattr(found.layers[mapped.layer], measure).value for measure in ("sdc", "delta_loss")}
    records = found.records[found.records["layer"] == mapped.layer].drop_duplicates("index")
    return table, means, chance_limits(balanced(records, found.strata, layers=False), len(table), found.confidence)


def _worst_channel(known: pd.DataFrame) -> str:
    row = known.loc[known["sdc"].idxmax()]
    return f"largest in channel {row['channel']:.0f}, {show_number(100 * row['sdc'])} %"


def _layers(sides: Sequence[Side], ratios: dict[str, dict[str, Judged]]) -> Table:
    own = sides[0]
    headers = [
        "Layer",
        "Kind",
        "Neurons",
        "Faults",
        "DeltaLoss (nats)",
        "SDC (%)",
        "Mismatch (%)",
        "Masked (%)",
        "Largest value",
    ]
    rows = [[*_layer(layer), show_number(own.found.ranges[layer.layer])] for layer in own.run.layers]
    caption = "In order of execution. The largest value is that of fault-free inferences."
    if len(sides) > 1:
        name, theirs = sides[1].name, {layer.layer: layer for layer in sides[1].run.layers}
        headers += [
            f"DeltaLoss, {name}",
            f"SDC, {name}",
            f"DeltaLoss, {name} / {own.name} (x)",
            f"SDC, {name} / {own.name} (x)",
        ]
        beside = []
        for layer in own.run.layers:
            found = theirs.pop(layer.layer, None)
            compared = [ratios[measure][f"layer {layer.layer}"] for measure in ("delta_loss", "sdc")] if found else []
            beside.append([found.delta_loss, found.sdc.times(100), *compared] if found else [None] * 4)
        rows = [[*row, *more] for row, more in zip(rows, beside, strict=True)]
        if theirs:
            caption += f" Only {name} has {', '.join(theirs)}. A dash stands for a layer that only {own.name} has."
    return Table("table-layers", caption, headers, rows)


def _layer(layer: Layer) -> list[Any]:
    numbers = [layer.delta_loss, layer.sdc.times(100), layer.mismatch.times(100), f"{100 * layer.outcomes.masked:.1f}"]
    return [layer.layer, layer.kind, layer.neurons, layer.injections, *numbers]


def _advice(side: Side, mitigations: pd.DataFrame | None) -> dict[str, Any]:
    """What to protect, or why nobody can say."""
    measured = [] if mitigations is None else [as_shown(_mitigations(mitigations), "Mitigations, measured")]
    try:
        advice = advise(side.found)
    except TextguardError as error:
        return {"sentence": f"{error}.", "tables": measured}
    note = "In the order of choice. What is covered was measured on the half of the sample that had no part in the order."
    shown = [("table-protected-layers", "Layers to protect first", advice.table, note)]
    maps = advice.channels.iloc[:MOST_MAPS]
    if len(maps):
        some = f"The first {len(maps)} of {len(advice.channels):,}. " if len(maps) < len(advice.channels) else ""
        whole = " Layers that were enumerated are not told apart." if (maps["channel"] < 0).any() else ""
        shown.append(("table-protected-maps", "Feature maps to protect first", maps, f"{some}{note}{whole}"))
    tables = [as_shown(_choice(*about), about[1]) for about in shown]
    return {"sentence": advice.sentence, "tables": measured + tables}


def _mitigations(measured: pd.DataFrame) -> Table:
    headers = ["Mitigation", "SDC before (%)", "SDC with it (%)", "Removed (%)", "Time of an inference (x)"]
    rows = []
    for row in measured.to_dict("records"):
        removed = Estimate(*(100 * row[name] for name in ("removed", "removed_low", "removed_high")), 0)
        rates = [show_number(100 * row[name]) for name in ("before", "after")]
        rows.append([row["mitigation"], *rates, removed, f"{row['time']:.2f}"])
    return Table("table-mitigations", "The same faults on protected copies of the model, compared in pairs.", headers, rows)


def _choice(name: str, _: str, found: pd.DataFrame, note: str) -> Table:
    headers = ["Share of SDC (%)", "Covered (%)", "SDC left (%)", "Multiply-adds (%)", "With those above (%)"]
    rows = []
    for row in found.to_dict("records"):
        covered, left = (
            Estimate(*(100 * row[f"{part}{end}"] for end in ("", "_low", "_high")), 0) for part in ("covered", "left")
        )
        share, *costs = (
            None if math.isnan(row[part]) else f"{100 * row[part]:.3g}" for part in ("share", "cost", "total_cost")
        )
        number = [] if "channel" not in row else ["all" if row["channel"] < 0 else int(row["channel"])]
        rows.append([row["layer"], *number, share, covered, left, *costs])
    return Table(name, note, ["Layer", *(["Feature map"] if "channel" in found else []), *headers], rows)


def _skipped(found: Assessment) -> Table:
    caption = "Operations and modules that take no faults. Means over layers are over the others."
    return Table("table-skipped", caption, ["What", "Why"], [list(entry) for entry in found.skipped])


def _call(found: Assessment) -> str:
    """The call that finds the same again, with the arguments that differ from the usual ones."""
    settings = found.settings
    lines = [
        f"{name}={settings[name]!r}"
        for name in ("plan", "injections_per_layer", "seed", "images", "pilot", "stop_at", "confidence", "enumerate_up_to")
        if settings[name] != getattr(USUAL, name)
    ]
    if "replayed" in settings:
        lines = ["plan=Assessment.load(FOLDER)  # whose faults were replayed"]
    lines += [f"{name}={settings[name]!r}" for name in ("detector", "number_format") if settings[name] != getattr(USUAL, name)]
    if settings["kinds"] != list(USUAL.kinds):
        lines.append(f"kinds={settings['kinds']!r}")
    if found.fault_model != USUAL.fault_model:
        lines.append(f"fault_model={found.fault_model!r}")
    lines += [
        f"{name}={settings[name]!r}"
        for name, usual in (("mitigation", "none"), ("fit_per_megabit", None))
        if settings[name] != usual
    ]
    arguments = "".join(f",\n    {line}" for line in lines)
    return f"from textguard.assessment import Assessment, assess\n\nfound = assess(\n    model,\n    loader{arguments},\n)"


def _short(value: object) -> str:
    return f"{value!s:.80}"
