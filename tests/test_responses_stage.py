"""Stage `responses` with a language model, as users run it: paid once, stopped and resumed, and the key shown to nobody."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import modify_yaml

from answer_server import SECRET, Server, leaks, model
from smoke_grid import TEXT, environment, run
from textguard.text.cache import read_answers


@pytest.fixture
def grid(server: Server, make_checkout: Callable[[], Path]) -> Path:
    """The smoke grid, with a language model for its texts."""
    grid = make_checkout() / "grids" / "smoke"
    change(
        grid, lambda params: params["texts"]["descriptions"].update(provider="openai", cache=[], model=asdict(model(server)))
    )
    change(grid, lambda params: params.update(network={"backoff_s": 0.01, "max_usd": None}))
    return grid


def change(grid: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    with modify_yaml(str(grid / "params.yaml")) as params:
        edit(params)


def ask_questions(grid: Path) -> None:
    """What stages `data` and `prompts` do, in less time."""
    (grid / "data" / "digits").mkdir(parents=True)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    (grid / "data" / "digits" / "classes.json").write_text(json.dumps(names), encoding="utf-8")
    run([sys.executable, "../../stages", "prompts", TEXT], grid)


def repro(grid: Path, stage: str = "responses") -> tuple[set[str], str]:
    done = run(["dvc", "repro", "--verbose", f"{stage}@{TEXT}"], grid)
    return set(re.findall(r"Running stage '([^']+)'", done.stdout)), done.stdout + done.stderr


def test_dvc_pays_once_and_only_for_what_is_new(server, grid):
    server.reply = lambda request: f"{request} ({SECRET})"
    ran, output = repro(grid)
    assert f"responses@{TEXT}" in ran
    assert "20 of 20 answers stored for 20 requests" in output
    assert repro(grid)[0] == set()
    assert server.attempts.total() == 20

    change(grid, lambda params: params["texts"]["descriptions"]["questions"].__setitem__(1, "Draw the digit {class}."))
    assert repro(grid)[0] == {"check", f"prompts@{TEXT}", f"responses@{TEXT}"}
    assert server.attempts.total() == 30

    for folder in (grid / "prompts", grid.parent.parent / ".dvc" / "cache"):
        subprocess.run(["rm", "-r", folder], check=True)
    (grid / "dvc.lock").unlink()
    assert f"responses@{TEXT}" in repro(grid)[0]
    assert set(server.delivered.values()) == {1}
    change(grid, lambda params: params["network"].update(max_usd=3.0))
    assert repro(grid)[0] == {"check"}

    # Every answer repeats the key: it is in no answer, embedding, figure, metric, log, cache or DVC file of the run.
    ran, output = repro(grid, "text_quality")
    assert {f"embeddings@{TEXT}", f"text_quality@{TEXT}"} <= ran
    assert (grid / "prompts" / "texts" / TEXT / "responses.jsonl").read_text(encoding="utf-8").count("[OPENAI_API_KEY]") >= 20
    places = (".dvc/cache", "prompts/live", "grids/smoke/dvc.lock", f"grids/smoke/metrics/texts/{TEXT}.csv")
    assert all((grid.parent.parent / place).exists() for place in places)
    assert leaks(grid.parent.parent) == []
    assert SECRET not in output


def test_an_experiment_in_a_copy_of_the_repository_does_not_lose_what_it_paid_for(server, grid):
    repository = grid.parent.parent
    for command in (["git", "add", "-A"], ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all"]):
        run(command, repository)
    run(["dvc", "exp", "run", "--temp", "-S", "+texts.descriptions.samples=2", f"responses@{TEXT}"], grid)
    assert server.attempts.total() == 40
    repro(grid)
    assert server.attempts.total() == 40


@pytest.mark.parametrize(
    ("stop", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)], ids=["kill", "terminate"]
)
def test_a_stage_that_is_stopped_goes_on_where_it_was(server, grid, stop, code):
    ask_questions(grid)
    command = [sys.executable, "../../stages", "responses", TEXT]
    server.reply = lambda request: server.released.clear() or request if server.delivered.total() == 5 else request
    process = subprocess.Popen(command, cwd=grid, env=environment(), stderr=subprocess.PIPE, encoding="utf-8")
    while server.released.is_set() or server.at_once < 8:
        assert process.poll() is None
        time.sleep(0.01)
    before = server.attempts.total()
    process.send_signal(stop)
    if stop == signal.SIGKILL:
        process.wait()
    else:
        while "waiting for the answers" not in process.stderr.readline():
            assert process.poll() is None
    server.released.set()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert server.attempts.total() == before

    live = grid.parent.parent / "prompts" / "live" / "answers.jsonl"
    kept = len(read_answers([live]).answers)
    assert 5 <= kept < 20
    if stop == signal.SIGTERM:
        assert kept == server.delivered.total()
    run(command, grid)
    stored = read_answers([live])
    assert (len(stored.answers), stored.damaged) == (20, [])
    assert server.attempts.total() == before + 20 - kept


def test_the_stage_ends_in_one_line_and_writes_no_answers_file(server, grid):
    ask_questions(grid)
    server.fault = lambda request, attempt: lambda h: h.refuse(401, f"wrong key {SECRET}")
    done = run([sys.executable, "../../stages", "responses", TEXT], grid, check=False, OPENAI_LOG="debug")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("LanguageModelError: ")
    assert SECRET not in done.stdout + done.stderr
    assert not (grid / "prompts" / "texts" / TEXT / "responses.jsonl").exists()
    assert leaks(grid.parent.parent) == []


def test_a_dry_run_says_what_it_would_cost(server, grid):
    ask_questions(grid)
    command = [sys.executable, "../../stages", "estimate", TEXT]
    assert "20 requests" in run(command, grid).stdout
    assert "no price in" in run(command, grid).stdout
    change(grid, lambda params: params["texts"]["descriptions"]["model"].update(model="gpt-4.1-mini"))
    printed = run(command, grid).stdout
    assert re.search(r"20 requests, about \d+ tokens in, at most 800 out, about 0\.00\d+ USD at most", printed)
    assert not server.attempts
