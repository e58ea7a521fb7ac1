"""Designs: which injections a campaign makes, in rounds, and when it stops."""

import numpy as np
import pandas as pd
import pytest
import torch

from textguard.errors import InvalidParameter, UnknownName
from textguard.estimates.statistics import mean_interval
from textguard.estimates.summary import replace_records, summarise
from textguard.faults import sampling
from textguard.faults.damage import FaultModel
from textguard.faults.engines import make_engine
from textguard.faults.execution import RECORD_COLUMNS, RECORD_TYPES, run_campaign
from textguard.faults.formats import FP32
from textguard.faults.plans import draw_plan
from textguard.faults.profiling import image_chances, loader_of
from textguard.faults.sampling import Design, rerun_changed, run_design
from textguard.faults.sites import Site

BITS = 32


def design_of(plan="neyman", injections=256, pilot=64, stop_at="never", confidence=0.99, seed=0):
    return Design(plan, injections, pilot, stop_at, confidence, seed)


class Tiny:
    """A campaign on one of the small models."""

    def __init__(self, model, images, batch_size=64):
        self.engine = make_engine("replay", model, images[0], batch_size)
        with torch.no_grad():
            self.loader = loader_of(images, model(images).argmax(dim=1), 5)
        self.sites = self.engine.sites
        self.limits = {site.layer: 50.0 for site in self.sites}

    def chances(self, how="uniform"):
        return image_chances(self.engine, self.loader, how)

    def run(self, design, sites=None, how="uniform", **more):
        sites = self.sites if sites is None else sites
        return run_design(self.engine, sites, self.loader, self.chances(how), self.limits, design, image_batch=6, **more)

    def summary(self, records, bits=BITS):
        return summarise(records, {site.layer: site.neurons for site in self.sites}, bits)


@pytest.fixture
def tiny(tiny_model, images):
    return Tiny(tiny_model, images)


@pytest.fixture
def small(resnet, images):
    return Tiny(resnet, images)


