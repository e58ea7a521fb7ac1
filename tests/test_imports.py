"""CONTRIBUTING.md shows the imports as they are, and they run one way."""

from graphlib import CycleError

import pytest

from import_graph import PAGE, drawing, drawn, transitively_reduced


def test_the_drawing_shows_the_imports_as_they_are():
    assert drawn(PAGE.read_text(encoding="utf-8")) == drawing(), "run 'python tests/import_graph.py'"


def test_ways_that_longer_ones_make_plain_are_not_drawn():
    assert transitively_reduced({("a", "b"), ("b", "c"), ("a", "c")}) == {("a", "b"), ("b", "c")}


def test_a_circle_is_refused():
    with pytest.raises(CycleError):
        transitively_reduced({("a", "b"), ("b", "c"), ("c", "a")})
