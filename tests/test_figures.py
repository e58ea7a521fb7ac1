"""Figures: their numbers and bytes, what they say and how variants look in them."""

import base64
import io
import math
import re
import sys
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib import colormaps
from matplotlib.axis import Tick
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import Collection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image

from conftest import REPOSITORY
from smoke_grid import run
from stages import figures
from textguard.analysis.files import load_cells, load_closeup, load_results
from textguard.analysis.thresholds import crossings
from textguard.artifacts import read_parquet, write_parquet, write_text
from textguard.errors import InvalidArtifact
from textguard.estimates.statistics import Estimate
from textguard.params import load_params
from textguard.report.closeup_figures import _agreement_in_words, _show
from textguard.report.drawing import SMALL, draw, mark
from textguard.report.figures import DRAWN_BY_DVC, PER_BACKBONE, group, training_curve, write_figures
from textguard.report.layer_figures import draw_layers
from textguard.report.text_figures import draw_similarity
from textguard.report.theme import OTHER_MARKERS, PUBLISHED_MARKER, VARIANT_MARKERS, place_name, styles
from textguard.report.variants import Variant, trainings


def test_figures_come_with_their_numbers(runs, params, tmp_path, monkeypatch):
    """That all can be drawn, and have the same bytes each time, is seen in test_interruptions.py, in two grids."""
    drawn: dict[str, bytes] = {}

    def once(figure, suffix, dpi):
        if suffix not in drawn:
            drawn[suffix] = draw(figure, suffix, dpi)
        return drawn[suffix]

    monkeypatch.setattr("textguard.report.drawing.draw", once)
    write_figures(list(load_results(runs).values()), load_cells(runs), params, tmp_path / "a")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert (
        len(files) == 4 * (2 * (len(PER_BACKBONE) + 3) + 4) + len(DRAWN_BY_DVC) + 1
    )  # other faults: where there is a baseline
    numbers = pd.read_csv(tmp_path / "a" / "layers-d-resnet18.csv")
    assert numbers.groupby("variant").size().to_dict() == {"baseline": 2, "template": 3, "descriptions": 3}
    together = pd.read_csv(tmp_path / "a" / "layers.csv")
    assert together.groupby(["dataset", "backbone"]).size().to_dict() == {("d", "resnet18"): 8, ("e", "alexnet"): 2}
    assert (tmp_path / "a" / "layers-d-resnet18.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("counts", "said"), [([1, 1], "1 training"), ([3, 3], "3 trainings"), ([3, 1], "1 to 3 trainings")], ids=str
)
def test_captions_say_how_many_trainings(counts, said):
    assert trainings([Variant("v", styles(["v"], {})["v"], [None] * count) for count in counts]) == said


def test_no_text_leaves_its_figure(runs, params, tmp_path, monkeypatch):
    results = list(load_results(runs).values())
    trained_twice = results + [result.model_copy(update={"seed": 1}) for result in results]
    drawn = []

    def look(figure, numbers, stem, dpi):
        FigureCanvasAgg(figure).draw()
        unseen = [label for tick in figure.findobj(Tick) for label in (tick.label1, tick.label2)]  # those beyond the limits
        texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text not in unseen]
        room = figure.bbox.padded(1)
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
        outside = [text for text, box in boxes if not (room.contains(*box.min) and room.contains(*box.max))]
        assert outside == [], stem.name
        drawn.append(stem.name)

    monkeypatch.setattr("textguard.report.figures.save_figure", look)
    write_figures(trained_twice, load_cells(runs), params, tmp_path)
    assert len(drawn) == 2 * (len(PER_BACKBONE) + 3) + 4


