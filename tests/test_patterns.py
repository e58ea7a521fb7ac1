"""Faults with a shape: their regions, plans and records, in every engine, beside a plain hook."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from pattern_drawing import FILE, drawing
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from textguard.assessment import Assessment, assess
from textguard.closeup import damaged_states
from textguard.errors import CampaignMismatch, InvalidParameter
from textguard.faults import FaultModel, draw_plan, engines, execution, make_engine, parse_format, run_campaign
from textguard.faults.campaign import Campaign, CampaignSettings
from textguard.faults.local import region_patch
from textguard.faults.patterns import regions_of, window_of
from textguard.faults.plans import FAULT_COLUMNS, damaged_values
from textguard.faults.sampling import rerun_changed
from textguard.faults.sites import Site
from textguard.schema.campaign import fault_fields

SHAPES = {
    "map": Site("a", "Conv2d", 0, (3, 4, 5), 54),
    "1-d map": Site("a", "Conv1d", 0, (3, 7), 18),
    "3-d map": Site("a", "Conv3d", 0, (2, 3, 4, 5), 54),
    "vector": Site("a", "Linear", 0, (9,), 18),
    "tokens": Site("a", "Linear", 0, (6, 4), 18),
    "places of tokens": Site("a", "Linear", 0, (2, 3, 4), 18),
    "heads": Site("a", "MatMul", 0, (2, 3, 4)),
}
# What each region is, as slices of an index array: by pattern, from the place of one of its values.
MAPS = {
    "channel": lambda place: (place[0], ...),
    "row": lambda place: (*place[:-1], slice(None)),
    "column": lambda place: (*place[:-2], slice(None), place[-1]) if len(place) > 2 else place,
}
TOKENS = {
    "channel": lambda place: (..., place[-1]),
    "row": lambda place: (*place[:-1], slice(None)),
    "column": lambda place: (..., place[-1]),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("pattern", ["channel", "row", "column", "block"])
def test_regions_are_what_they_are_called_and_share_out_all_values(name, pattern):
    site = SHAPES[name]
    regions, index = regions_of(site, FaultModel(pattern=pattern, block=(2, 4))), np.arange(site.neurons).reshape(site.shape)
    row, value = regions.values_of(regions.first(range(regions.count)))
    assert sorted(value.tolist()) == list(range(site.neurons))
    assert np.bincount(row).max() == regions.largest
    for anchor in range(site.neurons):
        found = regions.values_of([anchor])[1].tolist()
        assert anchor in found
        if pattern == "block":
            matrix = index.reshape(-1, site.shape[-1]).T if site.kind == "Linear" else index.reshape(site.shape[0], -1)
            channel, place = (int(axis[0]) for axis in np.where(matrix == anchor))
            expected = matrix[channel // 2 * 2 : channel // 2 * 2 + 2, place // 4 * 4 : place // 4 * 4 + 4]
        else:
            place = np.unravel_index(anchor, site.shape)
            expected = index[(TOKENS if site.kind == "Linear" else MAPS)[pattern](place)]
        assert found == np.sort(np.ravel(expected)).tolist()


def test_regions_of_weights_are_those_of_a_channel_or_an_input():
    conv, linear = Site("a", "Conv2d", 0, (3, 4, 5), 3 * 18), Site("b", "Linear", 0, (6, 4), 4 * 5)
    by = {pattern: FaultModel("weight", pattern=pattern) for pattern in ("channel", "row", "column")}
    assert regions_of(conv, by["channel"]).values_of([20])[1].tolist() == list(range(18, 36))
    assert regions_of(linear, by["channel"]).values_of([7])[1].tolist() == [5, 6, 7, 8, 9]
    assert regions_of(linear, by["column"]).values_of([7])[1].tolist() == [2, 7, 12, 17]
    for site, pattern in ((conv, "row"), (conv, "column"), (linear, "row")):
        with pytest.raises(InvalidParameter, match=rf"fault_model.pattern is '{pattern}'; weights of {site.kind}, .* channel"):
            regions_of(site, by[pattern])
    with pytest.raises(InvalidParameter, match="no known shape: take value or adjacent"):
        regions_of(Site("c", "ConvTranspose2d", 0, (3, 4, 5), 54), by["channel"])


REFUSED = {
    "one adjacent bit": ({"pattern": "adjacent"}, "bits is 1; pattern adjacent needs at least 2"),
    "random values": ({"damage": "random"}, "damage is 'random'; it is of regions, and pattern value has none: take equal"),
    "two rows": ({"pattern": "row", "values": 2}, "values is 2; pattern row hits one region per injection: take 1"),
    "metadata": ({"pattern": "row", "target": "metadata"}, "metadata has no such shape: take value or adjacent"),
    "unknown": ({"pattern": "ring"}, "pattern 'ring' in argument fault_model.pattern; known: adjacent, block, channel"),
    "no size": ({"pattern": "block", "block": 8}, "block is 8; it must be two whole numbers"),
    "no rows": ({"pattern": "block", "block": (0, 8)}, "block is 0; at least 1 is needed"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_a_pattern_that_does_not_go_with_the_rest_is_refused_in_a_line(fields, message):
    with pytest.raises(Exception, match="fault_model") as refused:
        FaultModel(**fields)
    assert message in str(refused.value)


def test_what_a_pattern_does_not_read_makes_no_other_fault_model():
    assert FaultModel(block=(4, 4)) == FaultModel()
    assert FaultModel(pattern="row", block=[2, 2]) == FaultModel(pattern="row")
    assert FaultModel(pattern="block", block=[2, 2]).block == (2, 2)
    old = {"target": "neuron", "operation": "flip", "bits": 1, "values": 1}
    assert FaultModel().as_json() == old == fault_fields(old | {"pattern": "value", "block": [8, 8], "damage": "equal"})
    for model in (FaultModel(pattern="block", block=(2, 4), damage="random"), FaultModel(pattern="adjacent", bits=3)):
        assert FaultModel(**model.as_json()) == model
        known = {name: list(part) if isinstance(part, tuple) else part for name, part in vars(model).items()}
        assert fault_fields(known) == model.as_json()


def test_adjacent_bits_are_side_by_side_everywhere_in_a_value():
    plan = draw_plan([SHAPES["vector"]], np.ones(3), 4000, 0, FaultModel(pattern="adjacent", bits=3, values=2))
    bits = plan["bit"].to_numpy().reshape(-1, 3)
    assert (np.diff(bits, axis=1) == 1).all()
    lowest = np.bincount(bits[:, 0], minlength=32)
    assert not lowest[30:].any()
    assert lowest[:30].min() > 8000 / 30 - 6 * (8000 / 30) ** 0.5
    with pytest.raises(InvalidParameter, match=r"fault_model\.bits is 17; there are 16"):
        draw_plan([SHAPES["map"]], np.ones(3), 2, 0, FaultModel(pattern="adjacent", bits=17), parse_format("fp16"))


def test_a_plan_names_each_region_by_its_first_value_alike_often():
    model = FaultModel(pattern="block", block=(2, 3))
    plan, regions = draw_plan([SHAPES["map"]], np.ones(3), 7000, 0, model), regions_of(SHAPES["map"], model)
    names, hits = np.unique(plan["neuron"], return_counts=True)
    assert len(plan) == 7000
    assert names.tolist() == regions.first(range(14)).tolist()
    assert abs(hits - 500).max() < 5 * 500**0.5  # the smaller tiles at the ends, too
    assert draw_plan([SHAPES["map"]], np.ones(3), 10, 0, model).equals(plan.iloc[:10])


def test_random_damage_follows_from_the_plan_and_differs_from_value_to_value():
    model, sites = FaultModel(pattern="channel", bits=2, damage="random"), {"a": SHAPES["map"]}
    faults = pd.DataFrame({"layer": "a", "index": range(50), "neuron": 0, "mask": 0b11})[FAULT_COLUMNS]
    row, neuron, mask = damaged_values(faults, sites, model, parse_format("fp32"))
    assert (np.bitwise_count(mask) == 2).all()
    assert (mask[neuron == 0] == 0b11).all()
    others = mask.reshape(50, 20)[:, 1:]
    assert len(np.unique(others)) > 300  # of 496
    half = damaged_values(faults.iloc[25:], sites, model, parse_format("fp32"))
    assert (half[2] == mask[row >= 25]).all()
    equal = damaged_values(faults, sites, FaultModel(pattern="channel", bits=2), parse_format("fp32"))
    assert (equal[2] == 0b11).all()
    assert (equal[1] == neuron).all()
    beside = FaultModel(pattern="channel", bits=2, damage="random")
    assert (
        damaged_values(faults.assign(index=1), sites, beside, parse_format("fp32"))[2].reshape(50, 20) == others[1, 0]
    ).sum()


class Tokens(nn.Module):
    """Patches as tokens, a linear layer over them, their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(48, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, images):
        tokens = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return self.head(torch.relu(self.mix(torch.relu(self.embed(tokens)))).mean(dim=1))


