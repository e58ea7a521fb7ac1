"""The grids' params.yaml: what they hold, how DVC names it and writes it, and which files of a grid are copies."""

import functools
import itertools
import operator
import shutil
from pathlib import Path

import pytest
from dvc.repo import Repo
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import load_yaml, modify_yaml

from conftest import GRID_FILES, REPOSITORY, copy_checkout
from smoke_grid import run
from textguard.params import load_params
from textguard.vision.backbones import BACKBONES
from textguard.vision.recipe import FAMILIES, load_recipe

GRIDS = sorted(path.parent.name for path in REPOSITORY.glob("grids/*/params.yaml"))
FOLDERS = [Path(), *(Path("grids") / grid for grid in GRIDS)]
each_grid = pytest.mark.parametrize("folder", FOLDERS, ids=["root", *GRIDS])


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a fresh clone holds of the pipeline and all grids, as a git repository."""
    folder = tmp_path_factory.mktemp("clone")
    copy_checkout(folder, *GRIDS)
    shutil.copy(REPOSITORY / "Makefile", folder)
    run(["git", "init", "--quiet"], folder)
    return folder


@each_grid
def test_dvc_writes_a_params_file_as_it_is(folder, tmp_path):
    """So that `dvc exp run -S` changes the one line that it is asked to change."""
    file = Path(shutil.copy(REPOSITORY / folder / "params.yaml", tmp_path))
    with modify_yaml(str(file)):
        pass
    assert file.read_text(encoding="utf-8") == (REPOSITORY / folder / "params.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("option", "place", "value"),
    [
        ('inject.format="bfp(8,7,16)"', ("inject", "format"), "bfp(8,7,16)"),
        ('inject.format="int(8)"', ("inject", "format"), "int(8)"),
        ("inject.detector=off", ("inject", "detector"), "off"),
        ('datasets.digits.folder="~/data"', ("datasets", "digits", "folder"), "~/data"),
        ('+figures.colours.random="#ff0000"', ("figures", "colours", "random"), "#ff0000"),
    ],
)
def test_dvc_takes_an_option_as_readme_says(tmp_path, option, place, value):
    file = Path(shutil.copy(REPOSITORY / "params.yaml", tmp_path))
    apply_overrides(str(file), [option])
    assert functools.reduce(operator.getitem, place, load_yaml(str(file))) == value
    load_params(file)


@each_grid
def test_the_runs_are_all_combinations(folder):
    params, written = load_params(REPOSITORY / folder / "params.yaml"), load_yaml(str(REPOSITORY / folder / "params.yaml"))
    combined = itertools.product(*(written[section] for section in ("datasets", "backbones", "variants", "seeds")))
    assert list(params.runs) == ["-".join(map(str, parts)) for parts in combined]
    assert list(params.class_texts) == [
        f"{dataset}-{variant}" for dataset in written["datasets"] for variant in written["texts"]
    ]


@each_grid
def test_dvc_calls_the_stages_as_we_do(folder, clone):
    params = load_params(clone / folder / "params.yaml")
    with Repo(clone / folder) as repo:
        listed = [stage.name for stage in repo.index.stages]
    keys: dict[str, list[str]] = {}
    for name in listed:
        stage, _, key = name.partition("@")
        keys.setdefault(stage, []).append(key)
    named = {
        ("data", "heads"): params.datasets,
        ("prompts", "responses", "embeddings", "text_quality"): params.class_texts,
        ("train", "evaluate", "ranges", "inject", "hardware"): params.runs,
        ("corruptions",): params.corrupted,
        ("closeup",): params.looked_at,
        ("check", "recipes", "results", "effects", "tables", "figures", "report"): [""],
    }
    assert keys == {stage: list(names) for stages, names in named.items() for stage in stages if names}
    # A repro that has nothing to do takes 5 s with 155, and 12 s with 300. Grids of many short runs take longer for all that.
    assert len(listed) <= (540 if folder.name in ("causes", "factorial", "texts") else 181)


@each_grid
def test_a_backbone_is_its_recipe_but_for_what_the_grid_says(folder):
    params, written = load_params(REPOSITORY / folder / "params.yaml"), load_yaml(str(REPOSITORY / folder / "params.yaml"))
    for name, fields in written["backbones"].items():
        backbone = params.backbones[name]
        own = {key: value for key, value in fields.items() if key not in ("network", "recipe")}
        assert (backbone.network, backbone.recipe) == (fields.get("network", name), fields.get("recipe") or FAMILIES[name])
        assert vars(load_recipe(backbone.recipe, own)).items() <= vars(backbone).items()


def test_every_network_with_a_name_of_its_own_has_a_recipe():
    assert set(FAMILIES) == set(BACKBONES)


@pytest.mark.parametrize("grid", ["fashion", "table1"])
def test_the_largest_grids_fit_on_two_pages(grid):
    assert len((REPOSITORY / "grids" / grid / "params.yaml").read_text(encoding="utf-8").splitlines()) < 150


def test_every_grid_is_what_make_grids_makes_of_the_root(clone):
    copies = [Path("grids") / grid / name for grid in GRIDS for name in GRID_FILES if name != "params.yaml"]
    for path in copies:
        shutil.rmtree(clone / path) if (clone / path).is_dir() else (clone / path).unlink()
    run(["make", "-o", "setup", "grids"], clone)  # a copy has no environment of its own
    for path in copies:
        for name in run(["git", "ls-files", str(path)], REPOSITORY).stdout.splitlines():
            made, file = clone / name, REPOSITORY / name
            if file.is_symlink():
                assert made.readlink() == file.readlink()
            elif file.is_file():
                assert made.read_bytes() == file.read_bytes(), file
