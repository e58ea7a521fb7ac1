"""`assess` returns an object that holds all that was found: its table, parts of layers, files, replays and comparisons."""

import copy
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from textguard.artifacts import weights_mark, write_parquet
from textguard.assessment import Assessment, assess, load, storage
from textguard.assessment.comparing import as_run, compare_assessments, gate
from textguard.errors import InvalidArtifact, InvalidParameter, TextguardError, UnknownName
from textguard.estimates.groups import balanced, summarise_groups
from textguard.faults import FaultModel
from textguard.faults.sites import UNWANTED
from textguard.params import GateParams

RATE = 20.49
CLASSES = ("ant", "bee", "cat", "dog", "elk")


class Net(nn.Module):
    """Two layers that take faults, and one that takes none unless asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.mix, self.fc = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 4, 1), nn.Linear(144, 5)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 1, 8, 8] to [B, 5]."""
        return self.fc(self.mix(self.act(self.conv(images)).flatten(2)).flatten(1))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(1)
    return Net().eval()


@pytest.fixture(scope="module")
def images_of_classes(net) -> DataLoader:
    """Forty images, of which two have wrong labels."""
    torch.manual_seed(0)
    images = torch.rand(40, 1, 8, 8) * torch.linspace(0.2, 4, 40)[:, None, None, None]
    labels = net(images).argmax(dim=1)
    labels[:2] = (labels[:2] + 1) % 5
    data = TensorDataset(images, labels)
    data.classes = list(CLASSES)
    return DataLoader(data, batch_size=16)


@pytest.fixture(scope="module")
def found(net, images_of_classes) -> dict[str, Assessment]:
    """Assessments by how their faults were drawn; the last layer of `exact` is enumerated."""
    ways = {
        "uniform": {"fit_per_megabit": RATE},
        "guided": {"plan": "guided", "images": "shared"},
        "neyman": {"plan": "neyman", "images": "importance", "detector": "off"},
        "exact": {"enumerate_up_to": 1},
    }
    return {name: assess(net, images_of_classes, injections_per_layer=400, seed=2, **way) for name, way in ways.items()}


def doubled(net: Net) -> Net:
    """A network with logits twice as large: the same classes, and more DeltaLoss."""
    larger = copy.deepcopy(net)
    with torch.no_grad():
        larger.fc.weight *= 2
        larger.fc.bias *= 2
    return larger


# What is in it


def test_the_last_row_is_of_all_layers(found):
    one = found["uniform"]
    layers, overall = one.table[:-1], one.table.iloc[-1]
    assert one.table["layer"].tolist() == ["conv", "fc", "overall"]
    for measure in ("delta_loss", "mismatch", "sdc"):
        assert overall[measure] == pytest.approx(layers[measure].mean())
        assert overall[f"{measure}_low"] < overall[measure] < overall[f"{measure}_high"]
    for count in ("neurons", "injections", "masked", "detected", "nonfinite"):
        assert overall[count] == layers[count].sum()
    by_neurons = np.average(layers["sdc"], weights=layers["neurons"])
    assert one.mean("sdc", by="neurons").value == pytest.approx(by_neurons) != one.mean("sdc").value
    assert found["exact"].table["method"].tolist() == ["sampled", "exact", "mixed"]


def test_fit_is_what_can_be_hit_times_what_does_harm(found, net, images_of_classes):
    layers = found["uniform"].table[:-1]
    for end in ("", "_low", "_high"):
        expected = layers[f"sdc{end}"] * layers["neurons"] * 32 * RATE * 1e-6
        np.testing.assert_allclose(layers[f"fit{end}"], expected, rtol=1e-12)
    assert found["uniform"].table["fit"].iloc[-1] == pytest.approx(layers["fit"].sum())
    assert "fit" not in found["guided"].table
    in_weights = FaultModel(target="weight")
    weights = assess(net, images_of_classes, injections_per_layer=8, fit_per_megabit=RATE, fault_model=in_weights)
    assert [weights.exposure(layer) for layer in weights.layers] == [4 * 9, 144 * 5]
    images, labels = (torch.stack(part) for part in zip(*images_of_classes.dataset, strict=True))
    halves = DataLoader(TensorDataset(images.bfloat16(), labels), batch_size=20)
    short = assess(copy.deepcopy(net).bfloat16(), halves, injections_per_layer=64, fit_per_megabit=RATE, detector="off").table
    np.testing.assert_allclose(short["fit"][:-1], short["sdc"][:-1] * short["neurons"][:-1] * 16 * RATE * 1e-6, rtol=1e-12)
    for bad in (0, -1, float("nan"), True, "20"):
        with pytest.raises(InvalidParameter, match=r"argument fit_per_megabit is .*; it must be a number above 0"):
            assess(net, images_of_classes, fit_per_megabit=bad)


