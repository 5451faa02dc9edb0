"""Servers that tests need, each a private one: free ports, a directory of its own, nothing left behind."""

import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from trio_pilot.brokers.nats_messages import StreamPosition

START_TIMEOUT = 90.0  # seconds; it takes 3 to 10 on an idle machine
STOP_TIMEOUT = 15.0

SHOWN = 4000  # characters of a log, with a test that fails

# The package's /usr/sbin/rabbitmq-server goes through su; this is what it calls.
RABBITMQ_SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
SOURCES = Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")
PORTS = 10_000, 32_768  # below ip_local_port_range
MAX_MESSAGE_SIZE = 4 * 2**20

# Without busy waiting: as its documentation advises where a server has not the cores for itself.
ERLANG_FLAGS = "+sbwt none +sbwtdcpu none +sbwtdio none"


# A server does not outlive its tests, nor what it has started it; and nothing of that becomes a child of pytest, of which
# tests of children make a subreaper.
IN_NAMESPACE = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--pid", "--fork", "--kill-child", "--mount-proc"),
)


class UnavailableError(Exception):
    """This machine cannot run the server."""


def free_port() -> int:
    """Find a port that nobody has, and that is given to no connection as its own end before a server has it."""
    with socket.socket() as probe:
        while True:
            with suppress(OSError):
                probe.bind(("127.0.0.1", port := random.randrange(*PORTS)))
                return port


def wait_for_port(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise UnavailableError(f"it does not start: {log.read_text(errors='replace')[-2000:]}")


def end_namespace(process: "subprocess.Popen[bytes]") -> None:
    """End at once what was started IN_NAMESPACE, with all that it has started."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
    process.wait(STOP_TIMEOUT)


def need(program: str, package: str) -> None:
    """Have a program, installed from its Debian package where that may be done."""
    if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin"):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise UnavailableError(f"{program} is not installed, and only root on Debian can install it here")
    # A runlevel of 1 keeps the package from starting a service.
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", package]):
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise UnavailableError(f"{' '.join(command)} failed: {done.stderr[-500:]}")


S = TypeVar("S", "RabbitServer", "NatsServer")
RUNNING: "list[RabbitServer | NatsServer]" = []


@contextmanager
def running(server: S) -> Iterator[S]:
    """Run a server."""
    RUNNING.append(server)
    try:
        server.start()
        yield server
    except BaseException:
        for title, text in last_words(server):
            print(title, text, sep="\n")
        raise
    finally:
        server.stop()
        RUNNING.remove(server)


def last_words(server: "RabbitServer | NatsServer") -> Iterator[tuple[str, str]]:
    """Give the end of each of its logs, with a title; one that did not come to writing it has none."""
    for log in server.logs:
        if log.exists():
            yield f"end of {log}", log.read_text(errors="replace")[-SHOWN:]


@contextmanager
def rabbitmq(suite: str = "", config: str = "", plugins: str = "") -> Iterator["RabbitServer"]:
    """Run a RabbitMQ server: the one installed here, or that of another suite of Debian."""
    for program, package in (("rabbitmq-server", "rabbitmq-server"), *([("bwrap", "bubblewrap")] if suite else [])):
        need(program, package)
    root = debian(suite, "rabbitmq-server") if suite else None
    with (
        tempfile.TemporaryDirectory(prefix="trio-pilot-rabbitmq-") as directory,
        running(RabbitServer(Path(directory), root, config, plugins)) as server,
    ):
        yield server


def debian(suite: str, package: str, *more: str) -> Path:
    """Have a tree of a Debian suite with packages in it: made once, and kept in the cache directory."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trio-pilot-tests"
    tree = cache / f"{package}-{suite}"
    if not tree.exists():
        need("mmdebstrap", "mmdebstrap")
        cache.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f"{package}-{suite}-", dir=cache))
        options = [
            "--variant=minbase",
            f"--include={','.join([package, *more])}",
            '--aptopt=Acquire::Check-Valid-Until "false"',
        ]
        options += ["--aptopt=APT::Install-Recommends false", "--dpkgopt=force-unsafe-io"]
        done = subprocess.run(["mmdebstrap", *options, suite, new, mirror()], capture_output=True, text=True, timeout=600)
        if done.returncode:
            shutil.rmtree(new, ignore_errors=True)
            raise UnavailableError(f"mmdebstrap failed: {done.stderr[-500:]}")
        new.rename(tree)
    return tree


