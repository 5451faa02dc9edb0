"""Every setting, in one table: its name, default, meaning and check.

A setting's value comes from a flag, an environment variable, the TOML file, or its default, in that order. The variables are
those of ewms-pilot (its quirks included) and more of the same form; they are also read from EWMS's envfile, as data.
"""

import dataclasses
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trio_pilot.brokers import DEAD_LETTERS, LONGEST_LEASE, QueueAddress, queue_files
from trio_pilot.brokers.addresses import file_of
from trio_pilot.brokers.kinds import EXAMPLES, KINDS, kind_of
from trio_pilot.brokers.tokens import is_file
from trio_pilot.errors import SettingsError, map_exceptions
from trio_pilot.files.data_directory import root_in
from trio_pilot.files.trusted_text import read_trusted
from trio_pilot.parsing import (
    Parse,
    arguments,
    boolean,
    cpus,
    directories,
    each,
    extension,
    integer,
    log_level,
    memory,
    moment,
    one_of,
    or_auto,
    path,
    queues,
    seconds,
    seconds_or_none_at_all,
    several_of,
    size,
    text,
    variables,
    words,
)
from trio_pilot.runtimes import APPTAINER_BUILD, APPTAINER_IMAGE, ENVFILE, HOST_ROOT, PRIVILEGES, Limits, Options
from trio_pilot.runtimes.selection import NAMES

CONFIG_FILE = "trio-pilot.toml"
TOKENS = "broker_token", "queue_incoming_auth_token", "queue_outgoing_auth_token"  # the settings that have tokens
PREFIX = "EWMS_PILOT_"
SHUTDOWN_TIME = 5.0  # seconds for the end of a pilot, apart from killing tasks; it usually takes a few tenths
MAX_SHOWN = 80  # characters of a wrong value in a message