def test_it_says_what_was_looked_at_before_it_starts(net, images_of_classes, capsys):
    one = assess(net, images_of_classes, injections_per_layer=2)
    said = capsys.readouterr().err.splitlines()
    facts = [number for number, line in enumerate(said) if "images eligible" in line]
    assert facts == [0]
    assert [name for name, reason in one.skipped if reason.endswith(UNWANTED)] == ["mix", "Activation"]
    assert said[0] == (
        "assess: 2 sites, 3 modules with parameters; "
        "2 skipped (kinds that were not asked for: ConvTranspose1d, Activation); "
        "38 of 40 images eligible; top-1 95.00 %; engine replay"
    )
    assert (one.eligible, one.images, one.top1.value, one.engine, one.reason) == (38, 40, 0.95, "replay", "")
    assert one.predictions.loc[~one.predictions["eligible"], "image"].tolist() == [0, 1]
    assert one.classes == CLASSES
    assert one.weights == weights_mark(net) != weights_mark(doubled(net))
    assert one.plan.equals(one.records[one.plan.columns])


class Undecided(Net):
    """It looks at values, so that it cannot be traced."""

    def forward(self, images: Tensor) -> Tensor:
        """As before."""
        return super().forward(images if images.sum() > -1e9 else -images)


def test_why_another_engine_ran_is_kept(net, images_of_classes):
    whole = Undecided()
    whole.load_state_dict(net.state_dict())
    one = assess(whole.eval(), images_of_classes, injections_per_layer=2)
    if one.engine != "replay":  # which other ways to trace may make possible
        assert one.reason in one.facts
        assert len(one.reason) > 10
    asked = assess(net, images_of_classes, injections_per_layer=2, engine="whole")
    assert (asked.engine, asked.reason) == ("whole", "")


def test_reasons_are_grouped():
    skipped = (("a", "no kind"), ("b", "no kind"), *((f"c{n}", f"reason {n}") for n in range(7)))
    made = object.__new__(Assessment)
    for name, value in {"sites": (), "skipped": skipped, "modules": 9, "engine": "whole", "reason": "x"}.items():
        object.__setattr__(made, name, value)
    object.__setattr__(made, "settings", {"confidence": 0.99})
    object.__setattr__(made, "predictions", pd.DataFrame({"eligible": [True], "correct": [True]}))
    assert "9 skipped (2 as a: no kind, c0: reason 0, c1" in made.facts
    assert "and 3 other reasons, see skipped)" in made.facts
    assert made.facts.endswith("engine whole (x)")


def test_class_names_are_checked(net, images_of_classes):
    assert assess(net, images_of_classes, injections_per_layer=2, classes=list("vwxyz")).classes == tuple("vwxyz")
    with pytest.raises(InvalidParameter, match="argument classes has 2 names, and the model 5 classes"):
        assess(net, images_of_classes, classes=["a", "b"])


def test_a_mitigation_is_measured(net, images_of_classes, found):
    ranger = assess(
        net, images_of_classes, plan=assess(net, images_of_classes, detector="off"), detector="off", mitigation="ranger"
    )
    off = assess(net, images_of_classes, detector="off")
    assert ranger.layers["conv"].delta_loss.value < 0.5 * off.layers["conv"].delta_loss.value
    assert ranger.layers["fc"].delta_loss.value == pytest.approx(off.layers["fc"].delta_loss.value, rel=1e-3)
    assert ranger.weights == off.weights
    assert ranger.settings["mitigation"] == "ranger"
    with pytest.raises(UnknownName, match="mitigation 'tmr' in argument mitigation"):
        assess(net, images_of_classes, mitigation="tmr")


# Parts of layers


