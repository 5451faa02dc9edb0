"""Every setting, in one table: its name, default, meaning and check.

A setting's value comes from a flag, an environment variable, the TOML file, or its default, in that order. The variables are
those of ewms-pilot (its quirks included) and more of the kind; they are also read from EWMS's envfile, as data.
"""

import dataclasses
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trio_pilot.brokers import DEAD_LETTERS, LONGEST_LEASE, QueueAddress
from trio_pilot.brokers.kinds import EXAMPLES, KINDS, kind_of
from trio_pilot.errors import SettingsError, map_exceptions
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
    size,
    text,
    variables,
    words,
)
from trio_pilot.runtimes import APPTAINER_BUILD, APPTAINER_IMAGE, ENVFILE, Limits, Options
from trio_pilot.runtimes.selection import NAMES

CONFIG_FILE = "trio-pilot.toml"
PREFIX = "EWMS_PILOT_"
LAST_STEPS = 5.0  # seconds that a pilot needs in the end, but for the killing: a few tenths as a rule
MOST_SHOWN = 80  # characters of a wrong value in a message


def setting(
    default: str | None,
    parse: Parse,
    meaning: str,
    *,
    variables: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """Describe a setting; its default is written as a person would write it, None is no value at all.

    Its variable is EWMS_PILOT_ and its name in capitals; of other `variables`, the first that is set counts. The value of
    a `secret` is never shown.
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

LEASE_MARGIN = 900.0  # seconds for all that is done with an event besides running it
MOST_AHEAD = 65535  # messages that AMQP lets a consumer have unsettled


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the pilot was told, checked."""

    # In SECTIONS each part is named by its first setting.
    task_image: str = setting("", text, "image of the task container; bubblewrap: an unpacked directory, or /")
    task_args: tuple[str, ...] = setting(
        "", arguments, "its arguments, with {{INFILE}}, {{OUTFILE}}, {{DATA_HUB}}; no shell ever sees them"
    )
    task_env_json: Mapping[str, str] = setting("{}", variables, "JSON object of its environment variables", secret=True)
    task_timeout: float | None = setting(None, seconds, "seconds a task may take", variables=TASK_TIMEOUT)
    init_image: str = setting("", text, "image of the init container, run once before any event is taken")
    init_args: tuple[str, ...] = setting("", arguments, "its arguments, with {{DATA_HUB}}")
    init_env_json: Mapping[str, str] = setting("{}", variables, "JSON object of its environment variables", secret=True)
    init_timeout: float | None = setting(None, seconds, "seconds it may take")

    queue_incoming: tuple[str, ...] = setting("", queues, "queue of events; a `;`-joined list is several")
    queue_incoming_auth_token: tuple[str, ...] = setting("", queues, "its token", secret=True)
    queue_incoming_broker_type: tuple[str, ...] = setting("", each(one_of(*KINDS)), f"its broker: {', '.join(KINDS)}")
    queue_incoming_broker_address: tuple[str, ...] = setting("", queues, "its broker's address", secret=True)
    queue_outgoing: tuple[str, ...] = setting("", queues, "queue of outputs; each output goes to all of a list")
    queue_outgoing_auth_token: tuple[str, ...] = setting("", queues, "its token", secret=True)
    queue_outgoing_broker_type: tuple[str, ...] = setting("", each(one_of(*KINDS)), f"its broker: {', '.join(KINDS)}")
    queue_outgoing_broker_address: tuple[str, ...] = setting("", queues, "its broker's address", secret=True)
    broker: str = setting(
        "",
        text,
        f"address of the broker of queues that name none: {EXAMPLES}, or a queue file",
        secret=True,
    )
    broker_token: str = setting(
        "", text, "token for that broker; @/FILE or @./FILE: that of a file, read anew when it changes", secret=True
    )
    broker_patience: float = setting(
        "60", seconds_or_none_at_all, "seconds a broker may be away while nothing is run or sent, also at the start"
    )
    wire: str = setting("ewms", one_of("ewms", "raw"), "format of message bodies: ewms, or raw for bytes as they are")
    max_payload: int = setting("134217728", integer(1), "bytes an unpacked event, or an output, may have")

    max_concurrent_tasks: int = setting(
        "1", or_auto(integer(1, MOST_AHEAD)), "slots: tasks run at once; auto: as many as there are CPUs and memory for"
    )
    cpus_per_task: float | None = setting(
        None, cpus, "CPUs, and so threads, that a task is meant to use; none: its share of those there are; with auto: 1"
    )
    pin_tasks: bool = setting("false", boolean, "give each task CPUs of its own, where this job has CPUs of its own")
    prefetch: int = setting(
        "1", integer(1, MOST_AHEAD), "events at hand: taken ahead, run or being sent; never fewer than the slots"
    )
    timeout_queue_incoming: float = setting("1", seconds, "seconds a free slot waits before the pilot ends")
    timeout_queue_wait_for_first_message: float | None = setting(
        None, seconds, "seconds to wait for the first event; none: as for any other"
    )
    stop_listening_on_task_error: bool = setting("true", boolean, "take no more events after a task failed")
    okay_errors: frozenset[str] = setting("", words, "names of errors that are no reason to stop listening")
    quarantine_time: float = setting(
        "0", seconds_or_none_at_all, "seconds to hold the slot after a task, or this node, failed"
    )
    max_attempts: int = setting("20", integer(1), "tries of an event that fails, before it is a dead letter")
    retry_delay: float = setting(
        "1", seconds_or_none_at_all, "seconds before an event that failed is tried again; doubled each time, up to 30"
    )
    until: float | None = setting(None, moment, "when this slot ends, as 2027-01-31T18:30 or Unix time, if not sooner")
    max_runtime: float | None = setting(None, seconds, "seconds after which it ends, if not sooner")
    grace: float = setting(
        "auto",
        or_auto(seconds_or_none_at_all),
        "seconds running tasks have after SIGTERM or Ctrl-C; auto: what HTCondor leaves for them, else 10",
    )
    kill_grace: float = setting("2", seconds_or_none_at_all, "seconds a container has between SIGTERM and SIGKILL")
    settle_grace: float = setting("10", seconds, "seconds to send and settle what is done, when told to stop")

    runtime: str = setting(
        "auto",
        one_of("auto", *NAMES),
        "what runs containers: docker, podman, apptainer, bubblewrap, process (no container at all), or auto",
        variables=RUNTIME,
    )
    task_memory: int | None = setting(None, or_auto(memory), "bytes of memory a task may use: 512m, 2g; auto: its share")
    task_cpus: float | None = setting(None, cpus, "CPUs a task may use")
    task_pids: int | None = setting(None, integer(1), "processes and threads a task may have")
    task_network: str = setting("", text, "docker, podman: network of the tasks, such as none or host")
    task_user: str = setting("", text, "docker, podman: user of the tasks, UID[:GID]; none: the image's")
    engine_patience: float = setting(
        "60", seconds_or_none_at_all, "docker, podman: seconds their daemon may be away before the pilot gives up"
    )
    data_dir_parent_path_on_host: Path = setting(".", path, "directory in which ewms-pilot-data/ is made")
    dead_letter_directory: Path | None = setting(
        None, path, "directory for dead letters that the broker does not take; none: ewms-pilot-dead-letters/ beside that"
    )
    infile_ext: str = setting(".in", extension, "extension of the input file")
    outfile_ext: str = setting(".out", extension, "extension of the output file; .json is parsed and sent as JSON")
    external_directories: tuple[Path, ...] = setting(
        "", directories, "comma-separated directories that tasks may read, at the same path"
    )
    max_output: int = setting("16m", size, "bytes kept of what a task writes to stdout, and to stderr")
    keep_all_task_files: bool = setting("false", boolean, "leave the directory of every task")
    container_debug: bool = setting("false", boolean, "have the runtime say more")
    apptainer_build_workdir: Path = setting(
        "/var/tmp",  # noqa: S108 -- upstream's
        path,
        "where apptainer builds images",
        variables=APPTAINER_BUILD,
    )
    apptainer_image_directory_must_be_present: bool = setting(
        "true", boolean, "accept only an unpacked directory for apptainer", variables=APPTAINER_IMAGE
    )
    docker_shm_size: int | None = setting(None, size, "docker, podman: size of /dev/shm", variables=SHM_SIZE)

    config: Path | None = setting(None, path, f"TOML file of settings; none: {CONFIG_FILE}, where there is one")
    cl_log: str = setting("INFO", log_level, "log level")
    cl_log_third_party: str = setting("WARNING", log_level, "log level of libraries")
    dump_task_output: bool = setting("false", boolean, "copy each task's stdout and stderr to the pilot's")
    htchirp: bool = setting("false", boolean, "report to HTCondor by chirp")
    htchirp_dest: str = setting(
        "JOB_ATTR", one_of("JOB_ATTR", "JOB_EVENT_LOG"), "where: job attributes, or the job event log"
    )
    htchirp_ratelimit_interval: float = setting("60", seconds_or_none_at_all, "seconds between reports of counts")

    def __post_init__(self) -> None:
        if self.quarantine_time and not self.stop_listening_on_task_error:
            raise SettingsError(
                "EWMS_PILOT_QUARANTINE_TIME holds the slot of a pilot that stops on an error:"
                " set EWMS_PILOT_STOP_LISTENING_ON_TASK_ERROR to true as well, or leave it out"
            )

    def check_complete(self) -> None:
        """Raise SettingsError if something is missing that the pilot cannot do without."""
        if not self.task_args:
            raise SettingsError("EWMS_PILOT_TASK_ARGS must say what to run for each event: set it, or give --task-args")
        if self.init_image and not self.init_args:
            raise SettingsError("EWMS_PILOT_INIT_ARGS must say what to run in EWMS_PILOT_INIT_IMAGE: set it, or neither")
        self.incoming()
        self.outgoing()

    @property
    def first_event_timeout(self) -> float:
        """Seconds to wait for the first event."""
        return self.timeout_queue_wait_for_first_message or self.timeout_queue_incoming

    @property
    def last_steps(self) -> float:
        """Seconds from the end of the tasks' time to that of the pilot: to kill, settle, tidy up and report."""
        return self.kill_grace + LAST_STEPS

    @property
    def limits(self) -> Limits:
        """What each container may use."""
        return Limits(self.task_memory, self.task_cpus, self.task_pids)

    @property
    def runtime_options(self) -> Options:
        """What is wanted of the runtime."""
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
        )

    def incoming(self) -> list[QueueAddress]:
        """Where the events are; raises SettingsError if that was not said."""
        return self._queues("incoming")

    def outgoing(self) -> list[QueueAddress]:
        """Where the outputs go; raises SettingsError if that was not said."""
        return self._queues("outgoing")

    @property
    def dead_letters(self) -> Path:
        """Where dead letters go that the broker does not take."""
        return self.dead_letter_directory or self.data_dir_parent_path_on_host / DEAD_LETTERS

    @property
    def most_at_hand(self) -> int:
        """Events to have at hand: as many as there are slots, so that all fill at once, and no more unless told so."""
        return max(self.prefetch, self.max_concurrent_tasks)

    @property
    def lease(self) -> float:
        """Seconds for which an event may be unsettled: while it waits for a slot, is run, sent, or held back."""
        if self.task_timeout is None:
            return LONGEST_LEASE
        turns = math.ceil(self.most_at_hand / self.max_concurrent_tasks)
        return min(turns * self.task_timeout + LEASE_MARGIN, LONGEST_LEASE)

    def at_broker(self, queue: str) -> QueueAddress:
        """Find a queue at the broker of all queues. Raises SettingsError if that is no queue's name."""
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
        spare = self.most_at_hand - self.max_concurrent_tasks
        return [
            replace(self._queue_address(name, kind, address or self.broker, token or self.broker_token), spare=spare)
            for name, kind, address, token in zip(names, kinds, addresses, tokens, strict=True)
        ]

    def _aligned(self, name: str, count: int) -> tuple[str, ...]:
        """Give one value a queue: as many as there are queues, or one for them all."""
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
    """Name the section and each setting in it, in the order of the table."""
    section = ""
    for name in FIELDS:
        section = SECTIONS.get(name, section)
        yield section, name


