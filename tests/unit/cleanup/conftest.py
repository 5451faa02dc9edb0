import json
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer
from typing import Any

import pytest

from trio_pilot.cleanup.engine_containers import DATA_LABEL, LABEL


@dataclass
class FakeEngine:
    """The part of an engine that the sweep uses."""

    socket: Path
    containers: dict[str, dict[str, Any]] = field(default_factory=dict)
    trouble: tuple[int, bytes] | None = None  # what it answers instead of a list

    def add(self, pilot: object, data: object = None, **facts: Any) -> str:
        name = uuid.uuid4().hex
        labels = {LABEL: str(pilot), **({} if data is None else {DATA_LABEL: str(data)})}
        self.containers[name] = {"Id": name, "Labels": labels, "State": "running", "Created": 0, **facts}
        return name


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FakeEngine]:
    engine = FakeEngine(tmp_path / "engine.sock")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path.startswith("/containers/json?all=1&filters=%7B%22label%22%3A%20%5B%22trio-pilot.pilot%22%5D%7D")
            self.answer(*engine.trouble or (200, json.dumps(list(engine.containers.values())).encode()))

        def do_POST(self) -> None:
            name, _, what = self.path.removeprefix("/containers/").partition("/")
            assert what == "kill"
            self.answer(204 if engine.containers[name]["State"] == "running" else 409)

        def do_DELETE(self) -> None:
            name, _, options = self.path.removeprefix("/containers/").partition("?")
            assert options == "force=1&v=1"
            del engine.containers[name]
            self.answer(204)

        def answer(self, code: int, body: bytes = b"") -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with UnixStreamServer(str(engine.socket), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield engine
        server.shutdown()
        thread.join()
