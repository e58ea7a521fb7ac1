"""Figures: their numbers and bytes, what they say and how variants look in them."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axis import Tick
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from textguard.analysis.files import load_cells, load_results
from textguard.report.figures import DRAWN_BY_DVC, PER_BACKBONE, group, write_figures
from textguard.report.run_figures import crossings
from textguard.report.theme import OTHER_MARKERS, PLACE_MARKERS, PUBLISHED_MARKER, VARIANT_MARKERS, place_name, styles
from textguard.report.variants import Variant, trainings


def test_figures_come_with_their_numbers_and_the_same_bytes_each_time(runs, params, tmp_path):
    results = list(load_results(runs).values())
    for folder in ("a", "b"):
        write_figures(results, load_cells(runs), params, tmp_path / folder)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 4 * (2 * (len(PER_BACKBONE) + 1) + 2) + len(DRAWN_BY_DVC) + 1
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    numbers = pd.read_csv(tmp_path / "a" / "delta_loss-d-resnet18.csv")
    assert numbers.groupby("variant").size().to_dict() == {"baseline": 2, "template": 3, "descriptions": 3}
    together = pd.read_csv(tmp_path / "a" / "delta_loss.csv")
    assert together.groupby(["dataset", "backbone"]).size().to_dict() == {("d", "resnet18"): 8, ("e", "alexnet"): 2}
    assert (tmp_path / "a" / "value_ranges-d-resnet18.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("counts", "said"), [([1, 1], "1 training"), ([3, 3], "3 trainings"), ([3, 1], "1 to 3 trainings")], ids=str
)
def test_captions_say_how_many_trainings(counts, said):
    assert trainings([Variant("v", styles(["v"], {})["v"], [None] * count) for count in counts]) == said


def test_no_text_leaves_its_figure(runs, params, tmp_path, monkeypatch):
    results = list(load_results(runs).values())
    trained_twice = results + [result.model_copy(update={"seed": 1}) for result in results]
    drawn = []

    def look(figure, numbers, stem, dpi):
        FigureCanvasAgg(figure).draw()
        unseen = [label for tick in figure.findobj(Tick) for label in (tick.label1, tick.label2)]  # those beyond the limits
        texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text not in unseen]
        room = figure.bbox.padded(1)
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
        outside = [text for text, box in boxes if not (room.contains(*box.min) and room.contains(*box.max))]
        assert outside == [], stem.name
        drawn.append(stem.name)

    monkeypatch.setattr("textguard.report.figures.save_figure", look)
    write_figures(trained_twice, load_cells(runs), params, tmp_path)
    assert len(drawn) == 2 * (len(PER_BACKBONE) + 1) + 2


def test_the_crossing_is_the_last_one_up_or_down():
    at = np.array([0.0, 1.0, 2.0, 3.0])
    baseline = np.array([10.0, 8.0, 6.0, 4.0])
    assert crossings(at, baseline, np.array([9.0, 9.0, 5.0, 5.0])) == [(2.5, 5.0)]
    assert crossings(at, baseline, np.array([12.0, 9.0, 4.0, 2.0])) == [(1 + 1 / 3, pytest.approx(22 / 3))]
    assert crossings(at, baseline, np.array([11.0, 8.0, 6.0, 3.0])) == [(1.0, 8.0)]  # level in between
    for never in (baseline, baseline + 1, baseline - 1, np.array([9.0, 8.0, 6.0, 4.0]), np.array([9.0, 8.0, 5.0, 4.0])):
        assert crossings(at, baseline, never) == []


def test_a_variant_looks_the_same_whatever_stands_beside_it(runs, params):
    results = list(load_results(runs).values())
    alone = group([result for result in results if result.variant == "descriptions"], params)
    together = group(results, params)
    (style,) = (variant.style for variant in together["d", "resnet18"] if variant.key == "descriptions")
    assert [variant.style for variant in alone["d", "resnet18"]] == [style]
    assert (style.colour, style.marker, style.name) == ("#0072b2", "^", "descriptions")


def test_no_marker_stands_for_two_things():
    markers = [*VARIANT_MARKERS.values(), *OTHER_MARKERS, *PLACE_MARKERS, PUBLISHED_MARKER]
    assert len(markers) == len(set(markers))
    added = styles(["shuffled", "baseline", "one_hot"], {"one_hot": "#333333"})
    assert [(style.marker, style.colour) for style in added.values()] == [("P", "#009e73"), ("o", "#d55e00"), ("p", "#333333")]


def test_variants_and_places_are_called_as_they_are_spoken():
    assert place_name("fashion_mnist", "resnet18") == "ResNet-18 on Fashion-MNIST"
    assert place_name("birds", "timm:resnet10t") == "timm:resnet10t on birds"
    assert styles(["random"], {})["random"].name == "random start"
