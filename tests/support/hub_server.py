"""A local Hub: the endpoints that huggingface_hub uses, over folders, counting the bytes served."""

import gzip
import json
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


BLOCK = 2**20


class Hub(ThreadingHTTPServer):
    """Serves {repository: folder} under 127.0.0.1.

    served   {(repository, file): bytes}
    ranges   whether range requests are supported; `sent` lists (file, start, end) of all responses
    tokens   the authorization headers received
    faults   {"list", "HEAD" or "GET": responses to the next such requests instead of the right
             ones}; with `persistent`, the last one is repeated
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path], ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.ranges = repositories, ranges
        self.sent: list[tuple[Path, int, int]] = []
        self.served: Counter[tuple[str, str]] = Counter()
        self.tokens: set[str | None] = set()
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.persistent = False
        self.stopped = threading.Event()

    def next_fault(self, kind: str) -> "Fault | None":
        waiting = self.faults[kind]
        return None if not waiting else waiting[0] if self.persistent else waiting.pop(0)

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that hang up."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        kind = "list" if path.startswith("/api/") else self.command
        if fault := self.server.next_fault(kind):
            self.close_connection = True
            return fault(self)
        if listing := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self.list(listing[1], listing[2])
        elif file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.send_file(file[1], file[3], body)
        else:
            self.refuse("EntryNotFound")
        return None

    def list(self, repository: str, revision: str) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        folder = self.server.repositories.get(repository)
        if folder is None or revision not in {"main", COMMIT}:
            return self.refuse("RepoNotFound" if folder is None else "RevisionNotFound")
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        siblings = [
            {"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size}
            for path in files
        ]
        text = json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
        return None

    def send_file(self, repository: str, name: str, body: bool) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        file = self.server.repositories[repository] / name
        if not file.is_file():
            return self.refuse("EntryNotFound")
        size = file.stat().st_size
        start, end = 0, size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            start, end = int(asked[1]), min(int(asked[2]) + 1, size)
        partial = end - start < size
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        for key, value in {
            "Content-Length": end - start,
            "ETag": f'"{abs(hash((name, size))):040x}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if body:
            with file.open("rb") as stream:
                stream.seek(start)
                for position in range(start, end, BLOCK):
                    self.wfile.write(stream.read(min(BLOCK, end - position)))
            self.server.served[repository, name] += end - start
            self.server.sent.append((file, start, end))
        return None

    def refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


Fault = Callable[[Handler], None]
"""Answers a request in its own way."""


def status(code: int, body: bytes = b"", **headers: str) -> Fault:
    def answer(handler: Handler) -> None:
        handler.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(key.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def cut(handler: Handler) -> None:
    """Announce more than is sent."""
    status(206, b"cut", Content_Length="65536")(handler)


def endless(code: int = 206, **headers: str) -> Fault:
    def answer(handler: Handler) -> None:
        handler.send_response(code)
        for key, value in headers.items():
            handler.send_header(key.replace("_", "-"), value)
        handler.end_headers()
        while not handler.server.stopped.is_set():
            handler.wfile.write(bytes(BLOCK))

    return answer


def gzip_bomb(handler: Handler) -> None:
    body = gzip.compress(bytes(4 * BLOCK))
    status(206, body, Content_Encoding="gzip")(handler)


def trickle(start: bytes) -> Fault:
    """Send `start`, then a byte every few milliseconds, until the server stops."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(start)
        while not handler.server.stopped.wait(0.005):
            handler.wfile.write(b"x")

    return answer


@contextmanager
def serving(repositories: dict[str, Path], ranges: bool = True) -> Iterator[Hub]:
    hub = Hub(repositories, ranges)
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        hub.stopped.set()
        hub.shutdown()
        thread.join()
        hub.server_close()
