"""The client that asks a server: once, nobody else, not for ever, and without more of a reply than an answer can have."""

import ipaddress
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

import httpx2
import openai

from textguard.errors import InvalidParameter, printable
from textguard.text.secret import KEY_VARIABLE, is_secret

LARGEST_BODY = 8 * 2**20  # bytes
NEAR = (".localhost", ".local", ".lan", ".internal", ".home.arpa")  # ends of names that only a local network knows


class UnwantedReply(Exception):
    """A reply that is not read. elsewhere: it sends the request to another address."""

    def __init__(self, reason: str, elsewhere: bool = False) -> None:
        super().__init__(reason)
        self.elsewhere = elsewhere


def make_client(base_url: str, timeout_s: float, secret: str, blot: Callable[[str], str]) -> openai.AsyncOpenAI:
    """A client for one server.

    blot: takes the secret out of a text. Raises InvalidParameter for a key that others could read on its way, and for proxies
    and certificates of the environment that cannot be used. Requests raise UnwantedReply beside the client's own errors.
    """
    encrypted = base_url.startswith("https:")
    if is_secret(secret) and not encrypted and not _is_near(base_url):
        raise InvalidParameter(
            f"{base_url} is not encrypted and no local server, so that others could read {KEY_VARIABLE}; use https:// in "
            f"params.yaml texts.*.model.base_url, or set {KEY_VARIABLE} to a word such as 'none' if the server asks for no key"
        )
    try:
        return openai.AsyncOpenAI(
            api_key=secret,
            base_url=base_url,
            timeout=timeout_s,
            max_retries=0,  # the client's own retries would ask, and pay, behind the budget's back
            default_headers={"Accept-Encoding": "identity"},  # a few compressed bytes can become more than the memory holds
            http_client=openai.DefaultAsyncHttpxClient(
                timeout=timeout_s,
                follow_redirects=False,
                event_hooks={"response": [_guard]},
                trust_env=encrypted or not is_secret(secret),  # a proxy would read a key that is not encrypted
            ),
        )
    except Exception as error:  # whatever the client makes of the address and the environment
        reason = printable(blot(f"{type(error).__name__}: {error}"))
    raise InvalidParameter(
        f"{base_url} cannot be asked ({reason}); change params.yaml texts.*.model.base_url, or the proxy (ALL_PROXY, "
        "HTTPS_PROXY, HTTP_PROXY) or certificates (SSL_CERT_FILE, SSL_CERT_DIR) that the environment names"
    )


def _is_near(base_url: str) -> bool:
    """Whether a server is this machine or one of a local network, by its name or address."""
    host = (urlsplit(base_url).hostname or "").rstrip(".")
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith(NEAR)


async def _guard(response: httpx2.Response) -> None:
    if 300 <= response.status_code < 400:
        location = response.headers.get("location", "no address")
        raise UnwantedReply(f"{response.status_code} to {location}", elsewhere=True)
    encoding = response.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnwantedReply(f"the reply is compressed ({encoding}), which was not asked for")
    response.stream = _Limited(response.stream)


class _Limited(httpx2.AsyncByteStream):
    """A reply's body that ends with UnwantedReply where it is larger than LARGEST_BODY."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._stream:
            size += len(part)
            if size > LARGEST_BODY:
                raise UnwantedReply(f"the reply is larger than {LARGEST_BODY // 2**20} MiB")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()
