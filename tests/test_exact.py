"""Layers without sampling: the same as one inference for every fault, and what sampled campaigns have to agree with."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from conftest import DigitsNetwork, digits, trained
from fault_helpers import make_faults
from textguard.errors import InvalidParameter
from textguard.estimates.statistics import average, mean_interval, rate_interval
from textguard.estimates.summary import Totals, summarise, summarise_totals
from textguard.faults import FaultModel, enumerate_layer, exact, image_chances, parse_format, profile_ranges, run_design
from textguard.faults.damage import SINGLE_FLIP, Storage
from textguard.faults.engines import PyTorchFIEngine, ReplayEngine, WholeEngine
from textguard.faults.exact import affordable, flip_logits, has_closed_form
from textguard.faults.plans import draw_plan
from textguard.faults.sampling import Design
from textguard.vision.classifiers import TextGuidedClassifier

COUNTS = ("faults", "masked", "detected", "mismatches", "nonfinite")


@pytest.fixture(scope="module")
def guided() -> nn.Module:
    """The network with a text-guided head: its own last layer, `backbone.fc`, gives the 16 latent values.

    Latent values and the head's are scaled so that some lie between 1 and 2, where one flip makes them infinite or NaN; the
    norm and the logit scale undo it.
    """
    torch.manual_seed(0)
    images, labels = digits()
    directions = F.normalize(torch.randn(10, 16), dim=1)
    model = trained(TextGuidedClassifier(DigitsNetwork(16), 10, 16, directions), images[:-200], labels[:-200])
    with torch.no_grad():
        for weight in (*model.backbone.fc.parameters(), model.head.weight):
            weight.mul_(4)
        model.logit_scale -= math.log(4)
    return model


@pytest.fixture
def loader(data) -> DataLoader:
    """Shuffled, as people have them."""
    return DataLoader(TensorDataset(*data), batch_size=48, shuffle=True)


def limits_of(model: nn.Module, loader: DataLoader) -> dict[str, float]:
    ranges = profile_ranges(model, loader)
    return dict(zip(ranges["layer"], ranges["max_abs"], strict=True))


def brute_force(engine, images: Tensor, labels: Tensor, position: int, limit: float) -> Totals:
    """Every fault of one site, one neuron after the other."""
    site, bits = engine.sites[position], engine.number_format.bits
    found = {name: np.zeros(bits) for name in (*COUNTS, "delta_loss")}
    bit, image = (index.flatten() for index in torch.meshgrid(torch.arange(bits), torch.arange(len(images)), indexing="ij"))
    for neuron in range(site.neurons):
        faults = make_faults(torch.full_like(image, site.position), image, torch.full_like(image, neuron), 1 << bit, limit)
        outcomes = engine.run(images, faults)
        golden = outcomes.golden_logits[image]
        before, after = (F.cross_entropy(logits, labels[image], reduction="none") for logits in (golden, outcomes.logits))
        finite = after.isfinite()
        columns = {
            "faults": torch.ones_like(finite),
            "masked": outcomes.masked,
            "detected": outcomes.detected,
            "mismatches": (outcomes.logits.argmax(dim=1) != golden.argmax(dim=1)) & finite,
            "nonfinite": ~finite,
            "delta_loss": (after - before).abs().where(finite, 0.0).double(),
        }
        for name, column in columns.items():
            found[name] += column.unflatten(0, (bits, -1)).sum(dim=1).numpy()
    return Totals(site.layer, site.neurons, **found)


def assert_same_totals(a: Totals, b: Totals, **tolerances) -> None:
    assert (a.layer, a.neurons) == (b.layer, b.neurons)
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)
    np.testing.assert_allclose(a.delta_loss, b.delta_loss, **{"rtol": 1e-4, "atol": 1e-4 * a.faults[0] / 100, **tolerances})


# The closed form, the engine's enumeration, and one fault after the other.


def enumerated(engine, loader, images, site, limit, monkeypatch) -> Totals:
    """The layer through the engine, closed form or not."""
    with monkeypatch.context() as patch:
        patch.setattr(exact, "has_closed_form", lambda *_: False)
        return enumerate_layer(engine, loader, images, site, limit)


@pytest.mark.parametrize("which", ["network", "guided"])
@pytest.mark.parametrize("text", ["fp32", "fp16", "int(8)", "bfp(8,7,4)", "adaptivfloat(4,3)"])
def test_closed_form_and_enumeration_agree_bit_by_bit(text, which, request, data, monkeypatch):
    model, (images, labels) = request.getfixturevalue(which), data
    loader = DataLoader(TensorDataset(images, labels), batch_size=3, shuffle=True)
    profiled = limits_of(model, loader)
    engine = ReplayEngine(model, images[0], 64, number_format=parse_format(text), profiled=profiled)
    chosen = [5, 0, 17, 199, 60, 121]
    site = engine.sites[-1]
    assert has_closed_form(engine, site)
    assert site.layer == ("fc" if which == "network" else "head")
    assert engine.factor_behind_last() == pytest.approx(float(model.logit_scale.detach().exp()) if which == "guided" else 1.0)
    for limit in (math.inf, profiled[site.layer], 65536.0):
        closed = enumerate_layer(engine, loader, chosen, site, limit)
        assert len(closed.faults) == engine.number_format.bits
        assert (closed.faults == len(chosen) * 10).all()
        assert_same_totals(closed, enumerated(engine, loader, chosen, site, limit, monkeypatch))
        assert 0 < closed.mismatches.sum() < closed.faults.sum()
        assert (closed.detected.sum() > 0) == (not math.isinf(limit)) or text != "fp32"
        if text == "fp32":
            assert (closed.nonfinite.sum() > 0) == math.isinf(limit)


@pytest.mark.parametrize("which", ["network", "guided"])
def test_enumeration_is_one_inference_for_every_fault(which, request, data):
    model, (images, labels) = request.getfixturevalue(which), data
    loader = DataLoader(TensorDataset(images, labels), batch_size=3, shuffle=True)
    profiled = limits_of(model, loader)
    engine, chosen = ReplayEngine(model, images[0], 64), [5, 0, 17, 199, 60, 121]
    assert [site.layer for site in engine.sites[2:]] == (["fc"] if which == "network" else ["backbone.fc", "head"])
    for position in range(2, len(engine.sites)):
        site = engine.sites[position]
        for limit in (math.inf, profiled[site.layer]):
            found = enumerate_layer(engine, loader, chosen, site, limit)
            expected = brute_force(engine, images[chosen], labels[chosen], position, limit)
            assert_same_totals(found, expected)
            assert (found.nonfinite.sum() > 0) == math.isinf(limit)
            # And as the engine sees it that knows no shortcut, and nothing of masking.
            whole = brute_force(WholeEngine(model, images[0], 64), images[chosen], labels[chosen], position, limit)
            for name in ("detected", "mismatches", "nonfinite"):
                np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
            np.testing.assert_allclose(found.delta_loss, whole.delta_loss, rtol=1e-3, atol=1e-3)


def test_totals_do_not_depend_on_batch_sizes_nor_on_the_order_of_images(guided, data, monkeypatch):
    chosen, limits = [9, 2, 150, 77, 31], limits_of(guided, DataLoader(TensorDataset(*data), batch_size=48))
    found = {}
    for size, batch_size, at_once in ((1, 3, 2**16), (2, 64, 700), (100, 1000, 1)):
        monkeypatch.setattr(exact, "FAULTS_AT_ONCE", at_once)
        engine = ReplayEngine(guided, data[0][0], batch_size)
        loader = DataLoader(TensorDataset(*data), batch_size=size, shuffle=True)
        for site in engine.sites[2:]:
            totals = enumerate_layer(engine, loader, chosen, site, limits[site.layer])
            assert_same_totals(found.setdefault(site.layer, totals), totals)
    parts = [enumerate_layer(engine, loader, [image], engine.sites[2], limits["backbone.fc"]) for image in reversed(chosen)]
    added = {name: sum(getattr(part, name) for part in parts) for name in (*COUNTS, "delta_loss")}
    assert_same_totals(Totals("backbone.fc", 16, **added), found["backbone.fc"])
    assert not np.allclose(parts[0].delta_loss, parts[1].delta_loss)


def test_totals_survive_their_file(network, loader):
    engine = ReplayEngine(network, loader.dataset[0][0], 64)
    totals = enumerate_layer(engine, loader, [0, 1], engine.sites[-1], math.inf)
    again = Totals.from_json(totals.as_json())
    assert_same_totals(totals, again, rtol=0, atol=0)
    assert str(summarise_totals(totals)) == str(summarise_totals(again))
    for broken in ({}, {**totals.as_json(), "masked": "many"}):
        with pytest.raises((KeyError, ValueError)):
            Totals.from_json(broken)


# Samples of what is known.

LAYERS = ("backbone.fc", "head")
PLANS = ("uniform", "proportional", "neyman", "guided")


@pytest.fixture(scope="module")
def known(guided, data) -> SimpleNamespace:
    """The text-guided model's last two layers, enumerated."""
    loader = DataLoader(TensorDataset(*data), batch_size=64)
    engine, limits = ReplayEngine(guided, data[0][0], 256), limits_of(guided, loader)
    chances = {images: image_chances(engine, loader, images) for images in ("uniform", "importance", "guided")}
    eligible = np.flatnonzero(chances["uniform"]).tolist()
    sites = engine.sites[2:]
    totals = {
        name: [enumerate_layer(engine, loader, eligible, site, limit(site)) for site in sites]
        for name, limit in (("profiled", lambda site: limits[site.layer]), ("off", lambda site: math.inf))
    }
    return SimpleNamespace(engine=engine, loader=loader, sites=sites, limits=limits, chances=chances, totals=totals)


