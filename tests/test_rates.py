"""Bit error rates in stored weights: draws, outcomes beside a slow twin, intervals, and what is refused."""

import copy
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from conftest import TINY, settle
from textguard.errors import CampaignMismatch, InvalidParameter, UnknownName, UnsupportedModel
from textguard.faults import make_task
from textguard.faults.formats import parse_format
from textguard.hardware import rates as module
from textguard.hardware.protection import parse_protection
from textguard.hardware.rates import MEMORY_COLUMNS, RateCurve, error_rates, suggest_rates

RATES = [1e-5, 1e-4, 1e-3]


@pytest.fixture(scope="module")
def classifier() -> tuple[nn.Module, DataLoader]:
    """A tiny network with convolutions and BatchNorm, and images most of which it gets right."""
    torch.manual_seed(0)
    model = settle(TINY["resnet"]())
    images = torch.randn(24, 3, 8, 8)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    labels[:3] = (labels[:3] + 1) % 4
    return model, DataLoader(TensorDataset(images, labels), batch_size=7)


def read_by(model: nn.Module) -> dict[str, torch.Tensor]:
    """All float tensors of the fixture's network, each of which an inference reads."""
    return {name: tensor for name, tensor in sorted(model.state_dict().items()) if tensor.is_floating_point()}


