"""Regression gate: did any run get worse? Two metrics files, or folders of them, compared number by number.

    python -m textguard.report.gate BASE NEW [--params FILE] [--strict]

prints the result in one line and a Markdown table. It returns 1 when anything is worse by more than its tolerance (params.yaml,
section `gate`) and the difference is significant: one-sided, with Holm's correction over all comparisons of the call. With
--strict, it also returns 1 when a run is another training that cannot be judged. Whatever is no verdict returns 2.
How differences are tested: textguard.analysis.regression.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from textguard.analysis.regression import ANOTHER, NOT_COMPARABLE, Comparison, Judgement, compare_all, judge
from textguard.artifacts import read_json
from textguard.environment import run_command
from textguard.errors import InvalidArtifact, InvalidParameter, TextguardError, printable
from textguard.params import PARAMS_FILE, load_gate_params
from textguard.report.rendering import Table, as_markdown
from textguard.schema.base import Measured, read
from textguard.schema.results import RunResult

HEADERS = ["Run", "Quantity", "Base", "New", "Change", "Tested", "p (Holm)", "Verdict"]
UNITS = {"accuracy": " %", "share": " %", "nats": "", "times": " x"}


def main(arguments: list[str]) -> int:
    """Print the table for the command line's two files or folders. Returns the exit code."""
    parser = _Parser(prog="python -m textguard.report.gate", description="Fail when metrics got worse.", allow_abbrev=False)
    parser.add_argument("base", type=Path, metavar="BASE", help="metrics file of a run, or a folder of them")
    parser.add_argument("new", type=Path, metavar="NEW", help="the same, to be judged")
    parser.add_argument("--params", type=Path, default=PARAMS_FILE, metavar="FILE", help="with section 'gate'")
    parser.add_argument("--strict", action="store_true", help="fail where a run is another training that cannot be judged")
    try:
        options = parser.parse_args(arguments)
        tolerances = load_gate_params(options.params)
        judgements = judge(compare_all(*read_sides(options.base, options.new), tolerances), tolerances.significance)
        table = verdict_markdown(judgements, tolerances.significance, options.strict)
    except TextguardError as error:
        return _complain(f"{type(error).__name__}: {error}")
    except OSError as error:
        return _complain(f"InvalidArtifact: {error.filename}: {error.strerror}; make it readable, or name another one")
    except Exception as error:  # an exception that nobody caught would end with 1, which says that something is worse
        said = printable(str(error)) or "no reason given"
        return _complain(f"{type(error).__name__}: {said}; no verdict: this is a mistake in the gate, please report it")
    print(table, end="")
    return 1 if failures(judgements) or (options.strict and untold(judgements)) else 0


def _complain(line: str) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidParameter(f"{message}; {self.format_usage()}")


def read_sides(base: Path, new: Path) -> tuple[dict[str, RunResult], dict[str, RunResult]]:
    """The runs of two files or of two folders; see `read_runs`. Raises InvalidArtifact, InvalidParameter."""
    if base.is_dir() != new.is_dir():
        raise InvalidParameter(f"{base} and {new} must be two files or two folders")
    sides = read_runs(base), read_runs(new)
    for folder, own, other in ((base, *sides), (new, *reversed(sides))):
        for name in sorted(other.keys() - own.keys()):
            if (folder / name).exists():
                read(folder / name, "", RunResult)  # which says why it holds none: its run is not just gone
    return sides


def read_runs(path: Path) -> dict[str, RunResult]:
    """File name -> run, of a folder's JSON files that hold one; a single file's name is "". Raises InvalidArtifact."""
    if not path.is_dir():
        return {"": read(path, "", RunResult)}
    files = sorted(file for file in path.iterdir() if file.suffix == ".json")  # unlike glob, says when it may not look
    runs = {file.name: read(file, "", RunResult) for file in files if "run" in _keys(file)}
    if not runs:
        raise InvalidArtifact(f"{path} holds no run's metrics (*.json); name another folder, or run 'dvc repro' in its grid")
    owners: dict[str, str] = {}
    for name, run in runs.items():
        if (other := owners.setdefault(run.run, name)) != name:
            raise InvalidArtifact(f"{path / name} holds run {run.run!r}, as {other} does; delete one of them")
    return runs