def sampled(known, plan: str, images: str, seed: int, injections: int, detector: str = "profiled", nonfinite="goldeneye"):
    """Layer -> its estimates from a campaign."""
    design = Design(plan, injections, 256, "never", 0.99, seed)
    limits = known.limits if detector == "profiled" else dict.fromkeys(known.limits, math.inf)
    chances = known.chances["guided" if plan == "guided" else images]
    records = run_design(known.engine, known.sites, known.loader, chances, limits, design, image_batch=200)
    neurons = {site.layer: site.neurons for site in known.sites}
    return summarise(records, neurons, design.strata(SINGLE_FLIP, known.engine), nonfinite)


@pytest.mark.parametrize("images", ["uniform", "importance"])
@pytest.mark.parametrize("plan", PLANS)
def test_sampled_campaigns_agree_with_all_faults_and_have_no_bias(plan, images, known):
    runs = [sampled(known, plan, images, seed, 1500) for seed in range(6)]
    for totals in known.totals["profiled"]:
        truth = summarise_totals(totals)
        results = [run[totals.layer] for run in runs]
        for name, interval in (("delta_loss", mean_interval), ("mismatch", rate_interval), ("sdc", rate_interval)):
            value = getattr(truth, name).value
            assert value > 0
            found = [interval(getattr(result, name), 0.999) for result in results]
            assert all(one.low <= value <= one.high for one in found)
            together = average([getattr(result, name) for result in results])
            assert abs(together.value - value) < 3.3 * math.sqrt(together.variance)
            limits = mean_interval(together, 0.999)
            assert limits.low <= value <= limits.high < 5 * value  # an interval that says something
        masked = np.mean([result.masked / result.injections for result in results])
        assert (
            images == "importance"
            or plan in ("neyman", "guided")
            or masked == pytest.approx(truth.masked / truth.injections, abs=0.02)
        )


