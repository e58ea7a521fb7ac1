"""A language model behind a network that fails: real servers on loopback, the real client, real files."""

import json
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from smoke_grid import environment, run
from textguard.errors import BudgetExhausted, InvalidParameter, LanguageModelError, TextguardError
from textguard.text.cache import read_answers
from textguard.text.language_models import LanguageModel, Network, estimate, price_of
from textguard.text.questions import PLAIN
from textguard.text.questions import ask as fill
from textguard.text.responses import Sources, answer, estimate_model

SECRET = "sk-test-7Qp3/and+more=="
TEXT = "digits-descriptions"
FAST = Network(concurrency=16, timeout_s=20, attempts=12, backoff_s=0.002, max_requests=None, max_usd=None)
Fault = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    """Speaks the three protocols. `fault(request, attempt)` says how to fail, or None; answers that went out are counted."""

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.attempts: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.most_at_once = self.at_once = 0
        self.fault: Callable[[str, int], Fault | None] = lambda request, attempt: None
        self.released = threading.Event()
        self.released.set()
        self.reply: Callable[[str], str] = lambda request: f"An answer about {request}"
        self.changes: dict[str, Any] = {}  # to the reply's fields

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    # One packet per reply: otherwise Nagle's algorithm and delayed acknowledgements cost 40 ms each.
    wbufsize = -1

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self.send(200, {"object": "list", "data": [{"id": name} for name in ("small-2", "large-2", "embed-1")]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {SECRET}":
            self.refuse(401, f"wrong key: {self.headers['Authorization']}")
            return
        endpoint = self.path.removeprefix("/v1/")
        asked = body.get("prompt") or body.get("input") or body["messages"][-1]["content"]
        request = f"{asked} [{body.get('seed')}]"
        with self.server.lock:
            self.server.attempts[request] += 1
            self.server.bodies.append(body)
            attempt = self.server.attempts[request]
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            fault = self.server.fault(request, attempt)
            if fault:
                fault(self)
                return
            self.server.released.wait(60)
            reply = self.reply(endpoint, self.server.reply(request)) | self.server.changes
            with self.server.lock:
                self.server.delivered[request] += 1
            self.send(200, reply)
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def reply(self, endpoint: str, text: str, finish: str = "stop") -> dict[str, Any]:
        usage = {"prompt_tokens": 11, "completion_tokens": 7}
        if endpoint == "responses":
            parts = [{"type": "output_text", "text": text}]
            output = [{"type": "reasoning", "summary": []}, {"type": "message", "content": parts}]
            tokens = {"input_tokens": 11, "output_tokens": 7}
            return {"model": "small-2-0901", "status": "completed", "output": output, "usage": tokens}
        choice = {"text": text} if endpoint == "completions" else {"message": {"role": "assistant", "content": text}}
        return {"model": "small-2-0901", "choices": [{**choice, "finish_reason": finish}], "usage": usage}

    def send(self, status: int, content: Any, *, cut: int = 0, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data[: len(data) - cut])
        self.wfile.flush()
        self.close_connection = bool(cut)

    def refuse(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        self.send(status, {"error": {"message": message, "code": code}}, **headers)

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def _slow(handler: Handler) -> None:
    time.sleep(0.6)
    handler.reset()


def _whole(handler: Handler, text: str = "An answer") -> dict[str, Any]:
    return handler.reply(handler.path.removeprefix("/v1/"), text)


FAULTS: dict[str, Fault] = {
    "429 with a wait": lambda h: h.refuse(429, "slow down", "rate_limit_exceeded", Retry_After="0.01"),
    "429 with a date": lambda h: h.refuse(429, "slow down", Retry_After=format_datetime(datetime.now(UTC), usegmt=True)),
    "429 with nonsense": lambda h: h.refuse(429, "slow down", Retry_After="soon"),
    "500": lambda h: h.refuse(500, "oops"),
    "502 in HTML": lambda h: h.send(502, b"<html>Bad gateway</html>", Content_Type="text/html"),
    "503": lambda h: h.refuse(503, "busy", Retry_After="0"),
    "409": lambda h: h.refuse(409, "conflict"),
    "reset": Handler.reset,
    "closed": lambda h: setattr(h, "close_connection", True),
    "truncated body": lambda h: h.send(200, _whole(h), cut=9),
    "invalid JSON": lambda h: h.send(200, b'{"choices": [{"message"'),
    "deep JSON": lambda h: h.send(200, b"[" * 100_000),
    "HTML": lambda h: h.send(200, b"<html>Please log in</html>", Content_Type="text/html"),
    "no choices": lambda h: h.send(200, {"model": "m", "choices": [], "output": []}),
    "null": lambda h: h.send(200, None),
    "a number for a text": lambda h: h.send(200, _whole(h, 7)),
    "empty answer": lambda h: h.send(200, _whole(h, " \n")),
    "Latin-1": lambda h: h.send(200, json.dumps(_whole(h, "crème"), ensure_ascii=False).encode("latin-1")),
    "half a surrogate pair": lambda h: h.send(200, _whole(h, "\ud83d")),
    "not gzip": lambda h: h.send(200, _whole(h), Content_Encoding="gzip"),
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def model(server: Server, **changes: Any) -> LanguageModel:
    settings = {"system": None, "temperature": 0.7, "max_tokens": 40, "stop": [], "seed": None}
    return LanguageModel(**{"endpoint": "chat.completions", "base_url": server.url, "model": "small-2", **settings, **changes})


def sources(server: Server, folder: Path, *, samples: int = 1, network: Network = FAST, **changes: Any) -> Sources:
    return Sources(samples, [], model(server, **changes), network, folder / "live" / "answers.jsonl", "test")


def questions(count: int) -> list:
    return fill([f"class {number}" for number in range(count)], ["What is {class}?"], PLAIN, "here")


def leaks(folder: Path) -> list[Path]:
    """The files that hold the key."""
    return [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_two_thousand_requests_with_faults_end_with_every_answer_stored_once(server, tmp_path):
    def fault(request: str, attempt: int) -> Fault | None:
        draw = random.Random(f"{request} {attempt}")
        return draw.choice(list(FAULTS.values())) if draw.random() < 0.3 else None

    server.fault = fault
    asked, where = questions(400), sources(server, tmp_path, samples=5, seed=100)
    answers = answer("openai", asked, where)
    assert sum(server.attempts.values()) > 2600
    assert [given.answer for given in answers] == [
        f"An answer about What is class {number}? [{100 + sample}]" for number in range(400) for sample in range(5)
    ]
    assert len(server.delivered) == 2000
    assert set(server.delivered.values()) == {1}
    lines = where.log.read_bytes().splitlines()
    assert len(lines) == len({json.loads(line)["key"] for line in lines}) == 2000
    assert 1 < server.most_at_once <= FAST.concurrency

    sent = sum(server.attempts.values())
    assert answer("openai", asked, where) == answers
    assert answer("openai", [*asked, *questions(401)[400:]], replace(where, samples=1))[-1].question == "What is class 400?"
    assert sum(server.attempts.values()) > sent
    assert sum(server.delivered.values()) == 2001


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("endpoint", ["chat.completions", "completions", "responses"])
def test_each_fault_is_passed_on_every_endpoint(server, tmp_path, endpoint, fault):
    server.fault = lambda request, attempt: fault if attempt < 3 else None
    given = answer("openai", questions(1), sources(server, tmp_path, endpoint=endpoint))
    assert [text.answer for text in given] == ["An answer about What is class 0? [None]"]
    assert server.attempts.total() == 3


def test_a_request_that_takes_too_long_is_sent_again(server, tmp_path):
    server.fault = lambda request, attempt: _slow if attempt == 1 else None
    network = replace(FAST, timeout_s=0.3)
    assert len(answer("openai", questions(1), sources(server, tmp_path, network=network))) == 1
    assert server.attempts.total() == 2


def test_every_thread_waits_as_long_as_a_rate_limit_says(server, tmp_path):
    times: list[float] = []

    def fault(request: str, attempt: int) -> Fault | None:
        times.append(time.monotonic())
        wait = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        return (lambda h: h.refuse(429, "slow down", Retry_After=wait)) if len(times) == 1 else None

    server.fault = fault
    answer("openai", questions(3), sources(server, tmp_path, network=replace(FAST, concurrency=1)))
    assert times[1] - times[0] > 0.8  # HTTP dates have whole seconds


def test_the_request_says_what_the_parameters_say(server, tmp_path):
    settings = {"stop": ["\n"], "seed": 5, "temperature": 0.0}
    answer("openai", questions(1), sources(server, tmp_path, samples=2, system="Be brief.", **settings))
    answer("openai", questions(1), sources(server, tmp_path, endpoint="completions", **settings))
    answer("openai", questions(1), sources(server, tmp_path, endpoint="responses", system="Be brief.", temperature=None))
    chat = {
        "model": "small-2",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is class 0?"}],
        "max_tokens": 40,
        "stop": ["\n"],
        "temperature": 0.0,
    }
    assert sorted(server.bodies[:2], key=lambda body: body["seed"]) == [{**chat, "seed": 5}, {**chat, "seed": 6}]
    plain = {"model": "small-2", "prompt": "What is class 0?", "max_tokens": 40, "stop": ["\n"], "temperature": 0.0, "seed": 5}
    assert server.bodies[2] == plain
    assert server.bodies[3] == {
        "model": "small-2",
        "instructions": "Be brief.",
        "input": "What is class 0?",
        "max_output_tokens": 40,
    }
    body = model(server, base_url="https://api.openai.com/v1").body("Why?", 0)
    assert body["max_completion_tokens"] == 40
    assert "max_tokens" not in body


@pytest.mark.parametrize(
    ("endpoint", "changes"),
    [("responses", {"seed": 1}), ("responses", {"stop": ["x"]}), ("completions", {"system": "Be brief."})],
)
def test_what_an_endpoint_does_not_take_is_refused(server, endpoint, changes):
    with pytest.raises(InvalidParameter, match=rf"{endpoint} takes no {next(iter(changes))}"):
        model(server, endpoint=endpoint, **changes)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "large-2"},
        {"temperature": 0.8},
        {"max_tokens": 41},
        {"stop": ["x"]},
        {"seed": 1},
        {"system": "Be brief."},
        {"endpoint": "completions"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_can_change_an_answer_is_part_of_its_key(server, tmp_path, change):
    assert "system" not in model(server).request()
    answer("openai", questions(1), sources(server, tmp_path))
    assert estimate_model(questions(1), sources(server, tmp_path)).requests == 0
    assert estimate_model(questions(1), sources(server, tmp_path, **change)).requests == 1


def test_stored_lines_say_where_an_answer_comes_from_and_can_be_replayed(server, tmp_path):
    where = sources(server, tmp_path, samples=2)
    given = answer("openai", questions(3), where)
    stored = list(read_answers([where.log]).answers.values())
    assert len(stored) == 6
    for line in stored:
        assert (line.model, line.finish_reason, line.input_tokens, line.output_tokens) == ("small-2-0901", "stop", 11, 7)
        assert line.provider == f"small-2 at {server.url}"
        assert line.request == where.model.request()
        assert datetime.now(UTC) - datetime.fromisoformat(line.time) < timedelta(minutes=5)
    server.shutdown()
    assert answer("replay", questions(3), replace(where, files=[where.log])) == given
    with pytest.raises(TextguardError, match=r"class 'class 3' has no stored answer 1 of 2 .* by small-2 in"):
        answer("replay", questions(4), replace(where, files=[where.log]))


def test_a_damaged_answer_is_named_and_asked_for_again(server, tmp_path, capsys):
    where = sources(server, tmp_path)
    answer("openai", questions(10), where)
    content = where.log.read_bytes()
    where.log.write_bytes(content.replace(b"An answer about What is class 4", b"An answer about Who is class 4."))
    assert answer("openai", questions(10), where)[4].answer == "An answer about What is class 4? [None]"
    assert server.attempts.total() == 11
    assert f"left out: {where.log} line" in capsys.readouterr().err


ENDINGS = {
    "cut": ("chat.completions", {"choices": [{"message": {"content": "A thing with"}, "finish_reason": "length"}]}, "length"),
    "cut before the first word": (
        "chat.completions",
        {"choices": [{"message": {"content": None}, "finish_reason": "length"}]},
        "length",
    ),
    "filtered": (
        "chat.completions",
        {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]},
        "content_filter",
    ),
    "refused": (
        "chat.completions",
        {"choices": [{"message": {"content": None, "refusal": "I can't help."}, "finish_reason": "stop"}]},
        "refusal",
    ),
    "cut response": ("responses", {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, "length"),
    "filtered response": (
        "responses",
        {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}},
        "content_filter",
    ),
    "refused response": (
        "responses",
        {"output": [{"type": "message", "content": [{"type": "refusal", "refusal": "I can't help."}]}]},
        "refusal",
    ),
    "cut completion": ("completions", {"choices": [{"text": "A thing", "finish_reason": "length"}]}, "length"),
}


@pytest.mark.parametrize(("endpoint", "changes", "reason"), ENDINGS.values(), ids=ENDINGS)
def test_an_answer_that_was_cut_filtered_or_refused_is_stored_and_not_paid_again(server, tmp_path, endpoint, changes, reason):
    server.changes = changes
    where = sources(server, tmp_path, endpoint=endpoint)
    assert [given.finish_reason for given in answer("openai", questions(1), where)] == [reason]
    answer("openai", questions(1), where)
    assert server.attempts.total() == 1


def test_a_filter_that_answers_with_a_status_is_stored_too(server, tmp_path):
    server.fault = lambda request, attempt: lambda h: h.refuse(400, "filtered", "content_filter")
    given = answer("openai", questions(1), sources(server, tmp_path))
    assert [(text.answer, text.finish_reason) for text in given] == [("", "content_filter")]


def test_missing_token_counts_are_no_fault(server, tmp_path):
    server.changes = {"usage": None}
    where = sources(server, tmp_path)
    answer("openai", questions(1), where)
    assert next(iter(read_answers([where.log]).answers.values())).output_tokens is None


STOPS = {
    "expired key": (401, "expired", None, ["does not accept the key", "OPENAI_API_KEY", "401: expired"]),
    "no permission": (403, "not you", None, ["does not accept the key", "403: not you"]),
    "no credit": (429, "no money", "insufficient_quota", ["no credit left", "429: no money"]),
    "bad request": (400, "temperature is too high", None, ["refuses the request", "too high", "texts.*.model"]),
    "unknown model": (404, "no such model", None, ["no model 'small-1'", "it offers small-2, ", "texts.*.model"]),
}


@pytest.mark.parametrize(("status", "message", "code", "parts"), STOPS.values(), ids=STOPS)
def test_what_no_retry_mends_stops_at_once(server, tmp_path, status, message, code, parts):
    server.fault = lambda request, attempt: lambda h: h.refuse(status, message, code)
    network = replace(FAST, concurrency=4)
    with pytest.raises(LanguageModelError) as caught:
        answer("openai", questions(200), sources(server, tmp_path, network=network, model="small-1"))
    assert all(part in str(caught.value) for part in parts), caught.value
    assert server.attempts.total() <= 4


def test_an_unknown_endpoint_is_told_from_an_unknown_model(server, tmp_path):
    server.fault = lambda request, attempt: lambda h: h.refuse(404, "not found")
    with pytest.raises(LanguageModelError, match="has the model 'small-2', but no endpoint 'completions'"):
        answer("openai", questions(1), sources(server, tmp_path, endpoint="completions"))


def test_a_server_that_stays_down_ends_the_run_and_the_next_goes_on(server, tmp_path):
    server.fault = lambda request, attempt: FAULTS["500"] if server.delivered.total() >= 5 else None
    where = sources(server, tmp_path, network=replace(FAST, attempts=2, concurrency=1))
    with pytest.raises(LanguageModelError, match=r"failed 10 questions in a row, 2 attempts each .*500: oops"):
        answer("openai", questions(50), where)
    assert server.attempts.total() == 25
    server.fault = lambda request, attempt: None
    answer("openai", questions(50), where)
    assert set(server.delivered.values()) == {1}


def test_a_question_that_always_fails_costs_no_other(server, tmp_path):
    server.fault = lambda request, attempt: FAULTS["empty answer"] if "class 3?" in request else None
    where = sources(server, tmp_path, network=replace(FAST, attempts=3))
    with pytest.raises(LanguageModelError, match=r"1 of 20 answers did not come in 3 attempts each .*class 3\?.* is empty"):
        answer("openai", questions(20), where)
    assert len(read_answers([where.log]).answers) == 19


def test_a_server_that_asks_to_wait_for_long_is_left_alone(server, tmp_path):
    server.fault = lambda request, attempt: lambda h: h.refuse(429, "tomorrow", Retry_After="86400")
    with pytest.raises(LanguageModelError, match="asks to wait 86400 s"):
        answer("openai", questions(5), sources(server, tmp_path))


def test_nobody_listens(server, tmp_path):
    where = sources(server, tmp_path, base_url="http://127.0.0.1:1/v1", network=replace(FAST, attempts=2))
    with pytest.raises(LanguageModelError, match="ConnectError"):
        answer("openai", questions(1), where)


def test_the_number_of_requests_is_limited(server, tmp_path):
    where = sources(server, tmp_path, network=replace(FAST, max_requests=7))
    with pytest.raises(BudgetExhausted, match=r"max_requests = 7 is used up; .* stored"):
        answer("openai", questions(20), where)
    assert server.attempts.total() == len(read_answers([where.log]).answers) == 7
    answer("openai", questions(20), replace(where, network=FAST))
    assert server.delivered.total() == 20


def test_the_money_is_limited_whatever_the_requests_under_way_cost(server, tmp_path):
    server.changes = {"usage": {"prompt_tokens": 20, "completion_tokens": 40}}
    price = price_of("gpt-4.1")
    one, most = price.of(20, 40), price.of(16 + 40, 40)
    network = replace(FAST, max_usd=5 * one + most - 1e-12)
    with pytest.raises(BudgetExhausted, match=r"max_usd = .* is used up \(0\.0018 USD spent\)"):
        answer("openai", questions(20), sources(server, tmp_path, network=network, model="gpt-4.1"))
    assert server.delivered.total() == 5


def test_a_model_without_a_price_is_refused_where_money_is_limited(server, tmp_path):
    with pytest.raises(InvalidParameter, match=r"prices\.yaml has no price for model 'small-2'.*max_usd to null"):
        answer("openai", questions(1), sources(server, tmp_path, network=replace(FAST, max_usd=1.0)))
    assert not server.attempts


def test_prices_are_of_a_model_and_its_dated_versions():
    assert price_of("gpt-4.1-mini-2025-04-14") == price_of("gpt-4.1-mini")
    assert price_of("gpt-4.1-mini").of(1_000_000, 1_000_000) == pytest.approx(2.0)
    assert price_of("gpt-4.1-maxi") is None


def test_an_estimate_asks_nothing(server):
    wanted = estimate(model(server, model="gpt-4.1-mini", max_tokens=100), [("x" * 40, 0), ("x" * 40, 1)])
    assert (wanted.requests, wanted.input_tokens, wanted.most_output_tokens) == (2, 60, 200)
    assert wanted.most_usd == pytest.approx((60 * 0.4 + 200 * 1.6) / 1e6)
    assert estimate(model(server), [("x", 0)]).most_usd is None
    assert not server.attempts


@pytest.mark.parametrize(
    ("secret", "message"), [("", "is not set"), ("two words", "blanks"), ("a\nb", "blanks"), ("ключ", "blanks")]
)
def test_a_key_that_is_none_is_refused_and_not_shown(server, tmp_path, monkeypatch, secret, message):
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    with pytest.raises(InvalidParameter, match=f"OPENAI_API_KEY.* {message}") as caught:
        answer("openai", questions(1), sources(server, tmp_path))
    assert not secret or secret not in str(caught.value)


def test_a_key_that_the_server_repeats_is_shown_to_nobody(server, tmp_path, capfd):
    said = [
        lambda h: h.refuse(401, f"wrong key: {SECRET}", SECRET),
        lambda h: h.refuse(400, f"{SECRET} has no access\x1b[2J"),
        lambda h: h.refuse(404, SECRET),
        lambda h: h.refuse(500, SECRET),
        lambda h: h.send(200, SECRET),
    ]
    for fault in said:
        server.fault = lambda request, attempt, fault=fault: fault
        with pytest.raises(LanguageModelError) as caught:
            answer("openai", questions(1), sources(server, tmp_path, network=replace(FAST, attempts=2)))
        shown = "".join(traceback.format_exception(caught.value))
        assert SECRET not in shown
        assert "\x1b" not in str(caught.value)
        error = caught.value
        while error := error.__cause__ or error.__context__:
            assert SECRET not in f"{error!r} {error.__dict__}"
    server.fault = lambda request, attempt: None
    server.reply = lambda request: f"Your key is {SECRET}."
    server.changes = {"model": SECRET}
    given = answer("openai", questions(1), sources(server, tmp_path))
    assert given[0].answer == "Your key is [OPENAI_API_KEY]."
    assert leaks(tmp_path) == []
    assert SECRET not in "".join(capfd.readouterr())


# The whole stage, as users run it


@pytest.fixture
def grid(server: Server, make_checkout: Callable[[], Path]) -> Path:
    """The smoke grid, with a language model for its texts."""
    grid = make_checkout() / "grids" / "smoke"
    change(grid, lambda params: params["texts"][TEXT].update(provider="openai", cache=[], model=asdict(model(server))))
    change(grid, lambda params: params["network"].update(backoff_s=0.01, max_usd=None))
    return grid


def change(grid: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    params = yaml.safe_load((grid / "params.yaml").read_text())
    edit(params)
    (grid / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def ask_questions(grid: Path) -> None:
    """What stages `data` and `prompts` do, in less time."""
    (grid / "data" / "digits").mkdir(parents=True)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    (grid / "data" / "digits" / "classes.json").write_text(json.dumps(names))
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

    change(grid, lambda params: params["texts"][TEXT]["questions"].__setitem__(1, "Draw the digit {class}."))
    assert repro(grid)[0] == {f"prompts@{TEXT}", f"responses@{TEXT}"}
    assert server.attempts.total() == 30

    for folder in (grid / "prompts", grid.parent.parent / ".dvc" / "cache"):
        subprocess.run(["rm", "-r", folder], check=True)
    (grid / "dvc.lock").unlink()
    assert f"responses@{TEXT}" in repro(grid)[0]
    assert set(server.delivered.values()) == {1}
    change(grid, lambda params: params["network"].update(max_usd=3.0))
    assert repro(grid)[0] == set()

    # Every answer repeats the key: it is in no answer, embedding, figure, metric, log, cache or DVC file of the run.
    ran, output = repro(grid, "text_quality")
    assert {f"embeddings@{TEXT}", f"text_quality@{TEXT}"} <= ran
    assert (grid / "prompts" / TEXT / "responses.jsonl").read_text().count("[OPENAI_API_KEY]") >= 20
    places = (".dvc/cache", "prompts/live", "grids/smoke/dvc.lock", f"grids/smoke/metrics/texts/{TEXT}.csv")
    assert all((grid.parent.parent / place).exists() for place in places)
    assert leaks(grid.parent.parent) == []
    assert SECRET not in output


def test_an_experiment_in_a_copy_of_the_repository_does_not_lose_what_it_paid_for(server, grid):
    repository = grid.parent.parent
    for command in (["git", "add", "-A"], ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all"]):
        run(command, repository)
    target = f"grids/smoke/dvc.yaml:responses@{TEXT}"
    run(["dvc", "exp", "run", "--temp", "-S", f"grids/smoke/params.yaml:texts.{TEXT}.samples=2", target], repository)
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
    process = subprocess.Popen(command, cwd=grid, env=environment(), stderr=subprocess.PIPE, text=True)
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
    assert not (grid / "prompts" / TEXT / "responses.jsonl").exists()
    assert leaks(grid.parent.parent) == []


def test_a_dry_run_says_what_it_would_cost(server, grid):
    ask_questions(grid)
    command = [sys.executable, "../../stages", "estimate", TEXT]
    assert "20 requests" in run(command, grid).stdout
    assert "no price in" in run(command, grid).stdout
    change(grid, lambda params: params["texts"][TEXT]["model"].update(model="gpt-4.1-mini"))
    printed = run(command, grid).stdout
    assert re.search(r"20 requests, about \d+ tokens in, at most 800 out, about 0\.00\d+ USD at most", printed)
    assert not server.attempts
