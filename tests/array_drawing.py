"""The drawing of docs/array.svg: what a processing element computes. `python tests/array_drawing.py` writes it."""

from collections.abc import Collection
from pathlib import Path

from textguard.faults.sites import Site
from textguard.hardware.array import Array
from textguard.report.theme import VARIANT_COLOURS
from textguard.schema.results import BASELINE

FILE = Path(__file__).parents[1] / "docs" / "array.svg"
STUCK, REACHED, PLAIN, LINE = VARIANT_COLOURS[BASELINE], VARIANT_COLOURS["template"], "#ffffff", VARIANT_COLOURS["random"]
CELL, ROWS, COLUMNS, ELEMENT = 20, 3, 4, 6  # element 6 is in row 1, column 2
LAYER = Site("conv", "Conv2d", 0, (7, 2, 5), weights=7 * 8)


def matrix(
    left: int,
    title: str,
    size: tuple[int, int],
    tile: tuple[int, int],
    stuck: Collection[int],
    reached: Collection[int] = (),
    top: int = 78,
) -> list[str]:
    """A matrix of cells by row, with thick lines between tiles, below its title. size, tile: rows and columns."""
    rows, columns = size
    shapes = [f'<text x="{left}" y="{top - 10}">{title}</text>'] if title else []
    for number in range(rows * columns):
        x, y = left + number % columns * CELL, top + number // columns * CELL
        colour = STUCK if number in stuck else REACHED if number in reached else PLAIN
        shapes.append(
            f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{colour}" stroke="{LINE}" stroke-width="0.7"/>'
        )
    for across, (count, step) in enumerate(((columns, tile[1]), (rows, tile[0]))):
        for place in [*range(0, count, step), count]:
            x, y, along = left + place * CELL, top + place * CELL, rows * CELL
            ends = (left, y, left + columns * CELL, y) if across else (x, top, x, top + along)
            shapes.append('<line x1="{}" y1="{}" x2="{}" y2="{}" stroke="#000000" stroke-width="1.6"/>'.format(*ends))
    return shapes


def drawing() -> str:
    """The whole drawing."""
    channels, places, each = LAYER.shape[0], 10, LAYER.weights // LAYER.shape[0]
    outputs, weights = Array(ROWS, COLUMNS), Array(ROWS, COLUMNS, "weight_stationary")
    held = {int(w % each * channels + w // each) for w in weights.weights(LAYER, ELEMENT)}  # drawn as [K, channels]
    array = [(ROWS, COLUMNS), (ROWS, COLUMNS), {ELEMENT}]
    known = [int(value) for value in outputs.outputs(LAYER, ELEMENT)]
    shapes = ['<text x="10" y="30" font-weight="bold">output stationary: the sum stays in the element</text>']
    shapes += matrix(10, "array of 3 x 4 elements", *array)
    shapes += matrix(180, "outputs: channels x places", (channels, places), (ROWS, COLUMNS), known)
    shapes.append('<text x="440" y="30" font-weight="bold">weight stationary: the weight stays in the element</text>')
    shapes += matrix(440, "array of 3 x 4 elements", *array)
    shapes += matrix(610, "weights: inputs x channels", (each, channels), (ROWS, COLUMNS), held)
    reached = [int(value) for value in weights.outputs(LAYER, ELEMENT)]
    shapes += matrix(810, "outputs: channels x places", (channels, places), (channels, places), (), reached)
    legend = [
        f'<rect x="10" y="258" width="14" height="14" fill="{STUCK}"/><text x="30" y="270">stuck element, and values whose bit '
        "is stuck</text>",
        f'<rect x="440" y="258" width="14" height="14" fill="{REACHED}"/><text x="460" y="270">outputs that are computed with '
        "these weights</text>",
    ]
    title = "Which values of a layer a stuck processing element touches; thick lines part tiles, computed in turn"
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1020 284" font-family="sans-serif" font-size="12">'
    body = "\n".join([f"<title>{title}</title>", '<rect width="1020" height="284" fill="#ffffff"/>', *shapes, *legend])
    return f"{head}\n{body}\n</svg>\n"


if __name__ == "__main__":
    FILE.write_text(drawing(), encoding="utf-8")
