"""Hostile values, and ways to spoil a file of each format.

Every mutation draws what it does from `Choices`, so that a list of numbers repeats it. Each says what it did in words.
"""

import argparse
import csv
import io
import json
import math
import os
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load, save

Item = TypeVar("Item")
MARKER = "EXECUTED"  # a file that hostile code makes, where it is run
HTML = b"<!doctype html><html><body>404 Not Found</body></html>\n"
DEEP = 100_000


@dataclass
class Choices:
    """Numbers from somewhere, and what was made of them. draw: from N to a number of 0 <= n < N."""

    draw: Callable[[int], int]
    drawn: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def number(self, below: int) -> int:
        """A number of 0 <= n < below."""
        self.drawn.append(self.draw(below) % below if below > 1 else 0)
        return self.drawn[-1]

    def of(self, items: Sequence[Item]) -> Item:
        """One of these."""
        return items[self.number(len(items))]

    def say(self, *words: object) -> None:
        """Remember what a choice was."""
        self.said.append(" ".join(str(word) if len(str(word)) < 120 else f"{str(word)[:117]}..." for word in words))


def replayed(numbers: Sequence[int]) -> Choices:
    """The choices of an earlier example."""
    left = list(numbers)
    return Choices(lambda below: left.pop(0) if left else 0)


@dataclass(frozen=True)
class Raw:
    """Text that stands in a JSON or YAML file as it is."""

    text: str


class Link(str):
    """In place of a file: a link that leads there."""


MISSING, FOLDER, PIPE = object(), object(), object()
SPECIALS = {
    "missing": MISSING,
    "a folder": FOLDER,
    "a pipe": PIPE,
    "a link to itself": Link("."),
    "a dead link": Link("nowhere"),
}
SPECIALS |= {"a link to /dev/zero": Link("/dev/zero"), "a link to /dev/null": Link("/dev/null")}

