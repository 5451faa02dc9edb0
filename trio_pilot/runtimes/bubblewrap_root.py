"""The root of a container of bubblewrap: what is mounted of an image, of this machine, and of the container's own."""

import errno
import os
import pwd
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from trio_pilot.errors import NodeError
from trio_pilot.files.data_directory import DATA_DIRECTORY
from trio_pilot.files.filesystem import exists, is_directory, is_file, is_link

# Directories of a container's own: bubblewrap makes them, the host's would undo the isolation, or they must be writable.
OWN_DIRECTORIES = ("proc", "dev", "sys", "tmp", "run")
NOT_FROM_THE_IMAGE = {f"/{name}" for name in (*OWN_DIRECTORIES, DATA_DIRECTORY)}

HOME = "/tmp"  # noqa: S108 -- the container's own: its scratch directory is mounted there
VAR_TMP = PurePath("/var/tmp")  # noqa: S108 -- the container's own, too
# What lscpu, hwloc and numactl read of /sys. The rest tells about the firmware and the kernel, and has mounts below it, each
# of which would cost a fiftieth of a container.
SYS = tuple(map(Path, ("/sys/bus", "/sys/class", "/sys/devices")))
NOT_FOR_TASKS = ("boot", "lost+found")  # of this machine's root

HOST = Path("/")
NAMES_OF_HOSTS = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf")  # of this machine: the network is shared

MOST_LINKS = 40  # symbolic links in one path, as for the kernel


@dataclass(frozen=True, slots=True)
class Root:
    """The root of the containers of an image that have the same mounts."""

    options: Sequence[str]
    devices: Sequence[str]  # options to be given last: bubblewrap reads all mounts that exist with each one that it adds
    scratch: Sequence[str]  # where the scratch directory is mounted
    targets: Sequence[str]  # those of the mounts, with the links of the image followed
    files: Mapping[str, bytes]  # files to make, and their content


def is_own(path: PurePath) -> bool:
    """Return whether a path is in a directory of a container's own, where an image or this machine's root is not seen."""
    return path.parts[1:2] in [(name,) for name in OWN_DIRECTORIES] or path.is_relative_to(VAR_TMP)


def root_of(image: Path, targets: Sequence[str]) -> Root:
    """Return the root that has an image, and mount points at `targets`. Blocks.

    Raises:
        NodeError: it is not a directory.
    """
    image = image.absolute()
    try:
        os.scandir(image).close()
        followed = [follow(image, target) for target in targets]
        bound, files = dict(_names_of_hosts(image)), dict(_names_of_users(image))
        var_tmp = [VAR_TMP] if follow(image, VAR_TMP) == VAR_TMP else []
        options = list(_mounted(image, PurePath("/"), [*followed, *bound, *files, *var_tmp]))
    except OSError as error:
        raise NodeError(f"the image {image} must be an unpacked directory, or /: {error.strerror}") from error
    names = (word for place, source in bound.items() for word in ("--ro-bind-try", str(source), str(place)))
    return Root(
        options=(*options, "--tmpfs", "/run", *names),
        devices=[word for path in SYS if is_directory(path) for word in ("--ro-bind", str(path), str(path))],
        scratch=[HOME, *map(str, var_tmp)],
        targets=list(map(str, followed)),
        files={str(place): content for place, content in files.items()},
    )


def _mounted(directory: Path, place: PurePath, targets: Sequence[PurePath]) -> Iterator[str]:
    """Yield the options that mount the entries of a directory one by one, so that mount points can be made beside them."""
    for entry in sorted(directory.iterdir()):
        inside = place / entry.name
        below = [target for target in targets if target.is_relative_to(inside)]
        if str(inside) in NOT_FROM_THE_IMAGE or not _is_accessible(entry):
            continue
        if entry == inside and entry.name in NOT_FOR_TASKS and not below and entry.parent == HOST:
            continue
        if entry.is_symlink():
            if inside not in targets:
                yield from ("--symlink", os.readlink(entry), str(inside))  # noqa: PTH115 -- Path would normalize the target
        elif is_directory(entry) and _stays_empty(entry, inside):
            yield from (
                "--dir",
                str(inside),
            )  # in most images, mounts of these would cost an eighth of a container
        elif all(_is_mount_point(entry / target.relative_to(inside)) for target in below):
            yield from ("--ro-bind", str(entry), str(inside))
        elif os.access(entry, os.R_OK):  # a mount point has to be made below it, where a mount of it would not allow that
            yield from ("--dir", str(inside), *_mounted(entry, inside, below))


