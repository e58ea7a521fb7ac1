"""Asking a language model over a network that fails: every answer is stored as soon as it is here, and paid for once.

Works with any server that speaks one of OpenAI's three protocols. The key comes from OPENAI_API_KEY in the environment and goes
nowhere but to the server: no redirect is followed, and what is not encrypted stays near.
"""

import difflib
import json
import math
import operator
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from textguard.errors import BudgetExhausted, InvalidParameter, LanguageModelError, printable
from textguard.text.cache import AnswerLog, StoredAnswer, answer_key
from textguard.text.secret import KEY_VARIABLE, blotted_logs, blotter

if TYPE_CHECKING:
    import openai
    from anyio.from_thread import BlockingPortal

    from textguard.text.connection import UnwantedReply

PRICES = Path(__file__).with_name("prices.yaml")
OPENAI_HOST = "https://api.openai.com/"
LONGEST_BACKOFF_S = 60.0
LONGEST_WAIT_S = 300.0  # a server that asks for more is asked again by the next run, not by this one
FAILURES_IN_A_ROW = 10  # questions given up one after the other: the server is down
PASSING = (408, 409, 425, 429)  # and 5xx: may succeed when repeated
MESSAGE_TOKENS = 20  # around each message: role and separators, a generous guess
LONGEST_REQUEST = 4  # times network.timeout_s: a server can break its silence with one byte at a time
MOST_TOKENS = 10**9  # of one request; no model counts to more
# What OpenAI calls errors, for servers that send one in a reply with status 200 and give no number.
STATUSES = {
    "invalid_api_key": 401,
    "model_not_found": 404,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "content_filter": 400,
    "unsupported_parameter": 400,
    "invalid_request_error": 400,
}


@dataclass(frozen=True)
class LanguageModel:
    """Which model to ask, and with which settings. With question and sample, they are the key of an answer.

    endpoint: responses, chat.completions or completions, below base_url. system: the system prompt, or None. temperature: None
    leaves it to the server. max_tokens: longer answers are cut. stop: texts at which an answer ends. seed: for sample 0; each
    further sample has the next number; None sends no seed. Raises InvalidParameter for a setting that the endpoint does not
    take.
    """

    endpoint: str
    base_url: str
    model: str
    system: str | None
    temperature: float | None
    max_tokens: int
    stop: list[str]
    seed: int | None

    def __post_init__(self) -> None:
        refused = {
            "responses": {"stop": bool(self.stop), "seed": self.seed is not None},
            "completions": {"system": self.system is not None},
        }
        for name, is_set in refused.get(self.endpoint, {}).items():
            if is_set:
                empty = "[]" if name == "stop" else "null"
                raise InvalidParameter(
                    f"endpoint {self.endpoint} takes no {name}; set params.yaml texts.*.model.{name} to {empty}"
                )

    def request(self) -> dict[str, Any]:
        """The settings in an answer's key: those that are not None, so that a setting added later leaves older keys valid."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def body(self, question: str, sample: int) -> dict[str, Any]:
        """The request's JSON."""
        seed = None if self.seed is None else self.seed + sample
        body = {"model": self.model, "temperature": self.temperature, "stop": self.stop, "seed": seed}
        if self.endpoint == "responses":
            body |= {"instructions": self.system, "input": question, "max_output_tokens": self.max_tokens}
        elif self.endpoint == "completions":
            body |= {"prompt": question, "max_tokens": self.max_tokens}
        else:
            said = [("system", self.system), ("user", question)]
            # OpenAI's newer models refuse the old name of this limit, other servers ignore the new one.
            limit = "max_completion_tokens" if self.base_url.startswith(OPENAI_HOST) else "max_tokens"
            body |= {"messages": [{"role": role, "content": text} for role, text in said if text], limit: self.max_tokens}
        return {name: value for name, value in body.items() if value not in (None, [])}

    def most_input_tokens(self, question: str) -> int:
        """The most tokens that any tokenizer can make of a request, because each token covers at least one byte."""
        return len((self.system or "").encode()) + len(question.encode()) + 2 * MESSAGE_TOKENS


