"""The grids of the repository: every one can be read, listed by DVC, and planned, before any data set is there."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from conftest import CHECKOUT, REPOSITORY
from smoke_grid import run
from textguard.params import load_params
from textguard.planning import Speeds, Workload
from textguard.vision.backbones import BACKBONES
from textguard.vision.datasets import expected_sizes

GRIDS = {"smoke": 2, "table1": 28, "table2": 16, "table3": 4, "fashion": 24}  # runs


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a fresh clone holds, without any data or result, as a DVC repository."""
    folder = tmp_path_factory.mktemp("clone")
    for name in CHECKOUT:
        source = REPOSITORY / name
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder / name)
    for name in GRIDS:
        (folder / "grids" / name).mkdir(parents=True)
        for file in ("dvc.yaml", "params.yaml"):
            shutil.copy(REPOSITORY / "grids" / name / file, folder / "grids" / name / file)
    run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], folder)
    return folder


def test_no_grid_is_forgotten_here():
    assert {path.parent.name for path in REPOSITORY.glob("grids/*/params.yaml")} == set(GRIDS)


@pytest.mark.parametrize("grid", GRIDS)
def test_dvc_lists_all_stages_of_a_grid_without_data(grid, clone):
    params = load_params(clone / "grids" / grid / "params.yaml")
    done = run([sys.executable, "-m", "dvc", "repro", "--dry", "--force", "dvc.yaml"], clone / "grids" / grid)
    listed = re.findall(r"Running stage '([^']+)'", done.stdout)
    assert done.returncode == 0, done.stderr
    assert len(listed) == len(set(listed)) == len(params.datasets) + 4 * len(params.texts) + 5 * len(params.runs) + 5
    assert len(listed) <= 150  # a repro that has nothing to do takes 5 s then, and 12 s with 300


@pytest.mark.parametrize(("grid", "runs"), GRIDS.items())
def test_networks_and_recipes_of_a_grid_fit(grid, runs):
    params = load_params(REPOSITORY / "grids" / grid / "params.yaml")
    assert len(params.runs) == runs
    for key, item in params.runs.items():
        backbone, recipe = BACKBONES[item.backbone], params.recipes[item.recipe]
        assert key == f"{item.dataset}-{item.backbone}-{item.variant}-s{item.seed}"
        assert item.backbone.startswith(item.recipe)
        assert backbone.smallest <= recipe.image_size <= backbone.largest
        assert recipe.image_size == (32 if grid in ("smoke", "fashion") else 256 if item.recipe == "swin" else 224)


def test_table1_has_all_networks():
    params = load_params(REPOSITORY / "grids" / "table1" / "params.yaml")
    assert {(item.backbone, item.variant) for item in params.runs.values()} == {
        (name, variant) for name in BACKBONES for variant in ("baseline", "descriptions")
    }


def test_hours_and_bytes_of_a_run_of_table1():
    train, test, _ = expected_sizes("imagenet", test_share=0.2, limit_train=0, limit_test=0)
    work = Workload(train, test, 90 * train, 53, 4096, 25_557_032, 2)
    hours = work.hours(Speeds(training=1000, inference=4000, injections=500))
    assert work.injections == 217_088
    assert hours["train"] == pytest.approx(90 * 1_281_167 / 1000 / 3600)
    assert hours["ranges"] == pytest.approx(2 * 1_281_167 / 4000 / 3600)
    assert hours["evaluate"] == pytest.approx(50_000 / 4000 / 3600)
    assert hours["inject"] == pytest.approx((50_000 / 4000 + 217_088 * 1.26 / 500) / 3600)
    assert work.disk_bytes == pytest.approx(4 * 25_557_032 + 217_088 * (23 + 2 * 0.13 * 16) + 17 * 50_000, abs=1)


def test_sizes_of_a_data_set_that_is_split_here():
    assert expected_sizes("digits", test_share=0.2, limit_train=0, limit_test=60) == (1437, 60, 10)


def test_the_smoke_grid_is_planned(clone):
    done = run([sys.executable, str(Path("../../stages")), "plan"], clone / "grids" / "smoke")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith(("digits-", "total"))}
    assert rows["digits-resnet18-baseline-0"][:5] == ["100", "60", "2", "20", "640"]
    assert rows["digits-resnet18-descriptions-0"][:5] == ["100", "60", "2", "21", "672"]
    assert "Not counted: reading and augmenting images" in done.stdout