def in_order(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The names in the order in which an inference reads them: layers in that of execution, and BatchNorm's as it is called."""
    layers = ["stem.0", "stem.1", "conv1", "norm1", "conv2", "fc"]
    parts = ["running_mean", "running_var", "weight", "bias"]
    assert {name.rpartition(".")[0] for name in tensors} == set(layers)
    return [f"{layer}.{part}" for layer in layers for part in parts if f"{layer}.{part}" in tensors]


def slowly(classifier, curve: RateCurve, number: int, rate: float) -> dict[str, float]:
    """One memory's outcome: every data and check bit of every word looked at, and one image at a time."""
    model, loader = copy.deepcopy(classifier[0]), classifier[1]
    name, format_name = curve.settings["protection"], curve.settings["number_format"]
    tensors, stored = read_by(model), {}
    for key, tensor in tensors.items():
        own = parse_format(format_name if tensor.ndim > 1 else "fp32")
        limit, zero = tensor.abs().max(), torch.zeros(tensor.numel(), dtype=torch.int64)
        codes = own.encode(tensor.reshape(-1), limit, zero)
        tensor.copy_(own.decode(codes, limit, zero).view(tensor.shape))
        stored[key] = (own, limit, codes.tolist())
    golden = outcome_of(model, loader)
    codes = {key: parse_protection(name).code(own) for key, (own, _, _) in stored.items()}
    sizes: list[tuple[int, int]] = []
    for key in in_order(tensors):
        tensor, (own, limit, held), code = tensors[key], stored[key], codes[key]
        values, seed = tensor.numel(), curve.settings["seed"]
        sizes.append((values, code.bits))
        stream = f"memory {number}, {values} values of {code.bits} bits, {sizes.count(sizes[-1])}"
        errors = module._draw_cells(seed, stream, values * code.bits, rate).position.tolist()
        check = module._draw_cells(seed, f"{stream}, {name}", code.check_bits(values), rate).position.tolist()
        errors += [one + values * code.bits for one in check]
        read = code.correct(values, np.array(errors, dtype=np.int64))  # its own twin is in test_protection.py
        for value, mask, zeroed in zip(read.value.tolist(), read.mask.tolist(), read.zeroed.tolist(), strict=True):
            faulty = own.decode(torch.tensor([held[value] ^ mask]), limit, torch.zeros(1, dtype=torch.int64))
            tensor.view(-1)[value] = 0.0 if zeroed else float(faulty)
    faulty = outcome_of(model, loader)
    finite = np.isfinite(faulty["loss"])
    right, was_right = faulty["right"] & finite, golden["right"]
    change = np.abs(faulty["loss"] - golden["loss"])[was_right & finite]
    return {
        "top1": right.mean(),
        "lost": 100 * (was_right.mean() - right.mean()),
        "changed": ((faulty["class"] != golden["class"]) | ~finite).mean(),
        "delta_loss": change.mean() if len(change) else math.nan,
        "nonfinite": (~finite)[was_right].mean(),
    }


@torch.no_grad()
def outcome_of(model: nn.Module, loader: DataLoader) -> dict[str, np.ndarray]:
    found: dict[str, list] = {"class": [], "right": [], "loss": []}
    for image, label in loader.dataset:
        logits = model(image[None])
        found["class"].append(int(logits.argmax()))
        found["right"].append(int(logits.argmax()) == int(label))
        found["loss"].append(float(nn.functional.cross_entropy(logits, label[None])))
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize(
    ("number_format", "protection", "highest"),
    [("fp32", "none", 1e-3), ("int(8)", "none", 3e-3), ("bf16", "secded(64)", 1e-2), ("fp32", "parity", 3e-3)],
)
def test_outcomes_are_those_of_the_slow_twin(classifier, number_format, protection, highest):
    given = {"number_format": number_format, "protection": protection, "memories": 5, "seed": 3}
    curve = error_rates(*classifier, [highest / 10, highest], **given)
    rows = curve.memories.set_index(["rate", "memory"])
    assert rows["wrong"].sum() > 10
    for rate in curve.rates:
        for number in range(5):
            row, expected = rows.loc[(rate, number)], slowly(classifier, curve, number, rate)
            for name in ("top1", "lost", "changed", "nonfinite"):
                assert row[name] == pytest.approx(expected[name]), (rate, number, name)
            assert row["delta_loss"] == pytest.approx(expected["delta_loss"], rel=1e-3, abs=1e-5, nan_ok=True)
    assert rows["changed"].max() > 0


def test_cells_are_nested_distinct_and_as_many_as_they_should_be():
    counts = []
    for number in range(400):
        many = module._draw_cells(0, f"memory {number}", 1000, 0.05)
        few = module._draw_cells(0, f"memory {number}", 1000, 0.01)
        assert len(set(many.position.tolist())) == len(many.position)
        assert many.position.min(initial=0) >= 0
        assert many.position.max(initial=0) < 1000
        assert many.at(0.01).tolist() == few.position.tolist()
        assert (np.diff(many.exposure) > 0).all()
        counts.append((len(few.position), len(many.position)))
    low, high = np.array(counts).T
    # Means and variances of 400 binomial counts, within four of their standard errors.
    assert low.mean() == pytest.approx(10, abs=4 * math.sqrt(9.9 / 400))
    assert high.mean() == pytest.approx(50, abs=4 * math.sqrt(47.5 / 400))
    assert high.var() == pytest.approx(47.5, rel=4 * math.sqrt(2 / 400))
    everything = module._draw_cells(0, "all", 7, 0.5).position
    assert set(everything.tolist()) <= set(range(7))
    assert len(module._draw_cells(0, "half", 10_000, 0.5).position) == pytest.approx(5000, abs=4 * 50)
    assert len(module._draw_cells(0, "none", 0, 0.5).position) == 0
    where = np.concatenate([module._draw_cells(1, f"memory {n}", 10, 0.3).position for n in range(400)])
    assert np.bincount(where, minlength=10).std() < 4 * math.sqrt(120)


def test_protection_and_other_rates_do_not_move_faults(classifier):
    settings = {"number_format": "fp32", "seed": 0, "operation": "flip"}
    found = {}
    for name in ("none", "secded(64)"):
        memory, _ = module._set_up(*classifier, settings | {"protection": name}, 8, make_task())
        cells = memory.draw(2, 1e-3)
        found[name] = [data.position.tolist() for data, _ in cells]
        assert any(len(checks.position) for _, checks in cells) == (name != "none")
    assert found["none"] == found["secded(64)"]
    # Tensors of one size have other faults, and another head moves none of those before it.
    wider = copy.deepcopy(classifier[0])
    wider.fc = nn.Linear(8, 7)
    memory, _ = module._set_up(wider, classifier[1], settings | {"protection": "none"}, 8, make_task())
    others = [data.position.tolist() for data, _ in memory.draw(2, 1e-3)]
    assert others[:-2] == found["none"][:-2]
    in_conv = [part for part, one in zip(found["none"], memory.tensors, strict=True) if len(one.values) == 8 * 8 * 9]
    assert len(in_conv) == 2
    assert in_conv[0] != in_conv[1]
    one = error_rates(*classifier, RATES, memories=3)
    other = error_rates(*classifier, [3e-4, *RATES[1:]], memories=4, batch_size=5)
    both = one.memories.merge(other.memories, on=["rate", "memory"])
    assert len(both) == 6
    for name in ("flips", "wrong", "top1", "changed"):
        assert both[f"{name}_x"].tolist() == both[f"{name}_y"].tolist()


def test_secded_mends_what_parity_only_sees(classifier):
    curves = {name: error_rates(*classifier, [1e-4], memories=8, protection=name) for name in ("none", "parity", "secded(32)")}
    sums = {name: curve.memories[["flips", "corrected", "detected", "silent", "wrong"]].sum() for name, curve in curves.items()}
    assert sums["none"]["silent"] == sums["none"]["wrong"] > 0
    assert sums["parity"]["detected"] == sums["parity"]["wrong"] > 0
    assert sums["secded(32)"]["corrected"] > 0 == sums["secded(32)"]["wrong"]
    assert curves["secded(32)"].memories["lost"].eq(0).all()
    assert curves["none"].settings["stored_bits"] * 39 == curves["secded(32)"].settings["stored_bits"] * 32


@pytest.mark.parametrize("protection", ["none", "parity"])
def test_stuck_bits_are_faults_where_the_other_bit_was_stored(classifier, protection):
    shares = []
    for at in (0, 1):
        operation = f"stuck_at_{at}"
        curve = error_rates(*classifier, [0.5], memories=2, operation=operation, protection=protection)
        shares.append(curve.memories["flips"].mean() / (0.5 * curve.settings["stored_bits"]))
    assert sum(shares) == pytest.approx(1, abs=0.02)
    assert 0.3 < shares[0] < 0.7


def test_memories_without_faults_are_not_run_and_weights_come_back(classifier, monkeypatch):
    calls = []
    outcome = module._Images.outcome
    monkeypatch.setattr(module._Images, "outcome", lambda self: calls.append(1) or outcome(self))
    before = {name: tensor.clone() for name, tensor in classifier[0].state_dict().items()}
    curve = error_rates(*classifier, [1e-9, 1e-4, 1.0001e-4], memories=3)
    assert len(calls) == 3  # nothing at the first rate, and at the last one what was there before
    first = curve.memories[curve.memories["rate"] == 1e-9]
    assert first["top1"].eq(curve.settings["golden_top1"]).all()
    assert not first[["flips", "lost", "changed", "delta_loss"]].any().any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier[0].state_dict().items())
    settings = {"number_format": "bf16", "protection": "parity", "seed": 0, "operation": "flip"}
    memory, images = module._set_up(*classifier, settings, 8, make_task())
    stored = [one.values.clone() for one in memory.tensors]
    with torch.inference_mode():
        list(module._outcomes(memory, images, 0, [1e-2]))
    assert all(torch.equal(one.values, old) for one, old in zip(memory.tensors, stored, strict=True))


