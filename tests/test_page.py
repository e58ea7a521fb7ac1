"""The page of results: what it holds, what it must not let through, and how it behaves in a real browser."""

import base64
import hashlib
import html
import io
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from dvc.utils.serialize import modify_yaml
from PIL import Image
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from conftest import REPOSITORY, show
from smoke_grid import run
from textguard.artifacts import read_json_lines, write_csv, write_json, write_json_lines
from textguard.errors import InvalidArtifact
from textguard.params import load_params
from textguard.report.page import Revision, as_shown, main, read_revision, write_page
from textguard.report.rendering import Table, show_estimate, show_number
from textguard.schema.base import Measured

SMOKE = REPOSITORY / "grids" / "smoke"
TEXT = "digits-descriptions"
ATTACK = "<script>alert(1)</script>"
REVISION = Revision("abc1234", "2026-01-31", changed=True)


class Elements(HTMLParser):
    """Every start tag of a page, with its attributes; and all text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.found if name in attributes]


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    """The smoke grid's results as they are in git, and its texts."""
    folder = tmp_path_factory.mktemp("grid")
    for name in ("metrics", "plots"):
        shutil.copytree(SMOKE / name, folder / name)
    shutil.copy(SMOKE / "params.yaml", folder)
    with modify_yaml(str(folder / "params.yaml")) as params:
        params["root"] = str(REPOSITORY)
    for stage, key in (("data", "digits"), ("prompts", TEXT), ("responses", TEXT)):
        run([sys.executable, str(REPOSITORY / "stages"), stage, key], folder)
    return folder


@pytest.fixture
def here(grid, tmp_path, monkeypatch) -> Path:
    """A copy of it, to be changed, as the current folder."""
    folder = Path(shutil.copytree(grid, tmp_path / "grid"))
    monkeypatch.chdir(folder)
    return folder


def page(name: str = "page.html") -> Elements:
    write_page(Path(name), load_params(), REVISION)
    return Elements(Path(name).read_text(encoding="utf-8"))


def figures(elements: Elements) -> dict[str, str]:
    """Of each figure, what is said to those who do not see it, by its id."""
    found, name = {}, ""
    for tag, attributes in elements.found:
        name = attributes["id"] or "" if tag == "figure" else name
        if tag == "svg" and name and name not in found:
            found[name] = attributes["aria-label"] or ""
    return found


def written() -> str:
    """The page's HTML."""
    write_page(Path("page.html"), load_params(), REVISION)
    return Path("page.html").read_text(encoding="utf-8")


def test_the_page_holds_every_run_table_and_figure_and_needs_nothing_else(here):
    elements = page()
    params = load_params()
    for key in params.runs:
        assert f"run-{key}" in elements.attributes("id")
    drawn = list(Path("plots").rglob("*.svg"))
    assert len(figures(elements)) == len(drawn) > 10
    assert elements.attributes("src") == []
    links = [link for link in elements.attributes("href") if not link.startswith("data:")]
    assert all(link[0] == "#" and link[1:] in elements.attributes("id") for link in links)
    pictures = [attributes["href"] or "" for tag, attributes in elements.found if tag == "image"]
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    ids = elements.attributes("id")
    assert set(elements.attributes("aria-describedby") + elements.attributes("data-filters")) <= set(ids)
    assert len(ids) == len(set(ids))
    assert "abc1234 of 2026-01-31, with changes" in elements.text
    assert "written for this repository, not by GPT-3" in elements.text
    assert Path("page.html").stat().st_size < 1e6


REMARKS = (
    "changes the class more often, in ResNet-18 on digits",
    "changes the class less often is not shown for ResNet-18 on digits",
)


@pytest.mark.parametrize(
    ("head", "neurons", "remarked"),
    [
        ("better", "worse", (True, False)),
        ("better", "not separable at 99%", (False, True)),
        ("better", "better", (False, False)),
        ("not separable at 99%", "worse", (False, False)),
    ],
)
def test_a_better_head_is_remarked_as_far_as_verdicts_on_all_neurons_go(here, head, neurons, remarked):
    file = Path("metrics/cells.json")
    cells = json.loads(file.read_text(encoding="utf-8"))
    for cell in cells:
        found = next(iter(cell["detectors"].values()))["verdict"]
        found["delta_loss"]["head"], found["sdc"]["by_neurons"] = head, neurons
    write_json(file, cells)
    assert tuple(words in page().text for words in REMARKS) == remarked


def test_the_same_results_make_the_same_bytes(here):
    page("a.html"), page("b.html")
    assert Path("a.html").read_bytes() == Path("b.html").read_bytes()