@dataclass(frozen=True)
class Network:
    """How requests are sent. Nothing here changes an answer.

    concurrency: requests at a time. timeout_s: the longest silence of a server within one request, which may take
    LONGEST_REQUEST times that. attempts: how often one answer is asked for. backoff_s: the longest wait before the second
    attempt; it doubles before each further one.
    max_requests, max_usd: limits for one run of the stage; None for no limit.
    """

    concurrency: int
    timeout_s: float
    attempts: int
    backoff_s: float
    max_requests: int | None
    max_usd: float | None


@dataclass(frozen=True)
class Price:
    """US dollars per token."""

    input: float
    output: float

    def of(self, input_tokens: int, output_tokens: int) -> float:
        """The price of one request, in US dollars."""
        return input_tokens * self.input + output_tokens * self.output


def price_of(model: str) -> Price | None:
    """The price of a model. A dated version has its model's price. None for a model that prices.yaml does not list."""
    listed = yaml.safe_load(PRICES.read_text(encoding="utf-8"))["models"]
    price = listed.get(model) or listed.get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model))
    return Price(price["input"] / 1e6, price["output"] / 1e6) if price else None


@dataclass(frozen=True)
class CostEstimate:
    """What a run would ask for. most_usd: None where the model's price is not known."""

    requests: int
    input_tokens: int
    most_output_tokens: int
    most_usd: float | None


def estimate(model: LanguageModel, wanted: Sequence[tuple[str, int]]) -> CostEstimate:
    """Estimate a run without asking: four characters per input token, answers as long as allowed, nothing repeated."""
    characters = sum(len(model.system or "") + len(question) for question, _ in wanted)
    given, taken = round(characters / 4) + MESSAGE_TOKENS * len(wanted), model.max_tokens * len(wanted)
    price = price_of(model.model)
    return CostEstimate(len(wanted), given, taken, price and price.of(given, taken))


def ask(model: LanguageModel, network: Network, wanted: Sequence[tuple[str, int]], log: AnswerLog, label: str) -> None:
    """Ask for every (question, sample) and store each answer in `log` the moment it arrives.

    A request is repeated after a transport error, after HTTP 408, 409, 425, 429 and 5xx, and where the body holds no answer or
    an empty one. An answer that was refused, filtered or cut is stored, because it was paid for; its finish_reason says so.
    Raises LanguageModelError when the server refuses (401, 403, 404, other 4xx) or keeps failing, BudgetExhausted, CannotWrite,
    InvalidParameter. Whatever was answered until then is stored.
    """
    from anyio.from_thread import start_blocking_portal

    from textguard.text.connection import make_client  # takes a second to load

    secret = _secret()
    price = price_of(model.model)
    if network.max_usd is not None and price is None:
        raise InvalidParameter(
            f"network.max_usd is {network.max_usd}, but {PRICES} has no price for model {model.model!r}; "
            "add it there, or set params.yaml network.max_usd to null"
        )
    blot = blotter(secret)
    client = make_client(model.base_url, network.timeout_s, secret, blot)
    # Requests run in an event loop, because only there a deadline ends one whatever it is waiting for.
    with blotted_logs(blot), start_blocking_portal() as portal, portal.wrap_async_context_manager(client):
        asker = _Asker(model, network, log, client, portal, blot, _Budget(network, price))
        try:
            asker.ask_all(wanted, label)
        finally:
            print(f"{label}: {asker.summary(len(wanted))}", file=sys.stderr, flush=True)


def _secret() -> str:
    secret = os.environ.get(KEY_VARIABLE, "").strip()
    if not secret:
        raise InvalidParameter(f"{KEY_VARIABLE} is not set in the environment; servers that ask for no key take any word")
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        raise InvalidParameter(f"{KEY_VARIABLE} in the environment holds blanks or characters that no key has")
    return secret


