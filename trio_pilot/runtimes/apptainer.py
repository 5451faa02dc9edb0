"""The runtime by the apptainer command (1.1 and later): nearly everything is the container's own, without privileges.

A container is a process tree below the pilot: apptainer's starter, the first process of a PID namespace, the payload. The
kernel kills each with its parent (PR_SET_PDEATHSIG), except for the starter, which has cleared that, and the helper that
keeps a .sif file mounted for a user other than root. Only the payload has the pilot's marker in its environment, and it may
clear its environment. So they are all in the session of a shell that has the marker.
"""

import errno
import json
import os
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePath

import trio

from trio_pilot.errors import NodeError, map_exceptions
from trio_pilot.files.data_directory import open_temporary, root_in
from trio_pilot.files.filesystem import is_directory
from trio_pilot.files.task_logs import open_log
from trio_pilot.parsing import VARIABLE
from trio_pilot.processes import cgroups
from trio_pilot.processes.children import Child, Command
from trio_pilot.processes.orphans import MARKER, mark
from trio_pilot.runtimes import (
    NAMESPACES,
    Container,
    Exit,
    Limits,
    Mount,
    Options,
    apptainer_quoting,
    command_refused,
    no_command,
)
from trio_pilot.runtimes.apptainer_command import LEADER, MOST_TEXT, Apptainer, environment, fatal
from trio_pilot.runtimes.apptainer_directory import DOCKER_ENVIRONMENT, RUNSCRIPT
from trio_pilot.runtimes.apptainer_images import PROBE, Image, Images, probe
from trio_pilot.runtimes.confinement import Confinement, Limiter, OpenGroups, open_limiter
from trio_pilot.runtimes.engine_registry_login import login_files
from trio_pilot.runtimes.hidden_paths import NOTHING, HiddenPath, HiddenPaths
from trio_pilot.runtimes.kernel_files import kernel_files, masked_files
from trio_pilot.runtimes.mount_table import TABLE, PrivateMounts, path_of, to_the_bottom
from trio_pilot.runtimes.seccomp import seccomp_rules
from trio_pilot.runtimes.session_keyring import join_new_session_keyring

HOME = "/tmp"  # noqa: S108 -- the container's own: its scratch directory is mounted there

VAR_TMP = "/var/tmp"  # noqa: S108 -- the same directory: apptainer's own would be small, or missing with that of the image
SYS = Path("/sys")
FIRMWARE = SYS / "firmware"

WITHOUT_NETWORK = ("--net", "--network", "none")

FAILED = 255  # apptainer's own exit code, whatever the reason

# The shell, and the most threads of the starter and the namespace's first process, while they start: 20 with 2 CPUs, as
# measured. They are programs in Go, which starts more threads on more CPUs.
APPTAINERS_OWN = 17 + 8 * min(os.cpu_count() or 1, 8)

PROBE_TIMEOUT = 20.0  # seconds for a container of the probe
MOUNT_POINTS = "dev", "proc", "sys", "tmp", "etc"  # the least that an image can have

# Apptainer's errors for a command that it cannot execute, with the kernel's reason.
NO_COMMAND = re.compile(r'"(?P<command>.*)": executable file not found in \$PATH', re.DOTALL)
CANNOT_EXECUTE = re.compile(
    r"(?:stat (?P<command>.*): |exec .* failed: .*: )?"
    r"(?P<reason>no such file or directory|not a directory|permission denied|is a directory|exec format error)",
    re.DOTALL,
)
REASONS = {
    "not a directory": errno.ENOTDIR,
    "permission denied": errno.EACCES,
    "is a directory": errno.EACCES,
    "exec format error": errno.ENOEXEC,
}


async def fault(options: Options, seconds: float = PROBE_TIMEOUT) -> str | None:
    """Return the reason why apptainer does not work here; None if it has made a container within so many seconds."""
    with trio.move_on_after(seconds):
        try:
            apptainer = Apptainer.find(options.data_parent)
            await apptainer.check_version()
            reason = await _cannot_run(apptainer, options)
        except NodeError as error:
            return str(error)
        return f"{apptainer.path} cannot make a container: {reason}" if reason else None
    return f"apptainer has not made a container in {seconds:g} s"


async def _cannot_run(apptainer: Apptainer, options: Options) -> str | None:
    """Make a container of an empty image; return the reason if that fails."""
    with open_temporary(options.data_parent) as image:
        for name in MOUNT_POINTS:
            (image / name).mkdir()
        return await probe(apptainer, image, () if options.has_network else WITHOUT_NETWORK)


@asynccontextmanager
async def open_runtime(options: Options, open_groups: OpenGroups = cgroups.Groups) -> AsyncIterator["ApptainerRuntime"]:
    """Open the runtime. Raises NodeError if there is no apptainer, or it is too old; `fault` checks whether it works."""
    apptainer = Apptainer.find(options.data_parent)
    await apptainer.check_version()
    with ExitStack() as stack:
        images = Images(apptainer, options, stack)
        async with open_limiter(APPTAINERS_OWN, open_groups) as limiter:
            yield ApptainerRuntime(apptainer, images, options, limiter, stack)