def test_all_float_tensors_are_hit_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.unread = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.second(self.first(x)))

    settings = {"number_format": "fp16", "protection": "none", "seed": 0, "operation": "flip"}
    loader = DataLoader(TensorDataset(torch.randn(8, 4), torch.arange(8) % 4))
    memory, _ = module._set_up(Tied().eval(), loader, settings, 4, make_task())
    assert {one.name: one.format.name for one in memory.tensors} == {
        "first.weight": "fp16",
        **dict.fromkeys(("first.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"), "fp32"),
    }
    assert memory.data_bits == 16 * 16 + 5 * 4 * 32


def test_an_interrupted_curve_goes_on(classifier, tmp_path, monkeypatch, capsys):
    whole = error_rates(*classifier, RATES, memories=3)
    run, calls = module._run, []

    def fails(images, wrong):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(images, wrong)

    monkeypatch.setattr(module, "_run", fails)
    with pytest.raises(KeyboardInterrupt):
        error_rates(*classifier, RATES, memories=3, shard_dir=tmp_path)
    again = error_rates(*classifier, RATES, memories=3, shard_dir=tmp_path)
    pd.testing.assert_frame_equal(again.memories, whole.memories)
    assert "going on after" in capsys.readouterr().err
    (file,) = tmp_path.glob("memory-00001-rate-0.001.json")
    file.write_text("{", encoding="utf-8")
    before = len(calls)
    again = error_rates(*classifier, RATES[1:], memories=3, shard_dir=tmp_path)
    assert len(calls) == before + 1
    assert len(again.memories) == 6
    with pytest.raises(CampaignMismatch, match="seed was 0, now 1"):
        error_rates(*classifier, RATES, memories=3, seed=1, shard_dir=tmp_path)