def _is_accessible(entry: Path) -> bool:
    """Return whether this user can read an entry, or, as often with /home, enter it without being able to list it."""
    return os.access(entry, os.R_OK, follow_symlinks=False) or (is_directory(entry) and os.access(entry, os.X_OK))


def _is_mount_point(path: Path) -> bool:
    return exists(path) and not is_link(path)


def _stays_empty(directory: Path, inside: PurePath) -> bool:
    """Return whether a directory of an image is empty; in this machine's own root, something may yet be mounted there."""
    return directory != inside and os.access(directory, os.R_OK) and not any(directory.iterdir())


def follow(image: Path, path: str | PurePath) -> PurePath:
    """Follow the symbolic links of an image in a path of a container, as the container does.

    Raises:
        OSError: there are too many.
    """
    place, rest, links = PurePath("/"), list(reversed(PurePath(path).parts[1:])), 0
    while rest:
        name = rest.pop()
        if name == "..":
            place = place.parent
            continue
        place /= name
        if _is_link_in(image, place):
            links += 1
            if links > MOST_LINKS:
                raise OSError(errno.ELOOP, "too many symbolic links", str(path))
            target = (image / place.relative_to("/")).readlink()
            rest += reversed(target.parts[1:] if target.is_absolute() else target.parts)
            place = PurePath("/") if target.is_absolute() else place.parent
    return place


def _is_link_in(image: Path, place: PurePath) -> bool:
    """Return whether a path is a symbolic link of an image; what is below a container's own directories is not its."""
    is_own = f"/{place.parts[1]}" in NOT_FROM_THE_IMAGE if place.parts[1:] else True
    return not is_own and VAR_TMP not in place.parents and is_link(image / place.relative_to("/"))


def _place_of(image: Path, name: str) -> PurePath | None:
    """Return where a file of a container is to be mounted so that it has this name; None where that cannot be.

    A link that leads to nothing, or out of the image, is left out of the container, and the file takes its place.
    """
    place = follow(image, name)
    outside = image / place.relative_to("/")
    if place.parts[1] == "run" or (is_file(outside) and f"/{place.parts[1]}" not in NOT_FROM_THE_IMAGE):
        return place
    parent = follow(image, PurePath(name).parent)
    return None if is_directory(outside) else parent / PurePath(name).name


def _names_of_hosts(image: Path) -> Iterator[tuple[PurePath, Path]]:
    """Yield the files of this machine by which names of hosts are looked up, and where each is in a container."""
    for name in NAMES_OF_HOSTS:
        source = Path(os.path.realpath(name))
        place = _place_of(image, name)
        is_hidden = image != HOST or (place is not None and place.parts[1] == "run")
        if place and is_hidden and is_file(source) and os.access(source, os.R_OK):
            yield place, source


def _names_of_users(image: Path) -> Iterator[tuple[PurePath, bytes]]:
    """Yield the files that give this user and its group a name, where those of the image do not."""
    user, group = os.geteuid(), os.getegid()
    name = _name_of(user)
    lines = {
        "/etc/passwd": (user, f"{name}:x:{user}:{group}::{HOME}:/bin/sh\n"),
        "/etc/group": (group, f"{name}:x:{group}:\n"),
    }
    for file, (number, line) in lines.items():
        content = b""
        with suppress(OSError):
            content = (image / follow(image, file).relative_to("/")).read_bytes()
        known = (one.split(b":")[2:3] for one in content.splitlines())
        if [b"%d" % number] not in known and (place := _place_of(image, file)):
            yield place, (content if content.endswith(b"\n") or not content else content + b"\n") + os.fsencode(line)


def _name_of(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user{user}"