NUMBERS: dict[str, Any] = {
    **{"0": 0, "1": 1, "-1": -1, "0.5": 0.5, "-0.0": -0.0, "7": 7, "1.5": 1.5, "99": 99, "1e-300": 1e-300, "5e-324": 5e-324},
    **{"2^31": 2**31, "2^63": 2**63, "-2^63": -(2**63), "2^64": 2**64, "10^30": 10**30, "1e308": 1e308, "0.9999": 1 - 1e-16},
    **{
        "nan": math.nan,
        "inf": math.inf,
        "-inf": -math.inf,
        "10^400": 10**400,
        "5000 digits": Raw("1" * 5000),
        "1e999": Raw("1e999"),
    },
}
TEXTS: dict[str, str] = {
    **{
        "empty": "",
        "blank": " ",
        "letter": "x",
        "NA": "NA",
        "None": "None",
        "digits": "007",
        "true": "true",
        "dot": ".",
        "up": "../..",
    },
    **{"accent": "café", "decomposed": "cafe\u0301", "CJK": "零", "emoji": "\U0001f600", "surrogate": "\ud83d", "NUL": "a\0b"},
    **{"escape": "\x1b[31mred\x1b]0;title\x07", "newline": "a\nb", "CR": "a\rb", "separator": "a\u2028b", "BOM": "\ufeffx"},
    **{"RTL": "\u202eabc", "wide": "\u00a0", "long": "x" * 10_000, "many words": "word " * 300, "absolute": "/dev/zero"},
    **{
        "home": "~nobody/x",
        "shell": f"$(touch {MARKER})",
        "shell;": f"x; touch {MARKER}; #",
        "HTML": "<script>alert(1)</script>",
    },
    **{
        "quotes": "'\"`",
        "formula": "=cmd|'/c calc'!A0",
        "percent": "%s%n%(x)s",
        "brace": "{class}{",
        "braces": "{}{0}{class.__class__}",
    },
    **{
        "TeX": "\\input{/etc/passwd}$_^&#~",
        "Markdown": "[x](javascript:x) | @team #1 ~~x~~",
        "url": "http://example.invalid/x",
    },
}
OTHERS: dict[str, Any] = {
    **{"null": None, "true": True, "false": False, "[]": [], "{}": {}, "[[1]]": [[1]], "[null]": [None], "{a}": {"a": 1}},
    **{"deep": Raw("[" * DEEP + "]" * DEEP), "deep objects": Raw('{"a":' * 2000 + "1" + "}" * 2000)},
}
VALUES = NUMBERS | {f"text {name}": text for name, text in TEXTS.items()} | OTHERS
# Only YAML has these.
YAML_VALUES = VALUES | {
    name: Raw(text)
    for name, text in {
        **{"python": f"!!python/object/apply:os.system ['touch {MARKER}']", "date": "2024-13-45", "hex": "0x_", "octal": "0o9"},
        **{"bad int": "!!int abc", "bad float": "!!float abc", "bad bool": "!!bool maybe", "bad time": "!!timestamp x"},
        **{"binary": "!!binary aGVsbG8=", "bad binary": "!!binary '***'", "set": "!!set {a, b}", "omap": "!!omap [a: 1]"},
        **{"good date": "2024-01-01", "sexagesimal": "190:20:30", "underscores": "1_000", "no": "no", "unknown tag": "!x 1"},
        **{"alias": "*nothing", "loop": "&a [*a]", "loop of objects": "&a {x: *a}", "merge": "{<<: 1}", "tilde": "~"},
        "bomb": "{b0: &b0 [x, x, x, x, x, x, x, x, x], "
        + ", ".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]" for n in range(1, 10))
        + "}",
    }.items()
}
# A key twice: written under the second name, and renamed in the text.
TWICE = "@twice@"


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of a tree of JSON, the root first. Of long lists only the first and last few."""
    found = [path]
    if isinstance(tree, dict):
        for key in tree:
            found += nodes(tree[key], (*path, key))
    elif isinstance(tree, list):
        for index in [*range(min(3, len(tree))), *range(max(3, len(tree) - 1), len(tree))]:
            found += nodes(tree[index], (*path, index))
    return found


def at(tree: Any, path: Sequence[Any]) -> Any:
    """What is at a place of a tree."""
    for step in path:
        tree = tree[step]
    return tree


def in_tree(tree: Any, choices: Choices, values: dict[str, Any] = VALUES) -> Any:
    """Change one place of a tree of JSON; the tree is no longer used."""
    path = choices.of(nodes(tree))
    ways = ["value", "number", "delete", "other value", "twice", "name", "wrap", "turn"]
    way = choices.of(ways if path else ways[:1])
    choices.say(".".join(map(str, path)) or "the whole", way)
    if not path:
        return _value(choices, values)
    parent, last = at(tree, path[:-1]), path[-1]
    old = parent[last]
    if way == "value":
        parent[last] = _value(choices, values)
    elif way == "number":
        name = choices.of([name for name in NUMBERS if name in values])
        choices.say(name)
        parent[last] = values[name]
    elif way == "delete":
        del parent[last]
    elif way == "other value":
        place = choices.of(nodes(tree))
        choices.say("from", ".".join(map(str, place)))
        parent[last] = json.loads(_dumps(at(tree, place)))  # no loops
    elif way == "twice" and isinstance(parent, list):
        parent.insert(last, old)
    elif way == "twice":
        parent[f"{last}{TWICE}"] = _value(choices, values)
    elif way == "name" and isinstance(parent, dict):
        name = choices.of(list(TEXTS))
        choices.say(name)
        changed = {TEXTS[name] if key == last else key: value for key, value in parent.items()}
        parent.clear()
        parent.update(changed)
    elif way == "turn" and isinstance(old, list | dict):
        parent[last] = old[::-1] if isinstance(old, list) else dict(reversed(old.items()))
    elif way == "turn" and isinstance(old, int | float) and not isinstance(old, bool):
        parent[last] = choices.of([-old, 10 * old, old + 1, str(old), float(old)])
        choices.say(parent[last])
    else:
        parent[last] = choices.of([[old], {"value": old}])
    return tree


def _value(choices: Choices, values: dict[str, Any]) -> Any:
    name = choices.of(list(values))
    choices.say(name)
    return values[name]


def dumps(tree: Any) -> str:
    """A tree as JSON, or YAML in JSON's form, with raw texts and names that are there twice."""
    return _dumps(tree, ascii_only=False).replace(TWICE, "")


