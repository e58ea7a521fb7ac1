"""SVG files as elements of a page: what is kept, what never gets through, and that they look as their files do."""

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from conftest import REPOSITORY
from textguard.report.inline import ATTRIBUTES, DEEPEST, ELEMENTS, as_drawing

FILES = sorted((REPOSITORY / "grids" / "smoke" / "plots").rglob("*.svg"))
DOCTYPE = '<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN"\n  "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">'


def svg(inside: str, before: str = DOCTYPE) -> bytes:
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<?xml version="1.0"?>{before}<svg {names} viewBox="0 0 72 36">{inside}</svg>'.encode()


def drawn(inside: str, name: str = "figure") -> str:
    return str(as_drawing(svg(inside), name).markup)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_figure_holds_known_elements_all_its_text_and_less_than_its_file(file):
    before, drawing = ElementTree.fromstring(file.read_text(encoding="utf-8")), as_drawing(file.read_bytes(), file.stem)
    after = ElementTree.fromstring(drawing.markup)
    assert {element.tag for element in after.iter()} <= set(ELEMENTS)
    assert {name for element in after.iter() for name in element.attrib} <= ATTRIBUTES

    def texts(root: ElementTree.Element) -> list[str]:
        return ["".join("".join(element.itertext()).split()) for element in root.iter() if element.tag.endswith("text")]

    def shapes(root: ElementTree.Element, *tags: str) -> int:
        return sum(element.tag.rpartition("}")[2] in tags for element in root.iter())

    assert texts(after) == texts(before) != []
    assert {part.tag for text in after.iter("text") for part in text.iter()} <= {"text", "tspan"}
    assert shapes(after, "path", "use", "image", "rect") == shapes(before, "path", "use", "image", "rect")
    ids = [element.get("id") for element in after.iter() if element.get("id")]
    referred = re.findall(r'(?:href="|url\()#([^")]+)', drawing.markup)
    assert set(ids) == set(referred)
    assert len(ids) == len(set(ids))
    assert len(drawing.markup.encode()) < file.stat().st_size


HOSTILE = {
    "a script": "<script>alert(1)</script>",
    "HTML": "<foreignObject><p xmlns='http://www.w3.org/1999/xhtml'>alert</p></foreignObject>",
    "a handler": "<path d='M 0 0' onclick='alert(1)'/>",
    "a link": "<a xlink:href='javascript:alert(1)'><text>alert</text></a>",
    "an animation": "<path d='M 0 0'><animate attributeName='href' values='alert'/></path>",
    "a picture from elsewhere": "<image xlink:href='https://x.example/alert.png'/>",
    "a picture that is an SVG": "<image xlink:href='data:image/svg+xml;base64,alert'/>",
    "a shape from elsewhere": "<use xlink:href='https://x.example/alert.svg#x'/>",
    "a colour from elsewhere": "<path d='M 0 0' style='fill: url(https://x.example/alert)'/>",
    "a style": "<style>alert</style>",
    "a property": "<path d='M 0 0' style='background: alert'/>",
    "a class": "<g class='alert'><path d='M 0 0'/></g>",
    "a comment": "<!-- alert -->",
    "an element of another kind": "<x:script xmlns:x='http://www.w3.org/1999/xhtml'>alert</x:script>",
    "a transform": "<path d='M 0 0' transform='alert(1)'/>",
}


@pytest.mark.parametrize("inside", HOSTILE.values(), ids=HOSTILE)
def test_what_could_run_or_load_does_not_get_through(inside):
    markup = drawn(inside)
    assert "alert" not in markup
    assert "//" not in markup


def test_texts_and_keys_stay_texts():
    attack = "&lt;script&gt;alert(1)&lt;/script&gt;"
    markup = drawn(f"<g class='mark' data-mark='{attack} &quot;'><title>{attack}</title><text>{attack}\u202e</text></g>")
    assert "<script" not in markup
    assert markup.count("&lt;script&gt;") == 3
    assert "\u202e" not in markup


