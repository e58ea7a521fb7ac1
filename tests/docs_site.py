"""A hook of mkdocs (mkdocs.yml): on the site, links to files of the repository lead to GitHub."""

import logging
import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"(!?\[[^\]]*\])\(\.\./([^)#]*)(#[^)]*)?\)")
LOG = logging.getLogger("mkdocs.hooks.docs_site")  # mkdocs counts its warnings, and is strict about them


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The page's text with links to files outside of docs/ as addresses. Warns of files that do not exist."""
    address = config["repo_url"].rstrip("/")

    def replace(found: re.Match[str]) -> str:
        name, path, anchor = found[1], found[2], found[3] or ""
        if not (REPOSITORY / path).exists():
            LOG.warning("%s links to %s, which does not exist", page.file.src_path, path)
        kind = "raw" if name.startswith("!") else "tree" if (REPOSITORY / path).is_dir() else "blob"
        return f"{name}({address}/{kind}/main/{path}{anchor})"

    return OUTSIDE.sub(replace, markdown)
