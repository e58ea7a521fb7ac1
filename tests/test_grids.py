"""The grids of the repository: every one can be read, listed by DVC, and planned, before any data set is there."""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from site_coverage import coverage

from conftest import REPOSITORY, copy_checkout
from smoke_grid import run
from stages.plan import main as plan
from textguard.artifacts import code_of_users
from textguard.params import load_params
from textguard.planning import Speeds, Workload, disk_size, duration
from textguard.vision.backbones import BACKBONES, build_backbone
from textguard.vision.datasets import expected_sizes

GRIDS = {
    "smoke": 2,
    "table1": 28,
    "table2": 16,
    "table3": 4,
    "fashion": 24,
    "faults": 9,
    "causes": 100,
    "factorial": 64,
    "texts": 85,
    "cifar10": 30,
    "cifar10_resnet50": 12,
    "vit": 15,
    "own": 1,
}  # runs
OWN_NETWORKS = ("own", "vit")  # tests/test_own_code.py builds the former's


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a fresh clone holds, without any data or result, as a DVC repository."""
    folder = tmp_path_factory.mktemp("clone")
    copy_checkout(folder, *GRIDS)
    run(["git", "init", "--quiet"], folder)
    return folder


def test_no_grid_is_forgotten_here():
    assert {path.parent.name for path in REPOSITORY.glob("grids/*/params.yaml")} == set(GRIDS)


@pytest.mark.parametrize("grid", ["table2", "vit"])  # two data sets; code of its own. All grids have one dvc.yaml but for that
def test_dvc_would_run_all_stages_of_a_grid_without_data(grid, clone):
    params = load_params(clone / "grids" / grid / "params.yaml")
    done = run([sys.executable, "-m", "dvc", "repro", "--dry", "--force"], clone / "grids" / grid)
    listed = re.findall(r"Running stage '([^']+)'", done.stdout)
    assert done.returncode == 0, done.stderr
    of_runs = 5 * len(params.runs) + len(params.looked_at) + len(params.corrupted)
    assert len(listed) == len(set(listed)) == 2 * len(params.datasets) + 4 * len(params.class_texts) + of_runs + 7


@pytest.mark.parametrize(("grid", "runs"), GRIDS.items())
def test_networks_and_recipes_of_a_grid_fit(grid, runs):
    params = load_params(REPOSITORY / "grids" / grid / "params.yaml")
    assert len(params.runs) == runs
    if grid in OWN_NETWORKS:
        return
    for key, item in params.runs.items():
        backbone, recipe = BACKBONES[item.backbone], params.backbones[item.backbone]
        assert key == f"{item.dataset}-{item.backbone}-{item.variant}-{item.seed}"
        assert item.backbone.startswith(recipe.recipe)
        assert backbone.smallest <= recipe.image_size <= backbone.largest
        large = 256 if recipe.recipe == "swin" else 224
        assert recipe.image_size == (large if grid.startswith("table") else 32)


def test_every_layer_of_the_small_transformer_takes_faults(clone, monkeypatch):
    monkeypatch.chdir(clone / "grids" / "vit")
    monkeypatch.setattr("sys.path", list(sys.path))
    params = load_params(Path("params.yaml"))
    backbone = params.backbones["vit"]
    found = coverage(
        lambda: build_backbone(backbone.network, 10, backbone.image_size), backbone.image_size, params.inject.kinds
    )
    code_of_users.clear()
    # The patches; in each of 4 encoder layers two projections of the attention and two layers of the MLP; the head.
    assert found.of_kind == {"Conv2d": 1, "Linear": 4 * 4 + 1}
    assert (found.unaccounted, found.false) == ([], [])


def test_table1_has_all_networks():
    params = load_params(REPOSITORY / "grids" / "table1" / "params.yaml")
    assert {(item.backbone, item.variant) for item in params.runs.values()} == {
        (name, variant) for name in BACKBONES for variant in ("baseline", "descriptions")
    }


def test_seconds_and_bytes_of_a_run_of_table1():
    train, test, _ = expected_sizes("imagenet", test_share=0.2, limit_train=0, limit_test=0)
    work = Workload(train, test, 90 * train, 53, 4096, 25_557_032, 2)
    seconds = work.seconds(Speeds(training=1000, inference=4000, injections=500))
    assert work.injections == 217_088
    assert seconds["train"] == pytest.approx(90 * 1_281_167 / 1000)
    assert seconds["ranges"] == pytest.approx(2 * 1_281_167 / 4000)
    assert seconds["evaluate"] == pytest.approx(50_000 / 4000)
    assert seconds["inject"] == pytest.approx(50_000 / 4000 + 217_088 * 1.26 / 500)
    assert work.disk_bytes == pytest.approx(4 * 25_557_032 + 217_088 * (23 + 2 * 0.13 * 16) + 17 * 50_000, abs=1)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.4, "0.4 s"),
        (0.0123, "0.012 s"),
        (59, "59 s"),
        (90, "90 s"),
        (119, "120 s"),
        (150, "2.5 min"),
        (40 * 60, "40 min"),
        (2.54 * 3600, "2.5 h"),
        (3 * 3600, "3 h"),
        (30 * 3600, "30 h"),
        (9 * 86_400, "9 days"),
        (1_581_755.095 * 3600, "180 years"),
        (2e5 * 365.25 * 86_400, "200,000 years"),
        (math.inf, "inf years"),
    ],
)
def test_a_time_is_said_in_a_unit_that_a_person_takes_in(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "0 kB"), (12_345, "12 kB"), (45.6e6, "46 MB"), (999e6, "1,000 MB"), (1.02e9, "1 GB"), (3.14e12, "3.1 TB")],
)
def test_a_size_is_said_in_a_unit_that_a_person_takes_in(size, said):
    assert disk_size(size) == said


def test_sizes_of_a_data_set_that_is_split_here():
    assert expected_sizes("digits", test_share=0.2, limit_train=0, limit_test=60) == (1437, 60, 10)


def test_the_smoke_grid_is_planned(clone):
    done = run([sys.executable, str(Path("../../stages")), "plan"], clone / "grids" / "smoke")
    assert done.returncode == 0, done.stderr
    first, second, *lines = done.stdout.splitlines()
    assert re.match(r"All 2 runs take [\d.]+ (s|min) of one device like this \(cpu, .*\); two such devices halve it\.", first)
    assert re.match(r"They make 1,312 injections and leave 9\d MB on the disk\.", second)
    header = next(line for line in lines if "epochs" in line)
    expected = "run images epochs sites injections disk train evaluate+ranges inject all"
    assert " ".join(header.split()) == expected
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.lstrip().startswith("digits-")}
    assert rows["digits-resnet18-baseline-0"][:6] == ["100+60", "2", "20", "640", "45", "MB"]
    assert rows["digits-resnet18-descriptions-0"][:6] == ["100+60", "2", "21", "672", "46", "MB"]
    for row in rows.values():
        assert all(re.fullmatch(r"\d+|\d\.\d+", number) for number in row[6::2]), row
        assert set(row[7::2]) <= {"s", "min"}, row
        assert len(row[6:]) == 8
    assert max(map(len, lines)) <= 128
    assert "Not counted: reading and augmenting images" in done.stdout


def test_images_of_a_folder_are_counted_for_a_plan(clone, tmp_path, monkeypatch, capsys):
    for number in range(7 * 2):
        file = tmp_path / "folder" / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(file)
    monkeypatch.setenv("TEXTGUARD_DATA", str(tmp_path))
    monkeypatch.setattr("stages.plan.SECONDS", 0.0)
    params = load_params(clone / "grids" / "smoke" / "params.yaml")
    dataset = replace(params.datasets["digits"], source="folder", test_share=0.25, limit_train=8, limit_test=0)
    plan(replace(params, root=str(clone), datasets={"digits": dataset}))
    assert capsys.readouterr().out.count(" 8+4 ") == 2  # a quarter of 14, rounded up