def by_hand(records: pd.DataFrame, group: np.ndarray) -> pd.DataFrame:
    """The plain means of each group of a plan in which all injections count the same."""
    loss = (records["faulty_loss"].astype(float) - records["golden_loss"].astype(float)).abs()
    values = pd.DataFrame({"delta_loss": loss.where(np.isfinite(loss)), "sdc": records["mismatch"] | ~np.isfinite(loss)})
    return values.groupby(group).mean()


def test_parts_of_a_uniform_sample_are_plain_means(found):
    one = found["uniform"]
    conv = one.records[one.records["layer"] == "conv"]
    labels = one.predictions["label"].to_numpy()
    groups = {"bit": conv["bit"], "image": conv["image"], "class": labels[conv["image"]]}
    for part, group in groups.items():
        told, expected = one.by(part, layer="conv").set_index(part), by_hand(conv, np.asarray(group))
        hit = told[told["injections"] > 0]
        assert hit["injections"].sum() == 400
        np.testing.assert_allclose(hit[["delta_loss", "sdc"]].astype(float), expected.loc[hit.index].astype(float), rtol=1e-6)
        few = hit["injections"] < 8
        assert hit.loc[few, "sdc_low"].isna().all()
        assert (hit.loc[~few, "sdc_low"] <= hit.loc[~few, "sdc"]).all()
        assert (hit.loc[~few, "sdc_high"] > hit.loc[~few, "sdc"]).all()
    together = by_hand(one.records, one.records["bit"].to_numpy())
    np.testing.assert_allclose(one.by("bit")["delta_loss"], together["delta_loss"].reindex(range(32)), rtol=1e-6)
    assert one.by("class")["name"].tolist() == list(CLASSES)
    assert len(one.by("channel", layer="conv")) == 4
    assert one.by("channel").groupby("layer").size().to_dict() == {"conv": 4, "fc": 5}


# By plan: of how many bits at least there are limits. Neyman's looks mostly at one.
KNOWN_BITS = {"uniform": 16, "guided": 8, "neyman": 1}


@pytest.mark.parametrize("way", KNOWN_BITS)
def test_parts_agree_with_all_faults_there_are(way, found, net, images_of_classes):
    """Bits of the last layer, whose faults all were tried; the intervals are of 99 %."""
    exact = (
        found["exact"]
        if way != "neyman"
        else assess(net, images_of_classes, injections_per_layer=2, enumerate_up_to=1, detector="off")
    )
    truth, told = exact.by("bit", layer="fc"), found[way].by("bit", layer="fc")
    assert (truth["sdc_low"] == truth["sdc"]).all()
    assert truth["injections"].tolist() == [38 * 5] * 32
    known = told["sdc_low"].notna()
    assert known.sum() >= KNOWN_BITS[way]
    for measure in ("delta_loss", "sdc"):
        inside = (told[f"{measure}_low"] <= truth[measure] + 1e-6) & (truth[measure] <= told[f"{measure}_high"] + 1e-6)
        assert inside[known].mean() >= 0.9
        # Nearer than if bits counted by how often they were drawn.
        assert told[measure][known].mean() == pytest.approx(truth[measure][known].mean(), rel=0.5)


def test_parts_of_a_guided_sample_add_up_to_the_whole(found):
    """Each part has a known share of all faults, however few of the harmless ones in it were drawn."""
    one = found["guided"]
    eligible = one.predictions[one.predictions["eligible"]]
    shares = {
        "bit": pd.Series(1 / 32, range(32)),
        "class": eligible["label"].value_counts(normalize=True),
        "image": pd.Series(1 / len(eligible), eligible["image"].to_numpy()),
    }
    for part, share in shares.items():
        told = one.by(part, layer="conv").set_index(part)
        assert (told["sdc"] * share).sum() == pytest.approx(one.layers["conv"].sdc.value)
        assert (told["delta_loss"] * share).sum() == pytest.approx(one.layers["conv"].delta_loss.value)


def test_bits_and_layers_that_got_more_injections_do_not_count_for_more():
    rows = [("a", 0, 0.0)] * 30 + [("a", 1, 4.0)] * 10 + [("b", 0, 0.0)] * 60 + [("b", 1, 8.0)] * 60
    records = pd.DataFrame(rows, columns=["layer", "bit", "faulty_loss"]).assign(weight=1.0, golden_loss=0.0, mismatch=False)
    records["index"] = records.groupby("layer").cumcount()
    told = summarise_groups(balanced(records, bits=2), np.zeros(160, dtype=int), 1)
    assert told["delta_loss"][0] == pytest.approx((2 + 4) / 2)
    raw = summarise_groups(balanced(records, layers=False), np.zeros(160, dtype=int), 1)
    assert raw["delta_loss"][0] == pytest.approx((40 + 480) / 160)


