"""Codes that protect a memory, compared with encoding, flipping and decoding bit by bit."""

from itertools import combinations

import numpy as np
import pytest

from textguard.errors import InvalidParameter, UnknownName
from textguard.faults.formats import NATIVE, parse_format
from textguard.hardware.protection import KNOWN, hsiao, parse_protection


def decode(name: str, matrix: np.ndarray, data: list[int], checks: list[int], width: int) -> tuple[list[int], bool]:
    """The data bits that a decoder reads, and whether it knows them to be wrong: one word, bit by bit, with loops only."""
    if name == "none":
        return data, False
    if name == "triplicated_exponent":
        exponent = [bit for bit in range(width) if matrix[bit].any()]
        read = list(data)
        for number, bit in enumerate(exponent):
            votes = data[bit] + checks[number] + checks[number + len(exponent)]
            read[bit] = int(votes >= 2)
        return read, False
    syndrome = []
    for check in range(matrix.shape[1]):
        total = checks[check]
        for bit in range(width):
            total += data[bit] * int(matrix[bit, check])
        syndrome.append(total % 2)
    if not any(syndrome):
        return data, False
    if name != "parity":
        for bit in range(width):
            if syndrome == [int(one) for one in matrix[bit]]:
                return [*data[:bit], 1 - data[bit], *data[bit + 1 :]], False
        if sum(syndrome) == 1:
            return data, False
    return data, True


def encode(matrix: np.ndarray, data: list[int]) -> list[int]:
    checks = []
    for check in range(matrix.shape[1]):
        total = 0
        for bit, one in enumerate(data):
            total += one * int(matrix[bit, check])
        checks.append(total % 2)
    return checks


def read_word(name: str, code, values: int, word: int, positions: list[int], rng: np.random.Generator) -> tuple:
    """One touched word of a memory with random contents: (masks by value, zeroed values, what became of the word)."""
    held = min(code.per_word, values - word * code.per_word)
    width = held * code.bits
    data = rng.integers(2, size=width).tolist()
    checks = encode(code.matrix[:width], data)
    faulty, bad = list(data), list(checks)
    for position in positions:
        if position < values * code.bits:
            faulty[position - word * code.word_bits] ^= 1
        else:
            bad[position - values * code.bits - word * code.checks] ^= 1
    read, known = decode(name, code.matrix, faulty, bad, width)
    if known:
        return {}, [word * code.per_word + value for value in range(held)], "detected"
    masks = {}
    for bit, (old, new) in enumerate(zip(data, read, strict=True)):
        if old != new:
            value = word * code.per_word + bit // code.bits
            masks[value] = masks.get(value, 0) | 1 << bit % code.bits
    return masks, [], "silent" if masks else "corrected"


def positions_of(code, values: int, word: int) -> list[int]:
    """All stored positions of a word."""
    start, end = word * code.word_bits, min((word + 1) * code.word_bits, values * code.bits)
    behind = values * code.bits + word * code.checks
    return [*range(start, end), *range(behind, behind + code.checks)]


CASES = [("secded(32)", "fp32"), ("secded(64)", "fp16"), ("secded(64)", "int(5)"), ("parity", "int(8)")]
CASES += [("none", "int(4)"), ("triplicated_exponent", "fp8_e4m3"), ("triplicated_exponent", "bf16")]


