"""The library alone, as `pip install textguard` leaves it: the wheel, what it needs, and nothing else of this environment.

The README's example, the notebook of docs/own-classifier.md and that page's workflow run there, in folders of their own.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import textguard
from conftest import REPOSITORY
from docs_parts import BLOCK, INSTALL, NOTEBOOK, TUTORIAL

EXAMPLE = REPOSITORY / "examples" / "own_classifier.py"
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = [match.groups() for match in BLOCK.finditer(TUTORIAL.read_text(encoding="utf-8"))]
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
# In the source distribution, beside the package.
BESIDE = ("CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]


def needed(requirements: Iterable[str], extra: str = "") -> set[str]:
    """The names of all packages that requirements lead to."""
    found: set[str] = set()
    waiting = [(Requirement(line), extra) for line in requirements]
    while waiting:
        wanted, extra = waiting.pop()
        if wanted.name in found or (wanted.marker and not wanted.marker.evaluate({"extra": extra})):
            continue
        found.add(wanted.name)
        waiting += [(Requirement(line), "") for line in distribution(wanted.name).requires or []]
    return found


def link(names: Iterable[str], folder: Path) -> None:
    """Make a folder of links to what packages brought into this environment's folder of packages."""
    folder.mkdir(exist_ok=True)
    for name in names:
        package = distribution(name)
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(package.locate_file(top))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel made from it, as `make dist` builds them."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"  # of which a build leaves nothing in the checkout
    source.mkdir()
    for name in ("textguard", "tests", *BESIDE):
        (source / name).symlink_to(REPOSITORY / name)
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    script = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    subprocess.run([sys.executable, "-c", script], cwd=source, check=True, env=env, stdout=subprocess.DEVNULL)
    (archive,) = folder.glob("*.tar.gz")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(archive)]
    subprocess.run([*PIP, *build], check=True, env=env)
    (wheel,) = folder.glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and its dependencies."""
    folder, (_, wheel) = tmp_path_factory.mktemp("package"), built
    home = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    install = ["install", "--no-index", "--no-deps", "--no-compile", str(wheel)]
    subprocess.run([*PIP, "--python", str(home / "bin" / "python"), *install], check=True)
    (packages,) = home.glob("lib/*/site-packages")
    (metadata,) = packages.glob("textguard-*.dist-info/METADATA")
    lines = re.findall(r"^Requires-Dist: (.*)$", metadata.read_text(encoding="utf-8"), flags=re.MULTILINE)
    link(needed(lines), packages)
    return home


def call(home: Path, command: list[str], folder: Path, code: int = 0, **more: str) -> str:
    """Run a command with nothing but the environment. Returns what it printed."""
    env = {"PATH": f"{home / 'bin'}{os.pathsep}{os.defpath}", "HOME": str(folder), "OMP_NUM_THREADS": "1", **more}
    env |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "GOMP_SPINCOUNT") if name in os.environ}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_a_release_holds_the_library_its_licence_and_nothing_else(built):
    """Every file of the package: those that are no Python too, and the mark that its annotations are meant for others."""
    archive, wheel = built
    library = {
        file.relative_to(REPOSITORY).as_posix()
        for file in (REPOSITORY / "textguard").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert "textguard/py.typed" in library
    with zipfile.ZipFile(wheel) as packed:
        held = set(packed.namelist())
        (about,) = (name for name in held if name.endswith(".dist-info/METADATA"))
        said = packed.read(about).decode("utf-8")
    about = about.removesuffix("METADATA")
    assert {name for name in held if not name.startswith(about)} == library
    assert f"{about}licenses/LICENSE" in held
    assert {f"Version: {textguard.__version__}", "License-Expression: Apache-2.0"} <= set(said.splitlines())
    with tarfile.open(archive) as packed:
        held = {name.partition("/")[2] for name in packed.getnames() if packed.getmember(name).isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in held if not name.startswith("textguard.egg-info/")} == library | made | {*BESIDE}


def test_the_library_is_whole_without_the_packages_of_the_pipeline(installed, tmp_path):
    script = """
        import importlib.util, pkgutil, sys
        import textguard.assessment, textguard.estimates, textguard.faults, textguard.hardware, torch
        assert not textguard.__file__.startswith(sys.argv[1]), textguard.__file__
        for package in (textguard.assessment, textguard.estimates, textguard.faults, textguard.hardware):
            for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
                importlib.import_module(module.name)
        for name in ("dvc", "openai", "open_clip", "sentence_transformers", "timm", "torchvision", "pytorchfi", "sklearn"):
            assert importlib.util.find_spec(name) is None, name
        try:
            textguard.faults.make_engine("pytorchfi", torch.nn.Linear(2, 2), torch.zeros(2), 1)
        except textguard.faults.engines.UnsupportedModel as error:
            print(error)
    """
    said = call(installed, ["python", "-c", textwrap.dedent(script), str(REPOSITORY)], tmp_path)
    assert said == ("PyTorchFI is not installed; run pip install 'textguard[pipeline]', or set argument engine to replay\n")


def test_the_example_prints_each_layer_with_intervals_as_the_readme_shows(installed, tmp_path):
    """Its last lines and what they print, but for digits: another processor trains another network."""
    (code,), (shown,) = (
        [found for language, _, found in BLOCK.findall(README) if language == wanted] for wanted in ("python", "text")
    )
    assert EXAMPLE.read_text(encoding="utf-8").endswith(f"\n\n{code}")
    link(needed(["scikit-learn"]), tmp_path / "packages")  # where it takes its digits from
    printed = call(installed, ["python", str(EXAMPLE)], tmp_path, PYTHONPATH=str(tmp_path / "packages"))
    assert re.sub(r"\d", "0", printed) == re.sub(r"\d", "0", shown)
    names, *lines = (line.split() for line in printed.splitlines())
    rows = {fields["layer"]: fields for fields in (dict(zip(names, line, strict=True)) for line in lines)}
    # Layers of an nn.Sequential are called by their number; the linear layer is the more sensitive one.
    assert list(rows) == ["0", "4", "overall"]
    for name in ("delta_loss", "sdc"):
        found = {layer: [float(row[f"{name}{end}"]) for end in ("_low", "", "_high")] for layer, row in rows.items()}
        assert all(low < value < high for low, value, high in found.values())
        assert found["4"][0] > found["0"][2]


@pytest.fixture(scope="module")
def toured(installed, tmp_path_factory) -> Path:
    """A folder in which every cell of docs/own-classifier.ipynb was run, in their order, as IPython does.

    In one process, as torch takes long to load: the command's own script runs in the workflow.
    """
    folder = tmp_path_factory.mktemp("tour")
    script = ["import pathlib, runpy, sys", "from textguard.assessment.command import run", "sys.path.insert(0, '')"]
    for cell in CELLS:
        first, _, content = "".join(cell["source"]).partition("\n")
        if first.startswith("%%writefile "):
            script.append(f"pathlib.Path({first.split()[1]!r}).write_text({content!r}, encoding='utf-8')")
        elif first == "%%bash":
            for line in content.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(line)
                runs = {"python": f"runpy.run_path({arguments[0]!r})", "textguard": f"assert run({arguments}) == 0"}
                script.append(runs[program])
        else:
            script.append(f"{first}\n{content}")
    (folder / "tour.py").write_text("\n".join(script), encoding="utf-8")
    call(installed, ["python", "tour.py"], folder, TMPDIR=str(folder))
    (found,) = folder.glob("textguard-*")
    return found


def test_every_line_of_the_tour_runs(toured):
    assert {language for language, *_ in BLOCKS} == {"python", "sh", "toml", "yaml"}
    assert {path.name for path in toured.glob("*")} >= {"net.safetensors", "resilience", "old"}
    assert "<html" in (toured / "old" / "report.html").read_text(encoding="utf-8")


def test_the_workflow_stops_a_more_fragile_network(installed, toured, tmp_path):
    """Its steps as GitHub runs them, but for the checkout, which is made here, and the installation."""
    (workflow,) = [yaml.safe_load(content) for language, _, content in BLOCKS if language == "yaml"]
    checked_out, install, *steps, gate = workflow["jobs"]["resilience"]["steps"]
    assert (checked_out["uses"].partition("@")[0], install["run"]) == ("actions/checkout", INSTALL)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    origin, checkout = tmp_path / "origin", tmp_path / "work" / "checkout"
    for name in ("mypkg/net.py", "mypkg/data.py", "net.safetensors", "pyproject.toml"):
        (origin / name).parent.mkdir(parents=True, exist_ok=True)
        (origin / name).write_bytes((toured / name).read_bytes())
    for command in (["init", "--quiet", "--initial-branch=main"], ["add", "."], ["commit", "--quiet", "-m", "net"]):
        subprocess.run([*git, *command], cwd=origin, check=True)
    subprocess.run(["git", "clone", "--quiet", str(origin), str(checkout)], check=True)
    # As often right, with scores further apart: faults move the loss further.
    net = checkout / "mypkg" / "net.py"
    net.write_text(net.read_text(encoding="utf-8").replace("return self.fc(", "return 3 * self.fc("), encoding="utf-8")
    summary = tmp_path / "summary.md"
    given = {"GITHUB_BASE_REF": "main", "RUNNER_TEMP": str(tmp_path), "GITHUB_STEP_SUMMARY": str(summary), **workflow["env"]}
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c"]  # as GitHub starts it where `shell: bash` is said
    for step in steps:
        call(installed, [*shell, step["run"]], checkout, **given)
    call(installed, [*shell, gate["run"]], checkout, 1, **given)
    assert "**FAIL" in summary.read_text(encoding="utf-8")
