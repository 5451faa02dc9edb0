"""Tasks that wait for a word of the test's, so that something can happen while they run."""

from pathlib import Path


class Gate:
    """Tasks copy their event to the output once the gate is open."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "gate"

    @property
    def task(self) -> str:
        """The command of the tasks; they leave a mark as they begin and as they end."""
        begin = f"echo >> {self._file}.$$-begun; while ! test -e {self._file}; do sleep 0.05; done"
        return f"sh -c '{begin}; cp $EWMS_TASK_INFILE $EWMS_TASK_OUTFILE; echo >> {self._file}.$$-done'"

    def open(self) -> None:
        """Let the tasks end."""
        self._file.touch()

    def begun(self) -> int:
        """Count the tasks that were begun."""
        return len(list(self._file.parent.glob("gate.*-begun")))

    def done(self) -> int:
        """Count those that have ended."""
        return len(list(self._file.parent.glob("gate.*-done")))
