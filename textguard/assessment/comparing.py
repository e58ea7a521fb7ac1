"""Is one assessment worse than another? The tests and the verdicts of the pipeline's gate, for two networks as they are."""

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from textguard.analysis.campaigns import RECORDS, CampaignRecords
from textguard.analysis.regression import Judgement, compare, judge
from textguard.analysis.runs import describe
from textguard.artifacts import fingerprint
from textguard.assessment.result import Assessment
from textguard.errors import InvalidArtifact, InvalidParameter, printable
from textguard.estimates.statistics import mean_estimate
from textguard.estimates.summary import GOLDENEYE
from textguard.params import GateParams, Run, StatisticsParams
from textguard.report.gate import failures, verdict_markdown
from textguard.schema.base import Measured
from textguard.schema.campaign import StoredCampaign
from textguard.schema.evaluation import Evaluation
from textguard.schema.results import BASELINE, RunResult

USUAL_RATE = 20.49  # failures of 10^6 bits in 10^9 hours: SRAM in 16 nm, extrapolated by Li et al., SC 2017
# Settings that change what is asked, and not only how precisely it is answered.
QUESTION = ("fault_model", "number_format", "kinds", "detector", "mitigation", "task")


def as_run(found: Assessment, name: str = "assessment") -> RunResult:
    """An assessment as the pipeline's results hold a run: what `textguard.analysis` compares, and figures are drawn from.

    name: printable text. FIT is of `fit_per_megabit`, or of 20.49 where none was given. Raises InvalidArtifact where no image
    is eligible.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.assessment import assess
    >>> images = torch.rand(6, 1, 4, 4)
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    >>> found = assess(model, DataLoader(TensorDataset(images, model(images).argmax(dim=1))), injections_per_layer=20)
    >>> run = as_run(found, "mine")
    >>> run.run, run.plan.injections, run.overall.sdc.value == found.mean("sdc").value
    ('mine', 40, True)
    """
    if not found.eligible:
        raise InvalidArtifact(f"{name}: no image is eligible, so there is nothing to compare")
    rate, known = found.settings["fit_per_megabit"] or USUAL_RATE, found.predictions.dropna()
    statistics = StatisticsParams(
        confidence=found.confidence,
        bootstrap=1000,
        nonfinite=GOLDENEYE,
        last_layer_weights="neurons",
        fit_per_bit=rate / 1e6,
        fit_exposure="neurons",
    )
    evaluation = Evaluation(
        top1=Measured.of(found.top1),
        loss=Measured.of(mean_estimate(known["loss"].to_numpy(float), found.confidence)),
        top2diff=Measured.of(mean_estimate(known["top2diff"].to_numpy(float), found.confidence, most=1.0)),
        parameters=found.parameters,
        multiply_adds=sum(site.multiply_adds or 0 for site in found.sites),
        scale=1.0,
        weights=found.weights,
        seed=found.settings["seed"],
        device="the one that assessed it",
    )
    run = Run("data", "model", BASELINE, found.settings["seed"])
    largest = found.ranges[found.sites[-1].layer]
    layers = list(found.layers.values())
    campaign = CampaignRecords(
        {found.settings["detector"]: layers}, _stored(found), found.records[RECORDS], list(found.totals), latent=False
    )
    return describe(name, run, campaign, statistics, evaluation, found.predictions, largest if math.isfinite(largest) else 0.0)


def _stored(found: Assessment) -> StoredCampaign:
    """What the pipeline's campaign.json would say."""
    detector = found.settings["detector"]
    settings = {name: value for name, value in found.settings.items() if name not in ("fault_model", "number_format")}
    settings |= {
        "faults": found.settings["fault_model"],
        "format": found.settings["number_format"],
        "inputs": found.weights,
        "device": "the one that assessed it",
    }
    return StoredCampaign.model_validate(
        {
            "layers": [
                {"layer": site.layer, "kind": site.kind, "neurons": site.neurons, "multiply_adds": site.multiply_adds}
                for site in found.sites
            ],
            "bits": found.bits,
            "strata": found.strata,
            # Of faults that were replayed on another model, the enumerated ones alone are of this one's images.
            "eligible_images": found.eligible,
            "detectors": [detector],
            "exact": {detector: [layer.as_json() for layer in found.totals]},
            "skipped": dict(found.skipped),
            "settings": settings,
        }
    )


def compare_assessments(
    old: Assessment, new: Assessment, tolerances: GateParams, names: tuple[str, str] = ("old", "new")
) -> list[Judgement]:
    """Every number of two assessments with a verdict; see textguard.analysis.regression.

    Weights may differ: the question is whether the new network is worse than the old one, whatever made it so. Faults are
    compared in pairs where both have the same plan.
    """
    runs = [as_run(found, name) for found, name in zip((old, new), names, strict=True)]
    if old.plan.equals(new.plan):  # also where one got it as rows, without the settings that drew it
        same = fingerprint(plan=runs[0].plan.mark)
        runs = [run.model_copy(update={"plan": run.plan.model_copy(update={"mark": same})}) for run in runs]
    return judge(compare(*runs, tolerances), tolerances.significance)


def gate(old: Assessment, new: Assessment, tolerances: GateParams, names: tuple[str, str] = ("old", "new")) -> tuple[str, bool]:
    """The result as Markdown, and whether anything got worse. Raises InvalidArtifact."""
    judgements = compare_assessments(old, new, tolerances, names)
    asked = [(name, old.settings.get(name), new.settings.get(name)) for name in QUESTION]
    notes = [
        f"The two were asked different questions: {name} was {before!s:.80} and is {now!s:.80}."
        for name, before, now in asked
        if before != now
    ]
    if [site.layer for site in old.sites] != [site.layer for site in new.sites]:
        notes.append("The layers differ: means over layers are over other layers than before.")
    if old.weights != new.weights:
        notes.append(
            "The weights differ: the two networks are compared as they are, and another training may be worse by luck."
        )
    text = verdict_markdown(judgements, tolerances.significance)
    return "\n".join([text, *notes, ""]) if notes else text, bool(failures(judgements))


def tolerances_from(options: Mapping[str, float | None], pyproject: Path) -> GateParams:
    """The gate's tolerances: those of `options` that are given, else of pyproject.toml's [tool.textguard.gate], else the usual.

    Raises InvalidParameter.
    """
    stated = {}
    if pyproject.is_file():
        try:
            stated = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("tool", {}).get("textguard", {}).get("gate", {})
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, AttributeError) as error:
            raise InvalidParameter(f"{pyproject} cannot be read: {printable(str(error))}; mend it") from error
    place = f"{pyproject} [tool.textguard.gate]"
    known = GateParams.__dataclass_fields__
    if not isinstance(stated, dict) or stated.keys() - known.keys():
        strange = sorted(stated.keys() - known.keys())[0] if isinstance(stated, dict) else stated
        raise InvalidParameter(f"{place} holds {printable(repr(strange), 60)}; allowed: {', '.join(known)}")
    try:
        # As JSON, since a strict dataclass takes no dict in Python.
        given = {name: value for name, value in options.items() if value is not None}
        return TypeAdapter(GateParams).validate_json(json.dumps(stated | given, default=str))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidParameter(
            f"{where} is {printable(repr(first['input']), 40)} on the command line or in {place}; {first['msg']}"
        ) from error
