"""SVG files as elements of a page: they take its colours, and nothing else than shapes and texts gets through.

A figure's file is an artifact, which anybody may have written, and its elements become the page's own. So only known elements
and attributes are kept, with values that lead nowhere; and `style` becomes attributes, because the page's policy runs no style
but its own.
"""

import base64
import hashlib
import io
import itertools
import re
import struct
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from markupsafe import Markup
from PIL.Image import Quantize
from PIL.PngImagePlugin import PngImageFile

from textguard.report.escaping import visible

# The only document type that is accepted, because matplotlib writes it; another one may declare entities.
DOCTYPE = re.compile(
    r'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1\.1//EN"\s+"http://www\.w3\.org/Graphics/SVG/1\.1/DTD/svg11\.dtd">'
)
DEEPEST = 50  # elements in each other; those of matplotlib are about ten
TEXTS = ("text", "tspan")
DEFINITIONS = ("defs", "clipPath", "pattern")
ELEMENTS = ("svg", "g", "title", "path", "rect", "circle", "line", "polygon", "use", "image", *TEXTS, *DEFINITIONS)
# What children without one of their own take from the element that they are in.
INHERITED = (
    *("fill", "fill-opacity", "fill-rule", "stroke", "stroke-opacity", "stroke-width", "stroke-linecap", "stroke-linejoin"),
    *("stroke-miterlimit", "stroke-dasharray", "stroke-dashoffset", "font-size", "font-style", "font-weight", "text-anchor"),
)
PLACED = ("x", "y", "x1", "x2", "y1", "y2", "dx", "dy", "cx", "cy", "r", "width", "height", "d", "points", "viewBox")
ATTRIBUTES = {
    *(*INHERITED, *PLACED, "id", "transform", "opacity", "clip-path", "clip-rule", "href", "class", "data-mark"),
    *("preserveAspectRatio", "patternUnits", "image-rendering"),
}
REFERRED = {"href": "path", "clip-path": "clipPath"}  # attribute -> what it may refer to; all others, to a pattern
INITIAL = {
    "stroke-dashoffset": "0",
    "font-style": "normal",
    "font-weight": "400",
    "text-anchor": "start",
    "opacity": "1",
}  # written by matplotlib all the same
VALUE = re.compile(r"[\w#.,%+ -]*")
TRANSFORM = re.compile(r"(?:(?:matrix|translate|scale|rotate|skewX|skewY)\([\d., e+-]*\)[\s,]*)*")
PNG = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]*)")
COLOURS = 64  # of a picture inside: more cannot be told apart in a heat map
MOST_PIXELS = 4_000_000  # of a picture that is unpacked
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
PIXELS = 100  # of the page to an inch of a figure, so that its smallest text is ten pixels high


@dataclass(frozen=True)
class Drawing:
    """What is inside of an svg element, its viewBox, its size in pixels of the page, and its title, which may be empty."""

    markup: Markup
    box: str
    width: int
    height: int
    title: str


def as_drawing(content: bytes, name: str) -> Drawing:
    """An SVG file's inside for a page, which holds others. name: of the picture, unique there, that its ids begin with.

    Raises ValueError where it is no SVG, or declares a document type or entities.
    """
    root = _parse(content.decode())
    if _local(root.tag) != "svg":
        raise ValueError("is no SVG")
    box = root.get("viewBox", "")
    if not re.fullmatch(r"0 0 [\d.]+ [\d.]+", box):
        raise ValueError("has no viewBox that begins at 0 0")
    width, height = (round(float(side) * PIXELS / 72) for side in box.split()[2:])
    title = next((child.text or "" for child in root if _local(child.tag) == "title"), "")
    # What is black by default is of the page's ink. The joins are those of the one rule of style that matplotlib writes.
    kept = Element("g", {"fill": "currentColor", "stroke-linejoin": "round"})
    kept.extend(inside for child in root if _local(child.tag) != "title" and (inside := _kept(child)) is not None)
    _refer(kept, _prefix(name))
    _unwrap(kept)
    _gather(kept)
    markup = ElementTree.tostring(kept, encoding="unicode").replace(" />", "/>")  # texts have &gt; for >
    return Drawing(Markup(markup), box, width, height, visible(title))


def _prefix(name: str) -> str:
    """Few letters, since they are written often, which are others for each of a page's names."""
    return "f" + base64.urlsafe_b64encode(hashlib.sha256(name.encode()).digest()).decode()[:5]


def _parse(text: str) -> Element:
    text = DOCTYPE.sub("", text, count=1)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("declares a document type other than SVG's, or entities")
    depth, parser = 0, ElementTree.XMLPullParser(("start", "end"))
    parser.feed(text)
    parser.close()
    for event, element in parser.read_events():
        depth += 1 if event == "start" else -1
        if depth > DEEPEST:
            raise ValueError(f"has more than {DEEPEST} elements in each other")
        root = element  # which ends last
    return root


def _local(tag: str) -> str:
    """A name without its namespace."""
    return tag.rpartition("}")[2]


def _kept(element: Element) -> Element | None:
    """The element with what is kept of it, and of all that it holds; None where nothing is."""
    tag = _local(element.tag)
    if tag not in ELEMENTS:
        return None
    kept = Element(tag)
    for attribute, value in _attributes(element):
        if (value := _value(attribute, value, tag)) is not None:
            kept.set(attribute, value)
    if tag in (*TEXTS, "title"):
        kept.text = _said(element.text)
    if tag == "tspan":
        kept.tail = _said(element.tail)
    if tag != "title":
        kept.extend(inside for child in element if (inside := _kept(child)) is not None)
    return kept


