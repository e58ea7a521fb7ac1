"""What pages have in common: templates that escape, tables, pictures that are data, and a policy that runs no other script.

Class names, answers of language models, layers and parameters come from outside. Every value goes through the template's
escaping, and pictures are data: nothing that was read can become markup or a script. A browser runs the page's own script,
which it knows by its hash, and no other.
"""

import base64
import hashlib
import io
import math
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL.PngImagePlugin import PngImageFile

from textguard import __version__
from textguard.report.escaping import visible
from textguard.report.rendering import Judged, Table, estimate_of, show_cell

HERE = Path(__file__).parent
VERDICTS = {"better": "better", "worse": "worse"}  # -> the class of its cell
# What scales a picture down that is drawn for sharp print.
SHARPNESS = 1.5


def render(name: str, folder: Path = HERE, **content: Any) -> str:
    """A page from its template, which extends `base.html`. folder: where that lies. content: what it shows."""
    environment = Environment(
        loader=FileSystemLoader([folder, HERE]), autoescape=True, undefined=StrictUndefined, finalize=_finalize
    )
    style, script = (f"\n{(HERE / name).read_text(encoding='utf-8')}\n" for name in ("page.css", "page.js"))
    return environment.get_template(name).render(
        version=__version__, policy=_policy(style, script), style=Markup(style), script=Markup(script), **content
    )


def _finalize(value: Any) -> Any:
    """Every value of the template comes through here: what is text must be one that HTML can hold."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _policy(style: str, script: str) -> str:
    """What a browser may load and run: pictures in the page, and these two texts, each just as it stands in its element."""
    style_hash, script_hash = (
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (style, script)
    )
    none = "; ".join(f"{name} 'none'" for name in ("default-src", "object-src", "base-uri", "form-action"))
    return f"{none}; img-src data:; style-src {style_hash}; script-src {script_hash}"


def as_shown(table: Table, label: str) -> dict[str, Any]:
    """A table as the template takes it: cells with a text, a number to sort by, and a kind (class) where it is a verdict."""
    rows = [
        [
            {
                "text": f"{value:,}" if isinstance(value, int) else show_cell(value),
                "value": _number(value if (found := estimate_of(value)) is None else found.value),
                "kind": VERDICTS.get(value.verdict if isinstance(value, Judged) else str(value), ""),
            }
            for value in row
        ]
        for row in table.rows
    ]
    name = element_id(table.name)
    return {
        "id": name,
        "note": f"note-{name}",
        "label": label,
        "caption": table.caption,
        "headers": table.headers,
        "rows": rows,
    }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def as_picture(content: bytes, title: str, name: str, numbers: str = "", alt: str = "") -> dict[str, Any]:
    """A PNG as the template takes it, small enough for sharp print. Raises what Pillow raises where it is none.

    numbers: the file with those that are drawn. alt: what is to be seen, for those who do not see it; by default the finding
    that stands above the picture and in its file (see drawing.state), else the title.
    """
    # Not Image.open, which refuses sharp pictures of many layers for their size: nothing is unpacked here.
    with PngImageFile(io.BytesIO(content)) as picture:
        width, height = picture.size
        finding = str(picture.info.get("Title", ""))
        picture.verify()
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    size = {"width": round(width / SHARPNESS), "height": round(height / SHARPNESS)}
    said = {"title": title, "caption": f"{title}.", "alt": alt or finding or title, "numbers": numbers}
    return {"id": element_id(name), "source": source, **said, **size}


def element_id(name: str) -> str:
    """The name as an element's id, another for each name. What stands before the first dash tells kinds of elements apart."""
    return re.sub(r"[^A-Za-z0-9_-]", lambda found: f".{ord(found[0]):x}.", name)
