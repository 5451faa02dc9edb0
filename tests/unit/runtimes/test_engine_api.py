from collections.abc import Callable
from typing import Any

import pytest

from trio_pilot.errors import NodeError
from trio_pilot.runtimes.docker import DOCKER
from trio_pilot.runtimes.engine_api import Answer
from trio_pilot.runtimes.engine_container import ContainerState
from trio_pilot.runtimes.podman import PODMAN

ENDED = b'{"State": {"Status": "exited", "ExitCode": 3, "OOMKilled": true}, "Path": "sh", "Args": %s}'


def answer(content: bytes) -> Answer:
    return Answer(200, content)


@pytest.mark.parametrize("find", [ContainerState.of, DOCKER.exit_code, PODMAN.exit_code])
@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff", b"null", b"[]", b"{}", b'"text"', b'{"State": null}'])
def test_an_answer_of_another_form_is_the_nodes_fault(find: Callable[[Any], object], content: bytes) -> None:
    with pytest.raises(NodeError, match=r"^the engine's answer is not as expected: b"):
        answer(content).read(find)


def test_the_state_of_a_container_is_read_from_an_answer() -> None:
    command = ("sh", "-c", "exit 3")
    assert answer(ENDED % b'["-c", "exit 3"]').read(ContainerState.of) == ContainerState("exited", 3, True, command)
    assert answer(ENDED % b"null").read(ContainerState.of).command == ("sh",)
