"""Servers that mean no good, or are only odd: a real one on loopback, the real client, real files."""

import base64
import gzip
import json
import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import quote

import pytest

from answer_server import FAST, SECRET, Fault, Handler, Server, _whole, leaks, model, questions, sources
from textguard.errors import InvalidParameter, LanguageModelError
from textguard.text import connection
from textguard.text.cache import read_answers
from textguard.text.connection import make_client
from textguard.text.language_models import price_of
from textguard.text.responses import answer
from textguard.text.secret import KEY_VARIABLE, blotter, is_secret

ONCE = replace(FAST, attempts=1)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def fails(server: Server, tmp_path, fault: Fault, **changes) -> str:
    """What is said where a server always answers like that."""
    server.fault = lambda request, attempt: fault
    with pytest.raises(LanguageModelError) as caught:
        answer("openai", questions(1), sources(server, tmp_path, network=ONCE, **changes))
    return str(caught.value)


@pytest.mark.parametrize("word", ["none", "any", "EMPTY", "a", "m", "stop", "1", "ollama", "small-2", "internationalization"])
def test_a_word_in_place_of_a_key_changes_no_answer(server, tmp_path, monkeypatch, word):
    monkeypatch.setenv(KEY_VARIABLE, word)
    server.secret = word
    said = f"Many a zero, none of it empty; stop at 1. {word}"
    server.reply = lambda request: said
    where = sources(server, tmp_path)
    answer("openai", questions(1), where)
    (stored,) = read_answers([where.log]).answers.values()
    assert (stored.answer, stored.model, stored.finish_reason) == (said, "small-2-0901", "stop")
    assert f"400: {said}" in fails(server, tmp_path, lambda h: h.refuse(400, said), seed=1)


@pytest.mark.parametrize(
    ("key", "secret"),
    [
        ("0123456789abcde", False),
        ("0123456789abcdef", True),
        ("internationalization", False),
        ("Internationalization", False),
        ("INTERNATIONALIZATION", False),
        ("internationaliZation", True),
        ("correct-horse-battery", True),
    ],
)
def test_a_key_is_sixteen_characters_that_are_no_word(key, secret):
    assert is_secret(key) is secret
    assert (blotter(key)(f"<{key}>") == "<[OPENAI_API_KEY]>") is secret


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


# How a server can repeat a key so that a reader has it all the same.
FORMS = {
    "as it is": SECRET,
    "upper case": SECRET.upper(),
    "percent-encoded": quote(SECRET, safe=""),
    "percent-encoded, lower case": quote(SECRET, safe="").replace("%2F", "%2f"),
    "percent-encoded in part": SECRET.replace("+", "%2B"),
    "percent-encoded twice": quote(quote(SECRET, safe="")),
    "every letter percent-encoded": "".join(f"%{ord(letter):02X}" for letter in SECRET),
    "HTML": SECRET.replace("+", "&#43;").replace("/", "&#x2F;"),
    "JSON's escapes": SECRET.replace("/", "\\/").replace("+", "\\u002b"),
    "Python's escapes": SECRET.replace("=", "\\x3d"),
    "with a NUL": SECRET[:9] + "\0" + SECRET[9:],
    "in lines": "\r\n".join(SECRET),
    "with soft hyphens": "\xad".join(SECRET),
    "with zero-width blanks": "\u200b".join(SECRET),
    "base64": b64(SECRET),
    "base64 without padding": b64(SECRET).rstrip("="),
    "base64 of the header": b64(f"Bearer {SECRET}"),
    "base64 of user and key": b64(f"u:{SECRET}"),
    "base64 of a longer user and key": b64(f"me:{SECRET}"),
    "base64 of more": b64(f"user:{SECRET} and so on"),
    "base64 for URLs": base64.urlsafe_b64encode(f"?{SECRET}".encode()).decode(),
    "base64 in lines": base64.encodebytes(("some text before it: " * 2 + SECRET).encode()).decode(),
    "base64 in a URL": quote(b64(SECRET), safe=""),
    "hexadecimal": SECRET.encode().hex(),
    "hexadecimal with colons": SECRET.encode().hex(":").upper(),
}


