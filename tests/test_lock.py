"""The locks: every package pinned by hash, nothing missing, what is installed is what they say, and licences are listed."""

import os
import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, distribution

import lock
import pytest
from packaging.requirements import Requirement

from conftest import REPOSITORY

LOCKS = {file: lock.parsed((REPOSITORY / file).read_text(encoding="utf-8")) for file in lock.PURPOSES}
A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.mark.parametrize("file", LOCKS)
def test_a_lock_holds_releases_and_hashes_and_nothing_else(file):
    """No option, no address, no range: nothing that would let pip look elsewhere or take another file."""
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    release = r"[a-z0-9][a-z0-9.-]*==[0-9a-z.]+(\+cpu)?( ; [a-z_0-9 =!<>.'()A-Z]+)?"
    digest = r"    --hash=sha256:[0-9a-f]{64}"
    assert re.fullmatch(rf"# Written by [^\n]+\n({release}( \\\n{digest})+\n)+", text)
    for entry in LOCKS[file].values():
        assert entry.count("--hash=") == len(lock.hashes(entry)) > 0


def test_torch_has_a_lock_for_each_build_and_all_else_is_in_one():
    assert set(LOCKS[lock.CPU]) == set(lock.TORCH) <= set(LOCKS[lock.CUDA])
    assert set(LOCKS[lock.BUILD]) == {"setuptools"}
    assert not {*LOCKS[lock.BUILD], *LOCKS[lock.CUDA]} & {*LOCKS[lock.REST], *LOCKS[lock.DOCS]}
    assert not set(LOCKS[lock.REST]) & set(LOCKS[lock.DOCS])
    for file, build in ((lock.CPU, "+cpu"), (lock.CUDA, "")):
        assert lock.pin(LOCKS[file]["torch"]) == f"torch=={lock.TORCH['torch']}{build}"
        assert lock.pin(LOCKS[file]["torchvision"]) == f"torchvision=={lock.TORCH['torchvision']}"
    assert not lock.hashes(LOCKS[lock.CPU]["torch"]) & lock.hashes(LOCKS[lock.CUDA]["torch"])


def test_the_locks_hold_what_pyproject_asks_for():
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    project = declared["project"]
    extras = [*project["optional-dependencies"].values(), *declared["dependency-groups"].values()]
    extras = [line for lines in extras for line in lines]
    versions = lock.locked()
    for wanted in map(Requirement, [*project["dependencies"], *extras]):
        assert wanted.name == project["name"] or versions[lock.normalised(wanted.name)] in wanted.specifier, wanted


def installed() -> dict[str, object]:
    """The locked packages that are installed, by name."""
    found = {}
    for name in lock.locked():
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
    return found


def test_a_package_needs_no_other_than_those_in_the_locks():
    """Pip is told not to look for what a package needs: the locks have to be complete."""
    versions = lock.locked()
    for name, package in installed().items():
        for wanted in map(Requirement, package.requires or []):
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                assert versions.get(lock.normalised(wanted.name), "") in wanted.specifier, (name, str(wanted))


def test_licences_are_listed_as_the_packages_state_them():
    listed = re.findall(r"^\| ([a-z0-9.-]+) \| (\S+) \| (.*) \|$", lock.PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {name: version for name, version, _ in listed[2:]} == lock.locked()  # behind the head of the table
    licences = {name: words for name, _, words in listed}
    for name, package in installed().items():
        if package.version.partition("+")[0] == lock.locked()[name]:
            keys = ("License-Expression", "License", "Name")
            metadata = {key.lower().replace("-", "_"): package.metadata.get(key) for key in keys}
            metadata["classifier"] = package.metadata.get_all("Classifier")
            assert licences[name] == lock.licence(metadata, name)
    assert "UNKNOWN" not in licences.values()


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        ("a", {"license_expression": "MIT", "license": "X"}, "MIT"),
        ("a", {"license": "GPLv2 | EPLv1", "classifier": ["License :: OSI Approved :: GPL"]}, "GPLv2 or EPLv1"),
        ("a", {"license": "Copyright\nsomebody", "classifier": ["License :: OSI Approved :: BSD License"]}, "BSD License"),
        ("a", {"license": "UNKNOWN"}, "-"),
        ("pytorchfi", {"license": "UNKNOWN"}, "NCSA"),
        ("a", {}, "-"),
    ],
)
def test_a_licence_is_one_line(name, metadata, expected):
    assert lock.licence(metadata, name) == expected


def test_the_locks_are_split_by_what_they_are_for():
    packages = ("setuptools", "numpy", "torch", "torchvision", "triton", "nvidia-nccl-cu13", "nvidia-ml-py", "cuda-toolkit")
    entries = {
        name: f"{name}=={lock.TORCH.get(name, '1')} ; sys_platform == 'linux' \\\n    --hash=sha256:{A}" for name in packages
    }
    docs = {name: f"{name}==1 \\\n    --hash=sha256:{C}" for name in ("mkdocs", "numpy")}
    text = lock.split(entries, {"torch": {B}, "torchvision": {C}}, docs)
    assert {file: set(lock.parsed(content)) for file, content in text.items()} == {
        lock.BUILD: {"setuptools"},
        lock.CPU: {"torch", "torchvision"},
        lock.CUDA: {"torch", "torchvision", "triton", "nvidia-nccl-cu13", "cuda-toolkit"},
        lock.REST: {"numpy", "nvidia-ml-py"},
        lock.DOCS: {"mkdocs"},
    }
    builds = lock.parsed(text[lock.CPU])
    assert lock.hashes(builds["torch"]) == {B}
    assert lock.hashes(builds["torchvision"]) == {A, C}
    assert lock.parsed(text[lock.REST])["numpy"] == entries["numpy"]


def test_hashes_of_the_cpu_build_stay_where_their_index_is_out_of_reach(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise subprocess.CalledProcessError(2, "uv")

    monkeypatch.setattr(lock, "resolved", unreachable)
    assert lock.cpu_hashes()["torch"] == lock.hashes(LOCKS[lock.CPU]["torch"])
    monkeypatch.setattr(lock, "TORCH", {**lock.TORCH, "torch": "99.0"})
    with pytest.raises(SystemExit, match=r"cannot be reached, and .* holds no hashes of .*torch==99\.0\+cpu"):
        lock.cpu_hashes()


@pytest.mark.parametrize("index", ["", "https://download.pytorch.org/whl/cpu"])
def test_setup_installs_by_hash_alone(index):
    """Another index than PyPI is asked for what torch's lock names: no other name there can stand in for a package."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "TORCH_INDEX"))}
    command = ["make", "--dry-run", "--always-make", "setup", *([f"TORCH_INDEX={index}"] if index else [])]
    done = subprocess.run(command, cwd=REPOSITORY, env=clean, capture_output=True, encoding="utf-8", check=True)
    calls = [call for line in done.stdout.splitlines() for call in line.split("||") if "pip install" in call]
    assert [call.split()[-1] for call in calls if "--require-hashes" not in call] == ["."]
    assert all("--no-deps" in call and "--no-build-isolation" in call for call in calls)
    named = [re.findall(r"requirements\S*lock", call)[0] for call in calls if "--require-hashes" in call]
    assert named == ([lock.BUILD, lock.CPU, lock.REST] if index else [lock.BUILD, lock.CPU, lock.CUDA, lock.REST])
    asked = [call for call in calls if "index" in call]
    assert [f"--index-url '{index}'" in call and lock.CPU in call for call in asked] == ([True] if index else [])
