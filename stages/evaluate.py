"""Measure one classifier without faults: accuracy, loss, Top2Diff, parameters, multiply-adds."""

from stages.loading import load_run
from textguard.artifacts import weights_mark, write_csv, write_parquet
from textguard.estimates.statistics import mean_estimate, rate_estimate
from textguard.params import Params
from textguard.runtime import describe_device, join_processes
from textguard.schema.base import write
from textguard.schema.evaluation import Evaluation
from textguard.vision.evaluation import accuracy_by_threshold, measure_cost, predict, score_scale

BATCH_SIZE = 256


def main(params: Params, key: str) -> None:
    run = load_run(params, key)
    predictions = predict(run.model, run.view, BATCH_SIZE, f"evaluate {key}")
    if join_processes(run.device)[0]:
        return
    cost = measure_cost(run.model, run.image)
    correct = int((predictions["prediction"] == predictions["label"]).sum())
    write_parquet(run.records / "predictions.parquet", predictions)
    write_csv(run.folder / "thresholds.csv", accuracy_by_threshold(predictions))
    write(
        run.folder / "evaluation.json",
        Evaluation,
        {
            "top1": rate_estimate(correct, len(predictions)).as_json(),
            "loss": mean_estimate(predictions["loss"].to_numpy(dtype=float)).as_json(),
            "top2diff": mean_estimate(predictions["top2diff"].to_numpy(dtype=float), most=1.0).as_json(),
            "parameters": cost.parameters,
            "multiply_adds": cost.multiply_adds,
            "scale": score_scale(run.model),
            "weights": weights_mark(run.model),
            "seed": params.runs[key].seed,
            "device": describe_device(run.device),
        },
    )