def test_what_is_repeated_is_a_shape_so_that_nothing_repeats_itself():
    ten = "".join("<use xlink:href='#a'/>" for _ in range(10))
    markup = drawn(f"<defs><path id='a' d='M 0 0'/><g id='b'>{ten}</g><g id='c'><use xlink:href='#c'/></g></defs>"
                   "<use xlink:href='#b'/><use xlink:href='#a'/>")  # fmt: skip
    assert markup.count('href="#') == 11


REFUSED = {
    "an entity": svg("&a;", '<!DOCTYPE svg [<!ENTITY a "a">]>'),
    "a document type": svg("", '<!DOCTYPE svg SYSTEM "file:///etc/passwd">'),
    "two document types": svg("", DOCTYPE + DOCTYPE),
    "no SVG": b"<html viewBox='0 0 1 1'/>",
    "no size": b"<svg/>",
    "other letters": svg("").decode().encode("utf-16"),
    "half a file": svg("<g>")[:-8],
    "nothing": b"",
    "what lies too deep": svg("<g>" * DEEPEST + "</g>" * DEEPEST),
}


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED)
def test_what_is_no_figure_is_refused(content):
    with pytest.raises((ValueError, ElementTree.ParseError)):
        as_drawing(content, "figure")


def test_greys_are_of_the_pages_ink_and_ground_and_colours_stay():
    def fill(colour: str, tag: str = "path") -> str:
        return re.search(r'd="M0 0" fill="([^"]*)"', drawn(f"<{tag} d='M 0 0' style='fill: {colour}'/>"))[1]

    assert fill("#000000") == fill("#1a1a1a") == "currentColor"
    assert fill("#ffffff") == "var(--ground)"
    assert fill("#ffffff", "text") == "#fff"
    assert fill("#d9d9d9") == "color-mix(in srgb,currentColor 15%,var(--ground))"
    assert fill("#0072b2") == "#0072b2"


def test_what_neighbours_share_is_written_once_and_what_nothing_needs_never():
    one = "<g id='a{0}'><path id='b{0}' d='M 0.123456 0 \nL 1.999999 2 \nz\n' style='fill: #0072b2; opacity: 1'/></g>"
    markup = drawn("".join(one.format(number) for number in range(3)))
    assert markup.count("#0072b2") == 1
    assert markup.count('<path d="M0.12 0L2 2z"/>') == 3
    assert "id=" not in markup


def test_figures_do_not_share_ids():
    inside = "<defs><path id='a' d='M 0 0'/></defs><use xlink:href='#a'/>"
    first, second = (re.search(r'id="([^"]*)"', drawn(inside, name))[1] for name in ("one", "two"))
    assert first != second


def test_a_drawing_is_as_large_as_its_file_says_and_has_its_title():
    drawing = as_drawing(svg("<title>SDC is lower &lt; in 2</title>"), "figure")
    assert (drawing.width, drawing.height, drawing.title) == (100, 50, "SDC is lower < in 2")


def test_pictures_inside_have_few_colours_and_what_cannot_be_unpacked_stays():
    levels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    levels[..., 3] = 255
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    (found,) = re.findall(r'href="data:image/png;base64,([^"]+)"', drawn(f"<image xlink:href='{address}'/>"))
    shown = Image.open(io.BytesIO(base64.b64decode(found)))
    assert len(shown.convert("RGBA").getcolors()) <= 64
    assert len(found) < len(address) / 3
    assert np.abs(np.asarray(shown.convert("RGB"), float) - levels[..., :3]).mean() < 30  # of 85 between two such pictures
    for broken in (address[:200], "data:image/png;base64,AAAA", "data:image/png;base64,A"):
        assert f'href="{broken}"' in drawn(f"<image xlink:href='{broken}'/>")


def test_the_demos_figures_leave_room_in_a_page_of_two_megabytes():
    files = sorted((REPOSITORY / "plots").rglob("*.svg"))
    drawings = [as_drawing(file.read_bytes(), file.stem) for file in files]
    assert len(drawings) > 10
    assert sum(len(drawing.markup.encode()) for drawing in drawings) < 1_500_000  # tables are the rest