def test_what_comes_from_outside_stays_text(here):
    answers = Path("prompts") / "texts" / TEXT / "responses.jsonl"
    rows = read_json_lines(answers, "responses")
    write_json_lines(
        answers,
        [{**row, "class_name": ATTACK, "text": f'"><img src=x onerror=alert(2)> {ATTACK}', "model": ATTACK} for row in rows],
    )
    classes = Path("metrics/texts") / f"{TEXT}.csv"
    table = pd.read_csv(classes)
    write_csv(classes, table.assign(**{"class": [f"{ATTACK} {row}" for row in table.index], "nearest_wrong": "{{ 7 * 7 }}"}))
    with modify_yaml("params.yaml") as params:
        params["texts"]["descriptions"]["questions"][0] = f"{{class}} {ATTACK}"
    elements = page()
    assert [tag for tag, _ in elements.found].count("script") == 1
    assert elements.attributes("onerror") == []
    assert elements.text.count(ATTACK) > 10
    assert "{{ 7 * 7 }}" in elements.text


def test_what_is_missing_is_named(here, capsys):
    picture = next(Path("plots/figures").glob("bits-*.svg"))
    for file, stage in ((picture, "figures"), (Path("plots/texts") / TEXT / "similarity.svg", "text_quality")):
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(InvalidArtifact, match=f"{file} is missing; stage '{stage}' writes it: run 'dvc repro'"):
            page()
        file.write_bytes(content)
    assert main(["nowhere"]) == 2
    assert main([str(here / "metrics" / "texts"), "base", "page.html"]) == 2
    assert "holds no run's metrics" in capsys.readouterr().err


LINES = b'{"class_name": "zero", "text": "a", "provider": "p", "model": null}\n'
DAMAGED = {
    "an empty picture": ("plots/figures/tradeoff.svg", b"", "figures"),
    "no picture": ("plots/figures/tradeoff.svg", b"<script>alert(1)</script>", "figures"),
    "half a picture": ("plots/figures/tradeoff.svg", None, "figures"),
    "a picture without a size": (f"plots/texts/{TEXT}/similarity.svg", b"<svg/>", "text_quality"),
    "no table": (f"metrics/texts/{TEXT}.csv", b"class\nzero\n", "text_quality"),
    "half a table": (f"metrics/texts/{TEXT}.csv", None, "text_quality"),
    "an answer that is a number": (f"prompts/texts/{TEXT}/responses.jsonl", LINES.replace(b'"a"', b"7"), "responses"),
    "no answer": (f"prompts/texts/{TEXT}/responses.jsonl", b'{"class": "zero"}\n', "responses"),
    "an answer of a list": (f"prompts/texts/{TEXT}/responses.jsonl", LINES.replace(b"null", b"[]"), "responses"),
}


