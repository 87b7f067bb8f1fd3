"""A Hub that fails, lies or never ends: calls stay bounded, retry, and raise specific errors."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.errors import HubError, MezzotintError, NotACheckpoint
from mezzotint.hub import HubPath, http, hub_path, list_files
from mezzotint.hub.errors import SHOWN, printable
from mezzotint.hub.http import RETRY_SECONDS
from support.hub_server import COMMIT, Fault, Hub, cut, endless, gzip_bomb, serving, status, trickle

NAME = "makers/small"
CONTENT = bytes(range(256)) * 1024
CALLS = ["list", "range", "download"]
HEAD = {"ETag": '"0"', "X_Repo_Commit": COMMIT}


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between attempts, which take no time here."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> Iterator[Hub]:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "file.bin").write_bytes(CONTENT)
    with serving({NAME: folder}) as server:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server
    for thread in threading.enumerate():
        if thread.name == http.THREAD:
            thread.join(10)
    huggingface_hub.close_session()


@pytest.fixture
def file(hub: Hub) -> HubPath:
    repository = hub_path(NAME)
    assert isinstance(repository, HubPath)
    return repository / "file.bin"


def perform(call: str, file: HubPath) -> bytes:
    """Return the file's bytes, which each call finds or checks in its own way."""
    if call == "list":
        assert list_files(NAME, "main").files == file.repo.files
        return CONTENT
    if call == "range":
        with file.open() as stream:
            return stream.read(len(CONTENT))
    return file.fetch().read_bytes()


def break_server(hub: Hub, call: str, fault: Fault, persistent: bool) -> None:
    hub.faults["list" if call == "list" else "GET"].append(fault)
    hub.persistent = persistent


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_one_failure_is_retried(
    hub: Hub, file: HubPath, slept: list[float], call: str, code: int
) -> None:
    break_server(hub, call, status(code), persistent=False)
    assert perform(call, file) == CONTENT
    assert slept


@pytest.mark.parametrize("call", CALLS)
def test_one_cut_body_is_retried(hub: Hub, file: HubPath, slept: list[float], call: str) -> None:
    break_server(hub, call, cut, persistent=False)
    assert perform(call, file) == CONTENT
    assert slept


@pytest.mark.parametrize("date", [False, True])
@pytest.mark.parametrize("call", ["list", "range"])
def test_retry_after_is_waited_for(
    hub: Hub, file: HubPath, slept: list[float], call: str, date: bool
) -> None:
    retry_after = formatdate(time.time() + 20, usegmt=True) if date else "20"
    break_server(hub, call, status(429, Retry_After=retry_after), persistent=False)
    assert perform(call, file) == CONTENT
    assert max(RETRY_SECONDS) < max(slept) <= 20


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("headers", [{"Retry_After": "999999"}, {"RateLimit": '"api";r=0;t=86400'}])
def test_a_retry_after_beyond_the_limit_is_not_waited_for(
    hub: Hub, file: HubPath, slept: list[float], call: str, headers: dict[str, str]
) -> None:
    break_server(hub, call, status(429, **headers), persistent=True)
    with pytest.raises(HubError, match="answers 429 and asks to wait"):
        perform(call, file)
    assert not slept


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (status(500), "answers 500 Internal Server Error"),
        (status(503), "answers 503 Service Unavailable"),
        (status(429), "limits the rate of requests"),
        (status(599), "answers 599"),
        (status(418), "answers 418"),
        (cut, "was truncated"),
        (lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n"), "is not HTTP"),
        (endless(200), "more than the .* bytes asked for|does not support range requests"),
        (endless(206), "more than the .* bytes asked for"),
        (endless(302, Location="/elsewhere"), "more than the 65,536 bytes asked for"),
        (endless(500), "answers 500"),
        (gzip_bomb, "compresses its response"),
        (status(302, Location="file:///etc/passwd"), "redirects to an unsupported address"),
        (status(302, Location="http://["), "response|cannot be reached"),
    ],
)
def test_a_failure_that_stays_is_named(
    hub: Hub, file: HubPath, call: str, fault: Fault, message: str
) -> None:
    break_server(hub, call, fault, persistent=True)
    with pytest.raises((HubError, NotACheckpoint), match=message) as raised:
        perform(call, file)
    assert "the Hub says: no such" not in raised.value.message


@pytest.mark.parametrize("code", [500, 503, 429])
def test_a_failing_head_request_is_named(hub: Hub, file: HubPath, code: int) -> None:
    hub.faults["HEAD"], hub.persistent = [status(code)], True
    with pytest.raises(HubError, match="429" if code == 429 else f"answers {code}"):
        file.fetch()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"HTTP/1.1 206 OK\r\nX-Slow: ",
        b"HTTP/1.1 206 OK\r\n\r\n",
        b"HTTP/1.1 500 OK\r\nX-Slow: ",
    ],
    ids=["status line", "headers", "body", "headers of an error"],
)
def test_an_answer_that_never_ends_is_given_up(
    hub: Hub, file: HubPath, monkeypatch: pytest.MonkeyPatch, call: str, start: bytes
) -> None:
    monkeypatch.setattr(http, "TOTAL_SECONDS", 0.1)
    monkeypatch.setattr(http, "BYTES_PER_SECOND", 10**9)
    break_server(hub, call, trickle(start), persistent=True)
    with pytest.raises(HubError, match="did not finish its response in time"):
        perform(call, file)


