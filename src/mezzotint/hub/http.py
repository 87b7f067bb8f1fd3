"""Limits for every call to the Hugging Face Hub: bytes, time and retries.

huggingface_hub makes the requests, with its session, token and cache; `call` bounds them.
Its `http_backoff` is not used: it sleeps for as long as a server's Retry-After says, and its
downloads do not retry a 500 or a 503.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from mezzotint.errors import HubError
from mezzotint.hub.errors import (
    CHECK_ENDPOINT,
    RETRIED_STATUSES,
    TRY_LATER,
    is_transient,
    printable,
    to_mezzotint_error,
)

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

CONNECT_SECONDS = 10.0
READ_SECONDS = 20.0
"""Longest wait for the next packet."""
TOTAL_SECONDS = 60.0
"""Limit for a call with all its retries, in addition to its bytes at BYTES_PER_SECOND."""
BYTES_PER_SECOND = 100_000
RETRY_SECONDS = (0.5, 2.0, 6.0)
"""Waits before the second and later attempts, unless the server asks for longer ones."""
REDIRECT_BYTES = 64 * 1024
THREAD = "mezzotint-hub"
SHOWN_HEADERS = (
    "X-Error-Message",
    "X-HF-Warning",
    "X-Request-Id",
    "X-Amzn-Trace-Id",
    "X-Amz-Cf-Id",
    "Content-Range",
)
UNSAFE_ETAG = re.compile(r'(?!^W/")[/\\]|\.\.')


@dataclass
class Limits:
    """Limits of one call: bytes of each response body, and a deadline on time.monotonic's clock."""

    what: str
    max_bytes: int
    deadline: float
    retry_after: float = 0.0

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise self.too_slow()

    def too_slow(self) -> HubError:
        return HubError(f"{self.what}: the Hub did not finish its response in time", TRY_LATER)


_LIMITS: ContextVar[Limits | None] = ContextVar("mezzotint_hub_limits", default=None)
_INSTALLING = threading.Lock()


def call(what: str, max_bytes: int, request: Callable[[], T]) -> T:
    """Return `request()`, with limits and retries.

    The request runs on its own thread, because no socket timeout bounds a slow name server, headers
    that arrive byte by byte, or the waits of huggingface_hub.

    what        name of the file or repository, for messages
    max_bytes   size of the largest body that the request may receive
    Raises      NotACheckpoint if the Hub has no such file or denies access; HubError
    """
    _bound_every_client()
    limits = Limits(
        what, max_bytes, time.monotonic() + TOTAL_SECONDS + max_bytes / BYTES_PER_SECOND
    )
    answer: _Answer[T] = _Answer()
    arguments = (_make_request, answer, limits, request)
    threading.Thread(target=copy_context().run, args=arguments, name=THREAD, daemon=True).start()
    try:
        return answer.result(limits.deadline - time.monotonic())
    except FutureTimeout:
        raise limits.too_slow() from None
    finally:
        limits.deadline = 0.0  # makes a thread that is still reading stop at its next packet


class _Answer(Future[T]):
    """The result or error of a thread; `result` returns or raises it."""

    def __enter__(self) -> "_Answer[T]":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if error is not None:
            self.set_exception(error)
        return True


def _make_request(answer: "_Answer[T]", limits: Limits, request: Callable[[], T]) -> None:
    _LIMITS.set(limits)
    with answer:
        answer.set_result(_with_retries(limits, request))


def _with_retries(limits: Limits, request: Callable[[], T]) -> T:
    import httpx2

    for wait in (*RETRY_SECONDS, None):
        limits.check_time()
        limits.retry_after = 0.0
        try:
            return request()
        except (
            httpx2.HTTPError,
            httpx2.InvalidURL,
            httpx2.StreamError,
            OSError,
            ValueError,
            RuntimeError,
        ) as error:
            if wait is None or not is_transient(error):
                raise to_mezzotint_error(limits.what, error) from error
        time.sleep(max(wait, limits.retry_after))
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def open_stream(url: str, **headers: str) -> "Iterator[httpx2.Response]":
    """Open a GET request with the user's token, for a function that `call` runs."""
    import httpx2
    from huggingface_hub import get_session
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import hf_raise_for_status

    asked = build_hf_headers() | {"Accept-Encoding": "identity"} | headers
    timeout = httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    with get_session().stream("GET", url, headers=asked, timeout=timeout) as response:
        hf_raise_for_status(response)
        yield response


