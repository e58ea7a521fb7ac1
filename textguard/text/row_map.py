"""Which rows of published text features stand for each class of a data set that has other classes."""

from pathlib import Path

from textguard.artifacts import read_json, reading
from textguard.errors import InvalidArtifact, printable


def read_row_map(path: Path, classes: list[str]) -> list[list[int]]:
    """The rows of each class, in the order of `classes`.

    The file is JSON: class name -> {"rows": {"404": "airliner", ...}, "why": "..."}, with a word for every row and for every
    class, because a map that nobody can check is worth nothing. Raises InvalidArtifact.
    """
    stated = read_json(path, "")
    with reading(path, ""):
        if not isinstance(stated, dict) or set(stated) != set(classes):
            named = ", ".join(map(str, stated)) if isinstance(stated, dict) else type(stated).__name__
            raise InvalidArtifact(f"must have one entry for each of {', '.join(classes)}, and has {printable(named, 200)}")
        return [_rows(name, stated[name]) for name in classes]


def _rows(name: str, entry: object) -> list[int]:
    rows = entry.get("rows") if isinstance(entry, dict) else None
    if not isinstance(rows, dict) or not rows or set(entry) != {"rows", "why"} or not isinstance(entry["why"], str):
        raise InvalidArtifact(f'must give class {name!r} {{"rows": {{"404": "airliner"}}, "why": "a reason"}}')
    if wrong := [row for row in rows if not (row.isascii() and row.isdecimal())]:
        raise InvalidArtifact(f"names row {printable(wrong[0], 60)!r} for class {name!r}; rows are numbers from 0")
    return [int(row) for row in rows]