def test_intervals_of_groups_hold_as_often_as_they_say():
    generator, rates, held = np.random.default_rng(0), np.array([0.05, 0.3, 0.9]), []
    for _ in range(150):
        group = generator.integers(0, 3, 240)
        weight = np.where(generator.random(240) < 0.5, 0.75, 1.5)  # the light ones are drawn twice as often
        mismatch = generator.random(240) < rates[group]
        records = pd.DataFrame({"layer": "a", "index": range(240), "weight": weight, "golden_loss": 0.0, "mismatch": mismatch})
        told = summarise_groups(records.assign(faulty_loss=0.0), group, 3, confidence=0.9)
        held.append((told["sdc_low"] <= rates) & (rates <= told["sdc_high"]))
    assert (np.mean(held, axis=0) > 0.84).all()


def test_shared_images_are_one_observation():
    """Two layers that always agree say no more than one of them."""
    generator = np.random.default_rng(0)
    one = pd.DataFrame({"layer": "a", "index": range(100), "weight": 1.0, "golden_loss": 0.0, "faulty_loss": 0.0})
    one["mismatch"] = generator.random(100) < 0.3
    both = pd.concat([one, one.assign(layer="b")], ignore_index=True)
    alone, apart, together = (
        summarise_groups(records, np.zeros(len(records), dtype=int), 1, shared=shared).iloc[0]
        for records, shared in ((one, False), (both, False), (both, True))
    )
    assert together[["sdc", "sdc_low"]].tolist() == pytest.approx(alone[["sdc", "sdc_low"]].tolist())
    assert apart["sdc_low"] > together["sdc_low"]


def test_parts_that_there_are_not_are_refused(found, net, images_of_classes):
    with pytest.raises(UnknownName, match="part 'row' in argument part; known: bit, channel, class, image"):
        found["uniform"].by("row")
    with pytest.raises(UnknownName, match="layer 'act' in argument layer; known: conv, fc"):
        found["uniform"].by("bit", layer="act")
    with pytest.raises(InvalidParameter, match=r"all faults of 'fc' were tried, .*enumerate_up_to=0"):
        found["exact"].by("class", layer="fc")
    weights = assess(net, images_of_classes, injections_per_layer=2, fault_model=FaultModel(target="weight"))
    with pytest.raises(InvalidParameter, match="only faults in one neuron"):
        weights.by("channel")
    with pytest.raises(UnknownName, match="measure 'fit' in argument measure"):
        found["uniform"].mean("fit")


# Files


@pytest.mark.parametrize("way", ["uniform", "guided", "neyman", "exact"])
def test_what_is_saved_is_loaded(way, found, tmp_path):
    one = found[way]
    one.save(tmp_path / "new")
    again = load(str(tmp_path / "new"))
    pd.testing.assert_frame_equal(again.records, one.records)
    pd.testing.assert_frame_equal(again.predictions, one.predictions)
    pd.testing.assert_frame_equal(again.table, one.table)
    same = (
        "settings",
        "sites",
        "skipped",
        "modules",
        "engine",
        "reason",
        "classes",
        "weights",
        "parameters",
        "ranges",
        "limits",
    )
    assert {name: getattr(again, name) for name in same} == {name: getattr(one, name) for name in same}
    assert again.facts == one.facts
    one.save(tmp_path / "new")  # the same, again
    with pytest.raises(InvalidParameter, match="holds another assessment; name another folder, or say overwrite=True"):
        found["neyman" if way != "neyman" else "exact"].save(tmp_path / "new")
    found["neyman"].save(tmp_path / "new", overwrite=True)
    assert load(tmp_path / "new").table.equals(found["neyman"].table)


def test_a_writer_that_is_stopped_leaves_no_assessment(found, tmp_path, monkeypatch):
    found["uniform"].save(tmp_path)

    def stopped(path, *rest):
        if path.name == storage.IMAGES:
            raise KeyboardInterrupt
        write_parquet(path, *rest)

    monkeypatch.setattr(storage, "write_parquet", stopped)
    with pytest.raises(KeyboardInterrupt):
        found["guided"].save(tmp_path, overwrite=True)
    with pytest.raises(InvalidArtifact, match="holds no assessment"):
        Assessment.load(tmp_path)


