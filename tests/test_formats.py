"""Number formats, against NumPy's and ml_dtypes' own types and decoders written out by hand."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from textguard.errors import InvalidParameter, UnknownName
from textguard.faults.formats import Format, parse_format

NAN = float("nan")
INFINITY = float("inf")
LIMIT = torch.tensor(5.3)
NONE = torch.tensor(0)

TYPES = {
    "fp16": np.float16,
    "fp(5,10)": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "fp(8,7)": ml_dtypes.bfloat16,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp(5,2)": ml_dtypes.float8_e5m2,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp(4,3)": ml_dtypes.float8_e4m3,
    "fp(3,4)": ml_dtypes.float8_e3m4,
}
QUIET_NAN = {
    "fp16": 0x7E00,
    "fp(5,10)": 0x7E00,
    "bf16": 0x7FC0,
    "fp(8,7)": 0x7FC0,
    "fp8_e5m2": 0x7E,
    "fp(5,2)": 0x7E,
    "fp8_e4m3": 0x7F,
    "fp(4,3)": 0x7C,
    "fp(3,4)": 0x78,
    "fp(8,23)": 0x7FC00000,
}


def signed(code: int, bits: int) -> int:
    return code - 2**bits if code >= 2 ** (bits - 1) else code


def int_by_hand(code: int, shared: int, bits: int) -> float:
    return float(Fraction(float(LIMIT)) * signed(code, bits) / (2 ** (bits - 1) - 1))


def fixed_by_hand(code: int, shared: int, whole: int, fraction: int) -> float:
    return signed(code, 1 + whole + fraction) / 2**fraction


def bfp_by_hand(code: int, shared: int, exponent_bits: int, magnitude_bits: int, block: int) -> float:
    sign, magnitude = divmod(code, 2**magnitude_bits)
    bias = 2 ** (exponent_bits - 1) - 1
    return (-1.0) ** sign * math.ldexp(magnitude, shared - bias - magnitude_bits + 1)


def adaptivfloat_by_hand(code: int, shared: int, exponent_bits: int, mantissa_bits: int) -> float:
    sign, magnitude = divmod(code, 2 ** (exponent_bits + mantissa_bits))
    exponent, mantissa = divmod(magnitude, 2**mantissa_bits)
    value = math.ldexp(1 + mantissa / 2**mantissa_bits, exponent + signed(shared, 8)) if magnitude else 0.0
    return (-1.0) ** sign * value


BY_HAND = {"int": int_by_hand, "fixed": fixed_by_hand, "bfp": bfp_by_hand, "adaptivfloat": adaptivfloat_by_hand}
SHARED = {  # what a layer of at most 5.3, in [4, 8), shares
    "int(8)": 0,
    "int(16)": 0,
    "fixed(3,4)": 0,
    "fixed(7,8)": 0,
    "bfp(5,7,16)": 15 + 2,
    "bfp(8,15,16)": 127 + 2,
    "adaptivfloat(4,3)": 256 + 2 - 15,
    "adaptivfloat(5,10)": 256 + 2 - 31,
}
EIGHT_BITS = ("fp8_e5m2", "fp8_e4m3", "fp(4,3)", "fp(3,4)", "int(8)", "fixed(3,4)", "bfp(5,7,16)", "adaptivfloat(4,3)")


def table(name: str, shared: int = 0) -> np.ndarray:
    """What each code of the format stands for, float32 [2**bits], without the module under test."""
    codes = np.arange(2 ** parse_format(name).bits)
    if name in TYPES:
        dtype = np.dtype(TYPES[name])
        return codes.astype(f"u{dtype.itemsize}").view(dtype).astype(np.float32)
    family, _, sizes = name[:-1].partition("(")
    numbers = [int(size) for size in sizes.split(",")]
    with np.errstate(over="ignore"):
        return np.array([BY_HAND[family](int(code), shared, *numbers) for code in codes]).astype(np.float32)


def same_bits(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    """Whether two float32 arrays are equal, zeros with their signs, NaNs whatever their payloads."""
    ours = ours.numpy()
    nan = np.isnan(theirs)
    return np.array_equal(np.isnan(ours), nan) and np.array_equal(ours.view(np.int32)[~nan], theirs.view(np.int32)[~nan])


def every_code(form: Format) -> torch.Tensor:
    return torch.arange(2**form.bits)


def around(values: np.ndarray) -> np.ndarray:
    """The finite values, the middles between neighbours, their fp32 neighbours, random fp32 bits and other hard cases."""
    finite = np.unique(values[np.isfinite(values)])
    middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    hard = np.concatenate([finite, middles])
    up, down = (np.nextafter(hard, np.float32(way)) for way in (np.inf, -np.inf))
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 2**32, 50_000, dtype=np.uint32).view(np.float32)
    usual = rng.normal(0, 3, 10_000).astype(np.float32)
    subnormal = rng.integers(0, 2**23, 1000, dtype=np.uint32).view(np.float32)
    last = np.float32([0.0, -0.0, np.inf, -np.inf, 464, 480, 61440, 65519.996, 65520, 3.4028235e38, 3.396e38, 1e-45])
    return np.concatenate([hard, up, down, anything, usual, subnormal, -subnormal, last, -last])


@pytest.mark.parametrize("name", [*TYPES, *SHARED])
def test_every_code_and_every_flip_decodes_to_what_it_stands_for(name):
    form = parse_format(name)
    shared = SHARED.get(name, 0)
    expected = table(name, shared)
    codes = every_code(form)
    assert same_bits(form.decode(codes, LIMIT, torch.tensor(shared)), expected)
    flipped = codes[:, None] ^ (1 << torch.arange(form.bits))
    assert same_bits(form.decode(flipped, LIMIT, torch.tensor(shared)), expected[flipped.numpy()])


@pytest.mark.parametrize("name", [*TYPES, *SHARED])
def test_every_code_survives_decoding_and_encoding(name):
    form = parse_format(name)
    shared = torch.tensor(SHARED.get(name, 0))
    codes = every_code(form)
    if name.startswith("int"):
        codes = codes[codes != 2 ** (form.bits - 1)]  # the lowest one lies out of range: no value is stored as it
    values = form.decode(codes, LIMIT, shared)
    number = ~values.isnan()
    assert torch.equal(form.encode(values, LIMIT, shared)[number], codes[number])


@pytest.mark.parametrize("name", TYPES)
def test_floats_are_cast_as_numpy_does(name):
    form = parse_format(name)
    values = around(table(name))
    dtype = np.dtype(TYPES[name])
    in_range = values.clip(-448, 448) if name == "fp8_e4m3" else values  # ml_dtypes makes NaN of what is larger
    with np.errstate(over="ignore", invalid="ignore"):
        expected = in_range.astype(dtype).view(f"u{dtype.itemsize}").astype(np.int64)
    number = ~np.isnan(values)
    ours = form.encode(torch.from_numpy(values), LIMIT, NONE).numpy()
    np.testing.assert_array_equal(ours[number], expected[number])


@pytest.mark.parametrize("name", QUIET_NAN)
def test_a_nan_stays_one_and_keeps_its_sign(name):
    form = parse_format(name)
    codes = form.encode(torch.tensor([NAN, NAN]).copysign(torch.tensor([1.0, -1.0])), LIMIT, NONE)
    assert codes.tolist() == [QUIET_NAN[name], QUIET_NAN[name] | 1 << (form.bits - 1)]
    assert form.decode(codes, LIMIT, NONE).isnan().all()


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_e5m2"])
def test_torchs_own_types_round_as_the_arithmetic_does(name):
    form = parse_format(name)
    values = torch.from_numpy(around(table(name)))[None]
    assert same_bits(form.round(values, LIMIT), Format.round(form, values, LIMIT).numpy())


@pytest.mark.parametrize("name", ["fp32", "fp(8,23)"])
def test_fp32_is_exact(name):
    form = parse_format(name)
    words = torch.randint(0, 2**32, (20_000,), generator=torch.Generator().manual_seed(0))
    words = torch.cat([words, torch.tensor([0, 1, 2**31, 2**31 + 1, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x7FFFFF, 0x800000])])
    words = words[:, None] ^ torch.cat([NONE[None], 1 << torch.arange(32)])
    values = torch.from_numpy(words.numpy().astype(np.uint32).view(np.float32))
    assert same_bits(form.decode(words, LIMIT, NONE), values.numpy())
    exact = torch.ones_like(values, dtype=torch.bool) if name == "fp32" else ~values.isnan()
    assert torch.equal(form.encode(values, LIMIT, NONE)[exact], words[exact])
    assert same_bits(form.round(values, LIMIT), values.numpy())


def test_fp32_keeps_nan_payloads():
    fp32 = parse_format("fp32")
    words = torch.tensor([0x7F800001, 0xFFC12345, 0x7FFFFFFF])
    values = fp32.decode(words, LIMIT, NONE)
    assert values.isnan().all()
    assert fp32.encode(values, LIMIT, NONE).equal(words)
    assert fp32.round(values[None], LIMIT).view(torch.int32).equal(values[None].view(torch.int32))


@pytest.mark.parametrize("name", [name for name in EIGHT_BITS if name in SHARED])
def test_values_are_stored_as_the_nearest_code(name):
    form = parse_format(name)
    candidates = table(name, SHARED[name])
    limit = LIMIT
    if name == "int(8)":
        limit = torch.tensor(127 / 16)  # steps of 1/16, so that middles between two codes are exact
        candidates = np.float32([signed(code, 8) / 16 if code != 128 else NAN for code in range(256)])
    values = around(candidates)
    if name == "adaptivfloat(4,3)":
        values = values[np.abs(values) != 2.0**-13 * 1.125 / 2]  # half of the smallest magnitude is no tie: see the paper's own
    stored = form.encode(torch.from_numpy(values), limit, torch.tensor(SHARED[name])).numpy()
    clipped = np.nan_to_num(values).clip(-1e3, 1e3).astype(np.float64)
    distances = np.abs(candidates.astype(np.float64) - clipped[:, None])
    nearest = distances == np.nanmin(distances, axis=1, keepdims=True)
    even_first = np.where(nearest, 2 - np.arange(256) % 2, 0).argmax(axis=1)
    np.testing.assert_array_equal(candidates[stored], candidates[even_first])
    if name.startswith(("bfp", "adaptivfloat")):  # zeros have signs; NaN is stored as +0
        np.testing.assert_array_equal(stored >= 128, np.signbit(values) & ~np.isnan(values))


def test_adaptivfloat_has_the_papers_values():
    form = parse_format("adaptivfloat(2,1)")
    limit = torch.tensor(3.0)
    shared = form.shared(torch.zeros(2, 5), limit)
    assert shared.tolist() == [254, 254]  # -2
    values = form.decode(every_code(form), limit, shared[0])
    assert values.tolist()[:8] == [0.0, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0]
    assert same_bits(values[8:], -values[:8].numpy())
    stored = form.round(torch.tensor([[0.1874, 0.1875, -0.2, 0.4375, 2.5, 2.6, 99.0, -INFINITY, NAN]]), limit)
    assert stored.tolist() == [[0.0, 0.375, -0.375, 0.5, 2.0, 3.0, 3.0, -3.0, 0.0]]


def test_known_integers_and_fixed_points():
    values = torch.tensor([[127.0, -127.0, -200.0, 0.5, 1.5, -2.5, INFINITY, NAN]])
    int8 = parse_format("int(8)")
    assert int8.round(values, torch.tensor(127.0)).tolist() == [[127.0, -127.0, -127.0, 0.0, 2.0, -2.0, 127.0, 0.0]]
    assert int8.decode(torch.tensor([0x80]), torch.tensor(127.0), NONE).tolist() == [-128.0]
    fixed = parse_format("fixed(6,1)")
    assert fixed.round(values, LIMIT).tolist() == [[63.5, -64.0, -64.0, 0.5, 1.5, -2.5, 63.5, 0.0]]


@pytest.mark.parametrize("name", ["bfp(5,7,16)", "bfp(2,7,16)", "bfp(8,7,16)", "adaptivfloat(4,3)"])
def test_every_flip_of_every_shared_code(name):
    form = parse_format(name)
    tables = np.stack([table(name, shared) for shared in range(2**form.shared_bits)])
    flipped = torch.arange(2**form.shared_bits)[:, None] ^ (1 << torch.arange(form.shared_bits))
    decoded = form.decode(every_code(form), LIMIT, flipped.unsqueeze(-1))
    assert same_bits(decoded, tables[flipped.numpy()])


@pytest.mark.parametrize(
    ("name", "values", "shared"),
    [
        ("bfp(5,7,2)", [[4.0, -7.99], [-8.0, 1.0], [0.5, 0.0], [0.0, -0.0]], [17, 18, 14, 0]),
        ("bfp(5,7,2)", [[1e30, 0.0], [1e-30, 0.0], [INFINITY, 0.0], [NAN, 1.0]], [31, 0, 31, 15]),
        ("bfp(8,7,2)", [[3e38, 0.0], [1e-45, 0.0], [-INFINITY, 0.0], [2.0**-126, 0.0]], [254, 0, 254, 1]),
        ("fp16", [[1.0, 2.0]], [0]),
    ],
)
def test_shared_exponents(name, values, shared):
    assert parse_format(name).shared(torch.tensor(values), LIMIT).tolist() == shared


def test_shared_biases():
    limits = torch.tensor([5.3, 1.0, 3e38, 2.0**-120, 1e-45])
    biases = parse_format("adaptivfloat(4,3)").shared(torch.ones(5, 7), limits)
    assert [signed(code, 8) for code in biases.tolist()] == [-13, -15, 112, -128, -128]


@pytest.mark.parametrize(
    "name", ["fp32", "bf16", "fp(3,2)", "int(6)", "fixed(2,3)", "bfp(5,4,4)", "bfp(5,4,99)", "adaptivfloat(3,2)"]
)
def test_images_and_blocks_do_not_touch_each_other(name):
    form = parse_format(name)
    values = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 10)
    stored = form.round(values, LIMIT)
    k = form.block or 10
    alone = [torch.cat([form.round(part[None], LIMIT)[0] for part in image.split(k)]) for image in values]
    assert same_bits(stored, torch.stack(alone).numpy())
    assert stored.is_contiguous()
    assert form.shared(values, LIMIT).shape == (6,)


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_each_value_may_come_from_another_layer(name):
    form = parse_format(name)
    values = torch.tensor([[0.3, 5.1], [-70.0, 2.0], [1e-3, -4e-3]])
    limits = torch.tensor([6.0, 80.0, 0.01])
    shared = form.shared(values, limits)
    stored = form.decode(form.encode(values[:, 0], limits, shared), limits, shared)
    alone = [form.round(pair[None], limit)[0, 0] for pair, limit in zip(values, limits, strict=True)]
    assert same_bits(stored, torch.stack(alone).numpy())


@pytest.mark.parametrize("name", EIGHT_BITS)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_rounding_goes_to_the_nearest_value_and_stays_there(name, values):
    form = parse_format(name)
    values = torch.tensor([values])
    limit = values.abs().max().clamp(min=1e-30)
    stored = form.round(values, limit)
    assert same_bits(form.round(stored, limit), stored.numpy())
    for block, rounded in zip(values.split(form.block or 40, dim=1), stored.split(form.block or 40, dim=1), strict=True):
        shared = form.shared(block, limit)
        assert form.shared(rounded, limit).equal(shared)
        choices = form.decode(every_code(form), limit, shared)
        choices = choices[choices.isfinite()].double()
        inside = block.abs() <= choices.max()  # what is larger may have become infinite
        errors = (rounded - block.double()).abs()[inside]
        least = (choices - block.double()[inside].unsqueeze(-1)).abs().amin(dim=-1)
        assert (errors <= least * 1.0001).all()  # the code's value is itself rounded to fp32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["fp32", *TYPES, *SHARED])
def test_cuda_gives_the_same_bits(name):
    form = parse_format(name)
    values = torch.from_numpy(around(table(name, SHARED.get(name, 0)) if name != "fp32" else np.zeros(1, np.float32)))[None]
    assert same_bits(form.round(values.cuda(), LIMIT.cuda()).cpu(), form.round(values, LIMIT).numpy())


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("fp32", 32),
        ("bf16", 16),
        ("fp8_e4m3", 8),
        ("fp(2,1)", 4),
        ("int(2)", 2),
        ("fixed(0,1)", 2),
        ("fixed(23,0)", 24),
        ("bfp(2,2,1)", 3),
        ("adaptivfloat(8,15)", 24),
    ],
)
def test_names(name, bits):
    form = parse_format(name)
    assert form == parse_format(name)
    assert (form.name, form.bits) == (name, bits)


@pytest.mark.parametrize(
    "text", ["posit8", "fp32 ", "FP16", "fp(5,10", "fp(5, 10)", "fp(5)", "int(08)", "int(-1)", "int()", "bfp(8,7)", ""]
)
def test_unknown_formats(text):
    with pytest.raises(UnknownName, match=r"in argument number_format; known: adaptivfloat\(E,M\), .*, fp8_e5m2, int\(B\)$"):
        parse_format(text)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("fp(0,3)", "E from 2 to 8 and M from 1 to 23"),
        ("fp(9,3)", "E from 2 to 8 and M from 1 to 23"),
        ("fp(8,24)", "E from 2 to 8 and M from 1 to 23"),
        ("int(1)", "B from 2 to 16"),
        ("int(17)", "B from 2 to 16"),
        ("fixed(0,0)", "1+I+F from 2 to 24"),
        ("fixed(40,40)", "1+I+F from 2 to 24"),
        ("bfp(1,7,16)", "E from 2 to 8, M from 2 to 15 and K of at least 1"),
        ("bfp(8,1,16)", "E from 2 to 8, M from 2 to 15 and K of at least 1"),
        ("bfp(8,7,0)", "E from 2 to 8, M from 2 to 15 and K of at least 1"),
        ("adaptivfloat(4,0)", "E from 2 to 8 and M from 1 to 15"),
    ],
)
def test_sizes_out_of_range(text, allowed):
    with pytest.raises(InvalidParameter) as error:
        parse_format(text)
    family = text.partition("(")[0]
    assert str(error.value).startswith(f"argument number_format is {text!r}; {family}(")
    assert str(error.value).endswith(f" takes {allowed}")
