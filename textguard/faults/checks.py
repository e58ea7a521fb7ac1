"""What the arguments of this package can be, checked where a user hands them in."""

import os
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path

from textguard.errors import InvalidParameter, Setting, UnknownName

HIGHEST_CONFIDENCE = 0.9999  # nearer to 1, intervals say nothing, and quantiles end


def whole_number(setting: Setting, value: object, least: int) -> int:
    """A whole number of Python's or numpy's types, as Python's. Raises InvalidParameter."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InvalidParameter(setting, f" is {value!r:.60}; it must be a whole number")
    if not least <= value < 2**63:
        raise InvalidParameter(setting, f" is {value!s:.60}; at least {least} is needed, and less than 2^63")
    return int(value)


def confidence_level(setting: Setting, value: object) -> float:
    """A confidence that intervals can have. Raises InvalidParameter."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0.5 <= value <= HIGHEST_CONFIDENCE:
        raise InvalidParameter(setting, f" is {value!r:.60}; it must be a number from 0.5 to {HIGHEST_CONFIDENCE}")
    return float(value)


def checked_name(kind: str, value: object, known: Sequence[str], setting: Setting) -> str:
    """One of the known names. Raises UnknownName."""
    if not isinstance(value, str) or value not in known:
        raise UnknownName(kind, value, known, setting)
    return value


def some_text(setting: Setting, value: object) -> str:
    """A text. Raises InvalidParameter."""
    if not isinstance(value, str):
        raise InvalidParameter(setting, f" is {value!r:.60}; it must be text")
    return value


def texts(setting: Setting, value: object) -> Sequence[str]:
    """Several texts, which one text is not. Raises InvalidParameter."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(part, str) for part in value):
        raise InvalidParameter(setting, f" is {value!r:.60}; it must be a list of names")
    return value


def folder_path(setting: Setting, value: object) -> Path | None:
    """Whatever the system takes for a path, as a Path; None for none. Raises InvalidParameter."""
    if value is None:
        return None
    try:
        return Path(os.fsdecode(value))
    except TypeError as error:
        raise InvalidParameter(setting, f" is {value!r:.60}; it must be a path") from error
