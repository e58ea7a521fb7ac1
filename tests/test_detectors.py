"""The range detector at the damaged value, and the bounds that mitigations put on activations."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from textguard.errors import InvalidParameter, UnknownName
from textguard.faults.detectors import Bound, clamp_to_range, detector_limits

INFINITY = float("inf")
NAN = float("nan")


def stored(values: torch.Tensor) -> list[bytes]:
    return [number.tobytes() for number in values.numpy()]


def test_detector_replaces_what_lies_outside_the_range():
    values = torch.tensor([1.0, -1.0, 2.0, -2.0, 2.0001, -3.0, INFINITY, -INFINITY, NAN, -NAN])
    clamped, detected = clamp_to_range(values, torch.full((10,), 2.0))
    assert clamped.tolist() == [1.0, -1.0, 2.0, -2.0, 2.0, -2.0, 2.0, -2.0, 2.0, 2.0]
    assert detected.tolist() == [False, False, False, False, True, True, True, True, True, True]


def test_each_value_has_the_limit_of_its_own_layer():
    clamped, detected = clamp_to_range(torch.tensor([5.0, 5.0, -5.0, NAN]), torch.tensor([10.0, 4.0, 3.0, INFINITY]))
    assert clamped[:3].tolist() == [5.0, 4.0, -3.0]
    assert clamped[3].isnan()
    assert detected.tolist() == [False, True, True, False]


def test_detector_off_lets_everything_pass():
    values = torch.tensor([1.0, -0.0, INFINITY, -INFINITY, NAN])
    clamped, detected = clamp_to_range(values, torch.tensor(INFINITY))
    assert stored(clamped) == stored(values)
    assert not detected.any()


@given(st.lists(st.floats(width=32), min_size=1), st.floats(min_value=0, max_value=2.0**127, width=32))
def test_detector_does_as_the_definition_says(numbers, limit):
    clamped, detected = clamp_to_range(torch.from_numpy(np.array(numbers, dtype=np.float32)), torch.tensor(limit))
    for number, new, found in zip(numbers, clamped.tolist(), detected.tolist(), strict=True):
        assert found == (not abs(number) <= limit)
        wanted = number if not found else (-limit if number < 0 else limit)
        assert struct.pack("<f", new) == struct.pack("<f", wanted)


def test_limits_of_each_detector():
    profiled = {"a": 1.5, "b": 2.5}
    assert detector_limits("profiled", ["a", "b"], profiled) == profiled
    assert detector_limits("profiled", ["b"], profiled) == {"b": 2.5}
    assert detector_limits("fixed:65536", ["a", "b"], profiled) == {"a": 65536.0, "b": 65536.0}
    assert detector_limits("off", ["a"], {}) == {"a": INFINITY}


def test_bad_detectors():
    with pytest.raises(UnknownName, match="profiled"):
        detector_limits("ranger", ["a"], {})
    for bad in ("fixed:", "fixed:0", "fixed:-1", "fixed:nan", "fixed:x", "fixed:inf", "fixed:1e39"):
        with pytest.raises(InvalidParameter, match="above 0"):
            detector_limits(bad, ["a"], {})
    with pytest.raises(InvalidParameter, match="'b' has no profiled range"):
        detector_limits("profiled", ["a", "b"], {"a": 1.0})


WILD = (-INFINITY, -1.5, -1.0, -0.0, 0.5, 2.0, 2.0000002, 3e38, INFINITY, NAN)


def test_a_bound_puts_the_nearer_end_in_the_place_of_values_outside():
    bounded = Bound(-1.0, 2.0, to_zero=False)(torch.tensor([WILD]))
    assert bounded.tolist() == [[-1.0, -1.0, -1.0, -0.0, 0.5, 2.0, 2.0, 2.0, 2.0, -1.0]]


def test_a_bound_puts_zero_in_the_place_of_values_outside():
    bounded = Bound(-1.0, 2.0, to_zero=True)(torch.tensor([WILD]))
    assert bounded.tolist() == [[0.0, 0.0, -1.0, -0.0, 0.5, 2.0, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("to_zero", [False, True])
@given(numbers=st.lists(st.floats(width=32), min_size=1), ends=st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 2))
def test_what_lies_within_a_bound_passes_bit_for_bit_and_nothing_else_does(to_zero, numbers, ends):
    low, high = min(ends), max(ends)
    values = torch.from_numpy(np.array(numbers, dtype=np.float32))
    bounded = Bound(low, high, to_zero)(values)
    inside = (values >= low) & (values <= high)
    assert stored(bounded[inside]) == stored(values[inside])
    allowed = (bounded >= low) & (bounded <= high) if not to_zero else bounded == 0
    assert allowed[~inside].all()
