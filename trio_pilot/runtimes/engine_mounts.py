"""Directories of this machine that containers of an engine may only read."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trio_pilot.runtimes import Mount
from trio_pilot.runtimes.engine_dialect import Dialect
from trio_pilot.runtimes.mount_table import PrivateMounts, to_the_bottom

# Docker refuses to propagate a mount that is private. It may see other mounts than this process, so it is asked first.
PRIVATE = re.compile(r"path (?P<path>.*) is mounted on .* but it is not a shared or slave mount", re.DOTALL)


class EngineMounts:
    """What an engine is asked to mount in containers."""

    def __init__(self, dialect: Dialect, user: int) -> None:
        self._dialect = dialect
        self._user = user
        self._refused: set[Path] = set()  # not to be propagated
        self._log = PrivateMounts(dialect.name)

    def of(self, mounts: Sequence[Mount]) -> tuple[Mount, ...]:
        """Return the mounts of a container, those that are read-only to the bottom, and propagating where that works."""
        made = to_the_bottom(mounts, self._user)
        if self._dialect.refuses_private_mounts:
            made = tuple(replace(mount, propagates=not self._is_private(mount)) for mount in made)
        given = {mount.source for mount in mounts}
        self._log.log(mount.source for mount in made if not mount.propagates and mount.source in given)
        return made

    def _is_private(self, mount: Mount) -> bool:
        """Return whether a mount is private: after a first refusal, the mount table counts too."""
        return mount.source in self._refused or (bool(self._refused) and not mount.propagates)

    def note_refusal(self, message: str, mounts: Sequence[Mount]) -> bool:
        """Note why the engine refused a container; return whether it was for a mount that should have propagated.

        Args:
            message: the engine's.
            mounts: those of the container, as returned by `of`.
        """
        found = PRIVATE.search(message)
        propagating = {mount.source for mount in mounts if mount.propagates and not mount.writable}
        if found is None or not propagating:
            return False
        self._refused |= {Path(found["path"])} & propagating or propagating
        return True