class _Budget:
    """Counts requests and dollars. A request starts only if both limits hold even when all requests under way cost the most."""

    def __init__(self, network: Network, price: Price | None) -> None:
        self._network, self.price = network, price
        self._changed = threading.Condition()
        self._under_way: list[float] = []
        self.requests = self.input_tokens = self.output_tokens = 0
        self.usd = 0.0

    @contextmanager
    def request(self, input_tokens: int, output_tokens: int) -> Iterator["_Bill"]:
        """Reserve what a request can cost at most, and settle it afterwards. Raises BudgetExhausted."""
        bill = _Bill(input_tokens, output_tokens)
        most = self._cost(bill)
        remedy = "all answers are stored; raise it in params.yaml, or run it again, to go on"
        with self._changed:
            while self._exceeds(most) and self._under_way:
                self._changed.wait()
            if self._exceeds(most):
                raise BudgetExhausted(
                    f"network.max_usd = {self._network.max_usd} is used up ({self.usd:.4f} USD spent); {remedy}"
                )
            if self._network.max_requests is not None and self.requests >= self._network.max_requests:
                raise BudgetExhausted(f"network.max_requests = {self._network.max_requests} is used up; {remedy}")
            self.requests += 1
            self._under_way.append(most)
        try:
            yield bill
        finally:
            with self._changed:
                self._under_way.remove(most)
                self.input_tokens += bill.input_tokens
                self.output_tokens += bill.output_tokens
                self.usd += self._cost(bill)
                self._changed.notify_all()

    def _cost(self, bill: "_Bill") -> float:
        return self.price.of(bill.input_tokens, bill.output_tokens) if self.price else 0.0

    def _exceeds(self, most: float) -> bool:
        limit = self._network.max_usd
        return limit is not None and self.usd + sum(self._under_way) + most > limit


@dataclass
class _Bill:
    """The tokens of one request: the most that it can need, until its answer or its failure says how many they were."""

    input_tokens: int
    output_tokens: int

    def is_free(self) -> None:
        self.input_tokens = self.output_tokens = 0


class _LimitRenamed(Exception):
    """The server calls max_tokens max_completion_tokens, as do all requests from now on."""


