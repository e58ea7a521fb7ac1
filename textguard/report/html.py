"""What pages have in common: templates that escape, tables, pictures that are data, and a policy that runs no other script.

Class names, answers of language models, layers and parameters come from outside. Every value goes through the template's
escaping, and pictures are data: nothing that was read can become markup or a script. A browser runs the page's own script,
which it knows by its hash, and no other.
"""

import base64
import hashlib
import io
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL.PngImagePlugin import PngImageFile

from textguard import __version__
from textguard.report.escaping import visible
from textguard.report.inline import as_drawing
from textguard.report.rendering import Judged, PerTraining, Table, estimate_of, show_cell, show_estimate, show_number

HERE = Path(__file__).parent
VERDICTS = {"better": "better", "worse": "worse"}  # -> the class of its cell
# What scales a picture down that is drawn for sharp print.
SHARPNESS = 1.5
MAIN_PIXELS = 990  # of a table on a screen of 1280, beside the contents
LETTER_PIXELS, CELL_PIXELS = 7.6, 12  # of a table
STRIP_PIXELS, STRIP_ROOM = 84, 4


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


def as_shown(table: Table, label: str, marks: Sequence[str] = (), link: str = "") -> dict[str, Any]:
    """A table as the template takes it: cells with a text, and a kind (class) where it is a verdict.

    marks: for each row, what its marks in figures are named by (see `theme.element_key`). link: the id of the figure that has
    them, to which the row's first cell leads.
    """
    name = element_id(table.name)
    return {
        "id": name,
        "note": f"note-{name}" if table.caption else "",
        "label": label,
        "caption": table.caption,
        "headers": table.headers,
        "rows": list(zip(marks or [""] * len(table.rows), [list(map(_cell, row)) for row in table.rows], strict=True)),
        "link": link,
    }


def _cell(value: Any) -> dict[str, Any]:
    judged = isinstance(value, Judged)
    return {
        "text": f"{value:,}" if isinstance(value, int) else show_cell(value),
        "pieces": _pieces(value),
        "verdict": value.in_short if judged else "",
        "kind": VERDICTS.get(value.verdict if judged else str(value), ""),
        "strip": _strip(value) if isinstance(value, PerTraining) else None,
    }


def _strip(found: PerTraining) -> dict[str, Any]:
    """Where the line at 1, the interval and each training lie on a strip, in pixels; and what is said of the trainings."""
    low, high = found.limits

    def place(number: float) -> float:
        share = math.log(min(max(number, low), high) / low) / math.log(high / low)
        return round(STRIP_ROOM + share * (STRIP_PIXELS - 2 * STRIP_ROOM), 1)

    said = {seed: f"seed {seed}: {show_number(value)}" for seed, value in found.values.items()}
    estimate = found.estimate
    return {
        "width": STRIP_PIXELS,
        "one": place(1),
        "interval": None if math.isnan(estimate.value) else (place(estimate.low), place(estimate.high)),
        "dots": [(place(value), said[seed]) for seed, value in found.values.items() if not math.isnan(value)],
        "label": "; ".join(said.values()),
    }


def fitting(table: Table, most: float = MAIN_PIXELS) -> list[Table]:
    """A table in parts that are narrow enough to be read without scrolling, each with the columns that say what a row is.

    These are those before the first estimate; a table without estimates stays whole. Columns that hold nothing are left out.
    The caption stays with the last part.
    """
    columns = {
        header: values
        for header, *values in zip(table.headers, *table.rows, strict=True)
        if any(value is not None for value in values)
    }
    widths = {header: _least_pixels(header, values) for header, values in columns.items()}
    keys = list(itertools.takewhile(lambda header: not any(map(estimate_of, columns[header])), columns))
    groups: list[list[str]] = [[]]
    for header in list(columns)[len(keys) :]:
        if groups[-1] and sum(widths[name] for name in (*keys, *groups[-1], header)) > most:
            groups.append([])
        groups[-1].append(header)
    parts = []
    for number, group in enumerate(groups, start=1):
        shown = [*keys, *group]
        name = table.name if number == 1 else f"{table.name}-part{number}"
        rows = [list(row) for row in zip(*(columns[header] for header in shown), strict=True)]
        parts.append(Table(name, table.caption if number == len(groups) else "", shown, rows))
    return parts


def _least_pixels(header: str, values: Sequence[Any]) -> float:
    """About how narrow a column can be whose cells break at blanks."""
    words = itertools.chain(header.split(), *(_pieces(value) or show_cell(value).split(" ") for value in values))
    return LETTER_PIXELS * max(map(len, words)) + CELL_PIXELS


def _pieces(value: Any) -> list[str]:
    """An estimate in the pieces between which its cell may break: its value, and its interval. Of other values, none."""
    estimate = estimate_of(value)
    return re.sub(r" (?![\[(])", "\N{NO-BREAK SPACE}", show_estimate(estimate)).split(" ") if estimate else []


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
    return {**_said(title, name, numbers, alt or finding), "drawing": None, "source": source, **size}


def as_inline_picture(content: bytes, title: str, name: str, numbers: str = "") -> dict[str, Any]:
    """An SVG as the template takes it, in the page's colours. Raises ValueError or ParseError where it is none.

    numbers: as of `as_picture`.
    """
    drawing = as_drawing(content, name)
    return {**_said(title, name, numbers, drawing.title), "drawing": drawing, "width": drawing.width, "height": drawing.height}


def _said(title: str, name: str, numbers: str, alt: str) -> dict[str, Any]:
    return {"id": element_id(name), "title": title, "caption": f"{title}.", "alt": alt or title, "numbers": numbers}


def element_id(name: str) -> str:
    """The name as an element's id, another for each name. What stands before the first dash tells kinds of elements apart."""
    return re.sub(r"[^A-Za-z0-9_-]", lambda found: f".{ord(found[0]):x}.", name)