def _dumps(tree: Any, *, ascii_only: bool = True) -> str:
    raws: list[str] = []

    def mark(node: Any) -> Any:
        if isinstance(node, Raw):
            raws.append(node.text)
            return f"@raw{len(raws) - 1}@"
        if isinstance(node, dict):
            return {key: mark(value) for key, value in node.items()}
        if isinstance(node, list):
            return [mark(value) for value in node]
        if isinstance(node, int) and abs(node) > 10**300:
            raws.append("1" + "0" * 400)
            return f"@raw{len(raws) - 1}@"
        return node

    text = json.dumps(mark(tree), ensure_ascii=ascii_only)
    text = re.sub(r'"@raw(\d+)@"', lambda found: raws[int(found[1])], text)
    return re.sub(r"[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def spoil_bytes(content: bytes, choices: Choices) -> bytes:
    """Damage that needs to know no format."""
    way = choices.of(["empty", "cut", "flip", "extend", "NUL", "BOM", "CRLF", "Latin-1", "HTML", "twice", "hole", "deep"])
    place = choices.number(max(1, len(content)))
    choices.say(way, f"at byte {place}")
    bit = 1 << choices.number(8) if way == "flip" else 0
    return {
        "empty": lambda: b"",
        "cut": lambda: content[:place],
        "flip": lambda: content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :] if content else b"",
        "extend": lambda: content + b"\0junk",
        "NUL": lambda: content[:place] + b"\0" + content[place:],
        "BOM": lambda: b"\xef\xbb\xbf" + content,
        "CRLF": lambda: content.replace(b"\n", b"\r\n"),
        "Latin-1": lambda: content[:place] + b"\xe9" + content[place:],
        "HTML": lambda: HTML,
        "twice": lambda: content + content,
        "hole": lambda: content[:place] + content[place + 1 + len(content) // 10 :],
        "deep": lambda: b"[" * DEEP,
    }[way]()


def spoil_json(content: bytes, choices: Choices) -> bytes:
    """A JSON file with one other value, name or place."""
    return dumps(in_tree(json.loads(content), choices)).encode()


def spoil_yaml(content: bytes, choices: Choices) -> bytes:
    """A params.yaml in JSON's form with one other value, name or place."""
    text = dumps(in_tree(json.loads(content), choices, YAML_VALUES))
    return re.sub(r"(?<![\w\"])(-?)(NaN|Infinity)", lambda n: f"{n[1]}.{'nan' if n[2] == 'NaN' else 'inf'}", text).encode()


def spoil_lines(content: bytes, choices: Choices, seal: Callable[[dict], str] | None = None) -> bytes:
    """JSON Lines of which one is changed, missing, or there twice. seal: writes a line so that its checksum is right."""
    lines = content.decode().splitlines()
    number = choices.number(len(lines))
    way = choices.of(["tree", "tree", "tree", "delete", "twice", "turn", "copy", "blank", "text"])
    choices.say(f"line {number + 1}", way)
    if way == "tree":
        tree = in_tree(json.loads(lines[number]), choices)
        lines[number] = seal(tree) if seal and isinstance(tree, dict) else dumps(tree)
    elif way == "delete":
        del lines[number]
    elif way == "twice":
        lines.insert(number, lines[number])
    elif way == "turn":
        lines.reverse()
    elif way == "copy":
        lines[number] = lines[choices.number(len(lines))]
    else:
        lines[number] = "" if way == "blank" else lines[number][: choices.number(len(lines[number]))]
    return "".join(f"{line}\n" for line in lines).encode()


def spoil_csv(content: bytes, choices: Choices) -> bytes:
    """A CSV file with one other cell, row or column."""
    rows = list(csv.reader(io.StringIO(content.decode())))
    row, column = choices.number(len(rows)), choices.number(len(rows[0]))
    way = choices.of(["number", "text", "row", "column", "twice", "turn", "rows", "name", "separator", "swap"])
    choices.say(way, f"row {row}, column {rows[0][column]}")
    if way in ("number", "text"):
        pool = {
            name: str(value.text if isinstance(value, Raw) else value) for name, value in NUMBERS.items() if name != "10^400"
        }
        pool = pool if way == "number" else TEXTS
        name = choices.of(list(pool))
        choices.say(name)
        rows[row][column] = pool[name]
    elif way == "row":
        del rows[row]
    elif way == "twice":
        rows.insert(row, rows[row])
    elif way == "turn":
        rows[1:] = rows[:0:-1]
    elif way == "rows":
        del rows[1 + choices.number(len(rows)) :]
    elif way == "name":
        rows[0][column] = choices.of(["", "x", rows[0][0]])
    elif way == "swap":
        other = choices.number(len(rows))
        rows[row], rows[other] = rows[other], rows[row]
    elif way == "column":
        rows = [cells[:column] + cells[column + 1 :] for cells in rows]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n", delimiter=";" if way == "separator" else ",").writerows(rows)
    return out.getvalue().encode(errors="surrogatepass")


def _arrow_types() -> dict[str, pa.DataType]:
    types = {"int8": pa.int8(), "uint8": pa.uint8(), "bool": pa.bool_(), "float16": pa.float16(), "float64": pa.float64()}
    types |= {"int64": pa.int64(), "text": pa.string(), "bytes": pa.binary(), "null": pa.null(), "time": pa.timestamp("ns")}
    return types | {
        "list": pa.list_(pa.int64()),
        "decimal": pa.decimal128(38, 10),
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
    }


def spoil_parquet(content: bytes, choices: Choices) -> bytes:
    """A Parquet file with other values, rows, columns, types, or metadata."""
    table = pq.read_table(io.BytesIO(content))
    metadata = dict(table.schema.metadata or {})
    names = table.column_names
    index = choices.number(len(names))
    way = choices.of(
        ["value", "all values", "type", "column", "name", "add", "rows", "turn", "twice", "half", "shuffle", "metadata"]
    )
    choices.say(way, names[index])
    column = table.column(index)
    if way in ("value", "all values"):
        pool = _values_of(column.type)
        name = choices.of(list(pool))
        row = choices.number(max(1, len(table)))
        values = column.to_pylist()
        values = (
            [pool[name]] * len(values) if way == "all values" else [pool[name] if n == row else v for n, v in enumerate(values)]
        )
        choices.say(name, f"in row {row}")
        table = table.set_column(index, names[index], pa.array(values, column.type))
    elif way == "type":
        name = choices.of(list(_arrow_types()))
        choices.say(name)
        table = table.set_column(index, names[index], _cast(column, _arrow_types()[name]))
    elif way == "column":
        table = table.drop_columns([names[index]])
    elif way == "name":
        table = table.rename_columns([choices.of(["x", "", names[0]]) if n == index else name for n, name in enumerate(names)])
    elif way == "add":
        table = table.append_column(choices.of(["x", names[index]]), column)
    elif way == "rows":
        table = table.slice(0, choices.of([0, 1]))
    elif way == "half":
        table = table.slice(0, len(table) // 2)
    elif way == "turn":
        table = table.take(list(range(len(table)))[::-1])
    elif way == "shuffle":
        values = column.to_pylist()
        table = table.set_column(index, names[index], pa.array(values[1:] + values[:1], column.type))
    elif way == "twice":
        table = pa.concat_tables([table, table])
    elif metadata:
        metadata = _spoil_texts({key.decode(): text.decode() for key, text in metadata.items()}, choices)
    out = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), out)
    return out.getvalue()