def maps() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU6(), nn.Conv2d(6, 8, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 16, 6), nn.ReLU(), nn.Linear(6, 5)),
    )


def lines() -> nn.Module:
    return nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 15, 5))


def volumes() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


NETS = {"maps": maps, "lines": lines, "volumes": volumes, "tokens": Tokens}
PATTERNS = {
    "adjacent": FaultModel(pattern="adjacent", bits=3),
    "channel": FaultModel(pattern="channel"),
    "channel, each its own": FaultModel(pattern="channel", damage="random"),
    "row, two bits stuck": FaultModel(operation="stuck_at_1", bits=2, pattern="row", damage="random"),
    "column": FaultModel(pattern="column"),
    "block": FaultModel(pattern="block", block=(3, 2)),
    "block, each its own": FaultModel(pattern="block", block=(2, 3), damage="random"),
    "weights of a channel": FaultModel("weight", pattern="channel", damage="random"),
}


def net_and_images(name):
    torch.manual_seed(0)
    model = NETS[name]().eval()
    images = torch.randn(5, 3, 8, 8)
    return model, DataLoader(TensorDataset(images, model(images).argmax(dim=1)), batch_size=2)


def with_a_hook(model, layer, image, neurons, masks, operation, limit):
    """The logits of one image, with its values written by a plain hook."""

    def damage(module, inputs, output):
        values = output.reshape(-1).clone()
        for neuron, mask in zip(neurons, masks, strict=True):
            code = int(values[neuron].view(torch.int32)) & 0xFFFFFFFF
            code = code ^ mask if operation == "flip" else code | mask
            faulty = torch.tensor(code - (code >> 31 << 32), dtype=torch.int32).view(torch.float32)
            values[neuron] = faulty if abs(faulty) <= limit else faulty.nan_to_num(limit, limit, -limit).clamp(-limit, limit)
        return values.reshape(output.shape)

    handle = model.get_submodule(layer).register_forward_hook(damage)
    with torch.no_grad():
        logits = model(image[None])
    handle.remove()
    return logits


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_engine_does_what_a_plain_hook_does(net, pattern):
    model, loader = net_and_images(net)
    fault_model, image = PATTERNS[pattern], loader.dataset[0][0]
    engines = [make_engine(name, model, image, 7, target=fault_model.target) for name in ("replay", "whole")]
    sites = {site.layer: site for site in engines[0].sites}
    limits = dict.fromkeys(sites, 40.0)
    plan = draw_plan(list(sites.values()), np.ones(5), 24, 3, fault_model)
    options = {"limits": limits, "image_batch": 3, "fault_model": fault_model}
    fast, slow = (run_campaign(engine, loader, plan, **options) for engine in engines)
    assert fast["golden_value"].sub(slow["golden_value"]).abs().max() < 1e-4
    assert (fast["detected"] == slow["detected"]).mean() > 0.97
    assert np.isclose(fast["faulty_loss"], slow["faulty_loss"], rtol=1e-3, atol=1e-4).mean() > 0.97
    assert np.array_equal(fast.loc[fast["masked"], "faulty_loss"], fast.loc[fast["masked"], "golden_loss"])
    if fault_model.target == "weight":
        return
    first = slow.groupby(["layer", "index"], sort=False).head(1).groupby("layer").head(6)
    wrong = 0
    for fault in first.itertuples():
        rows = plan[(plan["layer"] == fault.layer) & (plan["index"] == fault.index)]
        mask = int(np.bitwise_or.reduce(1 << rows["bit"].to_numpy()))
        neurons, masks = [fault.neuron], [mask]
        if fault_model.shaped:
            head = pd.DataFrame([(fault.layer, fault.index, fault.neuron, mask)], columns=FAULT_COLUMNS)
            _, neurons, masks = damaged_values(head, sites, fault_model, parse_format("fp32"))
        data, label = loader.dataset[fault.image]
        logits = with_a_hook(model, fault.layer, data, neurons, masks, fault_model.operation, 40.0)
        loss = float(nn.functional.cross_entropy(logits, label[None]))
        wrong += not np.isclose(fault.faulty_loss, loss, rtol=1e-3, atol=1e-4)
    assert wrong <= len(first) // 30


