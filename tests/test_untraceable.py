"""A network that torch.fx cannot trace goes through every stage; what needs a trace is said before the training."""

import sys

import pandas as pd
import pytest

from bad_input_grid import Grid, says
from textguard.artifacts import read_json

RUN = "digits-odd-baseline-0"
# A value decides what is computed, which no trace can follow.
NETWORK = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first, self.more, self.head = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.first(x).relu()
        if x.abs().amax() > 1e30:
            x = x * 2
        return self.head((x + self.more(x).relu()).mean((2, 3)))
"""
ODD = {
    **{
        "network": "module:own.net:Net",
        "recipe": "resnet",
        "epochs": 1,
        "batch_size": 20,
        "base_batch_size": 20,
        "warmup_epochs": 0,
    },
    **{"learning_rate": 0.01, "image_size": 32, "resize_size": 32, "crop": "none", "flip": 0.0},
}


@pytest.fixture
def odd(grid: Grid, monkeypatch) -> Grid:
    """The small grid with such a network in its only run, and float16 as the number format."""
    for name in ("own", "own.net"):  # of another grid, in this process
        monkeypatch.delitem(sys.modules, name, raising=False)
    grid.put("own/net.py", NETWORK)
    grid.change("backbones", {"odd": ODD})
    grid.change("variants", ["baseline"])
    changes = {"format": "fp16", "kinds": ["Conv2d", "Linear", "Add"], "injections_per_layer": 2, "enumerate_up_to": 0}
    for name, value in changes.items():
        grid.change(f"inject.{name}", value)
    grid.change("hardware.mitigations", [])
    assert grid.run("recipes")[0] == 0
    return grid


def test_a_network_without_a_trace_goes_through_every_stage(odd):
    for stage in ("train", "evaluate", "ranges", "inject", "hardware", "closeup"):
        code, lines = odd.run(stage, RUN)
        assert code == 0, lines
        if stage == "ranges":
            assert any("no activation is profiled, and no mitigation can be used: Net" in line for line in lines)
    for stage in ("results", "tables"):
        assert odd.run(stage)[0] == 0
    folder = odd.folder / "metrics" / "runs" / RUN
    assert pd.read_csv(folder / "activations.csv").columns.tolist() == ["activation", "low", "high"]
    assert pd.read_csv(folder / "activations.csv").empty
    assert read_json(folder / "campaign.json", "inject")["settings"]["ran_by"] == "whole"  # though replay was asked for
    ranges = pd.read_csv(folder / "ranges.csv")
    assert set(ranges["kind"]) == {"Conv2d", "Linear", "Add"}
    records = pd.read_parquet(odd.folder / "metrics" / "records" / RUN / "injections.parquet")
    assert set(records["layer"]) == set(ranges["layer"])


def test_a_mitigation_of_section_hardware_that_needs_a_trace_is_refused_before_anything_runs(odd):
    odd.change("hardware.mitigations", ["learned"])
    code, lines = odd.run("check")
    assert code == 1
    needs = "UnsupportedModel: params.yaml hardware.mitigations 'learned' needs a model that can be traced; leave it out: Net"
    says(lines[-1], needs)


def test_without_that_check_its_stage_names_the_same_section(odd):
    for stage in ("train", "evaluate", "ranges"):
        assert odd.run(stage, RUN)[0] == 0
    odd.change("hardware.mitigations", ["ranger"])
    odd.change("hardware.models", {})
    code, lines = odd.run("hardware", RUN)
    assert code == 1
    says(
        lines[-1],
        "UnsupportedModel: params.yaml hardware.mitigations 'ranger' needs a model that can be traced; leave it out: Net",
    )


def test_a_mitigation_that_needs_a_trace_is_refused_before_the_training(odd):
    odd.change("inject.mitigation", "ranger")
    code, lines = odd.run("train", RUN)
    assert code == 1
    says(lines[-1], "UnsupportedModel: params.yaml inject.mitigation 'ranger' needs a model that can be traced; set it to none")