def mirror() -> str:
    """Tell where this machine has its packages from."""
    for file in SOURCES:
        said = file.read_text() if file.exists() else ""
        if found := re.search(r"^(?:URIs:|deb (?:\[.*\] )?)\s*(\S+)", said, re.MULTILINE):
            return found[1]
    raise UnavailableError("apt's sources name no mirror of Debian's packages")


class RabbitServer:
    """A RabbitMQ node and its epmd; in a tree of its own, or of the packages installed here."""

    def __init__(self, directory: Path, root: Path | None = None, config: str = "", plugins: str = "") -> None:
        self.directory = directory
        self._root = root
        self._config = config
        self._plugins = plugins
        self.port = free_port()
        self.version = ""
        self._user = pwd.getpwnam("rabbitmq") if os.geteuid() == 0 and not root else None
        self._node = f"pilot-test-{uuid.uuid4().hex[:8]}@localhost"
        self._cookie = uuid.uuid4().hex
        self._env = self._environment(free_port(), free_port())
        self._log = directory / "output.log"
        self._epmd: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def logs(self) -> list[Path]:
        return [self._log, *(self.directory / "log").glob("*.log")]

    def start(self) -> None:
        self.launch()
        self.wait_until_ready()

    def launch(self) -> None:
        # From the main thread: the server's life is tied to the thread that starts it.
        if self._epmd is None:
            self._lay_out()
            self._epmd = self._spawn("epmd", "-address", "127.0.0.1", "-port", self._env["ERL_EPMD_PORT"])
        self._server = self._spawn(*self._inside(), str(RABBITMQ_SERVER))

    def wait_until_ready(self) -> None:
        assert self._server
        wait_for_port(self.port, self._server, self._log)
        self.version = self.version or self._ask_version()

    def kill(self) -> None:
        """End the node at once; what it has confirmed, and the queues it has declared, are on its disk."""
        assert self._server
        # It is lazy about new queues; from 4.2 on there is no Mnesia.
        self.evaluate("catch mnesia:sync_log(), [dets:sync(T) || T <- dets:all()].")
        end_namespace(self._server)

    def stop(self) -> None:
        for process in (self._server, self._epmd):
            if process is not None:
                end_namespace(process)
        self._server = self._epmd = None

    def evaluate(self, erlang: str) -> str:
        """Evaluate Erlang in the node, which takes some milliseconds."""
        # -R: named by the node. The usual name is taken until the node has noticed that the call before is over.
        command = ["erl_call", "-R", "-sname", self._node, "-c", self._cookie, "-e"]
        source = " ".join(erlang.split()) + "\n"
        done = subprocess.run(command, env=self._env, input=source, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{erlang}: {done.stdout}{done.stderr}"
        assert done.stdout.startswith("{ok, "), f"{erlang}: {done.stdout}"
        return done.stdout[len("{ok, ") : -1]

    def add_user(self, name: str, password: str, configure: str, write: str, read: str) -> None:
        self.evaluate(f"""
            ok = rabbit_auth_backend_internal:add_user(<<"{name}">>, <<"{password}">>, <<"test">>),
            ok = rabbit_auth_backend_internal:set_permissions(
                <<"{name}">>, <<"/">>, <<"{configure}">>, <<"{write}">>, <<"{read}">>, <<"test">>).
        """)

    def counts(self, queue: str) -> tuple[int, int]:
        """Tell how many messages are ready, and how many delivered and unsettled, in a quorum queue."""
        said = self.evaluate(f"""
            Name = list_to_atom("%2F_{queue}"),
            {{ok, {{_, Facts}}, _}} = ra:leader_query({{Name, node()}}, fun rabbit_fifo:overview/1),
            {{maps:get(num_ready_messages, Facts), maps:get(num_checked_out, Facts)}}.
        """)
        ready, unsettled = map(int, said.strip("{}").split(","))
        return ready, unsettled

    def _environment(self, epmd_port: int, distribution_port: int) -> dict[str, str]:
        here = str(self.directory)
        return {
            "PATH": os.environ["PATH"],
            "HOME": here,
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RUNNING_UNDER_SYSTEMD": "yes",  # the script becomes the server, so that its pid is the server's
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(distribution_port),
            "RABBITMQ_MNESIA_BASE": f"{here}/mnesia",
            "RABBITMQ_LOG_BASE": f"{here}/log",
            "RABBITMQ_PID_FILE": f"{here}/pid",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{here}/enabled_plugins",
            "RABBITMQ_GENERATED_CONFIG_DIR": f"{here}/config",
            "RABBITMQ_CONFIG_FILE": f"{here}/rabbitmq.conf",
            "RABBITMQ_CONF_ENV_FILE": f"{here}/none",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-kernel inet_dist_use_interface {{127,0,0,1}} {ERLANG_FLAGS}",
        }

    def _lay_out(self) -> None:
        files = {
            ".erlang.cookie": self._cookie,
            "enabled_plugins": f"[{self._plugins}].",
            "rabbitmq.conf": f"max_message_size = {MAX_MESSAGE_SIZE}\ndisk_free_limit.absolute = 20MB\n{self._config}",
        }
        for name, content in files.items():
            path = self.directory / name
            path.write_text(content)
            path.chmod(0o400)
        if self._user:
            for path in (self.directory, *self.directory.iterdir()):
                os.chown(path, self._user.pw_uid, self._user.pw_gid)

    def _inside(self) -> list[str]:
        """Begin a command that is run in a tree of its own."""
        if not self._root:
            return []
        binds = ["--bind", self._root, "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/run", "--tmpfs", "/tmp"]
        host = ["--unshare-uts", "--hostname", "localhost"]
        return ["bwrap", *map(str, binds), "--bind", str(self.directory), str(self.directory), *host]

    def _spawn(self, *command: str) -> "subprocess.Popen[bytes]":
        user = {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []} if self._user else {}
        mapped = ["--user", "--map-current-user"] if self._user or os.geteuid() else []
        with self._log.open("ab") as log:
            return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
                [*IN_NAMESPACE, *mapped, *command],
                env=self._env,
                cwd=self.directory,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **user,
            )

    def _ask_version(self) -> str:
        return self.evaluate("{ok, V} = application:get_key(rabbit, vsn), V.").strip('"')


