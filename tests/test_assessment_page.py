"""The page of one's own model: one file, nothing of it obeyed, and what it says is what the numbers say."""

import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_page import Elements
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from conftest import show
from textguard.assessment import Assessment, assess
from textguard.assessment.advice import MEASURED
from textguard.assessment.command import run
from textguard.assessment.page import Side, _call, _mapped, _side, write_page
from textguard.errors import InvalidParameter, UnknownName
from textguard.faults import FaultModel

ATTACK = "<script>alert(1)</script>"


def make_model() -> nn.Module:
    """A layer's name is as hostile as Python lets it be."""
    torch.manual_seed(0)
    layers = [(ATTACK, nn.Conv2d(1, 4, 3)), ("act", nn.ReLU()), ("{{ 7 * 7 }}", nn.Conv2d(4, 4, 3)), ("flat", nn.Flatten())]
    return nn.Sequential(OrderedDict([*layers, ("fc", nn.Linear(64, 3)), ("unused", nn.Identity())])).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model()


@pytest.fixture(scope="module")
def loader(model) -> DataLoader:
    torch.manual_seed(1)
    images = torch.randn(12, 1, 8, 8)
    return DataLoader(TensorDataset(images, model(images).argmax(dim=1)), batch_size=12)


@pytest.fixture(scope="module")
def found(model, loader) -> Assessment:
    return assess(model, loader, injections_per_layer=128, seed=3, enumerate_up_to=1, detector="fixed:1000")


