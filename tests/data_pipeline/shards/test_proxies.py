"""http shards come through the proxies that the environment names, as with curl and pip."""

from __future__ import annotations

import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from data_pipeline.shards import remote
from data_pipeline.shards.index import index_shards
from tests.data_pipeline.shard_fixtures import labelled, write_shard
from tests.data_pipeline.shard_server import serve

NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def proxy(tmp_path, monkeypatch):
    """A forward proxy that alone knows the host data.invalid; it lists what it was asked for."""
    shard = write_shard(tmp_path / "0.tar", labelled(3)).read_bytes()
    asked = []

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            asked.append(self.path)
            found = urlsplit(self.path).path == "/0.tar"
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, len(shard))
            body = shard[first : last + 1] if found else b""
            self.send_response((206 if wanted else 200) if found else 404)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", '"one"')
            self.send_header("Content-Length", str(len(body)))
            end = f"{first}-{first + len(body) - 1}/{len(shard)}"
            self.send_header("Content-Range", f"bytes {end}")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_CONNECT(self):
            asked.append(self.path)
            self.send_error(403)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("ZETA_INDEX_DIR", str(tmp_path / "index"))
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what is written there goes again
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_http_shards_come_through_the_proxy(proxy, monkeypatch, name):
    address, asked = proxy
    monkeypatch.setenv(name, address)
    manifest = index_shards("http://data.invalid/0.tar")
    assert len(manifest.samples) == 3
    assert "http://data.invalid/0.tar" in asked


def test_a_proxy_without_a_scheme_is_one_for_http(proxy, monkeypatch):
    address, asked = proxy
    monkeypatch.setenv("http_proxy", address.removeprefix("http://"))
    assert remote.stat("http://data.invalid/0.tar").nbytes > 0
    assert asked


@pytest.mark.parametrize("kind", ["socks5h", "socks5", "https"])
def test_a_proxy_of_another_kind_is_refused_with_what_to_set(proxy, monkeypatch, kind):
    monkeypatch.setenv("all_proxy", f"{kind}://user:secret@127.0.0.1:1")
    with pytest.raises(ValueError, match=f"kind {kind}, .*: set http_proxy") as error:
        remote.stat("http://data.invalid/0.tar")
    assert "secret" not in str(error.value)


def test_a_proxy_that_is_not_needed_may_be_of_any_kind(proxy, monkeypatch, tmp_path):
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(tmp_path) as server:
        assert remote.stat(f"{server.url}/0.tar").nbytes > 0


def test_https_shards_ask_the_proxy_for_a_tunnel(proxy, monkeypatch):
    address, asked = proxy
    monkeypatch.setenv("https_proxy", address)
    with pytest.raises(OSError, match=r"https://data\.invalid/0\.tar"):
        remote.stat("https://data.invalid/0.tar", deadline_s=0)
    assert "data.invalid:443" in asked


@pytest.mark.parametrize("without", ["127.0.0.1", "localhost,127.0.0.1"])
def test_hosts_of_no_proxy_are_asked_directly(proxy, monkeypatch, tmp_path, without):
    address, asked = proxy
    monkeypatch.setenv("http_proxy", address)
    monkeypatch.setenv("no_proxy", without)
    with serve(tmp_path) as server:
        assert remote.stat(f"{server.url}/0.tar").nbytes > 0
    assert asked == []