# What base64 leaves of other words around the key.
REST = ["", "QmVhcmVyI", "dT", "bWU", "P", "dXNlcjBhbmQgc28gb24=", b64("some text before it: " * 2)[:55]]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_key_in_any_usual_form_is_neither_stored_nor_shown(server, tmp_path, form):
    server.reply = lambda request: f"The sea «{form}» is wide."
    server.changes = {"model": f"m «{form}»"}
    where = sources(server, tmp_path)
    given = answer("openai", questions(1), where)[0]
    assert given.answer.startswith("The sea «")
    assert given.answer.endswith("» is wide.")
    assert KEY_VARIABLE in given.answer
    assert KEY_VARIABLE in given.model
    for shown in (given.answer, given.model):
        inside = shown.partition("«")[2].partition("»")[0]
        assert inside.replace(f"[{KEY_VARIABLE}]", "").strip() in REST
    said = fails(server, tmp_path, lambda h: h.refuse(400, f"x «{form}»"), seed=1)
    assert KEY_VARIABLE in said
    assert "".join(form.split()) not in "".join(said.split())


PLACES: dict[str, Fault] = {
    "a header that is none": lambda h: h.write(HEAD + f"Bearer {SECRET}\r\n\r\n".encode()),
    "a header's name": lambda h: h.write(HEAD + f"{SECRET} : x\r\n\r\n".encode()),
    "the status line": lambda h: h.write(f"HTTP/9 {SECRET}\r\n\r\n".encode()),
    "the status's words": lambda h: h.write(f"HTTP/1.1 400 {SECRET}\r\nContent-Length: 0\r\n\r\n".encode()),
    "Content-Encoding": lambda h: h.send(200, b"x", Content_Encoding=SECRET),
    "Content-Length": lambda h: h.write(HEAD + f"Content-Length: {SECRET}\r\n\r\n".encode()),
    "Retry-After": lambda h: h.refuse(429, "later", Retry_After=SECRET),
    "HTML": lambda h: h.send(400, f"<b>{SECRET}</b>".encode(), Content_Type="text/html"),
    "a list": lambda h: h.send(400, [SECRET, {SECRET: SECRET}]),
    "an error's code": lambda h: h.refuse(400, "no", SECRET),
    "an error's message": lambda h: h.refuse(500, f"x\0{SECRET[:9]}\0{SECRET[9:]}"),
    "a text": lambda h: h.send(500, SECRET),
    "a name": lambda h: h.send(200, {SECRET: SECRET}),
    "a status": lambda h: h.send(200, {"output": [], "status": SECRET}),
}


@pytest.mark.parametrize("endpoint", ["chat.completions", "responses"])
@pytest.mark.parametrize("fault", PLACES.values(), ids=PLACES)
def test_a_key_is_shown_wherever_it_is_repeated_to_nobody(server, tmp_path, capfd, endpoint, fault):
    said = fails(server, tmp_path, fault, endpoint=endpoint)
    assert SECRET[:9] not in said + "".join(capfd.readouterr())
    assert "\n" not in said
    assert leaks(tmp_path) == []


CUT = {
    "a list": lambda long: {"choices": [{"message": {"content": [long]}}], "model": 7},
    "a dictionary": lambda long: {"choices": [{"message": {"content": {long: long}}}]},
    "a name": lambda long: {"choices": {long: long}},
    "a status": lambda long: {"status": long, "output": [], "choices": [{"message": {"content": {"a": long}}}]},
    "an error": lambda long: {"error": {"message": long, "code": long}},
    "an error of another kind": lambda long: {"error": [long, {"a": long}]},
}


@pytest.mark.parametrize("reply", CUT.values(), ids=CUT)
def test_no_part_of_a_key_is_left_where_a_message_is_cut(server, tmp_path, reply):
    for padding in (65, 170, 185):
        server.fault = lambda request, attempt, long="y" * padding + SECRET: lambda h: h.send(200, reply(long))
        where = sources(server, tmp_path, network=ONCE, seed=padding)
        try:
            said = answer("openai", questions(1), where)[0].answer
        except LanguageModelError as error:
            said = str(error)
        assert SECRET[:8] not in said
    assert leaks(tmp_path) == []


