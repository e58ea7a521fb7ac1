"""The key of a server, and how it is kept out of everything that is shown or stored."""

import base64
import html
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

KEY_VARIABLE = "OPENAI_API_KEY"
FEWEST_LETTERS = 16  # of a key; OpenAI's have 51 and more
# What may stand between two letters of a key that is shown split: blanks, control and invisible characters, backslashes.
_GAP = r"[\s\\\x00-\x1f\x7f-\xa0\xad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff\ufffd]*"
_BASE64 = "[A-Za-z0-9+/_-]"


def is_secret(key: str) -> bool:
    """Whether a key is one: at least 16 characters, and not a single word ("none", "internationalization").

    Servers that ask for no key take any word. Such a word also occurs in answers, which must not change for it.
    """
    word = key.isalpha() and (key.isupper() or key[1:].islower())
    return len(key) >= FEWEST_LETTERS and not word


def blotter(key: str) -> Callable[[str], str]:
    """A function that replaces a key in a text by [OPENAI_API_KEY].

    It knows the key as it is, in other case, split, percent-encoded or with other escapes, in hexadecimal, and in base64 at
    every alignment. Texts stay as they are where the key is no secret, see `is_secret`.
    """
    if not is_secret(key):
        return lambda text: text
    plain = _GAP.join(_letter(letter) for letter in key)
    hexadecimal = r"[\s:]*".join(f"{byte:02x}" for byte in key.encode())
    pattern = re.compile(f"(?i:{plain}|{hexadecimal})|{'|'.join(_in_base64(key))}")
    return lambda text: pattern.sub(f"[{KEY_VARIABLE}]", text)


def _letter(letter: str) -> str:
    """A pattern of a letter and its escapes: of URLs (also escaped twice), HTML, JSON and Python."""
    code = ord(letter)
    escapes = f"%(?:25)*{code:02x}|&\\#0*{code};|&\\#x0*{code:x};|u00{code:02x}|x{code:02x}"
    return f"(?:{re.escape(letter)}|{re.escape(html.escape(letter))}|{escapes})"


def _in_base64(key: str) -> Iterator[str]:
    """Patterns of the key in base64, behind 0, 1 or 2 other bytes ("Bearer ", "user:")."""
    others = {"+": r"(?:[+-]|%2[Bb])", "/": r"(?:[/_]|%2[Ff])"}
    for before in range(3):
        letters = base64.b64encode(bytes(before) + key.encode()).decode()
        # Those that the key alone decides; a letter beside them holds bits of it, too.
        decided = letters[-(-before * 8 // 6) : (before + len(key)) * 8 // 6]
        yield f"{_BASE64}?{_GAP.join(others.get(letter, letter) for letter in decided)}{_BASE64}?(?:=|%3[Dd])*"


@contextmanager
def blotted_logs(blot: Callable[[str], str]) -> Iterator[None]:
    """Blot out the key in whatever any library logs meanwhile, exceptions included: servers repeat it in headers."""
    make = logging.getLogRecordFactory()

    def blotted(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        try:
            said = record.getMessage()
        except (TypeError, ValueError, KeyError):
            return record  # logging itself complains about such a record
        if blot(said) != said:
            record.msg, record.args = blot(said), ()
        if record.exc_info and record.exc_info[1]:
            record.exc_text = blot(logging.Formatter().formatException(record.exc_info))
        return record

    logging.setLogRecordFactory(blotted)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
