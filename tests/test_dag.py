"""The DAG is exact: what changes reruns, and what does not change does not.

These tests ask the real `dvc`, in a smoke grid that has run once. What stands behind a stage that has to run again is seen
without running it, since DVC compares the files that each stage reads: only a training is run, to see its files change.
"""

import json
from pathlib import Path

import grimp
import pytest
import yaml

from conftest import REPOSITORY
from smoke_grid import GRID, GUIDED, RUNS, TEXT, TEXTS, change, repro, run, stages
from textguard.dag import definition
from textguard.params import load_params

# They read, check, write and report; they do not compute. dvc.yaml says why they are no dependencies.
PLUMBING = {
    "textguard",
    "textguard.dag",
    "textguard.environment",
    "textguard.modules",
    "textguard.errors",
    "textguard.params",
    "textguard.artifacts",
    "textguard.runtime",
    "textguard.strict_yaml",
    "textguard.text.providers",
    "textguard.vision.recipe",
    "textguard.vision.treatment",
}
# But they say which params.yaml passes.
CHECKED = {
    "textguard.params",
    "textguard.strict_yaml",
    "textguard.text.providers",
    "textguard.vision.recipe",
    "textguard.vision.treatment",
}

RENDERED = {"tables", "figures", "report"}


def watching(checkout: Path) -> set[str]:
    """The stages that have to run again because of their own parameters and dependencies, before any has run."""
    return set(json.loads(run(["dvc", "status", "--json"], checkout / GRID).stdout))


def test_nothing_changed_nothing_runs(checkout):
    (checkout / "README.md").write_text("# a comment more\n", encoding="utf-8")
    assert repro(checkout)[0] == set()


def test_dvc_draws_every_plot_for_every_run_of_the_grid(finished):
    defined = {
        name: plot
        for item in yaml.safe_load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["plots"]
        for name, plot in item.items()
    }
    done = run(["dvc", "plots", "show", "--json"], finished / GRID)
    shown = json.loads(done.stdout)
    assert (shown.get("errors", []), shown["data"].keys(), done.stderr) == ([], defined.keys(), "")
    for name, plot in defined.items():
        (drawn,) = shown["data"][name]
        points = drawn["content"]["data"]["values"]
        (column,) = plot["y"].values()
        variants = {"descriptions"} if name == "improvement" else {"baseline", "descriptions"}
        assert {point["variant"] for point in points} == variants, name
        assert all(point[plot["x"]] and point[column] and point["backbone"] == "resnet18" for point in points), name
    points = {name: len(plots[0]["content"]["data"]["values"]) for name, plots in shown["data"].items()}
    assert points == {"training": 4, "accuracy_by_top2diff": 82, "delta_loss": 43, "value_ranges": 43, "improvement": 15}


def test_a_question_retrains_all_but_the_baseline(checkout):
    other = "Describe the handwritten digit {class} as it appears in a picture."
    change(checkout, "texts.descriptions.questions.1", other)
    assert repro(checkout, "text_quality", "train")[0] == TEXTS | {"check", "heads@digits", f"train@{GUIDED}"}
    behind = {f"{stage}@{GUIDED}" for stage in ("evaluate", "ranges", "inject", "hardware", "closeup")}
    assert watching(checkout) == behind | {"results", "figures", "report"}  # these read of trainings or of texts