@pytest.mark.parametrize(("name", "number_format"), CASES)
def test_codes_decode_as_their_slow_twin(name, number_format):
    code, rng = parse_protection(name).code(parse_format(number_format)), np.random.default_rng(0)
    values = 2 * code.per_word + max(1, code.per_word // 2)  # the third word is a short one, where words hold several values
    for word in (1, 2):
        stored = positions_of(code, values, word)
        patterns = [*combinations(stored, 1), *combinations(stored, 2)]
        if len(patterns) > 800:
            patterns = [*combinations(stored, 1), *(patterns[i] for i in rng.choice(len(patterns), 700, replace=False))]
        patterns += [tuple(rng.choice(stored, min(3 + i % 2, len(stored)), replace=False).tolist()) for i in range(150)]
        for pattern in patterns:
            masks, zeroed, became = read_word(name, code, values, word, list(pattern), rng)
            read = code.correct(values, np.array(pattern))
            assert dict(zip(read.value[~read.zeroed].tolist(), read.mask[~read.zeroed].tolist(), strict=True)) == masks
            assert read.value[read.zeroed].tolist() == zeroed
            assert {"corrected": read.corrected, "detected": read.detected, "silent": read.silent} == {
                **dict.fromkeys(("corrected", "detected", "silent"), 0),
                became: 1,
            }


@pytest.mark.parametrize(("name", "number_format"), CASES)
def test_touched_words_do_not_see_each_other(name, number_format):
    code, rng = parse_protection(name).code(parse_format(number_format)), np.random.default_rng(1)
    values = 9 * code.per_word + 1
    total = values * code.bits + code.check_bits(values)
    for count in (0, 1, 7, total // 10, total // 2):
        errors = rng.choice(total, count, replace=False)
        read = code.correct(values, errors)
        masks, zeroed, found = {}, [], []
        for word in range(code.words(values)):
            here = [one for one in positions_of(code, values, word) if one in set(errors.tolist())]
            if here:
                of_word, none_left, became = read_word(name, code, values, word, here, rng)
                masks, zeroed, found = masks | of_word, zeroed + none_left, [*found, became]
        assert dict(zip(read.value[~read.zeroed].tolist(), read.mask[~read.zeroed].tolist(), strict=True)) == masks
        assert read.value[read.zeroed].tolist() == zeroed
        assert (np.diff(read.value) > 0).all()
        assert [read.corrected, read.detected, read.silent] == [found.count(w) for w in ("corrected", "detected", "silent")]


@pytest.mark.parametrize("size", [32, 64])
def test_secded_corrects_every_flip_and_detects_every_pair(size):
    # From the columns alone: all different, of odd weight, and none that a check bit has.
    matrix = hsiao(size)
    assert matrix.shape == (size, {32: 7, 64: 8}[size])
    columns = {tuple(column) for column in matrix.tolist()}
    assert len(columns) == size
    assert all(sum(column) % 2 == 1 and sum(column) > 1 for column in columns)
    assert np.ptp(matrix.sum(axis=0)) <= 1


@pytest.mark.parametrize(("size", "stored"), [(32, 39), (64, 72)])
def test_all_single_flips_are_corrected_and_all_pairs_detected(size, stored):
    code = parse_protection(f"secded({size})").code(parse_format("fp16"))
    assert [code.correct(size // 16, np.array([one])).corrected for one in range(stored)] == [1] * stored
    pairs = [code.correct(size // 16, np.array(two)) for two in combinations(range(stored), 2)]
    assert all(read.detected == 1 and read.zeroed.tolist() == [True] * (size // 16) for read in pairs)


@pytest.mark.parametrize(("name", "number_format"), CASES)
def test_stuck_cells_differ_where_the_other_bit_was_written(name, number_format):
    code, rng = parse_protection(name).code(parse_format(number_format)), np.random.default_rng(2)
    values = 3 * code.per_word + 1
    codes = rng.integers(2**code.bits, size=values)
    everything = np.arange(values * code.bits + code.check_bits(values))
    written = [int(codes[one // code.bits]) >> one % code.bits & 1 for one in range(values * code.bits)]
    for word in range(code.words(values)):
        held = codes[word * code.per_word : (word + 1) * code.per_word]
        data = [int(one) >> bit & 1 for one in held for bit in range(code.bits)]
        written += encode(code.matrix[: len(data)], data)
    for at in (0, 1):
        differ = code.stuck(values, everything, at, lambda numbers: codes[numbers])
        assert sorted(differ.tolist()) == [one for one in everything if written[one] != at]


def test_costs():
    fp32 = parse_format("fp32")
    costs = {name: parse_protection(name).code(fp32) for name in KNOWN}
    assert {name: (code.stored_per_data_bit, code.operations) for name, code in costs.items()} == {
        "none": (1, 0),
        "parity": (33 / 32, 32),
        "secded(32)": (39 / 32, 96),
        "secded(64)": (72 / 64, 104),
        "triplicated_exponent": (48 / 32, 32),
    }


def test_protections_that_cannot_be_are_refused():
    with pytest.raises(UnknownName, match=r"protection 'ecc'.*known: none, parity, secded\(32\)"):
        parse_protection("ecc")
    with pytest.raises(InvalidParameter, match="values of 64 bits need"):
        parse_protection("secded(32)").code(NATIVE["float64"])
    with pytest.raises(InvalidParameter, match=r"values of int\(8\) have no exponent"):
        parse_protection("triplicated_exponent").code(parse_format("int(8)"))