def by_bit(records):
    """Injections of each layer and bit."""
    return {layer: np.bincount(rows["bit"], minlength=BITS) for layer, rows in records.groupby("layer", sort=False)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"plan": "random"}, UnknownName, r"plan 'random' in argument plan; known: guided, neyman, proportional, uniform"),
        ({"pilot": 63}, InvalidParameter, r"argument pilot is 63; a plan by bit needs 2 for each of 32 bits"),
        ({"injections": 63}, InvalidParameter, r"argument injections_per_layer is 63; a plan by bit needs 2"),
        ({"injections": 63, "plan": "proportional"}, InvalidParameter, r"injections_per_layer is 63; a plan by bit"),
        ({"plan": "uniform", "injections": 0}, InvalidParameter, r"injections_per_layer is 0; at least 1"),
        ({"plan": "uniform", "pilot": 0, "stop_at": "10%"}, InvalidParameter, r"argument pilot is 0; at least 1"),
        *(
            ({"stop_at": wanted}, InvalidParameter, r"argument stop_at is .*allowed: never, a half-width in nats as 0\.001")
            for wanted in ("", "0", "-1", "0%", "nan", "inf", "10%%", "10 percent", "%", "1e999", "Never")
        ),
    ],
    ids=str,
)
def test_a_design_that_cannot_be_is_refused_in_one_line(small, changes, error, message):
    with pytest.raises(error, match=message) as raised:
        small.run(design_of(**changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("fault_model", [FaultModel(bits=2), FaultModel(values=2)], ids=str)
def test_faults_of_several_bits_cannot_be_planned_by_bit(small, fault_model):
    with pytest.raises(InvalidParameter, match="only faults of one bit in one value can be planned by bit"):
        small.run(design_of("proportional"), fault_model=fault_model)
    assert len(small.run(design_of("uniform", 5), fault_model=fault_model)) == 10 * len(small.sites)


@pytest.mark.parametrize(
    ("stop_at", "delta_loss", "expected"), [("never", 3.0, 0.0), ("0.01", 3.0, 0.01), ("10%", 3.0, 0.3), ("2.5%", 4.0, 0.1)]
)
def test_a_wanted_half_width_is_in_nats_or_a_share(stop_at, delta_loss, expected):
    assert design_of(stop_at=stop_at).half_width(delta_loss) == pytest.approx(expected)


def test_doubtful_images_are_more_likely_and_no_injection_weighs_more_than_2(tiny, images):
    even, chances = tiny.chances(), tiny.chances("importance")
    probability = tiny.engine.observe(images).softmax(dim=1).amax(dim=1).numpy()
    doubt = (1 - probability) * even
    assert chances == pytest.approx((even + doubt * even.sum() / doubt.sum()) / 2, abs=0.0051)
    assert chances.max() >= chances[even > 0].min() >= 0.5
    with pytest.raises(UnknownName, match=r"way to draw images 'best' in argument images"):
        tiny.chances("best")


def test_a_uniform_design_is_one_campaign(tiny, capfd):
    found = tiny.run(design_of("uniform", 40, seed=3), how="importance")
    plan = draw_plan(tiny.sites, tiny.chances("importance"), 40, 3)
    expected = run_campaign(tiny.engine, tiny.loader, plan, tiny.limits, image_batch=6)
    pd.testing.assert_frame_equal(found, expected)
    assert list(found.columns) == RECORD_COLUMNS
    said = capfd.readouterr().err
    assert f"{len(tiny.sites)} layers to sample, plan uniform, 40 injections each, {40 * len(tiny.sites)} in all" in said
    assert "(Leveugle et al., 2009)" in said


def test_a_proportional_design_spreads_evenly(tiny):
    for injections in (64, 100, 320):
        found = by_bit(tiny.run(design_of("proportional", injections)))
        for counts in found.values():
            assert counts.sum() == injections
            assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("injections", "pilot"), [(64, 64), (300, 64), (512, 128), (200, 180), (130, 500)])
def test_a_neyman_design_uses_exactly_its_injections_and_silences_no_bit(small, injections, pilot):
    found = by_bit(small.run(design_of(injections=injections, pilot=pilot)))
    for counts in found.values():
        assert counts.sum() == injections
        assert counts.min() >= max(2, min(pilot, injections) // BITS)
        assert counts.min() >= int(sampling.EVENLY * injections / BITS) or pilot > sampling.EVENLY * injections


def test_a_neyman_design_looks_where_the_spread_is(tiny):
    records = tiny.run(design_of(injections=1024, pilot=256))
    pilot = records[records["index"] < 8 * BITS]  # 8 of each bit
    results = tiny.summary(pilot)
    spreads = {
        layer: np.array([stratum.std(ddof=1) for stratum in result.strata["delta_loss"]]) for layer, result in results.items()
    }
    for layer, counts in by_bit(records).items():
        others = np.mean([spread / spread.sum() for other, spread in spreads.items() if other != layer], axis=0)
        assert np.corrcoef(others, counts)[0, 1] > 0.99
        assert counts[np.argmax(others)] == counts.max() > 2 * 1024 / BITS
        assert counts[:10].max() < 1024 / BITS


def test_a_single_layer_has_no_others_to_learn_from(small):
    counts = by_bit(small.run(design_of(injections=320), sites=small.sites[1:2]))
    assert list(counts) == [small.sites[1].layer]
    assert (counts[small.sites[1].layer] == 10).all()


def test_layers_in_another_order_get_the_same_injections(small):
    pd.testing.assert_frame_equal(small.run(design_of()), small.run(design_of(), sites=small.sites[::-1]))


def test_records_come_by_layer_and_index_and_say_what_a_campaign_says(small):
    found = small.run(design_of(), how="importance")
    assert list(found["layer"].unique()) == [site.layer for site in small.sites]
    assert all(rows["index"].is_monotonic_increasing for _, rows in found.groupby("layer"))
    assert not found.duplicated(["layer", "index"]).any()
    counts = by_bit(found)
    plan = draw_plan(small.sites, small.chances("importance"), counts, 0)
    expected = run_campaign(small.engine, small.loader, plan, small.limits, image_batch=6)
    expected = expected.sort_values(["layer", "index"], ignore_index=True)
    found = found.sort_values(["layer", "index"], ignore_index=True)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-3, atol=1e-5)


def test_an_interrupted_design_goes_on_where_it_was(small, tmp_path, monkeypatch):
    design, whole, ran = design_of(), small.run(design_of()), []

    def stop_after_a_round(*arguments, **options):
        if ran:
            raise KeyboardInterrupt
        ran.append(arguments)
        return run_campaign(*arguments, **options)

    monkeypatch.setattr(sampling, "run_campaign", stop_after_a_round)
    with pytest.raises(KeyboardInterrupt):
        small.run(design, shard_dir=tmp_path)
    monkeypatch.undo()
    pd.testing.assert_frame_equal(small.run(design, shard_dir=tmp_path), whole)
    assert {folder.name for folder in tmp_path.iterdir()} == {"round-0", "round-1"}


@pytest.mark.parametrize("plan", ["uniform", "proportional", "neyman"])
@pytest.mark.parametrize("stop_at", ["150%", "0.3"])
def test_a_layer_ends_when_it_is_known_well_enough(small, plan, stop_at):
    design = design_of(plan, injections=2048, pilot=64, stop_at=stop_at, confidence=0.9)
    results = small.summary(small.run(design), 0 if plan == "uniform" else BITS)
    for result in results.values():
        found = mean_interval(result.delta_loss, 0.9)
        half = (found.high - found.low) / 2
        assert 64 <= result.injections <= 2048
        assert result.injections == 2048 or half <= design.half_width(found.value)
    assert any(result.injections < 2048 for result in results.values())


def test_every_layer_can_have_a_half_width_of_its_own(table):
    wanted = {site.layer: width for site, width in zip(table.sites, (1e-9, 0.5, 1.0, 100.0), strict=True)}
    design = design_of(injections=4096)
    engine = type("Nothing", (), {"number_format": FP32, "sites": table.sites})
    records = run_design(engine, table.sites, None, table.chances["uniform"], {}, design, image_batch=1, half_widths=wanted)
    found = summarise(records, {site.layer: 100 for site in table.sites}, BITS)
    counts = [found[layer].injections for layer in wanted]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (4096, 64)
    for layer, width in wanted.items():
        interval = mean_interval(found[layer].delta_loss)
        assert found[layer].injections == 4096 or (interval.high - interval.low) / 2 <= width


def test_layers_that_are_done_get_no_more_while_others_go_on(small):
    counts = {layer: rows.sum() for layer, rows in by_bit(small.run(design_of(injections=1500, stop_at="0.2"))).items()}
    assert len(set(counts.values())) > 1
    assert max(counts.values()) <= 1500


# --- Campaigns that read their outcomes from a table


class Table:
    """What faults do, made up: DeltaLoss of each layer, bit and image; neurons make no difference."""

    def __init__(self, layers=4, images=30):
        draw = np.random.default_rng(0)
        self.sites = [Site(str(place), "Linear", place, (100,), weights=100) for place in range(layers)]
        self.doubt = np.exp(draw.normal(0, 1, images))
        bit = np.arange(BITS)[:, None]
        scale = np.where(bit >= 24, 1.0, 0.01)
        hit = draw.random((layers, BITS, images)) < 0.3
        self.losses = hit * scale * self.doubt * np.exp(draw.normal(0, 1, (layers, BITS, images)))
        self.truth = self.losses.mean(axis=(1, 2))
        self.chances = {"uniform": np.ones(images), "importance": 0.5 + 0.5 * self.doubt / self.doubt.mean()}

    def run(self, design, how="uniform"):
        engine = type("Nothing", (), {"number_format": FP32, "sites": self.sites})
        return run_design(engine, self.sites, None, self.chances[how], {}, design, image_batch=1)

    def campaign(self, engine, loader, plan, limits, **options):
        known = {name: np.zeros(len(plan), dtype=kind) for name, kind in RECORD_TYPES.items() if name not in plan}
        loss = self.losses[plan["layer"].astype(int), plan["bit"], plan["image"]]
        return plan.assign(**known | {"faulty_loss": loss})

    def means(self, records, bits):
        found = summarise(records, {site.layer: site.neurons for site in self.sites}, bits)
        return np.array([found[site.layer].delta_loss.value for site in self.sites])


@pytest.fixture
def table(monkeypatch):
    made = Table()
    monkeypatch.setattr(sampling, "run_campaign", made.campaign)
    monkeypatch.setattr(sampling, "measure_pace", lambda *_, **__: 1000.0)
    return made


@pytest.mark.parametrize(
    ("plan", "how", "seeds"), [("uniform", "importance", 100), ("proportional", "uniform", 50), ("neyman", "importance", 100)]
)
def test_every_plan_is_unbiased(table, plan, how, seeds):
    bits = 0 if plan == "uniform" else BITS
    found = np.array([table.means(table.run(design_of(plan, 192, seed=seed), how), bits) for seed in range(seeds)])
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - table.truth) < 3 * error).all()


