"""Exit codes beside those of the errors themselves."""

import signal

SOFTWARE_ERROR = 70  # sysexits.h, EX_SOFTWARE: a defect of ours
SIGNALLED = 128  # the exit code of a command ended by a signal is this and its number, as shells say it


class SignalledError(Exception):
    """A signal has ended a command before its end."""

    def __init__(self, number: int, done: str = "") -> None:
        how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        super().__init__(f"{how}: {done}" if done else how)
        self.number = number