def test_logs_that_the_environment_asks_for_do_not_hold_the_key(server, tmp_path, caplog):
    headers = {"X_Request_Id": f"Bearer {SECRET}", "X_Other": quote(SECRET, safe="")}
    server.fault = lambda request, attempt: lambda h: h.send(200, _whole(h, SECRET), **headers)
    with caplog.at_level(logging.DEBUG):
        for name in ("openai", "httpx2", "httpcore2"):
            logging.getLogger(name).setLevel(logging.DEBUG)
        try:
            answer("openai", questions(1), sources(server, tmp_path))
        finally:
            for name in ("openai", "httpx2", "httpcore2"):
                logging.getLogger(name).setLevel(logging.NOTSET)
    assert {"openai._base_client", "httpx2", "httpcore2.http11"} <= {record.name for record in caplog.records}
    assert "request_id: Bearer [OPENAI_API_KEY]" in caplog.text
    assert not any(form in caplog.text for form in (SECRET, quote(SECRET, safe="")))
    record = logging.getLogRecordFactory()("a", 10, "", 0, "%s", (SECRET,), None)
    assert record.getMessage() == SECRET  # the filter ends with the questions


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(server, tmp_path, status):
    said = fails(server, tmp_path, lambda h: h.send(status, b"", Location=f"http://127.0.0.2:9/v1?key={SECRET}"))
    assert f"sends the request elsewhere ({status} to http://127.0.0.2:9/v1?key=[OPENAI_API_KEY])" in said
    assert "base_url" in said
    assert server.attempts.total() == 1


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "http://[", "ftp://x", "/v1/chat/completions", "\xff", "http://a:99999/"]
)
def test_a_redirect_to_anything_is_one_line(server, tmp_path, location):
    said = fails(server, tmp_path, lambda h: h.send(302, b"", Location=location))
    assert "sends the request elsewhere (302 to " in said
    assert "elsewhere (300 to no address)" in fails(server, tmp_path, lambda h: h.send(300, b""))


ENDLESS: dict[str, tuple[Fault, str]] = {
    "a body, byte by byte": (
        lambda h: h.write(HEAD + b"Content-Length: 999\r\n\r\n", *[b" "] * 20, every_s=0.05),
        "no whole answer came within 0.4 s",
    ),
    "headers, byte by byte": (lambda h: h.write(HEAD + b"X: ", *[b"x"] * 20, every_s=0.05), "within 0.4 s"),
    "chunks, slowly": (
        lambda h: h.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\n \r\n"] * 20, every_s=0.05),
        "within 0.4 s",
    ),
    "silence": (lambda h: h.write(HEAD, b"", every_s=0.3), "ReadTimeout"),
    "100 Continue for ever": (lambda h: h.write(*[b"HTTP/1.1 100 Continue\r\n\r\n"] * 20, every_s=0.05), "within 0.4 s"),
    "a long status line": (lambda h: h.write(b"HTTP/1.1 200 " + b"x" * 200_000 + b"\r\n\r\n"), "RemoteProtocolError"),
    "headers without end": (lambda h: h.write(HEAD + b"X: y\r\n" * 50_000), "RemoteProtocolError"),
    "a body that is too long": (lambda h: h.send(200, b" " * 70_000), "larger than 0 MiB"),
    "an error that is too long": (lambda h: h.send(400, b" " * 70_000), "larger than 0 MiB"),
    "chunks without end": (
        lambda h: h.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1000\r\n" + b" " * 4096 + b"\r\n"] * 99),
        "larger than 0 MiB",
    ),
    "a body without a length": (lambda h: h.write(HEAD + b"\r\n", *[b" " * 4096] * 99), "larger than 0 MiB"),
    "a compressed body": (
        lambda h: h.send(200, gzip.compress(b" " * 10**6), Content_Encoding="gzip, gzip"),
        "compressed (gzip, gzip)",
    ),
}


@pytest.mark.parametrize(("fault", "said"), ENDLESS.values(), ids=ENDLESS)
def test_a_reply_without_an_end_ends(server, tmp_path, monkeypatch, fault, said):
    monkeypatch.setattr(connection, "LARGEST_BODY", 60_000)
    started = time.monotonic()
    server.fault = lambda request, attempt: fault
    where = sources(server, tmp_path, network=replace(ONCE, timeout_s=0.1))
    with pytest.raises(LanguageModelError, match="answers did not come") as caught:
        answer("openai", questions(1), where)
    assert said in str(caught.value)
    assert time.monotonic() - started < 10


