"""Number formats in which a layer's outputs are stored: where a stored bit flips, and what the flipped code then stands for.

All arithmetic is in float64 and on powers of two made from their bits, so each code and each decoded value is the correctly
rounded one, the same on CPU and CUDA.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from textguard.errors import InvalidParameter, Setting, UnknownName


class Format(ABC):
    """How values are stored: a code of `bits` bits each, and for some formats metadata that a block of values shares.

    The tensors given to one call lie on one device. Infinities and NaNs that a format cannot hold become its largest
    magnitude (at most the largest finite fp32 one) and zero.
    """

    name: str  # as `parse_format` takes it
    bits: int  # per stored value; bit 0 is the lowest, bit bits-1 the sign
    shared_bits: int = 0  # of each piece of metadata that values share; 0: there is none
    block: int = 0  # how many consecutive values of one image's flattened output share one piece; 0: all of the layer's

    def shared(self, blocks: Tensor, limit: Tensor) -> Tensor:
        """The metadata of each block.

        blocks: float32, shape [..., k], k values per block. limit: float32, broadcastable to [...], the largest magnitude that
        the layer was profiled to produce. Returns codes, int64 [...], zeros for a format without metadata.
        """
        return torch.zeros(blocks.shape[:-1], dtype=torch.int64, device=blocks.device)

    @abstractmethod
    def encode(self, values: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        """Store values, rounding half to even.

        values: float32 [...]. limit, shared: float32 and int64, broadcastable to [...]. Returns codes, int64 [...], 0 to
        2**bits - 1.
        """

    @abstractmethod
    def decode(self, codes: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        """Read codes back, under any metadata.

        codes: int64 [...], 0 to 2**bits - 1. limit, shared: as for `encode`. Returns float32 [...]; flipped bits may make it
        infinite or NaN.
        """

    def round(self, values: Tensor, limit: Tensor) -> Tensor:
        """What is left of values once they are stored, each block under its own metadata.

        values: float32 [B, n], one image's flattened layer output per row. limit: float32 []. Returns float32 [B, n].
        """
        n = values.shape[1]
        k = min(self.block or n, n)
        blocks = pad(values, (0, -n % k)).unflatten(1, (-1, k))  # zeros change no block's metadata
        shared = self.shared(blocks, limit).unsqueeze(-1)
        stored = self.decode(self.encode(blocks, limit, shared), limit, shared)
        return stored.flatten(1)[:, :n].contiguous()


@dataclass(frozen=True)
class Float32(Format):
    """The bits as they are, NaN payloads included."""

    name = "fp32"
    bits = 32

    def encode(self, values: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        return values.view(torch.int32).to(torch.int64) & 0xFFFFFFFF

    def decode(self, codes: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        return codes.to(torch.int32).view(torch.float32)

    def round(self, values: Tensor, limit: Tensor) -> Tensor:
        return values


@dataclass(frozen=True)
class Float(Format):
    """Sign, E exponent bits and M mantissa bits, with subnormals. A NaN becomes a quiet NaN of the same sign.

    With infinities: overflow rounds to infinity; source: IEEE 754-2019, section 3.4. Without: the code of ones is NaN, and
    whatever is out of range becomes the largest finite value; source: OCP 8-bit Floating Point Specification 1.0, E4M3.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    infinities: bool = True
    native: torch.dtype | None = None  # torch's own type of the same values

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def top(self) -> int:
        """The last code that is no NaN: infinity, or the largest finite value."""
        ones = 2 ** (self.bits - 1) - 1
        return ones ^ (2**self.mantissa_bits - 1) if self.infinities else ones - 1

    @property
    def nan(self) -> int:
        return self.top + 2 ** (self.mantissa_bits - 1) if self.infinities else self.top + 1

    def encode(self, values: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        magnitude = values.double().abs().clamp(max=2.0 ** (self.bias + 2))  # out of range, and no infinity
        exponent = _exponent(magnitude).clamp(min=1 - self.bias)
        steps = (magnitude / _power_of_two(exponent - self.mantissa_bits)).round().long()
        # a subnormal has no leading one; all others have one, which adds 1 to the exponent field, as does a carry
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
    """Two's complement, symmetric: the largest code stands for `limit`. The lowest code is reached by a flip only."""

    name: str
    bits: int

    @property
    def largest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def encode(self, values: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        steps = (values.double() * self.largest / limit.double()).nan_to_num().round()
        return steps.clamp(-self.largest, self.largest).long() & (2**self.bits - 1)

    def decode(self, codes: Tensor, limit: Tensor, shared: Tensor) -> Tensor:
        # a tensor, since CUDA divides by a number as it multiplies by its rounded inverse
        largest = torch.full_like(limit, self.largest, dtype=torch.float64)
        return (_twos_complement(codes, self.bits) * limit.double() / largest).float()


@dataclass(frozen=True)
class Fixed(Format):
    """Two's complement in units of 2**-fraction_bits, saturating."""

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
    """Block floating point: sign and M magnitude bits per value, and one biased E-bit exponent per block of values.

    The exponent e is the one of the block's largest magnitude, or the nearest that E bits hold; a magnitude is a multiple of
    2**(e - M + 1), at most 2**M - 1 of them. Source: Drumond et al., NeurIPS 2018.
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
        return _power_of_two(shared - self.bias - self.magnitude_bits + 1)


@dataclass(frozen=True)
class AdaptivFloat(Format):
    """Floating point without subnormals, infinities and NaNs, whose exponent bias follows the layer.

    The bias, an 8-bit two's complement number, makes the largest exponent that of `limit`, or the nearest it can. A code of
    zeros is zero, of either sign; below the smallest magnitude, 2**bias * (1 + 2**-M), values from half of it on become it,
    others zero. Source: Tambe et al., DAC 2020.
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
SIZED = {  # each capital stands for a number: the class, which numbers it takes, and the same in words
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
    """The format that `text` names, such as fp16 or bfp(8,7,16), without spaces. Raises UnknownName, InvalidParameter."""
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


def _exponent(values: Tensor) -> Tensor:
    """floor(log2(|x|)) of float64 values from the bits; -1023 for zero. Every fp32 value is a normal number in float64."""
    return ((values.view(torch.int64) >> 52) & 0x7FF) - 1023


def _power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent in float64, for -1022 to 1023; torch.ldexp and torch.exp2 promise no exact one."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _sign_bit(values: Tensor, bits: int) -> Tensor:
    return torch.signbit(values).long() << (bits - 1)


def _with_sign(magnitude: Tensor, codes: Tensor, bits: int) -> Tensor:
    return torch.where(codes >> (bits - 1) == 1, -magnitude, magnitude).float()


def _twos_complement(codes: Tensor, bits: int) -> Tensor:
    sign = 1 << (bits - 1)
    return (codes ^ sign) - sign