def test_a_silent_server_is_given_up(
    hub: Hub, file: HubPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "READ_SECONDS", 0.02)
    break_server(hub, "range", lambda handler: handler.rfile.read(1) and None, persistent=True)
    with pytest.raises(HubError, match="did not answer in time"):
        perform("range", file)


def test_another_range_than_asked_for_is_refused(hub: Hub, file: HubPath) -> None:
    answer = status(206, CONTENT[:10], Content_Range=f"bytes 5-14/{len(CONTENT)}")
    break_server(hub, "range", answer, persistent=True)
    with file.open(read_ahead=0) as stream, pytest.raises(HubError, match="asked for bytes 0-9"):
        stream.read(10)


def test_a_small_file_is_read_from_a_server_that_sends_it_whole(hub: Hub, file: HubPath) -> None:
    hub.ranges = False
    with file.open(read_ahead=0) as stream:
        assert stream.read(len(CONTENT)) == CONTENT


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("code", [400, 401, 403, 404, 500])
def test_what_a_server_says_is_escaped_and_short(
    hub: Hub, file: HubPath, caplog: pytest.LogCaptureFixture, call: str, code: int
) -> None:
    text = "\x1b[31mred\x9b" + "long" * 5000
    headers = {
        "X_Error_Message": text,
        "X_HF_Warning": f"topic{call}{code};{text}",
        "X_Request_Id": text,
    }
    break_server(hub, call, status(code, text.encode(), **headers), persistent=True)
    with pytest.raises(MezzotintError) as raised:
        perform(call, file)
    assert len(str(raised.value)) < 500
    shown = str(raised.value) + caplog.text
    assert not {"\x1b", "\x9b", "\r"} & set(shown)
    assert "longlong" * 100 not in shown


@given(st.text())
def test_printable_has_one_bounded_line(text: str) -> None:
    assert printable(text).isprintable()
    assert len(printable(text)) <= SHOWN


@pytest.mark.parametrize(
    "listing",
    [
        b"not json",
        b"[" * 100_000,
        b"null",
        b"[]",
        b"{}",
        b'"text"',
        b"\xff\xfe",
        b"1" * 5000,
        *(
            json.dumps({"sha": COMMIT, "siblings": siblings}).encode()
            for siblings in (
                None,
                {},
                [None],
                ["file"],
                [{}],
                [{"rfilename": 1, "size": 1}],
                [{"rfilename": "a"}],
                [{"rfilename": "a", "size": None}],
                [{"rfilename": "a", "size": -1}],
                [{"rfilename": "a", "size": "1"}],
                [{"rfilename": "../a", "size": 1}],
                [{"rfilename": "/etc/passwd", "size": 1}],
                [{"rfilename": "a/../../b", "size": 1}],
                [{"rfilename": "\x1b[31m", "size": 1}],
                [{"rfilename": "a\x00", "size": 1}],
                [{"rfilename": "\ud800", "size": 1}],
                [{"rfilename": "a" * 5000, "size": 1}],
            )
        ),
        json.dumps({"sha": "../../..", "siblings": []}).encode(),
        json.dumps({"sha": None, "siblings": []}).encode(),
        json.dumps({"siblings": []}).encode(),
    ],
    ids=lambda listing: repr(listing[:30]),
)
def test_a_listing_that_lies_is_refused(hub: Hub, listing: bytes) -> None:
    break_server(hub, "list", status(200, listing), persistent=True)
    with pytest.raises(HubError, match="list of files") as raised:
        hub_path(NAME)
    assert str(raised.value).isascii()


@pytest.mark.parametrize(
    "headers",
    [
        HEAD | {"ETag": '"../../../../outside"'},
        HEAD | {"X_Linked_ETag": '"/absolute"'},
        HEAD | {"X_Repo_Commit": "../../outside"},
        {"ETag": '"0"'},
        {"X_Repo_Commit": COMMIT},
    ],
)
def test_headers_of_a_download_name_no_place_outside_the_cache(
    hub: Hub, file: HubPath, tmp_path: Path, headers: dict[str, str]
) -> None:
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    hub.faults["HEAD"], hub.persistent = [status(200, **headers)], True
    with pytest.raises(MezzotintError):
        file.fetch()
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before


def test_a_file_that_is_gone_is_no_failure_of_the_hub(
    hub: Hub, file: HubPath, tmp_path: Path
) -> None:
    (tmp_path / "small/file.bin").unlink()
    for call in ("range", "download"):
        with pytest.raises(NotACheckpoint, match="the Hub says: no such file"):
            perform(call, file)


def test_a_full_cache_is_not_blamed_on_the_hub(hub: Hub, file: HubPath, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the cache should be")
    with pytest.raises(HubError, match="cannot be written to the cache"):
        file.fetch()


def test_the_users_client_factory_is_kept(
    hub: Hub, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    factory: Callable[[], object] = huggingface_hub.utils._http.default_client_factory

    def users_factory() -> object:
        made.append(factory())
        return made[-1]

    request.addfinalizer(lambda: huggingface_hub.set_client_factory(factory))
    huggingface_hub.set_client_factory(users_factory)
    assert hub_path(NAME) is not None
    hub.faults["list"] = [endless(200)]
    with pytest.raises(HubError, match="more than"):
        hub_path(NAME)
    assert len(made) == 1


def test_other_calls_of_huggingface_hub_are_not_limited(hub: Hub, file: HubPath) -> None:
    perform("list", file)
    body = bytes(http.REDIRECT_BYTES + 1)
    hub.faults["list"] = [status(404, body, X_Error_Message="as it was")]
    response = huggingface_hub.get_session().get(f"{hub.endpoint}/api/models/{NAME}")
    assert response.content == body