def test_allocation_by_pilot_and_images_by_importance_make_estimates_steadier(table):
    def spread(plan, how):
        bits = 0 if plan == "uniform" else BITS
        means = [table.means(table.run(design_of(plan, 512, pilot=128, seed=seed), how), bits) for seed in range(25)]
        return np.std(means, axis=0).sum()

    plain, by_bit, both = spread("uniform", "uniform"), spread("neyman", "uniform"), spread("neyman", "importance")
    assert both < by_bit < 0.8 * plain


@pytest.mark.parametrize("stop_at", ["10%", "0.1"])
def test_a_layer_on_which_nothing_happened_yet_is_not_done(table, stop_at):
    table.losses[1] = 0
    found = by_bit(table.run(design_of(injections=512, stop_at=stop_at)))
    assert found["1"].sum() == 512


@pytest.mark.parametrize("losses", [np.nan, np.inf])
def test_a_layer_on_which_every_fault_breaks_everything_ends_at_its_maximum(table, losses):
    table.losses[1] = losses
    found = by_bit(table.run(design_of(injections=512, stop_at="50%")))
    assert found["1"].sum() == 512


@pytest.mark.parametrize("pilot", [1, 2, 3])
def test_a_tiny_pilot_grows(table, pilot):
    records = table.run(design_of("uniform", 300, pilot=pilot, stop_at="1%"))
    assert records.groupby("layer").size().tolist() == [300] * 4


