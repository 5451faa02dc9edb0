"""Exit codes other than those of PilotError and its subclasses."""

import signal

SOFTWARE_ERROR = 70  # sysexits.h, EX_SOFTWARE: a defect of trio-pilot
SIGNALLED = 128  # a command ended by signal N has the exit code 128 + N, as in shells


class SignalledError(Exception):
    """A signal has ended a command early."""

    def __init__(self, number: int, summary: str = "") -> None:
        reason = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        super().__init__(f"{reason}: {summary}" if summary else reason)
        self.number = number
