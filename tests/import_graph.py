"""Draw who imports whom into CONTRIBUTING.md: `python tests/import_graph.py`. tests/test_imports.py compares.

A node is a package of textguard, or a module that is in none. Modules that only read, check, write and report are known to
all, and left out. So is what a longer way makes plain.
"""

import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # where grimp looks for the stages
PAGE = REPOSITORY / "CONTRIBUTING.md"
FIRST, LAST = "<!-- imports: drawn by tests/import_graph.py -->\n", "<!-- end of imports -->\n"
PLUMBING = {
    "textguard.errors",
    "textguard.artifacts",
    "textguard.runtime",
    "textguard.strict_yaml",
    "textguard.environment",
    "textguard.modules",
}


def edges() -> set[tuple[str, str]]:
    """(importer, imported) between nodes."""
    graph = grimp.build_graph("textguard", "stages", cache_dir=None)
    found = set()
    for importer in graph.modules - PLUMBING:
        for imported in graph.find_modules_directly_imported_by(importer) - PLUMBING:
            found.add((_node(importer), _node(imported)))
    return {(a, b) for a, b in found if a != b and "textguard" not in (a, b)}


def _node(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "stages" else ".".join(parts[1:2]) or "textguard"


def transitively_reduced(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Without the edges that a longer way makes plain. Raises CycleError where the imports run in a circle."""
    following: dict[str, set[str]] = {}
    for a, b in found:
        following.setdefault(a, set()).add(b)

    order = TopologicalSorter(following).static_order()  # what is imported comes first
    reached: dict[str, set[str]] = {}
    for node in order:
        after = following.get(node, set())
        reached[node] = after.union(*(reached[other] for other in after))
    return {(a, b) for a, b in found if not any(b in reached[c] for c in following[a] - {b})}


def drawing() -> str:
    """The graph as a Mermaid flowchart, with what surrounds it on the page."""
    lines = [f"    {a} --> {b}\n" for a, b in sorted(transitively_reduced(edges()))]
    return "".join([FIRST, "```mermaid\nflowchart LR\n", *lines, "```\n", LAST])


def drawn(page: str) -> str:
    """The drawing that a page holds."""
    return FIRST + page.partition(FIRST)[2].partition(LAST)[0] + LAST


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(drawn(text), drawing()), encoding="utf-8")
    sys.exit(0)
