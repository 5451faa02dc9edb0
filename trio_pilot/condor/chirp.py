"""The one module that speaks chirp: to the proxy beside an HTCondor job, through htchirp. Everything here blocks.

htchirp reads on for ever, at full CPU, from a proxy that has closed the connection, and each of its time-outs is for one
byte. So its socket is one of ours, which has one deadline for everything, and whose end is an error.
"""

import os
import socket
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from htchirp import HTChirp

from trio_pilot.allocation.classad import quoted
from trio_pilot.errors import ReportError, map_exceptions

CONFIG, DEFAULT_CONFIG = "_CONDOR_CHIRP_CONFIG", ".chirp.config"

# Bytes of a quoted text. The event log cuts a line near 1024, and with it the closing quote; the proxy takes no line of more
# than 5120, in which a space or backslash counts twice.
MOST_QUOTED = {"JOB_ATTR": 2400, "JOB_EVENT_LOG": 999}

Value = int | str | BaseException  # an exception stands for its traceback

HINT = "(has the job +WantIOProxy = true?)"


def tell(destination: str, attributes: Iterable[tuple[str, Value]], said: dict[str, Value], seconds: float) -> None:
    """Tell HTCondor some attributes of this job, within some seconds; what was told is put into `said`.

    Raises:
        ReportError: it could not be told, or not all of it.
    """
    refused = []
    foreign = {OSError: ReportError, ValueError: ReportError, HTChirp.ChirpError: ReportError}
    with map_exceptions(foreign, f"cannot report to HTCondor {HINT}"), _connect(seconds) as proxy:
        for name, value in attributes:
            try:
                _tell_one(proxy, destination, name, value)
                said[name] = value
            except HTChirp.ChirpError as error:  # of this one: the others may be taken
                refused.append(f"{name}: {error}")
    if refused:
        raise ReportError(f"HTCondor refuses {len(refused)} of our attributes {HINT}, such as {refused[0]}")


def _tell_one(proxy: HTChirp, destination: str, name: str, value: Value) -> None:
    text, is_traceback = str(value), isinstance(value, BaseException)
    if isinstance(value, BaseException):
        text = "".join(traceback.format_exception(value))
    quote = quoted(text, MOST_QUOTED[destination], keep_end=is_traceback)
    if destination == "JOB_EVENT_LOG":
        proxy.ulog(f"{name}: {quote}")
    else:
        proxy.set_job_attr(name, text if isinstance(value, int) else quote)


def _connect(seconds: float) -> HTChirp:
    # htchirp would print to stdout what it cannot read.
    words = Path(os.environ.get(CONFIG, DEFAULT_CONFIG)).read_text().split()
    if len(words) != 3:
        raise ValueError(f"{os.environ.get(CONFIG, DEFAULT_CONFIG)} must have a host, a port and a cookie")
    host, port, cookie = words
    return _Chirp(host, port, cookie, time.monotonic() + seconds)


class _Chirp(HTChirp):
    """A client with a deadline."""

    def __init__(self, host: str, port: str, cookie: str, deadline: float) -> None:
        self._deadline = deadline
        HTChirp.__init__(self, host, port, cookie=cookie)

    def connect(self, auth_method: str | None = None) -> None:
        """Connect with a socket of ours."""
        HTChirp.disconnect(self)
        self.socket = _Socket(self._deadline)
        self.socket.connect((self.host, self.port))
        HTChirp._authenticate(self, auth_method or self.authentication)


class _Socket(socket.socket):
    """A socket that does nothing after a deadline, and whose end is an error."""

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def connect(self, address: Any) -> None:
        self._hurry()
        super().connect(address)

    def send(self, data: Any, flags: int = 0) -> int:
        self._hurry()
        return super().send(data, flags)

    def recv(self, size: int, flags: int = 0) -> bytes:
        self._hurry()
        if data := super().recv(size, flags):
            return data
        raise ConnectionError("the proxy has closed the connection")

    def _hurry(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the proxy does not answer in time")
        self.settimeout(left)
