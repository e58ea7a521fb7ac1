"""Files: written whole or not at all, read with one clear error, named by what they were made from.

Every writer creates a temporary file beside its target and renames it, so that a reader never sees half a file and an
interrupted or failed write leaves the old file as it was.
"""

import argparse
import csv
import errno
import fcntl
import functools
import hashlib
import json
import math
import operator
import os
import re
import shutil
import stat
import sys
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, is_dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from filelock import FileLock, Timeout

from textguard.environment import process_group
from textguard.errors import CannotWrite, InvalidArtifact, InvalidParameter, printable

# pandas, pyarrow and safetensors are imported where they are used: half of the stages need none of them.
if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

WORK_DIR = Path(".work")
MOST_BYTES = 2**30  # of one file that is read whole
FP32_MAX = 3.4028234663852886e38
Record = TypeVar("Record")
code_of_users: set[Path] = set()  # files of a user's own code that this process runs, see textguard.modules
went_on_from: list[Path] = []  # folders of partial results that an interrupted process had left, and this one took up


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, delete it on any failure.

    Raises CannotWrite when the file system refuses (read-only, full, no permission). The temporary file is locked while its
    writer lives, so that others can tell it from one that a killed writer left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(path.parent.absolute())
        with _locked_new(temporary) as file:  # until it has its name: without the lock it would be taken for left behind
            yield temporary
            os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@functools.cache  # a look at each folder is enough: partial results are many files in one
def _remove_left_behind(folder: Path) -> None:
    """Remove the temporary files of writers that were killed."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.[0-9]+\.tmp", path.name):
            # Whoever lives has the lock; on file systems without locks nobody gets one, and nothing is removed.
            with suppress(OSError), path.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(file, path):
                    path.unlink()


def _locked_new(path: Path) -> BinaryIO:
    """A new file, open and locked until it is closed."""
    while True:
        file = path.open("wb")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file, path):
            return file
        file.close()  # another process took it for left behind, before it was locked


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def absolute(path: Path) -> Path:
    """The path from the root of the file system, or as it is where the working directory is gone."""
    try:
        return path.resolve()
    except OSError:
        return path


def expanded(folder: str, where: str) -> Path:
    """The path, with `~` as somebody's home. where: what names it. Raises InvalidParameter."""
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise InvalidParameter(f"{where} is {folder!r}, and there is no such home directory; name the whole path") from error


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """One line for a refused write: the path, the system's reason, and what to do about it."""
    remedy = {
        errno.ENOSPC: "free space on that disk",
        errno.EDQUOT: "free space in your quota",
        errno.EFBIG: "raise the file size limit (ulimit -f)",
        errno.EEXIST: "move away what lies in its place, or work in another one",
        errno.ENOTDIR: "move away the file that lies where a folder must be, or work in another one",
        errno.EISDIR: "move away the folder that lies in its place, or work in another one",
        errno.ELOOP: "mend the links on the way to it, or work in another one",
        errno.ENAMETOOLONG: "shorten the names on the way to it, or those in params.yaml",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
        errno.ENOENT: "create the folder, which is gone, or work in another one",
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


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file. Raises ValueError for a pipe, a device, or more than MOST_BYTES; and OSError."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file")
    if found.st_size > MOST_BYTES:
        raise ValueError(f"it has {found.st_size:,} bytes; {MOST_BYTES:,} are the most that are read")
    return path.read_bytes()


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
        raise InvalidArtifact(f"{path} cannot be read ({type(error).__name__}: {printable(str(error))}); {how}") from error


def parse_json(text: str | bytes, finite: bool = False) -> Any:
    """The values of a JSON text, UTF-8. Raises ValueError.

    Also for what Python reads and others do not, or read otherwise: a name twice in one object, and halves of characters.
    finite: whether numbers that are none (NaN), or larger than any float, are refused as well.
    """
    text = text if isinstance(text, str) else text.decode()
    numbers = {"parse_constant": _finite, "parse_float": _finite} if finite else {}
    try:
        content = json.loads(text, object_pairs_hook=_object, **numbers)
        if half := re.search(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}", text):
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds half of a character, as {half[0]}") from error
    except RecursionError as error:
        raise ValueError("its values lie too deep in each other") from error
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it holds {printable(repr(twice), 60)} twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {printable(text, 30)}, which is no finite number")
    return number


def read_json(path: Path, made_by: str, fields: Iterable[str] = ()) -> Any:
    """Read a JSON file. fields: what an object must have. Raises InvalidArtifact."""
    with reading(path, made_by):
        content = parse_json(path.read_bytes())
        for name in fields:
            operator.getitem(content, name)  # or it says which is missing
        return content