def variables_of(name: str) -> tuple[str, ...]:
    """Name the environment variables of a setting; the first that is set counts."""
    return FIELDS[name].metadata["variables"] or (PREFIX + name.upper(),)


def flag_of(name: str) -> str:
    """Name the flag of a setting."""
    return "--" + name.replace("_", "-")


def environment(environ: Mapping[str, str], directory: Path) -> Mapping[str, str]:
    """Give the environment, with what the envfile in `directory` says put over it as if it had been sourced.

    Raises:
        SettingsError: there is an envfile, and it cannot be read.
    """
    return {**environ, **_read_envfile(directory / ENVFILE)}


def load(flags: Mapping[str, Any], environ: Mapping[str, str], directory: Path) -> Settings:
    """Put the settings together.

    Args:
        flags: what the command line says, by setting; None is nothing said.
        environ: what `environment` gives.
        directory: the working directory, where a TOML file is looked for.

    Raises:
        SettingsError: a value is wrong, or a file is.
    """
    config = flags.get("config") or environ.get(PREFIX + "CONFIG")
    table = _read_toml(path(config)) if config else _read_toml(directory / CONFIG_FILE, optional=True)
    given = {name: _given(name, flags, environ, table) for name in FIELDS}
    return Settings(**{name: value for name, value in given.items() if value is not _NOTHING})


