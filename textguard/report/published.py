"""The numbers that the paper and its README publish (published.csv), and an audit of what they say about them (published.yaml).

Numbers are decimals, as printed: 2.50 stays 2.50, and its last digit says how exactly it was meant. Everything that the audit
sets against them is computed, exactly.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from textguard.estimates.statistics import planned_half_width, planned_injections

TABLES_FILE = Path(__file__).with_name("published.csv")
CLAIMS_FILE = Path(__file__).with_name("published.yaml")
QUANTITIES = {
    "top1_baseline": "top-1 of the baseline (%)",
    "top1": "top-1 (%)",
    "top1_change": "change of top-1 (points)",
    "parameters": "additional parameters (M)",
    "multiply_adds": "additional FLOPs (M)",
    "last_layer": "improvement, last layer (x)",
    "overall": "improvement, overall (x)",
    "top2diff": "improvement in Top2Diff (points)",
}
STATISTICS: dict[str, Callable[[Sequence[Decimal]], Decimal]] = {
    "mean": lambda values: sum(values, Decimal()) / len(values),
    "smallest": min,
    "largest": max,
}
AGREES, DIFFERS = "agrees", "differs"
WHOLE_POPULATION = 10**18  # of faults: more than any sample notices


@dataclass(frozen=True)
class Published:
    """A row of a published table. source: `paper` or `README`; numbers: column -> value, without those it does not print."""

    source: str
    table: str
    dataset: str
    backbone: str
    variant: str
    numbers: dict[str, Decimal]

    @property
    def subject(self) -> tuple[str, str, str]:
        """What the row is about."""
        return self.dataset, self.backbone, self.variant

    @property
    def place(self) -> str:
        """Where the row stands."""
        return f"{self.source} {self.table}"


@dataclass(frozen=True)
class Finding:
    """One thing that was said, and what another place, or a computation from it, gives.

    difference: said - found. remark: begins with AGREES or DIFFERS; findings agree within half a unit of the last digit said.
    What is not said, and of which another place tells without a number, has a remark alone, in words.
    """

    what: str
    where: str
    said: Decimal | None
    other: str
    found: Decimal | None
    difference: Decimal | None
    remark: str


def load_published() -> list[Published]:
    """All rows of all published tables, the paper's first."""
    with TABLES_FILE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    published = []
    for row in rows:
        names = {name: row.pop(name) for name in ("source", "table", "dataset", "backbone", "variant")}
        published.append(Published(**names, numbers={name: Decimal(text) for name, text in row.items() if text}))
    return published


def audit(published: Sequence[Published]) -> list[Finding]:
    """Where tables contradict each other, then every claim about them, then the campaign's size and interval, then dates."""
    claims = yaml.safe_load(CLAIMS_FILE.read_text(encoding="utf-8"))
    return [
        *_contradictions(published),
        *(_check_claim(published, **claim) for claim in claims["claims"]),
        *_check_campaign(claims["campaign"], claims["hooked_layers"]),
        *(Finding(said=None, found=None, difference=None, **finding) for finding in claims["dated"]),
    ]


def differences(row: Published, published: Sequence[Published]) -> tuple[Published, list[str]]:
    """The first row about the same, and the columns in which the two print different numbers."""
    first = next(other for other in published if other.subject == row.subject)
    shared = first.numbers.keys() & row.numbers.keys()
    return first, [column for column in row.numbers if column in shared and first.numbers[column] != row.numbers[column]]


def _contradictions(published: Sequence[Published]) -> list[Finding]:
    findings = []
    for row in published:
        first, columns = differences(row, published)
        for column in columns:
            said, found = first.numbers[column], row.numbers[column]
            remark = DIFFERS
            if row.source == first.source:
                others = [other.numbers[column] for other in published if other.place == row.place and other is not row]
                step = min(abs(found - other) for other in others)
                remark += f": two trainings of one method; the smallest difference from it in {row.table} is {step}"
            elif said % 1 == found % 1:
                remark += ", by a whole number"
            what = f"{row.backbone} on {row.dataset}, {QUANTITIES[column]}"
            findings.append(Finding(what, first.place, said, row.place, found, said - found, remark))
    return findings


def _check_claim(
    published: Sequence[Published],
    *,
    where: str,
    said: str,
    table: str,
    column: str,
    statistic: str,
    backbones: Sequence[str] = (),
) -> Finding:
    rows = [row for row in published if row.place == table and (not backbones or row.backbone in backbones)]
    values = [_number(row, column) for row in rows]
    found, number = STATISTICS[statistic](values), Decimal(said)
    digits = Decimal(1).scaleb(int(number.as_tuple().exponent))
    remark = AGREES if abs(number - found) <= digits / 2 else DIFFERS
    who = ", ".join(backbones) or f"{len(rows)} backbones"
    what = f"{statistic} of {who}: {QUANTITIES[column]}"
    return Finding(what, where, number, f"{table}, computed", _rounded(found), _rounded(number - found), remark)


def _number(row: Published, column: str) -> Decimal:
    if column == "top1_change":
        return row.numbers["top1"] - row.numbers["top1_baseline"]
    return row.numbers[column]


def _check_campaign(campaign: dict[str, Any], hooked_layers: dict[str, int]) -> list[Finding]:
    """Section 5.2: what its injections are worth by Leveugle's formula (DATE 2009), and how many there are."""
    injections, confidence = campaign["injections_per_layer"], campaign["confidence"]
    said_width, said_total = Decimal(campaign["half_width_below_percent"]), Decimal(campaign["injections_above_millions"])
    half_width = _rounded(100 * Decimal(planned_half_width(WHOLE_POPULATION, injections, confidence)))
    needed = planned_injections(WHOLE_POPULATION, float(said_width) / 100, confidence)
    models, layers = len(hooked_layers), sum(hooked_layers.values())
    per_model = int(1_000_000 * said_total) // models
    pooled = 100 * planned_half_width(WHOLE_POPULATION, per_model, confidence)
    guided, both = layers + models, 2 * layers + models
    total = _rounded(Decimal(both * injections) / 1_000_000)
    return [
        Finding(
            f"interval of {injections:,} injections at {confidence:.0%}, less than (points)",
            "paper, section 5.2",
            said_width,
            "Leveugle's formula, per layer",
            half_width,
            said_width - half_width,
            f"{DIFFERS}: {said_width} takes {needed:,} injections; {said_total} million over {models} models are {per_model:,} "
            f"each, worth {pooled:.3f}",
        ),
        Finding(
            "injections into all models, more than (M)",
            "paper, section 5.2",
            said_total,
            f"{injections:,} x {both:,} layers",
            total,
            said_total - total,
            f"{AGREES}; {said_total} million is what the {models} text-guided models give alone: {guided:,} layers that hooks "
            f"reach, and {layers:,} in the baselines",
        ),
    ]


def _rounded(number: Decimal) -> Decimal:
    return number.quantize(Decimal("0.001"))
