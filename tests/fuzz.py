"""Try hostile inputs on every stage: `make fuzz`. Options: `python tests/fuzz.py --help`.

Prints each distinct fault with its smallest example, and a table by kind of input. Exit code 1 where there was any.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fuzzing import KINDS, Campaign, try_one, workplace
from mutations import replayed

ROUND = 10  # examples of a kind, before the next kind has its turn


def main() -> int:
    """Try inputs until the time is over or somebody interrupts. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    parser.add_argument("--kinds", default="", help="names with commas between them; all where it is empty")
    parser.add_argument("--no-shrink", action="store_true", help="show the first example of each fault, not the smallest")
    parser.add_argument("--no-figures", action="store_true", help="without figures and page, as tests/test_fuzz.py")
    parser.add_argument("--replay", default="", help="what an earlier run with the same figures printed")
    parser.add_argument("--folder", type=Path, help="that keeps the grid for the next call; by default a temporary one")
    options = parser.parse_args()
    if unknown := {kind for kind in options.kinds.split(",") if kind} - set(KINDS):
        parser.error(f"unknown kinds: {', '.join(unknown)}; known: {', '.join(KINDS)}")
    with TemporaryDirectory(prefix="fuzz-") as folder:
        print("building a grid", file=sys.stderr, flush=True)
        with workplace(options.folder or Path(folder), figures=not options.no_figures) as place:
            if options.replay:
                kind, *numbers = json.loads(options.replay)
                choices = replayed(numbers)
                code, seen = try_one(kind, place, choices)
                print("; ".join(choices.said), f"exit code {code}", *(f"{name}\n{told}" for name, told in seen), sep="\n")
                return int(bool(seen))
            campaign = Campaign(place)
            ends, number = time.monotonic() + options.seconds, options.seed
            print(f"trying inputs from seed {number} on", file=sys.stderr, flush=True)
            try:
                while time.monotonic() < ends:
                    for kind in options.kinds.split(",") if options.kinds else place.kinds:
                        known = set(campaign.faults)
                        campaign.round(kind, number, ROUND, shrink=not options.no_shrink)
                        if new := campaign.faults.keys() - known:
                            print(campaign.report(new), file=sys.stderr, flush=True)
                        if time.monotonic() >= ends:
                            break
                    number += 1
                    print(
                        f"{sum(c.total() for c in campaign.ends.values())} examples, {len(campaign.faults)} faults",
                        file=sys.stderr,
                    )
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
            print(campaign.report(campaign.faults), campaign.table(), sep="\n\n")
            return int(bool(campaign.faults))


if __name__ == "__main__":
    sys.exit(main())
