"""The reference of all JSON files, from their models: python -m textguard.schema.document > docs/outputs.md."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel

from textguard.schema.assessment import StoredAssessment
from textguard.schema.base import Measured, Stored
from textguard.schema.campaign import StoredCampaign
from textguard.schema.closeup import CloseUp
from textguard.schema.corruptions import ComparedCorruptions, Corruptions
from textguard.schema.effects import Effects
from textguard.schema.evaluation import Evaluation
from textguard.schema.hardware import Hardware, HardwareCell
from textguard.schema.results import Cell, RunResult, SummaryLine
from textguard.schema.texts import TextQuality
from textguard.schema.times import RunTimes

LIBRARY = "assess"  # no stage
WRITERS = {
    "": "Every stage that ends well writes its part.",
    LIBRARY: "`Assessment.save(FOLDER)` and `textguard assess --out FOLDER` write it.",
}
# Path -> the stage that writes it (all, where none is named), what the file is, and the model of it, or of each of its entries.
FILES: dict[str, tuple[str, str, type[Stored]]] = {
    "metrics/texts/TEXT.json": ("text_quality", "", TextQuality),
    "metrics/runs/RUN/evaluation.json": ("evaluate", "", Evaluation),
    "metrics/runs/RUN/campaign.json": ("inject", "", StoredCampaign),
    "metrics/closeup/RUN.json": ("closeup", "", CloseUp),
    "metrics/hardware/RUN.json": ("hardware", "", Hardware),
    "metrics/corruptions/RUN.json": ("corruptions", "", Corruptions),
    "metrics/results/RUN.json": ("results", "", RunResult),
    "metrics/cells.json": ("results", "A list with one such object per cell that has a baseline.", Cell),
    "metrics/contrasts.json": ("results", "A list with one such object per pair of text-guided variants.", Cell),
    "metrics/hardware.json": ("results", "A list with one such object per cell that has a baseline.", HardwareCell),
    "metrics/effects.json": ("effects", "A list with one such object per backbone on a data set.", Effects),
    "metrics/corruptions.json": ("results", "", ComparedCorruptions),
    "metrics/summary.json": ("results", "Data set -> backbone -> variant -> such an object.", SummaryLine),
    "FOLDER/assessment.json": (
        "*",
        "`Assessment.save(FOLDER)` and `textguard assess --out FOLDER` write it.",
        StoredAssessment,
    ),
    "metrics/run.json": ("", "`python -m textguard.timing` shows it.", RunTimes),
}
HEAD = """# What the stages' JSON files hold

Written by `python -m textguard.schema.document > docs/outputs.md`; the models are in `textguard/schema/`.
RUN is DATASET-BACKBONE-VARIANT-SEED, TEXT is DATASET-VARIANT. NaN and infinities are null.
Readers refuse keys that they do not know.
`data/DATASET/classes.json` is a plain list of class names in label order.
"""
NAMES = {str: "text", int: "whole number", float: "number", bool: "yes or no", Any: "anything", type(None): "null"}


def document() -> str:
    """The reference, in Markdown."""
    parts = [HEAD, _section(Measured, "## Measured")]
    explained = {Measured}
    for path, (stage, shape, model) in FILES.items():
        writer = WRITERS.get(stage, f"Stage `{stage}` writes it.")
        parts.append(f"## {path}\n\n{writer} {shape}".rstrip() + "\n")
        for number, part in enumerate(_models(model)):
            if part not in explained:
                explained.add(part)
                parts.append(_section(part, "" if number == 0 else f"### {part.__name__}"))
    return "\n".join(parts)


def _section(model: type, heading: str) -> str:
    """A model's description, and a table of its fields."""
    described = " ".join((model.__doc__ or "").split())
    lines = [heading, ""] if heading else []
    lines += [described, "", "| field | type | unit | meaning |", "| --- | --- | --- | --- |"]
    hints = typing.get_type_hints(model)
    for name, field in _fields(model).items():
        unit = (field.json_schema_extra or {}).get("unit", "")
        lines.append(f"| `{name}` | {_type_name(hints[name], absent=field.default is None)} | {unit} | {field.description} |")
    return "\n".join(lines) + "\n"


def _fields(model: type) -> dict[str, Any]:
    return model.__pydantic_fields__


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind))


def _models(model: type) -> Iterator[type]:
    """A model, and those that its fields hold, each as soon as it is named."""
    yield model
    for hint in typing.get_type_hints(model).values():
        for kind in _inside(hint):
            yield from _models(kind)


def _inside(hint: Any) -> Iterator[type]:
    if _is_model(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from _inside(part)


def _type_name(hint: Any, *, absent: bool = False) -> str:
    """A type in words. absent: whether a field without a value is not in the file; else it is null."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_name(part) for part in arguments if not (absent and part is type(None)))
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"{_type_name(arguments[0])} -> {_type_name(arguments[1])}"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    return NAMES.get(hint) or f"[{hint.__name__}](#{hint.__name__.lower()})"


if __name__ == "__main__":
    print(document(), end="")
