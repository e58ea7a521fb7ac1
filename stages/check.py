"""Says that params.yaml is in order. All other stages come behind this one: none runs with parameters that nobody checked."""

from pathlib import Path

from textguard.artifacts import write_text
from textguard.params import Params

OUT = Path("metrics/checked.txt")
# The same for all parameters: others rerun the stages that use them, and this file none.
CONTENT = "params.yaml holds what textguard/params.py allows.\n"


def main(params: Params) -> None:
    """Write OUT, where it is not there yet."""
    if not OUT.is_file() or OUT.read_bytes() != CONTENT.encode():
        write_text(OUT, CONTENT)