def read_classes(path: Path) -> list[str]:
    """The class names of a data set, in label order. Raises InvalidArtifact."""
    classes = read_json(path, "data")
    with reading(path, "data"):
        if problem := misnamed(classes):
            raise InvalidArtifact(f"must be a list of at least two class names: {problem}")
    return classes


def misnamed(classes: Any) -> str:
    """What is wrong with class names, if anything: they must be two or more texts that a text encoder can tell apart.

    Many encoders read neither case nor the difference between composed and decomposed letters.
    """
    if not isinstance(classes, list) or len(classes) < 2:
        return f"there must be two or more, and there are {len(classes) if isinstance(classes, list) else 'none'}"
    for name in classes:
        # Control characters, line and paragraph separators, and halves of characters.
        if not isinstance(name, str) or name != name.strip() or any(unicodedata.category(c) in UNSPEAKABLE for c in name):
            return f"{ascii(name)[:80]} is no text, or has blanks at its ends, control characters or broken ones in it"
        if not name:
            return "a name is empty"
    alike = Counter(unicodedata.normalize("NFC", name).casefold() for name in classes)
    folded, count = alike.most_common(1)[0]
    if count > 1:
        twice = [name for name in classes if unicodedata.normalize("NFC", name).casefold() == folded]
        return (
            f"{' and '.join(ascii(name)[:80] for name in twice[:3])} are the same, or but for case or how accents are encoded"
        )
    return ""


UNSPEAKABLE = ("Cc", "Cs", "Zl", "Zp")


def read_json_lines(path: Path, made_by: str) -> list[dict[str, Any]]:
    """Read JSON Lines, at least one. Raises InvalidArtifact that names the first damaged line."""
    rows = []
    with reading(path, made_by):
        # Not splitlines(): an answer may hold other separators that Unicode counts as line ends.
        for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
            try:
                row = parse_json(line)
            except ValueError as error:
                raise InvalidArtifact(f"line {number} is no JSON ({getattr(error, 'msg', error)})") from error
            if not isinstance(row, dict):
                raise InvalidArtifact(f"line {number} is no JSON object")
            rows.append(row)
    return rows


def read_records(path: Path, made_by: str, kind: type[Record]) -> list[Record]:
    """Read JSON Lines as dataclass instances. Raises InvalidArtifact."""
    rows = read_json_lines(path, made_by)
    records = []
    with reading(path, made_by):
        for number, row in enumerate(rows, start=1):
            try:
                records.append(as_record(row, kind))
            except InvalidArtifact as error:
                raise InvalidArtifact(f"line {number} {error}") from error
    return records


def as_record(row: Any, kind: type[Record]) -> Record:
    """A dataclass instance from what JSON holds: all its fields, of their types, and no others. Raises InvalidArtifact."""
    from pydantic import TypeAdapter, ValidationError

    names = {field.name for field in fields(kind)}
    if not isinstance(row, dict) or row.keys() != names:
        raise InvalidArtifact(f"must have {', '.join(sorted(names))}, and nothing else")
    try:
        # As JSON, because a list is no tuple in strict Python.
        return _adapter(TypeAdapter, kind).validate_json(json.dumps(row), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = printable(".".join(map(str, first["loc"])))
        raise InvalidArtifact(f"has a wrong {place} ({printable(first['msg'])})") from error


@functools.cache
def _adapter(make: Callable[[type], Any], kind: type) -> Any:
    return make(kind)


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
                raise InvalidArtifact(f"has a row without its {column}")
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


def read_ranges(path: Path) -> "pd.DataFrame":
    """A run's profiled layers, in order of execution: layer, kind, neurons, max_abs, mean_abs, images.

    Raises InvalidArtifact.
    """
    table = read_csv(path, "ranges", ["layer", "kind"], ["neurons", "max_abs", "mean_abs", "images"])
    with reading(path, "ranges"):
        check_names(table["layer"], "layer")
        largest, mean = table["max_abs"], table["mean_abs"]
        # A mean is a sum of many numbers: it may be rounded beyond the largest of them.
        bad = (mean < 0) | (mean > largest * (1 + 1e-6)) | (largest > FP32_MAX)
        for count in (table["neurons"], table["images"]):
            bad |= (count < 1) | (count % 1 != 0)
        bad |= table["images"] != table["images"].iloc[0]  # all layers saw the same images
        if bad.any():
            row = table[bad].iloc[0]
            values = ", ".join(f"{name} {row[name]}" for name in ("neurons", "max_abs", "mean_abs", "images"))
            raise InvalidArtifact(f"has impossible numbers for layer {row['layer']!r}: {values}")
        return table


def check_names(names: "pd.Series", what: str) -> None:
    """Raises InvalidArtifact where a table has no names, or one of them twice. what: they are names of."""
    if names.empty:
        raise InvalidArtifact(f"names no {what}")
    if names.duplicated().any():
        raise InvalidArtifact(f"names {what} {printable(names[names.duplicated()].iloc[0])!r} twice")


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
    """Read all tensors and the metadata of a safetensors file, text by name. Raises InvalidArtifact."""
    from safetensors import safe_open

    with reading(path, made_by), safe_open(path, framework="pt") as file:
        metadata = parse_json((file.metadata() or {}).get("textguard", "{}"))
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise InvalidArtifact("has metadata 'textguard' that are no JSON object of texts")
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)


