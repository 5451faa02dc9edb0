from collections.abc import Callable
from typing import Any

import pytest

from trio_pilot.errors import NodeError
from trio_pilot.runtimes.docker import DOCKER
from trio_pilot.runtimes.engine_api import Answer
from trio_pilot.runtimes.engine_container import Facts
from trio_pilot.runtimes.podman import PODMAN

ENDED = b'{"State": {"Status": "exited", "ExitCode": 3, "OOMKilled": true}, "Path": "sh", "Args": %s}'


def answer(content: bytes) -> Answer:
    return Answer(200, content)


@pytest.mark.parametrize("find", [Facts.of, DOCKER.exit_code, PODMAN.exit_code])
@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff", b"null", b"[]", b"{}", b'"text"', b'{"State": null}'])
def test_an_answer_that_is_other_than_it_should_be_is_the_nodes_fault(find: Callable[[Any], object], content: bytes) -> None:
    with pytest.raises(NodeError, match=r"^the engine does not speak as it should: it says b"):
        answer(content).read(find)


def test_how_a_container_is_is_found_in_what_an_engine_says() -> None:
    assert answer(ENDED % b'["-c", "exit 3"]').read(Facts.of) == Facts("exited", 3, True, ("sh", "-c", "exit 3"))
    assert answer(ENDED % b"null").read(Facts.of).words == ("sh",)
