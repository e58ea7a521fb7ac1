"""Forest plots: what is filled, printed and cut, and what is said of it."""

import math

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.markers import CARETLEFT, CARETRIGHT

from textguard.estimates.statistics import Estimate
from textguard.report.drawing import STYLE, draw
from textguard.report.forest import Row, difference_limits, draw_rows, in_words, lines, name_rows, ratio_limits, tally
from textguard.schema.results import NO_VERDICT, ONE_TRAINING

UNTOLD = "not separable at 99%"


def row(value, low, high, verdict=UNTOLD, group="a network", **more):
    return Row(group, f"{value}", Estimate(value, low, high, 3), verdict, "#0072b2", "^", "d n v", 3, **more)


def drawn(rows, limits=(0.1, 1000.0)):
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    draw_rows(axes, rows, limits, "times less")
    name_rows(axes, rows)
    FigureCanvasAgg(figure).draw()
    return figure, axes


def marks(axes, marker):
    return [line for line in axes.lines if line.get_marker() == marker]


def test_a_mark_is_filled_and_its_numbers_are_bold_where_the_verdict_tells_something():
    rows = [row(2, 1.5, 3, "better"), row(1.2, 0.5, 3), row(0.5, 0.3, 0.8, "worse"), row(3, 2, 4, ONE_TRAINING)]
    _, axes = drawn(rows)
    assert [line.get_markerfacecolor() for line in marks(axes, "^")] == ["#0072b2", "white", "#0072b2", "white"]
    printed = {text.get_text(): text.get_fontweight() for text in axes.texts}
    assert printed == {
        "2.00 [1.50, 3.00]": "bold",
        "1.20 [0.500, 3.00]": "normal",
        "0.500 [0.300, 0.800]": "bold",
        "3.00 [2.00, 4.00]": "normal",
    }


def test_what_goes_on_beyond_the_axis_has_an_arrow_there_and_no_mark_elsewhere():
    _, axes = drawn([row(2, 0.01, 30), row(2, math.nan, math.inf), row(5000, 4000, 6000), row(math.nan, math.nan, math.nan)])
    assert [line.get_ydata()[0] for line in marks(axes, CARETLEFT)] == [1, 2]
    assert [line.get_ydata()[0] for line in marks(axes, CARETRIGHT)] == [2, 3]
    assert [line.get_ydata()[0] for line in marks(axes, "^")] == [1, 2]
    assert [text.get_text() for text in axes.texts][2:] == ["5,000 [4,000, 6,000]", "undefined"]


def test_groups_have_a_line_of_their_own():
    rows = [row(1, 0.5, 2, group=group) for group in ("one", "one", "two")]
    _, axes = drawn(rows)
    assert lines(rows) == 5
    names = [(label.get_text(), place) for label, place in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)]
    assert sorted(names, key=lambda name: name[1]) == [("one", 0), ("1", 1), ("1", 2), ("two", 3), ("1", 4)]
    assert lines([row(1, 0.5, 2, group="")] * 3) == 3


def test_a_page_finds_a_mark_and_what_it_says():
    with matplotlib.rc_context(fname=STYLE):
        figure, _ = drawn([row(2, 1.5, 3, "better"), row(2.87, math.nan, math.nan, NO_VERDICT, published=True)])
        svg = draw(figure, "svg", 60).decode()
    mark = 'data-mark="d n v"><title>a network, 2: 2.00 [1.50, 3.00], 3 trainings; better</title>'
    assert svg.count(mark) == 2  # the interval, and what it is of
    assert "2.87, as published" in svg


@pytest.mark.parametrize(
    ("ends", "limits"), [((0.9, 1.1), (0.5, 2)), ((0.12, 40), (0.1, 50)), ((1e-9, 1e9), (1e-3, 1e3)), ((2, math.inf), (0.5, 2))]
)
def test_an_axis_of_ratios_holds_all_that_it_can(ends, limits):
    assert ratio_limits([row(1, *ends)]) == limits


def test_an_axis_of_differences_is_symmetric_and_no_interval_makes_it_useless():
    assert difference_limits([row(-2, -3, -1)]) == pytest.approx((-3.3, 3.3))
    assert difference_limits([row(-2, -300, 296)]) == pytest.approx((-8.8, 8.8))
    low, high = difference_limits([row(math.nan, math.nan, math.nan)])
    assert low == -high < 0


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (["better", "better", "worse", UNTOLD], "lower in 2 of 4 comparisons and higher in 1"),
        (["worse", UNTOLD], "higher in 1 of 2 comparisons"),
        ([UNTOLD, NO_VERDICT], "told apart in none of 2 comparisons"),
        ([ONE_TRAINING, NO_VERDICT], "without a verdict (1 training)"),
    ],
)
def test_a_tally_never_says_more_than_the_intervals(verdicts, said):
    assert tally(verdicts) == said


def test_one_ratio_in_words():
    assert in_words(Estimate(1.5, 1.2, 1.9, 3), "better") == "is lower (1.50 [1.20, 1.90])"
    assert in_words(Estimate(1.5, 0.2, 1.9, 3), UNTOLD) == "cannot be told apart (1.50 [0.200, 1.90])"
    assert in_words(Estimate(1.5, 1.2, 1.9, 3), ONE_TRAINING).startswith("has no verdict")
    assert in_words(Estimate(np.nan, np.nan, 3.0, 3), UNTOLD) == "cannot be told apart (< 3.00)"
