"""Private container engines for tests, with sockets and directories of their own.

An engine runs in a PID and mount namespace of its own: all that it has started or mounted ends with that.
"""

import http.client
import json
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tests.support.servers import IN_NAMESPACE, UnavailableError, end_namespace, free_port, need
from trio_pilot.cleanup.engine_containers import LABEL, UnixConnection

START_TIMEOUT = 60.0  # seconds; it takes less than one on an idle machine
STOP_TIMEOUT = 20.0
API_TIMEOUT = 60.0

IMAGE = "busybox:local"
# The configuration of the image: the home of its tasks is their scratch directory, at /tmp.
IMAGE_CHANGES = ("WORKDIR /tmp", "ENV PATH=/bin", "ENV HOME=/tmp", "ENV TMPDIR=/tmp")

# For Debian's podman as root without CAP_SYS_RESOURCE, with some cgroups of v1 and some of v2, which crun refuses.
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
netns = "none"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
"""

CONTAINERS_CONF_ROOTLESS = CONTAINERS_CONF[CONTAINERS_CONF.index("netns") :]

# Docker trusts every registry at 127.0.0.1.
REGISTRIES_CONF = """
unqualified-search-registries = ["localhost"]
[[registry]]
location = "127.0.0.1:{}"
insecure = true
"""

SOMEBODY = 23456  # a user id

# The first process of the namespaces: it reaps, and ends with its parent.
KEEPER = "mount -t tmpfs tmpfs /dev/shm && echo ready && sleep infinity & wait"


class Engine:
    """A daemon that runs containers, in namespaces of its own."""

    def __init__(self, name: str, directory: Path, command: Sequence[str], importing: str, preparation: str = ":") -> None:
        self.name = name
        self.directory = directory
        self.socket = directory / f"{name}.sock"
        self.registry_port = free_port()  # of a registry that it trusts
        (directory / "registries.conf").write_text(REGISTRIES_CONF.format(self.registry_port))
        self._command = command
        self._importing = importing  # the path of the request that imports IMAGE
        self._preparation = preparation  # a shell's commands to prepare the namespaces
        self._log = directory / "output.log"
        self._keeper: subprocess.Popen[bytes] | None = None
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the daemon, and wait until it answers."""
        self.launch()
        self.wait_until_ready()

    def launch(self) -> None:
        """Start the daemon. Call this from the main thread: the daemon ends with the thread that starts it."""
        if self._keeper is None:
            self._keeper = self._make_namespaces()
        for stale in (self.directory / "pid", self.directory / "exec/containerd/containerd.pid"):
            stale.unlink(missing_ok=True)  # a killed one leaves them, and its successor waits for the process of that number
        init = Path(f"/proc/{self._keeper.pid}/task/{self._keeper.pid}/children").read_text().split()[0]
        entering = ["nsenter", "--target", init, "--mount", "--pid", "--", "setpriv", "--pdeathsig", "KILL"]
        with self._log.open("ab") as log:
            self._daemon = subprocess.Popen(
                [*entering, *self._command],
                env={
                    **os.environ,
                    "CONTAINERS_CONF": str(self.directory / "containers.conf"),
                    "CONTAINERS_REGISTRIES_CONF": str(self.directory / "registries.conf"),
                },
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def wait_until_ready(self) -> None:
        assert self._daemon
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and self._daemon.poll() is None:
            with suppress(OSError, http.client.HTTPException):
                self.api("GET", "/_ping")
                return
            time.sleep(0.02)
        raise UnavailableError(f"{self.name} does not start: {self._log.read_text(errors='replace')[-2000:]}")

    def kill(self) -> None:
        """Kill the daemon; its containers may survive."""
        self._signal(signal.SIGKILL)
        self._wait()

    def terminate(self) -> None:
        """Stop the daemon as an administrator does."""
        self._signal(signal.SIGTERM)
        self._wait()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._daemon
        os.killpg(self._daemon.pid, signal.SIGCONT)  # nsenter was stopped with it

    def close(self) -> None:
        """End the daemon and all that it has started."""
        if self._keeper:
            end_namespace(self._keeper)
        if self._daemon:
            self._wait()
        self._daemon = self._keeper = None

    def containers(self, *states: str) -> list[str]:
        """List the containers of pilots, in any state or one of these."""
        filters = urllib.parse.quote(json.dumps({"label": [LABEL], **({"status": states} if states else {})}))
        found: list[dict[str, Any]] = json.loads(self.api("GET", f"/v1.40/containers/json?all=1&filters={filters}"))
        return sorted(name.removeprefix("/") for container in found for name in container["Names"])

    def has_image(self, name: str) -> str | None:
        """Return the id of an image; None if it is not there."""
        images = json.loads(self.api("GET", "/v1.40/images/json"))
        return next((image["Id"] for image in images if name in (image["RepoTags"] or ())), None)

    def load(self, archive: IO[bytes]) -> None:
        """Import an image from a tar archive."""
        changes = "".join(f"&changes={urllib.parse.quote(change)}" for change in IMAGE_CHANGES)
        self.api("POST", self._importing + changes, archive)

    def load_archive(self, archive: Path) -> None:
        """Load an image from an archive, as of `docker save`."""
        path = "/v1.40/images/load" if self.name == "docker" else "/v4.0.0/libpod/images/load"
        with archive.open("rb") as file:
            self.api("POST", path, file)

    def api(self, method: str, path: str, body: IO[bytes] | None = None) -> bytes:
        """Send a request; return the content of the answer."""
        with closing(UnixConnection(self.socket, API_TIMEOUT)) as connection:
            connection.request(method, path, body, {"Content-Type": "application/x-tar"} if body else {})
            answer = connection.getresponse()
            content = answer.read()
        assert answer.status < 300, (path, answer.status, content)
        return content

    def _make_namespaces(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            keeper = subprocess.Popen(
                [*IN_NAMESPACE, "--propagation", "slave", "sh", "-c", f"{self._preparation} && {KEEPER}"],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert keeper.stdout
        with keeper.stdout as said:
            if said.readline() != b"ready\n":
                raise UnavailableError("an engine needs namespaces of its own, which cannot be made here")
        return keeper

    def _signal(self, number: signal.Signals) -> None:
        assert self._daemon
        (pid,) = map(int, Path(f"/proc/{self._daemon.pid}/task/{self._daemon.pid}/children").read_text().split())
        os.kill(pid, number)

    def _wait(self) -> None:
        assert self._daemon
        self._daemon.wait(STOP_TIMEOUT)


@contextmanager
def remapped_docker(root: Path) -> Iterator[Engine]:
    """Run a dockerd whose containers have user ids of their own on this machine (userns-remap)."""
    with tempfile.TemporaryDirectory() as directory:
        for name in ("subuid", "subgid"):
            (Path(directory) / name).write_text("nobody:300000:65536\n")
        bound = " && ".join(f"mount --bind {directory}/{name} /etc/{name}" for name in ("subuid", "subgid"))
        with docker(root, "--userns-remap=nobody:nogroup", preparation=bound) as engine:
            yield engine


@contextmanager
def docker(root: Path, *more: str, preparation: str = ":") -> Iterator[Engine]:
    """Run a dockerd, with an image made of the directory `root`."""
    need("dockerd", "docker.io")
    need("runc", "runc")
    with _directory("docker") as directory:
        directory.chmod(0o711)  # the containers' own users have to reach their files
        command = [
            *("dockerd", "-H", f"unix://{directory}/docker.sock", "--pidfile", f"{directory}/pid"),
            *("--data-root", f"{directory}/data", "--exec-root", f"{directory}/exec"),
            *("--exec-opt", "native.cgroupdriver=cgroupfs"),
            # A bridge would change this machine's iptables.
            *("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-masq=false", "--userland-proxy=false"),
            *more,
        ]
        importing = "/v1.40/images/create?fromSrc=-&repo={}&tag={}".format(*IMAGE.split(":"))
        with _running(Engine("docker", directory, command, importing, preparation), root) as engine:
            yield engine


@contextmanager
def podman(root: Path) -> Iterator[Engine]:
    """Run podman's service, with an image made of the directory `root`."""
    for program, package in (("podman", "podman"), ("runc", "runc"), ("catatonit", "catatonit")):
        need(program, package)
    with _directory("podman") as directory:
        (directory / "containers.conf").write_text(CONTAINERS_CONF)
        command = [
            *("podman", "--root", f"{directory}/data", "--runroot", f"{directory}/run", "--tmpdir", f"{directory}/tmp"),
            *("system", "service", "--time", "0", f"unix://{directory}/podman.sock"),
        ]
        importing = f"/v4.0.0/libpod/images/import?reference=localhost/{IMAGE}"
        with _running(Engine("podman", directory, command, importing), root) as engine:
            yield engine


@contextmanager
def rootless_podman(root: Path) -> Iterator[Engine]:
    """Run podman's service as a user who exists in its namespaces only."""
    for program, package in (("podman", "podman"), ("runc", "runc"), ("newuidmap", "uidmap"), ("catatonit", "catatonit")):
        need(program, package)
    with _directory("podman") as directory:
        files = {
            "passwd": f"{Path('/etc/passwd').read_text()}pilot:x:{SOMEBODY}:{SOMEBODY}::{directory}:/bin/sh\n",
            "subuid": "pilot:300000:65536\n",
            "subgid": "pilot:300000:65536\n",
            "containers.conf": "[containers]\n" + CONTAINERS_CONF_ROOTLESS,
            "storage.conf": f'[storage]\ndriver = "overlay"\ngraphroot = "{directory}/data"\nrunroot = "{directory}/run"\n',
        }
        for name, content in files.items():
            (directory / name).write_text(content)
        os.chown(directory, SOMEBODY, SOMEBODY)
        bound = " && ".join(f"mount --bind {directory}/{name} /etc/{name}" for name in ("passwd", "subuid", "subgid"))
        command = [
            *("setpriv", f"--reuid={SOMEBODY}", f"--regid={SOMEBODY}", "--clear-groups", "env", f"HOME={directory}"),
            *(f"XDG_RUNTIME_DIR={directory}", f"CONTAINERS_STORAGE_CONF={directory}/storage.conf"),
            *("podman", "system", "service", "--time", "0", f"unix://{directory}/podman.sock"),
        ]
        importing = f"/v4.0.0/libpod/images/import?reference=localhost/{IMAGE}"
        with _running(Engine("podman", directory, command, importing, bound), root) as engine:
            yield engine


@contextmanager
def _directory(name: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        raise UnavailableError(f"a private {name} needs root")
    directory = Path(tempfile.mkdtemp(prefix=f"trio-pilot-{name}-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@contextmanager
def _running(engine: Engine, root: Path) -> Iterator[Engine]:
    try:
        engine.start()
        with tempfile.TemporaryFile(dir=engine.directory) as archive:
            with tarfile.open(fileobj=archive, mode="w") as tar:
                tar.add(root, ".")
            archive.seek(0)
            engine.load(archive)
        yield engine
    finally:
        engine.close()
