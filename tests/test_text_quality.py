"""Numbers and figures that say how good class embeddings are."""

import itertools
import json
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from textguard.report.text_figures import draw_projection, draw_similarity
from textguard.text.answers import Description
from textguard.text.quality import measure_quality, principal_components, unit_means

CLASSES = ["ship", "truck", "horse"]


def said(class_name: str, text: str = "some four words here", flags: tuple[str, ...] = ()) -> Description:
    return Description(class_name, "", "", 0, text, "a test", None, None, text, list(flags))


def test_the_numbers_are_those_of_a_small_example():
    matrix = np.array([[1.0, 0.0], [0.0, 2.0], [0.6, 0.8]])
    descriptions = [
        said("ship"),
        said("ship", "two words", ("too_short",)),
        said("truck"),
        said("truck", flags=("duplicate",)),
        said("horse"),
    ]
    vectors = np.array([[3.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.6, 0.8]])
    quality = measure_quality(CLASSES, matrix, descriptions, np.array([0, 1, 2, 4]), vectors)
    np.testing.assert_allclose(quality.similarity, [[1, 0, 0.6], [0, 1, 0.8], [0.6, 0.8, 1]])
    table = quality.per_class.set_index("class")
    assert list(table["nearest_wrong"]) == ["horse", "horse", "truck"]
    np.testing.assert_allclose(table["cosine"], [0.6, 0.8, 0.8])
    np.testing.assert_allclose(table["spread"], [1 - 0.5**0.5, 0, 0], atol=1e-12)
    assert list(table["answers"]) == [2, 2, 1]
    assert list(table["embedded"]) == [2, 1, 1]
    assert list(table["words"]) == [3, 4, 4]
    assert list(table["strays"]) == [2, 0, 0]
    assert list(table["duplicate"]) == [0, 1, 0]
    summary = quality.summary
    assert summary["mean_pairwise_cosine"] == pytest.approx(1.4 / 3)
    assert (summary["closest_classes"], summary["largest_cosine"]) == (["truck", "horse"], pytest.approx(0.8))
    assert (summary["answers"], summary["embedded"], summary["too_short"], summary["off_class"]) == (5, 4, 1, 0)
    json.dumps(summary, allow_nan=False)


def test_a_text_that_speaks_of_another_class_is_found():
    rng = np.random.default_rng(0)
    centres = np.eye(3, 8)
    descriptions, vectors = [], []
    for index, name in enumerate(CLASSES):
        descriptions += [said(name)] * 5 + [said(name, flags=("unnamed",))]
        vectors += [centres[index] + 0.1 * rng.standard_normal(8) for _ in range(6)]
    vectors[5] = centres[1]  # says nothing of ships
    vectors[0] = centres[2]  # names ships, and speaks of horses
    quality = measure_quality(CLASSES, centres, descriptions, np.arange(18), np.array(vectors))
    assert list(quality.per_class["strays"]) == [2, 0, 0]
    assert list(quality.per_class["off_class"]) == [1, 0, 0]


def test_the_projection_keeps_what_varies_most():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((30, 6)) * [0.1, 5, 0.1, 3, 0.1, 0.1] + [4, 0, 0, 0, 0, 0]
    owners = np.arange(30) % 3
    class_means = np.stack([vectors[owners == index].mean(axis=0) for index in range(3)])
    points, means, shown = principal_components(vectors, class_means)
    assert points.shape == (30, 2)
    assert shown > 0.99
    centred = vectors - vectors.mean(axis=0)
    assert abs(np.corrcoef(points[:, 0], centred[:, 1])[0, 1]) > 0.99
    assert abs(np.corrcoef(points[:, 1], centred[:, 3])[0, 1]) > 0.99
    np.testing.assert_allclose(means[1], points[owners == 1].mean(axis=0), atol=1e-12)
    flipped = principal_components(-vectors, -class_means)[0]
    np.testing.assert_allclose(flipped, -points, atol=1e-9)


def test_texts_that_are_all_alike_can_be_projected():
    unit, means = unit_means(np.ones((3, 4)), np.array([0, 1, 2]), 3)
    points, _, shown = principal_components(unit, means)
    assert np.isfinite(points).all()
    assert shown == 1.0


@pytest.mark.parametrize("count", [2, 3, 41, 200])
def test_figures_hold_any_number_of_classes_and_their_numbers(tmp_path, count):
    names = [f"class {number}" for number in range(count)]
    vectors = np.random.default_rng(0).standard_normal((count, 8))
    unit, means = unit_means(vectors, np.arange(count), count)
    draw_similarity(unit @ unit.T, names, "title", tmp_path / "similarity", 60)
    points, centres, shown = principal_components(unit, means)
    draw_projection(points, np.arange(count), centres, names, shown, "title", tmp_path / "projection", 60)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(written) == 8
    assert pd.read_csv(tmp_path / "similarity.csv").shape == (count, count)
    assert len(pd.read_csv(tmp_path / "projection.csv")) == 2 * count
    draw_similarity(unit @ unit.T, names, "title", tmp_path / "similarity", 60)
    draw_projection(points, np.arange(count), centres, names, shown, "title", tmp_path / "projection", 60)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written


@pytest.mark.parametrize(("count", "spread", "named"), [(10, 1.0, 10), (10, 0.1, 10), (1000, 1.0, 20)])
def test_names_in_a_projection_hide_neither_each_other_nor_class_means(tmp_path, monkeypatch, count, spread, named):
    figures = []
    monkeypatch.setattr("textguard.report.text_figures.save_figure", lambda figure, *_: figures.append(figure))
    draw = np.random.default_rng(0)
    means = draw.standard_normal((count, 2)) * spread
    texts = draw.standard_normal((count, 2))
    names = [f"class {number}" for number in range(count)]
    draw_projection(texts, np.arange(count), means, names, 0.5, "title", tmp_path / "projection", 60)
    (figure,) = figures
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines
    assert named <= len(boxes) <= 40
    assert {text.get_text() for text in axes.texts} <= set(names)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    centres = axes.transData.transform(means)
    assert not any(box.contains(*centre) for box in boxes for centre in centres)
    assert all(axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max) for box in boxes)
    assert (f"{len(boxes)} classes are named" in figure.get_supxlabel()) == (len(boxes) < count)


def test_class_names_are_drawn_and_not_obeyed(tmp_path):
    names = ["<script>alert(1)</script>", "$\\frac{1}{0}$", "a & b"]
    unit, means = unit_means(np.eye(3), np.arange(3), 3)
    draw_similarity(np.eye(3), names, "$x^2$", tmp_path / "similarity", 60)
    draw_projection(unit[:, :2], np.arange(3), means[:, :2], names, 1.0, "$x^2$", tmp_path / "projection", 60)
    for name in ("similarity", "projection"):
        svg = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert "<script" not in svg
        assert all("--" not in comment for comment in re.findall(r"<!--(.*?)-->", svg, re.DOTALL))