def test_plans_by_bit_are_worth_more(known):
    variance = {
        plan: np.mean([sampled(known, plan, "uniform", seed, 1500)["head"].delta_loss.variance for seed in range(3)])
        for plan in PLANS
    }
    assert variance["uniform"] > variance["proportional"] > variance["neyman"] > variance["guided"]


def test_images_by_importance_are_drawn_by_doubt_and_weighed_by_its_inverse(known, guided, data):
    uniform, importance = known.chances["uniform"], known.chances["importance"]
    with torch.no_grad():
        doubt = 1 - guided(data[0]).softmax(dim=1)[torch.arange(200), data[1]].numpy()
    assert set(uniform) == {0.0, 1.0}
    assert ((importance > 0) == (uniform > 0)).all()
    assert importance.sum() == pytest.approx(uniform.sum(), rel=0.01)
    expected = 0.5 + 0.5 * doubt / doubt[uniform > 0].mean()
    np.testing.assert_allclose(importance[uniform > 0], expected[uniform > 0], atol=0.006)
    assert importance.max() > 3
    plan = draw_plan(known.sites, importance, 20_000, 0)
    drawn = np.bincount(plan["image"], minlength=200) / len(plan)
    np.testing.assert_allclose(drawn, importance / importance.sum(), atol=0.003)
    weighted = np.bincount(plan["image"], plan["weight"], minlength=200) / len(plan)
    np.testing.assert_allclose(weighted, uniform / uniform.sum(), atol=0.002)
    assert plan["weight"].max() < 2.05


