"""What all models share: estimates with their intervals, units, reading with one clear error."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    model_serializer,
)
from pydantic.dataclasses import dataclass

from textguard.artifacts import parse_json, reading, write_json
from textguard.errors import InvalidArtifact
from textguard.estimates.statistics import Estimate

Kind = TypeVar("Kind")


def field(meaning: str, unit: str = "", **rules: Any) -> Any:
    """A field of a model, with what docs/outputs.md says of it. rules: passed on to pydantic's `Field`."""
    return Field(description=meaning, json_schema_extra={"unit": unit}, **rules)


# JSON has neither NaN nor infinities: files hold null for all three, and readers get NaN.
Number = Annotated[
    float,
    BeforeValidator(lambda number: math.nan if number in (None, math.inf, -math.inf) else number),
    PlainSerializer(lambda number: None if math.isnan(number) else number, when_used="json"),
]


class Stored(BaseModel):
    """A JSON object. Unknown keys are ignored, so that a file of a newer version can be read."""

    model_config = ConfigDict(frozen=True, strict=True)

    def as_json(self) -> dict[str, Any]:
        """The object as its file holds it: fields in their order, without those that were not given."""
        return self.model_dump(mode="json", exclude_unset=True)


@dataclass(frozen=True, config=ConfigDict(strict=True))
class Measured(Estimate):
    """A number with its interval. low = value = high where nothing was sampled."""

    value: Number = field("the estimate; null where there is none")
    low: Number = field("lower end of the interval; null where it is unbounded")
    high: Number = field("upper end of the interval; null where it is unbounded")
    n: int = field("observations behind it: images, or injections")
    blocks: list[Number] | None = field(
        "means of equal parts of the sample, for a comparison in pairs; absent where the sample is too small", default=None
    )

    @classmethod
    def of(cls, estimate: Estimate, blocks: list[float] | None = None) -> "Measured":
        """An estimate as files hold it."""
        return cls(estimate.value, estimate.low, estimate.high, estimate.n, blocks)

    @property
    def exact(self) -> bool:
        """Whether nothing was sampled."""
        return self.low == self.value == self.high

    @model_serializer
    def _as_in_files(self) -> dict[str, Any]:
        """The estimate, and its blocks where there are some."""
        return self.as_json() | ({} if self.blocks is None else {"blocks": [_finite(block) for block in self.blocks]})


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def write(path: Path, kind: type[Stored], content: Mapping[str, Any]) -> None:
    """Write what a stage has found as JSON. content: the model's fields, as JSON has them, of which it must have every one."""
    write_json(path, kind.model_validate_json(json.dumps(content)).as_json())


def read(path: Path, made_by: str, kind: type[Kind]) -> Kind:
    """Read a JSON file as a model. made_by: the stage that writes it; empty where a person does. Raises InvalidArtifact."""
    with reading(path, made_by):
        try:
            content = path.read_bytes()
            parse_json(content)  # is stricter than pydantic, for which the last of two values of a name counts
            return TypeAdapter(kind).validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the file"
            raise InvalidArtifact(f"is not what docs/outputs.md describes ({place}: {first['msg']})") from error