def _said(text: str | None) -> str:
    """A text as it is shown; nothing of what only indents."""
    return "" if text is None or text.isspace() else visible(text)


def _attributes(element: Element) -> list[tuple[str, str]]:
    """An element's attributes and, later, because they count more, the properties of its style."""
    style = (part.partition(":") for part in element.get("style", "").split(";"))
    found = {_local(name): value for name, value in element.attrib.items()}
    return [*found.items(), *((name.strip(), value.strip()) for name, _, value in style)]


def _value(attribute: str, value: str, tag: str) -> str | None:
    """An attribute's value as the page has it; None where it is not kept."""
    if attribute not in ATTRIBUTES or INITIAL.get(attribute) == value:
        return None
    if attribute in ("fill", "stroke") and (colour := re.fullmatch(r"#([0-9a-f]{2})(\1\1|[0-9a-f]{4})", value)):
        if colour[1] * 2 == colour[2]:
            return _grey(int(colour[1], 16), tag)
        # Texts need more contrast than shapes do, on either ground.
        return f"color-mix(in srgb,{value} 60%,currentColor)" if tag in TEXTS else value
    if attribute in ("id", "data-mark"):
        return visible(value)
    if attribute == "class":
        return "mark" if value == "mark" else None
    if attribute == "href":
        value = "".join(value.split())  # matplotlib breaks the lines of pictures
        return _with_few_colours(value) if tag == "image" else value if tag == "use" else None
    value = " ".join(value.split())
    if attribute == "transform":
        return _rounded(value, 4) if TRANSFORM.fullmatch(value) and not value.startswith("rotate(-0 ") else None
    if not (VALUE.fullmatch(value) or re.fullmatch(r"url\(#[^()\s]+\)", value)):
        return None
    # Blanks beside the letters of a path say nothing.
    return re.sub(r" ?([A-Za-z]) ?", r"\1", _rounded(value, 2)) if attribute in PLACED else value


def _with_few_colours(address: str) -> str | None:
    """The address of a PNG that is data, with few colours where that is shorter; None where it is no such address.

    Pictures are most of a page's bytes. What is no PNG behind its address stays: a browser shows nothing of it.
    """
    if not (found := PNG.fullmatch(address)):
        return None
    try:
        picture = PngImageFile(io.BytesIO(base64.b64decode(found[1])))
        if picture.width * picture.height > MOST_PIXELS:
            return address
        packed = io.BytesIO()
        picture.convert("RGBA").quantize(COLOURS, Quantize.FASTOCTREE).save(packed, "PNG", optimize=True)
    except (OSError, SyntaxError, ValueError, struct.error):  # what Pillow and base64 raise
        return address
    shorter = f"data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}"
    return min(address, shorter, key=len)


def _rounded(text: str, digits: int) -> str:
    """The text with its numbers rounded to so many decimals, without zeros at the end."""
    return NUMBER.sub(lambda number: re.sub(r"\.?0+$|^-(?=0\.0+$)", "", f"{float(number[0]):.{digits}f}"), text)


def _grey(level: int, tag: str) -> str:
    """A grey, 0 to 255, as so much of the page's ink and of its ground. White text stays, because it stands on colours."""
    if level < 0x30:
        return "currentColor"
    if level == 255:
        return "#fff" if tag in TEXTS else "var(--ground)"
    return f"color-mix(in srgb,currentColor {round(100 - level / 2.55)}%,var(--ground))"


def _refer(root: Element, prefix: str) -> None:
    """Number the ids that are referred to, behind the prefix, and forget all others, and what leads to none of them.

    What `use` repeats must be a path: elements that repeat others, which repeat others, would never end.
    """
    named: dict[str, Element] = {}
    for element in root.iter():
        if name := element.attrib.pop("id", ""):
            named.setdefault(name, element)
    numbers = itertools.count()
    for element in root.iter():
        for attribute, value in list(element.items()):
            if not (value.startswith("url(") or (element.tag == "use" and attribute == "href")):
                continue
            target = named.get(re.sub(r"^url\(#(.*)\)$|^#(.*)$", r"\1\2", value))
            if target is None or target.tag != REFERRED.get(attribute, "pattern"):
                del element.attrib[attribute]
                continue
            new = target.attrib.setdefault("id", f"{prefix}-{next(numbers)}")
            element.set(attribute, f"#{new}" if attribute == "href" else f"url(#{new})")
            if attribute == "href":  # what is repeated looks as it says itself
                for own in set(INHERITED) & set(target.keys()) & set(element.keys()):
                    del element.attrib[own]


def _unwrap(parent: Element) -> None:
    """Put what groups without attributes hold in their place."""
    children: list[Element] = []
    for child in parent:
        _unwrap(child)
        children += list(child) if child.tag == "g" and not child.attrib else [child]
    parent[:] = children


def _gather(parent: Element) -> None:
    """Group neighbours that look the same, and write how they look once, at their group. A text holds no groups."""
    if parent.tag in TEXTS:
        return
    children: list[Element] = []
    for look, run in itertools.groupby(parent, key=_look):
        same = list(run)
        if look and len(same) > 1:
            group = Element("g", dict(look))
            for child in same:
                for attribute, _ in look:
                    del child.attrib[attribute]
            group.extend(same)
            same = [group]
        children += same
    parent[:] = children
    for child in parent:
        _gather(child)


def _look(element: Element) -> tuple[tuple[str, str], ...]:
    """What an element would look as well with if it were its group's."""
    if element.tag in (*DEFINITIONS, "title"):
        return ()
    moved = INHERITED if "transform" in element.attrib else (*INHERITED, "clip-path")  # which a transform moves
    return tuple((name, element.attrib[name]) for name in moved if name in element.attrib)
