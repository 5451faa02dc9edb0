import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest

from trio_pilot.processes import identity
from trio_pilot.processes.identity import Identity, own, stat_of


@pytest.fixture
def other() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def of(pid: int) -> Identity:
    facts = stat_of(pid)
    assert facts
    return replace(own(), pid=pid, started=int(facts[19]))


def test_an_identity_can_be_written_and_read() -> None:
    assert Identity.parse(str(own())) == own()
    assert own().pid == os.getpid()


NINES = "9" * 20
ODD = [
    *("", "a", "a.1.2", "a.1.2.x", "a.1.2.3.4", "a.1.-2.3", "a.1.².3", "a.1.2.3\n", "\na.1.2.3", "a.1.2.3\0", "..."),
    *(f"a.1.{NINES}.1", f"a.{NINES}.1.1", f"a.1.1.{NINES}", f"a.1.{'9' * 5000}.1", f"{'a' * 33}.1.2.3"),
    *("a.1.0.1", "a.1.01.1", "a.1.99999999.1", "a/b.1.2.3", "../a.1.2.3", "a.1.2.3/x", "\udcff.1.2.3", "a.1.٣.3"),
    *(f"a.1.1.{'1' * 10**6}", "." * 10**6),
]


@pytest.mark.parametrize("text", ODD, ids=lambda text: repr(text)[:20])
def test_other_text_is_no_identity(text: str) -> None:
    assert Identity.parse(text) is None


@pytest.mark.parametrize("digits", [8, 20, 5000])
def test_a_process_that_cannot_be_there_is_dead(digits: int) -> None:
    assert replace(own(), pid=10**digits).is_dead


def test_a_living_process_is_not_dead(other: "subprocess.Popen[bytes]") -> None:
    assert not own().is_dead
    assert not of(other.pid).is_dead


def test_a_process_that_is_gone_is_dead(other: "subprocess.Popen[bytes]") -> None:
    identity = of(other.pid)
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert identity.is_dead, "a zombie"
    other.wait()
    assert identity.is_dead


def test_a_process_is_dead_when_another_has_its_number() -> None:
    assert replace(own(), started=own().started - 1).is_dead


@pytest.mark.parametrize("process", [replace(own(), started=0, boot="another"), replace(own(), started=0, namespace=1)])
def test_a_process_of_another_boot_or_namespace_is_not_called_dead(process: Identity) -> None:
    assert not process.is_dead


def test_a_process_hidden_by_hidepid_is_not_called_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    process = replace(own(), pid=1)
    monkeypatch.setattr(identity, "stat_of", lambda _pid: None)
    assert not process.is_dead