@pytest.mark.parametrize("pattern", ["channel, each its own", "row, two bits stuck", "block"])
def test_pytorchfi_damages_the_same_regions(pattern):
    model, loader = net_and_images("maps")
    engines = [make_engine(name, model, loader.dataset[0][0], 8) for name in ("pytorchfi", "whole")]
    plan = draw_plan(engines[0].sites, np.ones(5), 20, 1, PATTERNS[pattern])
    options = {"limits": {site.layer: 30.0 for site in engines[0].sites}, "image_batch": 3, "fault_model": PATTERNS[pattern]}
    theirs, ours = (run_campaign(engine, loader, plan, **options) for engine in engines)
    assert (theirs["detected"] == ours["detected"]).mean() > 0.97
    assert np.isclose(theirs["faulty_loss"], ours["faulty_loss"], rtol=1e-3, atol=1e-4).mean() > 0.97


@pytest.mark.parametrize("number_format", ["fp16", "int(8)", "bfp(5,7,16)"])
def test_regions_of_other_formats_are_damaged_in_their_bits(number_format):
    model, loader = net_and_images("maps")
    form, fault_model = parse_format(number_format), FaultModel(pattern="channel", damage="random")
    options = {"number_format": form, "profiled": dict.fromkeys(("0", "4", "6", "9", "11"), 4.0)}
    engines = [make_engine(name, model, loader.dataset[0][0], 8, **options) for name in ("replay", "whole")]
    plan = draw_plan(engines[0].sites, np.ones(5), 16, 1, fault_model, form)
    options = {"limits": {site.layer: 30.0 for site in engines[0].sites}, "image_batch": 3, "fault_model": fault_model}
    fast, slow = (run_campaign(engine, loader, plan, **options) for engine in engines)
    assert plan["bit"].max() < form.bits
    assert (fast["faulty_loss"] != fast["golden_loss"]).mean() > 0.5
    assert np.isclose(fast["faulty_loss"], slow["faulty_loss"], rtol=1e-2, atol=1e-3).mean() > 0.95


