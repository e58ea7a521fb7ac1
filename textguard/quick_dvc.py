"""`dvc`, but that a stage which ended writes its own lines of dvc.lock alone: python -m textguard.quick_dvc ARGUMENTS.

DVC parses and prints the whole of dvc.lock after each stage, which takes seconds where a grid has a hundred of them, and lets
no other `dvc` look at the grid meanwhile. A stage's entry is a block of lines that depends on no other: here only this block is
printed. The file has the bytes that DVC gives it. A file that is not as DVC writes it is left to DVC.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dvc.cli import main
from dvc.dvcfile import Lockfile
from dvc.stage.serialize import to_lockfile
from dvc.utils.serialize import dumps_yaml

from textguard.artifacts import write_text

HEAD = "schema: '2.0'\nstages:\n"
_BLOCK = re.compile(r"  ([\w@.-]+):\n(?:    .*\n)+")
_usual = Lockfile.dump_stages


def replaced(text: str, entries: Iterable[tuple[str, Any]]) -> str | None:
    r"""dvc.lock with these entries, stage -> what DVC keeps of it; new ones come last. None if it is not as DVC writes it.

    >>> replaced(HEAD + "  a:\n    cmd: echo\n  b:\n    cmd: ls\n", [("a", {"cmd": "true"})]).splitlines()[2:]
    ['  a:', "    cmd: 'true'", '  b:', '    cmd: ls']
    """
    if not text.startswith(HEAD):
        return None
    found = list(_BLOCK.finditer(text, len(HEAD)))
    blocks = {block[1]: block[0] for block in found}
    for name, entry in entries:
        blocks[name] = dumps_yaml({"stages": {name: entry}}).removeprefix("stages:\n")
    if "".join(block[0] for block in found) != text[len(HEAD) :] or not all(map(_BLOCK.fullmatch, blocks.values())):
        return None
    return HEAD + "".join(blocks.values())


def _dump_stages(self: Lockfile, stages: list, **options: Any) -> None:
    path = Path(self.path)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    changed = replaced(text, [entry for stage in stages for entry in to_lockfile(stage, **options).items()])
    if changed is None:
        _usual(self, stages, **options)
    elif changed != text:
        write_text(path, changed)
        self.repo.scm_context.track_file(self.relpath)


if __name__ == "__main__":
    Lockfile.dump_stages = _dump_stages
    sys.exit(main(sys.argv[1:]))
