"""The demo's committed results hold the numbers that they are known to hold."""

import subprocess
from pathlib import Path

import pytest

from conftest import REPOSITORY
from demo_numbers import table


def committed(place: str) -> str:
    """What git has of a file, or of a folder's names: a rerun on another processor gives other classifiers, and may."""
    done = subprocess.run(["git", "show", f"HEAD:{place}"], cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        pytest.skip(f"git does not show HEAD:{place}: {done.stderr.strip()}")
    return done.stdout


def test_no_number_of_the_demo_changes_unnoticed():
    names = [Path(name) for name in committed("metrics/results").splitlines() if name.endswith(".json")]
    assert names
    found = table({name.stem: committed(f"metrics/results/{name}") for name in names}).splitlines()
    known = committed("tests/demo_numbers.csv").splitlines()
    changed = [row for row in found if row not in set(known)] + [row for row in known if row not in set(found)]
    assert changed == [], "tests/demo_numbers.py says what to do where that is meant"