class Residual(nn.Module):
    """Sums, strides, pooling, a depthwise and a grouped convolution behind regions that are windows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.pool = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.MaxPool2d(3, 2, 1)
        self.deep, self.wide = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 6, 3, padding=1)
        self.down, self.head = nn.Conv2d(6, 8, 3, stride=2), nn.Linear(8, 5)

    def forward(self, images):
        x = torch.relu(self.pool(self.norm(self.first(images))))
        x = torch.relu(x + self.wide(torch.relu(self.deep(x))))
        return self.head(torch.relu(self.down(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("pattern", ["channel", "row", "column", "block"])
def test_windows_do_what_whole_maps_do(monkeypatch, pattern):
    torch.manual_seed(0)
    model, images = Residual().eval(), torch.randn(4, 3, 24, 24)
    loader = DataLoader(TensorDataset(images, model(images).argmax(dim=1)))
    fault_model = FaultModel(pattern=pattern, block=(2, 7), damage="random")
    engine = make_engine("replay", model, images[0], 16)
    started = []
    monkeypatch.setattr(engines, "region_patch", lambda *part: started.append(region_patch(*part)) or started[-1])
    plan, limits = draw_plan(engine.sites, np.ones(4), 60, 0, fault_model), {site.layer: 20.0 for site in engine.sites}
    options = {"limits": limits, "image_batch": 4, "fault_model": fault_model}
    windows = run_campaign(engine, loader, plan, **options)
    assert len(started) >= 3
    assert windows["masked"].any() == (pattern != "block")
    monkeypatch.setattr(engines, "window_of", lambda *part: None)
    whole = run_campaign(engine, loader, plan, **options)
    assert np.isclose(windows["faulty_loss"], whole["faulty_loss"], rtol=1e-4, atol=1e-5).mean() > 0.99
    same = ["golden_value", "faulty_value", "detected"]
    assert windows[same].equals(whole[same])


@pytest.mark.parametrize("block", [(1, 5), (2, 4), (3, 9), (2, 13), (8, 100)])
def test_a_window_is_as_large_as_the_largest_region_needs(block):
    site, model = Site("a", "Conv2d", 0, (3, 4, 9), 54), FaultModel(pattern="block", block=block)
    regions, window = regions_of(site, model), window_of(site, model)
    row, value = regions.values_of(regions.first(range(regions.count)))
    places = np.unravel_index(value, site.shape)
    spans = [max(int(np.ptp(axis[row == number])) + 1 for number in range(regions.count)) for axis in places]
    assert (window.height, window.width) == tuple(spans[1:])
    assert window.one_channel == (spans[0] == 1)


def test_results_are_the_same_in_any_batches_and_groups(monkeypatch):
    model, loader = net_and_images("maps")
    fault_model = FaultModel(pattern="block", block=(3, 5), damage="random")
    plan = draw_plan(make_engine("replay", model, loader.dataset[0][0], 8).sites, np.ones(5), 30, 0, fault_model)

    def run(batch_size, image_batch, at_once):
        monkeypatch.setattr(execution, "VALUES_AT_ONCE", at_once)
        engine = make_engine("replay", model, loader.dataset[0][0], batch_size)
        limits = {site.layer: 9.0 for site in engine.sites}
        return run_campaign(engine, loader, plan, limits, image_batch=image_batch, fault_model=fault_model)

    usual = run(8, 3, 2**21)
    for other in (run(1, 5, 2**21), run(50, 2, 40)):
        assert np.allclose(usual["faulty_loss"], other["faulty_loss"], rtol=1e-4, atol=1e-5)
        names = ["layer", "index", "image", "neuron", "bit", "detected", "masked", "mismatch"]
        assert usual[names].equals(other[names])


def test_records_say_whether_any_value_was_detected_and_other_detectors_see_all_of_a_region():
    model, loader = net_and_images("maps")
    fault_model = FaultModel(pattern="channel", damage="random")
    engine = make_engine("replay", model, loader.dataset[0][0], 8)
    plan = draw_plan(engine.sites, np.ones(5), 40, 0, fault_model)
    limits = {name: {site.layer: value for site in engine.sites} for name, value in (("low", 1.0), ("high", 1e4))}
    options = {"image_batch": 3, "fault_model": fault_model}
    low, high = (run_campaign(engine, loader, plan, limits[name], **options) for name in ("low", "high"))
    of_maps = low["layer"].isin(["0", "4"])
    # Few of 32 bits take a value so far, but one of 16 or 64 values mostly; the one that the plan names: rarely.
    assert low.loc[of_maps, "detected"].mean() > 0.5
    assert (low["faulty_value"].abs() <= 1).all()
    assert high["detected"].mean() < low["detected"].mean()
    assert rerun_changed(engine, loader, low, limits["high"], **options).equals(high)


def test_plans_that_do_not_know_regions_are_refused_in_a_line():
    model, loader = net_and_images("maps")
    engine = make_engine("replay", model, loader.dataset[0][0], 8)
    fault_model = FaultModel(pattern="row")
    with pytest.raises(InvalidParameter, match="single values, not in a row; take uniform, proportional or neyman"):
        Campaign(model, loader, CampaignSettings(plan="guided", fault_model=fault_model))
    two = draw_plan(engine.sites, np.ones(5), 3, 0).assign(index=0)
    with pytest.raises(CampaignMismatch, match=r"several neurons in injection 0 into layer '0'; of pattern row"):
        run_campaign(engine, loader, two, {}, image_batch=3, fault_model=fault_model)
    with pytest.raises(InvalidParameter, match=r"pattern is 'row'; weights of Conv2d, as of layer '0'"):
        Campaign(model, loader, CampaignSettings(fault_model=FaultModel("weight", pattern="row")))


@pytest.mark.parametrize("plan", ["uniform", "proportional"])
def test_an_assessment_of_regions_is_saved_and_loaded_and_replayed(tmp_path, plan):
    model, loader = net_and_images("maps")
    fault_model = FaultModel(pattern="block", block=(2, 4), damage="random")
    options = {"fault_model": fault_model, "detector": "off", "enumerate_up_to": 10**6}
    found = assess(model, loader, injections_per_layer=64, plan=plan, **options)
    found.save(tmp_path)
    loaded = Assessment.load(tmp_path)
    assert loaded.fault_model == fault_model
    assert loaded.table.equals(found.table)
    assert not loaded.totals
    assert len(loaded.records) == 64 * 5
    again = assess(model, loader, plan=loaded, detector="off")
    assert np.allclose(again.records["faulty_loss"], found.records["faulty_loss"], equal_nan=True)
    with pytest.raises(InvalidParameter, match="only faults in one neuron"):
        found.by("channel")


def test_a_close_look_damages_all_of_a_region():
    site, model = SHAPES["map"], FaultModel(bits=2, pattern="row", damage="random")
    rows = pd.DataFrame({"layer": "a", "index": 4, "neuron": 5, "bit": [3, 31]})
    cam = SimpleNamespace(sites=[site], number_format=parse_format("fp32"), device=torch.device("cpu"))
    fault = damaged_states(cam, pd.DataFrame(), rows, model, "off", {"a": 9.0})["worst"][1]
    head = pd.DataFrame([("a", 4, 5, 1 << 3 | 1 << 31)], columns=FAULT_COLUMNS)
    _, neurons, masks = damaged_values(head, {"a": site}, model, parse_format("fp32"))
    assert dict(zip(neurons.tolist(), masks.tolist(), strict=True)) == dict(
        zip(fault.neurons.tolist(), fault.masks.tolist(), strict=True)
    )


def test_the_drawing_shows_what_a_pattern_damages():
    assert FILE.read_text(encoding="utf-8") == drawing(), "run 'python tests/pattern_drawing.py'"
