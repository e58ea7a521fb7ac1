"""A grid's dvc.yaml: the root's, in which stages also depend on the files of own networks and data that params.yaml names.

`python -m textguard.dag FOLDER` prints that of a grid; `make grids` writes it.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from textguard.environment import run_command
from textguard.errors import InvalidParameter, TextguardError
from textguard.modules import PREFIX, REPOSITORY, dependencies
from textguard.params import Params, load_params

DAG = "dvc.yaml"
# The dependency behind which own files go: each stage that builds a network has the first, the one that reads data the second.
NETWORKS, DATA = "      - ${root}/textguard/vision/backbones.py\n", "      - ${root}/stages/data.py\n"


def own_names(params: Params) -> dict[str, list[tuple[str, str]]]:
    """The line of dvc.yaml that own files go behind -> the names of own code that they are of, with their places."""
    networks = [(backbone.network, f"params.yaml backbones.{key}.network") for key, backbone in params.backbones.items()]
    sources = [(dataset.source, f"params.yaml datasets.{key}.source") for key, dataset in params.datasets.items()]
    own = {NETWORKS: networks, DATA: sources}
    return {line: [(name, where) for name, where in pairs if name.startswith(PREFIX)] for line, pairs in own.items()}


def definition(params: Params) -> str:
    """dvc.yaml of the grid in the working directory. Raises InvalidParameter where a file that params.yaml names is missing."""
    text = (REPOSITORY / DAG).read_text(encoding="utf-8")
    for line, pairs in own_names(params).items():
        files = sorted({file for name, where in pairs for file in dependencies(name, where)})
        text = text.replace(line, line + "".join(f"      - {file}\n" for file in files))
    return text


def check_definition(params: Params) -> None:
    """Raises InvalidParameter where a grid with own code has a dvc.yaml that does not watch all of its files."""
    path = Path(DAG)
    if any(own_names(params).values()) and path.is_file() and path.read_text(encoding="utf-8") != definition(params):
        raise InvalidParameter(
            f"{path} does not watch the files of own code that params.yaml names, or not as the root's; run 'make grids'"
        )


def main(arguments: Sequence[str]) -> int:
    """Print the dvc.yaml of a grid. Returns the exit code."""
    try:
        if len(arguments) != 1 or not Path(arguments[0]).is_dir():
            raise InvalidParameter("name the folder of a grid: python -m textguard.dag grids/own")
        os.chdir(arguments[0])
        print(definition(load_params()), end="")
    except TextguardError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, 1))
