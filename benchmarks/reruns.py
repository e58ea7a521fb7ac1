"""Do results hold on another processor? How many of the demo's intervals hold what a rerun of it says.

    python -m benchmarks.reruns NAME FOLDER

FOLDER is another checkout in which the demo was run from the training on, with settings that stand for another processor
(OMP_NUM_THREADS, ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY), and NAME says which. Both sides' intervals are over trainings, and
both sides err: of 99 % intervals from three trainings, 98 % hold the mean of another three. Prints what was found, and keeps it
in benchmarks/reruns.json.
"""

import json
import math
import sys
from pathlib import Path

from textguard.artifacts import write_json
from textguard.environment import run_command
from textguard.schema.base import read
from textguard.schema.results import MEASURES, PLACES, Cell

FILE = Path(__file__).parent / "reruns.json"
CELLS = Path("metrics") / "cells.json"


def main(arguments: list[str]) -> int:
    """Compare, print and store. Returns the exit code."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    name, folder = arguments
    base, new = (_intervals(read(place / CELLS, "results", list[Cell])) for place in (Path(), Path(folder)))
    both = [(base[key], new[key]) for key in base.keys() & new.keys()]
    known = [(low, value, high) for (low, _, high), (_, value, _) in both if not math.isnan(low + value + high)]
    inside = sum(low <= value <= high for low, value, high in known)
    overlap = sum(old[0] <= now[2] and now[0] <= old[2] for old, now in both)
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    found[name] = {"intervals": len(known), "hold_the_rerun": inside, "overlap": overlap}
    write_json(FILE, found)
    print(f"{name}: {inside} of {len(known)} intervals hold what the rerun says; {overlap} overlap with its intervals")
    return 0


def _intervals(cells: list[Cell]) -> dict[tuple[str, ...], tuple[float, float, float]]:
    """Every ratio under the detector that counts: low, value, high."""
    found = {}
    for cell in cells:
        for measure in MEASURES:
            for place in PLACES:
                ratio = getattr(getattr(cell.first.improvement, measure), place)
                key = (cell.dataset, cell.backbone, cell.variant, measure, place)
                found[key] = (ratio.low, ratio.value, ratio.high)
    return found


if __name__ == "__main__":
    sys.exit(run_command(main, 2))
