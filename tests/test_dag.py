"""The DAG is exact: what changes reruns, what does not change does not, and a killed run ends like an undisturbed one.

These tests run the whole smoke grid with the real `dvc`.
"""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest
import yaml
from filelock import FileLock
from moto.server import ThreadedMotoServer

from conftest import REPOSITORY, environment, run

GRID = Path("grids/smoke")
RUNS = ("digits-resnet18-baseline-s0", "digits-resnet18-descriptions-s0")
BASELINE, GUIDED = RUNS
TEXT = "digits-descriptions"
# They read, check, write and report; they do not compute. dvc.yaml says why they are no dependencies.
PLUMBING = {
    "textguard",
    "textguard.errors",
    "textguard.params",
    "textguard.artifacts",
    "textguard.runtime",
    "textguard.vision.recipe",
}


def stages(*names: str) -> set[str]:
    """Stage names as dvc prints them; `inject` stands for the inject stage of every run."""
    expanded = set()
    for name in names:
        per_run = name in ("train", "evaluate", "ranges", "inject", "closeup")
        expanded |= {f"{name}@{key}" for key in RUNS} if per_run else {name}
    return expanded


BEHIND_TRAINING = stages("evaluate", "ranges", "inject", "closeup", "results", "tables", "figures", "report")
TEXTS = stages(f"prompts@{TEXT}", f"responses@{TEXT}", f"embeddings@{TEXT}", f"text_quality@{TEXT}")
ALL = stages("data@digits", "encoder", "train") | TEXTS | BEHIND_TRAINING


def repro(checkout: Path) -> tuple[set[str], str]:
    """Run the smoke grid. Returns the stages that ran, and all output."""
    done = run(["dvc", "repro", "dvc.yaml"], checkout / GRID)
    return set(re.findall(r"Running stage '([^']+)'", done.stdout)), done.stdout + done.stderr