def curve_of(lost: np.ndarray, rates: np.ndarray) -> RateCurve:
    """A curve of memories that lose so many points, [memories, rates], of 90."""
    columns = dict.fromkeys(MEMORY_COLUMNS, 0.0)
    parts = [
        pd.DataFrame(columns | {"rate": rate, "memory": np.arange(len(lost)), "lost": lost[:, at]})
        for at, rate in enumerate(rates)
    ]
    return RateCurve({"golden_top1": 0.9}, pd.concat(parts, ignore_index=True))


def test_points_are_honest_where_little_or_all_is_lost():
    rates = np.array([1e-7, 1e-6, 1e-5])
    lost = np.zeros((32, 3))
    lost[:, 2] = 80
    points = curve_of(lost, rates).points
    # Of 32 memories without any loss, a share of 1 - 0.005^(1/32) may lose everything.
    assert points[1e-7]["lost"].low == points[1e-7]["lost"].value == 0
    assert points[1e-7]["lost"].high > 90 * (1 - 0.005 ** (1 / 32)) * 0.9
    assert points[1e-7]["top1"].low == pytest.approx(0.9 - points[1e-7]["lost"].high / 100)
    assert points[1e-5]["lost"].low < 80 * 0.9
    assert points[1e-5]["lost"].high <= 90
    assert points[1e-5]["delta_loss"].value == 0
    everything = curve_of(np.full((7, 1), 100 * 0.9), np.array([1e-3])).points[1e-3]["top1"]
    assert (everything.value, everything.low) == (pytest.approx(0), pytest.approx(0))


def test_losing_rates_and_ratios_hold(monkeypatch):
    # A memory loses 80 points from its first critical flip on. The other model has a third of these bits, and no more.
    monkeypatch.setattr(module, "RESAMPLES", 300)
    rates, rng, critical = np.geomspace(1e-8, 1e-4, 9), np.random.default_rng(0), 1e6
    truth, held, widths = -math.log1p(-10 / 80) / critical, np.zeros(2), []
    for _ in range(40):
        third, rest = rng.exponential(size=32) * 3 / critical, rng.exponential(size=32) * 1.5 / critical
        all_bits, third = (
            curve_of(np.where(-np.log1p(-rates) > first[:, None], 80.0, 0.0), rates)
            for first in (np.minimum(third, rest), third)
        )
        losing, ratio = all_bits.losing(10), third.compare(all_bits, 10)
        held += [losing.low <= truth <= losing.high, ratio.low <= 3 <= ratio.high]
        widths.append([losing.high / losing.low, ratio.high / ratio.low])
    assert (held >= 38).all()
    assert (np.median(widths, axis=0) < [12, 40]).all()


