"""Number formats in which a layer's outputs are stored: how a value becomes a code, and what a damaged code stands for.

All arithmetic is in float64, on powers of two that are made from their bits. Each code and each decoded value is therefore the
correctly rounded one, and it is the same on CPU and CUDA.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from textguard.errors import InvalidParameter, Setting, UnknownName


class Format(ABC):
    """How values are stored: as codes of `bits` bits, and in some formats with metadata that the values of a block share.

    A format without infinities stores them as its largest magnitude, or as the largest finite fp32 one where that is smaller. A
    format without NaNs stores them as zero. All tensors of one call lie on one device.

    Attributes
    ----------
    name : str
        The name that `parse_format` takes.
    bits : int
        Bits per stored value. Bit 0 is the lowest one, bit `bits` - 1 the sign.
    shared_bits : int
        Bits of one piece of metadata, 0 in formats without metadata.
    block : int
        How many consecutive values of one image's flattened output share a piece of metadata; 0 stands for all of the layer's.

    Examples
    --------
    Flip the highest exponent bit of 1.0 in fp16:

    >>> import torch
    >>> from textguard.faults import parse_format
    >>> fp16 = parse_format("fp16")
    >>> limit, shared = torch.tensor(4.0), torch.tensor(0)
    >>> code = fp16.encode(torch.tensor(1.0), limit, shared)
    >>> f"{int(code):016b}"
    '0011110000000000'
    >>> fp16.decode(code ^ (1 << 14), limit, shared)
    tensor(inf)
    """

    name: str
    bits: int
    shared_bits: int = 0
    block: int = 0

    def shared(self, blocks: Tensor, limit: Tensor) -> Tensor:
        """The metadata of each block.

        Parameters
        ----------
        blocks : Tensor
            float32 [..., k], k values per block.
        limit : Tensor
            float32, broadcastable to [...]. The largest magnitude that the layer was profiled to produce.

        Returns
        -------
        Tensor
            Codes, int64 [...], 0 to 2**shared_bits - 1. Zeros in formats without metadata.
        """
        return torch.zeros(blocks.shape[:-1], dtype=torch.int64, device=blocks.device)

    @abstractmethod
    def encode(self, values: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        """Store values, rounding half to even.

        Parameters
        ----------
        values : Tensor
            float32 [...].
        limit : Tensor
            float32, broadcastable to [...], as for `shared`.
        shared : Tensor
            int64, broadcastable to [...]. The metadata under which the values are stored.

        Returns
        -------
        Tensor
            Codes, int64 [...], 0 to 2**bits - 1.
        """

    @abstractmethod
    def decode(self, codes: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        """Read codes back, under any metadata.

        Parameters
        ----------
        codes : Tensor
            int64 [...], 0 to 2**bits - 1.
        limit, shared : Tensor
            As for `encode`.

        Returns
        -------
        Tensor
            float32 [...]. Flipped bits may make it infinite or NaN.
        """

    def round(self, values: Tensor, limit: Tensor) -> Tensor:
        """What is left of values once they are stored, each block under its own metadata.

        Parameters
        ----------
        values : Tensor
            float32 [B, n], one image's flattened layer output per row.
        limit : Tensor
            float32 [], as for `shared`.

        Returns
        -------
        Tensor
            float32 [B, n].

        Examples
        --------
        >>> import torch
        >>> from textguard.faults import parse_format
        >>> parse_format("int(8)").round(torch.tensor([[0.30, 5.0]]), limit=torch.tensor(2.54))
        tensor([[0.3000, 2.5400]])
        """
        n = values.shape[1]
        k = min(self.block or n, n)
        blocks = pad(values, (0, -n % k)).unflatten(1, (-1, k))  # zeros change no block's metadata
        shared = self.shared(blocks, limit).unsqueeze(-1)
        stored = self.decode(self.encode(blocks, limit, shared), limit, shared)
        return stored.flatten(1)[:, :n].contiguous()


@dataclass(frozen=True)
class Float32(Format):
    """IEEE 754 single precision: the bits as they are, NaN payloads included."""

    name = "fp32"
    bits = 32

    def encode(self, values: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        return values.view(torch.int32).to(torch.int64) & 0xFFFFFFFF

    def decode(self, codes: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        return codes.to(torch.int32).view(torch.float32)

    def round(self, values: Tensor, limit: Tensor) -> Tensor:
        return values


@dataclass(frozen=True)
class Float64(Format):
    """IEEE 754 double precision, for models that compute in it: the bits as they are. No other model has values to store so."""

    name = "fp64"
    bits = 64

    def encode(self, values: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        return values.double().view(torch.int64)

    def decode(self, codes: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        return codes.view(torch.float64)

    def round(self, values: Tensor, limit: Tensor) -> Tensor:
        return values


@dataclass(frozen=True)
class Stored8(Format):
    """Integers of 8 bits, as quantised models store them: in two's complement, or without a sign. No other model has them.

    What they stand for, a scale and a zero point, is the model's own affair.
    """

    name: str

    bits = 8

    def encode(self, values: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        return values.long() & 0xFF

    def decode(self, codes: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        return (_twos_complement(codes, 8) if self.name == "int8" else codes).float()

    def round(self, values: Tensor, limit: Tensor) -> Tensor:
        return values


@dataclass(frozen=True)
class Float(Format):
    """Floating point: a sign, E exponent bits and M mantissa bits, with subnormals. A NaN becomes a quiet NaN of the same sign.

    With `infinities`, a value out of range becomes an infinity [1]_. Without, it becomes the largest finite value, and NaN is
    the code whose exponent and mantissa bits are all ones [2]_. `native` is torch's own type of the same values, where there is
    one.

    References
    ----------
    .. [1] IEEE 754-2019, section 3.4.
    .. [2] OCP 8-bit Floating Point Specification (OFP8) 1.0, format E4M3.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    infinities: bool = True
    native: torch.dtype | None = None

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """The difference between the stored exponent and the exponent."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def top(self) -> int:
        """The largest code that is no NaN: that of infinity, or of the largest finite value."""
        ones = 2 ** (self.bits - 1) - 1
        return ones ^ (2**self.mantissa_bits - 1) if self.infinities else ones - 1

    @property
    def nan(self) -> int:
        """The code of a quiet NaN."""
        return self.top + 2 ** (self.mantissa_bits - 1) if self.infinities else self.top + 1

    def encode(self, values: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        magnitude = values.double().abs().clamp(max=2.0 ** (self.bias + 2))  # infinities become finite, and stay out of range
        exponent = _exponent(magnitude).clamp(min=1 - self.bias)
        steps = (magnitude / _power_of_two(exponent - self.mantissa_bits)).round().long()
        # The leading one of a normal number adds 1 to the exponent field, and so does a carry. A subnormal has no leading one.
        codes = (((exponent + self.bias - 1) << self.mantissa_bits) + steps).clamp(max=self.top)
        return _sign_bit(values, self.bits) | torch.where(values.isnan(), self.nan, codes)

    def decode(self, codes: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        magnitude = codes & (2 ** (self.bits - 1) - 1)
        exponent = (magnitude >> self.mantissa_bits).clamp(min=1)
        steps = magnitude - ((exponent - 1) << self.mantissa_bits)
        values = steps * _power_of_two(exponent - self.bias - self.mantissa_bits)
        if self.infinities:
            values = torch.where(magnitude == self.top, torch.inf, values)
        return _with_sign(torch.where(magnitude > self.top, torch.nan, values), codes, self.bits)

    def round(self, values: Tensor, limit: Tensor) -> Tensor:
        return values.to(self.native).float() if self.native else super().round(values, limit)


@dataclass(frozen=True)
class Integer(Format):
    """Symmetric integers in two's complement: the largest code stands for `limit`. Only a flipped bit makes the lowest code."""

    name: str
    bits: int

    @property
    def largest(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    def encode(self, values: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        steps = (values.double() * self.largest / limit.double()).nan_to_num().round()
        return steps.clamp(-self.largest, self.largest).long() & (2**self.bits - 1)

    def decode(self, codes: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        # A tensor, because CUDA would multiply by the rounded inverse of a plain number.
        largest = torch.full_like(limit, self.largest, dtype=torch.float64)
        return (_twos_complement(codes, self.bits) * limit.double() / largest).float()


@dataclass(frozen=True)
class Fixed(Format):
    """Fixed point: two's complement in units of 2**-fraction_bits. Values out of range become the nearest that is in range."""

    name: str
    integer_bits: int
    fraction_bits: int

    @property
    def bits(self) -> int:
        return 1 + self.integer_bits + self.fraction_bits

    def encode(self, values: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        steps = (values.nan_to_num().double() * 2.0**self.fraction_bits).round()
        largest = 2 ** (self.bits - 1) - 1
        return steps.clamp(-largest - 1, largest).long() & (2**self.bits - 1)

    def decode(self, codes: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        return (_twos_complement(codes, self.bits) * 2.0**-self.fraction_bits).float()


@dataclass(frozen=True)
class BlockFloat(Format):
    """Block floating point: a sign and M magnitude bits per value, and one biased exponent of E bits per block of K values.

    The block's exponent e is that of its largest magnitude, or the nearest one that E bits hold. A value's magnitude is a
    multiple of 2**(e - M + 1), up to 2**M - 1 times that.

    References
    ----------
    Drumond et al., "Training DNNs with Hybrid Block Floating Point", NeurIPS 2018.
    """

    name: str
    exponent_bits: int
    magnitude_bits: int
    block: int

    @property
    def bits(self) -> int:
        return 1 + self.magnitude_bits

    @property
    def shared_bits(self) -> int:
        return self.exponent_bits

    @property
    def bias(self) -> int:
        """The difference between the stored exponent and the exponent."""
        return 2 ** (self.exponent_bits - 1) - 1

    def shared(self, blocks: Tensor, limit: Tensor) -> Tensor:
        largest = blocks.nan_to_num().abs().amax(dim=-1)
        return (_exponent(largest.double()) + self.bias).clamp(0, 2**self.exponent_bits - 1)

    def encode(self, values: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        values = values.nan_to_num()
        steps = (values.double().abs() / self._step(shared)).round().clamp(max=2**self.magnitude_bits - 1)
        return _sign_bit(values, self.bits) | steps.long()

    def decode(self, codes: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        magnitude = codes & (2**self.magnitude_bits - 1)
        return _with_sign(magnitude * self._step(shared), codes, self.bits)

    def _step(self, shared: Tensor) -> Tensor:
        """The distance between neighbouring magnitudes of a block, float64."""
        return _power_of_two(shared - self.bias - self.magnitude_bits + 1)


@dataclass(frozen=True)
class AdaptivFloat(Format):
    """Floating point without subnormals, infinities and NaNs, whose exponent bias follows the layer.

    The bias is an 8-bit number in two's complement. It makes the largest exponent that of `limit`, or the nearest that 8 bits
    allow. A code of zeros is a zero, of either sign. The smallest other magnitude is 2**bias * (1 + 2**-M). Magnitudes below it
    become that magnitude from half of it on, and zero below its half.

    References
    ----------
    Tambe et al., "Algorithm-Hardware Co-Design of Adaptive Floating-Point Encodings for Resilient Deep Learning Inference", DAC
    2020.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int

    shared_bits = 8

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    def shared(self, blocks: Tensor, limit: Tensor) -> Tensor:
        bias = (_exponent(limit.double()) - (2**self.exponent_bits - 1)).clamp(-128, 127)
        return (bias & 0xFF).expand(blocks.shape[:-1])

    def encode(self, values: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        values = values.nan_to_num()
        bias = _twos_complement(shared, self.shared_bits)
        unit = 2.0**-self.mantissa_bits
        smallest = _power_of_two(bias) * (1 + unit)
        largest = _power_of_two(bias + 2**self.exponent_bits - 1) * (2 - unit)
        magnitude = values.double().abs()
        clamped = magnitude.clamp(smallest, largest)
        exponent = _exponent(clamped)
        steps = (clamped / _power_of_two(exponent - self.mantissa_bits)).round().long()
        codes = ((exponent - bias - 1) << self.mantissa_bits) + steps  # the leading one adds 1 to the exponent field
        return _sign_bit(values, self.bits) | torch.where(magnitude < smallest / 2, 0, codes)

    def decode(self, codes: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        magnitude = codes & (2 ** (self.bits - 1) - 1)
        exponent = (magnitude >> self.mantissa_bits) + _twos_complement(shared, self.shared_bits)
        steps = 2**self.mantissa_bits + magnitude % 2**self.mantissa_bits
        values = torch.where(magnitude == 0, 0.0, steps * _power_of_two(exponent - self.mantissa_bits))
        return _with_sign(values, codes, self.bits)


NAMED = {
    known.name: known
    for known in (
        Float32(),
        Float("fp16", 5, 10, native=torch.float16),
        Float("bf16", 8, 7, native=torch.bfloat16),
        Float("fp8_e5m2", 5, 2, native=torch.float8_e5m2),
        Float("fp8_e4m3", 4, 3, infinities=False),
    )
}
FP32 = NAMED["fp32"]
# How torch stores values: the format of each of its types.
NATIVE = {
    "float32": FP32,
    "float16": NAMED["fp16"],
    "bfloat16": NAMED["bf16"],
    "float64": Float64(),
    "int8": Stored8("int8"),
    "uint8": Stored8("uint8"),
}
# Pattern, whose capitals stand for numbers -> the class, which numbers it takes, and the same in words.
SIZED = {
    "fp(E,M)": (Float, lambda e, m: 2 <= e <= 8 and 1 <= m <= 23, "E from 2 to 8 and M from 1 to 23"),
    "int(B)": (Integer, lambda b: 2 <= b <= 16, "B from 2 to 16"),
    "fixed(I,F)": (Fixed, lambda i, f: 2 <= 1 + i + f <= 24, "1+I+F from 2 to 24"),
    "bfp(E,M,K)": (
        BlockFloat,
        lambda e, m, k: 2 <= e <= 8 and 2 <= m <= 15 and k >= 1,
        "E from 2 to 8, M from 2 to 15 and K of at least 1",
    ),
    "adaptivfloat(E,M)": (AdaptivFloat, lambda e, m: 2 <= e <= 8 and 1 <= m <= 15, "E from 2 to 8 and M from 1 to 15"),
}


def parse_format(text: str) -> Format:
    """The number format that a name stands for.

    Parameters
    ----------
    text : str
        `fp32`, `fp16`, `bf16`, `fp8_e5m2` or `fp8_e4m3`; or, with numbers in the place of the capitals and without spaces,
        `fp(E,M)`, `int(B)`, `fixed(I,F)`, `bfp(E,M,K)` or `adaptivfloat(E,M)`.

    Returns
    -------
    Format
        The format; formats of the same name are equal.

    Raises
    ------
    UnknownName
        No format has such a name.
    InvalidParameter
        A number of bits is not one that the format takes.

    Examples
    --------
    >>> from textguard.faults import parse_format
    >>> parse_format("fp16").bits
    16
    >>> bfp = parse_format("bfp(8,7,16)")
    >>> bfp.bits, bfp.shared_bits, bfp.block
    (8, 8, 16)
    """
    if text in NAMED:
        return NAMED[text]
    for pattern, (build, fits, allowed) in SIZED.items():
        match = re.fullmatch(re.sub("[A-Z]", "(0|[1-9][0-9]{0,8})", re.escape(pattern)), text)
        if match:
            sizes = [int(size) for size in match.groups()]
            if not fits(*sizes):
                raise InvalidParameter(Setting("number_format"), f" is {text!r}; {pattern} takes {allowed}")
            return build(text, *sizes)
    raise UnknownName("number format", text, [*NAMED, *SIZED], Setting("number_format"))


def stored_as(number_format: Format, dtype: str, what: str = "the model") -> tuple[Format, bool]:
    """The format in which values of one of torch's types are stored.

    Format fp32 stands for the values as they are: those of a bf16 model are stored in bf16.

    Parameters
    ----------
    number_format : Format
        The campaign's.
    dtype : {"float32", "float16", "bfloat16", "float64", "int8", "uint8"}
        The type.
    what : str
        What has that type, for the message.

    Returns
    -------
    stored : Format
        The format.
    native : bool
        Whether torch stores the values in it anyway.

    Raises
    ------
    InvalidParameter
        Another format is to be looked at than the type's own, and the type is not float32.

    Examples
    --------
    >>> from textguard.faults import parse_format
    >>> from textguard.faults.formats import stored_as
    >>> stored_as(parse_format("fp32"), "bfloat16")[0].bits
    16
    """
    own = NATIVE[dtype]
    if number_format in (own, FP32):
        return own, True
    if own is not FP32:
        raise InvalidParameter(f"{what} is {dtype}, which is stored as {own.name}; leave fp32 in ", Setting("number_format"))
    return number_format, False


def _exponent(values: Tensor) -> Tensor:
    """floor(log2(abs(x))) of float64 values, from their bits; -1023 for zero. No fp32 value is subnormal in float64."""
    return ((values.view(torch.int64) >> 52) & 0x7FF) - 1023


def _power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent in float64, for exponents from -1022 to 1023. torch.ldexp and torch.exp2 do not promise exact ones."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _sign_bit(values: Tensor, bits: int) -> Tensor:
    """The values' signs, as the highest bit of codes of `bits` bits."""
    return torch.signbit(values).long() << (bits - 1)


def _with_sign(magnitude: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Magnitudes with the signs of their codes, as float32."""
    return torch.where(codes >> (bits - 1) == 1, -magnitude, magnitude).float()


def _twos_complement(codes: Tensor, bits: int) -> Tensor:
    """The signed integers that codes of `bits` bits stand for."""
    sign = 1 << (bits - 1)
    return (codes ^ sign) - sign
