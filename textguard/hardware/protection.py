"""Codes that protect a memory: which flipped bits they correct, which they detect, and which they let pass in silence.

All codes are linear: what decoding does depends on which bits of a word differ, and not on what the word holds. So only the
words that faults touch are looked at, and nothing has to be encoded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from textguard.errors import InvalidParameter, Setting, UnknownName
from textguard.faults.formats import Float, Float32, Float64, Format

KNOWN = ("none", "parity", "secded(32)", "secded(64)", "triplicated_exponent")
GATES_OF_A_VOTE = 4  # of two inputs each: ab + c(a + b)


@dataclass(frozen=True)
class Read:
    """What is read of a protected memory that faults have hit.

    Attributes
    ----------
    value : ndarray
        int64 [V], ascending: the stored values that are read wrong, or as zero.
    mask : ndarray
        int64 [V], the bits that are read wrong; 0 where the value is read as zero.
    zeroed : ndarray
        bool [V], whether the value is read as zero, because its word is known to be wrong.
    corrected, detected, silent : int
        Words with faults that are read as they were written; that are known to be wrong; and that are wrong without notice.
    """

    value: np.ndarray
    mask: np.ndarray
    zeroed: np.ndarray
    corrected: int
    detected: int
    silent: int


@dataclass(frozen=True)
class Code:
    """How values of one number format are stored in words with check bits.

    Positions in a word count the data bits first, value by value from bit 0 up, and then the check bits. Positions in a memory
    of n values count all data bits in the same way, and behind them the check bits, word by word. So a data bit has the same
    position under every protection. The last word may hold fewer values; its other data bits are 0 and not stored.

    Attributes
    ----------
    bits : int
        Bits of a value.
    per_word : int
        Values in a word.
    matrix : ndarray
        bool [per_word * bits, check bits]: which data bits are summed up, modulo 2, in which check bit.
    corrects : bool
        Whether a syndrome that is the column of one bit has that bit flipped back. Else every syndrome but 0 is detected.
    votes : int
        Mask of a value's bits that the check bits hold two more copies of; 0 for other codes.

    Examples
    --------
    Two flips in the first word are detected, one in the second is corrected:

    >>> import numpy as np
    >>> from textguard.faults import parse_format
    >>> from textguard.hardware.protection import parse_protection
    >>> code = parse_protection("secded(32)").code(parse_format("fp16"))
    >>> code.per_word, code.check_bits(values=3)
    (2, 14)
    >>> read = code.correct(3, np.array([0, 31, 32]))
    >>> read.value.tolist(), read.zeroed.tolist(), (read.corrected, read.detected, read.silent)
    ([0, 1], [True, True], (1, 1, 0))
    """

    bits: int
    per_word: int
    matrix: np.ndarray
    corrects: bool = False
    votes: int = 0

    @property
    def word_bits(self) -> int:
        """Data bits of a whole word."""
        return self.per_word * self.bits

    @property
    def checks(self) -> int:
        """Check bits of a word."""
        return self.matrix.shape[1]

    @property
    def stored_per_data_bit(self) -> float:
        """Stored bits for each bit of data, in whole words."""
        return 1 + self.checks / self.word_bits

    @property
    def operations(self) -> float:
        """Two-input gates per value read: the XORs that find whether a word is right, or those of the votes."""
        if self.votes:
            return float(GATES_OF_A_VOTE * self.votes.bit_count())
        return float(self.matrix.sum()) / self.per_word

    def words(self, values: int) -> int:
        """How many words hold so many values."""
        return -(-values // self.per_word)

    def check_bits(self, values: int) -> int:
        """How many check bits so many values have."""
        return self.words(values) * self.checks

    @cached_property
    def _columns(self) -> np.ndarray:
        """The syndrome of a flip at each position in a word, int64 [data and check bits]."""
        weights = 1 << np.arange(self.checks, dtype=np.int64)
        return np.concatenate([self.matrix @ weights, weights])

    @cached_property
    def _position_of(self) -> np.ndarray:
        """Syndrome -> the position that is flipped back, or -1."""
        found = np.full(2**self.checks, -1, dtype=np.int64)
        if self.corrects:
            found[self._columns] = np.arange(len(self._columns))
        return found

    def locate(self, values: int, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The word of each position in a memory of so many values, and its position in the word, int64 [F] each."""
        beyond = errors - values * self.bits
        value, bit = np.divmod(errors, self.bits)
        word, place = value // self.per_word, value % self.per_word * self.bits + bit
        if self.checks:
            check = beyond >= 0
            word = np.where(check, beyond // self.checks, word)
            place = np.where(check, self.word_bits + beyond % self.checks, place)
        return word, place

    def correct(self, values: int, errors: np.ndarray) -> Read:
        """Read a memory some of whose bits are not as they were written.

        Parameters
        ----------
        values : int
            How many values the memory holds.
        errors : ndarray
            int64 [F], the positions that differ, all different.

        Returns
        -------
        Read
            What is read. The values of a word that is known to be wrong are read as zero.
        """
        word, place = self.locate(values, errors)
        order = np.argsort(word, kind="stable")
        word, place = word[order], place[order]
        touched, starts = np.unique(word, return_index=True)
        if self.votes:
            value, mask = self._voted(word, place)
            return Read(value, mask, np.zeros(len(value), dtype=bool), len(touched) - len(value), 0, len(value))
        syndromes = np.bitwise_xor.reduceat(self._columns[place], starts) if len(starts) else starts
        mended = self._position_of[syndromes]
        stored = np.minimum(self.per_word, values - touched * self.per_word) * self.bits  # less in the last word
        absent = (mended >= stored) & (mended < self.word_bits)
        detected = (syndromes != 0) & ((mended < 0) | absent)
        flips_back = (syndromes != 0) & ~detected
        word, place = np.append(word, touched[flips_back]), np.append(place, mended[flips_back])
        kept = (place < self.word_bits) & ~np.isin(word, touched[detected])
        value, mask = _xor_by_value(word[kept] * self.per_word + place[kept] // self.bits, place[kept] % self.bits)
        silent = int(np.count_nonzero(np.diff(value // self.per_word, prepend=-1)))
        zeroed = (touched[detected][:, None] * self.per_word + np.arange(self.per_word)).reshape(-1)
        zeroed = zeroed[zeroed < values]
        everything = np.concatenate([value, zeroed])
        order = np.argsort(everything, kind="stable")
        return Read(
            everything[order],
            np.concatenate([mask, np.zeros_like(zeroed)])[order],
            (np.arange(len(everything)) >= len(value))[order],
            int((~detected).sum()) - silent,
            int(detected.sum()),
            silent,
        )

    def _voted(self, word: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The values that are wrong behind the votes, and their bits."""
        voted = np.array([bit for bit in range(self.bits) if self.votes >> bit & 1])
        number, bit = np.unique(word), np.append(np.arange(self.bits), np.tile(voted, 2))
        copies = np.zeros((3, len(number)), dtype=np.int64)
        which = np.where(place < self.bits, 0, 1 + (place - self.bits) // len(voted))
        np.bitwise_or.at(copies, (which, np.searchsorted(number, word)), np.left_shift(np.int64(1), bit[place]))
        data, first, second = copies
        mask = (data & ~self.votes) | (((data & first) | (second & (data | first))) & self.votes)
        return number[mask != 0], mask[mask != 0]

    def check(self, codes: np.ndarray) -> np.ndarray:
        """The check bits that are stored with whole words: bool [W, checks]. codes: of their values, int64 [W, per_word]."""
        data = (codes[:, :, None] >> np.arange(self.bits)) & 1
        return (data.reshape(len(codes), self.word_bits) @ self.matrix.astype(np.int64)) % 2 == 1

    def stuck(self, values: int, cells: np.ndarray, at: int, read: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Which of the positions differ from what was written when they are stuck.

        Parameters
        ----------
        values : int
            How many values the memory holds.
        cells : ndarray
            int64 [F], the positions that are stuck.
        at : {0, 1}
            What they are stuck at.
        read : callable
            From numbers of values, int64 [n], to the codes that were written, int64 [n].

        Returns
        -------
        ndarray
            int64 [at most F], some of `cells`.
        """
        data = cells < values * self.bits
        value, bit = np.divmod(cells[data], self.bits)
        wrong = (read(value) >> bit) & 1 != at
        word, place = self.locate(values, cells[~data])
        touched, which = np.unique(word, return_inverse=True)
        held = touched[:, None] * self.per_word + np.arange(self.per_word)
        inside = held < values
        codes = np.where(inside, read(np.where(inside, held, 0).reshape(-1)).reshape(held.shape), 0)
        written = self.check(codes)[which, place - self.word_bits]
        return np.concatenate([cells[data][wrong], cells[~data][written != bool(at)]])


def _xor_by_value(value: np.ndarray, bit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values whose bits add up to something, and the sums modulo 2 as masks."""
    order = np.argsort(value, kind="stable")
    number, starts = np.unique(value[order], return_index=True)
    masks = np.left_shift(np.int64(1), bit[order])
    mask = np.bitwise_xor.reduceat(masks, starts) if len(starts) else masks
    return number[mask != 0], mask[mask != 0]


@dataclass(frozen=True)
class Protection:
    """How the words of a memory are protected; see `parse_protection`.

    Attributes
    ----------
    name : str
        The name that `parse_protection` takes.
    """

    name: str

    def code(self, number_format: Format) -> Code:
        """The code for values of one number format.

        Parameters
        ----------
        number_format : Format
            The format.

        Returns
        -------
        Code
            The code.

        Raises
        ------
        InvalidParameter
            The format's values do not fit the code's words, or have no exponent.
        """
        bits = number_format.bits
        if self.name == "none":
            return Code(bits, 1, np.zeros((bits, 0), dtype=bool))
        if self.name == "parity":
            return Code(bits, 1, np.ones((bits, 1), dtype=bool))
        if self.name == "triplicated_exponent":
            exponent = _exponent(number_format)
            once = np.eye(bits, dtype=bool)[:, exponent]
            return Code(bits, 1, np.concatenate([once, once], axis=1), votes=sum(1 << bit for bit in exponent))
        size = int(self.name[len("secded(") : -1])
        if bits > size:
            raise InvalidParameter(
                Setting("protection"), f" is {self.name!r}, whose words have {size} bits; values of {bits} bits need secded(64)"
            )
        per_word = size // bits
        return Code(bits, per_word, hsiao(size)[: per_word * bits], corrects=True)


def _exponent(number_format: Format) -> list[int]:
    """The numbers of a float format's exponent bits."""
    if isinstance(number_format, Float32 | Float64):
        return list(range(23, 31)) if number_format.bits == 32 else list(range(52, 63))
    if isinstance(number_format, Float):
        return list(range(number_format.mantissa_bits, number_format.bits - 1))
    raise InvalidParameter(
        Setting("protection"),
        f" is 'triplicated_exponent', and values of {number_format.name} have no exponent of their own; "
        "take a float format, or another protection",
    )


def hsiao(data_bits: int) -> np.ndarray:
    """The check matrix of a SECDED code with columns of odd weight: (39,32) or (72,64).

    All single flips are corrected, and all double ones detected. Every column has the least weight that is free, and every
    check bit adds up as many data bits as any other, or one more.

    Parameters
    ----------
    data_bits : {32, 64}
        Data bits of a word.

    Returns
    -------
    ndarray
        bool [data_bits, check bits], the part that belongs to data bits.

    References
    ----------
    Hsiao, "A Class of Optimal Minimum Odd-weight-column SEC-DED Codes", IBM Journal of Research and Development 14, 1970.

    Examples
    --------
    >>> from textguard.hardware.protection import hsiao
    >>> hsiao(64).sum(axis=0).tolist()
    [26, 26, 26, 26, 26, 26, 26, 26]
    """
    if data_bits == 32:
        left_out = [(0, 1, 2), (3, 4, 5), (0, 3, 6)]  # of 35, so that the others are spread evenly
        rows, ones = 7, [three for three in combinations(range(7), 3) if three not in left_out]
    else:
        rows, ones = 8, list(combinations(range(8), 3))
        for start in range(8):
            zeros = {start, (start + 1) % 8, (start + 3) % 8}
            ones.append(tuple(row for row in range(8) if row not in zeros))
    matrix = np.zeros((data_bits, rows), dtype=bool)
    for column, chosen in zip(matrix, ones, strict=True):
        column[list(chosen)] = True
    return matrix


def parse_protection(text: str) -> Protection:
    """The protection of a memory's words that a name stands for.

    Parameters
    ----------
    text : str
        `none`. `parity`: one more bit per value; an odd number of flips is detected, and the value is read as zero.
        `secded(32)` and `secded(64)`: words of 32 or 64 data bits, which hold as many whole values as fit, with 7 or 8 check
        bits; one flip is corrected, two are detected, more may be taken for one. The values of a word with detected flips are
        read as zero. `triplicated_exponent`: the exponent bits of a float format are stored three times, and a majority
        decides. Signs and mantissas are stored once: a flip there changes a value by no more than twice its size.

    Returns
    -------
    Protection
        The protection.

    Raises
    ------
    UnknownName
        No protection has such a name.

    Examples
    --------
    >>> from textguard.faults import parse_format
    >>> from textguard.hardware.protection import parse_protection
    >>> code = parse_protection("secded(64)").code(parse_format("int(8)"))
    >>> code.per_word, code.stored_per_data_bit, code.operations
    (8, 1.125, 26.0)
    """
    if not isinstance(text, str) or text not in KNOWN:
        raise UnknownName("protection", text, KNOWN, Setting("protection"))
    return Protection(text)
