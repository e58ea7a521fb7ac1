"""The demo's numbers as a table, with which tests/test_demo.py compares the committed results: none changes unnoticed.

Where a change means to change them: `python tests/demo_numbers.py > tests/demo_numbers.csv`.
"""

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "metrics" / "results"
COLUMNS = ["run", "quantity", "value", "low", "high"]
PARTS = ("delta_loss", "sdc", "mismatch", "fit")


def table(runs: Mapping[str, str]) -> str:
    """One row per number of every run as CSV. runs: name -> the content of its results file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for key, content in sorted(runs.items()):
        writer.writerows([key, name, *numbers] for name, numbers in _quantities(json.loads(content)))
    return text.getvalue()


def _quantities(run: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for name in ("parameters", "multiply_adds", "scale", "largest_logit"):
        yield name, [f"{run[name]:.9g}", "", ""]
    for name in ("top1", "loss", "top2diff"):
        yield name, _estimate(run[name])
    for name in ("head", "last_layer", "others", "overall", "by_neurons"):
        yield from _estimates(name, run[name])
    for detector, content in run["detectors"].items():
        for name in ("head", "last_layer", "others", "overall", "by_neurons"):
            yield from _estimates(f"{detector} {name}", content[name])
    for layer in run["layers"]:
        yield from _estimates(layer["layer"], layer)
    for measure, places in (run["improvement"] or {}).items():
        if isinstance(places, dict) and "value" in places:
            yield f"improvement {measure}", _estimate(places)
        elif isinstance(places, dict):
            for place, content in places.items():
                yield f"improvement {measure} {place}", _estimate(content)


def _estimates(name: str, content: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    return ((f"{name} {part}", _estimate(content[part])) for part in PARTS if part in content)


def _estimate(content: dict[str, Any]) -> list[str]:
    return ["" if content[name] is None else f"{content[name]:.6g}" for name in ("value", "low", "high")]


if __name__ == "__main__":
    sys.stdout.write(table({file.stem: file.read_text(encoding="utf-8") for file in RESULTS.glob("*.json")}))
