"""Says that params.yaml is in order. All other stages come behind this one: none runs with parameters that nobody checked."""

from pathlib import Path

from textguard.artifacts import write_text
from textguard.dag import check_definition, own_names
from textguard.params import Params
from textguard.vision.recipe import FAMILIES

OUT = Path("metrics/checked.txt")
# The same for all parameters: others rerun the stages that use them, and this file none.
CONTENT = "params.yaml holds what textguard/params.py allows.\n"
# Where stages write that not every grid has. Later stages depend on these folders, in a grid without them as well.
OPTIONAL = ("metrics/texts", "plots/texts", "prompts/texts", "metrics/corruptions")
KEPT = Path("metrics/corruptions/.keep")  # git keeps no empty folder, and DVC warns of one


def main(params: Params) -> None:
    """Write OUT, where it is not there yet. Networks that no list here names, and data of own code, are looked up first."""
    check_definition(params)
    if {backbone.network for backbone in params.backbones.values()} - FAMILIES.keys() or any(own_names(params).values()):
        from stages.rehearsal import look_up  # with torch, which takes seconds, and most grids need not wait for

        look_up(params)
    for folder in (*OPTIONAL, *(f"embeddings/{dataset}" for dataset in params.datasets)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    KEPT.touch()
    if not OUT.is_file() or OUT.read_bytes() != CONTENT.encode():
        write_text(OUT, CONTENT)