@pytest.fixture(scope="module")
def worse(found) -> Assessment:
    """Where twenty more faults of each layer change the class."""
    hit = found.records["index"] < 20
    loss = found.records["golden_loss"] + 1
    return replace(
        found,
        records=found.records.assign(
            mismatch=found.records["mismatch"] | hit, faulty_loss=found.records["faulty_loss"].where(~hit, loss), masked=False
        ),
        skipped=(("norm", "BatchNorm is not among the wanted kinds of sites"),),
        weights="0123456789abcdef",
    )


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Pages without figures, which take most of the time."""
    monkeypatch.setattr("textguard.assessment.page._figures", lambda *_: [])


def _sides(own: Assessment, other: Assessment) -> list[Side]:
    return [_side(name, found) for name, found in (("own", own), ("other", other))]


def page(folder: Path, *arguments, **options) -> tuple[str, Elements]:
    write_page(arguments[0], folder / "page.html", *arguments[1:], **options)
    html = (folder / "page.html").read_text(encoding="utf-8")
    return html, Elements(html)


def test_one_model_has_all_of_its_page_in_one_file(found, tmp_path):
    measured = pd.DataFrame([("ranger", 0.25, 0.125, 0.5, 0.25, 0.75, 1.5)], columns=MEASURED)
    html, elements = page(tmp_path, found, names=("mine", "theirs"), mitigations=measured)
    assert "50.0 [25.0, 75.0]" in elements.text.replace("\xa0", " ")
    assert len(elements.attributes("src")) == 3
    assert all(source.startswith("data:image/png;base64,") for source in elements.attributes("src"))
    links = [link for link in elements.attributes("href") if link != "data:,"]
    ids = elements.attributes("id")
    assert links
    assert all(link[0] == "#" and link[1:] in ids for link in links)
    assert len(ids) == len(set(ids))
    assert elements.attributes("style") == []
    assert "default-src &#39;none&#39;" in html
    assert [tag for tag, _ in elements.found].count("script") == 1
    assert ATTACK in elements.text
    assert "{{ 7 * 7 }}" in elements.text
    assert all(
        f"mine: {seen}" in text
        for seen, text in zip(("SDC largest in layer", "largest in bit", "none of 4"), elements.attributes("alt"), strict=True)
    )
    layer = re.search(r"each channel of layer (.*)\. mine: ", elements.attributes("alt")[2])[1]
    largest = found.by("channel", layer).nlargest(1, "sdc")
    assert f"largest in channel {largest['channel'].item()}, " in elements.attributes("alt")[2]
    sdc = found.mean("sdc", "neurons")
    assert f"about 1 in {round(1 / sdc.value):,}" in elements.text
    assert "For 90.0 % less SDC, " in elements.text
    assert "What was not hit" in elements.text
    assert all(reason in elements.text for _, reason in found.skipped)
    assert (
        "Intervals of fewer than 1,024 uniform injections per layer hold less often than they say; here are 128."
        in elements.text
    )


def test_two_models_stand_side_by_side(found, worse, tmp_path, monkeypatch):
    _, elements = page(tmp_path, worse, found, names=("new", "old"))
    monkeypatch.setattr("textguard.assessment.page._figures", lambda *_: [])
    text = elements.text
    assert re.search(r"New is worse than old: its predictions are corrupted [\d.]+ \[[\d.]+, [\d.]+\] times as often\.", text)
    assert "Both took the same faults, which are compared in pairs." in text
    assert "Their weights differ." in text
    assert "1 operation or module takes no faults." in text
    assert "BatchNorm is not among the wanted kinds of sites" in text
    assert len(elements.attributes("src")) == 3
    assert all("old: " in alt and "new: " in alt for alt in elements.attributes("alt"))
    _, elements = page(tmp_path, found, worse, names=("old", "new"))
    assert "Old is better than new: its predictions are corrupted" in elements.text
    fewer = replace(found, sites=found.sites[:2], records=found.records[found.records["layer"] != "fc"], totals=())
    _, elements = page(tmp_path, fewer, found, names=("old", "new"))
    assert "Only new has fc." in elements.text
    assert "The two took different faults." in elements.text


@pytest.mark.usefixtures("undrawn")
def test_a_model_beside_itself_is_not_told_apart(found, tmp_path):
    html, elements = page(tmp_path, found, found)
    assert "This model is not to be told from the other model by SDC" in elements.text
    assert "Their weights are the same." in elements.text
    ratios = re.findall(r"<td>([\d.]+)[^<]*<br>not separable</td>", html)
    assert len(ratios) >= 6
    assert np.allclose([float(ratio) for ratio in ratios], 1)
    with pytest.raises(InvalidParameter, match=r"argument names are both 'a'"):
        write_page(found, tmp_path / "page.html", found, names=("a", "a"))


@pytest.mark.usefixtures("undrawn")
def test_without_any_corruption_there_is_a_page(found, tmp_path):
    records = found.records.assign(mismatch=False, faulty_loss=found.records["golden_loss"])
    none = replace(found, records=records, totals=())
    none = replace(none, sites=none.sites[:2])
    _, elements = page(tmp_path, none, found)
    assert "No fault changes the prediction of this model" in elements.text
    assert "No injection corrupted the output" in elements.text
    assert "not to be compared with the other model by SDC, because one of the two had none" in elements.text


def test_the_layer_that_matters_most_is_shown_by_its_channels(found, worse):
    (own, other), sdc = _sides(found, worse), {layer: result.sdc.value for layer, result in found.layers.items()}
    share = {layer: found.exposed_bits(layer) * sdc[layer] for layer in sdc}
    chosen, _ = _mapped([own, other], None)
    assert chosen.layer == max(share, key=share.get)
    assert chosen.layer != max(sdc, key=sdc.get), "the last layer has few values to be hit"
    assert list(chosen.tables) == ["own", "other"]
    assert "share of all SDC" in chosen.remarks[0]
    first = found.sites[0].layer
    lacks = replace(found, sites=found.sites[1:], records=found.records[found.records["layer"] != first])
    few = replace(found, records=found.records[found.records["index"] < 3])
    for without, said in ((lacks, "other has no such layer"), (few, "of other, the layer's channels are not known")):
        asked, _ = _mapped(_sides(found, without), first)
        assert (asked.layer, list(asked.tables), asked.remarks) == (first, ["own"], [said])


@pytest.mark.usefixtures("undrawn")
def test_a_layer_without_known_channels_is_refused_or_said(model, loader, found, tmp_path, monkeypatch, capsys):
    with pytest.raises(UnknownName, match=r"layer 'conv9' in argument layer; known: <script>"):
        found.to_html(tmp_path / "page.html", layer="conv9")
    with pytest.raises(InvalidParameter, match=r"argument layer: all faults of 'fc' were tried"):
        assess(model, loader, injections_per_layer=8, enumerate_up_to=10**5).to_html(tmp_path / "page.html", layer="fc")
    few = assess(model, loader, injections_per_layer=3)
    with pytest.raises(InvalidParameter, match=r"layer is 'fc'; fewer than two of its channels have 8 injections"):
        few.to_html(tmp_path / "page.html", layer="fc")
    weights = assess(model, loader, injections_per_layer=64, fault_model=FaultModel(target="weight"))
    with pytest.raises(InvalidParameter, match=r"layer is 'fc'; only faults in one neuron have a channel"):
        weights.to_html(tmp_path / "page.html", layer="fc")
    for without, said in ((few, "has 8 injections in half of its channels"), (weights, "faults that hit one neuron each")):
        _, elements = page(tmp_path, without)
        assert (
            f"No layer is shown by its channels: {'none that has SDC ' if without is few else 'that takes sampled '}{said}"
            in (elements.text)
        )
    monkeypatch.chdir(tmp_path)
    found.save("saved")
    capsys.readouterr()
    assert run(["report", "saved", "--layer", "conv9"]) == 2
    assert capsys.readouterr().err.startswith("UnknownName: layer 'conv9' in option --layer; known: ")
    assert run(["report", "saved", "--layer", found.sites[1].layer]) == 0


@pytest.mark.usefixtures("undrawn")
def test_too_few_injections_for_advice_do_not_spoil_the_page(model, loader, tmp_path):
    few = assess(model, loader, injections_per_layer=3)
    few.to_html(tmp_path / "page.html")
    assert "has 3 injections, and half of them" in Elements((tmp_path / "page.html").read_text(encoding="utf-8")).text


def test_the_call_on_the_page_finds_the_same_again(model, loader, found):
    names = {"model": model, "loader": loader}
    exec(_call(found), names)
    assert names["found"].records.equals(found.records)
    assert "seed=3" in _call(found)
    assert "confidence" not in _call(found)


@pytest.mark.usefixtures("undrawn")
def test_the_command_reports_and_advises(found, worse, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found.save("old")
    replace(worse, skipped=()).save("new")
    assert run(["report", "new", "old", "--file", "page.html"]) == 0
    assert "New is worse than old" in Path("page.html").read_text(encoding="utf-8")
    assert run(["advise", "new", "--cut", "50%", "--maps", "3"]) == 0
    said = capsys.readouterr().out
    assert "For 50.0 % less SDC, duplicate" in said
    assert len(re.findall(r"^ *\S.* 0\.\d+ ", said.partition("channel")[2], re.MULTILINE)) == 3
    assert run(["advise", "new", "--target-fit", "1"]) == 2
    assert "fit_per_megabit" in capsys.readouterr().err


def test_the_page_fits_a_phone_and_reads_well_in_the_dark(found, worse, tmp_path, browser):
    page(tmp_path, found, worse)
    for width in (390, 1280):
        show(browser, width, tmp_path / "page.html")
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.execute_script("return document.scripts.length") == 1
    assert browser.get_log("browser") == []
    browser.find_element("id", "theme").click()
    axe = pytest.importorskip("axe_core_python.selenium")
    violations = axe.Axe().run(browser)["violations"]
    assert [(v["id"], v["nodes"][0]["html"][:200]) for v in violations if v["impact"] in ("serious", "critical")] == []
