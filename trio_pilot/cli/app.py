"""The command line: subcommands and flags. Only this module imports cyclopts, which takes half as long to import as Trio."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_type_hints

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.validators import Number

from trio_pilot import __version__
from trio_pilot.cli.load_settings import load_settings
from trio_pilot.errors import SettingsError, UsageError
from trio_pilot.settings import FIELDS, Settings, flag_of, sections

# The settings that each kind of command has flags for.
BROKER_FLAGS = ("broker", "broker_token", "broker_patience", "wire", "max_payload", "config", "cl_log")
DEAD_LETTER_FLAGS = (*BROKER_FLAGS, "dead_letter_directory", "data_dir_parent_path_on_host")
DEMO_FLAGS = ("runtime", "max_concurrent_tasks", "cl_log")

HELP = """Take events from a queue, run one container per event, send its output, and only then acknowledge.

The default command is `run`, whose settings may all be in the environment: `trio-pilot run --help` lists them."""

app = App(name="trio-pilot", help=HELP, version=__version__, help_format="plaintext", suppress_keyboard_interrupt=False)


def _flags_class(names: Iterable[str]) -> Any:
    """Return a class of flags for settings; their values are parsed where those of all other sources are."""
    hints = get_type_hints(Settings)
    groups = {section: Group.create_ordered(section) for section, _ in sections()}
    fields = [
        (name, Annotated[(bool if hints[name] is bool else str) | None, _flag(name, groups[section])], None)
        for section, name in sections()
        if name in names
    ]
    # cyclopts makes flags of the fields of a class only if the class is not in the standard library's `types`.
    flags = dataclasses.make_dataclass("Flags", fields, frozen=True, namespace={"__module__": __name__})
    return Annotated[flags | None, Parameter(name="*")]


def _flag(name: str, group: Group) -> Parameter:
    facts = FIELDS[name].metadata
    default = f" [{facts['default']}]" if facts["default"] else ""
    return Parameter(
        name=flag_of(name),
        help=f"{facts['meaning']}{default}",
        group=group,
        metavar="VALUE",
        allow_leading_hyphen=True,
        show_default=False,
        show_env_var=False,
    )


if TYPE_CHECKING:
    AllFlags: TypeAlias = Any
    BrokerFlags: TypeAlias = Any
    DeadLetterFlags: TypeAlias = Any
    DemoFlags: TypeAlias = Any
else:
    AllFlags = _flags_class(FIELDS)
    BrokerFlags = _flags_class(BROKER_FLAGS)
    DeadLetterFlags = _flags_class(DEAD_LETTER_FLAGS)
    DemoFlags = _flags_class(DEMO_FLAGS)


@app.command
def run(*, flags: AllFlags = None) -> int:
    """Run the pilot: take events until the queue stays empty.

    A setting comes from its flag, its environment variable (for `--task-args`, EWMS_PILOT_TASK_ARGS), a TOML file
    (task_args), or its default, shown in brackets. The README has a table of all settings.
    """
    from trio_pilot.cli.run import run

    return run(_settings(flags))


@app.command
def send(
    queue: str,
    files: Annotated[tuple[str, ...], Parameter(allow_leading_hyphen=True, show_default=False)] = (),
    /,
    *,
    lines: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    flags: BrokerFlags = None,
) -> int:
    """Send events to a queue.

    Parameters
    ----------
    queue
        Name of the queue.
    files
        Files to send, one event each: .json as its value, text as text, anything else as bytes.
        `-` (the default, for stdin) and .jsonl files have an event on each line, as JSON.
    lines
        Read every file as JSON lines, one event each.
    """
    from trio_pilot.cli.send import send

    for name in files:
        if name.startswith("-") and name != "-":
            raise SettingsError(f"Unknown option: {name}.")
    return send(_settings(flags), queue, files or ("-",), lines=lines)


@app.command
def receive(
    queue: str,
    /,
    *,
    to: Annotated[Path | None, Parameter(metavar="DIRECTORY")] = None,
    count: Annotated[int | None, Parameter(metavar="NUMBER")] = None,
    idle: Annotated[float, Parameter(metavar="SECONDS")] = 1.0,
    unique: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    flags: BrokerFlags = None,
) -> int:
    """Receive messages from a queue, as JSON lines on stdout; each is acknowledged once it is written.

    Parameters
    ----------
    queue
        Name of the queue.
    to
        Directory for messages, each in a file of its own, instead of stdout.
    count
        Number of messages after which to end.
    idle
        Time without a message after which to end, in seconds; `inf` is never.
    unique
        Drop messages whose id is among those of the last 100 000, or of the files in the directory.
    """
    from trio_pilot.cli.receive import ReceiveOptions, receive

    return receive(_settings(flags), queue, ReceiveOptions(to, count, idle, unique))


dead_letters = App(name="dead-letters", help="List, show, replay or run dead letters: events that have failed too often.")
app.command(dead_letters)


@dead_letters.default
def list_dead_letters(
    queue: str,
    /,
    *,
    json: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    flags: DeadLetterFlags = None,
) -> int:
    """List the dead letters of a queue, without changing them.

    Parameters
    ----------
    queue
        Name of the queue from which the events came.
    json
        Print each dead letter as a JSON object on a line.
    """
    from trio_pilot.cli.dead_letters import show_list

    return show_list(_settings(flags), queue, as_json=json)


@dead_letters.command(name="show")
def show_dead_letter(queue: str, message_id: str, /, *, flags: DeadLetterFlags = None) -> int:
    """Show a dead letter as JSON: why it failed, where and when, and its event.

    Parameters
    ----------
    queue
        Name of the queue from which the event came.
    message_id
        Id of the dead letter, as listed.
    """
    from trio_pilot.cli.dead_letters import show

    return show(_settings(flags), queue, message_id)


@dead_letters.command(name="replay")
def replay_dead_letters(
    queue: str,
    message_ids: Annotated[tuple[str, ...], Parameter(show_default=False)] = (),
    /,
    *,
    every: Annotated[bool, Parameter(name="--all", negative="", show_default=False)] = False,
    flags: DeadLetterFlags = None,
) -> int:
    """Send dead letters back to their queue; their attempts are counted from the start again.

    Parameters
    ----------
    queue
        Name of the queue from which the events came, and to which they go back.
    message_ids
        Ids of the dead letters, as listed.
    every
        Replay all dead letters that are listed.
    """
    from trio_pilot.cli.dead_letters import replay

    return replay(_settings(flags), queue, message_ids, every=every)


@dead_letters.command(name="run")
def run_dead_letter(queue: str, message_id: str, /, *, flags: AllFlags = None) -> int:
    """Run the task for a dead letter on this machine, with the settings of `run`; the dead letter stays where it is.

    The output of the task is shown, and its exit code is that of the command; its output file is not sent.

    Parameters
    ----------
    queue
        Name of the queue from which the event came.
    message_id
        Id of the dead letter, as listed.
    """
    from trio_pilot.cli.dead_letters import run

    return run(_settings(flags), queue, message_id)


@app.command
def check(*, flags: AllFlags = None) -> int:
    """Check what works with these settings and what does not, and print how to correct it."""
    from trio_pilot.cli.check import check

    return check(lambda: _settings(flags))


@app.command
def condor_submit(
    *,
    pilots: Annotated[int, Parameter(metavar="NUMBER", validator=Number(gte=1))] = 1,
    cpus: Annotated[int, Parameter(metavar="NUMBER", validator=Number(gte=1), help="CPUs of each pilot.")] = 1,
    memory: Annotated[str, Parameter(metavar="BYTES")] = "2g",
    disk: Annotated[str, Parameter(metavar="BYTES")] = "4g",
    time: Annotated[float | None, Parameter(metavar="SECONDS", validator=Number(gt=0))] = None,
    executable: Annotated[Path | None, Parameter(metavar="FILE")] = None,
    container_image: Annotated[str, Parameter(metavar="IMAGE", show_default=False)] = "",
    cron: Annotated[str, Parameter(metavar="FIELDS", show_default=False)] = "",
    transfer: Annotated[tuple[Path, ...], Parameter(metavar="FILE", negative="", show_default=False)] = (),
    flags: AllFlags = None,
) -> int:
    """Print a submit file, for condor_submit, of HTCondor jobs that run pilots with these settings.

    Parameters
    ----------
    pilots
        Number of pilots to start.
    memory
        Memory of each pilot, such as 2g.
    disk
        Scratch disk of each pilot, such as 4g.
    time
        Time limit of a pilot, in seconds.
    executable
        trio-pilot as one file [the running program, if it is one file].
    container_image
        Image that starts trio-pilot, or that has what the executable needs.
    cron
        Times at which pilots are started again and again, as the five fields of a crontab.
    transfer
        File to transfer with the job; may be repeated.
    """
    from trio_pilot.cli.condor_submit import Request, condor_submit

    request = Request(pilots, cpus, memory, disk, time, executable, container_image, cron, transfer)
    return condor_submit(_settings(flags), _given(flags), request)


@app.command
def demo(*, flags: DemoFlags = None) -> int:
    """Run a small sky scan as an example: send events, run a task for each, and show the best pixel.

    The demo needs no settings, no server and no network, and leaves no files behind.
    """
    from trio_pilot.cli.demo import demo

    return demo(_given(flags))


def call(argv: Sequence[str]) -> int:
    """Run the command of a command line, and return its exit code. Raises UsageError if the command line is wrong."""
    try:
        return app(_with_command(argv), exit_on_error=False, print_error=False, result_action="return_value") or 0
    except CycloptsError as error:
        raise UsageError(" ".join(str(error).split())) from error


def _with_command(argv: Sequence[str]) -> Sequence[str]:
    """Return the arguments with `run` before them if they name no command."""
    first = argv[0] if argv else "--"
    return ["run", *argv] if first.startswith("-") and first not in ("--help", "-h", "--version") else argv


def _given(flags: Any) -> Mapping[str, Any]:
    return {name: value for name, value in dataclasses.asdict(flags).items() if value is not None} if flags else {}


def _settings(flags: Any) -> Settings:
    return load_settings(_given(flags))
