"""A local server that speaks plain HTTP with ranges, and the part of the hub's protocol that its client needs."""

import contextlib
import dataclasses
import hashlib
import http.server
import re
import threading

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Server:
    """Serves ``files[path]`` at ``url + path`` and logs the ``requests``.

    ``cut`` closes that many answers half way, and then ``change`` replaces files; ``busy`` refuses that many. Without
    ``ranges`` every answer is whole; with ``lie`` the last byte is wrong.
    """

    url: str
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    cut: int = 0
    busy: int = 0
    change: dict[str, bytes] = dataclasses.field(default_factory=dict)
    ranges: bool = True
    lie: bool = False
    requests: list[tuple[str, str, str | None]] = dataclasses.field(default_factory=list)

    def add_to_hub(self, repo, content, file="model.safetensors"):
        for revision in ("main", COMMIT):
            self.files[f"/{repo}/resolve/{revision}/{file}"] = content


@pytest.fixture
def server():
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            span = self.headers.get("Range")
            state.requests.append((self.command, self.path, span))
            if state.busy:
                state.busy -= 1
                self.send_response(429)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = state.files.get(self.path)
            if content is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in self.path else "")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            digest = hashlib.sha256(content).hexdigest()
            start = 0
            same = self.headers.get("If-Range") in (None, f'"{digest}"')
            if span and state.ranges and same:
                start = int(re.fullmatch(r"bytes=(\d+)-.*", span)[1])
            if start >= len(content) > 0:
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", f'"{digest}"')
            self.send_header("X-Linked-ETag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if not body:
                return
            if state.lie:
                content = content[:-1] + bytes([content[-1] ^ 1])
            if state.cut > 0:
                state.cut -= 1
                state.files |= state.change  # before the client can notice and ask again
                self.wfile.write(content[start : (start + len(content)) // 2])
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(content[start:])

        def handle(self):
            with contextlib.suppress(OSError, ValueError):  # what our own cuts provoke
                super().handle()

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Server(f"http://127.0.0.1:{httpd.server_port}")
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield state
    httpd.shutdown()
    httpd.server_close()
