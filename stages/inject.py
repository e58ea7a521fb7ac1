"""Run the injection campaign on one classifier."""

import sys

import pandas as pd

from stages.loading import load_run
from stages.settings import campaign_inputs, campaign_settings, protected
from textguard.artifacts import work_dir, write_parquet
from textguard.faults import Campaign
from textguard.faults.execution import no_records
from textguard.faults.plans import PLAN_COLUMNS
from textguard.faults.profiling import largest_outputs
from textguard.params import Params
from textguard.runtime import describe_device, join_processes
from textguard.schema.base import write
from textguard.schema.campaign import StoredCampaign, campaign_fields
from textguard.vision.folding import fold_scale
from textguard.vision.transforms import image_loader


def main(params: Params, key: str) -> None:
    run, inject = load_run(params, key), params.inject
    model = fold_scale(run.model) if params.head.fold_scale else run.model
    profiled, model = largest_outputs(run.ranges), protected(run, model, inject.mitigation)
    campaign = Campaign(model, image_loader(run.view, inject.batch_size), campaign_settings(inject), profiled)
    run.check_layers((site.layer, site.kind, site.neurons) for site in campaign.engine.all_sites)
    mark = campaign_inputs(run, params)
    with work_dir("inject", key, mark) as work:
        records, changes = campaign.sample_layers(work, f"inject {key}")
        if join_processes()[0]:
            return
        totals = campaign.enumerate_layers(work, f"enumerate {key}")
        rescaled = campaign.rescale_last_layer(work, f"enumerate {key}")
        if not sys.stderr.isatty():
            for result in campaign.summarise(records, totals[inject.detector]).values():
                print(f"inject {key}: {result}", file=sys.stderr, flush=True)
        settings = {
            **campaign_fields(inject),
            "fold_scale": params.head.fold_scale,
            "inputs": mark,
            "device": describe_device(run.device),
            "ran_by": campaign.engine.name,  # which may be another engine than was asked for
        }
        metadata = {name: str(value) for name, value in settings.items()}
        changed = [part.assign(detector=name) for name, part in changes.items()] or [no_records().assign(detector="")]
        write_parquet(run.records / "plan.parquet", records[PLAN_COLUMNS], {"seed": str(inject.seed)})
        write_parquet(run.records / "injections.parquet", records, metadata)
        write_parquet(run.records / "detectors.parquet", pd.concat(changed), metadata)
        write(run.folder / "campaign.json", StoredCampaign, campaign.as_json(totals, rescaled) | {"settings": settings})