def test_compression_is_not_asked_for(server, tmp_path):
    seen = []
    server.fault = lambda request, attempt: lambda h: seen.append(h.headers["Accept-Encoding"]) or h.send(200, _whole(h))
    answer("openai", questions(1), sources(server, tmp_path))
    assert seen == ["identity"]


@pytest.mark.parametrize("count", ["1" + "0" * 400, "9" * 5000, "-5", "1.5", '"7"', "true", "1e400", "null", "[]", "{}"])
def test_an_answer_is_stored_whatever_the_server_counts(server, tmp_path, count):
    body = json.dumps(
        {"choices": [{"message": {"content": "A zero."}}], "usage": {"prompt_tokens": "N", "completion_tokens": 3}}
    )
    server.fault = lambda request, attempt: lambda h: h.send(200, body.replace('"N"', count).encode())
    where = sources(server, tmp_path, model="gpt-4.1", network=replace(ONCE, max_usd=1.0))
    assert answer("openai", questions(1), where)[0].answer == "A zero."
    (stored,) = read_answers([where.log]).answers.values()
    assert (stored.input_tokens, stored.output_tokens) == (None, 3)


def test_tokens_that_cannot_be_believed_cost_what_was_reserved(server, tmp_path, capsys):
    server.changes = {"usage": {"prompt_tokens": 10**400, "completion_tokens": 10**400}}
    answer("openai", questions(1), sources(server, tmp_path, model="gpt-4.1"))
    most = price_of("gpt-4.1").of(model(server).most_input_tokens("What is class 0?"), 40)
    assert f"{most:.4f} USD" in capsys.readouterr().err


@pytest.mark.parametrize("usage", ["many", [1], 7, {"prompt_tokens": {}}])
def test_usage_of_any_kind_costs_no_answer(server, tmp_path, usage):
    server.changes = {"usage": usage}
    assert answer("openai", questions(1), sources(server, tmp_path, network=ONCE))


ODD: dict[str, tuple[str, dict, str]] = {
    "content in parts": (
        "chat.completions",
        {"choices": [{"message": {"content": [{"type": "text", "text": "A "}, {"type": "text", "text": "zero."}]}}]},
        "A zero.",
    ),
    "parts with reasoning": (
        "chat.completions",
        {"choices": [{"message": {"content": [{"type": "thinking", "thinking": [{"text": "hm"}]}, {"text": "A zero."}]}}]},
        "A zero.",
    ),
    "texts as parts": ("chat.completions", {"choices": [{"message": {"content": ["A ", "zero."]}}]}, "A zero."),
    "no finish reason": ("chat.completions", {"choices": [{"message": {"content": "A zero."}}]}, "A zero."),
    "another finish reason": (
        "chat.completions",
        {"choices": [{"message": {"content": "A zero."}, "finish_reason": 5}]},
        "A zero.",
    ),
    "an empty error": ("chat.completions", {"error": None}, "An answer about What is class 0? [None]"),
    "no error in a response": ("responses", {"error": None}, "An answer about What is class 0? [None]"),
}


@pytest.mark.parametrize(("endpoint", "changes", "text"), ODD.values(), ids=ODD)
def test_an_answer_is_read_from_replies_that_are_odd(server, tmp_path, endpoint, changes, text):
    server.changes = changes
    given = answer("openai", questions(1), sources(server, tmp_path, endpoint=endpoint, network=ONCE))[0]
    assert (given.answer, given.model, given.finish_reason) == (text, "small-2-0901", "stop")


@pytest.mark.parametrize("endpoint", ["chat.completions", "completions", "responses"])
@pytest.mark.parametrize("named", [None, "", 7, ["m"], "absent"])
def test_a_reply_that_names_no_model_is_of_the_one_that_was_asked(server, tmp_path, endpoint, named):
    def unnamed(handler: Handler) -> None:
        reply = _whole(handler) | {"model": named}
        handler.send(200, {name: value for name, value in reply.items() if value != "absent"})

    server.fault = lambda request, attempt: unnamed
    given = answer("openai", questions(1), sources(server, tmp_path, endpoint=endpoint, network=ONCE))
    assert [(text.answer, text.model) for text in given] == [("An answer", "small-2")]


