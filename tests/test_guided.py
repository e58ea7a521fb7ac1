"""Guided plans: what is foreseen of faults, which of them are drawn, and that estimates from them have no bias."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import settle
from gate_runs import TOLERANCES, as_run, metrics, report, right, row
from textguard.analysis.regression import compare
from textguard.assessment import assess
from textguard.errors import InvalidParameter
from textguard.estimates.statistics import average, mean_interval, rate_interval
from textguard.estimates.summary import summarise
from textguard.faults import (
    Campaign,
    CampaignSettings,
    Design,
    FaultModel,
    draw_guided,
    parse_format,
    run_campaign,
    run_design,
    summarise_channels,
)
from textguard.faults.damage import SINGLE_FLIP, Faults
from textguard.faults.engines import make_engine
from textguard.faults.guided import SHARES, mixture
from textguard.faults.prediction import class_changes, loss_changes
from textguard.faults.profiling import largest_outputs, loader_of, profile_ranges


class OneWay(nn.Module):
    """All that a fault can be followed through exactly; behind that, everything is linear, and there are two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
        self.depthwise = nn.Sequential(nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6), nn.BatchNorm2d(6), nn.ReLU6())
        self.wide = nn.Conv2d(6, 8, 1)
        self.narrow = nn.Conv2d(6, 8, 1)
        self.fc = nn.Linear(8, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.stem(images))
        return self.fc(((self.wide(x) + self.narrow(x)) * 3.0).mean(dim=(2, 3)))