@dataclass(frozen=True, slots=True)
class _ApptainerRun:
    """A container, and what is needed to run it."""

    container: Container
    image: Image
    confinement: Confinement
    address_space: int | None  # bytes, of each process of the payload


class ApptainerRuntime:
    """Runs containers with `apptainer run`, or `exec` where an image has no runscript."""

    name = "apptainer"
    has_mounts = True
    engine: Path | None = None
    has_unremoved_containers = False

    def __init__(self, apptainer: Apptainer, images: Images, options: Options, limiter: Limiter, stack: ExitStack) -> None:
        self._apptainer = apptainer
        self._images = images
        self.image_directory: Path | None = self._images.directory
        self._kill_grace = options.kill_grace
        self._debug = options.debug
        self._limiter = limiter
        self._private_mounts = PrivateMounts(self.name)
        self._hidden = HiddenPaths([*options.hidden, *login_files()], root_in(options.data_parent))
        self._has_network = options.has_network
        self._data_parent = options.data_parent
        self._stack = stack
        self._security = _security(options, stack)
        self._nothing: Path | None = None  # an empty directory
        self._protection = [*_protection(), *map(self._cover, _firmware())]

    async def prepare(self, image: str, *, has_args: bool = True) -> None:
        """Check the image; unpack it if it cannot be run as it is."""
        ready = await self._images.ready(image)
        if not has_args and not ready.runscript.has_command:
            raise no_command(image)

    async def has_entrypoint(self, image: str) -> bool:
        """Return whether an image has a runscript with more in it than the arguments."""
        return (await self._images.ready(image)).runscript.has_entrypoint

    async def run(self, container: Container) -> Exit:
        """Run a container to its end; on every way out its PID namespace has ended."""
        await trio.lowlevel.checkpoint_if_cancelled()
        image = await self._images.ready(container.image)
        limits, address_space = await self._split(container.limits)
        async with self._limiter.confine(replace(container, limits=limits)) as confinement:
            with map_exceptions({OSError: NodeError}, "cannot start apptainer"):
                run = _ApptainerRun(container, image, confinement, address_space)
                child = self._start(run)
                # The starter passes SIGTERM on to the payload; the namespace ends with its parent.
                code = await child.wait_and_end(self._kill_grace, terminate=partial(child.terminate_below, child.pid))
                if refusal := confinement.refusal(code, container.stderr):
                    raise NodeError(f"cannot limit what a container uses: {refusal}")
                if code == FAILED and not confinement.out_of_memory:
                    return await self._own_fault(run)
            return Exit(code, code != 0 and confinement.out_of_memory)

    async def _split(self, limits: Limits) -> tuple[Limits, int | None]:
        """Return the limits for apptainer, and the address space of the payload.

        Without a control group, the limit of memory is one of address space, within which apptainer itself cannot run.
        """
        if limits.memory is None or (await self._limiter.means(limits)).in_group("memory"):
            return limits, None
        return replace(limits, memory=None), limits.memory

    def _start(self, run: _ApptainerRun) -> Child:
        container = run.container
        _make_mount_points(container)
        join_new_session_keyring()  # tasks could leave something in that of the pilot for those that come after them
        env = {**environment(), **_environment(container)}
        with open_log(container.stdout) as stdout, open_log(container.stderr) as stderr:
            argv = run.confinement.argv([*LEADER, *self._argv(run)], env)
            return self._apptainer.children.spawn(
                Command(argv, env, container.scratch, stdout, stderr, marker=container.name, cpus=container.cpu_set)
            )

    def _argv(self, run: _ApptainerRun) -> list[str]:
        container, action = run.container, "exec" if run.container.without_entrypoint else run.image.action
        args: Sequence[str] = container.args
        if apptainer_quoting.needs_help(args, container.env) or run.address_space is not None:
            command = [f"/{RUNSCRIPT}"] if action == "run" else []
            args = apptainer_quoting.shell(command, args, container.env, run.address_space)
            action = "exec"
        scratch = [Mount(container.scratch, place, writable=True) for place in (HOME, VAR_TMP)]
        mended = [Mount(run.image.environment, f"/{DOCKER_ENVIRONMENT}")] if run.image.environment else []
        hidden = map(self._cover, self._hidden.seen_through(container.mounts))
        mounts = [*scratch, *to_the_bottom(container.mounts, os.geteuid()), *mended, *self._protection, *hidden]
        self._private_mounts.log(mount.source for mount in mounts if not mount.propagates)
        return [
            *(self._apptainer.path, "--debug" if self._debug else "--silent"),
            # As no home directory of the host is mounted, --home sets no more than HOME.
            *(action, "--containall", "--no-eval", "--no-privs", "--no-home", "--home", HOME, "--pwd", HOME),
            *("--no-mount", "sys", "--scratch", "/run"),
            *(() if self._has_network else WITHOUT_NETWORK),
            *self._security,
            *(option for mount in mounts for option in ("--mount", _mount(mount))),
            run.image.path,
            *args,
        ]

    def _cover(self, path: HiddenPath) -> Mount:
        """Return the mount that hides a path."""
        if path.is_directory and self._nothing is None:
            self._nothing = self._stack.enter_context(open_temporary(self._data_parent))
        return Mount((path.is_directory and self._nothing) or NOTHING, path.place)

    async def _own_fault(self, run: _ApptainerRun) -> Exit:
        """Return the exit of a payload that ended with 255, or cannot be executed.

        Raises:
            NodeError: the container could not be made.
        """
        container = run.container
        with container.stderr.open("rb") as stderr:
            text = stderr.read(MOST_TEXT).decode(errors="replace")
        reason = fatal(text, among_others=self._debug)
        if reason is None:
            return Exit(FAILED)
        refused = NO_COMMAND.fullmatch(reason) or CANNOT_EXECUTE.fullmatch(reason)
        if not refused:
            if await self._could_be_made(run):
                return Exit(FAILED)
            raise NodeError(f"apptainer could not make the container: {reason}")
        facts, runs_script = refused.groupdict(), run.image.action == "run" and not container.without_entrypoint
        why = os.strerror(REASONS.get(facts.get("reason", ""), errno.ENOENT))
        # What an image executes is its own affair; apptainer quotes the arguments of a task in its errors.
        command = facts["command"] if runs_script else None
        return command_refused(container, f"{command or next(iter(container.args), RUNSCRIPT)}: {why}")

    async def _could_be_made(self, run: _ApptainerRun) -> bool:
        """Make the same container with a command that no image has; return whether that is the only error."""
        container = replace(run.container, args=(PROBE,))
        attempt = replace(run, container=container, image=replace(run.image, action="exec"))
        with trio.move_on_after(PROBE_TIMEOUT):
            result = await self._apptainer.run(self._argv(attempt)[1:], {**environment(), **_environment(container)})
            return PROBE in result.reason
        return False


