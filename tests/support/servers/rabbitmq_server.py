"""A private RabbitMQ server."""

import os
import pwd
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.servers.debian_packages import debian, need
from tests.support.servers.server import (
    IN_NAMESPACE,
    MAX_MESSAGE_SIZE,
    end_namespace,
    free_port,
    running,
    wait_for_port,
)
from tests.support.waiting import BROKER

# The package's /usr/sbin/rabbitmq-server goes through su; this is what it calls.
RABBITMQ_SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")

# Without busy waiting: as its documentation advises where a server shares the cores with others.
ERLANG_FLAGS = "+sbwt none +sbwtdcpu none +sbwtdio none"


@contextmanager
def rabbitmq(suite: str = "", config: str = "", plugins: str = "") -> Iterator["RabbitServer"]:
    """Run a RabbitMQ server: the one installed here, or that of a suite of Debian."""
    for program, package in (("rabbitmq-server", "rabbitmq-server"), *([("bwrap", "bubblewrap")] if suite else [])):
        need(program, package)
    root = debian(suite, "rabbitmq-server") if suite else None
    with (
        tempfile.TemporaryDirectory(prefix="trio-pilot-rabbitmq-") as directory,
        running(RabbitServer(Path(directory), root, config, plugins)) as server,
    ):
        yield server


class RabbitServer:
    """A RabbitMQ node and its epmd, from a root directory of another suite or from the packages installed here."""

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
        # From the main thread: the server ends with the thread that starts it.
        if self._epmd is None:
            self._lay_out()
            self._epmd = self._spawn("epmd", "-address", "127.0.0.1", "-port", self._env["ERL_EPMD_PORT"])
        self._server = self._spawn(*self._inside(), str(RABBITMQ_SERVER))

    def wait_until_ready(self) -> None:
        assert self._server
        wait_for_port(self.port, self._server, self._log)
        self.version = self.version or self._ask_version()

    def kill(self) -> None:
        """Kill the node, after what it has confirmed and the queues it has declared are on its disk."""
        assert self._server
        # It writes new queues to the disk late; from 4.2 on there is no Mnesia.
        self.evaluate("catch mnesia:sync_log(), [dets:sync(T) || T <- dets:all()].")
        end_namespace(self._server)

    def stop(self) -> None:
        for process in (self._server, self._epmd):
            if process is not None:
                end_namespace(process)
        self._server = self._epmd = None

    def evaluate(self, erlang: str) -> str:
        """Evaluate Erlang in the node, which takes milliseconds, and return the value."""
        # -R: the node gives it a name. The usual name is taken until the node has noticed that the previous call is over.
        command = ["erl_call", "-R", "-sname", self._node, "-c", self._cookie, "-e"]
        source = " ".join(erlang.split()) + "\n"
        done = subprocess.run(command, env=self._env, input=source, capture_output=True, text=True, timeout=BROKER.seconds)
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
        """Return the numbers of messages in a quorum queue that are ready, and that are delivered and unsettled."""
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
            "RUNNING_UNDER_SYSTEMD": "yes",  # the script then execs the server, so that they have one pid
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
        """Return the start of a command that runs in the root directory, if there is one."""
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
