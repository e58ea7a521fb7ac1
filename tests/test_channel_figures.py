"""The map of a layer's channels: what is outlined is no chance, and the title names it."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PatchCollection
from matplotlib.text import Text

from textguard.estimates import chance
from textguard.estimates.chance import chance_limits
from textguard.estimates.channels import summarise_channels
from textguard.report.channel_figures import COLOURS, Channels, draw_channels
from textguard.report.drawing import SMALL, draw

COUNT, PLACES = 40, 25  # channels, neurons of each
GREY = (201 / 255,) * 3 + (1,)


def campaign(bad: dict[int, float], injections: int = 4000, seed: int = 0, rate: float = 0.02) -> pd.DataFrame:
    """Uniform injections of which a channel's share is corrupted; channel 39 gets three of them."""
    draw = np.random.default_rng(seed)
    channel = np.append(draw.integers(COUNT - 1, size=injections - 3), [COUNT - 1] * 3)
    hit = draw.random(injections) < np.array([bad.get(number, rate) for number in range(COUNT)])[channel]
    loss = np.where(hit, draw.exponential(2.0, injections), draw.exponential(1e-3, injections))
    return pd.DataFrame(
        {"layer": "conv", "index": range(injections), "neuron": channel * PLACES, "weight": 1.0, "golden_loss": 0.5}
        | {"faulty_loss": 0.5 + loss, "mismatch": hit}
    )


def layer_of(name: str, records: pd.DataFrame, confidence: float = 0.99) -> Channels:
    table = summarise_channels(records, {"conv": (COUNT, 5, 5)}, confidence).drop(columns="layer")
    loss = (records["faulty_loss"] - records["golden_loss"]).mean()
    means = {"sdc": records["mismatch"].mean(), "delta_loss": loss}
    return Channels(name, table, means, chance_limits(records, COUNT, confidence), confidence)


def outlined(figure, panel: int) -> list[tuple[int, int]]:
    _, outlines = (found for found in figure.axes[panel].collections if isinstance(found, PatchCollection))
    return [tuple(np.rint(path.vertices.min(axis=0) + 0.5).astype(int)) for path in outlines.get_paths()]


def test_two_bad_channels_are_named_and_outlined_and_unhit_ones_grey():
    model = layer_of("mine", campaign({5: 0.3, 21: 0.5}))
    figure, numbers = draw_channels("conv_$2$", [model], ["chosen so"])
    title = (
        "conv_$2$: 2 of 39 channels hit often enough have more SDC than the layer's mean beyond chance (21 and 5), none less"
    )
    assert figure.get_label() == title
    assert outlined(figure, 0) == [(5, 1), (5, 0)], "21 is 5 + 16"
    assert outlined(figure, 1) == [(5, 1), (5, 0)]
    squares = figure.axes[0].collections[0].get_facecolor()
    assert len(squares) == COUNT
    assert [number for number, colour in enumerate(squares) if np.allclose(colour, GREY)] == [39]
    assert np.allclose(squares[21], COLOURS(1.0))
    note = figure._supxlabel.get_text().replace("\n", " ")
    assert "4,000 injections; grey: fewer than 8 of them, in 1 of 40 channels" in note
    assert "would outline a channel in 1 % of such panels" in note
    assert "chosen so" in note
    assert len(numbers) == COUNT
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= SMALL
    assert draw(figure, "png", 50) == draw(draw_channels("conv_$2$", [model], ["chosen so"])[0], "png", 50)


def test_two_models_share_a_scale_and_have_a_row_each():
    models = [layer_of("new", campaign({})), layer_of("old", campaign(dict.fromkeys(range(8), 0.3), seed=1))]
    figure, numbers = draw_channels("conv", models)
    assert "; old: 8 of 39 channels" in figure.get_label()
    assert "and 3 others), none less" in figure.get_label()
    assert figure.get_label().startswith("conv: new: none of 39 channels hit often enough has more or less SDC")
    assert numbers.groupby("model", sort=False).size().to_dict() == {"new": COUNT, "old": COUNT}
    new, old = (figure.axes[panel].collections[0].get_facecolor()[:39, :3].mean() for panel in (0, 2))
    assert new < old, "one scale for both, on which darker is less"


def test_channels_with_less_are_said_alone():
    records = campaign(dict.fromkeys((3, 4), 0.0), rate=0.6)
    assert "2 of 39 channels hit often enough have less SDC" in (found := layer_of("mine", records).finding)
    assert found.endswith("beyond chance (3 and 4), none more")


@pytest.mark.parametrize("count", [1, 8, 100, 2048])
def test_any_number_of_channels_has_a_square_each(count):
    table = pd.DataFrame({"channel": range(count), "injections": 9, "delta_loss": 0.0, "sdc": 0.0})
    model = Channels("mine", table, {"sdc": 0.0, "delta_loss": 0.0}, {"sdc": (0, 0), "delta_loss": (0, 0)}, 0.99)
    figure, _ = draw_channels("fc", [model])
    axes = figure.axes[0]
    assert len(axes.collections[0].get_facecolor()) == count
    assert int(axes.get_yticklabels()[-1].get_text()) < count
    width, height = figure.get_size_inches()
    assert height < width


def test_chance_outlines_a_channel_as_rarely_as_is_said(monkeypatch):
    """Of rare corruptions, where a channel's interval leaves the mean out as soon as one of its injections is corrupted."""
    monkeypatch.setattr(chance, "RANDOM_MAPS", 200)
    alike, intervals, confidence = [], 0, 0.9
    for seed in range(30):
        model = layer_of("alike", campaign({}, injections=1500, seed=seed, rate=0.002), confidence)
        alike.append([len(model.more(measure)) + len(model.less(measure)) > 0 for measure in ("sdc", "delta_loss")])
        intervals += (model.table["sdc_low"] > model.means["sdc"]).any()
    assert (np.sum(alike, axis=0) <= 8).all(), "3 of 30 are expected"
    assert intervals > 20
