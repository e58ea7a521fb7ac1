"""Stored answers: append-only JSON Lines, addressed by everything that can change an answer.

One line per answer. `key` is a hash of the question, the number of the sample and the request (model, server, sampling
parameters ...); `checksum` covers the rest of the line, so that a damaged line is found, and no other line is lost with it.
"""

import errno
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from io import FileIO
from pathlib import Path
from typing import Any

from textguard.artifacts import as_record, cannot_write, locked, parse_json, read_regular
from textguard.errors import InvalidArtifact


@dataclass(frozen=True)
class StoredAnswer:
    """One answer, as it was given. A field is None where its value is not known.

    request: what was asked for beside the question, None where a person wrote the answer. model: as the server names it.
    time: UTC, ISO 8601. finish_reason: stop, length (cut at the request's max_tokens), content_filter, refusal ...
    """

    key: str
    question: str
    sample: int
    provider: str
    request: dict[str, Any] | None
    model: str | None
    time: str | None
    input_tokens: int | None
    output_tokens: int | None
    finish_reason: str | None
    answer: str


@dataclass(frozen=True)
class Store:
    """answers: by key; of two with the same key, the first that was read. damaged: "FILE line N (reason)"."""

    answers: dict[str, StoredAnswer]
    damaged: list[str]


def answer_key(question: str, sample: int, request: dict[str, Any] | None) -> str:
    """32 hexadecimal digits: the address of answer number `sample` (from 0) to a question, under these request settings."""
    return _sha256({"question": question, "sample": sample, "request": request})[:32]


def read_answers(files: Sequence[Path]) -> Store:
    """Read stored answers. A damaged line is left out and named; the others count.

    Raises InvalidArtifact for a file that is missing or cannot be read.
    """
    store = Store({}, [])
    for file in files:
        try:
            content = read_regular(file)
        except (OSError, ValueError) as error:
            how = "params.yaml texts.*.cache names it: correct that, or create the file"
            reason = error.strerror if isinstance(error, OSError) else error
            what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({reason})"
            raise InvalidArtifact(f"{file} {what}; {how}") from error
        # Not splitlines(): an answer may hold other separators that Unicode counts as line ends.
        for number, line in enumerate(content.removesuffix(b"\n").split(b"\n") if content else [], start=1):
            try:
                stored = from_line(line)
            except ValueError as error:
                store.damaged.append(f"{file} line {number} ({error})")
            else:
                store.answers.setdefault(stored.key, stored)
    return store


def to_line(stored: StoredAnswer) -> bytes:
    """The answer as one line of a file, with its checksum and its end."""
    row = asdict(stored)
    return json.dumps(row | {"checksum": _checksum(row)}, ensure_ascii=False).encode() + b"\n"


def from_line(line: bytes) -> StoredAnswer:
    """Read a line back. Raises ValueError that says what is wrong with it."""
    try:
        row = parse_json(line.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError("is no JSON") from error
    names = {field.name for field in fields(StoredAnswer)}
    if not isinstance(row, dict) or row.keys() != names | {"checksum"}:
        raise ValueError("is no stored answer")
    if row.pop("checksum") != _checksum(row):
        raise ValueError("its checksum does not match")
    try:
        stored = as_record(row, StoredAnswer)
    except InvalidArtifact as error:
        raise ValueError(str(error)) from error
    if stored.key != answer_key(stored.question, stored.sample, stored.request):
        raise ValueError("its key belongs to another question, sample or request")
    return stored


def _checksum(row: dict[str, Any]) -> str:
    return _sha256(row)[:16]


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class AnswerLog:
    """A file of stored answers to append to, from any number of threads; see `open_log`. appended: how many so far."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path = path
        self.appended = 0
        self._file = file
        self._threads = threading.Lock()

    def append(self, stored: StoredAnswer) -> None:
        """Write one answer and wait until the disk has it. Raises CannotWrite, and leaves no part of a line then."""
        line = to_line(stored)
        with self._threads:
            size = self._file.seek(0, os.SEEK_END)
            try:
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._file.fileno())
            except OSError as error:
                with suppress(OSError):
                    self._file.truncate(size)
                raise cannot_write(self.path, error) from error
            self.appended += 1


@contextmanager
def open_log(path: Path) -> Iterator[AnswerLog]:
    """Open a file of stored answers to append to, and mend its tail. Raises CannotWrite.

    One process has it at a time and others wait here, so that no two buy the same answer.
    """
    with locked(path.with_name(f"{path.name}.lock"), str(path)):
        try:
            file = path.open("a+b", buffering=0)
            _mend_tail(file)
        except OSError as error:
            raise cannot_write(path, error) from error
        with file:
            yield AnswerLog(path, file)


def _mend_tail(file: FileIO) -> None:
    """Add the line end that a complete last line lacks, or cut off the part of a line that a crash left."""
    file.seek(0)
    tail = file.readall().rpartition(b"\n")[2]
    if not tail:
        return
    try:
        from_line(tail)
    except ValueError:
        file.truncate(file.tell() - len(tail))
    else:
        file.write(b"\n")