def edit(**entries: object):
    """A change of assessment.json; `...` takes an entry out."""

    def work(folder, others):
        content = json.loads((folder / storage.FILE).read_text(encoding="utf-8")) | entries
        kept = {name: value for name, value in content.items() if value is not ...}
        (folder / storage.FILE).write_text(json.dumps(kept), encoding="utf-8")

    return work


def edit_settings(**entries: object):
    def work(folder, others):
        content = json.loads((folder / storage.FILE).read_text(encoding="utf-8"))
        content["settings"] |= entries
        (folder / storage.FILE).write_text(json.dumps(content), encoding="utf-8")

    return work


def edit_records(change):
    def work(folder, others):
        mark = json.loads((folder / storage.FILE).read_text(encoding="utf-8"))["mark"]
        write_parquet(folder / storage.RECORDS, change(others["uniform"].records), {"inputs": mark})

    return work


DAMAGE = {
    "a file is missing": (lambda folder, others: (folder / storage.RECORDS).unlink(), "records.parquet is missing"),
    "records of another": (
        lambda folder, others: write_parquet(folder / storage.RECORDS, others["neyman"].records, {"inputs": "0"}),
        "records.parquet is of another assessment than",
    ),
    "no JSON": (
        lambda folder, others: (folder / storage.FILE).write_bytes(b"{"),
        "assessment.json is not what",
    ),
    "an unknown key": (edit(colour="red"), "colour: no such key"),
    "a key too few": (edit(engine=...), "engine: Field required"),
    "no site": (edit(sites=[]), "sites: List should have at least 1 item"),
    "other eligible images": (edit(eligible=3), "has 38 of 40 images eligible, and assessment.json says otherwise"),
    "fewer classes": (edit(classes=["a"]), "classes that assessment.json does not name"),
    "an unknown plan": (edit_settings(plan="best"), "plan 'best'"),
    "a fault model of text": (edit_settings(fault_model="flip"), "has settings that there cannot be"),
    "a rate below 0": (edit_settings(fit_per_megabit=-1), "fit_per_megabit -1"),
    "a bit too high": (edit_records(lambda all: all.assign(bit=all["bit"] + 1)), "has bit 32 of layer 'conv', of 32 bits"),
    "layers without records": (edit_records(lambda all: all[all["layer"] == "fc"]), "they differ in 'conv'"),
    "an injection twice": (edit_records(lambda all: pd.concat([all, all[:1]])), "has 2 rows of injection 0 into layer 'conv'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused_in_one_line(name, found, tmp_path):
    damage, said = DAMAGE[name]
    found["uniform"].save(tmp_path)
    damage(tmp_path, found)
    with pytest.raises(TextguardError, match=re.escape(said)) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)
    assert "dvc repro" not in str(raised.value)


# Replays


@pytest.mark.parametrize("way", ["uniform", "guided", "neyman", "exact"])
def test_a_plan_is_replayed(way, found, net, images_of_classes, tmp_path):
    one = found[way]
    one.save(tmp_path)
    again = assess(net, images_of_classes, plan=load(tmp_path), detector=one.settings["detector"])
    pd.testing.assert_frame_equal(again.records, one.records)
    assert again.table.equals(one.table.drop(columns=["fit", "fit_low", "fit_high"], errors="ignore"))
    if way != "guided":
        shuffled = one.plan.sample(frac=1, random_state=0)
        rows = assess(
            net, images_of_classes, plan=shuffled, detector=one.settings["detector"], enumerate_up_to=int(way == "exact")
        )
        pd.testing.assert_frame_equal(rows.records, one.records)
        sampled = [layer for layer, result in one.layers.items() if result.method == "sampled"]
        assert rows.by("bit", sampled[0]).equals(one.by("bit", sampled[0]))


def test_a_plan_is_replayed_on_another_network(found, net, images_of_classes, capsys):
    worse = copy.deepcopy(net)
    with torch.no_grad():
        worse.fc.bias += torch.linspace(0, 0.2, 5)
    again = assess(worse, images_of_classes, plan=found["uniform"])
    assert again.plan.equals(found["uniform"].plan)
    wrong = int((~again.predictions["eligible"].to_numpy()[again.plan["image"]]).sum())
    assert wrong > 0
    assert f"assess: {wrong} of 800 replayed faults hit images that this model does not get right" in capsys.readouterr().err
    conv_alone = found["uniform"].plan[found["uniform"].plan["layer"] == "conv"]
    part = assess(net, images_of_classes, plan=conv_alone)
    assert list(part.layers) == ["conv"]
    assert ("fc", "the plan that is replayed has no fault for it") in part.skipped


def test_plans_that_say_too_little_or_too_much_are_refused(found, net, images_of_classes):
    def refused(line, **options):
        with pytest.raises(TextguardError, match=line):
            assess(net, images_of_classes, **options)

    plan = found["uniform"].plan
    refused("argument seed is 3, and the plan was drawn with 2; leave one of the two out", plan=found["uniform"], seed=3)
    refused("argument number_format is fp16, and the plan", plan=found["uniform"], number_format="fp16")
    refused("rows alone do not say so; give the whole assessment", plan=found["guided"].plan)
    refused("argument plan lacks the columns bit", plan=plan.drop(columns="bit"))
    refused("argument plan has a column image of float64", plan=plan.astype({"image": float}))
    refused("argument plan has no fault", plan=plan[:0])
    refused("the plan names layer 'stem', which the model does not have", plan=plan.assign(layer="stem"))
    refused("has a image that does not exist", plan=plan.assign(image=40))


# Comparisons


def test_the_gate_finds_what_is_worse_and_nothing_else(found, net, images_of_classes):
    one = found["uniform"]
    text, worse = gate(one, assess(doubled(net), images_of_classes, plan=one), GateParams())
    assert worse
    assert text.startswith("**FAIL: ")
    assert "| old -> new | DeltaLoss, overall |" in text
    assert "The weights differ: the two networks are compared as they are" in text
    text, worse = gate(one, one, GateParams())
    assert not worse
    assert text.startswith("**PASS: none of 15 comparisons")
    assert "weights differ" not in text
    text, worse = gate(assess(doubled(net), images_of_classes, plan=one), one, GateParams())
    assert not worse
    assert "| better |" in text
    text, _ = gate(one, found["neyman"], GateParams())
    assert "The two were asked different questions: detector was profiled and is off." in text
    conv = assess(net, images_of_classes, injections_per_layer=50, kinds=("Conv2d",))
    assert "The layers differ: means over layers are over other layers than before." in gate(one, conv, GateParams())[0]


def test_the_same_plan_is_compared_in_pairs(found, net, images_of_classes):
    one, larger = found["uniform"], doubled(net)

    def how(new):
        judged = compare_assessments(one, new, GateParams())
        return {judgement.comparison.quantity: judgement.comparison.tested for judgement in judged}

    for same in (assess(larger, images_of_classes, plan=one), assess(larger, images_of_classes, plan=one.plan)):
        assert how(same)["DeltaLoss, conv"] == "paired"
    seeded = assess(larger, images_of_classes, injections_per_layer=400, seed=3)
    assert how(seeded)["DeltaLoss, conv"] == "unpaired"
    # Same seed, same faults: as in the pipeline.
    assert how(assess(larger, images_of_classes, injections_per_layer=400, seed=2))["DeltaLoss, conv"] == "paired"


@pytest.mark.parametrize("way", ["uniform", "guided", "neyman", "exact"])
def test_a_run_says_what_the_assessment_says(way, found):
    one, run = found[way], as_run(found[way])
    assert (run.top1.value, run.weights, run.plan.eligible_images) == (one.top1.value, one.weights, one.eligible)
    table = one.table.set_index("layer")
    for layer in run.layers:
        for measure in ("delta_loss", "sdc", "mismatch"):
            told = getattr(layer, measure)
            assert [told.value, told.low, told.high] == [
                table.loc[layer.layer, f"{measure}{end}"] for end in ("", "_low", "_high")
            ]
    assert run.overall.sdc.value == table.loc["overall", "sdc"]
    assert run.by_neurons.sdc.value == one.mean("sdc", by="neurons").value
    if way == "uniform":
        assert run.overall.fit.value == pytest.approx(table.loc["overall", "fit"])
