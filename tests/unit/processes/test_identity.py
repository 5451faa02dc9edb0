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


def test_it_can_be_written_and_read() -> None:
    assert Identity.parse(str(own())) == own()
    assert own().pid == os.getpid()


@pytest.mark.parametrize("text", ["", "a", "a.1.2", "a.1.2.x", "a.1.2.3.4", "a.1.-2.3", "a.1.².3"])
def test_anything_else_is_nobodys(text: str) -> None:
    assert Identity.parse(text) is None


def test_who_lives_is_not_dead(other: "subprocess.Popen[bytes]") -> None:
    assert not own().is_dead
    assert not of(other.pid).is_dead


def test_who_is_gone_is_dead(other: "subprocess.Popen[bytes]") -> None:
    identity = of(other.pid)
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert identity.is_dead, "a zombie"
    other.wait()
    assert identity.is_dead


def test_another_process_with_the_number_of_one_that_is_gone_is_not_taken_for_it() -> None:
    assert replace(own(), started=own().started - 1).is_dead


@pytest.mark.parametrize("somebody", [replace(own(), started=0, boot="another"), replace(own(), started=0, namespace=1)])
def test_of_whom_nothing_can_be_known_it_is_not_said_that_he_is_dead(somebody: Identity) -> None:
    assert not somebody.is_dead


def test_who_is_hidden_from_us_is_not_said_to_be_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    somebody = replace(own(), pid=1)
    monkeypatch.setattr(identity, "stat_of", lambda _pid: None)
    assert not somebody.is_dead
