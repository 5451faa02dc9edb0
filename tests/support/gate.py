"""Tasks that wait for a file, so that a test can do something while they run."""

from pathlib import Path


class Gate:
    """Tasks that copy their event to the output once the gate is open."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "gate"

    @property
    def task(self) -> str:
        """The command of the tasks, which leaves a file when it begins and when it ends."""
        begin = f"echo >> {self._file}.$$-begun; while ! test -e {self._file}; do sleep 0.05; done"
        return f"sh -c '{begin}; cp $EWMS_TASK_INFILE $EWMS_TASK_OUTFILE; echo >> {self._file}.$$-done'"

    def open(self) -> None:
        """Let the tasks continue."""
        self._file.touch()

    def begun(self) -> int:
        """Return the number of tasks that have begun."""
        return len(list(self._file.parent.glob("gate.*-begun")))

    def done(self) -> int:
        """Return the number of tasks that have ended."""
        return len(list(self._file.parent.glob("gate.*-done")))