@dataclass(frozen=True)
class _BoundedClients:
    """A client factory for huggingface_hub: adds the limits of `call` to the clients of `make`."""

    make: Callable[[], "httpx2.Client"]

    def __call__(self) -> "httpx2.Client":
        client = self.make()
        client.event_hooks = {
            "request": client.event_hooks["request"],
            "response": [_bound_response, *client.event_hooks["response"]],
        }
        return client


def _bound_every_client() -> None:
    """Wrap huggingface_hub's client factory once; outside `call` clients behave as before."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    with _INSTALLING:
        make = _http._GLOBAL_CLIENT_FACTORY
        if not isinstance(make, _BoundedClients):
            set_client_factory(_BoundedClients(make))


def _bound_response(response: "httpx2.Response") -> None:
    """Apply the limits of the running `call` before huggingface_hub or httpx2 reads the body."""
    limits = _LIMITS.get()
    if limits is None:
        return
    import httpx2

    limits.check_time()
    _clean_headers(response.headers)
    if response.status_code >= 400:
        _keep_retry_after(response, limits)
        # huggingface_hub would read the whole body of an error, and quote it in its message.
        response.stream.close()  # type: ignore[union-attr]
        response.stream = httpx2.ByteStream(b"")
        response.headers.pop("Content-Encoding", None)
    elif response.request.method != "HEAD":
        _bound_body(response, limits)
    elif UNSAFE_ETAG.search(
        response.headers.get("X-Linked-ETag") or response.headers.get("ETag") or ""
    ):
        # huggingface_hub uses the ETag as the name of the cached file.
        raise HubError(f"{limits.what}: the Hub's ETag is not a valid file name", CHECK_ENDPOINT)


def _bound_body(response: "httpx2.Response", limits: Limits) -> None:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() not in {"identity", ""}:
        # Requests ask for "identity", because a compressed body can exceed any limit when decoded.
        raise HubError(
            f"{limits.what}: the Hub compresses its response ({printable(encoding, 20)})",
            CHECK_ENDPOINT,
        )
    max_bytes = REDIRECT_BYTES if response.status_code >= 300 else limits.max_bytes
    response.stream = _bounded_stream(response.stream, limits, max_bytes)


def _bounded_stream(stream: Any, limits: Limits, max_bytes: int) -> "httpx2.SyncByteStream":
    import httpx2

    class BoundedStream(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            received = 0
            for chunk in stream:
                received += len(chunk)
                if received > max_bytes:
                    raise HubError(
                        f"{limits.what}: the Hub sends more than the {max_bytes:,} bytes asked for",
                        CHECK_ENDPOINT,
                    )
                limits.check_time()
                yield chunk

        def close(self) -> None:
            stream.close()

    return BoundedStream()


def _clean_headers(headers: "httpx2.Headers") -> None:
    """Escape and shorten the headers that huggingface_hub prints or quotes."""
    for name in SHOWN_HEADERS:
        if name in headers:
            headers[name] = printable(headers[name])


def _keep_retry_after(response: "httpx2.Response", limits: Limits) -> None:
    """Record how long the server asks to wait.

    Raises   HubError if that is longer than the call may take
    """
    asked = max(
        _retry_after(response.headers.get("Retry-After", "")), _reset_after(response.headers)
    )
    if response.status_code in RETRIED_STATUSES and time.monotonic() + asked > limits.deadline:
        raise HubError(
            f"{limits.what}: the Hub answers {response.status_code} "
            f"and asks to wait {asked:,.0f} seconds",
            TRY_LATER,
        )
    limits.retry_after = asked


def _retry_after(value: str) -> float:
    """Return the seconds of a Retry-After header, which holds seconds or a date; 0 if invalid."""
    if re.fullmatch(r"\d{1,9}", value.strip(), re.ASCII):
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError, IndexError, TypeError):
        return 0.0


def _reset_after(headers: "httpx2.Headers") -> float:
    """Return the seconds until the Hub's rate limit is reset; 0 if it is not exceeded."""
    from huggingface_hub.utils._http import parse_ratelimit_headers

    try:
        limit = parse_ratelimit_headers(headers)
    except ValueError:
        return 0.0
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else 0.0
