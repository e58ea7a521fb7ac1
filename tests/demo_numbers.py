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
PARTS = ("delta_loss", "sdc", "delta_loss_by_neurons", "fit")


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
    for name in ("overall", "last_layer"):
        yield from _estimates(name, run[name])
    for detector, content in run["detectors"].items():
        for name in ("overall", "last_layer"):
            yield from _estimates(f"{detector} {name}", content[name])
    for layer in run["layers"]:
        yield from _estimates(layer["layer"], layer)
    for name, content in (run["improvement"] or {}).items():
        if isinstance(content, dict) and "value" in content:
            yield f"improvement {name}", _estimate(content)


def _estimates(name: str, content: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    return ((f"{name} {part}", _estimate(content[part])) for part in PARTS if part in content)


def _estimate(content: dict[str, Any]) -> list[str]:
    return ["" if content[name] is None else f"{content[name]:.6g}" for name in ("value", "low", "high")]


if __name__ == "__main__":
    sys.stdout.write(table({file.stem: file.read_text(encoding="utf-8") for file in RESULTS.glob("*.json")}))