class _Passing(Exception):
    """An attempt failed, and the next one may succeed. wait_s: how long the server asks to wait."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _Asker:
    """The threads' common state."""

    def __init__(
        self,
        model: LanguageModel,
        network: Network,
        log: AnswerLog,
        client: "openai.AsyncOpenAI",
        portal: "BlockingPortal",
        blot: Callable[[str], str],
        budget: _Budget,
    ) -> None:
        self._model, self._network, self._log, self._budget = model, network, log, budget
        self._client, self._portal, self._blot = client, portal, blot
        self._limit_renamed = False
        self._stop = threading.Event()
        self._resume_at = 0.0  # on time.monotonic(): a rate limit holds for all threads
        self._failed_in_a_row = 0
        self._failures: list[str] = []

    def ask_all(self, wanted: Sequence[tuple[str, int]], label: str) -> None:
        from textguard.runtime import progress

        with (
            ThreadPoolExecutor(self._network.concurrency) as threads,
            progress(total=len(wanted), label=label, unit="answers") as bar,
        ):
            futures = [threads.submit(self._answer, question, sample) for question, sample in wanted]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.set_postfix_str(f"{self._budget.requests} requests", refresh=False)
                    bar.update()
            except BaseException as error:
                self._stop.set()
                threads.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, KeyboardInterrupt):
                    print(f"{label}: waiting for the answers that are under way", file=sys.stderr, flush=True)
                raise
        if self._failures:
            raise LanguageModelError(
                f"{len(self._failures)} of {len(wanted)} answers did not come in {self._network.attempts} attempts each "
                f"(the first: {self._failures[0]}); the others are stored in {self._log.path}; run it again to ask for the rest"
            )

    def summary(self, wanted: int) -> str:
        budget = self._budget
        cost = f", {budget.usd:.4f} USD" if budget.price else ""
        return (
            f"{self._log.appended} of {wanted} answers stored for {budget.requests} requests, "
            f"{budget.input_tokens} + {budget.output_tokens} tokens{cost}"
        )

    def _answer(self, question: str, sample: int) -> None:
        try:
            self._attempt(question, sample)
        except BaseException:
            self._stop.set()  # here, not when the main thread sees it: the other threads would go on asking until then
            raise

    def _attempt(self, question: str, sample: int) -> None:
        """One answer, with all the attempts that it takes."""
        attempt = 0
        while attempt < self._network.attempts:
            self._stop.wait(max(0.0, self._resume_at - time.monotonic()))
            if self._stop.is_set():
                return
            try:
                self._request(question, sample)
            except _LimitRenamed:
                continue
            except _Passing as failure:
                reason = f"{question!r}: {failure}"
                if failure.wait_s > LONGEST_WAIT_S:
                    message = f"{self._model.base_url} asks to wait {failure.wait_s:.0f} s ({failure}); run it again then"
                    raise LanguageModelError(message) from None
                self._resume_at = max(self._resume_at, time.monotonic() + failure.wait_s)
                longest = min(LONGEST_BACKOFF_S, self._network.backoff_s * 2**attempt)
                self._stop.wait(random.uniform(0, longest))  # at random, so that the threads do not all come back at once
                attempt += 1
            else:
                self._failed_in_a_row = 0
                return
        self._failures.append(reason)
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= FAILURES_IN_A_ROW:
            raise LanguageModelError(
                f"{self._model.base_url} failed {FAILURES_IN_A_ROW} questions in a row, {self._network.attempts} attempts each "
                f"(the last: {reason}); run it again to go on"
            )

    def _request(self, question: str, sample: int) -> None:
        """One attempt. Stores the answer. Raises _Passing, _LimitRenamed, LanguageModelError, BudgetExhausted, CannotWrite."""
        request = self._model.request()
        body = self._model.body(question, sample)
        if self._limit_renamed:
            body["max_completion_tokens"] = body.pop("max_tokens")
        with self._budget.request(self._model.most_input_tokens(question), self._model.max_tokens) as bill:
            reply = self._send(body, bill)
            if reply.text.strip() or reply.finish_reason != "stop":
                self._log.append(
                    StoredAnswer(
                        key=answer_key(question, sample, request),
                        question=question,
                        sample=sample,
                        provider=f"{self._model.model} at {self._model.base_url}",
                        request=request,
                        model=reply.model,
                        time=datetime.now(UTC).isoformat(timespec="seconds"),
                        input_tokens=reply.input_tokens,
                        output_tokens=reply.output_tokens,
                        finish_reason=reply.finish_reason,
                        answer=reply.text,
                    )
                )
            bill.input_tokens = bill.input_tokens if reply.input_tokens is None else reply.input_tokens
            bill.output_tokens = bill.output_tokens if reply.output_tokens is None else reply.output_tokens
        if not reply.text.strip() and reply.finish_reason == "stop":
            raise _Passing("the answer is empty")

    def _send(self, body: dict[str, Any], bill: _Bill) -> "_Reply":
        import openai

        from textguard.text.connection import UnwantedReply

        # The client's exceptions hold the request, and with it the key. Ours must not refer to them: so they are only made
        # here, and raised below, outside the handlers.
        failure = refusal = None
        try:
            return self._read(self._portal.call(self._post, body))
        except openai.APIStatusError as error:
            refusal = _refusal(error.status_code, error.body, _wait_s(error.response.headers))
        except _ErrorInReply as error:
            refusal = error.refusal
        except UnwantedReply as error:
            failure = self._unwanted(error)
        except TimeoutError:
            failure = _Passing(f"no whole answer came within {self._longest_s:g} s")
        except openai.OpenAIError as error:
            # Nobody knows whether the server answered and bills the request: what was reserved counts as spent.
            cause = error.__cause__ or error
            failure = _Passing(self._words(f"{type(cause).__name__}: {cause}"))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            failure = _Passing(self._words(f"the answer cannot be read ({type(error).__name__}: {error})"))
        if refusal:
            bill.is_free()
            if refusal.code == "content_filter":  # some servers filter with an error, others with a finish reason
                return _Reply("", self._model.model, "content_filter", None, None)
            failure = self._refused(refusal, body)
        raise failure

    @property
    def _longest_s(self) -> float:
        return LONGEST_REQUEST * self._network.timeout_s

    async def _post(self, body: dict[str, Any]) -> bytes:
        import anyio

        create = operator.attrgetter(self._model.endpoint)(self._client).with_raw_response.create
        with anyio.fail_after(self._longest_s):
            return (await create(**body)).content

    async def _list_models(self) -> bytes:
        import anyio

        with anyio.fail_after(self._longest_s):
            return (await self._client.models.with_raw_response.list()).content

    def _read(self, content: bytes) -> "_Reply":
        # A number of thousands of digits, which int() refuses, must not cost the answer beside it.
        parsed = json.loads(content.decode(), parse_int=lambda digits: int(digits) if len(digits) < 20 else math.inf)
        reply = READERS[self._model.endpoint](_without_error(parsed))
        reply.text.encode()  # JSON can hold half of a surrogate pair, which cannot be written to a file
        model = parsed.get("model")
        return replace(
            reply,
            text=self._blot(reply.text),
            # Some servers do not say which model answered: then it is the one that was asked.
            model=self._words(model) if isinstance(model, str) and model else self._model.model,
            finish_reason=self._words(reply.finish_reason),
        )

    def _unwanted(self, reply: "UnwantedReply") -> Exception:
        said, url = self._words(str(reply)), self._model.base_url
        if not reply.elsewhere:
            return _Passing(said)
        return LanguageModelError(
            f"{url} sends the request elsewhere ({said}); nothing was sent there; "
            "change params.yaml texts.*.model.base_url to the address that is meant"
        )

    def _refused(self, refusal: "_Refusal", body: dict[str, Any]) -> Exception:
        """What an error of the server means: _Passing, _LimitRenamed or LanguageModelError."""
        status, url = refusal.status, self._model.base_url
        said = self._words(f"{status}: {refusal.message}")
        if "max_completion_tokens" in refusal.message and "max_tokens" in body and status in (400, 422):
            self._limit_renamed = True
            return _LimitRenamed()
        if status == 429 and refusal.code == "insufficient_quota":
            return LanguageModelError(f"the account at {url} has no credit left ({said}); nothing more was asked")
        if status in PASSING or status >= 500:
            return _Passing(said, refusal.wait_s)
        if status in (401, 403):
            return LanguageModelError(f"{url} does not accept the key ({said}); change {KEY_VARIABLE} in the environment")
        if status == 404:
            return LanguageModelError(f"{self._not_found()} ({said}); change params.yaml texts.*.model")
        return LanguageModelError(f"{url} refuses the request ({said}); change params.yaml texts.*.model")

    def _not_found(self) -> str:
        """Which models to use instead: those that the server lists, the most similar ones first."""
        import openai

        from textguard.text.connection import UnwantedReply

        wanted, url = self._model.model, self._model.base_url
        try:
            listed = json.loads(self._portal.call(self._list_models))["data"]
            offered = [self._words(model["id"]) for model in listed[:1000]]
        except (
            openai.OpenAIError,
            UnwantedReply,
            TimeoutError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ):
            return f"{url} has no model {wanted!r} or no endpoint {self._model.endpoint!r}, and does not list its models"
        if wanted in offered:
            return f"{url} has the model {wanted!r}, but no endpoint {self._model.endpoint!r} for it"
        alike = difflib.get_close_matches(wanted, offered, n=5, cutoff=0.0)
        names = list(dict.fromkeys([*alike, *offered]))[:10]
        return f"{url} has no model {wanted!r} (any more); it offers {', '.join(names) or 'none'}"

    def _words(self, text: str) -> str:
        """What a server says, without control characters and the key, which is blotted out before anything is cut."""
        return printable(self._blot(text))