def _keys(path: Path) -> list[str]:
    content = read_json(path, "")
    return list(content) if isinstance(content, dict) else []


def failures(judgements: Sequence[Judgement]) -> int:
    """How many quantities got worse."""
    return sum(judgement.verdict == "worse" for judgement in judgements)


def untold(judgements: Sequence[Judgement]) -> int:
    """How many runs are other trainings that cannot be judged."""
    return len({judgement.comparison.run for judgement in judgements if judgement.verdict == ANOTHER})


def verdict_markdown(judgements: Sequence[Judgement], significance: float, strict: bool = False) -> str:
    """The result in bold, and the table of all comparisons, as Markdown."""
    table = verdict_table(judgements, significance, strict)
    return f"**{table.caption}**\n\n{as_markdown(replace(table, caption='')).rstrip()}\n"


def verdict_table(judgements: Sequence[Judgement], significance: float, strict: bool = False) -> Table:
    """All comparisons with their verdicts; of layers, those of which there is something to say. Its caption is the result.

    strict: whether other trainings that cannot be judged fail.
    """
    rows, unremarkable = [], {}
    for judgement in judgements:
        compared = judgement.comparison
        if compared.headline or judgement.verdict not in ("same", "within tolerance", "not separable"):
            p = "" if math.isnan(judgement.p) else f"{judgement.p:.2g}"
            rows.append([compared.run, compared.quantity, *_show(compared), compared.tested, p, judgement.verdict])
        else:
            unremarkable.setdefault(compared.run, Counter())[judgement.verdict] += 1
    for run, counts in unremarkable.items():
        text = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        last = max(index for index, row in enumerate(rows) if row[0] == run)
        rows.insert(last + 1, [run, "other numbers of layers", *[""] * 5, text])
    return Table("gate", _result(judgements, significance, strict), HEADERS, rows)


def _result(judgements: Sequence[Judgement], significance: float, strict: bool) -> str:
    """What came out, in sentences."""
    failed, others = failures(judgements), untold(judgements)
    tested = sum(not math.isnan(judgement.p) for judgement in judgements)
    incomparable = sum(judgement.verdict == NOT_COMPARABLE for judgement in judgements)
    result = "FAIL" if failed or (strict and others) else "PASS"
    parts = [
        f"{result}: {failed or 'none'} of {tested} comparisons {'are' if failed > 1 else 'is'} worse by more than the "
        f"tolerance and significantly so (one-sided, Holm's correction, family-wise significance {significance:g})."
    ]
    if others:
        parts.append(
            f"Not judged: {others} {'runs have' if others > 1 else 'run has'} other weights than before, and another training "
            f"cannot be told from luck{', which --strict fails' if strict else ''}."
        )
    if incomparable:
        parts.append(f"{incomparable} not comparable.")
    return " ".join(parts)


def _show(compared: Comparison) -> list[str]:
    """Base, new, and the change, in points of accuracy and in percent of all else."""
    if compared.base is None or compared.new is None:
        return ["", "", ""]
    old, now = compared.base.value, compared.new.value
    if compared.unit == "accuracy":
        points = 100 * (now - old)
        change = "" if math.isnan(points) else f"{points:+.2f} points"
    else:
        ratio = now / old if old else math.nan
        change = "" if math.isnan(ratio) else f"{100 * (ratio - 1):+.1f} %"
    return [_show_value(compared.base, compared.unit), _show_value(compared.new, compared.unit), change]


def _show_value(measured: Measured, unit: str) -> str:
    value = measured.value * (100 if UNITS[unit] == " %" else 1)
    return "" if math.isnan(value) else f"{value:.4g}{UNITS[unit]}"


if __name__ == "__main__":
    sys.exit(run_command(main, 2))
