"""Write down how each backbone and variant comes to its weights, so that a change retrains only what it concerns."""

from dataclasses import asdict
from pathlib import Path

from textguard.artifacts import write_json
from textguard.params import Params


def main(params: Params) -> None:
    for key, run in {run.weights_key: run for run in params.runs.values()}.items():
        weights = params.weights.get(key)
        content = {"weights": asdict(weights)} if weights else asdict(params.recipe(run))
        if treatment := params.treatments.get(run.variant):
            content["treatment"] = treatment.in_training
        write_json(Path("models") / "recipes" / f"{key}.json", content)