_NOTHING = object()


def _given(name: str, flags: Mapping[str, Any], environ: Mapping[str, str], table: Mapping[str, Any]) -> Any:
    for label, raw in _candidates(name, flags, environ, table):
        if raw is not None and raw != "":
            return _parsed(name, label, raw)
    return _NOTHING


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
        found = " (what it is now is not shown)" if facts["secret"] else f", not {_short(raw)}"
        raise SettingsError(f"{label} {error}{found}") from None


def _short(raw: Any) -> str:
    shown = repr(raw)
    return shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}..."


def _read_envfile(file: Path) -> Mapping[str, str]:
    """Read the `export NAME='value'` lines that EWMS writes, as data."""
    try:
        tokens = shlex.split(file.read_text(), comments=True)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read {file}: {error}") from error
    pairs = (token.partition("=") for token in tokens)
    return {name: value for name, equals, value in pairs if equals and name.isidentifier()}


def _read_toml(file: Path, *, optional: bool = False) -> Mapping[str, Any]:
    try:
        content = file.read_text()
        import tomllib  # few have such a file

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
        raise SettingsError(f"{file} has {key!r}, which is no setting{_meant(key, known)}")
    return values


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Say of each EWMS_PILOT_ variable that is none of ours, which one may have been meant."""
    known = [variable for name in FIELDS for variable in variables_of(name)]
    ours = (name for name in environ if name.startswith((PREFIX, "_" + PREFIX)))
    return [f"{name} is no setting{_meant(name, known)}" for name in ours if name not in known]


def _meant(word: str, known: Iterable[str]) -> str:
    import difflib  # for those who mistype

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else ""


def markdown_table() -> str:
    """Write the table of all settings that is in the README."""
    lines, last = ["| flag | variable | default | meaning |", "|---|---|---|---|"], ""
    for section, name in sections():
        if section != last:
            lines.append(f"| **{section}** | | | |")
        facts, last = FIELDS[name].metadata, section
        variables = ", ".join(f"`{variable.removeprefix(PREFIX)}`" for variable in variables_of(name))
        default = f"`{facts['default']}`" if facts["default"] else ""
        lines.append(f"| `{flag_of(name)}` | {variables} | {default} | {facts['meaning']} |")
    return "\n".join(lines)