@pytest.mark.parametrize("nonfinite", ["goldeneye", "cap:20"])
@pytest.mark.parametrize("plan", PLANS)
def test_without_a_detector_nonfinite_losses_are_a_share_of_their_own(plan, nonfinite, known):
    found = sampled(known, plan, "importance", 1, 2000, "off", nonfinite)
    for totals in known.totals["off"]:
        truth, result = summarise_totals(totals, nonfinite), found[totals.layer]
        assert truth.nonfinite > 0
        assert result.nonfinite > 0
        assert result.detected == truth.detected == 0
        assert result.delta_loss.n == result.injections - (result.nonfinite if nonfinite == "goldeneye" else 0)
        for name, interval in (
            *(("delta_loss", mean_interval), ("mismatch", rate_interval)),
            *(("sdc", rate_interval), ("broken", rate_interval)),
        ):
            estimate = interval(getattr(result, name), 0.999)
            assert estimate.low <= getattr(truth, name).value <= estimate.high
        # Left out of the one, counted in the other.
        count = totals.faults.sum()
        assert truth.mismatch.value == totals.mismatches.sum() / (count - truth.nonfinite)
        assert truth.sdc.value == (totals.mismatches.sum() + truth.nonfinite) / count
        capped = (totals.delta_loss.sum() + 20 * truth.nonfinite) / count
        left_out = totals.delta_loss.sum() / (count - truth.nonfinite)
        assert truth.delta_loss.value == pytest.approx(capped if nonfinite == "cap:20" else left_out)


def test_policies_that_do_not_exist_are_refused(known):
    for bad in ("cap", "cap:0", "cap:nan", "cap:x", "drop"):
        with pytest.raises(InvalidParameter, match="cap:X"):
            summarise_totals(known.totals["off"][0], bad)


# What is enumerated.


def test_layers_are_enumerated_as_far_as_they_are_affordable(guided, data):
    engine = ReplayEngine(guided, data[0][0], 8)
    *_, latent, head = engine.sites

    def chosen(up_to, images=7, fault_model=SINGLE_FLIP, runner=engine):
        return affordable(runner, images, fault_model, up_to)

    assert chosen(0) == []
    assert chosen(1) == [head]  # in closed form it costs nothing
    assert chosen(16 * 7 * 32 - 1) == [head]
    assert chosen(16 * 7 * 32) == [latent, head]
    assert chosen(16 * 7 * 32, images=8) == [head]
    assert chosen(10**12) == [latent, head]  # convolutions never
    profiled = dict.fromkeys((site.layer for site in engine.sites), 1.0)
    half = ReplayEngine(guided, data[0][0], 8, number_format=parse_format("fp16"), profiled=profiled)
    assert chosen(16 * 7 * 16, runner=half) == half.sites[2:]
    for other in (FaultModel(bits=2), FaultModel(values=2), FaultModel("weight"), FaultModel(operation="stuck_at_1")):
        assert chosen(10**12, fault_model=other) == []
    for slow in (WholeEngine, PyTorchFIEngine):
        assert chosen(10**12, runner=slow(guided, data[0][0], 8)) == []


