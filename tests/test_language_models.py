"""Asking a language model over a network that fails: a real server on loopback, the real client, real files."""

import json
import random
import time
import traceback
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from answer_server import FAST, FAULTS, SECRET, Fault, leaks, model, questions, slow, sources
from textguard.errors import BudgetExhausted, InvalidParameter, LanguageModelError, TextguardError
from textguard.text.cache import read_answers
from textguard.text.language_models import estimate, price_of
from textguard.text.responses import answer, estimate_model


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
    server.fault = lambda request, attempt: slow if attempt == 1 else None
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
