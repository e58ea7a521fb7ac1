"""Single bits of FP32, and the range detector."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from textguard.errors import BitOutOfRange, InvalidParameter, UnknownName
from textguard.faults.bits import clamp_to_range, detector_limits, flip_bit

INFINITY = float("inf")
NAN = float("nan")


def flip_by_hand(value: float, bit: int) -> bytes:
    (word,) = struct.unpack("<I", struct.pack("<f", value))
    return struct.pack("<I", word ^ (1 << bit))


def stored(values: torch.Tensor) -> list[bytes]:
    return [number.tobytes() for number in values.numpy()]


@given(st.lists(st.tuples(st.floats(width=32), st.integers(0, 31)), min_size=1))
def test_flip_matches_the_bytes_in_memory(pairs):
    values = torch.from_numpy(np.array([value for value, _ in pairs], dtype=np.float32))
    bits = torch.tensor([bit for _, bit in pairs])
    assert stored(flip_bit(values, bits)) == [flip_by_hand(float(value), bit) for value, bit in pairs]


def test_every_bit_flips_back():
    values = torch.tensor([0.0, -0.0, 1.0, -3.5, 1e-40, 3e38]).repeat_interleave(32)
    bits = torch.arange(32).repeat(6)
    flipped = flip_bit(values, bits)
    assert stored(flip_bit(flipped, bits)) == stored(values)
    assert all(before != after for before, after in zip(stored(values), stored(flipped), strict=True))


def test_known_flips():
    values = torch.tensor([1.0, 1.0, 1.0, 2.0])
    flipped = flip_bit(values, torch.tensor([31, 30, 22, 23]))
    assert flipped.tolist() == [-1.0, INFINITY, 1.5, 4.0]


@pytest.mark.parametrize("bit", [-1, 32])
def test_a_bit_outside_the_format_is_refused(bit):
    with pytest.raises(BitOutOfRange, match="0 to 31"):
        flip_bit(torch.ones(1), torch.tensor([bit]))


def test_other_types_are_refused():
    with pytest.raises(BitOutOfRange, match="float16"):
        flip_bit(torch.ones(1, dtype=torch.float16), torch.tensor([0]))


def test_detector_replaces_what_lies_outside_the_range():
    values = torch.tensor([1.0, -1.0, 2.0, 2.0001, -3.0, INFINITY, -INFINITY, NAN])
    clamped, detected = clamp_to_range(values, torch.full((8,), 2.0))
    assert clamped.tolist() == [1.0, -1.0, 2.0, 2.0, -2.0, 2.0, -2.0, 2.0]
    assert detected.tolist() == [False, False, False, True, True, True, True, True]


def test_detector_off_lets_everything_pass():
    values = torch.tensor([1.0, INFINITY, NAN])
    clamped, detected = clamp_to_range(values, torch.full((3,), INFINITY))
    assert stored(clamped) == stored(values)
    assert not detected.any()


def test_limits_of_each_detector():
    profiled = {"a": 1.5, "b": 2.5}
    assert detector_limits("profiled", ["a", "b"], profiled) == profiled
    assert detector_limits("fixed:65536", ["a", "b"], profiled) == {"a": 65536.0, "b": 65536.0}
    assert detector_limits("off", ["a"], {}) == {"a": INFINITY}


def test_bad_detectors():
    with pytest.raises(UnknownName, match="profiled"):
        detector_limits("ranger", ["a"], {})
    for bad in ("fixed:", "fixed:-1", "fixed:nan", "fixed:x", "fixed:inf"):
        with pytest.raises(InvalidParameter, match="above 0"):
            detector_limits(bad, ["a"], {})
    with pytest.raises(InvalidParameter, match="'b' has no profiled range"):
        detector_limits("profiled", ["a", "b"], {"a": 1.0})
