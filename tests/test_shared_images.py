"""Campaigns that hit all layers on the same images: what is drawn, and what means over layers that err together are worth."""

import numpy as np
import pandas as pd
import pytest

from textguard.analysis.breakdown import convergence
from textguard.analysis.improvement import draw_layers, weigh
from textguard.estimates.statistics import average, mean_interval, rate_interval
from textguard.estimates.summary import mean_over_layers, summarise
from textguard.faults import Campaign, CampaignSettings, draw_plan
from textguard.faults.profiling import loader_of
from textguard.faults.sites import Site

BITS, IMAGES, LAYERS = 4, 40, 6
SITES = [Site(str(place), "Linear", place, (100,), weights=100) for place in range(LAYERS)]
WEIGHTS = np.arange(1.0, LAYERS + 1)
STRATIFIED = {"even": 0, "by bit": BITS}


class Table:
    """What faults do, made up: on some images they do much, whatever the layer."""

    def __init__(self):
        draw = np.random.default_rng(0)
        self.doubt = np.exp(draw.normal(0, 1.0, IMAGES))
        self.losses = self.doubt * draw.exponential(1.0, (LAYERS, BITS, IMAGES))
        self.changed = self.losses > 2.5
        self.chances = 0.9 + 0.1 * self.doubt / self.doubt.mean()

    def records(self, seed: int, counts: list[int], bits: int = 0) -> pd.DataFrame:
        """Of a campaign with so many injections into each layer, by bit where `bits` is not 0."""
        wanted = {
            site.layer: np.full(bits, count // bits) if bits else count for site, count in zip(SITES, counts, strict=True)
        }
        plan = draw_plan(SITES, self.chances, wanted, seed, share_images=True)
        plan["bit"] %= BITS
        if bits:
            plan["index"] = plan["index"] // 32 * BITS + plan["bit"]
        at = plan["layer"].astype(int), plan["bit"], plan["image"]
        known = {"golden_loss": 0.0, "faulty_loss": self.losses[at], "mismatch": self.changed[at]}
        return plan.assign(detected=False, masked=False, **known)


@pytest.fixture(scope="module")
def table() -> Table:
    return Table()


def summarised(records, bits=0):
    return list(summarise(records, {site.layer: 100 for site in SITES}, bits, shared=True).values())


@pytest.mark.parametrize("bits", STRATIFIED.values(), ids=STRATIFIED)
@pytest.mark.parametrize("counts", [[160] * LAYERS, [160, 320, 80, 240, 160, 320]], ids=["as many", "unequal"])
def test_means_over_layers_err_as_much_as_they_say(table, bits, counts):
    means, errors, apart, draws = [], [], [], []
    for seed in range(120):
        layers = summarised(table.records(seed, counts, bits), bits)
        sample = mean_over_layers(layers, "delta_loss", WEIGHTS)
        means.append(sample.value)
        errors.append(sample.variance)
        apart.append(average([layer.delta_loss for layer in layers], WEIGHTS).variance)
        if seed < 30:
            own = draw_layers({"d": layers}, 200, seed)["d"]["delta_loss"]
            draws.append(weigh(own, WEIGHTS).plain.std())
    truth = (WEIGHTS * table.losses.mean(axis=(1, 2))).sum() / WEIGHTS.sum()
    spread = np.std(means, ddof=1)
    assert abs(np.mean(means) - truth) < 4 * spread / np.sqrt(len(means))
    said, said_apart = np.sqrt(np.mean(errors)), np.sqrt(np.mean(apart))
    assert said == pytest.approx(spread, rel=0.2)
    assert said > 1.2 * said_apart  # as if the layers had nothing to do with each other
    assert np.mean(draws) == pytest.approx(spread, rel=0.25)


def test_intervals_of_means_over_layers_hold(table):
    truths = {"delta_loss": table.losses.mean(), "sdc": table.changed.mean()}
    held = {name: [] for name in truths}
    for seed in range(200):
        layers = summarised(table.records(seed, [160] * LAYERS))
        for name, interval in (("delta_loss", mean_interval), ("sdc", rate_interval)):
            found = interval(mean_over_layers(layers, name), 0.9)
            held[name].append(found.low <= truths[name] <= found.high)
    for name, hits in held.items():
        assert np.mean(hits) > 0.85, name


def test_a_mean_over_one_layer_is_that_layers(table):
    layers = summarised(table.records(0, [160] * LAYERS))
    for name in ("delta_loss", "mismatch", "sdc", "broken"):
        own, alone = getattr(layers[2], name), mean_over_layers(layers, name, [0, 0, 5, 0, 0, 0])
        assert (alone.value, alone.variance, alone.third) == pytest.approx((own.value, own.variance, own.third))


def test_layers_that_share_nothing_are_averaged_as_before(table):
    records = table.records(0, [160] * LAYERS)
    layers = list(summarise(records, {site.layer: 100 for site in SITES}).values())
    assert mean_over_layers(layers, "sdc") == average([layer.sdc for layer in layers])


def test_convergence_counts_what_layers_share(table):
    records = table.records(0, [160] * LAYERS)
    neurons = {site.layer: 100 for site in SITES}
    *_, last = convergence(records, neurons, "goldeneye", 0.99, shared=True)
    expected = mean_interval(mean_over_layers(summarised(records), "delta_loss"), 0.99)
    assert (last.low, last.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("plan", ["uniform", "proportional", "neyman", "guided"])
def test_an_index_has_one_image_in_all_layers(resnet, images, plan):
    loader = loader_of(images, resnet(images).argmax(dim=1), 4)
    settings = CampaignSettings(plan=plan, images="shared", injections_per_layer=96, pilot=64, enumerate_up_to=1)
    campaign = Campaign(resnet, loader, settings)
    result = campaign.run()
    shared = result.records.groupby("index")
    assert (shared["image"].nunique() == 1).all()
    assert shared["layer"].nunique().max() == len(campaign.sampled) > 1
    assert all(layer.shared for layer in result.layers.values() if layer.method == "sampled")
    apart = Campaign(resnet, loader, CampaignSettings(plan=plan, injections_per_layer=96, pilot=64)).run().records
    assert (apart.groupby("index")["image"].nunique() > 1).any()