@pytest.mark.parametrize("text", ["fp32", "fp16", "fp8_e5m2", "int(8)", "fixed(3,4)", "adaptivfloat(4,3)", "bfp(8,7,3)"])
@pytest.mark.parametrize("limit", [math.inf, 3.0])
def test_ties_infinities_and_nans_count_as_torch_counts_them(limit, text):
    form = parse_format(text)
    storage = Storage(form, 127 / 16, 5, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    outputs = torch.cat(
        [
            torch.randint(-4, 5, (25, 5), generator=draw) / 2,  # many are equal
            torch.randn(25, 5, generator=draw) * 4,
            torch.zeros(1, 5),
            torch.full((1, 5), 1.75),
        ]
    )
    outputs = storage.round(outputs)
    labels = torch.randint(5, (len(outputs),), generator=draw)
    masked, detected, mismatch, nonfinite, delta = flip_logits(
        SimpleNamespace(storage=lambda position: storage, number_format=form), outputs, 0.5, labels, limit
    )
    for row, label in enumerate(labels):
        golden = outputs[row] * 0.5
        for column in range(5):
            block = outputs[row][column // 3 * 3 :][:3] if form.block else outputs[row]
            shared = form.shared(block, storage.limit)
            code = form.encode(outputs[row, column], storage.limit, shared)
            faulty = golden.repeat(form.bits, 1)
            seen, same = torch.zeros(2, form.bits, dtype=torch.bool)
            for bit in range(form.bits):
                value = float(form.decode(code ^ (1 << bit), storage.limit, shared))
                if not math.isinf(limit) and not abs(value) <= limit:
                    value, seen[bit] = -limit if value < 0 else limit, True
                same[bit] = value == outputs[row, column]
                faulty[bit, column] = value * 0.5
            expected = F.cross_entropy(faulty, label.expand(form.bits), reduction="none") - F.cross_entropy(golden, label)
            finite = expected.isfinite()
            assert torch.equal(nonfinite[row, column], ~finite)
            torch.testing.assert_close(delta[row, column], expected.abs().where(finite, 0.0), rtol=1e-4, atol=1e-6)
            assert torch.equal(mismatch[row, column], (faulty.argmax(dim=1) != golden.argmax()) & finite)
            assert torch.equal(detected[row, column], seen)
            assert torch.equal(masked[row, column], same)


def test_ten_thousand_images_at_once():
    storage = Storage(parse_format("fp32"), 0.0, 10, torch.device("cpu"))
    engine = SimpleNamespace(storage=lambda position: storage, number_format=storage.format)
    *flags, delta = flip_logits(engine, torch.randn(10_000, 10), 14.3, torch.randint(10, (10_000,)), 5.0)
    assert [flag.shape for flag in flags] == [delta.shape] * 4 == [(10_000, 10, 32)] * 4
    assert {flag.dtype for flag in flags} == {torch.bool}
    assert delta.dtype == torch.float32
    assert delta.isfinite().all()
    assert not flags[3].any()


class Ending(nn.Module):
    """A last layer, and what comes behind it."""

    def __init__(self, end) -> None:
        super().__init__()
        self.first, self.last, self.end = nn.Linear(64, 6), nn.Linear(6, 10), end
        self.shift = nn.Parameter(torch.randn(10))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images.flatten(1))
        return self.end(self, x, self.last(x))


class Rows(nn.Module):
    """A linear layer on each row of pixels; every class has the first value of a row and of the one behind."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.each(images[:, 0])[:, :, :2].flatten(1)


FACTORS = {
    "nothing": (lambda model, x, y: y, 1.0),
    "a number": (lambda model, x, y: y * 2.0, 2.0),
    "a number first": (lambda model, x, y: 2.0 * y, 2.0),
    "a parameter": (lambda model, x, y: torch.mul(model.scale, y), 1.5),
    "several": (lambda model, x, y: -3 * (y * (model.scale + 0.5) * 0.5), -3.0),
}
NO_FACTORS = {
    "softmax": lambda model, x, y: y.softmax(dim=1),
    "a shift": lambda model, x, y: y + model.shift,
    "a vector": lambda model, x, y: y * model.shift,
    "the image": lambda model, x, y: y * x.norm(dim=1, keepdim=True),
    "itself": lambda model, x, y: y * y,
    "twice": lambda model, x, y: y * 2.0 + y * 0.5,
}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_behind_the_last_layer(name, data, monkeypatch):
    end, factor = FACTORS[name]
    torch.manual_seed(0)
    model, (images, labels) = Ending(end).eval(), (data[0][:6], data[1][:6])
    engine = ReplayEngine(model, images[0], 64)
    assert engine.factor_behind_last() == pytest.approx(factor)
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    site = engine.sites[-1]
    assert has_closed_form(engine, site)
    closed = enumerate_layer(engine, loader, list(range(6)), site, 20.0)
    through_engine = enumerated(engine, loader, list(range(6)), site, 20.0, monkeypatch)
    if factor < 0:  # equal logits the other way round
        closed, through_engine = (replace(one, mismatches=np.zeros(32)) for one in (closed, through_engine))
    assert_same_totals(closed, through_engine)


@pytest.mark.parametrize("name", NO_FACTORS)
def test_a_last_layer_with_more_than_a_factor_behind_it_is_enumerated_like_any_other(name, data):
    torch.manual_seed(0)
    images, labels = data[0][:6], data[1][:6]
    engine = ReplayEngine(Ending(NO_FACTORS[name]).eval(), images[0], 64)
    site, loader = engine.sites[-1], DataLoader(TensorDataset(images, labels), batch_size=4)
    assert not has_closed_form(engine, site)
    assert affordable(engine, 6, SINGLE_FLIP, 1) == []
    found = enumerate_layer(engine, loader, [0, 4], site, 20.0)
    assert_same_totals(found, brute_force(engine, images[[0, 4]], labels[[0, 4]], 1, 20.0))


def test_a_last_layer_with_several_values_per_class_has_no_closed_form(data):
    engine = ReplayEngine(Rows().eval(), data[0][0], 4)
    site, loader = engine.sites[-1], DataLoader(TensorDataset(*data), batch_size=4)
    assert site.shape == (8, 4)
    assert not has_closed_form(engine, site)
    found = enumerate_layer(engine, loader, [0], site, 20.0)
    assert_same_totals(found, brute_force(engine, data[0][:1], data[1][:1], 0, 20.0))
