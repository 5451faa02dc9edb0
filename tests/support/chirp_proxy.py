"""A chirp proxy as HTCondor's starter has one beside a job, and its faults."""

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

COOKIE = "c00k1e"
LONGEST_LINE = 5120
NOT_AUTHENTICATED, TOO_BIG, INVALID = b"-1\n", b"-5\n", b"-8\n"

Fault = Callable[[socket.socket], None]


@dataclass
class ChirpProxy:
    """The lines that it received, in order, and its current fault."""

    config: Path
    fault: Fault | None = None
    lines: list[str] = field(default_factory=list)  # without their escapes
    longest: int = 0  # bytes of the longest line, as it was sent
    refused: set[str] = field(default_factory=set)  # names of attributes that it refuses
    connections: int = 0

    def values(self, name: str) -> list[str]:
        """Return the values of an attribute so far, as ClassAd expressions."""
        found = (re.fullmatch(r"(?:set_job_attr |set_job_attr_delayed |ulog )(\w+):? (.*)", line) for line in self.lines)
        return [match[2] for match in found if match and match[1].removeprefix("HT") == f"ChirpEWMSPilot{name}"]

    def serve(self, client: socket.socket) -> None:
        """Answer one client until it closes the connection."""
        self.connections += 1
        with client, suppress(OSError):
            client.settimeout(30)
            if self.fault:
                self.fault(client)
                return
            is_known = False
            for line in client.makefile("rb"):
                if line.startswith(b"cookie "):
                    is_known = line == f"cookie {COOKIE}\n".encode()
                    client.sendall(b"0\n" if is_known else NOT_AUTHENTICATED)
                else:
                    client.sendall(self._answer(line) if is_known else NOT_AUTHENTICATED)

    def _answer(self, line: bytes) -> bytes:
        self.longest = max(self.longest, len(line))
        if len(line) > LONGEST_LINE:
            return TOO_BIG
        plain = re.sub(r"\\(.)", r"\1", line.decode().removesuffix("\n"))
        if any(name in plain for name in self.refused):
            return INVALID
        self.lines.append(plain)
        return b"0\n"


@contextmanager
def chirp_proxy(directory: Path, fault: Fault | None = None) -> Iterator[ChirpProxy]:
    """Run a proxy, and write the file with its address for a job."""
    proxy = ChirpProxy(directory / "chirp.config", fault)
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy.config.write_text(f"127.0.0.1 {server.getsockname()[1]} {COOKIE}\n")
        thread = threading.Thread(target=_accept, args=(server, proxy), daemon=True)
        thread.start()
        yield proxy
        server.shutdown(socket.SHUT_RDWR)  # which ends accept()
        thread.join(5)


def _accept(server: socket.socket, proxy: ChirpProxy) -> None:
    with suppress(OSError):
        while True:
            client, _ = server.accept()
            threading.Thread(target=proxy.serve, args=(client,), daemon=True).start()


def hangs(client: socket.socket) -> None:
    """Never answer."""
    while client.recv(4096):
        pass


def closes_in_mid_reply(client: socket.socket) -> None:
    """Close the connection while htchirp waits for the end of a line."""
    client.recv(4096)
    client.sendall(b"-")


def floods(client: socket.socket) -> None:
    """Answer without an end."""
    client.recv(4096)
    while True:
        client.sendall(b"1" * 65536)


def trickles(client: socket.socket) -> None:
    """Answer one byte at a time, each within the time-out for a byte."""
    client.recv(4096)
    stop = threading.Event()
    while not stop.wait(0.2):
        client.sendall(b"0")


def talks_nonsense(client: socket.socket) -> None:
    """Answer each line with bytes that are not text."""
    while client.recv(4096):
        client.sendall(b"\xff\xfe\n")


def refuses(client: socket.socket) -> None:
    """Refuse every cookie."""
    client.recv(4096)
    client.sendall(NOT_AUTHENTICATED)


FAULTS: list[Fault] = [hangs, closes_in_mid_reply, floods, trickles, talks_nonsense, refuses]
