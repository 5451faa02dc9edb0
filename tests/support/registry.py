"""A registry of one private image, by the OCI Distribution Specification, with faults, for engines that pull from it."""

import base64
import gzip
import hashlib
import io
import json
import tarfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME = "private/busybox"
USER, PASSWORD = "me", "secret:colon"

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"


class Registry(ThreadingHTTPServer):
    """Serves an image made of a directory to clients with the right credentials."""

    daemon_threads = True

    def __init__(self, root: Path, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.image = f"127.0.0.1:{port}/{NAME}:1"
        self.blobs: dict[str, bytes] = {}
        self.refusals = 0  # the number of requests for the image that are answered by 429 before one succeeds
        self.stalling = threading.Event()  # while it is set, the transfer of layers stops in the middle
        self.stalled = threading.Event()
        self.manifest = self._make(root)

    def replace(self, root: Path) -> None:
        """Replace the image by one with the same name and another id."""
        self.manifest = self._make(root)

    def _make(self, root: Path) -> bytes:
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            tar.add(root, ".")
            tar.addfile(tarfile.TarInfo(uuid.uuid4().hex))  # a file that makes the layer new, so that no engine skips it
        rootfs = {"type": "layers", "diff_ids": [_digest(layer.getvalue())]}
        settings = {"Cmd": ["true"], "Env": ["PATH=/bin"], "WorkingDir": "/tmp"}
        config = json.dumps({"architecture": "amd64", "os": "linux", "config": settings, "rootfs": rootfs}).encode()
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self._put(CONFIG, config),
            "layers": [self._put(LAYER, gzip.compress(layer.getvalue()))],
        }
        return json.dumps(manifest).encode()

    def _put(self, kind: str, blob: bytes) -> dict[str, object]:
        self.blobs[_digest(blob)] = blob
        return {"mediaType": kind, "size": len(blob), "digest": _digest(blob)}


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


class _Handler(BaseHTTPRequestHandler):
    server: Registry
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        registry, what = self.server, self.path.rpartition("/")[2]
        if self.headers.get("Authorization") != "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode():
            self._say(401, b'{"errors": [{"code": "UNAUTHORIZED", "message": "log in first"}]}', "application/json")
        elif "/manifests/" in self.path and registry.refusals:
            registry.refusals -= 1
            self._say(429, b'{"errors": [{"code": "TOOMANYREQUESTS", "message": "enough"}]}', "application/json")
        elif "/manifests/" in self.path:
            self._say(200, registry.manifest, MANIFEST)
        elif "/blobs/" in self.path:
            self._say(200, registry.blobs[what], "application/octet-stream")
        else:
            self._say(200, b"{}", "application/json")

    def _say(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        self.send_header("Docker-Content-Digest", _digest(content))
        self.send_header("WWW-Authenticate", 'Basic realm="tests"')
        self.end_headers()
        if self.command == "HEAD":
            return
        middle = len(content) // 2
        self.wfile.write(content[:middle])
        if self.server.stalling.is_set() and len(content) > 2**16:
            self.server.stalled.set()
            while self.server.stalling.is_set():
                self.server.stalled.wait(0.05)
        self.wfile.write(content[middle:])

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def registry(root: Path, port: int) -> Iterator[Registry]:
    with Registry(root, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.stalling.clear()
            server.shutdown()
            thread.join()
