"""Every DVC command of the documentation works in the root and in a grid: exit code 0, no warning, no wider than one can read.

One repository stands for both: its root runs what the smoke grid runs. The results of the grid are carried over to the root as
docs/moving.md carries over older ones, by `dvc commit`.
"""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from dvc.utils.serialize import modify_yaml

from smoke_grid import ALL, GRID, GUIDED, environment, ran, run

PLACES = {"root": Path(), "grid": GRID}
# What `git add` hints at is no warning; a progress bar leaves the rest of its line.
NOISE = re.compile(r"(?i)warning|error|failed|traceback|deprecat|No file hash info")
RESULTS = ("data", "embeddings", "metrics", "models", "plots", "prompts")


@pytest.fixture(scope="module")
def project(finished, tmp_path_factory) -> Path:
    """A git repository with the results of the smoke grid, in its root too. For tests of this module, which all change it."""
    folder = tmp_path_factory.mktemp("project") / "checkout"
    shutil.copytree(finished, folder, symlinks=True)
    for name in RESULTS:
        shutil.copytree(folder / GRID / name, folder / name, dirs_exist_ok=True)
    shutil.copy(folder / GRID / "params.yaml", folder / "params.yaml")
    with modify_yaml(str(folder / "params.yaml")) as params:
        params["root"] = "."
    run(["git", "config", "user.name", "a"], folder)
    run(["git", "config", "user.email", "a@b"], folder)
    quiet(folder, "commit", "--force", "--quiet")
    assert set(yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8"))["stages"]) == ALL
    run(["git", "add", "--all"], folder)
    run(["git", "commit", "--quiet", "--message", "Results"], folder)
    return folder


def quiet(folder: Path, *arguments: str) -> str:
    """Run `dvc ARGUMENTS`, which must end with exit code 0 and without a warning. Returns what it printed."""
    done = run(["dvc", *arguments], folder, COLUMNS="200")
    loud = [line for line in done.stderr.splitlines() if NOISE.search(line)]
    loud += [line for line in done.stdout.splitlines() if line.startswith(("WARNING", "ERROR", "DVC failed"))]
    assert loud == [], (arguments, loud[:5], len(loud))
    return done.stdout


@pytest.fixture(params=PLACES)
def place(project, request) -> Path:
    """The root's folder, and the grid's, as last committed."""
    run(["git", "reset", "--hard", "--quiet"], project)
    folder = project / PLACES[request.param]
    quiet(folder, "checkout", "--quiet")
    return folder


def test_nothing_is_to_be_done(place):
    assert ran(quiet(place, "repro")) == set()
    assert quiet(place, "status") == "Data and pipelines are up to date.\n"


def test_a_clone_knows_what_it_lacks_and_only_that(project, tmp_path):
    for name, inner in PLACES.items():
        run(["git", "clone", "--quiet", str(project), str(tmp_path / name)], tmp_path)
        folder = tmp_path / name / inner
        run(["dvc", "config", "--local", "cache.dir", str(project / ".dvc" / "cache")], folder)
        quiet(folder, "checkout")
        assert ran(quiet(folder, "repro")) == set()


def test_the_graph_fits_on_a_page(place):
    stages = {name.partition("@")[0] for name in ALL}
    drawn = quiet(place, "dag", "--collapse-foreach-matrix", "--md")
    assert set(re.findall(r'"([a-z_]+)"', drawn)) == stages
    listed = quiet(place, "stage", "list", "--name-only").split()
    assert set(listed) == ALL


def test_metrics_are_one_row(place):
    shown = json.loads(quiet(place, "metrics", "show", "--json"))[""]["data"]
    assert "metrics/summary.json" in shown
    table = quiet(place, "metrics", "show", "metrics/summary.json", "--md").splitlines()
    assert len(table) <= 3 + 1
    assert quiet(place, "metrics", "diff", "HEAD").strip() == ""


def test_an_experiment_from_its_run_to_its_branch(place):
    """The way through docs/ablation.md. In the grid it redraws figures; in the root, for speed, no result changes."""
    name, real = f"other-{place.name}", place.name == GRID.name
    key, before, after = ("figures.dpi", "80", "81") if real else ("network.attempts", "-", "7")
    output = quiet(place, "exp", "run", "-S", f"{key}={after}" if real else f"+{key}={after}", "-n", name)
    assert ran(output) == {"check"} | ({"figures", "report", "text_quality@digits-descriptions"} if real else set())
    changed = ["Path", "Param", "HEAD", "workspace", "params.yaml", key, before, after]
    assert quiet(place, "params", "diff").split() == changed
    run(["git", "reset", "--hard", "--quiet"], place)
    quiet(place, "metrics", "diff", "HEAD", name)
    quiet(place, "plots", "diff", "HEAD", name, "--json")
    shown = quiet(place, "exp", "show", "--only-changed", "--csv").splitlines()
    assert key in shown[0].split(",")
    assert any(name in line for line in shown[1:])
    assert len(shown[0].split(",")) < 20, shown[0]
    assert len(quiet(place, "exp", "show", "--csv").splitlines()[0].split(",")) <= 330
    quiet(place, "exp", "apply", name)
    assert quiet(place, "params", "diff").split() == changed
    run(["git", "reset", "--hard", "--quiet"], place)
    quiet(place, "exp", "branch", name, f"branch-{name}")
    quiet(place, "checkout", "--quiet")


@pytest.mark.parametrize("place", ["grid"], indirect=True)  # where paths lead out of the folder; the root is its simple case
def test_experiments_wait_in_a_queue_and_run_side_by_side(place):
    quiet(place, "exp", "run", "--queue", "-S", "+network.attempts=2,3")
    quiet(place, "queue", "start", "--jobs", "2")
    deadline = time.monotonic() + 120
    while (states := quiet(place, "queue", "status")).count("Success") < 2:
        assert time.monotonic() < deadline, states
        time.sleep(1)
    assert "Failed" not in states


def test_an_experiment_in_a_folder_of_its_own_leaves_the_workspace_alone(place):
    quiet(place, "exp", "run", "--temp", "-S", "+network.attempts=4", "-n", f"elsewhere-{place.name}")
    assert run(["git", "status", "--porcelain", "--untracked-files=no"], place).stdout == ""


def test_a_seed_a_backbone_and_a_data_set_more_are_one_option(place):
    """Seen in what DVC would run: names of stages, without training anything."""
    change_of = {
        "seeds=[0,1]": {"digits-resnet18-baseline-1", "digits-resnet18-descriptions-1"},
        "+backbones.resnet34={image_size: 32, resize_size: 32}": {
            "digits-resnet34-baseline-0",
            "digits-resnet34-descriptions-0",
        },
    }
    for option, new in change_of.items():
        quiet(place, "exp", "run", "--queue", "-S", option, "-n", f"more-{len(option)}-{place.name}")
        quiet(place, "queue", "remove", "--all")
        edited = place / "params.yaml"
        before = edited.read_text(encoding="utf-8")
        subprocess.run(
            ["python", "-c", f"from dvc.utils.hydra import apply_overrides; apply_overrides('params.yaml', [{option!r}])"],
            cwd=place,
            env=environment(),
            check=True,
        )
        listed = set(quiet(place, "stage", "list", "--name-only").split())
        assert {name.partition("@")[2] for name in listed - ALL} == new
        edited.write_text(before, encoding="utf-8")


def test_unused_cache_goes_and_what_any_grid_uses_stays(project):
    """The cache is shared: every grid has to be named."""
    run(["git", "reset", "--hard", "--quiet"], project)
    others = [str(path.parent) for path in (project / "grids").glob("*/dvc.yaml")]
    done = run(["dvc", "gc", "--workspace", "--force", "--projects", *others], project)
    assert "Removed" in done.stderr + done.stdout or "No unused" in done.stderr + done.stdout
    for folder in PLACES.values():
        assert quiet(project / folder, "status") == "Data and pipelines are up to date.\n"
        shutil.rmtree(project / folder / "models")
        quiet(project / folder, "checkout")
        assert (project / folder / "models" / f"{GUIDED}.safetensors").exists()


def test_ci_runs_what_a_change_touches_and_pulls_the_rest(project, tmp_path):
    """The commands of docs/clusters.md, "In your CI": a clone without data or cache, and a folder as the remote."""
    run(["git", "reset", "--hard", "--quiet"], project)
    clone = tmp_path / "clone"
    run(["git", "clone", "--quiet", str(project), str(clone)], tmp_path)
    for folder in (project / GRID, clone / GRID):
        quiet(folder, "remote", "add", "--local", "--default", "store", str(tmp_path / "remote"))
    quiet(project / GRID, "checkout", "--quiet")
    quiet(project / GRID, "push")
    assert ran(quiet(clone / GRID, "repro", "--dry", "--allow-missing")) == set()  # though nothing is pulled
    with modify_yaml(str(clone / GRID / "params.yaml")) as params:
        params["network"] = {"attempts": 2}
    with (clone / "stages" / "results.py").open("a", encoding="utf-8") as file:
        file.write("# another\n")
    # Beyond the first stage DVC looks for data that it would need.
    stale = run(["dvc", "repro", "--dry", "--allow-missing"], clone / GRID, check=False)
    assert ran(stale.stdout) == {"check"}
    assert stale.returncode != 0
    assert ran(quiet(clone / GRID, "repro", "--pull")) == {"check", "results"}
    assert ran(quiet(clone / GRID, "repro", "--dry")) == set()
    changed = run(["git", "status", "--porcelain"], clone).stdout.split()[1::2]
    # How long the stages took is kept; no result is another.
    assert set(changed) == {
        "stages/results.py",
        *(f"{GRID}/{name}" for name in ("params.yaml", "dvc.lock", "metrics/run.json")),
    }
