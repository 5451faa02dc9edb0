"""What tasks have added to the data hub, which may be so much that the disk is full. Everything here blocks."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from trio_pilot.files.disk_checks import is_full
from trio_pilot.files.filesystem import Inode, inode


class HubAdditions:
    """Knows what was in the data hub before the first task of this pilot: what the init container wrote, above all."""

    def __init__(self, hub: Path) -> None:
        self._hub = hub
        self._known: set[Inode] | None = None

    @property
    def are_watched(self) -> bool:
        """Whether `remember` was called."""
        return self._known is not None

    def remember(self) -> None:
        """Remember what is in the data hub, at the first call only."""
        if self._known is None:
            self._known = {inode(facts) for _, _, facts in self._files()}

    def have_filled_the_disk(self) -> bool:
        """Return whether the disk is full, and tasks have added files to the data hub."""
        return self._known is not None and is_full(self._hub) and any(True for _ in self._additions())

    def remove(self) -> None:
        """Remove the files that tasks have added. Directories stay; what another user has closed stays too."""
        for directory, name in self._additions():
            with suppress(OSError):
                os.unlink(name, dir_fd=directory)

    def _additions(self) -> Iterator[tuple[int, str]]:
        """Yield the directory, open until the next one, and the name of each; none before `remember` was called."""
        known = self._known
        if known is not None:
            yield from ((directory, name) for directory, name, facts in self._files() if inode(facts) not in known)

    def _files(self) -> Iterator[tuple[int, str, os.stat_result]]:
        """Yield each file of the hub: its directory, open until the next one; its name; and its facts."""
        with suppress(OSError, RecursionError):
            for _, _, names, directory in os.fwalk(self._hub, follow_symlinks=False):
                for name in names:
                    with suppress(OSError):
                        yield directory, name, os.stat(name, dir_fd=directory, follow_symlinks=False)
