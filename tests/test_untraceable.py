"""A network that torch.fx cannot trace goes through every stage; what needs a trace is said before the training."""

import pandas as pd
import pytest

from bad_input_grid import Grid, says
from textguard.artifacts import read_json

RUN = "digits-vit-baseline-0"
VIT = {
    **{
        "network": "timm:test_vit",
        "recipe": "resnet",
        "epochs": 1,
        "batch_size": 20,
        "base_batch_size": 20,
        "warmup_epochs": 0,
    },
    **{"learning_rate": 0.01, "image_size": 160, "resize_size": 160, "crop": "none", "flip": 0.0},
}


@pytest.fixture
def vit(grid: Grid) -> Grid:
    """The small grid with timm's smallest vision transformer in its only run, and float16 as the number format."""
    grid.change("backbones", {"vit": VIT})
    grid.change("variants", ["baseline"])
    changes = {"format": "fp16", "kinds": ["Conv2d", "Linear", "Add"], "injections_per_layer": 2, "enumerate_up_to": 0}
    for name, value in changes.items():
        grid.change(f"inject.{name}", value)
    assert grid.run("recipes")[0] == 0
    return grid


def test_a_vision_transformer_goes_through_every_stage(vit):
    for stage in ("train", "evaluate", "ranges", "inject", "closeup"):
        code, lines = vit.run(stage, RUN)
        assert code == 0, lines
        if stage == "ranges":
            assert any("no activation is profiled, and no mitigation can be used: VisionTransformer" in line for line in lines)
    for stage in ("results", "tables"):
        assert vit.run(stage)[0] == 0
    folder = vit.folder / "metrics" / "runs" / RUN
    assert pd.read_csv(folder / "activations.csv").columns.tolist() == ["activation", "low", "high"]
    assert pd.read_csv(folder / "activations.csv").empty
    assert read_json(folder / "campaign.json", "inject")["settings"]["ran_by"] == "whole"  # though replay was asked for
    ranges = pd.read_csv(folder / "ranges.csv")
    assert set(ranges["kind"]) == {"Conv2d", "Linear", "Add"}
    records = pd.read_parquet(vit.folder / "metrics" / "records" / RUN / "injections.parquet")
    assert set(records["layer"]) == set(ranges["layer"])


def test_a_mitigation_that_needs_a_trace_is_refused_before_the_training(vit):
    vit.change("inject.mitigation", "ranger")
    code, lines = vit.run("train", RUN)
    assert code == 1
    says(lines[-1], "UnsupportedModel: params.yaml inject.mitigation 'ranger' needs a model that can be traced; set it to none")