def read_pth(path: Path) -> Any:
    """Read what torch.save wrote: tensors and plain containers of them. No code in it is run. Raises InvalidArtifact.

    An argparse.Namespace, in which training scripts keep their arguments beside the weights, is let pass: it only holds values.
    """
    import pickle

    import torch

    with reading(path, ""), torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of pickles that it then refuses
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f" ({found[1]})" if found else ""
            raise InvalidArtifact(f"is damaged, or holds other things than tensors{what}, which are not loaded") from error


def oddity(tensor: "Tensor") -> str:
    """What a tensor from elsewhere is instead of numbers that lie one by one in its file; empty for such a one.

    Floats of 16 to 64 bits, integers and truth values are numbers. What is odd may not even have a shape, or may ask for more
    memory than there is: look here first.
    """
    import torch

    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_meta:
        return "a tensor without numbers"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"a {'quantised' if tensor.is_quantized else str(tensor.layout).removeprefix('torch.')} tensor"
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64, *integers):
        return f"{str(tensor.dtype).removeprefix('torch.')} numbers"
    # One number can stand for any amount of them: such a tensor would ask for more memory than its file has.
    if (needed := tensor.numel() * tensor.element_size()) > (stored := tensor.untyped_storage().nbytes()):
        return f"a tensor of {needed:,} bytes, of which {stored:,} are stored,"
    return ""


def sha256_of_file(path: Path, made_by: str) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises InvalidArtifact when it cannot be read."""
    with reading(path, made_by), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lasting(path: Path) -> Path:
    """A path from the grid's folder or absolute; in an experiment's copy of the grid, the same path from the grid that stays.

    `dvc exp run --temp` and queued experiments work in a copy of what git knows, which is deleted afterwards. It lies below the
    grid's own folder.
    """
    home, copied, _ = Path.cwd().as_posix().partition("/.dvc/tmp/exps/")
    return (Path(home) / path).resolve() if copied else path


def beside_copy(path: Path) -> Path:
    """The path where it exists, as in an experiment's copy what git knows does; else its `lasting` one."""
    return path if path.exists() else lasting(path)


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
    if process_group()[0]:
        while not folder.exists():
            time.sleep(0.1)
        yield folder
        return
    with locked(home / "lock", f"{stage} {key}"):
        for other in home.iterdir():
            if other.is_symlink():
                other.unlink()
            elif other.is_dir() and other != folder:
                shutil.rmtree(other)
        if folder.exists():
            went_on_from.append(folder)
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder)


def _code_in_use() -> dict[str, str]:
    """What computes: SHA-256 of every module of this project that is loaded, and of a user's own; and torch's version."""
    loaded = [module for name, module in sys.modules.items() if name.partition(".")[0] in ("textguard", "stages")]
    sources = [Path(module.__file__) for module in loaded if getattr(module, "__file__", None)]
    versions = {"torch": str(sys.modules["torch"].__version__)} if "torch" in sys.modules else {}
    sources += sorted(code_of_users)
    return versions | {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}


def weights_mark(model: "nn.Module") -> str:
    """A fingerprint of a model's weights: 16 hexadecimal digits, the same whatever file or device the weights came from.

    It is made of all parameters and buffers: their names, dtypes, shapes and bytes, in the order of their names.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Linear(2, 1)
    >>> before = weights_mark(model)
    >>> _ = nn.init.zeros_(model.bias)
    >>> weights_mark(model) == before
    False
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        values = tensor.detach().int_repr() if tensor.is_quantized else tensor.detach()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