def _values_of(kind: pa.DataType) -> dict[str, Any]:
    """Hostile values that an Arrow column can hold."""
    if pa.types.is_floating(kind):
        return {"null": None, "nan": math.nan, "inf": math.inf, "-1": -1.0, "0": 0.0, "99": 99.0, "1e30": 1e30, "1e308": 1e30}
    if pa.types.is_integer(kind):
        unsigned, bits = str(kind).startswith("u"), kind.bit_width
        most = 2 ** (bits - (not unsigned)) - 1
        return {"null": None, "0": 0, "1": 1, "99": 99, "most": most} | (
            {} if unsigned else {"-1": -1, "-100": -100, "least": -most - 1}
        )
    if pa.types.is_boolean(kind):
        return {"null": None, "true": True, "false": False}
    if pa.types.is_binary(kind):
        return {"null": None, "empty": b"", "HTML": HTML}
    if pa.types.is_list(kind):
        return {"null": None, "empty": [], "one": [0.0], "nan": [math.nan] * 4}
    texts = {name: text for name, text in TEXTS.items() if name != "surrogate"}
    return {"null": None} | (texts if pa.types.is_string(kind) or pa.types.is_large_string(kind) else {})


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    try:
        return column.cast(kind, safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.nulls(len(column), kind)


def _spoil_texts(metadata: dict[str, str], choices: Choices) -> dict[str, str]:
    """Change a text of a file's metadata; many are JSON themselves, some twice over."""
    name = choices.of(sorted(metadata))
    way = choices.of(["tree", "tree", "tree", "text", "delete", "bytes"])
    choices.say(name, way)
    try:
        tree = json.loads(metadata[name])
    except ValueError:
        tree, way = None, "text" if way == "tree" else way
    if way == "tree":
        inner = isinstance(tree, dict) and sorted(
            key for key, value in tree.items() if isinstance(value, str) and value[:1] in "[{"
        )
        if inner and choices.number(3):
            tree |= _spoil_texts({inner[0]: tree[inner[0]]}, choices) or {inner[0]: None}
        else:
            tree = in_tree(tree, choices)
        metadata[name] = dumps(tree)
    elif way == "text":
        text = choices.of([text for text in TEXTS if text != "surrogate"])
        choices.say(text)
        metadata[name] = TEXTS[text]
    elif way == "delete":
        del metadata[name]
    else:
        metadata[name] = spoil_bytes(metadata[name].encode(), choices).decode(errors="replace")
    return metadata


DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn]
FILLS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "-1": -1.0, "0": 0.0, "1e30": 1e30, "99": 99.0, "-100": -100.0}