@dataclass(frozen=True)
class _Refusal:
    """An error that a server reports: as a status, or as an object in a reply. message: its words, in which the key may be."""

    status: int
    code: str
    message: str
    wait_s: float


class _ErrorInReply(Exception):
    """A reply with status 200 that holds an error in place of an answer."""

    def __init__(self, refusal: _Refusal) -> None:
        super().__init__()
        self.refusal = refusal


def _refusal(status: int, error: Any, wait_s: float = 0.0) -> _Refusal:
    """What a server says of an error. error: its JSON, of any kind: OpenAI's fields, FastAPI's `detail`, a text, nothing."""
    fields = error if isinstance(error, dict) else {}
    code = next((str(fields[name]) for name in ("code", "type") if fields.get(name)), "")
    said = fields.get("message") or fields.get("detail") or error or "no reason given"
    if isinstance(said, list) and all(isinstance(one, dict) and "msg" in one for one in said):  # as FastAPI lists problems
        said = "; ".join(f"{'.'.join(map(str, one.get('loc') or ()))}: {one['msg']}" for one in said)
    return _Refusal(status, code, said if isinstance(said, str) else json.dumps(said, ensure_ascii=False), wait_s)


def _without_error(reply: Any) -> dict[str, Any]:
    """A reply that holds an answer. Raises _ErrorInReply, with the status that the error names, or 500."""
    first = next(iter(reply.get("choices") or []), {})
    error = reply.get("error") or first.get("error")
    if error:
        refusal = _refusal(500, error)
        named = str(error.get("status") or refusal.code) if isinstance(error, dict) else ""
        status = int(named) if re.fullmatch("[45][0-9][0-9]", named) else STATUSES.get(named, 500)
        raise _ErrorInReply(replace(refusal, status=status))
    return reply


