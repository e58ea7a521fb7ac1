"""What all models share: estimates with their intervals, units, reading with one clear error."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.dataclasses import dataclass

from textguard.artifacts import parse_json, reading, write_json
from textguard.errors import InvalidArtifact, printable
from textguard.estimates.statistics import Estimate

Kind = TypeVar("Kind")
UNKNOWN = "no such key"


LARGEST = 1e300  # sums of such numbers are finite
ROUNDING = 1e-6  # relative: stored blocks have six digits
# What numbers of a unit can be, where `field` is not told otherwise.
RANGES = {
    "share": (0.0, 1.0),
    "percent": (0.0, 100.0),
    "nats": (0.0, math.inf),
    "times": (0.0, math.inf),
    "per 10^9 hours": (0.0, math.inf),
    "count": (0.0, math.inf),
    "per image": (0.0, math.inf),
}


def field(meaning: str, unit: str = "", within: tuple[float, float] | None = None, **rules: Any) -> Any:
    """A field of a model, with what docs/outputs.md says of it.

    within: the least and the largest number that the field, or any part of it, can be; by default what its unit says. rules:
    passed on to pydantic's `Field`.
    """
    return Field(description=meaning, json_schema_extra={"unit": unit, "within": within or RANGES.get(unit)}, **rules)


# JSON has neither NaN nor infinities: files hold null for all three, and readers get NaN.
Number = Annotated[
    float,
    Field(allow_inf_nan=True),
    BeforeValidator(lambda number: math.nan if number in (None, math.inf, -math.inf) else number),
    PlainSerializer(lambda number: None if math.isnan(number) else number, when_used="json"),
]


def _printable(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("it must be text without control characters, and not empty")
    return text


Name = Annotated[str, AfterValidator(_printable)]  # is shown on terminals and pages
Whole = Annotated[int, Field(ge=0, lt=2**63)]


class Stored(BaseModel):
    """A JSON object that holds the model's keys and no others, and numbers that their units allow."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    def as_json(self) -> dict[str, Any]:
        """The object as its file holds it: fields in their order, without those that were not given."""
        return self.model_dump(mode="json", exclude_unset=True)

    @model_validator(mode="after")
    def _numbers_are_possible(self) -> "Stored":
        for name, about in type(self).model_fields.items():
            within = (about.json_schema_extra or {}).get("within")
            held = getattr(self, name)
            for number in (held if isinstance(held, list) else [held]) if within else []:
                value = number.value if isinstance(number, Measured) else number
                # What is null has no value to judge. The last digits of sums are not judged either.
                if isinstance(value, int | float) and not _between(within[0], value, within[1], ROUNDING):
                    raise ValueError(f"{name} is {value:g}, not from {within[0]:g} to {within[1]:g}")
        return self


def _between(low: float, value: float, high: float, rounding: float) -> bool:
    """Whether low <= value <= high, but for roundings; NaN sets no limit."""
    slack = rounding * abs(value) + 1e-12
    return not (value < low - slack or value > high + slack)


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Measured(Estimate):
    """A number with its interval. low = value = high where nothing was sampled."""

    value: Number = field("the estimate; null where there is none")
    low: Number = field("lower end of the interval; null where it is unbounded")
    high: Number = field("upper end of the interval; null where it is unbounded")
    n: Whole = field("observations behind it: images, or injections")
    error: Number = field(
        "standard error of the sampling alone, without what the interval adds for the unseen; 0 where nothing was sampled, or "
        "where all observations are equal; absent where it is not known",
        default=math.nan,
    )
    blocks: list[Number] | None = field(
        "means of equal parts of the sample, for a comparison in pairs; absent where the sample is too small", default=None
    )

    @model_validator(mode="after")
    def _numbers_agree(self) -> "Measured":
        """Ends of an interval on both sides of the value, and blocks that can be parts of the sample that it is the mean of.

        Blocks differ in size by one observation at most, so none counts for more than twice of what it does in their mean.
        """
        if not _between(self.low, self.value, self.high, 1e-9) or self.low > self.high + 1e-9 * abs(self.high):
            raise ValueError(f"value {self.value:g} is not between low {self.low:g} and high {self.high:g}")
        if self.error < 0:
            raise ValueError(f"error is {self.error:g}, below 0")
        blocks = self.blocks or []
        if any(abs(number) > LARGEST for number in (self.value, self.low, self.high, self.error, *blocks)):
            raise ValueError(f"has a number above {LARGEST:g}")
        parts = [block for block in blocks if not math.isnan(block)]
        if parts and len(parts) == len(blocks) and not math.isnan(self.value):
            mean, slack = math.fsum(parts) / len(parts), math.fsum(map(abs, parts)) / len(parts)
            if abs(self.value - mean) > slack * (1 + ROUNDING) + 1e-12:
                raise ValueError(f"value {self.value:g} is not the mean of its blocks, {mean:g}")
        return self

    @classmethod
    def of(cls, estimate: Estimate, blocks: list[float] | None = None) -> "Measured":
        """An estimate as files hold it."""
        return cls(estimate.value, estimate.low, estimate.high, estimate.n, estimate.error, blocks)

    @property
    def exact(self) -> bool:
        """Whether nothing was sampled."""
        return self.low == self.value == self.high

    @model_serializer
    def _as_in_files(self) -> dict[str, Any]:
        """The estimate; its error and its blocks where there are some."""
        return self.as_json() | ({} if self.blocks is None else {"blocks": [_finite(block) for block in self.blocks]})


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def write(path: Path, kind: type[Stored], content: Mapping[str, Any]) -> None:
    """Write what a stage has found as JSON. content: the model's fields, as JSON has them, of which it must have every one."""
    write_json(path, kind.model_validate_json(json.dumps(content)).as_json())


def read(path: Path, made_by: str, kind: type[Kind]) -> Kind:
    """Read a JSON file as a model. made_by: the stage that writes it; empty where a person does. Raises InvalidArtifact."""
    with reading(path, made_by):
        content = path.read_bytes()
        try:
            found = TypeAdapter(kind).validate_json(content)
            parse_json(content, finite=True)  # pydantic lets the last of equal keys win, and takes numbers that JSON lacks
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the file"
            said = UNKNOWN if first["type"] in ("extra_forbidden", "unexpected_keyword_argument") else first["msg"]
            raise InvalidArtifact(f"is not what docs/outputs.md describes ({printable(f'{place}: {said}')})") from error
        return found
