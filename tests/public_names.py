"""Write the tables of public names into docs/api.md: `python tests/public_names.py`. tests/test_docstrings.py compares."""

import importlib
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
PAGE = REPOSITORY / "docs" / "api.md"
TABLE = re.compile(r"(<!-- names: (\S+) -->\n).*?(<!-- end of names -->\n)", flags=re.DOTALL)


def table(module: str) -> str:
    """The public names of a module with the first sentence of their docstrings, in Markdown."""
    package = importlib.import_module(module)
    rows = [(name, " ".join(getattr(package, name).__doc__.split("\n\n")[0].split())) for name in package.__all__]
    return "\n".join(["| name | |", "| --- | --- |", *(f"| `{name}` | {said} |" for name, said in rows)]) + "\n"


def page() -> str:
    """docs/api.md with the tables as they have to be."""
    text = PAGE.read_text(encoding="utf-8")
    return TABLE.sub(lambda found: f"{found[1]}\n{table(found[2])}\n{found[3]}", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
