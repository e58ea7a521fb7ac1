"""Files: written whole or not at all, read with one clear error, named by what they were made from.

Every writer creates a temporary file beside its target and renames it, so that a reader never sees half a file and an
interrupted or failed write leaves the old file as it was.
"""

import argparse
import csv
import errno
import hashlib
import json
import math
import operator
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, is_dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from textguard.errors import CannotWrite, InvalidArtifact

# pandas, pyarrow and safetensors are imported where they are used: half of the stages need none of them.
if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

WORK_DIR = Path(".work")
Record = TypeVar("Record")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, delete it on any failure.

    Raises CannotWrite when the file system refuses (read-only, full, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """One line for a refused write: the path, the system's reason, and what to do about it."""
    remedy = {
        errno.ENOSPC: "free space on that disk",
        errno.EDQUOT: "free space in your quota",
        errno.EFBIG: "raise the file size limit (ulimit -f)",
    }.get(error.errno or 0, "make the folder writable, or work in another one")
    return CannotWrite(f"{path}: {error.strerror or error}; nothing was written; {remedy}")


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically. Raises CannotWrite."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text atomically. Raises CannotWrite."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, with stable formatting; NaN and infinities are refused as no JSON reader takes them."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    # Lists of numbers on one line. No text can look like this: line ends in it are escaped.
    text = re.sub(
        r"\[\n[-+.\deE,\s]+\]", lambda numbers: " ".join(numbers[0].split()).replace("[ ", "[").replace(" ]", "]"), text
    )
    write_text(path, text + "\n")


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


# What spreadsheets take for a formula. A text that begins so gets an apostrophe, as does one that already has some before it.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")


def write_csv(path: Path, table: "pd.DataFrame") -> None:
    """Write CSV atomically: numbers in full precision, texts so that spreadsheets do not run them; `read_csv` undoes that."""
    import pandas as pd

    safe = table.rename(columns=_inert)
    for place, kind in enumerate(table.dtypes):
        if kind.kind not in "biufc":
            # Still objects: numbers among them are to stay what they are.
            cells = [_inert(cell) for cell in table.iloc[:, place]]
            safe.isetitem(place, pd.Series(cells, index=table.index, dtype=object))
    text = safe.to_csv(index=False, lineterminator="\n")
    if "\r" in text:  # which ends a line, and is not quoted for that
        text = safe.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    write_text(path, text)


def _inert(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def _as_written(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def write_parquet(path: Path, table: "pd.DataFrame", metadata: Mapping[str, str] | None = None) -> None:
    """Write a zstd-compressed Parquet file, atomically; `metadata` goes into the file's schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata(dict(metadata or {}))
    # Serialised in memory first: pyarrow's own file writer reports a full disk in words of its own.
    buffer = BytesIO()
    pq.write_table(arrow, buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


def write_safetensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors atomically in safetensors format; `metadata` values must be strings."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors writes its metadata in an order that changes from run to run; one sorted string keeps the bytes stable.
    packed = {"textguard": json.dumps(dict(metadata or {}), sort_keys=True, ensure_ascii=False)}
    write_bytes(path, save(contiguous, metadata=packed))


@contextmanager
def reading(path: Path, made_by: str) -> Iterator[None]:
    """Turn any failure to read or parse `path` into one InvalidArtifact that says how to mend it.

    made_by: the stage that writes the file; empty where a person does.
    """
    if not path.is_file():
        how = f"stage '{made_by}' writes it: run 'dvc repro' or 'dvc pull'" if made_by else "create it, or name another one"
        raise InvalidArtifact(f"{path} is missing; {how}")
    try:
        yield
    except InvalidArtifact as error:
        how = f"delete it and run 'dvc repro': stage '{made_by}' writes it" if made_by else "mend it"
        raise InvalidArtifact(f"{path} {error}; {how}") from error
    except Exception as error:
        how = f"delete it and run 'dvc repro': stage '{made_by}' writes it" if made_by else "mend it"
        raise InvalidArtifact(f"{path} cannot be read ({type(error).__name__}: {str(error)[:200]}); {how}") from error


def read_json(path: Path, made_by: str, fields: Iterable[str] = ()) -> Any:
    """Read a JSON file. fields: what an object must have. Raises InvalidArtifact."""
    with reading(path, made_by):
        content = json.loads(path.read_text(encoding="utf-8"))
        for name in fields:
            operator.getitem(content, name)  # or it says which is missing
        return content


def read_classes(path: Path) -> list[str]:
    """The class names of a data set, in label order. Raises InvalidArtifact."""
    classes = read_json(path, "data")
    with reading(path, "data"):
        if not isinstance(classes, list) or not all(isinstance(name, str) and name for name in classes) or len(classes) < 2:
            raise InvalidArtifact("must be a list of at least two class names")
    return classes


def read_json_lines(path: Path, made_by: str) -> list[dict[str, Any]]:
    """Read JSON Lines, at least one. Raises InvalidArtifact that names the first damaged line."""
    rows = []
    with reading(path, made_by):
        # Not splitlines(): an answer may hold other separators that Unicode counts as line ends.
        for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InvalidArtifact(f"line {number} is no JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise InvalidArtifact(f"line {number} is no JSON object")
            rows.append(row)
    return rows


def read_records(path: Path, made_by: str, kind: type[Record]) -> list[Record]:
    """Read JSON Lines as dataclass instances. Raises InvalidArtifact."""
    names = {field.name for field in fields(kind)}
    rows = read_json_lines(path, made_by)
    with reading(path, made_by):
        for number, row in enumerate(rows, start=1):
            if row.keys() != names:
                raise InvalidArtifact(f"line {number} must have {', '.join(sorted(names))}, and nothing else")
    return [kind(**row) for row in rows]


def read_csv(
    path: Path, made_by: str, columns: list[str], numbers: list[str], bounds: Mapping[str, tuple[float, float]] | None = None
) -> "pd.DataFrame":
    """Read a CSV file that must hold `columns` of texts that are not empty, and `numbers`, which must be finite.

    Texts stay as they are written, also `NA`, `null` and `007`. bounds: of some numbers, the least and the largest that is
    allowed. Raises InvalidArtifact.
    """
    import pandas as pd

    with reading(path, made_by):
        # Without a list of words for "missing", a number that is missing is an empty text, and found below.
        table = pd.read_csv(path, dtype=dict.fromkeys(columns, str), keep_default_na=False, encoding="utf-8")
        _require(table, [*columns, *numbers])
        if not isinstance(table.index, pd.RangeIndex):
            raise InvalidArtifact("has rows with more cells than its header")
        for column in columns:
            if not table[column].map(lambda cell: isinstance(cell, str) and cell != "").all():
                raise InvalidArtifact(f"has a {column} that is missing")
            table[column] = table[column].map(_as_written)
        for column in numbers:
            found = pd.to_numeric(table[column])
            if len(found) and (found.dtype.kind not in "iuf" or not found.map(math.isfinite).all()):
                raise InvalidArtifact(f"has a {column} that is no finite number")
            table[column] = found
            least, most = (bounds or {}).get(column, (-math.inf, math.inf))
            for number in found[(found < least) | (found > most)].head(1):
                raise InvalidArtifact(f"has a {column} of {number:g}; allowed: from {least:g} to {most:g}")
        return table


def read_parquet(path: Path, made_by: str, columns: list[str]) -> "pd.DataFrame":
    """Read a Parquet file that must hold `columns`. Raises InvalidArtifact."""
    import pyarrow.parquet as pq

    with reading(path, made_by):
        return _require(pq.read_table(path).to_pandas(), columns)


def _require(table: "pd.DataFrame", columns: list[str]) -> "pd.DataFrame":
    missing = [column for column in columns if column not in table]
    if missing:
        raise InvalidArtifact(f"lacks the columns {', '.join(missing)}")
    return table


def read_safetensors(path: Path, made_by: str) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Read all tensors and the metadata of a safetensors file. Raises InvalidArtifact."""
    from safetensors import safe_open

    with reading(path, made_by), safe_open(path, framework="pt") as file:
        metadata = json.loads((file.metadata() or {}).get("textguard", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)


def read_pth(path: Path) -> Any:
    """Read what torch.save wrote: tensors and plain containers of them. No code in it is run. Raises InvalidArtifact.

    An argparse.Namespace, in which training scripts keep their arguments beside the weights, is let pass: it only holds values.
    """
    import pickle

    import torch

    with reading(path, ""), torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f" ({found[1]})" if found else ""
            raise InvalidArtifact(f"is damaged, or holds other things than tensors{what}, which are not loaded") from error


def sha256_of_file(path: Path, made_by: str) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises InvalidArtifact when it cannot be read."""
    with reading(path, made_by), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(**inputs: Any) -> str:
    """16 hexadecimal digits that change when any of the inputs (dataclasses, or anything JSON holds) changes."""
    text = json.dumps(inputs, sort_keys=True, default=lambda value: asdict(value) if is_dataclass(value) else str(value))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`, alone among all processes; wait for whoever holds it. Raises CannotWrite."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{what}: another process is at work on it; waiting for it to end", file=sys.stderr, flush=True)
            lock.acquire()
    except OSError as error:
        raise cannot_write(path.parent, error) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def work_dir(stage: str, key: str, mark: str) -> Iterator[Path]:
    """A folder that outlives an interruption, for the partial results of inputs with fingerprint `mark` and today's code.

    DVC deletes a stage's outputs before it runs, so shards and checkpoints live here until the stage is done: the folder
    is removed when the block ends without an error and kept when it does not. Folders that the same stage and key left for
    other inputs are removed first. Only one process at a time may hold the folder; a second one waits, as a terminated
    `dvc` leaves its running stage behind. Of the processes that torchrun starts, the first holds it for all.
    """
    home = WORK_DIR / stage / key
    folder = home / fingerprint(inputs=mark, code=_code_in_use())
    if os.environ.get("RANK", "0") != "0":
        while not folder.exists():
            time.sleep(0.1)
        yield folder
        return
    with locked(home / "lock", f"{stage} {key}"):
        for other in home.iterdir():
            if other.is_dir() and other != folder:
                shutil.rmtree(other)
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder)


def _code_in_use() -> dict[str, str]:
    """What computes: SHA-256 of every module of this project that is loaded, and torch's version."""
    loaded = [module for name, module in sys.modules.items() if name.partition(".")[0] in ("textguard", "stages")]
    sources = [Path(module.__file__) for module in loaded if getattr(module, "__file__", None)]
    versions = {"torch": str(sys.modules["torch"].__version__)} if "torch" in sys.modules else {}
    return versions | {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}
