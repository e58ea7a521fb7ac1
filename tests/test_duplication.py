"""The share of SDC in layers that are computed twice, and what that costs."""

from types import SimpleNamespace

import numpy as np
import pytest

from textguard.analysis.duplication import duplicated


def run(name, sdcs, neurons=(10, 10, 10), multiply_adds=(10, 20, 70)):
    layers = [
        SimpleNamespace(layer=layer, sdc=SimpleNamespace(value=sdc), neurons=values, multiply_adds=cost)
        for layer, sdc, values, cost in zip("abc", sdcs, neurons, multiply_adds, strict=True)
    ]
    return SimpleNamespace(run=name, layers=layers)


def test_layers_come_in_the_order_of_harm_per_multiply_add():
    (found,) = duplicated([run("r", [0.1, 0.2, 0.7])])  # harm 1, 2, 7 for 10, 20, 70: all alike, so as they come
    assert found.layers == ["a", "b", "c"]
    np.testing.assert_allclose(found.cost, [0, 0.1, 0.3, 1])
    np.testing.assert_allclose(found.covered, [0, 0.1, 0.3, 1])
    (found,) = duplicated([run("r", [0.1, 0.1, 0.1], neurons=(10, 80, 10))])
    assert found.layers == ["b", "a", "c"]
    np.testing.assert_allclose(found.covered, [0, 0.8, 0.9, 1])
    assert found.cost_of(0.5) == pytest.approx(0.2)
    assert found.cost_of(0.9) == pytest.approx(0.3)
    np.testing.assert_allclose(found.at(np.array([0.0, 0.1, 0.2, 0.29, 1.0])), [0, 0, 0.8, 0.8, 1])


def test_no_training_chooses_the_order_that_it_is_measured_by():
    first, second = duplicated([run("r", [1.0, 0.0, 0.0]), run("s", [0.0, 0.0, 1.0])])
    assert first.layers[0] == "c"  # which is worst in the other one
    assert second.layers[0] == "a"
    assert first.cost_of(0.5) == pytest.approx(0.8)
    assert second.cost_of(0.5) == 1


def test_trainings_without_sdc_or_with_unknown_costs_are_left_out():
    assert duplicated([run("r", [0.0, 0.0, 0.0])]) == []
    assert duplicated([run("r", [0.1, 0.1, 0.1], multiply_adds=(1, None, 1))]) == []
    found = duplicated([run("r", [0.0, 0.0, 0.0]), run("s", [0.1, 0.0, 0.0])])
    assert [one.run for one in found] == ["s"]
    assert duplicated([run("r", [0.1, float("nan"), 0.1])]) == []


def test_layers_without_multiply_adds_cost_nothing():
    (found,) = duplicated([run("r", [0.2, 0.1, 0.1], multiply_adds=(0, 50, 50))])
    assert found.layers[0] == "a"
    assert found.cost_of(0.5) == 0