def _wait_s(headers: Mapping[str, str]) -> float:
    """The seconds that a Retry-After header asks for, as a number or as a date; 0 without one that can be read."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        wanted = headers.get("retry-after", "0")
        if wanted.replace(".", "", 1).isdecimal():
            return float(wanted)
        return max(0.0, (parsedate_to_datetime(wanted) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError, OverflowError):
        return 0.0


@dataclass(frozen=True)
class _Reply:
    text: str
    model: str
    finish_reason: str
    input_tokens: int | None
    output_tokens: int | None


def _text(value: Any) -> str:
    """An answer's text, or that of its parts; parts that are none (a model's reasoning) are left out."""
    if isinstance(value, list):
        return "".join(_text(part.get("text") if isinstance(part, dict) else part) for part in value if _is_text(part))
    if not isinstance(value, str):
        raise TypeError(f"a text is of type {type(value).__name__}")  # which may hold the key: it is not shown
    return value


def _is_text(part: Any) -> bool:
    return not isinstance(part, dict) or part.get("type", "text") in ("text", "output_text")


def _finished(reason: Any) -> str:
    return reason if isinstance(reason, str) and reason else "stop"


def _tokens(reply: Mapping[str, Any], *names: str) -> tuple[int | None, ...]:
    """Counts of tokens, None where there is none that can be believed: what was reserved counts as spent then."""
    usage = reply.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in names]
    return tuple(count if type(count) is int and 0 <= count <= MOST_TOKENS else None for count in counts)


def _read_chat(reply: dict[str, Any]) -> _Reply:
    choice = reply["choices"][0]
    text, refusal = choice["message"].get("content"), choice["message"].get("refusal")
    finished = "refusal" if refusal else _finished(choice.get("finish_reason"))
    return _Reply(_text(refusal or text or ""), "", finished, *_tokens(reply, "prompt_tokens", "completion_tokens"))


def _read_completion(reply: dict[str, Any]) -> _Reply:
    choice = reply["choices"][0]
    tokens = _tokens(reply, "prompt_tokens", "completion_tokens")
    return _Reply(_text(choice["text"]), "", _finished(choice.get("finish_reason")), *tokens)


def _read_response(reply: dict[str, Any]) -> _Reply:
    parts = [part for item in reply["output"] if item["type"] == "message" for part in item["content"]]
    refusals = [_text(part["refusal"]) for part in parts if part["type"] == "refusal"]
    texts = refusals or [_text(part["text"]) for part in parts if part["type"] == "output_text"]
    if reply.get("status") not in ("completed", "incomplete"):
        raise ValueError("its status is neither 'completed' nor 'incomplete'")
    reason = _finished((reply.get("incomplete_details") or {}).get("reason"))
    finished = "refusal" if refusals else {"max_output_tokens": "length"}.get(reason, reason)
    return _Reply("".join(texts), "", finished, *_tokens(reply, "input_tokens", "output_tokens"))


READERS: dict[str, Callable[[dict[str, Any]], _Reply]] = {
    "responses": _read_response,
    "chat.completions": _read_chat,
    "completions": _read_completion,
}
