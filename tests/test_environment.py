"""Bad input: what a process finds in its environment, and where what it prints goes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bad_input_grid import fails_in_one_line, says
from conftest import REPOSITORY
from smoke_grid import BASELINE, TEXT, environment
from stages.check import OUT
from textguard.environment import check_threads, environment_number, process_group, progress_interval
from textguard.errors import InvalidParameter
from textguard.runtime import loading_processes, pick_device

STAGES = [sys.executable, str(REPOSITORY / "stages")]


@pytest.mark.parametrize(
    ("variables", "group"),
    [
        ({}, (0, 1)),
        ({"RANK": "1"}, (0, 1)),  # of a scheduler
        ({"RANK": "abc", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, (1, 2)),
    ],
)
def test_processes_that_belong_together(monkeypatch, variables, group):
    set_only(monkeypatch, variables)
    assert process_group() == group


def set_only(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


PAIR = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
HALF_A_GROUP = {
    "count alone": ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 .* but not RANK, MASTER_ADDR, MASTER_PORT; torchrun sets them"),
    "no address": ({"WORLD_SIZE": "2", "RANK": "0"}, "but not MASTER_ADDR, MASTER_PORT"),
    "no number": ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc' .* a number from 1 to"),
    "none": ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' .* a number from 1 to"),
    "no rank": (PAIR | {"RANK": "abc"}, "RANK='abc' .* a number from 0 to 1$"),
    "too high a rank": (PAIR | {"RANK": "2"}, "RANK='2' .* a number from 0 to 1$"),
    "no port": (PAIR | {"MASTER_PORT": "abc"}, "MASTER_PORT='abc'"),
}


@pytest.mark.parametrize(("variables", "said"), HALF_A_GROUP.values(), ids=HALF_A_GROUP)
def test_half_a_group_of_processes_is_refused(monkeypatch, variables, said):
    set_only(monkeypatch, variables)
    with pytest.raises(InvalidParameter, match=said):
        process_group()


@pytest.mark.parametrize("number", ["", "-1", "1e3", "+1", " 1", "٣", "²", "1" * 5000, "1025", "nan"])
def test_what_is_no_number_in_range_is_refused(monkeypatch, number):
    monkeypatch.setenv("TEXTGUARD_WORKERS", number)
    with pytest.raises(InvalidParameter, match=r"TEXTGUARD_WORKERS=.* a number from 0 to 1024") as refused:
        environment_number("TEXTGUARD_WORKERS", 1, 1024)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        *(("TEXTGUARD_PROGRESS", value, progress_interval) for value in ("nan", "inf", "-5", "1e9", "often")),
        *(("OMP_NUM_THREADS", value, check_threads) for value in ("abc", "0", "-1", "", "1" * 50, "2,x")),
        *(("LOCAL_WORLD_SIZE", value, loading_processes) for value in ("abc", "0")),
        *(("LOCAL_RANK", value, pick_device) for value in ("abc", "-1")),
        *(
            ("TEXTGUARD_DEVICE", value, pick_device)
            for value in ("hpu", "privateuseone", "mkldnn", "meta", "", "cuda:x", "cpu:5", "\x1b[2J")
        ),
    ],
)
def test_a_bad_variable_is_named(monkeypatch, name, value, read):
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidParameter) as refused:
        read()
    says(str(refused.value), f"{name}={value[:50]!r}")


@pytest.mark.parametrize(
    ("name", "value", "read"), [("TEXTGUARD_PROGRESS", "0.5", progress_interval), ("OMP_NUM_THREADS", "4,2", check_threads)]
)
def test_a_good_variable_is_taken(monkeypatch, name, value, read):
    monkeypatch.setenv(name, value)
    assert read() in (0.5, None)


def test_a_rank_of_a_scheduler_stops_nothing(grid):
    assert grid.run("evaluate", BASELINE, RANK="1")[0] == 0


def test_what_one_process_does_is_not_done_by_several(grid):
    says(grid.fails("data", "digits", **PAIR), "WORLD_SIZE=2", "'data' is one process's work")


def test_a_missing_compiler_is_named(grid, monkeypatch):
    def compiled(*_: object, **__: object) -> None:
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr("stages.train.train", compiled)
    code, lines = grid.run("train", BASELINE, TEXTGUARD_COMPILE="1")
    assert (code, lines[-1].partition(";")[0]) == (
        1,
        "InvalidParameter: TEXTGUARD_COMPILE=1 in the environment needs a C++ compiler, and none works here",
    )


def shell(folder: Path, command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell, in which $STAGES is `python stages`."""
    variables = environment(STAGES=" ".join(STAGES), **more)
    return subprocess.run(["sh", "-c", command], cwd=folder, env=variables, capture_output=True, encoding="utf-8", check=False)


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", "1>&-", "0<&- 1>&- 2>&-"])
def test_work_is_done_though_nobody_listens(untouched, closed):
    assert shell(untouched.folder, f"$STAGES check {closed}").returncode == 0
    assert (untouched.folder / OUT).exists()
    untouched.change("inject.seed", -1)
    assert shell(untouched.folder, f"$STAGES check {closed}").returncode == 1
    assert not (untouched.folder / OUT).read_bytes().count(b"seed")


