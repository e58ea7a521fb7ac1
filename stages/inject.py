"""Run the injection campaign on one classifier."""

import sys
from dataclasses import asdict
from pathlib import Path

from textguard.artifacts import fingerprint, read_csv, sha256_of_file, work_dir, write_json, write_parquet
from textguard.faults.campaign import eligible_images, loader_of, run_campaign, summarise
from textguard.faults.damage import FaultModel, weight_limits
from textguard.faults.detectors import detector_limits
from textguard.faults.engines import make_engine
from textguard.faults.formats import parse_format
from textguard.faults.mitigations import protect
from textguard.faults.plans import draw_plan
from textguard.faults.statistics import weighted_mean
from textguard.params import Params
from textguard.runtime import describe_device, join_processes, pick_device
from textguard.vision.classifiers import load_classifier
from textguard.vision.datasets import load_split


def main(params: Params, key: str) -> None:
    run, inject = params.runs[key], params.inject
    out, records_out = Path("metrics") / "runs" / key, Path("metrics") / "records" / key
    model_file, ranges_file, bounds_file = Path("models") / f"{key}.safetensors", out / "ranges.csv", out / "activations.csv"
    data_folder = Path("data") / run.dataset

    number_format = parse_format(inject.format)
    fault_model = FaultModel(**asdict(inject.faults))
    split = load_split(data_folder, "test")
    loader = loader_of(split.images, split.labels, inject.batch_size)
    ranges = read_csv(ranges_file, "ranges", ["layer"], ["max_abs"])
    bounds = read_csv(bounds_file, "ranges", ["activation"], ["low", "high"])
    profiled = dict(zip(ranges["layer"], ranges["max_abs"], strict=True))

    model, _ = load_classifier(model_file)
    image = split.images[0].to(pick_device())
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
    limits = detector_limits(inject.detector, [site.layer for site in engine.sites], known)
    eligible = eligible_images(engine, loader)
    plan = draw_plan(engine.sites, eligible, inject.injections_per_layer, inject.seed, fault_model, number_format)

    mark = fingerprint(
        inject=inject,
        model=sha256_of_file(model_file, "train"),
        data=sha256_of_file(data_folder / "test.safetensors", "data"),
        ranges=sha256_of_file(ranges_file, "ranges"),
        bounds=sha256_of_file(bounds_file, "ranges"),
    )
    with work_dir("inject", key, mark) as work:
        records = run_campaign(
            engine,
            loader,
            plan,
            limits,
            image_batch=inject.image_batch,
            fault_model=fault_model,
            shard_dir=work,
            label=f"inject {key}",
        )
        rank, _ = join_processes()
        if rank:
            return
        layers = summarise(records, engine.sites)
        if not sys.stderr.isatty():
            for layer in layers:
                print(f"inject {key}: {layer}", file=sys.stderr, flush=True)
        settings = {**asdict(inject), "inputs": mark, "device": describe_device(image.device)}
        write_parquet(records_out / "plan.parquet", plan, {"seed": str(inject.seed)})
        write_parquet(records_out / "injections.parquet", records, {name: str(value) for name, value in settings.items()})
        write_json(
            out / "resilience.json",
            {
                "overall_delta_loss": weighted_mean([layer.delta_loss for layer in layers], [1] * len(layers)).as_json(),
                "overall_mismatch": weighted_mean([layer.mismatch for layer in layers], [1] * len(layers)).as_json(),
                "injections": sum(layer.injections for layer in layers),
                "masked": sum(layer.masked for layer in layers),
                "nonfinite": sum(layer.nonfinite for layer in layers),
                "layers": [layer.as_json() for layer in layers],
                "skipped": dict(engine.skipped),
                "settings": settings,
            },
        )