@pytest.mark.parametrize(("name", "content", "stage"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_with_the_stage_that_makes_it(here, name, content, stage):
    whole = Path(name).read_bytes()
    Path(name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(InvalidArtifact) as error:
        page()
    assert str(error.value).startswith(name)
    assert str(error.value).endswith(f"delete it and run 'dvc repro': stage '{stage}' writes it")
    assert not Path("page.html").exists()


def test_classes_are_called_as_they_were_written(here):
    names = ["NA", "null", "None", "nan", "007", "1e3", "True", "=1+1", "-5", "'@x"]
    file = Path("metrics/texts") / f"{TEXT}.csv"
    write_csv(file, pd.read_csv(file).assign(**{"class": names, "nearest_wrong": [*names[1:], names[0]]}))
    _, _, table = written().partition(f'id="classes-{TEXT}"')
    shown = re.findall(r"<tr><td>([^<]*)</td>.*<td>([^<]*)</td><td>[^<]*</td></tr>", table)
    assert [tuple(map(html.unescape, pair)) for pair in shown] == list(zip(names, [*names[1:], names[0]], strict=True))


def test_the_browser_is_told_to_run_nothing_but_the_pages_script(here):
    text = written()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    contents = {kind: re.search(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)[1].encode() for kind in ("style", "script")}
    hashes = {kind: base64.b64encode(hashlib.sha256(content).digest()).decode() for kind, content in contents.items()}
    assert html.unescape(policy) == (
        "default-src 'none'; object-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'"
    )
    elements = Elements(text)
    assert elements.attributes("style") == []
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]


def test_no_two_elements_have_one_id():
    names = ["digits-x", "digits_x", "digits-x-note", "digits.x", "digits:x", "digits x", "note-x", "x", "X", "é", "\u202e"]
    found = [table["id"] for table in tables(names)] + [table["note"] for table in tables(names)]
    assert len(set(found)) == len(found)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in found)


def tables(names: list[str]) -> list[dict[str, Any]]:
    return [as_shown(Table(f"{kind}-{name}", "caption", [], []), "") for kind in ("layers", "classes") for name in names]


def test_what_cannot_be_seen_is_spelled_out(here):
    answers = Path("prompts") / "texts" / TEXT / "responses.jsonl"
    odd = "\x00 \x1b[31m \u202e \x85"
    rows = read_json_lines(answers, "responses")
    answers.write_text("".join(json.dumps({**row, "class_name": odd, "text": odd}) + "\n" for row in rows), encoding="utf-8")
    here.rename(here.with_name("caf\udce9"))
    elements = Elements(written())
    assert r"\x00 \x1b[31m \u202e \x85" in elements.text
    assert r"caf\udce9 grid" in elements.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", elements.text)


def test_two_revisions_stand_side_by_side(here):
    shutil.copytree("metrics/results", "base")
    file = next(Path("metrics/results").glob("*baseline*"))
    stored = json.loads(file.read_text(encoding="utf-8"))
    stored["top1"]["value"] = 0.123
    file.write_text(json.dumps(stored), encoding="utf-8")
    assert main(["base", "v1.0", "page.html"]) == 0
    text = Elements(Path("page.html").read_text(encoding="utf-8")).text
    assert "Beside v1.0" in text
    assert re.search(r"PASS|FAIL", text)
    assert "12.3" in text


def test_outside_git_there_is_no_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(read_revision()) == "not in git"
    run(["git", "init", "-q"], tmp_path)
    assert str(read_revision()) == "not in git"


@pytest.fixture(params=[390, 1280])
def opened(request, here, browser):
    """The page, shown at a phone's and at a desk's width."""
    page()
    show(browser, request.param, Path("page.html"))
    yield browser
    assert browser.get_log("browser") == []


def test_nothing_is_wider_than_the_window(opened):
    assert opened.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_links_lead_to_what_they_name_and_open_it(opened):
    for link in opened.find_elements("css selector", "nav a"):
        opened.execute_script("arguments[0].click()", link)
        target = link.get_attribute("href").partition("#")[2]
        assert opened.execute_script("return document.querySelector(location.hash) !== null"), target
    opened.execute_script("location.hash = document.querySelector('details table').id")
    opened.execute_async_script("addEventListener('hashchange', arguments[0]); setTimeout(arguments[0], 200)")
    assert opened.execute_script("return document.querySelector('details:has(table)').open")
    opened.execute_script("document.querySelector('h3[id] + details').open = false")
    opened.execute_script("location.hash = document.querySelector('h3:has(+ details)').id")
    wait = WebDriverWait(opened, 5)
    wait.until(lambda page: page.execute_script("return document.querySelector('h3[id] + details').open"))


@pytest.mark.parametrize("fragment", ["%", "%E0%A4%A", "__proto__", "nothing", "%00", "a%20b", "'\"><script>"])
def test_whatever_follows_the_hash_does_no_harm(opened, fragment):
    opened.execute_script("location.hash = arguments[0]", fragment)
    opened.execute_async_script("setTimeout(arguments[0], 50)")
    opened.get(opened.current_url.partition("#")[0] + "#" + fragment)
    opened.refresh()
    assert opened.execute_script("return !document.querySelector('input[data-filters]').closest('p').hidden")


def test_no_other_script_or_style_runs(opened):
    added = """
        const script = document.createElement("script");
        script.textContent = "document.title = 'run'";
        document.body.append(script);
        const picture = "<img src='https://x.example/x.png' onerror='document.title = 1'>";
        document.body.insertAdjacentHTML("beforeend", `${picture}<p id='mine' style='color: red'>`);
        const done = arguments[0];
        setTimeout(() => done([document.title, getComputedStyle(document.getElementById("mine")).color]), 200);
    """
    title, colour = opened.execute_async_script(added)
    assert title.startswith("textguard: ")
    assert colour != "rgb(255, 0, 0)"
    refused = [entry["message"] for entry in opened.get_log("browser")]
    assert len([line for line in refused if "Content Security Policy" in line]) >= 4  # script, handler, picture, style


def test_tables_sort_by_number_and_filter_by_text(opened):
    opened.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")
    table = opened.find_element("css selector", "table.sortable")
    column = "return [...arguments[0].tBodies[0].rows].filter(row => !row.hidden).map(row => row.cells[%d].textContent)"
    header = table.find_elements("css selector", "th")[2]
    assert header.text.startswith("Neurons")
    button = header.find_element("css selector", "button")
    for order, expected in (("ascending", sorted), ("descending", lambda numbers: sorted(numbers, reverse=True))):
        opened.execute_script("arguments[0].click()", button)
        numbers = [int(text.replace(",", "")) for text in opened.execute_script(column % 2, table)]
        assert header.get_attribute("aria-sort") == order
        assert numbers == expected(numbers)
        assert len(set(numbers)) > 3
    field = opened.find_element("css selector", f"input[data-filters='{table.get_attribute('id')}']")
    field.send_keys("layer4")
    left = opened.execute_script(column % 0, table)
    assert left
    assert all("layer4" in name for name in left)


def test_switches_show_the_numbers_of_one_detector_and_one_place(opened):
    """Whatever is chosen, the rows that are left are those of metrics/cells.json."""
    cells = json.loads(Path("metrics/cells.json").read_text(encoding="utf-8"))
    rows = "return [...document.querySelectorAll('#matrix tbody tr')].filter(row => row.checkVisibility()).map("
    rows += "row => [...row.cells].map(cell => cell.textContent))"
    detector, place = (Select(field) for field in opened.find_elements("css selector", "[data-switches] select"))
    assert (detector.first_selected_option.text, place.first_selected_option.text) == ("profiled", "all layers")
    for chosen in cells[0]["detectors"]:
        for key, words in (("by_neurons", "all neurons"), ("head", "head alone"), ("overall", "all layers")):
            detector.select_by_visible_text(chosen)
            place.select_by_visible_text(words)
            shown = opened.execute_script(rows)
            assert [row[2:4] for row in shown] == [[chosen, words]] * len(cells)
            for row, cell in zip(shown, cells, strict=True):
                found = cell["detectors"][chosen]["improvement"]
                estimates = [Measured(**nan(found[measure][key])) for measure in ("sdc", "delta_loss", "mismatch")]
                for said, one in zip(row[4:], estimates, strict=True):
                    assert said.replace("\xa0", " ").startswith(show_estimate(one))


def test_a_picture_says_its_finding_to_those_who_do_not_see_it_and_can_be_linked(here):
    elements = page()
    with Image.open("plots/figures/improvement.png") as picture:
        finding = picture.info["Title"]
    assert finding.startswith("ResNet-18 on digits, descriptions beside the baseline: SDC has no verdict from 1 training")
    assert figures(elements)["picture-improvement"] == finding
    assert {tag["href"][1:] for name, tag in elements.found if name == "a" and "aria-label" in tag} == set(figures(elements))


def nan(numbers: dict) -> dict:
    """An estimate as JSON has it, with NaN for null."""
    return {name: math.nan if value is None else value for name, value in numbers.items()}


def test_the_answer_counts_verdicts_and_one_training_is_never_green(here):
    file = Path("metrics/cells.json")
    cells = json.loads(file.read_text(encoding="utf-8"))
    elements = page()
    assert "of 1 comparison with a baseline: SDC over all layers is told apart in none" in elements.text
    for cell in cells:
        verdicts = cell["detectors"]["profiled"]["verdict"]
        verdicts["sdc"]["overall"], verdicts["delta_loss"]["overall"], verdicts["sdc"]["by_neurons"] = (
            "better",
            "worse",
            "better",
        )
    write_json(file, cells)
    said = (
        "Behind the range detector profiled, of 1 comparison with a baseline: SDC over all layers is lower in 1; DeltaLoss is "
    )
    assert said + "higher in 1; FIT is lower in 1." in page().text


def test_dots_are_trainings_and_say_what_each_gives(opened):
    """Those of the rows that are shown first, as metrics/results has them."""
    keys = [key for key, each in load_params().runs.items() if each.variant != "baseline"]
    results = [json.loads(Path(f"metrics/results/{key}.json").read_text(encoding="utf-8")) for key in keys]
    dots = "return [...document.querySelectorAll('#matrix tbody tr')].filter(row => row.checkVisibility()).map("
    dots += "row => [...row.querySelectorAll('circle')].map(dot => dot.textContent))"
    for said, result in zip(opened.execute_script(dots), results, strict=True):
        improved = result["detectors"]["profiled"]["improvement"]
        values = [nan(improved[measure]["overall"])["value"] for measure in ("sdc", "delta_loss", "mismatch")]
        assert said == [f"seed {result['seed']}: {show_number(value)}" for value in values if not math.isnan(value)] != []


def test_a_row_picks_its_marks_out_of_the_figures(opened):
    """By the pointer, by the focus, and for as long as its link is followed."""
    lit = "return [...document.querySelectorAll('.picked .lit')].map(mark => mark.dataset.mark)"
    row = opened.find_element("css selector", "#matrix tr[data-mark]:not([hidden])")
    key, link = row.get_attribute("data-mark"), row.find_element("css selector", "a")
    assert key == "digits resnet18 descriptions"
    assert opened.execute_script(lit) == []
    opened.execute_script("arguments[0].dispatchEvent(new PointerEvent('pointerenter'))", row)
    assert set(opened.execute_script(lit)) == {key}
    opened.execute_script("arguments[0].dispatchEvent(new PointerEvent('pointerleave'))", row)
    assert opened.execute_script(lit) == []
    opened.execute_script("arguments[0].focus()", link)
    assert set(opened.execute_script(lit)) == {key}
    link.send_keys(Keys.ENTER)
    opened.execute_script("document.activeElement.blur()")
    assert set(opened.execute_script(lit)) == {key}
    assert opened.execute_script("return location.hash") == "#picture-improvement"
    opened.find_element("css selector", "body").send_keys(Keys.ESCAPE)
    assert opened.execute_script(lit) == []


def test_the_contents_stay_in_sight_and_say_where_one_is(opened):
    for name in ("figures", "tables", "headline"):
        opened.execute_script("document.getElementById(arguments[0]).scrollIntoView()", name)
        here = "return [...document.querySelectorAll('.bar [aria-current]')].map(link => link.hash.slice(1))"
        WebDriverWait(opened, timeout=10).until(lambda _, here=here, name=name: opened.execute_script(here) == [name])
        top, bottom = opened.execute_script(
            "const place = document.querySelector('.bar').getBoundingClientRect(); return [place.top, place.bottom]"
        )
        assert bottom > top
        assert name == "headline" or top == 0


def test_no_column_is_cut_at_a_desk(opened):
    opened.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")
    cut = "return [...document.querySelectorAll('.wide')].filter(box => box.scrollWidth > box.clientWidth).map("
    cut += "box => box.ariaLabel)"
    if opened.execute_script("return innerWidth >= 1280"):
        assert opened.execute_script(cut) == []
    assert opened.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_paper_has_the_sections_and_the_figures_in_order(opened):
    opened.execute_script("document.documentElement.dataset.theme = 'dark'")
    asked = {"generateDocumentOutline": True, "generateTaggedPDF": True}
    pdf = base64.b64decode(opened.execute_cdp_cmd("Page.printToPDF", asked)["data"])
    titles = [title.decode() for title in re.findall(rb"/Title \((.*?)\)\n/Dest", pdf)]
    sections = opened.execute_script("return [...document.querySelectorAll('h2')].map(heading => heading.textContent)")
    assert [title for title in titles if title in sections] == sections
    said = [re.sub(rb"\\(.)", rb"\1", alt).decode() for alt in re.findall(rb"/Alt \(((?:[^\\)]|\\.)*)\)", pdf)]
    drawn = "return [...document.querySelectorAll('figure svg')].map(drawing => drawing.ariaLabel)"
    expected = [alt for alt in opened.execute_script(drawn) if alt.isascii()]  # PDF writes others in UTF-16
    assert [alt for alt in said if alt in expected] == expected != []
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert opened.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not opened.execute_script("return document.querySelector('.bar').checkVisibility()")
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_the_theme_can_be_switched(opened):
    ground = "return getComputedStyle(document.body).backgroundColor"
    before = opened.execute_script(ground)
    button = opened.find_element("id", "theme")
    button.click()
    assert opened.execute_script(ground) != before
    button.click()
    assert opened.execute_script(ground) == before


def screenshot(browser) -> np.ndarray:
    """(H, W, 3) 8-bit levels of what the window shows."""
    return np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")).astype(int)


def test_the_same_page_looks_the_same(opened):
    first = screenshot(opened)
    opened.refresh()
    # Chromium rounds a few pixels by a level or two, depending on when it draws its tiles.
    assert abs(screenshot(opened) - first).max() <= 4
    opened.find_element("id", "theme").click()
    assert abs(screenshot(opened) - first).max() > 100


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(opened, theme):
    axe = pytest.importorskip("axe_core_python.selenium")
    opened.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
    opened.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")
    found = axe.Axe().run(opened)["violations"]
    assert [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")] == []


def test_a_class_called_like_a_script_does_not_run(here, browser):
    answers = Path("prompts") / "texts" / TEXT / "responses.jsonl"
    write_json_lines(answers, [{**row, "class_name": ATTACK, "text": ATTACK} for row in read_json_lines(answers, "responses")])
    page()
    show(browser, 1280, Path("page.html"))
    assert ATTACK in browser.execute_script("return document.body.textContent")
    assert browser.execute_script("return document.scripts.length") == 1
    assert browser.get_log("browser") == []