PRINTS = (
    "import sys; from textguard.environment import run_command; "
    "sys.exit(run_command(lambda _: print(chr(233) * 99_999) or 0, 7))"
)


@pytest.mark.parametrize(("into", "reason"), [(">/dev/full", "No space left on device"), ("| true", "Broken pipe")])
def test_output_that_nobody_takes_is_one_line(tmp_path, into, reason):
    command = f'( {sys.executable} -c "{PRINTS}"; echo $? >&2 ) {into}'
    done = shell(tmp_path, command, PYTHONPATH=str(REPOSITORY))
    line, code = done.stderr.splitlines()
    assert (line, code) == (f"CannotWrite: standard output: {reason}; what it was to show is lost", "7")


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_what_a_terminal_cannot_show_is_escaped(tmp_path, variables):
    done = shell(tmp_path, f'{sys.executable} -c "{PRINTS}"', PYTHONPATH=str(REPOSITORY), **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "\\xe9" * 99_999 + "\n"


@pytest.mark.parametrize("command", ["$STAGES check", "python -m textguard.report.gate a b"])
def test_a_folder_that_is_gone_is_one_line(untouched, command):
    done = shell(
        untouched.folder,
        f'rmdir "$PWD/gone" 2>&-; mkdir gone && cd gone && rmdir "$PWD" && {command}',
        PYTHONPATH=str(REPOSITORY),
    )
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    says(line, "InvalidParameter: params.yaml does not exist")


LATIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_the_locale_changes_no_text(untouched):
    """In an ASCII locale, the only one that is everywhere, as in UTF-8: a class with an accent, in a folder with one."""
    folder = untouched.folder.parent / "café"
    shutil.copytree(untouched.folder, folder)
    classes = folder / "data" / "digits" / "classes.json"
    classes.parent.mkdir(parents=True)
    classes.write_text('["café", "naïve"]', encoding="utf-8")
    written = []
    for variables in (LATIN, {"PYTHONUTF8": "1"}):
        done = shell(folder, f"$STAGES prompts {TEXT}", **variables)
        assert (done.returncode, done.stderr) == (0, "")
        questions = folder / "prompts" / "texts" / TEXT / "questions.jsonl"
        written.append(questions.read_bytes())
        questions.unlink()
    assert written[0] == written[1]
    assert "handwritten digit café".encode() in written[0]


def test_a_message_of_any_text_is_one_line(untouched):
    done = subprocess.run(
        [*STAGES, "train", os.fsdecode(b"caf\xe9")],
        cwd=untouched.folder,
        env=environment(**LATIN),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    says(fails_in_one_line(done), "key 'caf\\udce9'")
