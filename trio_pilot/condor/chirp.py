"""Chirp, the protocol of the proxy beside an HTCondor job, through htchirp. Everything here blocks.

htchirp reads on for ever, at full CPU, from a proxy that has closed the connection, and each of its time-outs is for one
byte. So it is given another socket, with one deadline for everything, which raises an error when the connection is closed.
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
from trio_pilot.condor import destinations
from trio_pilot.errors import ReportError, map_exceptions

CONFIG, DEFAULT_CONFIG = "_CONDOR_CHIRP_CONFIG", ".chirp.config"

Value = int | str | BaseException  # an exception stands for its traceback

HINTS = {destinations.DELAYED: "(is ENABLE_CHIRP_DELAYED true on this machine?)"}
HINT = "(has the job +WantIOProxy = true?)"  # for the other destinations


def report(destination: str, attributes: Iterable[tuple[str, Value]], reported: dict[str, Value], seconds: float) -> None:
    """Report attributes of this job to HTCondor within `seconds`; add those that were reported to `reported`.

    Raises:
        ReportError: Not all of them could be reported.
    """
    refused, hint = [], HINTS.get(destination, HINT)
    foreign = {OSError: ReportError, ValueError: ReportError, HTChirp.ChirpError: ReportError}
    with map_exceptions(foreign, f"cannot report to HTCondor {hint}"), _connect(seconds) as proxy:
        for name, value in attributes:
            try:
                _report_one(proxy, destination, name, value)
                reported[name] = value
            except HTChirp.ChirpError as error:  # only this one is refused: the others may be accepted
                refused.append(f"{name}: {error}")
    if refused:
        raise ReportError(f"HTCondor refuses {len(refused)} attribute(s) {hint}, such as {refused[0]}")


def _report_one(proxy: HTChirp, destination: str, name: str, value: Value) -> None:
    text = "".join(traceback.format_exception(value)).rstrip("\n") if isinstance(value, BaseException) else str(value)
    quote = quoted(text, destinations.MOST_QUOTED[destination], in_one_line=destination == destinations.DELAYED)
    expression = text if isinstance(value, int) else quote
    match destination:
        case destinations.EVENT_LOG:
            proxy.ulog(f"{name}: {quote}")
        case destinations.DELAYED:
            proxy.set_job_attr_delayed(destinations.name_at(destination, name), expression)
        case _:
            proxy.set_job_attr(name, expression)


def _connect(seconds: float) -> HTChirp:
    # Parsed here, since htchirp would print to stdout what it cannot parse.
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
        """Connect with a socket that has a deadline."""
        HTChirp.disconnect(self)
        self.socket = _Socket(self._deadline)
        self.socket.connect((self.host, self.port))
        HTChirp._authenticate(self, auth_method or self.authentication)


class _Socket(socket.socket):
    """A socket that raises TimeoutError after a deadline, and ConnectionError when the connection is closed."""

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def connect(self, address: Any) -> None:
        self._limit_time()
        super().connect(address)

    def send(self, data: Any, flags: int = 0) -> int:
        self._limit_time()
        return super().send(data, flags)

    def recv(self, size: int, flags: int = 0) -> bytes:
        self._limit_time()
        if data := super().recv(size, flags):
            return data
        raise ConnectionError("the proxy has closed the connection")

    def _limit_time(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the proxy does not answer in time")
        self.settimeout(left)