def test_a_page_finds_all_that_has_a_variants_colour(tmp_path, monkeypatch):
    """Else what is dimmed beside a picked row would keep its intervals and its thin lines. In the demo's figures."""
    monkeypatch.chdir(REPOSITORY)
    params = load_params()
    monkeypatch.delitem(PER_BACKBONE, "attention")  # whose maps git does not have
    results, drawn = list(load_results(params.runs).values()), {}
    monkeypatch.setattr("textguard.report.figures.save_figure", lambda figure, numbers, stem, dpi: drawn.update({stem: figure}))
    write_figures(results, load_cells(params.runs), params, tmp_path)
    keys = {variant.style.colour: variant.key for variants in group(results, params).values() for variant in variants}
    for stem, figure in drawn.items():
        if stem.name.startswith("architecture"):  # which shows no numbers
            continue
        found = []
        legends = {part for legend in figure.findobj(Legend) for part in legend.findobj()}
        for artist in set(figure.findobj(Line2D) + figure.findobj(Collection)) - legends:
            colours = [artist.get_color()] if isinstance(artist, Line2D) else [*artist.get_edgecolor(), *artist.get_facecolor()]
            found += [(artist.get_gid() or "", keys.get(to_hex(colour))) for colour in colours]
        assert [said for said, key in found if key and not re.match(rf"mark\|\S+ \S+ {key}\|", said)] == [], stem.name
        assert stem.name.startswith("last_layer") or any(key for _, key in found), stem.name


def test_a_mark_without_words_has_no_title():
    figure = Figure()
    axes = figure.subplots()
    for said in ("1.5, 1 training", ""):
        mark(*axes.plot([0, 1]), "d n v", said)
    picture = draw(figure, "svg", 60).decode()
    assert picture.count('<g class="mark" data-mark="d n v">') == 2
    assert re.findall("<title>.*?</title>", picture) == ["<title>1.5, 1 training</title>"]


def test_the_crossing_is_the_last_one_up_or_down():
    at = np.array([0.0, 1.0, 2.0, 3.0])
    baseline = np.array([10.0, 8.0, 6.0, 4.0])
    assert crossings(at, baseline, np.array([9.0, 9.0, 5.0, 5.0])) == [(2.5, 5.0)]
    assert crossings(at, baseline, np.array([12.0, 9.0, 4.0, 2.0])) == [(1 + 1 / 3, pytest.approx(22 / 3))]
    assert crossings(at, baseline, np.array([11.0, 8.0, 6.0, 3.0])) == [(1.0, 8.0)]  # level in between
    for never in (baseline, baseline + 1, baseline - 1, np.array([9.0, 8.0, 6.0, 4.0]), np.array([9.0, 8.0, 5.0, 4.0])):
        assert crossings(at, baseline, never) == []


def test_a_variant_looks_the_same_whatever_stands_beside_it(runs, params):
    results = list(load_results(runs).values())
    alone = group([result for result in results if result.variant == "descriptions"], params)
    together = group(results, params)
    (style,) = (variant.style for variant in together["d", "resnet18"] if variant.key == "descriptions")
    assert [variant.style for variant in alone["d", "resnet18"]] == [style]
    assert (style.colour, style.marker, style.name) == ("#0072b2", "^", "descriptions")


def test_no_marker_stands_for_two_things():
    markers = [*VARIANT_MARKERS.values(), *OTHER_MARKERS, PUBLISHED_MARKER]
    assert len(markers) == len(set(markers))
    added = styles(["shuffled", "baseline", "one_hot"], {"one_hot": "#333333"})
    assert [(style.marker, style.colour) for style in added.values()] == [("P", "#009e73"), ("o", "#d55e00"), ("p", "#333333")]


def test_variants_and_places_are_called_as_they_are_spoken():
    assert place_name("fashion_mnist", "resnet18") == "ResNet-18 on Fashion-MNIST"
    assert place_name("birds", "timm:resnet10t") == "timm:resnet10t on birds"
    assert styles(["random"], {})["random"].name == "random start"


NAMES = [
    "$x^2$",
    "a$b$c",
    "<script>alert(1)</script>",
    "\x07bell\x1b[31m",
    "x" * 10_000,
    "two\nlines",
    "猫",
    "NA",
    "--> ]]>",
    "\u202eb",
]


def test_class_names_are_drawn_as_they_are_whatever_they_are(tmp_path, monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(len(NAMES), 4))
    unit = vectors / np.linalg.norm(vectors, axis=1)[:, None]
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *file, **look: drawn.append(figure) or save(figure, *file, **look))
    draw_similarity(unit @ unit.T, NAMES, "a $title$", tmp_path / "similarity", 60)
    for figure in drawn:
        texts = [text for text in figure.findobj(Text) if text.get_text() and "\u2212" not in text.get_text()]
        assert all(not text.get_parse_math() for text in texts if "$" in text.get_text())
        assert any(text.get_text().startswith("a $title$: ") for text in texts)
        assert {"$x^2$", r"\x07bell\x1b[31m", "two lines", r"\u732b", "--> ]]>"} <= {text.get_text() for text in texts}
        assert max(len(text.get_text()) for text in texts) < 200
    ElementTree.fromstring((tmp_path / "similarity.svg").read_bytes())


