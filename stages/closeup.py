"""Look at one classifier under faults: Ablation-CAM before and after them, and the values of its last layer."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.loading import LoadedRun, load_run
from stages.settings import campaign_inputs, campaign_settings, protected
from textguard.artifacts import reading, write_parquet
from textguard.closeup import LOOKS, CamModel, count_magnitudes, damaged_states, look_at, shifts, worst_injection
from textguard.errors import CampaignMismatch, InvalidArtifact, UnsupportedModel
from textguard.faults import CampaignSettings, FaultModel
from textguard.faults.engines import Engine
from textguard.faults.execution import RECORD_COLUMNS
from textguard.faults.plans import check_plan
from textguard.faults.profiling import largest_outputs
from textguard.params import CloseupParams, Params
from textguard.schema.base import write
from textguard.schema.closeup import CloseUp
from textguard.schema.records import check_injections, inputs_of, read_columns
from textguard.vision.folding import fold_scale
from textguard.vision.transforms import image_loader


def main(params: Params, key: str) -> None:
    run, settings = load_run(params, key), campaign_settings(params.inject)
    model = fold_scale(run.model) if params.head.fold_scale else run.model
    profiled, model = largest_outputs(run.ranges), protected(run, model, params.inject.mitigation)
    engine = settings.make_engine(model, run.image, profiled)
    run.check_layers((site.layer, site.kind, site.neurons) for site in engine.all_sites)
    records = _load_records(run, params, engine)
    last = engine.sites[-1].layer
    values = count_magnitudes(engine, image_loader(run.view, settings.batch_size), profiled[last])
    content = {"last_layer": {"layer": last, "profiled": profiled[last], "images": len(run.view), **values}}
    traced = {"kinds": settings.kinds, "number_format": settings.stored_as, "profiled": profiled}
    try:
        if not params.closeup.images:
            raise UnsupportedModel("closeup.images is 0")
        cam = CamModel(model, run.image, **traced, smallest=params.closeup.smallest_map)
    except UnsupportedModel as error:
        looks, content["cam"] = pd.DataFrame(columns=LOOKS), {"skipped": str(error)}
    else:
        looks, content["cam"] = _look(cam, run, records, settings, profiled, params.closeup, params.statistics.confidence)
    write_parquet(Path("metrics") / "looks" / f"{key}.parquet", looks)
    write(Path("metrics") / "closeup" / f"{key}.json", CloseUp, content)


def _load_records(run: LoadedRun, params: Params, engine: Engine) -> pd.DataFrame:
    """The injections of the classifier's own campaign. Raises InvalidArtifact."""
    file, fault_model = run.records / "injections.parquet", FaultModel(**asdict(params.inject.faults))
    rows_each = fault_model.bits * fault_model.values
    most = params.inject.injections_per_layer * len(engine.sites) * rows_each
    records = read_columns(file, "inject", RECORD_COLUMNS, most)
    with reading(file, "inject"):
        check_injections(records, rows_each)
        try:
            check_plan(records, engine.sites, len(run.view), fault_model, engine.number_format)
        except CampaignMismatch as error:
            raise InvalidArtifact(f"is of another campaign: {error}") from error
        if inputs_of(file, "inject") != campaign_inputs(run, params):
            raise InvalidArtifact(f"is of another campaign than that of {run.key} with today's params.yaml")
    return records


def _look(
    cam: CamModel,
    run: LoadedRun,
    records: pd.DataFrame,
    settings: CampaignSettings,
    profiled: dict[str, float],
    closeup: CloseupParams,
    confidence: float,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The class activation maps before and after faults, and what they come to."""
    # The backbone's last layer and the head differ from variant to variant: only before them can faults be the same.
    without = sum(site.kind == "Linear" for site in cam.sites[-2 if run.spec.width else -1 :])
    weights, worst = cam.draw_flips(closeup.weight_flips, without, closeup.seed), worst_injection(records)
    states = damaged_states(cam, weights, worst, settings.fault_model, settings.detector, profiled)
    count = min(closeup.images, len(run.view))
    positions = np.sort(np.random.default_rng(closeup.seed).choice(len(run.view), count, replace=False)).tolist()
    looks = look_at(cam, run.view, positions, states, settings.batch_size, f"closeup {run.key}")
    found = {"layer": cam.place.name, "places": cam.place.side**2, "images": count, "detector": settings.detector}
    found |= {"confidence": confidence, **shifts(looks, confidence)}
    if not weights.empty:
        found["weights"] |= {"flips": len(weights)}
    if not worst.empty:
        first = worst[["layer", "neuron", "bit", "golden_value", "faulty_value"]].iloc[0].to_dict()
        found["worst"] |= {"target": settings.fault_model.target, **first}
    return looks, found
