"""A W&B server on loopback, as small as the real client lets it be, that fails and stalls on order.

It keeps what the client's file stream and mutations put into each run, and answers what a resumed
run asks, so that a test can look at the run as a person would see it in W&B.
"""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 2 + "01234567"
"""A key as the client wants it: 40 characters."""
ENTITY = "team"


@dataclass
class ServedRun:
    """What the server has of one run."""

    lines: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Rows of the history, by where in its file the client put them."""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """Variables of the mutation that made or changed it."""
    exit_codes: list[int] = field(default_factory=list)
    media: list[str] = field(default_factory=list)

    def history(self, metric: str) -> list[tuple[int, Any]]:
        """(trainer/step, value) of the rows that hold a metric, in their order."""
        rows = [self.lines[offset] for offset in sorted(self.lines)]
        return [(row["trainer/step"], row[metric]) for row in rows if metric in row]


@dataclass
class WandbServer:
    """The server's state, and what it does to requests."""

    url: str = ""
    mood: str = "well"
    """well; failing: answers 503; stalling: takes requests and answers none until it is well."""
    runs: dict[str, ServedRun] = field(default_factory=dict)
    alerts: list[tuple[str, str]] = field(default_factory=list)
    requests: int = 0

    def environment(self, folder: object) -> dict[str, str]:
        """What a client needs to come here; its files stay in `folder`."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_CONFIG_DIR": f"{folder}/wandb_config",
            "WANDB_CACHE_DIR": f"{folder}/wandb_cache",
        }

    def answer(self, path: str, body: bytes) -> object:
        """Return the JSON of the answer to a request."""
        if path == "/graphql":
            request = json.loads(body)
            return {"data": self._query(request["query"], request.get("variables") or {})}
        if path.endswith("/file_stream"):
            self._stream(self.runs.setdefault(path.split("/")[-2], ServedRun()), json.loads(body))
        return {}

    def _query(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or variables.get("run") or ""
        project = {
            "id": "p",
            "name": variables.get("project"),
            "entity": {"id": "e", "name": ENTITY},
        }
        if "upsertBucket" in query:
            run, new = self.runs.setdefault(name, ServedRun()), name not in self.runs
            run.settings |= {key: value for key, value in variables.items() if value is not None}
            run.config |= json.loads(variables.get("config") or "{}")
            bucket = {"id": name, "name": name, "displayName": run.settings.get("displayName")}
            bucket |= {"config": json.dumps(run.config), "sweepName": None}
            bucket |= {"historyLineCount": len(run.lines), "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if "RunResumeStatus" in query:
            return {"model": {**project, "bucket": self._resumed(name)}}
        if "createRunFiles" in query:
            self.runs[name].media += [file for file in variables["files"] if "media" in file]
            files = [{"name": file, "uploadUrl": f"{self.url}/up"} for file in variables["files"]]
            return {"createRunFiles": {"runID": name, "uploadHeaders": [], "files": files}}
        if "notifyScriptableRunAlert" in query:
            self.alerts.append((variables["title"], variables["text"]))
            return {"notifyScriptableRunAlert": {"success": True}}
        return {}

    def _resumed(self, name: str) -> dict[str, Any] | None:
        if (run := self.runs.get(name)) is None:
            return None
        telemetry = run.config.get("_wandb", {}).get("value", {})
        tail = [json.dumps(run.lines[offset]) for offset in sorted(run.lines)[-1:]]
        return {
            "id": name, "name": name, "displayName": name, "tags": [], "notes": None,
            "summaryMetrics": json.dumps(run.summary), "config": json.dumps(run.config),
            "logLineCount": 0, "historyLineCount": len(run.lines), "eventsLineCount": 0,
            "historyTail": json.dumps(tail), "eventsTail": "[]",
            "wandbConfig": json.dumps({"t": telemetry.get("t", {})}),
        }  # fmt: skip

    def _stream(self, run: ServedRun, body: dict[str, Any]) -> None:
        files = body.get("files") or {}
        if history := files.get("wandb-history.jsonl"):
            for index, line in enumerate(history["content"], start=history["offset"]):
                run.lines[index] = json.loads(line)
        if summary := files.get("wandb-summary.json"):
            run.summary |= json.loads(summary["content"][-1])
        if body.get("exitcode") is not None:
            run.exit_codes.append(body["exitcode"])


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """Serve until the block ends."""
    state, lock, ended = WandbServer(), threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            state.requests += 1
            while state.mood == "stalling" and not ended.is_set():
                time.sleep(0.05)
            with lock:
                well = state.mood == "well"
                text = json.dumps(state.answer(self.path, body) if well else {}).encode()
            self.send_response(200 if well else 503)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = respond

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that went away is no fault of the server."""

    with Server(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield state
        finally:
            ended.set()
            server.shutdown()
            thread.join()
