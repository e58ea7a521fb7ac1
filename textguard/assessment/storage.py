"""Assessments in a folder: assessment.json, records.parquet and predictions.parquet, which belong together or are refused."""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from textguard import __version__
from textguard.artifacts import fingerprint, reading, write_parquet
from textguard.assessment.result import Assessment
from textguard.errors import CannotWrite, InvalidArtifact, InvalidParameter, Setting, TextguardError
from textguard.estimates.summary import Totals
from textguard.faults.campaign import CampaignSettings
from textguard.faults.damage import FaultModel
from textguard.faults.execution import RECORD_COLUMNS
from textguard.faults.sites import Site
from textguard.schema.assessment import PREDICTIONS, AssessedSite, StoredAssessment
from textguard.schema.base import read, write
from textguard.schema.records import check_injections, inputs_of, read_columns

FILE, RECORDS, IMAGES = "assessment.json", "records.parquet", "predictions.parquet"
MOST_ROWS = 2**40  # however many injections there are
# Of the settings, those that are no CampaignSettings.
OTHERS = ("mitigation", "fit_per_megabit", "replayed")


def save(found: Assessment, folder: Path, overwrite: bool) -> None:
    """See `Assessment.save`."""
    content = _content(found)
    mark = content["mark"] = fingerprint(content=content, tables=[_digest(found.records), _digest(found.predictions)])
    file = folder / FILE
    if file.exists() and not overwrite:
        if _mark_of(file) == mark:
            return
        raise InvalidParameter(
            Setting("folder"), f": {folder} holds another assessment; name another folder, or say overwrite=True"
        )
    # While this file is missing there is no assessment, and what else lies there counts for nothing.
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise CannotWrite(f"{file}: {error.strerror}; nothing was written; make the folder writable") from error
    write_parquet(folder / RECORDS, found.records[RECORD_COLUMNS], {"inputs": mark})
    write_parquet(folder / IMAGES, found.predictions[PREDICTIONS], {"inputs": mark})
    write(file, StoredAssessment, content)


def load(folder: Path) -> Assessment:
    """See `Assessment.load`."""
    file = folder / FILE
    if not file.exists():
        raise InvalidArtifact(f"{folder} holds no assessment ({FILE}); name a folder that Assessment.save or textguard wrote")
    stored = read(file, "", StoredAssessment)
    with reading(file, ""):
        settings = _checked(stored.settings)
    records = read_columns(folder / RECORDS, "", RECORD_COLUMNS, MOST_ROWS)
    predictions = read_columns(folder / IMAGES, "", PREDICTIONS, stored.images, ["loss", "top2diff"])
    for name in (RECORDS, IMAGES):
        with reading(folder / name, ""):
            if inputs_of(folder / name, "") != stored.mark:
                raise InvalidArtifact(f"is of another assessment than {file}")
    found = Assessment(
        settings=settings,
        sites=tuple(_site(site) for site in stored.sites),
        skipped=tuple((entry.name, entry.reason) for entry in stored.skipped),
        modules=stored.modules,
        engine=stored.engine,
        reason=stored.reason,
        records=records,
        totals=tuple(Totals.from_json(layer.as_json()) for layer in stored.exact),
        predictions=predictions,
        classes=tuple(stored.classes),
        weights=stored.weights,
        parameters=stored.parameters,
        site_bits={site.layer: site.bits for site in stored.sites},
        ranges=dict(stored.ranges),
        limits={layer: math.inf if math.isnan(limit) else limit for layer, limit in stored.limits.items()},
    )
    _check(found, stored, folder)
    return found


def is_saved(folder: Path) -> bool:
    """Whether an assessment lies there."""
    return (folder / FILE).exists()


def _content(found: Assessment) -> dict[str, Any]:
    """All but the mark, as JSON has it."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "mark": "",
        "version": __version__,
        "settings": found.settings,
        "sites": [asdict(site) | {"shape": list(site.shape), "bits": found.bits_at(site.layer)} for site in found.sites],
        "skipped": [{"name": name, "reason": reason} for name, reason in found.skipped],
        "modules": found.modules,
        "engine": found.engine,
        "reason": found.reason,
        "exact": [layer.as_json() for layer in found.totals],
        "classes": list(found.classes),
        "weights": found.weights,
        "parameters": found.parameters,
        "images": found.images,
        "eligible": found.eligible,
        "top1": found.top1.as_json(),
        "ranges": {layer: number(value) for layer, value in found.ranges.items()},
        "limits": {layer: number(value) for layer, value in found.limits.items()},
    }


def _site(stored: AssessedSite) -> Site:
    known = stored.model_dump(exclude_unset=True, exclude={"bits"})
    return Site(**known | {"shape": tuple(stored.shape)})


def _digest(table: pd.DataFrame) -> str:
    return hashlib.sha256(pd.util.hash_pandas_object(table, index=False).to_numpy().tobytes()).hexdigest()


def _mark_of(file: Path) -> str:
    """The mark of what is saved there; empty where that cannot be read."""
    try:
        return read(file, "", StoredAssessment).mark
    except TextguardError:
        return ""


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of `assess`, all of them and valid. Raises InvalidArtifact, without the file's name."""
    wanted = {*CampaignSettings.__dataclass_fields__, *OTHERS[:2]} - {"batch_size", "compare_detectors"}
    if missing := sorted(wanted - settings.keys()):
        raise InvalidArtifact(f"has settings without {missing[0]}")
    own = {name: value for name, value in settings.items() if name in CampaignSettings.__dataclass_fields__}
    try:
        CampaignSettings(**own | {"fault_model": FaultModel(**settings["fault_model"])})
    except (TypeError, TextguardError) as error:
        raise InvalidArtifact(f"has settings that there cannot be: {error}") from error
    rate = settings["fit_per_megabit"]
    if rate is not None and not (isinstance(rate, int | float) and 0 < rate < math.inf):
        raise InvalidArtifact(f"has settings with fit_per_megabit {json.dumps(rate)}")
    return settings


def _check(found: Assessment, stored: StoredAssessment, folder: Path) -> None:
    """The three files say the same. Raises InvalidArtifact."""
    with reading(folder / IMAGES, ""):
        if (found.images, found.eligible) != (stored.images, stored.eligible):
            raise InvalidArtifact(f"has {found.eligible} of {found.images} images eligible, and {FILE} says otherwise")
        if len(found.predictions) and found.predictions["prediction"].max() >= len(found.classes):
            raise InvalidArtifact(f"has predictions of classes that {FILE} does not name")
    with reading(folder / RECORDS, ""):
        model = found.fault_model
        check_injections(found.records, model.bits * model.values)
        known, drawn = {site.layer for site in found.sites}, set(found.records["layer"])
        exact = {layer.layer for layer in found.totals}
        if drawn - known or drawn & exact or known - drawn - exact:
            wrong = sorted((drawn - known) | (drawn & exact) | (known - drawn - exact))[0]
            raise InvalidArtifact(f"and {FILE} do not have the same sampled layers; they differ in {wrong!r}")
        beyond = found.records[
            found.records["bit"] >= found.records["layer"].map({site.layer: site.bits for site in stored.sites})
        ]
        if len(beyond):
            first = beyond.iloc[0]
            raise InvalidArtifact(
                f"has bit {first['bit']} of layer {first['layer']!r}, of {found.bits_at(first['layer'])} bits"
            )