ERRORS = {
    "a number": ({"message": "no credits", "code": 402}, 1, "refuses the request (402: no credits)"),
    "a number as text": ({"message": "who are you", "code": "401"}, 1, "does not accept the key (401: who are you)"),
    "a status": ({"message": "who are you", "status": 403, "code": "x"}, 1, "does not accept the key (403: who are you)"),
    "a name": ({"message": "no money", "code": "insufficient_quota"}, 1, "no credit left (429: no money)"),
    "a type": ({"message": "top_k", "type": "invalid_request_error"}, 1, "refuses the request (400: top_k)"),
    "a limit": ({"message": "slow down", "code": 429}, 2, "429: slow down"),
    "an unknown name": ({"message": "no GPU", "code": "E17"}, 2, "500: no GPU"),
    "a text": ("no model is loaded", 2, "500: no model is loaded"),
    "anything": ([7], 2, "500: [7]"),
}


@pytest.mark.parametrize("place", ["reply", "choice"])
@pytest.mark.parametrize(("error", "attempts", "said"), ERRORS.values(), ids=ERRORS)
def test_an_error_in_place_of_an_answer_means_what_its_status_would(server, tmp_path, place, error, attempts, said):
    reply = {"error": error} if place == "reply" else {"choices": [{"error": error, "finish_reason": "error", "message": {}}]}
    server.fault = lambda request, attempt: lambda h: h.send(200, reply)
    with pytest.raises(LanguageModelError) as caught:
        answer("openai", questions(1), sources(server, tmp_path, network=replace(FAST, attempts=2)))
    assert said in str(caught.value)
    assert server.attempts.total() == attempts


def test_a_filter_that_answers_with_an_error_in_a_reply_is_stored(server, tmp_path):
    server.fault = lambda request, attempt: lambda h: h.send(200, {"error": {"message": "no", "code": "content_filter"}})
    given = answer("openai", questions(1), sources(server, tmp_path, network=ONCE))
    assert [(text.answer, text.finish_reason) for text in given] == [("", "content_filter")]


REFUSALS = {
    "a detail": ({"detail": "no such field"}, "422: no such field"),
    "a list of details": (
        {"detail": [{"loc": ["body", "stop", 0], "msg": "too short"}, {"loc": [], "msg": "b"}]},
        "422: body.stop.0: too short; : b",
    ),
    "another list": ({"detail": [1, 2]}, "422: [1, 2]"),
    "nothing": (b"", "422: no reason given"),
    "a text": (b"plain", "422: plain"),
    "a list": ([{"a": 1}], '422: [{"a": 1}]'),
    "an error that is a text": ({"error": "oops"}, "422: oops"),
}


@pytest.mark.parametrize(("body", "said"), REFUSALS.values(), ids=REFUSALS)
def test_the_reason_of_a_refusal_is_shown_wherever_it_stands(server, tmp_path, body, said):
    assert f"refuses the request ({said})" in fails(server, tmp_path, lambda h: h.send(422, body))


def new_limit_only(handler: Handler) -> None:
    """As Azure answers where a reasoning model is behind a name."""
    if "max_tokens" in handler.server.bodies[-1]:
        handler.refuse(400, "'max_tokens' is not supported. Use 'max_completion_tokens' instead.", "unsupported_parameter")
    else:
        handler.send(200, _whole(handler))


def test_the_limit_is_called_by_its_new_name_where_the_old_one_is_refused(server, tmp_path):
    where = sources(server, tmp_path, network=replace(ONCE, concurrency=1))
    server.fault = lambda request, attempt: new_limit_only
    assert len(answer("openai", questions(3), where)) == 3
    assert ["max_tokens" in body for body in server.bodies] == [True, False, False, False]
    assert server.bodies[1]["max_completion_tokens"] == 40
    assert {row.request["max_tokens"] for row in read_answers([where.log]).answers.values()} == {40}
    answer("openai", questions(3), where)
    assert len(server.bodies) == 4