def change(checkout: Path, key: str, value: object) -> None:
    """Set a value in the smoke grid's params.yaml; key: "inject.seed", list positions as numbers."""
    path = checkout / GRID / "params.yaml"
    params = yaml.safe_load(path.read_text())
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    functools.reduce(lambda node, part: node[part], parents, params)[last] = value
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def results(checkout: Path) -> dict[str, bytes]:
    """Every result file's bytes, by name."""
    folders = ("models", "metrics", "plots", "embeddings", "prompts", "data")
    files = [file for folder in folders for file in (checkout / GRID / folder).rglob("*") if file.is_file()]
    return {str(file.relative_to(checkout / GRID)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def finished(make_checkout):
    """A checkout with the smoke grid run once, to be copied, not changed."""
    checkout = make_checkout()
    recipe = yaml.safe_load((checkout / GRID / "params.yaml").read_text())["recipes"]["resnet"]
    change(checkout, "recipes.mobilenet", recipe)
    change(checkout, f"runs.{GUIDED}.recipe", "mobilenet")
    ran, _ = repro(checkout)
    assert ran == ALL
    return checkout


@pytest.fixture
def checkout(finished, tmp_path):
    """A copy of the finished checkout, cache and all."""
    return Path(shutil.copytree(finished, tmp_path / "checkout", symlinks=True))


def test_nothing_changed_nothing_runs(checkout):
    (checkout / "README.md").write_text("# a comment more\n")
    assert repro(checkout)[0] == set()


def test_a_figure_colour_redraws_the_figures(checkout):
    change(checkout, "figures.colours.descriptions", "#009e73")
    assert repro(checkout)[0] == {"figures", "report"}


def test_dvc_draws_every_plot_for_every_run_of_the_grid(finished):
    defined = {
        name: plot for item in yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["plots"] for name, plot in item.items()
    }
    done = run(["dvc", "plots", "show", "--json", "dvc.yaml::"], finished / GRID)
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
    assert points == {"training": 4, "accuracy_by_top2diff": 82, "delta_loss": 43, "value_ranges": 43, "improvement": 2}


def test_the_campaign_seed_repeats_the_campaigns(checkout):
    change(checkout, "inject.seed", 1)
    assert repro(checkout)[0] == stages("inject", "closeup", "results", "tables", "figures", "report")


def test_other_weight_flips_repeat_the_looks_alone(checkout):
    change(checkout, "closeup.weight_flips", 20)
    assert repro(checkout)[0] == stages("closeup", "tables", "figures", "report")


def test_another_confidence_reruns_no_campaign(checkout):
    change(checkout, "statistics.confidence", 0.95)
    assert repro(checkout)[0] == stages("results", "tables", "figures", "report")


def test_a_question_retrains_all_but_the_baseline(checkout):
    other = "Describe the handwritten digit {class} as it appears in a picture."
    change(checkout, f"texts.{TEXT}.questions.1", other)
    behind = {name for name in BEHIND_TRAINING if BASELINE not in name}
    assert repro(checkout)[0] == behind | TEXTS | {f"train@{GUIDED}"}


def test_a_recipes_learning_rate_retrains_the_runs_that_use_it(checkout):
    change(checkout, "recipes.mobilenet.learning_rate", 0.02)
    behind = {name for name in BEHIND_TRAINING if BASELINE not in name}
    assert repro(checkout)[0] == behind | {f"train@{GUIDED}"}


def test_a_recipe_of_the_library_is_watched_by_the_runs_that_use_it(checkout):
    path = checkout / "textguard" / "vision" / "recipes" / "mobilenet.yaml"
    path.write_text(path.read_text() + "# a comment more\n")
    changed = run(["dvc", "status", "--json", "dvc.yaml"], checkout / GRID).stdout
    assert json.loads(changed).keys() == {f"train@{GUIDED}", "tables", "figures", "report"}


def test_the_same_bytes_come_out_of_an_empty_cache(checkout, finished):
    shutil.rmtree(checkout / ".dvc" / "cache")
    for folder in ("models", "metrics", "plots", "embeddings", "data"):
        shutil.rmtree(checkout / GRID / folder)
    (checkout / GRID / "dvc.lock").unlink()
    assert repro(checkout)[0] == ALL
    assert results(checkout) == results(finished)


def wait_for(checkout: Path, pattern: str, process: subprocess.Popen) -> None:
    """Wait until a running process has written a file of this pattern in .work."""
    deadline = time.monotonic() + 240
    while not list((checkout / GRID / ".work").glob(pattern)):
        assert process.poll() is None, "the process ended before that"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_when(checkout: Path, pattern: str) -> None:
    """Start the smoke grid and send SIGKILL to dvc and its stage as soon as a file of this pattern appears in .work."""
    process = subprocess.Popen(
        ["dvc", "repro", "dvc.yaml"],
        cwd=checkout / GRID,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(checkout, pattern, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def forget(checkout: Path, stage: str) -> None:
    """Make a stage of every run and all behind it run again, for real: no lock entry, no cached result, no output."""
    shutil.rmtree(checkout / ".dvc" / "tmp" / "rwlock", ignore_errors=True)
    lock = checkout / GRID / "dvc.lock"
    entries = yaml.safe_load(lock.read_text())
    for name in stages(stage):
        for out in entries["stages"].pop(name)["outs"]:
            (checkout / GRID / out["path"]).unlink()
            (checkout / ".dvc/cache/files/md5" / out["md5"][:2] / out["md5"][2:]).unlink(missing_ok=True)
    lock.write_text(yaml.safe_dump(entries))
    shutil.rmtree(checkout / ".dvc" / "cache" / "runs", ignore_errors=True)


def test_a_training_killed_with_dvc_goes_on_from_its_checkpoint(checkout, finished):
    forget(checkout, "train")
    kill_when(checkout, "train/*/*/checkpoint-*.safetensors")
    assert list((checkout / GRID / ".work").glob("train/*/*/checkpoint-*.safetensors"))
    ran, output = repro(checkout)
    assert stages("train") <= ran
    assert "going on after epoch" in output
    assert results(checkout) == results(finished)
    assert not list((checkout / GRID / ".work").glob("*/*/*/*"))


def test_a_stage_waits_for_the_one_that_a_killed_dvc_left_behind(checkout, finished):
    work = checkout / GRID / ".work" / "inject" / BASELINE
    with FileLock(work / "lock"):
        command = [sys.executable, "../../stages", "inject", BASELINE]
        waiting = subprocess.Popen(command, cwd=checkout / GRID, env=environment(), stderr=subprocess.PIPE, text=True)
        assert "another process is at work" in waiting.stderr.readline()
        assert [path.name for path in work.iterdir()] == ["lock"]
    waiting.communicate()
    assert waiting.returncode == 0
    assert results(checkout) == results(finished)


def test_a_campaign_killed_with_dvc_goes_on_from_its_shards(checkout, finished):
    forget(checkout, "inject")
    kill_when(checkout, "inject/*/*/*/shard-00001.parquet")
    ran, output = repro(checkout)
    assert stages("inject") <= ran
    assert "going on after" in output
    assert results(checkout) == results(finished)


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A server on loopback that speaks S3. Yields the environment that leads to it, with credentials that are none."""
    (tmp_path / "aws").touch()
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{url}/results", method="PUT")).close()
    nobodys = {"AWS_CONFIG_FILE": str(tmp_path / "aws"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "aws")}
    keys = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1"}
    yield {"AWS_ENDPOINT_URL": url, "NO_PROXY": host, **nobodys, **keys}
    server.stop()


def test_a_clone_that_pulls_from_s3_has_every_result_and_runs_nothing(checkout, finished, s3, tmp_path):
    run(["dvc", "remote", "add", "--default", "store", "s3://results/textguard"], checkout)
    run(["git", "add", "--all"], checkout)
    run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "results"], checkout)
    run(["dvc", "push", "dvc.yaml"], checkout / GRID, **s3)

    clone = tmp_path / "clone"
    run(["git", "clone", "--quiet", str(checkout), str(clone)], tmp_path)
    assert not list((clone / GRID).rglob("*.safetensors"))
    run(["dvc", "pull", "dvc.yaml"], clone / GRID, **s3)
    assert results(clone) == results(finished)
    assert repro(clone)[0] == set()


def test_each_stage_depends_on_exactly_the_modules_that_it_uses():
    graph = grimp.build_graph("textguard", "stages", cache_dir=None)
    graph.remove_module("stages.rehearsal")  # it changes no result
    for name, stage in yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"].items():
        deps = [dep.removeprefix("${root}/") for dep in stage.get("do", stage)["deps"]]
        listed = {
            module
            for dep in deps
            for module in graph.modules
            if module == dep.removesuffix(".py").replace("/", ".") or module.startswith(dep.replace("/", ".") + ".")
        }
        used = {f"stages.{name}"} | graph.find_upstream_modules(f"stages.{name}") - PLUMBING
        packages = {module for module in used | listed if graph.find_children(module)}
        folders = {dep.replace("/", ".") for dep in deps if (REPOSITORY / dep).is_dir()}
        assert used - packages - listed == set(), f"dvc.yaml stage {name} lacks these"
        unused = {module for module in listed - packages - used if not any(module.startswith(f + ".") for f in folders)}
        assert unused == set(), f"dvc.yaml stage {name} does not use these"


def test_every_grid_has_a_copy_of_the_roots_dag():
    grids = sorted((REPOSITORY / "grids").glob("*/dvc.yaml"))
    assert grids
    for grid in grids:
        assert grid.read_bytes() == (REPOSITORY / "dvc.yaml").read_bytes(), "run 'make grids'"
