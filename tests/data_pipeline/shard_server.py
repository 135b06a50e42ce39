"""A real HTTP server of a folder, with ETags, ranges, and failures on demand."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ShardServer:
    """Serves the files of a folder; `faults` are spent one a GET, before it behaves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: deque[int | str] = deque()
        """An HTTP status, or "reset", "short" (half of the answer, then the end) or "slow"."""
        self.always: int | str | None = None
        """A fault of every GET."""
        self.requests: list[tuple[str, str, int, float]] = []
        """(method, path, first byte, time) of each request."""
        self.ranges = True
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def gets(self, name: str) -> int:
        """Return the number of GETs of a file."""
        return sum(method == "GET" and path == f"/{name}" for method, path, _, _ in self.requests)


@contextmanager
def serve(folder: Path) -> Iterator[ShardServer]:
    """Run a server of `folder` in this process."""
    server = ShardServer(folder)
    thread = threading.Thread(target=server._http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server._http.shutdown()
        server._http.server_close()


def _handler(server: ShardServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first = int(wanted[1]) if wanted else 0
            server.requests.append((self.command, self.path, first, time.monotonic()))
            path = server.folder / self.path.lstrip("/")
            if not path.is_file():
                self._status(404)
                return
            fault = server.always
            if body and fault is None and server.faults:
                fault = server.faults.popleft()
            if isinstance(fault, int):
                self._status(fault)
                return
            if fault == "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                self.connection.close()
                return
            if fault == "slow":
                time.sleep(0.5)
            data = path.read_bytes()
            part = data
            if wanted and server.ranges:
                part = data[first : int(wanted[2]) + 1]
                self.send_response(206)
                end = first + len(part) - 1
                self.send_header("Content-Range", f"bytes {first}-{end}/{len(data)}")
            else:
                self.send_response(200)
            status = path.stat()
            self.send_header("ETag", f'"{status.st_mtime_ns}-{len(data)}"')
            if server.ranges:
                self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if body:
                self.wfile.write(part[: len(part) // 2] if fault == "short" else part)
                if fault == "short":
                    self.close_connection = True

        def _status(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            if status == 429:
                self.send_header("Retry-After", "1")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler
