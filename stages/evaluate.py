"""Measure one classifier without faults: accuracy, loss, Top2Diff, parameters, multiply-adds."""

from pathlib import Path

from textguard.artifacts import write_csv, write_json, write_parquet
from textguard.estimates.statistics import mean_estimate, rate_estimate
from textguard.params import Params
from textguard.runtime import describe_device, join_processes, pick_device
from textguard.vision.classifiers import load_classifier
from textguard.vision.datasets import data_root, load_split
from textguard.vision.evaluation import accuracy_by_threshold, measure_cost, predict, score_scale
from textguard.vision.transforms import evaluation_view

BATCH_SIZE = 256


def main(params: Params, key: str) -> None:
    run = params.runs[key]
    device = pick_device()
    model, spec = load_classifier(Path("models") / f"{key}.safetensors")
    model.to(device)
    dataset = params.datasets[run.dataset]
    split = load_split(Path("data") / run.dataset, "test", data_root(dataset.source, dataset.folder, Path(params.root)))
    view = evaluation_view(split, spec.image_size, spec.resize_size, spec.interpolation)
    predictions = predict(model, view, BATCH_SIZE, f"evaluate {key}")
    if join_processes(device)[0]:
        return
    cost = measure_cost(model, view[0][0].to(device))
    correct = int((predictions["prediction"] == predictions["label"]).sum())
    write_parquet(Path("metrics") / "records" / key / "predictions.parquet", predictions)
    write_csv(Path("metrics") / "runs" / key / "thresholds.csv", accuracy_by_threshold(predictions))
    write_json(
        Path("metrics") / "runs" / key / "evaluation.json",
        {
            "top1": rate_estimate(correct, len(predictions)).as_json(),
            "loss": mean_estimate(predictions["loss"].to_numpy(dtype=float)).as_json(),
            "top2diff": mean_estimate(predictions["top2diff"].to_numpy(dtype=float)).as_json(),
            "parameters": cost.parameters,
            "multiply_adds": cost.multiply_adds,
            "scale": score_scale(model),
            "seed": run.seed,
            "device": describe_device(device),
        },
    )
