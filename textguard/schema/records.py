"""What stages write in bulk, as Parquet files: injections and predictions, with what each of their columns can hold."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from textguard.artifacts import read_parquet, reading
from textguard.errors import InvalidArtifact

Rule = tuple[str, Callable[[pd.Series], bool]]


def _whole(below: int) -> Rule:
    return (
        f"whole numbers from 0 to {below - 1}",
        lambda column: column.dtype.kind == "i" and column.between(0, below - 1).all(),
    )


def _numbers(what: str, allowed: Callable[[np.ndarray], np.ndarray]) -> Rule:
    return what, lambda column: column.dtype.kind == "f" and bool(allowed(column.to_numpy()).all())


TEXT: Rule = ("text", lambda column: all(isinstance(value, str) for value in column.unique()))
COUNT, ANY = _whole(2**62), _numbers("numbers", lambda values: np.ones(len(values), dtype=bool))
FLAG: Rule = ("true or false", lambda column: column.dtype.kind == "b")
LOSS = _numbers("finite numbers of at least 0", lambda values: np.isfinite(values) & (values >= 0))
SHARE = _numbers("numbers from 0 to 1", lambda values: (values >= 0) & (values <= 1))
COLUMNS: dict[str, Rule] = {
    **{"layer": TEXT, "index": COUNT, "image": COUNT, "neuron": COUNT, "bit": _whole(64)},
    "weight": _numbers("finite numbers above 0", lambda values: np.isfinite(values) & (values > 0)),
    **{"golden_value": ANY, "faulty_value": ANY, "detected": FLAG, "masked": FLAG, "golden_loss": LOSS},
    "faulty_loss": _numbers("numbers of at least 0, or NaN", lambda values: ~(values < 0)),
    **{"mismatch": FLAG, "detector": TEXT},
    **{"label": COUNT, "prediction": COUNT, "loss": LOSS, "correct": FLAG, "eligible": FLAG},
    **{"top2diff": SHARE, "class": TEXT, "state": TEXT, "finite": FLAG, "predicted": TEXT},
    # NaN where the faulty logits are.
    "confidence": _numbers("numbers from 0 to 1, or NaN", lambda values: ~((values < 0) | (values > 1))),
    "map": ("lists of numbers", lambda column: all(np.asarray(values).dtype.kind == "f" for values in column)),
    "picture": ("bytes", lambda column: all(isinstance(value, bytes) for value in column)),
}


def read_columns(path: Path, made_by: str, columns: Sequence[str], most: int, missing: Sequence[str] = ()) -> pd.DataFrame:
    """Some columns of a Parquet file, in their order. most: rows that it can have; a small file may hold any number of them.

    missing: columns in which NaN stands for what there is not.

    Raises InvalidArtifact, also where a column holds what it cannot; see COLUMNS.
    """
    with reading(path, made_by):
        if ("detector" in pq.read_schema(path).names) != ("detector" in columns):
            raise InvalidArtifact("is not what its name says: only injections under compared detectors have a detector")
        rows = pq.read_metadata(path).num_rows
        if rows > most:
            raise InvalidArtifact(f"has {rows:,} rows, and there can be {most:,}")
    table = read_parquet(path, made_by, list(columns))[list(columns)]
    with reading(path, made_by):
        for name in columns:
            what, holds = COLUMNS[name]
            if len(table) and not holds(table[name].dropna() if name in missing else table[name]):
                raise InvalidArtifact(f"has a column {name} that holds anything else than {what}")
    return table


def inputs_of(path: Path, made_by: str) -> str:
    """The fingerprint of what went into a campaign, which its Parquet files carry; empty where there is none."""
    with reading(path, made_by):
        return (pq.read_schema(path).metadata or {}).get(b"inputs", b"").decode()


def check_injections(records: pd.DataFrame, rows_each: int) -> None:
    """Check that every injection has all of its rows, one per damaged bit, and that these agree in what they share.

    Raises InvalidArtifact, without the file's name.
    """
    name = ["layer", "index"]
    sizes = records.groupby(name, sort=False).size()
    if (sizes != rows_each).any():
        layer, index = sizes[sizes != rows_each].index[0]
        raise InvalidArtifact(
            f"has {sizes[layer, index]} rows of injection {index} into layer {layer!r}, instead of {rows_each}"
        )
    if records.duplicated([*name, "neuron", "bit"]).any():
        raise InvalidArtifact("has a damaged bit twice")
    shared = [*name, "image", "weight", "masked", "golden_loss", "faulty_loss", "mismatch"]
    if len(records.drop_duplicates(shared)) != len(sizes):
        raise InvalidArtifact("has injections whose rows differ in what they share")
    if (records["masked"] & records["mismatch"]).any():
        raise InvalidArtifact("has injections that left no trace, and another class")