def test_a_round_at_most_triples_what_there_was(table, monkeypatch):
    sizes = []
    monkeypatch.setattr(sampling, "run_campaign", lambda *a, **o: sizes.append(len(a[2])) or table.campaign(*a, **o))
    table.run(design_of("proportional", 1200, stop_at="0.0001%"))
    assert np.cumsum(sizes).tolist() == [4 * total for total in (64, 192, 576, 1200)]


@pytest.mark.parametrize("before", [None, 2, 5, 30])
@pytest.mark.parametrize("total", [64, 100, 500, 1000])
def test_a_spread_keeps_what_there_was_and_hits_its_total(total, before):
    draw = np.random.default_rng(0)
    shares = draw.lognormal(0, 2, BITS)
    shares /= shares.sum()
    had = None if before is None else np.full(BITS, before)
    spread = sampling.spread_over_bits(total, shares, had)
    least = 2 if before is None else before
    assert spread.min() >= least
    assert spread.sum() == max(total, least * BITS)
    free = spread > least
    if free.sum() > 1:
        assert spread[free] == pytest.approx(shares[free] / shares[free].sum() * spread[free].sum(), abs=1.01)


# --- Other detectors


def test_under_another_detector_only_what_it_changes_runs_again(small):
    records = small.run(design_of("uniform", 200))
    lower = dict.fromkeys(small.limits, 2.0)
    changed = rerun_changed(small.engine, small.loader, records, lower, image_batch=6)
    assert 0 < len(changed) < len(records) / 2
    plan = draw_plan(small.sites, small.chances(), 200, 0)
    expected = run_campaign(small.engine, small.loader, plan, lower, image_batch=6)
    order = ["layer", "index"]
    found = replace_records(records, changed).sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(found, expected.sort_values(order, ignore_index=True), rtol=1e-3, atol=1e-5)


def test_under_the_same_detector_what_was_never_over_the_limit_is_not_run_again(small):
    records = small.run(design_of("uniform", 50))
    high = {layer: float("inf") for layer in small.limits}
    quiet = records[~records["detected"] & np.isfinite(records["faulty_value"])]
    assert len(quiet) > len(records) / 2
    assert rerun_changed(small.engine, small.loader, quiet, high, image_batch=6).empty
