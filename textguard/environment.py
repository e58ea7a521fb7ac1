"""What a process finds when it starts: variables, standard streams, other processes. Without torch, which takes seconds."""

import io
import math
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from textguard.errors import CannotWrite, InvalidParameter

LONGEST_WAIT_S = 86_400  # between two lines of progress


def environment_number(name: str, default: int, most: int = 10**9, least: int = 0) -> int:
    """A whole number from `least` to `most` from the environment. Raises InvalidParameter."""
    wanted = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,18}", wanted) or not least <= int(wanted) <= most:
        raise InvalidParameter(f"{name}={wanted[:50]!r} in the environment; it must be a number from {least} to {most}")
    return int(wanted)


def progress_interval() -> float:
    """Seconds between two progress lines where there is no terminal: TEXTGUARD_PROGRESS. Raises InvalidParameter."""
    wanted = os.environ.get("TEXTGUARD_PROGRESS", "10")
    try:
        seconds = float(wanted)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= LONGEST_WAIT_S:
        allowed = f"it must be a number of seconds, from 0 to {LONGEST_WAIT_S}"
        raise InvalidParameter(f"TEXTGUARD_PROGRESS={wanted[:50]!r} in the environment; {allowed}")
    return seconds


def process_group() -> tuple[int, int]:
    """This process's number and how many there are, as `torchrun` says. Raises InvalidParameter.

    Schedulers set RANK alone, for reasons of their own: without WORLD_SIZE it says nothing.
    """
    count = environment_number("WORLD_SIZE", 1, 65_536, 1)
    if count == 1:
        return 0, 1
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise InvalidParameter(
            f"WORLD_SIZE={count} in the environment, but not {', '.join(missing)}; torchrun sets them: start this with it, "
            "or unset WORLD_SIZE"
        )
    environment_number("MASTER_PORT", 0, 65_535, 1)
    return environment_number("RANK", 0, count - 1), count


def check_threads() -> None:
    """Raises InvalidParameter for an OMP_NUM_THREADS that torch would ignore."""
    wanted = os.environ.get("OMP_NUM_THREADS", "1")
    if not re.fullmatch(r"\s*[1-9][0-9]{0,4}\s*(,\s*[1-9][0-9]{0,4}\s*)*", wanted):
        raise InvalidParameter(f"OMP_NUM_THREADS={wanted[:50]!r} in the environment; it must be a number of threads, 1 or more")


class _Unfailing:
    """Standard error: what it cannot take (full, closed, nobody there) is lost, and the work goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be written."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run_command(main: Callable[[list[str]], int], failure: int) -> int:
    """Run a command line's `main` with its arguments, so that whatever it prints can be printed. Returns the exit code.

    failure: the exit code where standard output takes nothing (closed, full, a pipe that nobody reads).
    """
    for number in range(3):
        # Or the first file that is opened gets the number of a closed stream, and whatever is printed goes into it.
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = _stream(sys.stdout, 1), _Unfailing(_stream(sys.stderr, 2))
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:
            raise
        code = _unheard(CannotWrite(f"standard output: {error.strerror or error}; what it was to show is lost"), failure)
    return code


def _unheard(error: CannotWrite, failure: int) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left goes there, when Python ends
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return failure


def _stream(found: TextIO | None, number: int) -> TextIO:
    """A standard stream that can print all texts, in the encoding that Python chose: what it lacks is escaped."""
    if found is None:
        found = io.TextIOWrapper(io.FileIO(number, "wb", closefd=False), "utf-8", write_through=True)
    if isinstance(found, io.TextIOWrapper):  # and not what a test put there
        found.reconfigure(errors="backslashreplace")
    return found
