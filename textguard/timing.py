"""How long stages take. `python -m textguard.timing`, in a grid's folder, prints metrics/run.json as a Markdown table.

`stages/__main__.py` calls `keep` when a stage has ended well. Times are no results: no stage imports this module, DVC does not
know the file, and a stage whose time cannot be kept has still ended well.
"""

import os
import platform
import sys
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from textguard.artifacts import WORK_DIR, locked, read_json, write_json
from textguard.environment import run_command
from textguard.errors import InvalidArtifact, TextguardError

TIMES = Path("metrics/run.json")


def keep(name: str, entry: Mapping[str, Any], known: Collection[str]) -> None:
    """Put one stage's time into metrics/run.json of the current folder, alone among all processes.

    name: as DVC has it, "train@RUN". entry: the fields of `textguard.schema.times.StageTime`. known: all stages that the grid
    has; times of others go, as do those of another environment, and a file that cannot be read. Raises CannotWrite.

        keep("check", {"seconds": 0.2, "device": "cpu", "processes": 1, "resumed": False}, {"check", "data@digits"})
    """
    environment = {"versions": versions(), "processors": os.cpu_count() or 1}
    with locked(WORK_DIR / "times.lock", str(TIMES)):
        # Without the models of textguard/schema, whose import takes longer than the smallest stages.
        try:
            found = read_json(TIMES, "check", [*environment, "stages"])
            same = all(found[field] == value for field, value in environment.items())
            kept = dict(found["stages"]) if same else {}
        except (InvalidArtifact, TypeError, ValueError):
            kept = {}
        kept[name] = dict(entry)
        write_json(TIMES, environment | {"stages": {stage: kept[stage] for stage in sorted(kept) if stage in known}})


def versions() -> dict[str, str]:
    """Versions of what times depend on, read without importing it."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def table(path: Path = TIMES) -> str:
    """metrics/run.json as a Markdown table: runs of each stage, their seconds together, the longest. Raises InvalidArtifact.

    >>> print(table())  # doctest: +SKIP
    | Stage | Runs | Sum (s) | Longest (s) | Longest run |
    | --- | --- | --- | --- | --- |
    | inject | 8 | 161 | 48.2 | digits-mobilenet_v2-random-0 |
    """
    from textguard.schema.base import read
    from textguard.schema.times import RunTimes

    times = read(path, "check", RunTimes)
    by_name: dict[str, list[tuple[float, str]]] = {}
    for stage, entry in times.stages.items():
        name, _, key = stage.partition("@")
        by_name.setdefault(name, []).append((entry.seconds, key))
    rows = sorted(((sum(s for s, _ in runs), name, runs) for name, runs in by_name.items()), reverse=True)
    lines = ["| Stage | Runs | Sum (s) | Longest (s) | Longest run |", "| --- | --- | --- | --- | --- |"]
    for total, name, runs in rows:
        longest, key = max(runs)
        lines.append(f"| {name} | {len(runs)} | {total:.3g} | {longest:.3g} | {key or '-'} |")
    lines.append(f"| all | {len(times.stages)} | {sum(total for total, _, _ in rows):.4g} | | |")
    told = ", ".join(f"{name} {number}" for name, number in times.versions.items())
    devices = "; ".join(sorted({entry.device for entry in times.stages.values()}))
    resumed = [stage for stage, entry in times.stages.items() if entry.resumed]
    late = f"\nOnly the last sitting is counted of {', '.join(resumed)}." if resumed else ""
    return "\n".join([*lines, "", f"{told}; {times.processors} processors; {devices}.{late}"])


def main(arguments: list[str]) -> int:
    """Print the table of the current folder's grid. Returns the exit code."""
    try:
        if arguments:
            print("usage: python -m textguard.timing, in the folder of a grid's params.yaml", file=sys.stderr)
            return 2
        print(table())
    except TextguardError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, 1))
