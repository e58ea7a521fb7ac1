"""Test one classifier on corrupted images, with faults and without; clean images beside them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.loading import LoadedRun, load_run
from stages.settings import campaign_settings
from textguard.artifacts import fingerprint, work_dir, write_parquet
from textguard.estimates.statistics import mean_estimate, mean_interval, paired_difference, rate_estimate, rate_interval
from textguard.estimates.summary import mean_over_layers, summarise, summarise_totals
from textguard.faults import Campaign, protect
from textguard.faults.execution import no_records
from textguard.faults.profiling import largest_outputs
from textguard.params import Params
from textguard.schema.base import write
from textguard.schema.corruptions import CLEAN, Corruptions
from textguard.schema.results import MEASURES
from textguard.vision.corruptions import CorruptedView, Corruption
from textguard.vision.evaluation import predict
from textguard.vision.folding import fold_scale
from textguard.vision.transforms import EvaluationView, image_loader

BATCH_SIZE = 256


def main(params: Params, key: str) -> None:
    run, section, confidence = load_run(params, key), params.corruptions, params.statistics.confidence
    inputs = run.checksums(["model", "data", "ranges", "bounds"])
    mark = fingerprint(corruptions=replace(section, datasets=[]), inject=params.inject, head=params.head, **inputs)
    conditions, seen, records = [], [], [no_records().assign(kind="", severity=0)]
    corruptions = [
        None,
        *(Corruption(kind, severity, section.seed) for kind in section.kinds for severity in section.severities),
    ]
    with work_dir("corruptions", key, mark) as work:
        for corruption in corruptions:
            place = {"kind": corruption.kind, "severity": corruption.severity} if corruption else {"kind": CLEAN, "severity": 0}
            name = "-".join(map(str, place.values()))
            view = _corrupted(run, corruption) if corruption else run.view
            predictions = predict(run.model, view, BATCH_SIZE, f"corruptions {key}, {name}")
            right = (predictions["prediction"] == predictions["label"]).to_numpy(float)
            found = {
                **place,
                "top1": rate_estimate(int(right.sum()), len(right), confidence).as_json(),
                "loss": mean_estimate(predictions["loss"].to_numpy(float), confidence).as_json(),
                "top2diff": mean_estimate(predictions["top2diff"].to_numpy(float), confidence, most=1.0).as_json(),
            }
            if right.any() and (not corruption or corruption.severity in section.campaign_severities):
                found["faults"], injected = inject_faults(run, view, params, work / name, f"corruptions {key}, {name}")
                records.append(injected.assign(**place))
            seen.append(predictions.assign(**place))
            conditions.append((found, right))
    write_parquet(run.records / "corrupted.parquet", pd.concat(seen, ignore_index=True))
    write_parquet(run.records / "corruptions.parquet", pd.concat(records, ignore_index=True))
    (_, clean), *others = conditions
    lost = paired_difference(100 * clean, 100 * np.mean([right for _, right in others], axis=0), confidence)
    content = {"confidence": confidence, "images": len(clean), "conditions": [found for found, _ in conditions]}
    write(Path("metrics") / "corruptions" / f"{key}.json", Corruptions, {**content, "lost": lost.as_json()})


def _corrupted(run: LoadedRun, corruption: Corruption) -> CorruptedView:
    return CorruptedView(run.split, run.spec.image_size, run.spec.resize_size, run.spec.interpolation, corruption)


def inject_faults(
    run: LoadedRun, view: EvaluationView, params: Params, work: Path, label: str
) -> tuple[dict[str, Any], pd.DataFrame]:
    """What a campaign like that of section `inject`, but smaller, comes to on these images, as metrics has it; its records."""
    inject, statistics, most = params.inject, params.statistics, params.corruptions.injections_per_layer
    smaller = {"injections_per_layer": most, "pilot": min(inject.pilot, most), "stop_at": "never", "compare_detectors": []}
    model = fold_scale(run.model) if params.head.fold_scale else run.model
    model = protect(model, run.image, run.bounds, inject.mitigation)
    settings, loader = campaign_settings(replace(inject, **smaller)), image_loader(view, inject.batch_size)
    campaign = Campaign(model, loader, settings, largest_outputs(run.ranges))
    records, _ = campaign.sample_layers(work, label)
    totals = campaign.enumerate_layers(work, label)[inject.detector]
    layers = summarise(
        records,
        {site.layer: site.neurons for site in campaign.sampled},
        campaign.strata,
        nonfinite=statistics.nonfinite,
        guided=inject.plan == "guided",
        shared=settings.design.share_images,
    )
    layers |= {layer.layer: summarise_totals(layer, statistics.nonfinite) for layer in totals}
    overall = {}
    for measure in MEASURES:
        interval = mean_interval if measure == "delta_loss" else rate_interval
        overall[measure] = interval(mean_over_layers(list(layers.values()), measure), statistics.confidence).as_json()
    injections = sum(layer.injections for layer in layers.values() if layer.method == "sampled")
    return {"images": len(campaign.eligible), "injections": injections, "overall": overall}, records