def spoil_safetensors(content: bytes, choices: Choices) -> bytes:
    """A safetensors file with other tensors or metadata."""
    tensors = load(content)
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size]).get("__metadata__", {})
    if metadata and (not tensors or not choices.number(3)):
        metadata = _spoil_texts(metadata, choices)
    elif tensors:
        tensors = spoil_tensors(tensors, choices)
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata or None)


def spoil_tensors(tensors: dict[str, torch.Tensor], choices: Choices) -> dict[str, torch.Tensor]:
    """A state dict, or another set of tensors, of which one is changed."""
    name = choices.of(sorted(tensors))
    way = choices.of(["fill", "one", "type", "shape", "delete", "name", "add", "all types", "turn", "half"])
    choices.say(way, name)
    tensor = tensors[name].clone()
    if way in ("fill", "one"):
        fill = choices.of(list(FILLS))
        choices.say(fill)
        value = FILLS[fill] if tensor.is_floating_point() or math.isfinite(FILLS[fill]) else 0
        value = value if tensor.is_floating_point() else int(min(value, 99)) % (256 if tensor.dtype == torch.uint8 else 2**31)
        value = -100 if fill == "-100" and tensor.dtype == torch.int64 else value
        (tensor if way == "fill" else tensor.view(-1)[:1]).fill_(value)
    elif way == "type":
        dtype = choices.of(DTYPES)
        choices.say(dtype)
        tensor = tensor.to(dtype)
    elif way == "shape":
        shape = choices.of(["flat", "one more", "empty", "scalar", "twice"])
        choices.say(shape)
        tensor = {
            "flat": tensor.reshape(-1),
            "one more": tensor[None],
            "empty": tensor.reshape(-1)[:0],
            "scalar": torch.tensor(1.0),
            "twice": torch.cat([tensor.reshape(1, -1)] * 2).reshape(
                2 * max(1, tensor.shape[0] if tensor.ndim else 1), *tensor.shape[1:]
            ),
        }[shape]
    elif way == "turn" and tensor.ndim:
        tensor = tensor.flip(0)
    elif way == "half" and tensor.ndim:
        tensor = tensor[: len(tensor) // 2].clone()
    elif way == "all types":
        dtype = choices.of(DTYPES)
        choices.say(dtype)
        return {key: value.to(dtype) for key, value in tensors.items()}
    elif way == "add":
        return tensors | {choices.of(["x", f"module.{name}", ""]): tensor}
    else:
        rest = {key: value for key, value in tensors.items() if key != name}
        return rest | ({f"{name}.x": tensor} if way == "name" else {})
    return tensors | {name: tensor}


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARKER}",)