@pytest.mark.parametrize(
    ("key", "value", "behind"),
    [
        ("inject.seed", 1, stages("inject", "hardware", "report")),
        ("statistics.confidence", 0.95, stages("hardware", "closeup", "results", "report")),
        ("figures.colours", {"descriptions": "#009e73"}, {"figures", "report"}),
        ("hardware.memories", 3, stages("hardware", "figures", "report")),
        ("head.fold_scale", True, stages("ranges", "inject", "hardware", "closeup")),
        ("closeup.weight_flips", 20, stages("closeup")),
        ("datasets.digits.context", "a digit", RENDERED | {"results", f"prompts@{TEXT}", f"responses@{TEXT}"}),
        ("texts.descriptions.embedding", {"vectors": "random"}, {"figures", "report"} | TEXTS - {f"text_quality@{TEXT}"}),
        ("backbones.resnet18.learning_rate", 0.02, RENDERED | {"results", "recipes"}),
        ("encoder", "open_clip:RN50:openai", {f"embeddings@{TEXT}", "heads@digits", "report"}),
    ],
)
def test_a_parameter_is_watched_by_the_stages_that_use_it(checkout, key, value, behind):
    change(checkout, key, value)
    assert watching(checkout) == behind | {"check"}


def test_a_new_backbone_and_a_new_seed_run_and_nothing_else(checkout):
    change(checkout, "backbones.small", {"network": "resnet18", "recipe": "mobilenet"})
    change(checkout, "seeds", [0, 1])
    run(["dvc", "repro", "recipes"], checkout / GRID)
    runs = {
        f"digits-{name}-{v}-{seed}" for name in ("resnet18", "small") for v in ("baseline", "descriptions") for seed in (0, 1)
    }
    new = {f"{stage}@{key}" for stage in ("train", "evaluate", "ranges", "inject", "hardware") for key in runs - set(RUNS)}
    new |= {f"closeup@digits-small-{v}-0" for v in ("baseline", "descriptions")}  # of the first seed alone
    assert watching(checkout) == new | RENDERED | {"results"}


@pytest.mark.parametrize(
    ("name", "old", "new", "retrained"),
    [
        ("resnet", "weight_decay: 0.0001", "weight_decay: 0.0002", stages("train")),
        ("resnet", "epochs: 90", "epochs: 91", set()),  # which the grid overrides
        ("mobilenet", "weight_decay: 0.00004", "weight_decay: 0.00005", set()),  # which the grid does not use
    ],
)
def test_a_recipe_of_the_library_retrains_the_runs_that_it_changes(checkout, name, old, new, retrained):
    path = checkout / "textguard" / "vision" / "recipes" / f"{name}.yaml"
    content = path.read_text(encoding="utf-8")
    assert content.count(old) == 1
    path.write_text(content.replace(old, new), encoding="utf-8")
    run(["dvc", "repro", "recipes"], checkout / GRID)
    assert watching(checkout) == retrained | RENDERED


def test_each_stage_depends_on_exactly_the_modules_that_it_uses():
    graph = grimp.build_graph("textguard", "stages", cache_dir=None)
    graph.remove_module("stages.rehearsal")  # it changes no result
    for name, stage in yaml.safe_load((REPOSITORY / "dvc.yaml").read_text(encoding="utf-8"))["stages"].items():
        deps = [dep.removeprefix("${root}/") for dep in stage["deps"]]
        listed = {
            module
            for dep in deps
            for module in graph.modules
            if module == dep.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        }
        assert not [dep for dep in deps if (REPOSITORY / dep).is_dir() and list((REPOSITORY / dep).glob("*.py"))], (
            "a folder of modules holds byte code too, which DVC would hash: .dvcignore of a grid does not reach it"
        )
        plumbing = PLUMBING - CHECKED if name == "check" else PLUMBING
        used = {f"stages.{name}"} | graph.find_upstream_modules(f"stages.{name}") - plumbing
        assert used - listed == set(), f"dvc.yaml stage {name} lacks these"
        assert listed - used == set(), f"dvc.yaml stage {name} does not use these"


def test_every_grid_has_a_copy_of_the_roots_dag():
    grids = sorted((REPOSITORY / "grids").glob("*/dvc.yaml"))
    assert grids
    for grid in grids:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(grid.parent)
            assert grid.read_text(encoding="utf-8") == definition(load_params()), "run 'make grids'"
        own = grid.parent.name == "own"
        assert (grid.read_bytes() == (REPOSITORY / "dvc.yaml").read_bytes()) != own
