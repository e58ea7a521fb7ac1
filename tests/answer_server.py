"""A language model's server on loopback that fails as real ones do, and how tests ask it."""

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from textguard.text.language_models import LanguageModel, Network
from textguard.text.questions import PLAIN
from textguard.text.questions import ask as fill
from textguard.text.responses import Sources

SECRET = "sk-test-7Qp3/and+more=="
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
        self.secret = SECRET

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
        if self.headers["Authorization"] != f"Bearer {self.server.secret}":
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

    def write(self, *parts: bytes, every_s: float = 0.0) -> None:
        """Send raw bytes, whether they are HTTP or not, and close the connection."""
        self.close_connection = True
        for part in parts:
            self.wfile.write(part)
            self.wfile.flush()
            time.sleep(every_s)

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def slow(handler: Handler) -> None:
    """Keep a request waiting for longer than a test's client does."""
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


def model(server: Server, **changes: Any) -> LanguageModel:
    """The model behind a server, with some settings changed."""
    settings = {"system": None, "temperature": 0.7, "max_tokens": 40, "stop": [], "seed": None}
    return LanguageModel(**{"endpoint": "chat.completions", "base_url": server.url, "model": "small-2", **settings, **changes})


def sources(server: Server, folder: Path, *, samples: int = 1, network: Network = FAST, **changes: Any) -> Sources:
    """Answers from the server alone, kept in a folder."""
    return Sources(samples, [], model(server, **changes), network, folder / "live" / "answers.jsonl", "test")


def questions(count: int) -> list:
    """A question for each of so many classes."""
    return fill([f"class {number}" for number in range(count)], ["What is {class}?"], PLAIN, "here")


def leaks(folder: Path) -> list[Path]:
    """The files that hold the key."""
    return [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
