"""Convert errors of calls to the Hugging Face Hub to errors of Mezzotint."""

from http import HTTPStatus
from typing import TYPE_CHECKING

from mezzotint.errors import HubError, MezzotintError, NotACheckpoint

if TYPE_CHECKING:
    import httpx2

RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
SHOWN = 200
"""Characters of a server's text that a message quotes."""
CHECK_ENDPOINT = "if HF_ENDPOINT is set, check that it names a Hub; otherwise try again."
TRY_LATER = "try again later; to use only the cache, set HF_HUB_OFFLINE=1."
CHECK_NAME = (
    "check the name; for a private repository, set HF_TOKEN; "
    "to use only the cache, set HF_HUB_OFFLINE=1."
)


def is_transient(error: Exception) -> bool:
    """Return whether the same request may succeed a moment later.

    An unreachable host is not transient, so that a mistyped path fails fast.
    """
    import httpx2

    if (status := _status(error)) is not None:
        return status in RETRIED_STATUSES
    transient = (
        httpx2.ReadTimeout,
        httpx2.ReadError,
        httpx2.WriteError,
        httpx2.RemoteProtocolError,
    )
    return isinstance(error, transient) or "Consistency check failed" in str(error)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error response, or None without a response."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    return (
        error.response.status_code
        if isinstance(error, (httpx2.HTTPStatusError, HfHubHTTPError))
        else None
    )


def to_mezzotint_error(what: str, error: BaseException) -> MezzotintError:
    """Return the MezzotintError for an error of huggingface_hub or httpx2.

    what   name of the file or repository
    """
    import httpx2
    from huggingface_hub.errors import HFValidationError

    # huggingface_hub wraps some errors in "cannot find the file in the cache".
    if not isinstance(error, httpx2.HTTPError) and isinstance(
        error.__cause__, (httpx2.HTTPError, OSError)
    ):
        error = error.__cause__
    if isinstance(error, HFValidationError):
        return NotACheckpoint(
            f"{what}: no such local file or folder, and not a valid name on the Hub", CHECK_NAME
        )
    if (status := _status(error)) is not None:
        return _status_error(what, status, error)
    if isinstance(error, httpx2.TransportError):
        return _transport_error(what, error)
    if isinstance(error, OSError) and error.errno is not None:
        return HubError(
            f"{what}: cannot be written to the cache: {printable(error.strerror or str(error))}",
            "free space there, or set HF_HOME to another folder.",
        )
    return HubError(
        f"{what}: the Hub's response is invalid: {printable(str(error))}", CHECK_ENDPOINT
    )


def _status_error(what: str, status: int, error: BaseException) -> MezzotintError:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return NotACheckpoint(
            f"{what}: is gated on the Hub", "ask for access there, and set HF_TOKEN."
        )
    if status == 429:
        return HubError(
            f"{what}: the Hub limits the rate of requests (429 Too Many Requests)", TRY_LATER
        )
    said = printable(getattr(error, "server_message", None) or "")
    for kind, meaning in (
        (RepositoryNotFoundError, "no such repository, or no access to it"),
        (RevisionNotFoundError, "no such revision"),
        (EntryNotFoundError, "no such file"),
    ):
        if isinstance(error, kind):
            said = f"{meaning} ({said})" if said else meaning
            return NotACheckpoint(
                f"{what}: no such local file or folder, and the Hub says: {said}", CHECK_NAME
            )
    known = {entry.value: f" {entry.phrase}" for entry in HTTPStatus}
    answer = f"the Hub answers {status}{known.get(status, '')}"
    answer += f": {said}" if said else ""
    if status in {401, 403, 404, 410, 451}:
        return NotACheckpoint(f"{what}: {answer}", CHECK_NAME)
    return HubError(
        f"{what}: {answer}", TRY_LATER if status in RETRIED_STATUSES else CHECK_ENDPOINT
    )


def _transport_error(what: str, error: "httpx2.TransportError") -> HubError:
    import httpx2

    said = printable(str(error)) or type(error).__name__
    if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError)):
        return HubError(
            f"{what}: no such local file or folder, and the Hub cannot be reached: {said}",
            "check the path and the network; to use only the cache, set HF_HUB_OFFLINE=1.",
        )
    if isinstance(error, httpx2.TimeoutException):
        return HubError(f"{what}: the Hub did not answer in time", TRY_LATER)
    if isinstance(error, httpx2.UnsupportedProtocol):
        return HubError(
            f"{what}: the Hub redirects to an unsupported address: {said}", CHECK_ENDPOINT
        )
    return HubError(
        f"{what}: the Hub's response was truncated or is not HTTP: {said}", CHECK_ENDPOINT
    )


def printable(text: str, most: int = SHOWN) -> str:
    """Return a server's text, escaped, as one line of at most `most` characters."""
    line = " ".join(text[: 8 * most].split())
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return escaped if len(escaped) <= most else f"{escaped[: most - 3]}..."
