"""A grid that is killed, waited for, pulled or run anew ends like an undisturbed one: the same bytes.

These tests run the whole smoke grid with the real `dvc`.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

import pytest
from filelock import FileLock
from moto.server import ThreadedMotoServer

from smoke_grid import ALL, BASELINE, GRID, environment, ran, repro, results, run


def wait_for(checkout: Path, pattern: str, process: subprocess.Popen) -> None:
    """Wait until a running process has written a file of this pattern in .work."""
    deadline = time.monotonic() + 240
    while not list((checkout / GRID / ".work").glob(pattern)):
        assert process.poll() is None, "the process ended before that"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_when(checkout: Path, pattern: str) -> str:
    """Start the smoke grid and send SIGKILL to dvc and its stage as soon as a file of this pattern appears in .work.

    Returns what they printed.
    """
    with TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            ["dvc", "repro"],
            cwd=checkout / GRID,
            env=environment(PYTHONUNBUFFERED="1"),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        wait_for(checkout, pattern, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        output.seek(0)
        return output.read()


def test_a_grid_killed_with_dvc_goes_on_and_ends_with_the_same_bytes(checkout, finished):
    """From an empty cache: killed in a training, then in a campaign, and each goes on from what it had stored."""
    shutil.rmtree(checkout / ".dvc" / "cache")
    for folder in ("models", "metrics", "plots", "embeddings", "data"):
        shutil.rmtree(checkout / GRID / folder)
    (checkout / GRID / "dvc.lock").unlink()
    in_training = kill_when(checkout, "train/*/*/checkpoint-*.safetensors")
    assert list((checkout / GRID / ".work").glob("train/*/*/checkpoint-*.safetensors"))
    in_campaign = kill_when(checkout, "inject/*/*/*/shard-00001.parquet")
    assert "going on after epoch" in in_campaign
    ended, output = repro(checkout)
    assert "going on after" in output
    begun = [ran(in_training), ran(in_campaign), ended]
    assert set.union(*begun) == ALL
    again = {name.partition("@")[0] for one, other in itertools.combinations(begun, 2) for name in one & other}
    assert again == {"train", "inject"}  # what had ended before is not run again
    assert results(checkout) == results(finished)
    assert not list((checkout / GRID / ".work").glob("*/*/*/*"))


def test_a_stage_waits_for_the_one_that_a_killed_dvc_left_behind(checkout, finished):
    work = checkout / GRID / ".work" / "inject" / BASELINE
    with FileLock(work / "lock"):
        command = [sys.executable, "../../stages", "inject", BASELINE]
        waiting = subprocess.Popen(command, cwd=checkout / GRID, env=environment(), stderr=subprocess.PIPE, encoding="utf-8")
        assert "another process is at work" in waiting.stderr.readline()
        assert [path.name for path in work.iterdir()] == ["lock"]
    waiting.communicate()
    assert waiting.returncode == 0
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
    run(["dvc", "remote", "add", "--default", "store", "s3://results/textguard"], checkout / GRID)
    run(["git", "add", "--all"], checkout)
    run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "results"], checkout)
    run(["dvc", "push"], checkout / GRID, **s3)

    clone = tmp_path / "clone"
    run(["git", "clone", "--quiet", str(checkout), str(clone)], tmp_path)
    assert not list((clone / GRID).rglob("*.safetensors"))
    run(["dvc", "pull"], clone / GRID, **s3)
    assert results(clone) == results(finished)
    assert repro(clone)[0] == set()