@pytest.mark.parametrize("classes", [2, 3, 1000])
def test_few_equal_and_many_classes_are_drawn(tmp_path, classes, monkeypatch):
    monkeypatch.setattr("textguard.report.text_figures.save_figure", lambda figure, numbers, *_: FigureCanvasAgg(figure).draw())
    draw_similarity(np.ones((classes, classes)), [f"c{place}" for place in range(classes)], "t", tmp_path / "s", 30)


DRAWN_FROM = {"ranges": partial(draw_layers, cells=[]), "thresholds": PER_BACKBONE["accuracy_by_top2diff"]}
EPOCHS = "does not hold the epochs 1 to 2, as many as params.yaml asks for"
DAMAGED = {
    "a layer more": ("ranges", lambda text: f"{text}foo,Conv2d,1,2.0,0.5,50\n", "are about different layers ('foo')"),
    "a layer less": ("ranges", lambda text: text.rpartition("head")[0], "are about different layers ('head')"),
    "another's ranges": (
        "ranges",
        lambda text: re.sub(r"(\nhead,\w+,\d+,)", r"\g<1>7", text),
        "are of different classifiers (the largest value of 'head')",
    ),
    "half the thresholds": ("thresholds", lambda text: text[: text.index("\n20,") + 1], "has other thresholds"),
    "an epoch less": ("training", lambda text: text[: text.index("\n2,") + 1], EPOCHS),
    "no training": ("training", lambda text: text.partition("\n")[0] + "\n", EPOCHS),
    "an epoch twice": ("training", lambda text: text.replace("\n2,", "\n1,"), "does not count its epochs from 1"),
}


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_numbers_are_named_and_not_drawn(runs, params, name, damage, said):
    key = "d-resnet18-descriptions-0"
    file = Path("metrics/runs") / key / f"{name}.csv"
    file.write_text(damage(file.read_text(encoding="utf-8")), encoding="utf-8")
    results = load_results(key for key, run in runs.items() if run.dataset == "d")
    (variants,) = group(list(results.values()), params).values()
    draw, given = (training_curve, (results[key], params)) if name == "training" else (DRAWN_FROM[name], (variants, "t"))
    with pytest.raises(InvalidArtifact) as error:
        draw(*given)
    assert said in str(error.value)
    assert str(file) in str(error.value)


def test_a_picture_that_is_none_is_named(runs, params):
    file = Path("metrics/looks/d-resnet18-baseline-0.parquet")
    looks = read_parquet(file, "closeup", [])
    write_parquet(file, looks.assign(picture=[picture and b"\x89PNG, or not" for picture in looks["picture"]]))
    (variants, _) = group(list(load_results(runs).values()), params).values()
    with pytest.raises(InvalidArtifact, match=f"{file} cannot be read .*stage 'closeup' writes it"):
        PER_BACKBONE["attention"](variants, "t")


def test_maps_of_all_images_are_dots_beside_pictures_of_two(runs, params):
    """Of the grid's two images, flipped weights change one, and the worst fault both."""
    (variants, _) = group(list(load_results(runs).values()), params).values()
    figure, numbers = PER_BACKBONE["attention"](variants, "ResNet-18")
    shown = [variant for variant in variants if variant.key in ("baseline", "descriptions")]
    assert set(numbers["variant"]) == {variant.key for variant in shown}
    said = "maps keep a rank correlation of 0.800 (baseline) and 0.800 (descriptions), not told apart over 2 images"
    assert figure.get_label() == f"ResNet-18, 2,000 weight bits flipped: {said} of one training each"
    (strips,) = (axes for axes in figure.axes if axes.get_xlabel())
    lines = [strips.lines[place : place + 4] for place in range(0, len(strips.lines), 4)]  # dots, crosses, interval, mean
    for (state, variant), (dots, crosses, _, mean) in zip(product(("weights", "worst"), shown), lines, strict=True):
        stated = getattr(load_closeup(variant.results[0].run).cam, state)
        own = numbers[(numbers["variant"] == variant.key) & (numbers["state"] == state)]
        found = np.concatenate([dots.get_xdata(), crosses.get_xdata()])
        assert sorted(found) == sorted(own["rank_correlation"])
        assert found.mean() == pytest.approx(stated.rank_correlation.value)
        assert mean.get_xdata() == [stated.rank_correlation.value]
        assert len(crosses.get_xdata()) == stated.changed.value * len(own) == own["changed"].sum()
        assert mean.get_gid() == crosses.get_gid()
        assert mean.get_gid().startswith(f"mark|d resnet18 {variant.key}|{variant.style.name}, ")
        assert mean.get_gid().endswith(f"; {len(crosses.get_xdata())} of 2 changed, 2 images, 1 training")
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= SMALL


