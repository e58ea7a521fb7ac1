"""The page that `dvc plots show` writes: it draws without a network."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from conftest import REPOSITORY, show
from smoke_grid import run

DRAWN = """
    const found = document.querySelectorAll("canvas.marks");
    return [...found].map(canvas => new Set(
        new Uint32Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer)
    ).size);
"""  # how many colours each chart has


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of a DVC repository with a plot for each of our templates."""
    folder = tmp_path_factory.mktemp("plots")
    run(["dvc", "init", "--no-scm", "--quiet"], folder)
    shutil.copytree(REPOSITORY / ".dvc" / "plots", folder / ".dvc" / "plots")
    run(["dvc", "config", "plots.html_template", "plots/page.html"], folder)
    names = {"dataset": "digits", "backbone": "resnet18", "variant": ["baseline", "random"] * 2, "run": ["a", "b"] * 2}
    pd.DataFrame({**names, "epoch": [1, 1, 2, 2], "loss": [2.5, 2.0, 1.5, 1.0]}).to_csv(folder / "training.csv", index=False)
    pd.DataFrame({**names, "layer": ["conv1", "conv1", "fc", "fc"], "value": [0.1, 1, 10, 100]}).to_csv(
        folder / "layers.csv", index=False
    )
    plots = [
        {"training": {"template": "lines", "x": "epoch", "y": {"training.csv": "loss"}}},
        {"layers": {"template": "layers", "x": "value", "y": {"layers.csv": "layer"}}},
    ]
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"plots": plots}), encoding="utf-8")
    run(["dvc", "plots", "show"], folder)
    return folder / "dvc_plots" / "index.html"


def test_the_page_loads_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"\b(?:src|href)\s*=\s*[\"']?https?:[^>]*", text) == []
    assert re.findall(r"<script>/\* ([a-z-]+)@\d", text) == ["vega", "vega-lite", "vega-embed"]
    assert text.count("vegaEmbed('#") == 2


def test_the_page_holds_the_licences_of_its_scripts():
    text = (REPOSITORY / ".dvc" / "plots" / "page.html").read_text(encoding="utf-8").partition("<script>")[0]
    for owner in ("University of Washington Interactive Data Lab", "Mike Bostock"):
        assert owner in text
    assert text.count("Redistributions in binary form must reproduce the above copyright notice") >= 3


def test_a_browser_without_a_network_draws_every_plot(page, browser):
    from selenium.webdriver.support.wait import WebDriverWait

    show(browser, 1280, page)
    colours = WebDriverWait(browser, timeout=30).until(lambda _: len(found := browser.execute_script(DRAWN)) == 2 and found)
    assert min(colours) > 10
    assert browser.get_log("browser") == []
