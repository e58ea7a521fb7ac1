"""Run the injection campaign on one classifier."""

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from textguard.artifacts import fingerprint, read_csv, read_json, sha256_of_file, work_dir, write_json, write_parquet
from textguard.estimates.summary import Totals, summarise, summarise_totals
from textguard.faults.campaign import image_chances, no_records
from textguard.faults.damage import FaultModel, weight_limits
from textguard.faults.detectors import detector_limits
from textguard.faults.engines import make_engine
from textguard.faults.exact import affordable, enumerate_layer
from textguard.faults.formats import parse_format
from textguard.faults.mitigations import protect
from textguard.faults.plans import PLAN_COLUMNS, bits_of
from textguard.faults.sampling import Design, rerun_changed, run_design
from textguard.params import Params
from textguard.runtime import describe_device, join_processes, pick_device
from textguard.vision.classifiers import load_classifier
from textguard.vision.datasets import data_root, load_split, split_file
from textguard.vision.transforms import evaluation_view, image_loader


def main(params: Params, key: str) -> None:
    run, inject = params.runs[key], params.inject
    dataset = params.datasets[run.dataset]
    out, records_out = Path("metrics") / "runs" / key, Path("metrics") / "records" / key
    model_file, ranges_file, bounds_file = Path("models") / f"{key}.safetensors", out / "ranges.csv", out / "activations.csv"
    data_folder = Path("data") / run.dataset

    number_format = parse_format(inject.format)
    fault_model = FaultModel(**asdict(inject.faults))
    ranges = read_csv(ranges_file, "ranges", ["layer"], ["max_abs"])
    bounds = read_csv(bounds_file, "ranges", ["activation"], ["low", "high"])
    profiled = dict(zip(ranges["layer"], ranges["max_abs"], strict=True))

    model, spec = load_classifier(model_file)
    split = load_split(data_folder, "test", data_root(dataset.source, dataset.folder, Path(params.root)))
    view = evaluation_view(split, spec.image_size, spec.resize_size, spec.interpolation)
    loader = image_loader(view, inject.batch_size)
    image = view[0][0].to(pick_device())
    model = protect(
        model.to(image.device),
        image,
        {name: (low, high) for name, low, high in bounds[["activation", "low", "high"]].itertuples(index=False)},
        inject.mitigation,
    )
    engine = make_engine(
        inject.engine,
        model,
        image,
        inject.batch_size,
        kinds=inject.kinds,
        number_format=number_format,
        profiled=profiled,
        target=fault_model.target,
    )
    known = weight_limits(model, engine.sites) if fault_model.target == "weight" else profiled
    names = [inject.detector, *(name for name in inject.compare_detectors if name != inject.detector)]
    limits = {name: detector_limits(name, [site.layer for site in engine.sites], known) for name in names}
    chances = image_chances(engine, loader, inject.images)
    eligible = np.flatnonzero(chances).tolist()
    known_sites = affordable(engine, len(eligible), fault_model, inject.enumerate_up_to)
    sites = [site for site in engine.sites if site not in known_sites]
    design = Design(inject.plan, inject.injections_per_layer, inject.pilot, inject.stop_at, inject.confidence, inject.seed)
    strata = design.strata(fault_model, engine)

    mark = fingerprint(
        inject=inject,
        model=sha256_of_file(model_file, "train"),
        data=sha256_of_file(split_file(data_folder, "test"), "data"),
        ranges=sha256_of_file(ranges_file, "ranges"),
        bounds=sha256_of_file(bounds_file, "ranges"),
    )
    with work_dir("inject", key, mark) as work:
        options = {"image_batch": inject.image_batch, "fault_model": fault_model}
        records, changed = no_records(), {name: no_records() for name in names[1:]}
        if sites:
            records = run_design(
                engine, sites, loader, chances, limits[names[0]], design, shard_dir=work, label=f"inject {key}", **options
            )
            for number, name in enumerate(names[1:]):
                changed[name] = rerun_changed(
                    engine,
                    loader,
                    records,
                    limits[name],
                    shard_dir=work / f"detector-{number}",
                    label=f"inject {key}, detector {name}",
                    **options,
                )
        rank, _ = join_processes()
        if rank:
            return
        totals: dict[str, list[Totals]] = {name: [] for name in names}
        for number, name in enumerate(names):
            for site in known_sites:
                file = work / f"exact-{number}-{site.position}.json"
                if not file.exists():
                    label = f"enumerate {key}, detector {name},"
                    found = enumerate_layer(engine, loader, eligible, site, limits[name][site.layer], label)
                    write_json(file, found.as_json())
                totals[name].append(Totals.from_json(read_json(file, "inject")))
        if not sys.stderr.isatty():
            results = summarise(records, {site.layer: site.neurons for site in sites}, strata)
            results |= {layer.layer: summarise_totals(layer) for layer in totals[names[0]]}
            for site in engine.sites:
                print(f"inject {key}: {results[site.layer]}", file=sys.stderr, flush=True)
        settings = {**asdict(inject), "inputs": mark, "device": describe_device(image.device)}
        metadata = {name: str(value) for name, value in settings.items()}
        write_parquet(records_out / "plan.parquet", records[PLAN_COLUMNS], {"seed": str(inject.seed)})
        write_parquet(records_out / "injections.parquet", records, metadata)
        changes = pd.concat(
            [part.assign(detector=name) for name, part in changed.items()] or [no_records().assign(detector="")]
        )
        write_parquet(records_out / "detectors.parquet", changes, metadata)
        write_json(
            out / "campaign.json",
            {
                "layers": [
                    {"layer": site.layer, "kind": site.kind, "neurons": site.neurons, "multiply_adds": site.multiply_adds}
                    for site in engine.sites
                ],
                "bits": bits_of(fault_model, number_format),
                "strata": strata,
                "eligible_images": len(eligible),
                "detectors": names,
                "exact": {name: [layer.as_json() for layer in found] for name, found in totals.items()},
                "skipped": dict(engine.skipped),
                "settings": settings,
            },
        )