class Tokens(nn.Module):
    """A layer whose values are no maps, with an activation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.mlp = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Dropout(0.1))
        self.fc = nn.Linear(10, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.mlp(self.patches(images).flatten(2).transpose(1, 2)).mean(dim=1))


def every_kind_of_fault(engine, images: torch.Tensor, position: int, limit: float, count: int = 400) -> Faults:
    draw = torch.Generator().manual_seed(position)
    bits = engine.number_format.bits
    return Faults(
        SINGLE_FLIP,
        torch.full((count,), position),
        torch.randint(len(images), (count,), generator=draw),
        torch.full((count,), limit),
        torch.arange(count),
        torch.randint(engine.sites[position].neurons, (count,), generator=draw),
        1 << torch.randint(bits, (count,), generator=draw),
    )


def predicted_and_true(engine, images, labels, position, limit):
    faults = every_kind_of_fault(engine, images, position, limit)
    prediction, outcomes = engine.predict(images, labels), engine.run(images, faults)
    change, _ = prediction.changes(position, faults.image, faults.neuron, faults.mask[:, None], "flip", limit)
    golden, faulty = (
        F.cross_entropy(logits.double(), labels[faults.image], reduction="none")
        for logits in (outcomes.golden_logits[faults.image], outcomes.logits)
    )
    return loss_changes(prediction.doubt[faults.image][:, None], change)[:, 0].numpy(), (faulty - golden).abs().numpy()


@pytest.mark.parametrize("number_format", ["fp32", "fp16", "int(8)", "bfp(5,7,16)", "fp8_e4m3"])
@pytest.mark.parametrize(
    ("network", "exact"), [(OneWay, ("stem.0", "depthwise.0", "wide", "narrow", "fc")), (Tokens, ("mlp.0", "fc"))], ids=str
)
def test_what_is_followed_exactly_is_foreseen_exactly(network, exact, number_format, images):
    torch.manual_seed(0)
    model, labels = settle(network()), torch.arange(len(images)) % 2
    profiled = largest_outputs(profile_ranges(model, loader_of(images, labels, 4)))
    engine = make_engine("replay", model, images[0], 16, number_format=parse_format(number_format), profiled=profiled)
    for site in engine.sites:
        expected, true = predicted_and_true(engine, images, labels, site.position, profiled[site.layer])
        if site.layer in exact and number_format == "fp32":
            np.testing.assert_allclose(expected, true, rtol=2e-3, atol=2e-6)
        assert np.corrcoef(expected, true)[0, 1] > 0.5, site.layer  # other formats round again behind the fault


@pytest.mark.parametrize("name", ["whole", "pytorchfi"])
def test_other_engines_foresee_from_the_gradient_alone(name, resnet, images):
    labels = resnet(images).argmax(dim=1)
    engine = make_engine(name, resnet, images[0], 16)
    profiled = largest_outputs(profile_ranges(resnet, loader_of(images, labels, 4)))
    for site in engine.sites:
        expected, true = predicted_and_true(engine, images, labels, site.position, profiled[site.layer])
        assert np.corrcoef(expected, true)[0, 1] > 0.3, site.layer


def test_a_change_of_the_margin_is_a_change_of_the_loss():
    draw = torch.Generator().manual_seed(0)
    margin, change = (torch.randn(1000, generator=draw, dtype=torch.float64) * scale for scale in (10, 20))
    expected = (F.softplus(-margin - change) - F.softplus(-margin)).abs()
    torch.testing.assert_close(
        loss_changes(torch.sigmoid(-margin), change), expected, rtol=1e-3, atol=1e-12
    )  # of a doubt near 1, few digits are left
    tiny = loss_changes(torch.tensor(0.25, dtype=torch.float64), torch.tensor([1e-30, -1e-30, 0.0, -1e6, 1e6]).double())
    torch.testing.assert_close(tiny, torch.tensor([2.5e-31, 2.5e-31, 0, 1e6, -math.log(0.75)]).double(), rtol=1e-5, atol=0)


def test_a_margin_that_is_lost_changes_the_class():
    doubt = torch.sigmoid(-torch.tensor(4.0, dtype=torch.float64))
    change = torch.tensor([0.0, -1.0, -4.0, -40.0, 40.0, -math.inf, math.inf, math.nan], dtype=torch.float64)
    odds = class_changes(doubt, change, change.abs())
    assert odds[0] == 0
    assert odds[1] == pytest.approx(1 / 17)
    assert odds[2] == pytest.approx(0.5)
    assert (odds[5:] == 1).all()
    assert odds[3] > odds[4] > 0.8  # so large a change is not to be trusted in its sign


def test_the_first_detector_counts_for_as_much_as_all_others():
    one, other = torch.zeros(2, 1, 64, 32, dtype=torch.float64)
    one[..., 0, 31] = other[..., 5, 30] = 1.0
    chance = mixture([(one,) * 3, (other,) * 3, (other,) * 3])[0]
    assert chance[0, 31] == pytest.approx(chance[5, 30])


def test_the_mixture_is_a_distribution_and_leaves_nothing_out():
    draw = torch.Generator().manual_seed(0)
    losses = torch.rand(5, 64, 32, generator=draw, dtype=torch.float64) ** 20
    some, none = (losses, 2 * losses, losses.clamp(max=0.5)), (0 * losses,) * 3
    for predicted in ([some], [none], [some, none], [none, some, some]):
        chance = mixture(predicted)
        torch.testing.assert_close(chance.sum(dim=(1, 2)), torch.ones(5, dtype=torch.float64))
        assert chance.min() >= SHARES["uniform"] / (64 * 32)
    assert sum(SHARES.values()) == pytest.approx(1)


class Known:
    """A small network of which every fault in some layers has been tried, on a few images."""

    def __init__(self, model, images, number_format="fp32", detector="profiled"):
        self.model, labels = model, model(images).argmax(dim=1)
        self.loader = loader_of(images, labels, 4)
        self.campaign = Campaign(
            model, self.loader, CampaignSettings(plan="guided", number_format=number_format, detector=detector)
        )
        self.engine, self.limits = self.campaign.engine, self.campaign.limits[detector]
        self.chances = self.campaign.chances
        self.bits = self.engine.number_format.bits

    def truth(self, site) -> tuple[float, float]:
        """Mean DeltaLoss, over faults with a finite loss, and share of SDCs, over all faults and eligible images."""
        images, labels = (torch.stack(part) for part in zip(*self.loader.dataset, strict=True))
        eligible = torch.as_tensor(np.flatnonzero(self.chances))
        grid = torch.cartesian_prod(eligible, torch.arange(site.neurons), torch.arange(self.bits))
        limit, number = torch.full((len(grid),), self.limits[site.layer]), torch.arange(len(grid))
        where = torch.full((len(grid),), site.position)
        outcomes = self.engine.run(images, Faults(SINGLE_FLIP, where, grid[:, 0], limit, number, grid[:, 1], 1 << grid[:, 2]))
        golden = F.cross_entropy(outcomes.golden_logits, labels, reduction="none")[grid[:, 0]]
        loss = (F.cross_entropy(outcomes.logits, labels[grid[:, 0]], reduction="none") - golden).abs().double()
        finite = loss.isfinite()
        changed = outcomes.logits.argmax(dim=1) != outcomes.golden_logits.argmax(dim=1)[grid[:, 0]]
        return float(loss[finite].mean()), float((changed | ~finite).double().mean())


@pytest.mark.parametrize(
    ("number_format", "detector"), [("fp32", "profiled"), ("fp32", "off"), ("fp16", "fixed:3"), ("int(8)", "off")]
)
def test_guided_estimates_are_those_of_all_faults(tiny_model, images, number_format, detector):
    known = Known(tiny_model, images[:4], number_format, detector)
    neurons = {site.layer: site.neurons for site in known.engine.sites}
    campaigns = []
    for seed in range(6):
        plan = draw_guided(
            known.engine,
            known.engine.sites,
            known.loader,
            known.chances,
            dict.fromkeys(neurons, (0, 400)),
            seed,
            SINGLE_FLIP,
            [known.limits],
        )
        campaigns.append(summarise(run_campaign(known.engine, known.loader, plan, known.limits, image_batch=4), neurons))
    for site in known.engine.sites:
        loss, sdc = known.truth(site)
        for name, value, interval in (("delta_loss", loss, mean_interval), ("sdc", sdc, rate_interval)):
            together = average([getattr(found[site.layer], name) for found in campaigns])
            found = interval(together, 0.9999)
            assert found.low <= value <= found.high, (site.layer, name, found, value)


@pytest.fixture
def small(resnet, images) -> Known:
    return Known(resnet, images)


def draw(known: Known, counts: tuple[int, int], seed: int = 0, **changes) -> pd.DataFrame:
    options = {"engine": known.engine, "fault_model": SINGLE_FLIP, "limits": [known.limits], "chances": known.chances} | changes
    ranges = {site.layer: counts for site in known.engine.sites}
    return draw_guided(sites=known.engine.sites, loader=known.loader, counts=ranges, seed=seed, **options)


def test_a_larger_count_extends_a_plan(small):
    whole, first, rest = draw(small, (0, 300)), draw(small, (0, 100)), draw(small, (100, 300))
    again = pd.concat([first, rest]).sort_values(["layer", "index"], kind="stable")
    whole = whole.sort_values(["layer", "index"], kind="stable")
    names = ["layer", "index", "image", "neuron", "bit"]
    pd.testing.assert_frame_equal(again[names].reset_index(drop=True), whole[names].reset_index(drop=True))
    np.testing.assert_allclose(again["weight"], whole["weight"], rtol=1e-5)


def test_no_weight_is_larger_than_the_uniform_shares_allow(small):
    plan = draw(small, (0, 2000))
    most = 1 / SHARES["uniform"] * small.chances[small.chances > 0].mean() / small.chances[small.chances > 0].min()
    assert 0 < plan["weight"].min() < 0.1
    assert plan["weight"].max() <= most * (1 + 1e-9)
    assert plan.groupby("layer")["weight"].mean().between(0.5, 1.5).all()


@pytest.mark.parametrize("fault_model", [FaultModel(bits=2), FaultModel(values=3), FaultModel(operation="stuck_at_1")], ids=str)
def test_faults_of_several_bits_and_values_are_guided_too(small, fault_model):
    plan = draw(small, (0, 400), fault_model=fault_model)
    assert len(plan) == 400 * len(small.engine.sites) * fault_model.bits * fault_model.values
    each = plan.groupby(["layer", "index"])
    assert (each["neuron"].nunique() == fault_model.values).all()
    assert (each[["image", "weight"]].nunique() == 1).all(axis=None)
    neurons = {site.layer: site.neurons for site in small.engine.sites}
    options = {"image_batch": 4, "fault_model": fault_model}
    guided = summarise(run_campaign(small.engine, small.loader, plan, small.limits, **options), neurons)
    settings = CampaignSettings(injections_per_layer=8000, fault_model=fault_model)
    uniform = Campaign(small.model, small.loader, settings).run().layers
    for layer, result in guided.items():
        a, b = (mean_interval(found.delta_loss, 0.9999) for found in (result, uniform[layer]))
        assert max(a.low, b.low) <= min(a.high, b.high), (layer, a, b)


@pytest.mark.parametrize("target", ["weight", "metadata"])
def test_what_is_not_predicted_is_refused_in_one_line(resnet, loader, target):
    settings = CampaignSettings(plan="guided", fault_model=FaultModel(target=target), number_format="bfp(5,7,16)")
    with pytest.raises(InvalidParameter, match=f"not in {target}; take uniform, proportional or neyman"):
        Campaign(resnet, loader, settings)


def test_several_detectors_share_one_plan(small):
    low = dict.fromkeys(small.limits, 1.0)
    one, other, both = (draw(small, (0, 200), limits=limits) for limits in ([small.limits], [low], [small.limits, low]))
    assert not one.equals(other)
    assert not both.equals(one)
    assert (both[["layer", "index", "image"]] == one[["layer", "index", "image"]]).all(axis=None)


def test_the_batch_size_changes_no_plan_and_no_result(resnet, images):
    loader = loader_of(images, resnet(images).argmax(dim=1), 4)
    found = [
        assess(
            resnet, loader, plan="guided", injections_per_layer=60, batch_size=size, image_batch=part, stop_at="80%", pilot=16
        ).table
        for size, part in ((3, 12), (64, 5))
    ]
    pd.testing.assert_frame_equal(*found, rtol=1e-3, atol=1e-6)


def test_an_interrupted_campaign_goes_on_with_the_faults_that_its_shards_hold(small, tmp_path):
    settings = CampaignSettings(plan="guided", injections_per_layer=100, image_batch=3)
    first = Campaign(small.model, small.loader, settings).run(tmp_path)
    shards = sorted(tmp_path.rglob("shard-*.parquet"))
    assert len(shards) > 2
    shards[0].unlink()
    again = Campaign(small.model, small.loader, settings).run(tmp_path)
    pd.testing.assert_frame_equal(first.records, again.records)


def test_guided_intervals_are_much_tighter(small):
    halves = {}
    for plan in ("uniform", "guided"):
        found = Campaign(small.model, small.loader, CampaignSettings(plan=plan, injections_per_layer=1000)).run().layers
        intervals = [mean_interval(layer.delta_loss) for layer in found.values()]
        halves[plan] = np.array([(one.high - one.low) / one.value for one in intervals])
    assert (halves["guided"] < halves["uniform"] / 3).all()


@pytest.mark.parametrize("plan", ["uniform", "guided"])
def test_channels_make_up_their_layer_and_hold_their_truth(small, plan):
    count = 10_000 if plan == "uniform" else 4000
    records = Campaign(small.model, small.loader, CampaignSettings(plan=plan, injections_per_layer=count)).run().records
    shapes = {site.layer: site.shape for site in small.engine.sites}
    channels = summarise_channels(records, shapes, confidence=0.9999)
    layers = summarise(records, {site.layer: site.neurons for site in small.engine.sites})
    for layer, found in channels.groupby("layer", sort=False):
        assert len(found) == shapes[layer][0]
        assert found["injections"].sum() == count
        assert found["delta_loss"].mean() == pytest.approx(layers[layer].delta_loss.value, rel=1e-9)
        assert found["sdc"].mean() == pytest.approx(layers[layer].sdc.value, rel=1e-9)
    if plan == "guided":
        plain = Campaign(small.model, small.loader, CampaignSettings(injections_per_layer=20_000, seed=1)).run().records
        others = summarise_channels(plain, shapes, confidence=0.9999)
        apart = (channels["delta_loss_low"] > others["delta_loss_high"]) | (
            channels["delta_loss_high"] < others["delta_loss_low"]
        )
        assert not apart.any()


def test_a_guided_campaign_promises_no_half_width_of_uniform_ones(small, capfd):
    for plan, promised in (("uniform", True), ("guided", False)):
        Campaign(small.model, small.loader, CampaignSettings(plan=plan, injections_per_layer=8)).run()
        said = capfd.readouterr().err
        assert f"plan {plan}, 8 injections each" in said
        assert ("Leveugle" in said) is promised


def test_every_layer_stops_at_its_own_half_width(small):
    sites = small.engine.sites
    design = Design("guided", 4000, 64, "never", 0.99, 0)
    wanted = {site.layer: 10.0 for site in sites} | {sites[0].layer: 1e-12}
    records = run_design(
        small.engine, sites, small.loader, small.chances, small.limits, design, image_batch=4, half_widths=wanted
    )
    assert records.groupby("layer", sort=False).size().tolist() == [4000] + [64] * (len(sites) - 1)


def test_a_measured_pace_shows_no_progress(small, capfd):
    small.campaign.pace(2)
    assert capfd.readouterr().err == ""


def test_the_gate_sees_a_layer_that_doubles_whichever_faults_were_drawn(small):
    def losses(seed: int) -> np.ndarray:
        settings = CampaignSettings(plan="guided", injections_per_layer=1024, seed=seed)
        return np.stack(
            [layer.strata["delta_loss"][0] for layer in Campaign(small.model, small.loader, settings).run().layers.values()]
        )

    def gate(new: np.ndarray) -> tuple[int, str]:
        return report(compare(as_run(metrics(base, right())), as_run(metrics(new, right())), TOLERANCES))

    base = losses(0)
    for seed in (1, 2, 3):
        other = losses(seed)
        assert gate(other)[0] == 0
        for layer in range(len(other)):
            doubled = other.copy()
            doubled[layer] *= 2
            assert "worse" in row(gate(doubled)[1], f"DeltaLoss, conv{layer}")[-1]