def test_a_server_that_refuses_both_names_of_the_limit_is_asked_twice(server, tmp_path):
    said = fails(server, tmp_path, lambda h: h.refuse(400, "neither max_tokens nor max_completion_tokens"))
    assert "refuses the request (400: neither" in said
    assert server.attempts.total() == 2


ENVIRONMENTS = {
    "an unknown proxy": {"ALL_PROXY": "ftp://127.0.0.1:1"},
    "a proxy without a scheme": {"HTTPS_PROXY": "://x"},
    "no certificates": {"SSL_CERT_FILE": "/nowhere/at/all.pem"},
    "a folder for a file": {"SSL_CERT_FILE": "/"},
    "no certificate in the file": {"SSL_CERT_FILE": __file__},
}


@pytest.mark.parametrize("variables", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_what_the_environment_says_of_the_network_is_named_where_it_is_of_no_use(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidParameter, match=r"https://host/v1 cannot be asked \(.*environment names") as caught:
        make_client("https://host/v1", 1.0, SECRET, blotter(SECRET))
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value.__context__, (OSError, ssl.SSLError))


def test_a_proxy_that_needs_a_package_is_named(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    try:
        import socksio  # noqa: F401
    except ImportError:
        with pytest.raises(InvalidParameter, match=r"cannot be asked \(.*SOCKS"):
            make_client("https://host/v1", 1.0, SECRET, blotter(SECRET))


def test_no_proxy_sees_a_key_that_is_not_encrypted(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert answer("openai", questions(1), sources(server, tmp_path, network=ONCE))


FAR = ["http://example.com/v1", "http://8.8.8.8/v1", "http://[2001:4860:4860::8888]:8000/v1", "http://local.example.org"]
NEAR = [
    "http://localhost:1",
    "http://127.0.0.9",
    "http://[::1]:8000",
    "http://192.168.1.5/v1",
    "http://10.0.0.1",
    "http://[fd00::1]",
]
NEAR += ["http://ollama:11434/v1", "http://gpu.lan", "http://gpu.local.", "http://100.64.0.7", "https://example.com/v1"]


@pytest.mark.parametrize("base_url", FAR)
def test_a_key_is_not_sent_in_clear_through_public_networks(base_url):
    with pytest.raises(InvalidParameter, match=r"is not encrypted and no local server.*https://.* OPENAI_API_KEY"):
        make_client(base_url, 1.0, SECRET, blotter(SECRET))
    make_client(base_url, 1.0, "none", blotter("none"))


@pytest.mark.parametrize("base_url", NEAR)
def test_a_key_is_sent_in_clear_to_local_servers(base_url):
    make_client(base_url, 1.0, SECRET, blotter(SECRET))


@pytest.mark.parametrize(
    "base_url", ["https://[::1", "https://host:99999/v1", "https://a b/", "https://\u2603.\u2603\u2603.xn--/"]
)
def test_an_address_that_is_none_is_one_line(base_url, tmp_path, server):
    with pytest.raises((InvalidParameter, LanguageModelError)) as caught:
        answer("openai", questions(1), sources(server, tmp_path, base_url=base_url, network=ONCE))
    assert "\n" not in str(caught.value)


MODELS: dict[str, tuple[Callable[[], object], str]] = {
    "no list": (lambda: {"data": None}, "does not list its models"),
    "other things": (lambda: {"data": [7]}, "does not list its models"),
    "a number for a name": (lambda: {"data": [{"id": 7}]}, "does not list its models"),
    "deep": (lambda: b"[" * 100_000, "does not list its models"),
    "very many": (lambda: {"data": [{"id": f"m{n}"} for n in range(5000)]}, "it offers m"),
    "a key": (lambda: {"data": [{"id": quote(SECRET, safe="")}, {"id": "x" * 180 + SECRET}]}, ", [OPENAI_API_KEY] (404"),
}


@pytest.mark.parametrize(("listed", "said"), MODELS.values(), ids=MODELS)
def test_a_list_of_models_can_hold_anything(server, tmp_path, monkeypatch, listed, said):
    monkeypatch.setattr(Handler, "do_GET", lambda handler: handler.send(200, listed()))
    line = fails(server, tmp_path, lambda h: h.refuse(404, "no such model"))
    assert said in line
    assert SECRET[:8] not in line
