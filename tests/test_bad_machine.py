"""Bad input: what the machine refuses (disks, permissions, devices), and that a process of its own prints nothing else."""

import ctypes
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from bad_input_grid import MODEL, Grid, fails_in_one_line, says
from smoke_grid import BASELINE

OUTPUTS = ("data/digits/train/images.safetensors", "data/digits/test/images.safetensors", "data/digits/classes.json")
# In bytes, less than the training images: the first file that stage `data` writes is cut off halfway.
SMALL_DISK, SMALL_FILE = 65536, 50000
CAP_DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24  # of Linux's headers


def test_an_unknown_device_is_named(grid):
    line = grid.fails("evaluate", BASELINE, TEXTGUARD_DEVICE="abacus")
    says(line, "TEXTGUARD_DEVICE='abacus'", "allowed: cpu")


def test_a_progress_interval_that_is_no_number_is_named(grid):
    says(grid.fails("inject", BASELINE, TEXTGUARD_PROGRESS="often"), "TEXTGUARD_PROGRESS", "'often'")


@pytest.mark.parametrize("number", ["0", "two", "9999"])
def test_a_wrong_number_of_processes_is_named(grid, number):
    says(grid.fails("inject", BASELINE, TEXTGUARD_PROCESSES=number), f"TEXTGUARD_PROCESSES='{number}'", "1 to 1024")


def a_file_for_a_folder(grid: Grid) -> None:
    shutil.rmtree(grid.folder / "data")
    grid.put("data", "a file")


def a_folder_for_a_file(grid: Grid) -> None:
    (grid.folder / OUTPUTS[0]).unlink()
    (grid.folder / OUTPUTS[0]).mkdir()


@pytest.mark.parametrize("block", [a_file_for_a_folder, a_folder_for_a_file])
def test_something_in_the_way_of_an_output_is_named(grid, block):
    block(grid)
    says(grid.fails("data", "digits"), "CannotWrite", OUTPUTS[0], "nothing was written", "work in another one")


def test_something_in_the_way_of_the_partial_results_is_named(grid):
    grid.put(".work", "a file")
    says(grid.fails("train", BASELINE), "CannotWrite", f".work/train/{BASELINE}")


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, SMALL_FILE))


def obey_permissions() -> None:
    """Take from root what lets it write to read-only folders."""
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot drop CAP_DAC_OVERRIDE")


def put_older(grid: Grid) -> None:
    """Leave other files where stage `data` writes, all of the digits this time."""
    grid.change("datasets.digits.limit_train", 0)
    for name in OUTPUTS:
        grid.put(name, f"an older {name}")


def assert_only_older(grid: Grid) -> None:
    """The files of put_older are as they were, and nothing lies beside them."""
    files = [path for path in (grid.folder / "data" / "digits").rglob("*") if path.is_file()]
    found = {str(path.relative_to(grid.folder)): path.read_text(encoding="utf-8") for path in files}
    assert found == {name: f"an older {name}" for name in OUTPUTS}


def test_a_file_size_limit_leaves_the_older_files(grid):
    put_older(grid)
    line = fails_in_one_line(grid.start("data", "digits", preexec_fn=limit_file_size))
    says(line, "CannotWrite", OUTPUTS[0], "File too large", "nothing was written", "ulimit -f")
    assert_only_older(grid)


def test_a_read_only_folder_leaves_the_older_files(grid):
    put_older(grid)
    folder = (grid.folder / OUTPUTS[0]).parent
    folder.chmod(0o555)
    try:
        done = grid.start("data", "digits", preexec_fn=obey_permissions)
    except subprocess.SubprocessError:
        pytest.skip("root writes to read-only folders, and cannot give that up here")
    finally:
        folder.chmod(0o755)
    line = fails_in_one_line(done)
    says(line, "CannotWrite", OUTPUTS[0], "Permission denied", "nothing was written", "make the folder writable")
    assert_only_older(grid)


@pytest.fixture
def small_disk(grid: Grid) -> Iterator[None]:
    """A file system of a few kilobytes where stage `data` writes."""
    folder = grid.folder / "data" / "digits"
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_older_files(grid, small_disk):
    put_older(grid)
    line = fails_in_one_line(grid.start("data", "digits"))
    says(line, "CannotWrite", OUTPUTS[0], "No space left on device", "nothing was written", "free space")
    assert_only_older(grid)


WHOLE = {
    "parameters": ("inject.injections_per_layer", 0, ["check"], ["injections_per_layer", "greater than 0"]),
    "campaign": ("inject.detector", "fixed:ten", ["inject", BASELINE], ["'fixed:ten'", "number above 0"]),
}


@pytest.mark.parametrize(("place", "value", "arguments", "parts"), WHOLE.values(), ids=WHOLE)
def test_a_process_of_its_own_prints_nothing_else(grid, place, value, arguments, parts):
    grid.change(place, value)
    before = grid.files()
    says(fails_in_one_line(grid.start(*arguments)), "params.yaml", *parts)
    assert grid.files() == before


def test_a_process_of_its_own_names_a_truncated_classifier(grid):
    grid.cut(MODEL)
    before = grid.files()
    says(fails_in_one_line(grid.start("evaluate", BASELINE)), "InvalidArtifact", MODEL, "'train'")
    assert grid.files() == before
