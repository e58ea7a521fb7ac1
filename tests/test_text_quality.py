"""Numbers and figures that say how good class embeddings are."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from textguard.report.text_figures import draw_similarity
from textguard.text.answers import Description
from textguard.text.quality import cosines, measure_quality

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


@pytest.mark.parametrize("count", [2, 3, 41, 200])
def test_the_figure_holds_any_number_of_classes_and_their_numbers(tmp_path, count):
    names = [f"class {number}" for number in range(count)]
    vectors = np.random.default_rng(0).standard_normal((count, 8))
    draw_similarity(cosines(vectors), names, "title", tmp_path / "similarity", 60)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(written) == 4
    assert pd.read_csv(tmp_path / "similarity.csv").shape == (count, count)
    draw_similarity(cosines(vectors), names, "title", tmp_path / "similarity", 60)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written


def test_the_title_names_the_classes_that_are_most_alike(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("textguard.report.text_figures.save_figure", lambda figure, *_: drawn.append(figure))
    draw_similarity(np.array([[1, 0.2, 0.9], [0.2, 1, 0.1], [0.9, 0.1, 1]]), CLASSES, "words", tmp_path / "similarity", 60)
    said = "words: classes have a cosine of 0.40 on average, and 0.90 at most: ship and horse"
    assert [figure.get_label() for figure in drawn] == [said]


def test_class_names_are_drawn_and_not_obeyed(tmp_path):
    names = ["<script>alert(1)</script>", "$\\frac{1}{0}$", "a & b"]
    draw_similarity(np.eye(3), names, "$x^2$", tmp_path / "similarity", 60)
    svg = (tmp_path / "similarity.svg").read_text(encoding="utf-8")
    assert "<script" not in svg
    assert all("--" not in comment for comment in re.findall(r"<!--(.*?)-->", svg, re.DOTALL))
