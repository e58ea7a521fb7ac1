"""Run the injection campaign on one classifier."""

from dataclasses import asdict
from pathlib import Path

from textguard.artifacts import fingerprint, read_csv, sha256_of_file, work_dir, write_json, write_parquet
from textguard.faults.bits import detector_limits
from textguard.faults.campaign import eligible_images, run_campaign, summarise
from textguard.faults.engines import make_engine
from textguard.faults.plans import draw_plan
from textguard.faults.statistics import weighted_mean
from textguard.params import Params
from textguard.runtime import describe_device, pick_device
from textguard.vision.classifiers import load_classifier
from textguard.vision.datasets import load_split


def main(params: Params, key: str) -> None:
    run, inject = params.runs[key], params.inject
    out, records_out = Path("metrics") / "runs" / key, Path("metrics") / "records" / key
    model_file, ranges_file = Path("models") / f"{key}.safetensors", out / "ranges.csv"
    data_folder = Path("data") / run.dataset

    device = pick_device()
    model, _ = load_classifier(model_file)
    model.to(device)
    split = load_split(data_folder, "test")
    images, labels = split.images.to(device), split.labels.to(device)
    engine = make_engine(inject.engine, model, images[0], inject.batch_size)
    ranges = read_csv(ranges_file, "ranges", ["layer"], ["max_abs"])
    profiled = dict(zip(ranges["layer"], ranges["max_abs"], strict=True))
    limits = detector_limits(inject.detector, [site.layer for site in engine.sites], profiled)
    eligible = eligible_images(model, images, labels, inject.batch_size)
    plan = draw_plan(engine.sites, eligible, inject.injections_per_layer, inject.seed)

    mark = fingerprint(
        inject=inject,
        model=sha256_of_file(model_file, "train"),
        data=sha256_of_file(data_folder / "test.safetensors", "data"),
        ranges=sha256_of_file(ranges_file, "ranges"),
    )
    with work_dir("inject", key, mark) as work:
        records = run_campaign(
            engine, images, labels, plan, limits, image_batch=inject.image_batch, shard_dir=work, label=f"inject {key}"
        )
        layers = summarise(records, engine.sites)
        settings = {**asdict(inject), "inputs": mark, "device": describe_device(device)}
        write_parquet(records_out / "plan.parquet", plan, {"seed": str(inject.seed)})
        write_parquet(records_out / "injections.parquet", records, {name: str(value) for name, value in settings.items()})
        write_json(
            out / "resilience.json",
            {
                "overall_delta_loss": weighted_mean([layer.delta_loss for layer in layers], [1] * len(layers)).as_json(),
                "overall_mismatch": weighted_mean([layer.mismatch for layer in layers], [1] * len(layers)).as_json(),
                "injections": len(records),
                "nonfinite": sum(layer.nonfinite for layer in layers),
                "layers": [layer.as_json() for layer in layers],
                "settings": settings,
            },
        )