def test_a_map_has_the_same_colours_in_every_file():
    """Matplotlib mixed a transparent one twice in SVG."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (100, 100, 100)).save(file, "png")
    seen = {"finite": True, "prediction": 1, "label": 1, "predicted": "one", "confidence": 1.0, "map": [0.0, 0.0, 0.0, 1e308]}
    figure = Figure(figsize=(1, 1))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    _show(axes, file.getvalue(), seen)
    (inside,) = re.findall('data:image/png;base64,([^"]+)"', draw(figure, "svg", 96).decode())
    expected = {place: 255 * (0.6 * np.array(colormaps["viridis"](float(place))[:3]) + 0.4 * 100 / 255) for place in (0, 1)}
    for content in (base64.b64decode(inside), draw(figure, "png", 96)):
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))
        assert (pixels[..., 3] == 255).all()
        for place, colour in expected.items():
            assert pixels[-5 * place, -5 * place, :3] == pytest.approx(colour, abs=2)


APART = "keep a rank correlation of 0.900 (baseline) and 0.700 (descriptions), "
AGREEMENTS = {
    "intervals that lie apart": ([(0.9, 0.8, 1.0), (0.7, 0.6, 0.79)], f"{APART}told apart over 9 images of one training each"),
    "intervals that overlap": ([(0.9, 0.8, 1.0), (0.7, 0.6, 0.81)], f"{APART}not told apart over 9 images"),
    "no interval": ([(0.9, 0.8, 1.0), (0.7, math.nan, math.nan)], f"{APART}not told apart over 9 images"),
    "one variant": ([(0.9, 0.8, 1.0)], "keep a rank correlation of 0.900 (baseline) in one training"),
    "no flips": ([None, None], "where the classifiers look"),
}


@pytest.mark.parametrize(("means", "said"), AGREEMENTS.values(), ids=AGREEMENTS)
def test_what_is_said_of_maps_under_faults_is_what_their_intervals_tell(means, said):
    every = styles(["baseline", "descriptions"], {})
    variants = [Variant(key, every[key], []) for key in every][: len(means)]
    shifts = [mean and SimpleNamespace(flips=50, rank_correlation=Estimate(*mean, 9)) for mean in means]
    assert said in _agreement_in_words(variants, [SimpleNamespace(weights=shift) for shift in shifts])


def test_what_a_killed_stage_has_left_is_removed_and_what_others_have_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("plots/.figures.tmp/half.png", "plots/mine.tmp/kept", "plots/figures/old.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x", encoding="utf-8")
    monkeypatch.setattr(figures, "load_results", lambda runs: {})
    monkeypatch.setattr(figures, "load_cells", lambda runs: [])
    monkeypatch.setattr(figures, "write_figures", lambda *given: write_text(given[-1] / "new.png", "x"))
    figures.main(SimpleNamespace(runs={}))
    left = sorted(str(path) for path in Path("plots").rglob("*") if path.is_file())
    assert left == ["plots/figures/new.png", "plots/figures/old.png", "plots/mine.tmp/kept"]
    assert not Path("plots/.figures.tmp").exists()

    def fail(*given):
        write_text(given[-1] / "half.png", "x")
        raise InvalidArtifact("no")

    monkeypatch.setattr(figures, "write_figures", fail)
    with pytest.raises(InvalidArtifact):
        figures.main(SimpleNamespace(runs={}))
    assert sorted(str(path) for path in Path("plots").rglob("*") if path.is_file()) == left


def test_the_environment_chooses_no_backend(untouched):
    started = f"import runpy; runpy.run_path({str(REPOSITORY / 'stages' / '__main__.py')!r}); import matplotlib"
    assert run([sys.executable, "-c", started], untouched.folder, MPLBACKEND="nonsense").stderr == ""
