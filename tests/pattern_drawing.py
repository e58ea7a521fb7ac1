"""The drawing of docs/patterns.svg: which values a fault damages together. `python tests/pattern_drawing.py` writes it."""

from pathlib import Path

from array_drawing import CELL, matrix

from textguard.faults import FaultModel
from textguard.faults.patterns import regions_of
from textguard.faults.sites import Site

FILE = Path(__file__).parents[1] / "docs" / "patterns.svg"
CHANNELS, HEIGHT, WIDTH = 3, 4, 5
LAYER = Site("conv", "Conv2d", 0, (CHANNELS, HEIGHT, WIDTH), weights=CHANNELS * 9)
HIT = HEIGHT * WIDTH + 7  # the neuron that a plan names: in channel 1
SHOWN = {
    "value, adjacent": FaultModel(),
    "channel": FaultModel(pattern="channel"),
    "row": FaultModel(pattern="row"),
    "column": FaultModel(pattern="column"),
    "block 2 x 8": FaultModel(pattern="block", block=(2, 8)),
}


def drawing() -> str:
    """The whole drawing: a map of three channels for each pattern."""
    shapes = []
    for number, (title, model) in enumerate(SHOWN.items()):
        hit = regions_of(LAYER, model).values_of([HIT])[1].tolist() if model.shaped else [HIT]
        left = 90 + number * (WIDTH * CELL + 30)
        for channel in range(CHANNELS):
            inside = {value - channel * HEIGHT * WIDTH for value in hit}
            top = 44 + channel * (HEIGHT * CELL + 12)
            shapes += matrix(left, "" if channel else title, (HEIGHT, WIDTH), (HEIGHT, WIDTH), inside, top=top)
            if not number:
                shapes.append(f'<text x="10" y="{top + 45}">channel {channel}</text>')
    width, height = 90 + len(SHOWN) * (WIDTH * CELL + 30), 44 + CHANNELS * (HEIGHT * CELL + 12)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
    title = "Which values of a map of three channels one fault damages, by pattern"
    body = "\n".join([f"<title>{title}</title>", f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *shapes])
    return f"{head}\n{body}\n</svg>\n"


if __name__ == "__main__":
    FILE.write_text(drawing(), encoding="utf-8")
