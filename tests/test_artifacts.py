"""Files: what a killed writer left, what the file system refuses, and JSON that readers would take differently."""

import errno
import fcntl
import os
import re
import subprocess
import sys

import pytest

from textguard import artifacts
from textguard.artifacts import (
    cannot_write,
    expanded,
    parse_json,
    read_json,
    read_json_lines,
    work_dir,
    write_bytes,
    write_text,
)
from textguard.errors import CannotWrite, InvalidArtifact, InvalidParameter
from textguard.schema.base import Measured, read

BAD_JSON = {
    "a name twice": ('{"a": 1, "b": 2, "a": 3}', "it holds 'a' twice"),
    "a name twice within": ('[{"x": {"é": 1, "é": 1}}]', "it holds 'é' twice"),
    "half a character": ('["\\ud83d"]', r"half of a character, as \\ud83d"),
    "half a character in a name": ('{"\\uDC00": 1}', r"half of a character, as \\uDC00"),
    "very deep": ("[" * 100_000 + "]" * 100_000, "too deep"),
    "5,000 digits": (f"[{'1' * 5000}]", "4300"),
    "a byte order mark": ("\ufeff[]", "BOM"),
    "nothing": ("", "Expecting value"),
    "two values": ("[] []", "Extra data"),
}


@pytest.mark.parametrize(("text", "reason"), BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_others_refuse_or_read_otherwise_is_refused(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
    with pytest.raises(ValueError, match=reason):
        parse_json(text.encode())
    for name, content in (("a.json", text), ("a.jsonl", f"{{}}\n{text}\n")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InvalidArtifact, match=rf"a\.json cannot be read .*{reason}.*stage 'x' writes it"):
        read_json(tmp_path / "a.json", "x")
    with pytest.raises(InvalidArtifact, match=rf"a\.jsonl line 2 is no JSON .*{reason.partition(' ')[0]}"):
        read_json_lines(tmp_path / "a.jsonl", "x")


def test_bytes_that_are_no_text_are_no_json():
    with pytest.raises(ValueError, match="utf-8"):
        parse_json(b'["\xe9"]')


def test_right_json_is_read():
    assert parse_json('{"a": [1, 2.5, null, "\\ud83d\\ude00", "\\\\ud83d"], "b": {"a": {}}}') == {
        "a": [1, 2.5, None, "😀", "\\ud83d"],
        "b": {"a": {}},
    }


def test_a_model_is_read_from_json_without_a_name_twice(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"value": 1.0, "low": 1.0, "high": 1.0, "n": 1}', encoding="utf-8")
    assert read(file, "x", Measured).n == 1
    file.write_text('{"value": 1.0, "low": 1.0, "high": 1.0, "n": 1, "n": 2}', encoding="utf-8")
    with pytest.raises(InvalidArtifact, match="it holds 'n' twice"):
        read(file, "x", Measured)


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_stays(tmp_path):
    dead, living, other = (tmp_path / name for name in (".a.json.1.tmp", ".b.json.2.tmp", ".notes.tmp"))
    for path in (dead, living, other):
        path.write_bytes(b"half")
    command = "import fcntl, sys; file = open(sys.argv[1], 'rb+'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", command, living], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        artifacts._remove_left_behind.cache_clear()
        write_text(tmp_path / "c.json", "whole")
        assert {path.name for path in tmp_path.iterdir()} == {living.name, other.name, "c.json"}
        writer.communicate(b"\n")
    artifacts._remove_left_behind.cache_clear()
    write_text(tmp_path / "c.json", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {other.name, "c.json"}


def test_a_writer_that_is_killed_leaves_a_file_that_the_next_one_removes(tmp_path):
    """The real thing: SIGKILL in the middle of a write."""
    code = (
        "import os, sys; from pathlib import Path; from textguard.artifacts import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as path:\n    path.write_bytes(b'half'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.bin"], check=False)
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(r"\.a\.bin\.[0-9]+\.tmp", left.name)
    artifacts._remove_left_behind.cache_clear()
    write_bytes(tmp_path / "a.bin", b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_file_is_locked_while_it_is_written(tmp_path):
    with artifacts.atomic_path(tmp_path / "a.bin") as path:
        path.write_bytes(b"half")
        with path.open("rb+") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EEXIST: "move away",
    errno.ENOTDIR: "where a folder must be",
    errno.EISDIR: "move away the folder",
    errno.ENAMETOOLONG: "shorten the names",
    errno.ELOOP: "links",
    errno.EMFILE: "ulimit -n",
    errno.EACCES: "make the folder writable",
    errno.EROFS: "make the folder writable",
}


@pytest.mark.parametrize(("number", "remedy"), REMEDIES.items())
def test_a_refused_write_names_its_remedy(tmp_path, number, remedy):
    said = str(cannot_write(tmp_path, OSError(number, os.strerror(number))))
    assert os.strerror(number) in said
    assert remedy in said
    assert ("make the folder writable" in said) == (remedy == "make the folder writable")


def test_a_name_that_is_too_long_is_told_so(tmp_path):
    with pytest.raises(CannotWrite, match="File name too long; nothing was written; shorten the names"):
        write_bytes(tmp_path / ("x" * 300), b"")


def test_a_home_that_is_none_is_named():
    with pytest.raises(
        InvalidParameter, match="TEXTGUARD_DATA is '~nobody-of-this-name/x', and there is no such home directory"
    ):
        expanded("~nobody-of-this-name/x", "TEXTGUARD_DATA")


def test_links_among_partial_results_are_removed_and_what_they_lead_to_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "elsewhere"
    kept.mkdir()
    (kept / "file").write_bytes(b"mine")
    home = tmp_path / ".work" / "stage" / "key"
    home.mkdir(parents=True)
    (home / "link").symlink_to(kept)
    (home / "nowhere").symlink_to(tmp_path / "nothing")
    (home / "old").mkdir()
    with work_dir("stage", "key", "mark") as folder:
        assert sorted(path.name for path in home.iterdir()) == sorted(["lock", folder.name])
    assert [path.name for path in home.iterdir()] == ["lock"]
    assert (kept / "file").read_bytes() == b"mine"