def spoil_pth(content: bytes, choices: Choices) -> bytes:
    """What torch.save writes of hostile things. content: a state dict, or one tensor."""
    tensors = torch.load(io.BytesIO(content), weights_only=True)
    alone = "alone" if isinstance(tensors, torch.Tensor) else None
    tensors = {alone: tensors} if alone else tensors
    name = choices.of(sorted(tensors))
    first = tensors[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        contents: dict[str, Callable[[], Any]] = {
            "other tensors": lambda: spoil_tensors(tensors, choices),
            "complex": lambda: tensors | {name: first.to(torch.complex64)},
            "large doubles": lambda: tensors | {name: first.double() + 1e300},
            "sparse": lambda: tensors | {name: first.float().reshape(-1).to_sparse()},
            "quantised": lambda: tensors | {name: torch.quantize_per_tensor(first.float(), 0.1, 0, torch.qint8)},
            "nested": lambda: tensors | {name: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])},
            "meta": lambda: tensors | {name: first.to("meta")},
            "expanded": lambda: tensors | {name: torch.zeros(1).expand(10**12)},
            "a parameter": lambda: tensors | {name: torch.nn.Parameter(first.float())},
            "module. twice": lambda: tensors | {f"module.{name}": first + 1},
            "a number as a name": lambda: tensors | {7: first},
            "None as a name": lambda: tensors | {None: first},
            "bytes as a name": lambda: tensors | {b"x": first},
            "a number": lambda: tensors | {name: 7},
            "None": lambda: tensors | {name: None},
            "an array": lambda: tensors | {name: np.zeros(3)},
            "a list": lambda: list(tensors.values()),
            "a tensor": lambda: first,
            "nothing": lambda: {},
            "a text": lambda: "weights",
            "under model": lambda: {"model": {"model": tensors}},
            "under model, a list": lambda: {"model": [tensors]},
            "with arguments": lambda: {"model": tensors, "args": argparse.Namespace(x=1)},
            "code": lambda: tensors | {name: _Code()},
            "code beside": lambda: {"model": tensors, "args": _Code()},
            "bytes": bytes,
            "a plain pickle": bytes,
            "code in a plain pickle": bytes,
        }
        way = choices.of(list(contents))
        choices.say(way, name)
        if way == "bytes":
            return spoil_bytes(content, choices)
        if "plain pickle" in way:
            return pickle.dumps(_Code() if "code" in way else {"model": 1})
        out = io.BytesIO()
        made = contents[way]()
        torch.save(made[alone] if alone and isinstance(made, dict) and list(made) == [alone] else made, out)
        return out.getvalue()


def spoil_picture(content: bytes, choices: Choices) -> bytes:
    """A picture of another format, size or mode, a damaged one, or no picture."""
    way = choices.of(["bytes", "mode", "format", "size", "EPS", "SVG", "bomb", "HTML"])
    choices.say(way)
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    kind = "PNG"
    if way == "bytes":
        return spoil_bytes(content, choices)
    if way == "mode":
        mode = choices.of(["1", "L", "LA", "P", "RGBA", "I", "I;16", "F", "CMYK"])
        choices.say(mode)
        picture = picture.convert("I").convert(mode) if mode == "I;16" else picture.convert(mode)
        kind = "TIFF" if mode in ("F", "CMYK") else "PNG"
    elif way == "format":
        kind = choices.of(["JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "PCX", "SGI", "PDF", "JPEG2000"])
        choices.say(kind)
    elif way == "size":
        size = choices.of([(1, 1), (1, 5000), (5000, 1), (3, 3)])
        choices.say(size)
        picture = picture.resize(size)
    elif way == "EPS":
        return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n(EXECUTED) (w) file closefile\nshowpage\n"
    elif way == "SVG":
        return b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>'
    elif way == "HTML":
        return HTML
    elif way == "bomb":
        out = io.BytesIO()
        Image.new("1", (20_000, 20_000)).save(out, "PNG")
        return out.getvalue()
    out = io.BytesIO()
    picture.save(out, kind)
    return out.getvalue()


def put(path: Path, content: Any) -> None:
    """Put bytes, or something else than a file, in place of a file."""
    if path.is_symlink() or path.exists():
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, Link):
        path.symlink_to(path.name if content == "." else content)
    elif content is FOLDER:
        path.mkdir()
    elif content is PIPE:
        os.mkfifo(path)