def _security(options: Options, stack: ExitStack) -> list[str]:
    """Return the option for the filter of system calls. An apptainer that was built without libseccomp ignores it."""
    rules = seccomp_rules(allow_namespaces=NAMESPACES in options.privileges)
    if not rules:
        return []
    file = stack.enter_context(open_temporary(options.data_parent)) / "system-calls.json"
    with map_exceptions({OSError: NodeError}, f"cannot write {file}"):
        file.write_text(json.dumps(rules))
    return ["--security", _field(f"seccomp:{file}")]


def _environment(container: Container) -> dict[str, str]:
    """Return the variables of apptainer that set those of the container."""
    for name in container.env:
        if not VARIABLE.fullmatch(name):
            raise NodeError(f"apptainer cannot set a variable named {name!r}: use letters, digits and underscores")
    marker = {MARKER: mark(container.name)}
    variables = {"TMPDIR": HOME, **apptainer_quoting.encoded(container.env), **marker}
    return {f"APPTAINERENV_{name}": value for name, value in variables.items()}


def _make_mount_points(container: Container) -> None:
    """Make the mount points in the scratch directory; apptainer makes the others in a layer over the image."""
    for mount in container.mounts:
        for place in (HOME, VAR_TMP):
            if mount.target.startswith(f"{place}/"):
                (container.scratch / PurePath(mount.target).relative_to(place)).mkdir(parents=True, exist_ok=True)


def _protection() -> Iterator[Mount]:
    # A mount of /sys is read-only at its top alone, so all that is mounted below it is mounted once more.
    yield from (Mount(path, str(path)) for path in _below_sys() if os.access(path, os.R_OK | os.X_OK))
    yield from (Mount(path, str(path)) for path in kernel_files())
    yield from (Mount(NOTHING, str(path)) for path in masked_files())


def _firmware() -> Iterator[HiddenPath]:
    if is_directory(FIRMWARE):
        yield HiddenPath(FIRMWARE, str(FIRMWARE), is_directory=True)


@cache
def _below_sys() -> tuple[Path, ...]:
    """List /sys, and the directories below it where something else is mounted."""
    places = {path_of(line.split()[4]) for line in TABLE.read_bytes().splitlines()}
    return tuple(path for path in sorted(places) if path.is_relative_to(SYS) and is_directory(path))


def _mount(mount: Mount) -> str:
    """Return an argument of --mount: a line of CSV."""
    fields = ["type=bind", f"source={mount.source}", f"destination={mount.target}", *([] if mount.writable else ["ro"])]
    if not all(apptainer_quoting.is_text(field) and "\r" not in field for field in fields):
        raise NodeError(f"apptainer cannot mount {str(mount.source)!r} at {mount.target!r}: name them in UTF-8, without CR")
    return ",".join(map(_field, fields))


def _field(value: str) -> str:
    return '"{}"'.format(value.replace('"', '""'))
