"""What to protect: the order is chosen on one half of the sample, and what it covers is measured on the other."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from conftest import TinyResNet, settle
from textguard.assessment import Assessment, advice, assess
from textguard.assessment.advice import MEASURING, advise, choose, measure_mitigations, removed_share
from textguard.errors import InvalidParameter, TextguardError, UnknownName
from textguard.estimates.summary import Totals, mean_over_layers
from textguard.faults.sites import Site

ONE_BIT = {"target": "neuron", "operation": "flip", "bits": 1, "values": 1}
CHANNELS, SIZES = 12, (64, 16, 4)


def assessment(
    rates: Sequence[np.ndarray], injections: int, rng: np.random.Generator, *, guided: bool = False, shared: bool = False
) -> Assessment:
    """Of a model whose layers have SIZES neurons per channel, each channel with its own SDC rate.

    guided: channels are drawn by a bad guess of their rates. shared: images differ in how easily they change, by index.
    """
    parts, images = [], rng.gamma(1.0, 1.0, injections) if shared else 1.0
    sites = tuple(
        Site(f"conv{number}", "Conv2d", number, (CHANNELS, size, 1), 9 * CHANNELS) for number, size in enumerate(SIZES)
    )
    for site, rate in zip(sites, rates, strict=True):
        guess = rate * np.exp(rng.normal(0, 1, CHANNELS)) if guided else np.ones(CHANNELS)
        chances = 0.1 / CHANNELS + 0.9 * guess / guess.sum()
        channel = rng.choice(CHANNELS, injections, p=chances)
        hit = rng.random(injections) < rate[channel] * images
        columns = {"layer": site.layer, "index": np.arange(injections), "bit": 30, "weight": 1 / CHANNELS / chances[channel]}
        columns |= {"neuron": channel * site.shape[1], "golden_loss": 0.5, "faulty_loss": np.where(hit, 2.0, 0.5)}
        parts.append(pd.DataFrame(columns | {"detected": False, "masked": False, "mismatch": hit}))
    settings = {"plan": "guided" if guided else "uniform", "images": "shared" if shared else "uniform", "confidence": 0.9}
    settings |= {"number_format": "fp32", "fault_model": ONE_BIT, "fit_per_megabit": None}
    records = pd.concat(parts, ignore_index=True)
    return Assessment(settings, sites, (), 3, "replay", "", records, (), pd.DataFrame(), (), "", 0, {}, {})


def truth(table: pd.DataFrame, rates: Sequence[np.ndarray]) -> np.ndarray:
    """The share of all SDC that each row of a table and those above it have."""
    share = [rate * size for rate, size in zip(rates, SIZES, strict=True)]
    layers = [int(name[-1]) for name in table["layer"]]
    each = (
        [share[n][c] for n, c in zip(layers, table["channel"], strict=True)]
        if "channel" in table
        else [share[n].sum() for n in layers]
    )
    return np.cumsum(each) / np.sum(share)


@pytest.mark.parametrize("kind", ["uniform", "guided", "shared"])
def test_intervals_of_what_is_covered_hold_and_to_choose_on_the_same_half_flatters(kind):
    held, bias, flattered = [], [], []
    for number in range(25):
        rng = np.random.default_rng(number)
        rates = [rng.exponential(0.04 * 4.0**-layer, CHANNELS).clip(max=0.2) for layer in (1, 0, 0)]
        found = assessment(rates, 400, rng, guided=kind == "guided", shared=kind == "shared")
        told = advise(found)
        for table, row in ((told.table, 0), (told.channels, 4), (told.channels, 12)):
            true = truth(table, rates)[row]
            held.append(table["covered_low"][row] <= true <= table["covered_high"][row])
        bias.append(told.channels["covered"][4] - truth(told.channels, rates)[4])
        units = advice._units(found, advice._exposures(found, "neurons"), found.records)
        same = choose(replace(units, halves=(units.halves[MEASURING],) * 2), 0.9, "share")
        flattered.append(same["covered"][4] - truth(same, rates)[4])
    assert np.mean(held) > 0.81  # of 90 %
    error = np.std(bias) / np.sqrt(len(bias))
    assert abs(np.mean(bias)) < 3 * error
    assert np.mean(flattered) > 3 * error


@pytest.mark.parametrize("kind", ["uniform", "guided", "shared"])
def test_the_whole_sample_gives_the_mean_over_layers_and_its_variance(kind):
    rng = np.random.default_rng(0)
    rates = [rng.exponential(0.05, CHANNELS).clip(max=0.2) for _ in SIZES]
    found = assessment(rates, 200, rng, guided=kind == "guided", shared=kind == "shared")
    exposures = advice._exposures(found, "neurons")
    whole = advice._half(advice._rows(found, exposures).assign(unit=0))
    slow = mean_over_layers(list(found.layers.values()), "sdc", exposures)
    assert whole.effect.sum() == pytest.approx(slow.value)
    assert whole.variance(whole.effect) == pytest.approx(slow.variance)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return settle(TinyResNet())


@pytest.fixture(scope="module")
def loader(model) -> DataLoader:
    torch.manual_seed(1)
    images = torch.randn(16, 3, 16, 16) * 2 + 0.5
    return DataLoader(TensorDataset(images, model(images).argmax(dim=1)), batch_size=16)


@pytest.mark.parametrize("plan", ["uniform", "proportional", "guided"])
def test_both_halves_are_samples_of_all_faults(model, loader, plan):
    found = assess(model, loader, plan=plan, injections_per_layer=256, detector="off", enumerate_up_to=1, stop_at="never")
    exposures = advice._exposures(found, "neurons")
    halves = advice._units(found, exposures, None)
    rates = [half.effect.sum() + halves.known.sum() for half in halves.halves]
    assert np.mean(rates) == pytest.approx(found.mean("sdc", "neurons").value)
    assert [half.injections for half in halves.halves] == [384, 384]
    told = advise(found)
    assert told.table["share"].sum() == pytest.approx(1)
    assert (told.table["covered"].diff().dropna() >= 0).all()
    assert told.table["total_cost"].iloc[-1] == pytest.approx(1)
    # Channels of a layer make the layer; an enumerated layer stays whole.
    assert told.channels.groupby("layer")["share"].sum().to_dict() == pytest.approx(
        told.table.set_index("layer")["share"].to_dict(), abs=1e-12
    )
    assert told.channels.set_index("layer")["channel"]["fc"] == -1
    assert len(told.channels) == 3 * 8 + 1


def test_what_is_known_exactly_has_no_interval():
    rng = np.random.default_rng(0)
    found = assessment([np.full(CHANNELS, 0.1)] * 3, 100, rng)
    totals = []
    for site, bad in zip(found.sites, (10, 40, 20), strict=True):
        faults = site.neurons * 100
        parts = (np.array([float(number)]) for number in (faults, 0, 0, bad * faults / 100, 0, 0))
        totals.append(Totals(site.layer, site.neurons, *parts))
    told = advise(replace(found, records=found.records[:0], totals=tuple(totals)))
    # 64 x 10, 16 x 40 and 4 x 20: the first two are the same.
    assert set(told.table["layer"][:2]) == {"conv0", "conv1"}
    assert told.table["covered"].tolist() == pytest.approx([640 / 1360, 1280 / 1360, 1])
    assert (told.table["covered_low"] == told.table["covered_high"]).all()
    assert told.layers_needed == 2
    assert len(told.channels) == told.channels_needed == 0


def test_targets_are_reached_by_the_interval():
    rng = np.random.default_rng(3)
    found = assessment([np.full(CHANNELS, rate) for rate in (0.2, 0.2, 0.05)], 1000, rng)
    told = advise(found, target_sdc=0.06)
    assert told.table["left_high"][told.layers_needed - 1] <= 0.06 < told.now.high
    assert told.channels["left_high"][told.channels_needed - 1] <= 0.06 < told.channels["left_high"][told.channels_needed - 2]
    assert "an SDC rate of at most 6.0 %, duplicate 1 of 3 layers (conv0)" in str(told)
    assert advise(found, target_sdc=0.5).layers_needed == 0
    assert "nothing has to be protected" in advise(found, target_sdc=0.5).sentence
    assert advise(found, cut=1.0).layers_needed == 3
    assert "too small to promise it of fewer than all 3 layers; by the estimate without its interval, 3 would do" in str(
        advise(found, cut=1.0)
    )
    rated = replace(found, settings=found.settings | {"fit_per_megabit": 1000.0})
    bits = 32 * CHANNELS * sum(SIZES)
    assert advise(rated, target_fit=0.06 * bits * 1e-3).layers_needed == told.layers_needed
    assert advise(found, by="layers").table["layer"].tolist()[2] == "conv2"
    # A layer of the same share that costs less comes first.
    cheap = replace(found, sites=(*found.sites[:2], replace(found.sites[2], weights=1)))
    assert advise(cheap, by="layers", order="cost").table["layer"][0] == "conv2"
    unknown = replace(found, sites=(replace(found.sites[0], kind="MatMul"), *found.sites[1:]))
    assert "Multiply-adds of 1 layers are not known, such as conv0." in advise(unknown).sentence
    assert advise(unknown, order="cost").table["layer"].tolist()[-1] == "conv0"


def test_without_a_corruption_nothing_is_told_apart():
    told = advise(assessment([np.zeros(CHANNELS)] * 3, 100, np.random.default_rng(0)))
    assert told.sentence.startswith("No injection corrupted the output: the SDC rate is at most ")
    assert np.isnan(told.table["covered"][0])
    assert told.table[["covered_low", "covered_high"]].iloc[0].tolist() == [0, 1]
    assert told.layers_needed == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cut": 1.5}, "argument cut is 1.5; it must be a share from 0 to 1"),
        ({"target_sdc": "low"}, "argument target_sdc is 'low'"),
        ({"target_sdc": 0.1, "target_fit": 1.0}, "both given"),
        ({"target_fit": 1.0}, "assess(..., fit_per_megabit=20.49)"),
        ({"by": "bits"}, "known: layers, multiply_adds, neurons"),
        ({"order": "size"}, "known: cost, share"),
    ],
)
def test_wrong_questions_are_refused_in_a_line(options, said):
    found = assessment([np.full(CHANNELS, 0.1)] * 3, 100, np.random.default_rng(0))
    with pytest.raises((InvalidParameter, UnknownName)) as error:
        advise(found, **options)
    assert said in str(error.value)


def test_a_sample_that_cannot_be_split_is_refused():
    found = assessment([np.full(CHANNELS, 0.1)] * 3, 3, np.random.default_rng(0))
    with pytest.raises(InvalidParameter, match=r"layer 'conv0' has 3 injections, .* at least 4 are needed"):
        advise(found)
    matmul = replace(found.sites[0], kind="MatMul")
    with pytest.raises(InvalidParameter, match=r"multiply-adds of layer 'conv0' .MatMul. are not known"):
        advise(replace(found, sites=(matmul, *found.sites[1:])), by="multiply_adds")


def test_mitigations_are_measured_on_the_same_faults(model, loader):
    found = assess(model, loader, plan="guided", injections_per_layer=256, detector="off", enumerate_up_to=1)
    measured = measure_mitigations(model, loader, found).set_index("mitigation")
    after = assess(model, loader, plan=found, mitigation="ranger", detector="off").mean("sdc", "neurons").value
    row = measured.loc["ranger"]
    assert row["before"] == pytest.approx(found.mean("sdc", "neurons").value)
    assert row["after"] == pytest.approx(after)
    assert row["removed"] == pytest.approx(1 - after / row["before"])
    assert 0.5 < row["removed"] <= 1
    assert row["removed_low"] < row["removed"] <= row["removed_high"]
    assert (measured["time"] > 0).all()
    with pytest.raises(TextguardError, match=r"the model has weights .*, and those that were assessed are"):
        measure_mitigations(settle(TinyResNet()), loader, found)


def test_pairs_say_more_than_two_samples_do():
    """Half of what corrupts the output is gone, always the same half: only which faults were drawn is left to chance."""
    held, narrower = [], []
    for number in range(20):
        rng = np.random.default_rng(number)
        before = assessment([np.full(CHANNELS, 0.1)] * 3, 300, rng)
        left = before.records["mismatch"] & (rng.random(len(before.records)) < 0.5)
        after = replace(before, records=before.records.assign(mismatch=left, faulty_loss=np.where(left, 2.0, 0.5)))
        exposures = advice._exposures(before, "neurons")
        first, second, removed = removed_share(before, after, exposures)
        held.append(removed.low <= 0.5 <= removed.high)
        apart = [side.mean("sdc", "neurons").error / side.mean("sdc", "neurons").value for side in (before, after)]
        narrower.append(removed.error / (1 - removed.value) / np.hypot(*apart))
        assert removed.value == pytest.approx(1 - second / first)
    assert np.mean(held) > 0.8
    assert np.mean(narrower) < 0.8
