"""A Hub of one machine: the endpoints that huggingface_hub asks, over folders on disk, counting the bytes it serves."""

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


BLOCK = 2**20


class Hub(ThreadingHTTPServer):
    """Serves {repository: folder} under 127.0.0.1.

    served   {(repository, file): bytes}
    ranges   whether ranges are answered; `sent` lists (file, start, end) of all that was
    tokens   what was sent for authorization
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path], ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.ranges = repositories, ranges
        self.sent: list[tuple[Path, int, int]] = []
        self.served: Counter[tuple[str, str]] = Counter()
        self.tokens: set[str | None] = set()

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
        if listing := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self.list(listing[1], listing[2])
        elif file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.send_file(file[1], file[3], body)
        else:
            self.refuse("EntryNotFound")

    def list(self, repository: str, revision: str) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        folder = self.server.repositories.get(repository)
        if folder is None or revision not in {"main", COMMIT}:
            return self.refuse("RepoNotFound" if folder is None else "RevisionNotFound")
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        siblings = [{"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size} for path in files]
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
        self.send_response(206 if end - start < size else 200)
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


@contextmanager
def serving(repositories: dict[str, Path], ranges: bool = True) -> Iterator[Hub]:
    hub = Hub(repositories, ranges)
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
