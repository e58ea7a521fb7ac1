"""Lists of faults from files: those of dnn-benchmarks, and our own.

dnn-benchmarks (github.com/cad-polito-it/dnn-benchmarks, Apache-2.0) publishes networks, lists of faults in their weights, and
what each fault did to all test images. Its lists have the columns Injection, Layer (a module), TensorIndex (a place in its
weight, such as "(3, 0, 2, 1)") and Bit; with outcomes, also n_injections, masked, non_critical and critical.
"""

import os
import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
from torch import Tensor, nn

from textguard.artifacts import reading
from textguard.errors import InvalidArtifact, InvalidParameter, Setting, printable
from textguard.faults.checks import folder_path
from textguard.faults.graph import unwrapped
from textguard.faults.sites import uncompiled
from textguard.hardware.stored import PERSISTENT_COLUMNS, tensors_of

SUFFIXES = (".csv", ".csv.xz", ".csv.gz", ".csv.bz2")
OUTCOMES = ("n_injections", "masked", "non_critical", "critical")
_THEIRS = ("Layer", "TensorIndex", "Bit")
_OWN = ("layer", "neuron", "bit")


def read_fault_list(path: str | os.PathLike[str], model: nn.Module) -> pd.DataFrame:
    r"""Read a list of faults in a model's stored values.

    Parameters
    ----------
    path : str or path-like
        A CSV file, which may be compressed: .csv, .csv.xz, .csv.gz or .csv.bz2. Either with the columns Layer, TensorIndex and
        Bit, as dnn-benchmarks has them, where a layer is a module and its weight is hit. Or with layer, neuron and bit, as
        `draw_persistent` gives them, where a layer is a tensor's name, or a module's for its weight; rows of one fault in
        several bits share an `index`.
    model : torch.nn.Module
        The model whose values they are.

    Returns
    -------
    pandas.DataFrame
        A plan for `run_persistent`, in the file's order, and what the file has of n_injections, masked, non_critical and
        critical: int64, to compare with.

    Raises
    ------
    InvalidArtifact
        The file cannot be read, or a row is none: the first such row is named, its column, and what is allowed. Rows are
        counted from 1, behind the header.
    InvalidParameter
        The path is none, or of another kind of file.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from torch import nn
    >>> from textguard.hardware.lists import read_fault_list
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "faults.csv")
    ...     _ = file.write_text('Injection,Layer,TensorIndex,Bit\n0,conv,"(1, 0, 2, 1)",30\n')
    ...     read_fault_list(file, nn.ModuleDict({"conv": nn.Conv2d(1, 2, 3)}))
             layer  index  neuron  bit
    0  conv.weight      0      16   30
    """
    file = folder_path(Setting("plan"), path)
    if file is None or not file.name.endswith(SUFFIXES):
        raise InvalidParameter(
            Setting("plan"), f" is {printable(repr(path), 100)}; a list of faults is a file {', '.join(SUFFIXES)}"
        )
    tensors = {name: tensor for name, tensor in tensors_of(uncompiled(unwrapped(model))).items() if tensor.is_floating_point()}
    with reading(file, ""):
        table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8", skipinitialspace=True)
        if not isinstance(table.index, pd.RangeIndex):
            raise InvalidArtifact("has rows with more cells than its header")
        theirs = all(column in table for column in _THEIRS)
        if not theirs and not all(column in table for column in _OWN):
            raise InvalidArtifact(
                f"has the columns {printable(', '.join(table.columns), 100)}; "
                f"needed are {', '.join(_THEIRS)} or {', '.join(_OWN)}"
            )
        if not len(table):
            raise InvalidArtifact("lists no faults; at least one is needed")
        plan = _parse(table, tensors, _THEIRS if theirs else _OWN)
        for column in OUTCOMES:
            if column in table:
                plan[column] = _whole_numbers(table[column], column)
    return plan


def _parse(table: pd.DataFrame, tensors: Mapping[str, Tensor], columns: tuple[str, str, str]) -> pd.DataFrame:
    """The plan of a table of texts. Raises InvalidArtifact."""
    layer, place, bit = columns
    names = {name: name if name in tensors else f"{name}.weight" for name in table[layer].unique()}
    for row, name in enumerate(table[layer]):
        if names[name] not in tensors:
            known = ", ".join(list(tensors)[:3])
            raise _bad(row, layer, name, f"a tensor of the model, or a module with a weight, such as {known}")
    layers = table[layer].map(names)
    if place == "TensorIndex":
        neuron = [_flat(row, text, tuple(tensors[layers.iloc[row]].shape)) for row, text in enumerate(table[place])]
    else:
        neuron = _whole_numbers(table[place], place)
        for row, value in enumerate(neuron):
            size = tensors[layers.iloc[row]].numel()
            if value >= size:
                raise _bad(row, place, value, f"from 0 to {size - 1} in {layers.iloc[row]!r}")
    bits = _whole_numbers(table[bit], bit)
    most = layers.map({name: tensor.element_size() * 8 - 1 for name, tensor in tensors.items()})
    if (bits > most).any():
        row = int((bits > most).argmax())
        raise _bad(row, bit, int(bits.iloc[row]), f"from 0 to {most.iloc[row]} in {layers.iloc[row]!r}")
    index = _whole_numbers(table["index"], "index") if "index" in table else pd.Series(range(len(table)))
    return pd.DataFrame({"layer": layers, "index": index, "neuron": np.asarray(neuron, dtype=np.int64), "bit": bits})[
        PERSISTENT_COLUMNS
    ]


def _flat(row: int, text: str, shape: tuple[int, ...]) -> int:
    """An index such as "(3, 0, 2, 1)" in the flattened tensor."""
    allowed = f"{len(shape)} numbers within {shape}, such as ({', '.join('0' * len(shape))}{',' if len(shape) == 1 else ''})"
    if not re.fullmatch(r"[(\[]?\s*\d{1,15}(\s*,\s*\d{1,15})*\s*,?\s*[)\]]?", text):
        raise _bad(row, "TensorIndex", text, allowed)
    place = tuple(map(int, re.findall(r"\d+", text)))
    if len(place) != len(shape) or any(one >= size for one, size in zip(place, shape, strict=True)):
        raise _bad(row, "TensorIndex", text, allowed)
    return int(np.ravel_multi_index(place, shape))


def _whole_numbers(column: pd.Series, name: str) -> pd.Series:
    bad = ~column.str.fullmatch(r"\s*\d{1,18}\s*")
    if bad.any():
        raise _bad(int(bad.argmax()), name, column[bad].iloc[0], "a whole number from 0 up")
    return column.astype("int64")


def _bad(row: int, column: str, value: object, allowed: str) -> InvalidArtifact:
    return InvalidArtifact(f"has {printable(repr(value), 60)} in row {row + 1}, column {column}; allowed: {allowed}")