def setting(
    default: str | None,
    parse: Parse,
    meaning: str,
    *,
    variables: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """Describe a setting.

    Args:
        default: text of the default, as in the environment; None is no value at all.
        parse: checks a value and converts it.
        meaning: text for the help and the README.
        variables: environment variables, of which the first that is set counts; none: EWMS_PILOT_ and the name in capitals.
        secret: whether the value is never shown.
    """
    return dataclasses.field(
        default_factory=lambda: None if default is None else parse(default),
        metadata={
            "default": default,
            "parse": parse,
            "meaning": meaning,
            "variables": variables,
            "secret": secret,
        },
        repr=not secret,
    )


TASK_TIMEOUT = ("EWMS_PILOT_TASK_TIMEOUT", "EWMS_PILOT_SUBPROC_TIMEOUT")
RUNTIME = ("EWMS_PILOT_RUNTIME", "_EWMS_PILOT_CONTAINER_PLATFORM")
SHM_SIZE = ("_EWMS_PILOT_DOCKER_SHM_SIZE",)

LEASE_MARGIN = 900.0  # seconds for everything that is done with an event besides running its task
MAX_PREFETCH = 65535  # unsettled messages that AMQP allows a consumer


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The checked settings of a pilot."""

    # SECTIONS names the first setting of each section.
    task_image: str = setting("", text, "image of the task container; with bubblewrap an unpacked directory, or /")
    task_args: tuple[str, ...] = setting(
        "",
        arguments,
        "arguments of the task container, with {{INFILE}}, {{OUTFILE}} and {{DATA_HUB}} replaced; no shell is used;"
        " none: the command of the image",
    )
    task_env_json: Mapping[str, str] = setting(
        "{}", variables, "environment variables of the task, as a JSON object", secret=True
    )
    task_timeout: float | None = setting(None, seconds, "time limit of a task, in seconds", variables=TASK_TIMEOUT)
    init_image: str = setting("", text, "image of the init container, which runs once before any event is taken")
    init_args: tuple[str, ...] = setting(
        "",
        arguments,
        "arguments of the init container, with {{DATA_HUB}} replaced; no shell is used; none: the command of the image",
    )
    init_env_json: Mapping[str, str] = setting(
        "{}", variables, "environment variables of the init container, as a JSON object", secret=True
    )
    init_timeout: float | None = setting(None, seconds, "time limit of the init container, in seconds")

    queue_incoming: tuple[str, ...] = setting("", queues, "name of the incoming queue (events); several are joined by `;`")
    queue_incoming_auth_token: tuple[str, ...] = setting("", queues, "token of the incoming queue", secret=True)
    queue_incoming_broker_type: tuple[str, ...] = setting(
        "", each(one_of(*KINDS)), f"broker type of the incoming queue: {', '.join(KINDS)}"
    )
    queue_incoming_broker_address: tuple[str, ...] = setting(
        "", queues, "address of the broker of the incoming queue", secret=True
    )
    queue_outgoing: tuple[str, ...] = setting(
        "", queues, "name of the outgoing queue (outputs); of several, joined by `;`, each gets every output"
    )
    queue_outgoing_auth_token: tuple[str, ...] = setting("", queues, "token of the outgoing queue", secret=True)
    queue_outgoing_broker_type: tuple[str, ...] = setting(
        "", each(one_of(*KINDS)), f"broker type of the outgoing queue: {', '.join(KINDS)}"
    )
    queue_outgoing_broker_address: tuple[str, ...] = setting(
        "", queues, "address of the broker of the outgoing queue", secret=True
    )
    broker: str = setting(
        "",
        text,
        f"broker of queues without an address of their own: {EXAMPLES}, or a queue file",
        secret=True,
    )
    broker_token: str = setting(
        "",
        text,
        "token of queues without one of their own; @/FILE or @./FILE: read from the file, again when it changes",
        secret=True,
    )
    broker_patience: float = setting(
        "60",
        seconds_or_none_at_all,
        "time for which a broker may be unreachable while nothing is run or sent, also at the start, in seconds",
    )
    wire: str = setting("ewms", one_of("ewms", "raw"), "format of message bodies: ewms, or raw for bytes as they are")
    max_payload: int = setting("134217728", integer(1), "largest size of an unpacked event, or of an output, in bytes")

    max_concurrent_tasks: int = setting(
        "1",
        or_auto(integer(1, MAX_PREFETCH)),
        "number of slots, that is, of tasks run at once; auto: as many as the job's CPUs and memory allow",
    )
    cpus_per_task: float | None = setting(
        None,
        cpus,
        "number of CPUs, and so of threads, for each task; none: its share of the job's CPUs, or 1 if the slots are auto",
    )
    pin_tasks: bool = setting("false", boolean, "pin each task to CPUs of its own, if this job has CPUs of its own")
    prefetch: int = setting(
        "1",
        integer(1, MAX_PREFETCH),
        "most events that the pilot has at once: taken ahead, run, or being sent; at least the number of slots",
    )
    timeout_queue_incoming: float = setting(
        "1", seconds, "time without an event for a free slot, after which the pilot ends, in seconds"
    )
    timeout_queue_wait_for_first_message: float | None = setting(
        None, seconds, "time without a first event, after which the pilot ends, in seconds; none: --timeout-queue-incoming"
    )
    stop_listening_on_task_error: bool = setting("true", boolean, "take no more events after a task has failed")
    okay_errors: frozenset[str] = setting("", words, "names of errors after which the pilot goes on taking events")
    quarantine_time: float = setting(
        "0",
        seconds_or_none_at_all,
        "time for which the pilot holds its job's slot after an error (of a task, this node or a broker), in seconds",
    )
    max_attempts: int = setting("20", integer(1), "failures after which an event becomes a dead letter")
    retry_delay: float = setting(
        "1",
        seconds_or_none_at_all,
        "delay before a failed event is tried again, in seconds; doubled each time, up to 30",
    )
    until: float | None = setting(
        None, moment, "end of the job's slot, as 2027-01-31T18:30 or Unix time; the earliest end that is known counts"
    )
    max_runtime: float | None = setting(
        None, seconds, "longest run time of the pilot, in seconds; the earliest end that is known counts"
    )
    grace: float = setting(
        "auto",
        or_auto(seconds_or_none_at_all),
        "time for running tasks to end after SIGTERM or Ctrl-C, in seconds; auto: as much as HTCondor allows, else 10",
    )
    kill_grace: float = setting("2", seconds_or_none_at_all, "time between SIGTERM and SIGKILL of a container, in seconds")
    settle_grace: float = setting(
        "10", seconds, "time to send finished outputs and settle their events after SIGTERM or Ctrl-C, in seconds"
    )

    runtime: str = setting(
        "auto",
        one_of("auto", *NAMES),
        "runtime of containers: docker, podman, apptainer, bubblewrap, process (no container at all), or auto",
        variables=RUNTIME,
    )
    task_memory: int | None = setting(
        None, or_auto(memory), "memory limit of a task, in bytes or as 512m or 2g; auto: its share of the job's memory"
    )
    task_cpus: float | None = setting(None, cpus, "CPU limit of a task, in CPUs")
    task_pids: int | None = setting(
        None,
        or_auto(integer(1)),
        "largest number of processes and threads of a task; auto: its share of those that the job may have",
    )
    task_network: str = setting(
        "", text, "network of the tasks: none (not with process), or, with docker or podman, the name of one, such as host"
    )
    task_user: str = setting("", text, "user of the tasks with docker or podman, as UID[:GID]; none: that of the image")
    task_privileges: frozenset[str] = setting(
        "",
        several_of(*PRIVILEGES),
        "what tasks may do beyond what is safe, separated by commas: namespaces (with bubblewrap: make some of their own,"
        " as nested containers do), set-uid (with docker or podman: become another user, as by sudo),"
        " or capabilities such as NET_RAW (with docker or podman)",
    )
    data_hub: str = setting(
        "writable",
        one_of("writable", "read-only"),
        "whether tasks may write to the data hub: writable, or read-only, for the init container alone (not with process)",
    )
    engine_patience: float = setting(
        "60",
        seconds_or_none_at_all,
        "time for which the daemon of docker or podman may be unreachable before the pilot gives up, in seconds",
    )
    data_dir_parent_path_on_host: Path = setting(".", path, "directory in which ewms-pilot-data/ is made")
    dead_letter_directory: Path | None = setting(
        None,
        path,
        "directory for dead letters that the broker does not take, if it outlasts the batch job;"
        " none: ewms-pilot-dead-letters/ beside ewms-pilot-data/",
    )
    infile_ext: str = setting(".in", extension, "file name extension of the input file")
    outfile_ext: str = setting(
        ".out", extension, "file name extension of the output file; .json: the output is parsed, and sent as JSON"
    )
    external_directories: tuple[Path, ...] = setting(
        "", directories, "directories, separated by commas, that tasks may read at the same paths"
    )
    max_output: int = setting("16m", size, "bytes kept of a task's stdout, and as many of its stderr")
    keep_all_task_files: bool = setting("false", boolean, "keep the directory of every task")
    container_debug: bool = setting("false", boolean, "run the container runtime with debug output")
    apptainer_build_workdir: Path = setting(
        "/var/tmp",  # noqa: S108 -- upstream's
        path,
        "directory in which apptainer builds images",
        variables=APPTAINER_BUILD,
    )
    apptainer_image_directory_must_be_present: bool = setting(
        "true", boolean, "accept only an unpacked directory as an image of apptainer", variables=APPTAINER_IMAGE
    )
    docker_shm_size: int | None = setting(
        None, size, "size of /dev/shm with docker or podman, in bytes or as 512m or 2g", variables=SHM_SIZE
    )

    config: Path | None = setting(None, path, f"TOML file of settings; none: {CONFIG_FILE}, if it exists")
    cl_log: str = setting("INFO", log_level, "log level of the pilot")
    cl_log_third_party: str = setting("WARNING", log_level, "log level of the libraries that the pilot uses")
    dump_task_output: bool = setting(
        "false", boolean, "copy stdout and stderr of each task, not only of one that has failed, to those of the pilot"
    )
    htchirp: bool = setting("false", boolean, "report to HTCondor by chirp")
    htchirp_dest: str = setting(
        "JOB_ATTR",
        one_of("JOB_ATTR", "JOB_EVENT_LOG", "JOB_ATTR_DELAYED"),
        "destination of chirp reports: job attributes (JOB_ATTR), the job event log (JOB_EVENT_LOG),"
        " or job attributes that HTCondor updates every few minutes, for many pilots (JOB_ATTR_DELAYED)",
    )
    htchirp_ratelimit_interval: float = setting(
        "60", seconds_or_none_at_all, "shortest time between two chirp reports of counts, in seconds"
    )

    def __post_init__(self) -> None:
        if self.quarantine_time and not self.stop_listening_on_task_error:
            raise SettingsError(
                "EWMS_PILOT_QUARANTINE_TIME holds the slot of a pilot that stops on an error:"
                " set EWMS_PILOT_STOP_LISTENING_ON_TASK_ERROR to true as well, or leave it out"
            )

    def check_complete(self) -> None:
        """Raise SettingsError if a setting that every pilot needs is missing."""
        self.check_commands()
        self.incoming()
        self.outgoing()

    def check_commands(self) -> None:
        """Raise SettingsError if there is nothing to run: no arguments, and no image that may have a command of its own."""
        if not self.task_args and self.task_image in HOST_ROOT:
            raise SettingsError("EWMS_PILOT_TASK_ARGS must say what to run for each event: set it, or give --task-args")
        if self.init_image in HOST_ROOT[1:] and not self.init_args:
            raise SettingsError("EWMS_PILOT_INIT_ARGS must say what to run in EWMS_PILOT_INIT_IMAGE: set it, or neither")

    @property
    def first_event_timeout(self) -> float:
        """Return the seconds to wait for the first event."""
        return self.timeout_queue_wait_for_first_message or self.timeout_queue_incoming

    @property
    def shutdown_time(self) -> float:
        """Return the seconds from the end of the tasks' time to that of the pilot: to kill, settle, clean up and report."""
        return self.kill_grace + SHUTDOWN_TIME

    @property
    def limits(self) -> Limits:
        """Return the limits of each container."""
        return Limits(self.task_memory, self.task_cpus, self.task_pids)

    @property
    def runtime_options(self) -> Options:
        """Return the options of the runtime."""
        return Options(
            kill_grace=self.kill_grace,
            network=self.task_network,
            user=self.task_user,
            shm_size=self.docker_shm_size,
            engine_patience=self.engine_patience,
            debug=self.container_debug,
            build_directory=self.apptainer_build_workdir,
            data_parent=self.data_dir_parent_path_on_host,
            only_directories=self.apptainer_image_directory_must_be_present,
            privileges=self.task_privileges,
            hidden=tuple(self._hidden()),
            protects_hub=self.has_read_only_hub,
        )

    @property
    def has_read_only_hub(self) -> bool:
        """Whether tasks, unlike the init container, may only read the data hub."""
        return self.data_hub == "read-only"

    def tokens_of(self, name: str) -> tuple[str, ...]:
        """Return the tokens of one of the settings TOKENS."""
        value: str | tuple[str, ...] = getattr(self, name)
        return (value,) if isinstance(value, str) else value

    @property
    def token_files(self) -> list[Path]:
        """The files that have tokens."""
        return [Path(token[1:]) for name in TOKENS for token in self.tokens_of(name) if is_file(token)]

    def _hidden(self) -> Iterator[Path]:
        """Yield what no container may see: secrets of the pilot, and files of other events."""
        yield from (self.config or Path(CONFIG_FILE), Path(ENVFILE), *self.token_files)
        for address in {*self.queue_incoming_broker_address, *self.queue_outgoing_broker_address, ""}:
            with suppress(SettingsError):  # reported where the queues are opened
                if kind_of(address or self.broker).is_file:
                    yield from queue_files.all_of(file_of(address or self.broker))
        yield from (root_in(self.data_dir_parent_path_on_host), self.dead_letters)

    def incoming(self) -> list[QueueAddress]:
        """Return the addresses of the incoming queues. Raises SettingsError if none is set."""
        return self._queues("incoming")

    def outgoing(self) -> list[QueueAddress]:
        """Return the addresses of the outgoing queues. Raises SettingsError if none is set."""
        return self._queues("outgoing")

    @property
    def dead_letters(self) -> Path:
        """Return the directory for dead letters that the broker does not take."""
        return self.dead_letter_directory or self.data_dir_parent_path_on_host / DEAD_LETTERS

    @property
    def max_events_at_hand(self) -> int:
        """Return the most events to have at once: one for each slot, so that all fill at once, or more if `prefetch` is."""
        return max(self.prefetch, self.max_concurrent_tasks)

    @property
    def lease(self) -> float:
        """Return the seconds for which an event may be unsettled: while it waits for a slot, is run, sent, or held back."""
        if self.task_timeout is None:
            return LONGEST_LEASE
        turns = math.ceil(self.max_events_at_hand / self.max_concurrent_tasks)
        return min(turns * self.task_timeout + LEASE_MARGIN, LONGEST_LEASE)

    def at_broker(self, queue: str) -> QueueAddress:
        """Return the address of a queue at the broker of all queues. Raises SettingsError if the name cannot be one."""
        if not queue or queue != queue.strip() or ";" in queue:
            raise SettingsError(f"QUEUE must name one queue, with no ; in it and no space around it, not {queue!r}")
        return self._queue_address(queue, "", self.broker, self.broker_token)

    def _queues(self, direction: str) -> list[QueueAddress]:
        names = getattr(self, f"queue_{direction}")
        if not all(names):
            which = "a queue" if len(names) == 1 else f"a queue at each of its {len(names)} positions"
            raise SettingsError(f"{PREFIX}QUEUE_{direction.upper()} must name {which}: set it, or give --queue-{direction}")
        addresses, kinds, tokens = (
            self._aligned(f"queue_{direction}_{what}", len(names))
            for what in ("broker_address", "broker_type", "auth_token")
        )
        spare = self.max_events_at_hand - self.max_concurrent_tasks
        return [
            replace(self._queue_address(name, kind, address or self.broker, token or self.broker_token), spare=spare)
            for name, kind, address, token in zip(names, kinds, addresses, tokens, strict=True)
        ]

    def _aligned(self, name: str, count: int) -> tuple[str, ...]:
        """Return one value for each of `count` queues: either each has its own, or all have the same."""
        values: tuple[str, ...] = getattr(self, name)
        if len(values) not in (1, count):
            raise SettingsError(f"{PREFIX}{name.upper()} must have 1 or {count} values, one a queue, not {len(values)}")
        return values * count if len(values) == 1 else values

    def _queue_address(self, queue: str, kind: str, address: str, token: str) -> QueueAddress:
        broker = KINDS[kind] if kind else kind_of(address)
        with map_exceptions({UnicodeEncodeError: SettingsError}, f"a queue's name must be UTF-8, not {queue!r}"):
            queue.encode()
        return QueueAddress(queue, broker.name, address or broker.default_address, token, self.dead_letters)


FIELDS: Mapping[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(Settings)}

SECTIONS = {
    "task_image": "Task",
    "queue_incoming": "Queues and brokers",
    "max_concurrent_tasks": "Events",
    "runtime": "Runtime and files",
    "config": "Reports",
}


def sections() -> Iterator[tuple[str, str]]:
    """Yield each setting with its section before it, in the order of the table."""
    section = ""
    for name in FIELDS:
        section = SECTIONS.get(name, section)
        yield section, name


def variables_of(name: str) -> tuple[str, ...]:
    """Return the environment variables of a setting; the first that is set counts."""
    return FIELDS[name].metadata["variables"] or (PREFIX + name.upper(),)


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def environment(environ: Mapping[str, str], directory: Path) -> Mapping[str, str]:
    """Return the environment, updated from the envfile in `directory` as if that had been sourced.

    Raises:
        SettingsError: there is an envfile that cannot be read.
    """
    return {**environ, **_read_envfile(directory / ENVFILE)}


def load(flags: Mapping[str, Any], environ: Mapping[str, str], directory: Path) -> Settings:
    """Return the settings from all their sources.

    Args:
        flags: values from the command line, by setting; None: not given.
        environ: the mapping that `environment` returns.
        directory: the working directory, in which the TOML file is looked for.

    Raises:
        SettingsError: a value or a file is wrong.
    """
    config = flags.get("config") or environ.get(PREFIX + "CONFIG")
    table = _read_toml(path(config)) if config else _read_toml(directory / CONFIG_FILE, optional=True)
    given = {name: _first_given(name, flags, environ, table) for name in FIELDS}
    return Settings(**{name: value for name, value in given.items() if value is not _NOT_GIVEN})


_NOT_GIVEN = object()


def _first_given(name: str, flags: Mapping[str, Any], environ: Mapping[str, str], table: Mapping[str, Any]) -> Any:
    for label, raw in _candidates(name, flags, environ, table):
        if raw is not None and raw != "":
            return _parsed(name, label, raw)
    return _NOT_GIVEN


def _candidates(
    name: str, flags: Mapping[str, Any], environ: Mapping[str, str], table: Mapping[str, Any]
) -> Iterable[tuple[str, Any]]:
    yield flag_of(name), flags.get(name)
    for variable in variables_of(name):
        yield variable, environ.get(variable)
    yield f"{name} in the TOML file", table.get(name)


def _parsed(name: str, label: str, raw: Any) -> Any:
    facts = FIELDS[name].metadata
    try:
        return facts["parse"](raw)
    except ValueError as error:
        found = " (the value is not shown)" if facts["secret"] else f", not {_short(raw)}"
        raise SettingsError(f"{label} {error}{found}") from None


def _short(raw: Any) -> str:
    shown = repr(raw)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."


def _read_envfile(file: Path) -> Mapping[str, str]:
    """Read the `export NAME='value'` lines that EWMS writes, as data."""
    try:
        tokens = shlex.split(read_trusted(file), comments=True)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read {file}: {error}") from error
    pairs = (token.partition("=") for token in tokens)
    return {name: value for name, equals, value in pairs if equals and name.isidentifier()}


def _read_toml(file: Path, *, optional: bool = False) -> Mapping[str, Any]:
    try:
        content = read_trusted(file) if optional else file.read_text()
        import tomllib  # few pilots have such a file

        table = tomllib.loads(content)
    except FileNotFoundError:
        if optional:
            return {}
        raise SettingsError(f"there is no settings file {file}") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read the settings file {file}: {error}") from error
    values = {key.replace("-", "_"): value for key, value in table.items()}
    known = FIELDS.keys() - {"config"}
    for key in values.keys() - known:
        raise SettingsError(f"{file} has {key!r}, which is no setting{_did_you_mean(key, known)}")
    return values


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Return a warning for each EWMS_PILOT_ variable that is not a setting, with the most similar one that is."""
    known = [variable for name in FIELDS for variable in variables_of(name)]
    found = (name for name in environ if name.startswith((PREFIX, "_" + PREFIX)))
    return [f"{name} is no setting{_did_you_mean(name, known)}" for name in found if name not in known]


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    import difflib  # needed only after a mistake

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else ""


def markdown_table() -> str:
    """Return the README's table of all settings."""
    lines, last = ["| flag | variable | default | meaning |", "|---|---|---|---|"], ""
    for section, name in sections():
        if section != last:
            lines.append(f"| **{section}** | | | |")
        facts, last = FIELDS[name].metadata, section
        variables = ", ".join(f"`{variable.removeprefix(PREFIX)}`" for variable in variables_of(name))
        default = f"`{facts['default']}`" if facts["default"] else ""
        lines.append(f"| `{flag_of(name)}` | {variables} | {default} | {facts['meaning']} |")
    return "\n".join(lines)
