"""Object stores on loopback that fail on demand: moto's S3, and an emulator of Google's."""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

BUCKET = "photos"
AWS = {
    "AWS_ACCESS_KEY_ID": "anyone",
    "AWS_SECRET_ACCESS_KEY": "anything",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Store:
    """A store with one bucket; `faults` are spent one a request for a shard, before it behaves."""

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol
        self.address = ""
        self.faults: deque[int | str] = deque()
        """An HTTP status, a code of S3, or "reset"."""
        self.always: int | str | None = None
        """A fault of every request for a shard."""
        self.asked = 0
        """Number of requests for shards."""

    def url(self, name: str = "") -> str:
        """Return the URL of an object of the bucket."""
        return f"{self.protocol}://{BUCKET}/{name}"

    def put(self, folder: Path) -> None:
        """Copy the files of a folder into the bucket."""
        for path in sorted(folder.iterdir()):
            self.files().pipe_file(f"{BUCKET}/{path.name}", path.read_bytes())

    def remove(self, name: str) -> None:
        self.files().rm_file(f"{BUCKET}/{name}")

    def files(self) -> Any:
        """Return a file system that may write."""
        import fsspec

        return fsspec.filesystem(self.protocol, use_listings_cache=False)

    def fault(self, path: str) -> int | str | None:
        """Return the fault of a request."""
        if not path.endswith(".tar"):
            return None
        self.asked += 1
        return self.always if self.always is not None or not self.faults else self.faults.popleft()


def forget_stores(protocol: str) -> None:
    """Let the next file system of this process look at the environment again."""
    import fsspec

    fsspec.get_filesystem_class(protocol).clear_instance_cache()


@contextmanager
def s3_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Run moto's S3 in this process, and lead s3:// of this process and its children there."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = Store("s3")
    app = _Faulty(DomainDispatcherApplication(create_backend_app), store)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    store.address = f"http://127.0.0.1:{server.server_port}"
    with _running(server):
        for name, value in (AWS | {"AWS_ENDPOINT_URL": store.address}).items():
            monkeypatch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        _post(f"{store.address}/moto-api/reset")
        forget_stores("s3")
        store.files().mkdir(BUCKET)
        yield store
        demand_keys(store, False)
        forget_stores("s3")


def demand_keys(store: Store, demanded: bool = True) -> None:
    """Let moto check keys, signatures and permissions from now on, or no longer."""
    _post(f"{store.address}/moto-api/reset-auth", b"0" if demanded else b"inf")


def user_without_permissions() -> dict[str, str]:
    """Return the environment of a user who exists and may do nothing; before `demand_keys`."""
    import botocore.session

    client = botocore.session.get_session().create_client("iam")
    client.create_user(UserName="nobody")
    key = client.create_access_key(UserName="nobody")["AccessKey"]
    return {
        "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
    }


@contextmanager
def gs_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Run the emulator of Google's store in this process, and lead gs:// there."""
    from gcp_storage_emulator.server import RequestHandler, create_server

    store = Store("gs")

    class Handler(RequestHandler):  # type: ignore[misc]
        def do_GET(self) -> None:
            fault = store.fault(self.path.partition("?")[0])
            if fault == "reset":
                _reset(self.connection)
                self.close_connection = True
            elif fault is not None:
                body = b'{"error": {"code": %d, "message": "as told"}}' % fault
                self.send_response(int(fault))
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            else:
                super().do_GET()

        def log_message(self, *arguments: object) -> None:
            pass

    # It prints every object that it does not find.
    monkeypatch.setattr("builtins.print", lambda *words, **options: None)
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    server._api._httpd.RequestHandlerClass = partial(Handler, server._storage)
    store.address = f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.address)
    forget_stores("gs")
    try:
        yield store
    finally:
        forget_stores("gs")
        server.stop()


class _Faulty:
    """A WSGI application that fails as its store is told to."""

    def __init__(self, app: Callable[..., Any], store: Store) -> None:
        self._app, self._store = app, store

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        fault = None
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            fault = self._store.fault(environ["PATH_INFO"])
        if fault is None:
            return self._app(environ, start_response)
        if fault == "reset":
            _reset(environ["werkzeug.socket"])
            raise ConnectionResetError
        status, code = (fault, "InternalError")
        if isinstance(fault, str):
            status, code = (503 if fault == "SlowDown" else 400), fault
        body = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        start_response(f"{status} as told", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


@contextmanager
def _running(server: Any) -> Iterator[None]:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RDWR)  # or it stays open until its files are closed, too
    connection.close()


def _post(url: str, data: bytes = b"") -> None:
    headers = {"Content-Type": "text/plain"}
    request = urllib.request.Request(url, data=data, headers=headers, method="POST")
    with urllib.request.urlopen(request, timeout=10) as answer:
        answer.read()


def change(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Give this process other credentials; an empty value removes one."""
    for name, value in variables.items():
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    assert os.environ.get("AWS_ENDPOINT_URL")
    forget_stores("s3")
