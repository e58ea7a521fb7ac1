"""What protections and mitigations cost and buy, in one table."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from textguard.errors import InvalidParameter
from textguard.hardware.costs import mitigation_costs, protection_table, time_ratios
from textguard.hardware.rates import error_rates


@pytest.fixture(scope="module")
def classifier() -> tuple[nn.Module, DataLoader]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6), nn.GELU(), nn.Linear(6, 3)).eval()
    images = torch.randn(40, 1, 8, 8)
    return model, DataLoader(TensorDataset(images, model(images).argmax(dim=1)), batch_size=20)


def test_one_row_per_protection(classifier):
    names = ("none", "parity", "secded(32)", "triplicated_exponent")
    curves = {name: error_rates(*classifier, [1e-5, 3e-4, 1e-2], memories=6, protection=name) for name in names}
    table = protection_table(curves, 3e-4).set_index("name")
    assert list(table.index) == list(names)
    values = sum(parameter.numel() for parameter in classifier[0].parameters())
    assert table["gates"].tolist() == [0, 32 * values, 96 * values, 32 * values]
    assert table["stored_per_data_bit"].tolist() == [1, 33 / 32, 39 / 32, 48 / 32]
    for name, curve in curves.items():
        assert table["top1"][name] == pytest.approx(curve.memories.query("rate == 3e-4")["top1"].mean())
        assert table["top1_low"][name] <= table["top1"][name] <= table["top1_high"][name]
    assert table["top1"]["secded(32)"] >= table["top1"]["none"]
    assert table["longer"].isna().tolist()[0]
    assert table["longer_low"]["secded(32)"] >= 1
    with pytest.raises(InvalidParameter, match=r"rate is 0.5; curve 'none' has 1e-05, 0.0003, 0.01"):
        protection_table(curves, 0.5)


def test_mitigations_are_counted_and_timed_beside_the_model(classifier):
    costs = mitigation_costs(*classifier).set_index("mitigation")
    assert costs["comparisons"].tolist() == [0, *[2 * (4 * 36 + 6)] * 3]
    assert costs["numbers"].tolist() == [0, 4, 4, 2 + 4 + 6]
    assert costs["time"]["none"] == pytest.approx(1, abs=0.9)
    curve = error_rates(*classifier, [1e-3], memories=2)
    table = protection_table({"none": curve, "ranger": curve}, 1e-3, mitigations=costs.reset_index())
    assert table["comparisons"].tolist() == [0, 300]


def test_time_ratios_are_of_the_first_model():
    class Slow(nn.Module):
        def forward(self, x):
            for _ in range(40):
                x = x @ x
            return x

    found = time_ratios({"one": nn.Identity(), "forty": Slow()}, torch.eye(64), rounds=3)
    assert found["one"] == 1
    assert found["forty"] > 5