def test_losing_rates_where_rates_do_not_reach_them():
    rates = np.array([1e-6, 1e-5])
    curve = curve_of(np.array([[0.0, 2.0], [0.0, 4.0], [0.0, 3.0]]), rates)
    assert curve.losing(1.5).value == pytest.approx(5.5e-6)
    never = curve.losing(10)
    assert never.value == never.high == math.inf
    assert 0 < never.low < 1e-5
    assert never.as_json()["value"] is None
    nothing = curve_of(np.zeros((32, 2)), rates)
    assert nothing.losing(5).value == math.inf
    assert 2e-6 < nothing.losing(5).low < 4e-6  # at the highest rate a share of 0.15 may lose everything
    assert nothing.losing(20).low == pytest.approx(1e-5)
    early = curve_of(np.array([[40.0, 80.0], [20.0, 80.0]]), rates)
    assert early.losing(3).value == pytest.approx(1e-7)  # nothing is lost at rate 0
    assert math.isnan(curve.compare(curve, 10).value)
    assert early.compare(curve, 10).value == 0
    with pytest.raises(InvalidParameter, match="argument points is 95; it must be above 0 and below 90"):
        curve.losing(95)
    falls = curve_of(np.array([[5.0, 1.0], [5.0, 1.0]]), rates)
    assert falls.losing(2.9).value < 1e-6  # pooled: 3 at both


def test_curves_are_read_back(classifier):
    curve = error_rates(*classifier, [1e-3], memories=3)
    found = json.loads(json.dumps(curve.as_json(), allow_nan=False))
    again = RateCurve.from_json(found)
    pd.testing.assert_frame_equal(again.memories, curve.memories)
    assert again.settings == curve.settings
    assert again.as_json() == found
    assert found["points"][0]["rate"] == 1e-3
    assert found["points"][0]["top1"]["value"] == pytest.approx(curve.memories["top1"].mean())


def test_suggested_rates_go_from_one_fault_to_chance(classifier):
    found = suggest_rates(*classifier)
    bits = error_rates(*classifier, [1e-3], memories=2).settings["stored_bits"]
    assert 1 / 3.4 < found[0] * bits <= 1.1
    steps = np.diff(np.log10(found))
    assert ((steps > 0.4) & (steps < 0.6)).all()
    assert found[-1] <= 1e-2
    assert suggest_rates(*classifier, protection="secded(32)")[-1] >= found[-1]


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def test_batches_may_be_of_any_kind(classifier):
    class Named(TensorDataset):
        def __getitem__(self, index):
            return dict(zip(("x", "y"), super().__getitem__(index), strict=True))

    task = make_task(forward=lambda model, batch: model(batch["x"]), labels=lambda batch: batch["y"])
    loader = DataLoader(Named(*classifier[1].dataset.tensors), batch_size=9)
    plain, found = (
        error_rates(*classifier, RATES[1:], memories=3),
        error_rates(classifier[0], loader, RATES[1:], memories=3, task=task),
    )
    assert found.memories["top1"].tolist() == plain.memories["top1"].tolist()


def test_what_cannot_be_is_refused_in_one_line(classifier):
    for given, error, message in [
        ({"rates": [0.0]}, InvalidParameter, "above 0, and at most 0.5"),
        ({"rates": []}, InvalidParameter, "one or more numbers"),
        ({"rates": 1e-3}, InvalidParameter, "must be a list of numbers"),
        ({"memories": 1}, InvalidParameter, "memories is 1; at least 2"),
        ({"number_format": "bfp(8,7,16)"}, InvalidParameter, "whose values share metadata"),
        ({"number_format": "int(8)", "protection": "triplicated_exponent"}, InvalidParameter, "have no exponent"),
        ({"protection": "ecc"}, UnknownName, "protection 'ecc'"),
        ({"operation": "toggle"}, UnknownName, "operation 'toggle'"),
    ]:
        with pytest.raises(error, match=message) as raised:
            error_rates(*classifier, **({"rates": RATES} | given))
        assert "\n" not in str(raised.value)
    noisy = nn.Sequential(classifier[0], Noise())
    with pytest.raises(UnsupportedModel, match="it is random or keeps a state"):
        error_rates(noisy, classifier[1], RATES)
    flat = nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(4))
    loader = DataLoader(TensorDataset(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(UnsupportedModel, match="reads no stored float tensors"):
        error_rates(flat, loader, RATES)