@contextmanager
def nats() -> Iterator["NatsServer"]:
    """Run a NATS server with JetStream."""
    need("nats-server", "nats-server")
    with (
        tempfile.TemporaryDirectory(prefix="trio-pilot-nats-") as directory,
        running(NatsServer(Path(directory))) as server,
    ):
        yield server


NATS_USERS = """
authorization {
  users = [
    { user: "pilot", password: "secret" }
    { user: "poor", password: "secret", permissions: { publish: { deny: ["$JS.API.STREAM.CREATE.>"] } } }
  ]
}
"""


class NatsServer:
    """A NATS server. It starts in some milliseconds, so that a test may well have one of its own."""

    def __init__(self, directory: Path, more: str = "") -> None:
        self.directory = directory
        self.port = free_port()
        self._log = directory / "output.log"
        self._process: subprocess.Popen[bytes] | None = None
        store = f"jetstream {{ store_dir: {directory} }}"
        listening = f"listen: 127.0.0.1:{self.port}\nmax_payload: {MAX_MESSAGE_SIZE}"
        (directory / "nats.conf").write_text(f"{listening}\n{store}\n{more}\n")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def version(self) -> str:
        done = subprocess.run([self._program(), "--version"], capture_output=True, text=True, check=True)
        return done.stdout.split()[-1].removeprefix("v")

    @property
    def logs(self) -> list[Path]:
        return [self._log]

    def start(self) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", self._program(), "-c", str(self.directory / "nats.conf")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for_port(self.port, self._process, self._log)

    def stop(self, number: int = 9) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(STOP_TIMEOUT)
            self._process = None

    def kill(self, place: StreamPosition) -> None:
        """End the server at once, but not in the moment in which it writes down what it has delivered of a queue.

        2.9 empties the file first: killed just then (once in some 200 times), it begins anew with all that there ever was.
        """
        assert self._process
        while True:
            self._process.send_signal(signal.SIGSTOP)
            os.waitpid(self._process.pid, os.WUNTRACED)
            if self._deliveries_of(place).stat().st_size:
                break
            self._process.send_signal(signal.SIGCONT)
        self.stop()

    def deliveries(self, place: StreamPosition) -> int:
        """Count the deliveries that are on the disk, of those of one queue (nats-server's store.go, encodeConsumerState)."""
        file = self._deliveries_of(place)
        stored = file.read_bytes() if file.exists() else b""
        return stored[4] if stored else 0  # magic, version, two acknowledged; and what is below 128 is one byte

    def forget_deliveries(self, place: StreamPosition) -> None:
        """Be as if it had been killed before it wrote down what it has delivered, which is a tenth of a second later."""
        self._deliveries_of(place).unlink()

    def _deliveries_of(self, place: StreamPosition) -> Path:
        return self.directory / "jetstream/$G/streams" / place.stream / "obs" / place.consumer / "o.dat"

    def _program(self) -> str:
        return shutil.which("nats-server", path=f"{os.environ['PATH']}:/usr/sbin") or "nats-server"
