from pathlib import Path

import pytest

from trio_pilot.runtimes import Mount, engine_mounts
from trio_pilot.runtimes.docker import DOCKER
from trio_pilot.runtimes.engine_mounts import EngineMounts
from trio_pilot.runtimes.podman import PODMAN

A, B = (Mount(Path(path), path) for path in ("/a", "/b"))


@pytest.fixture(autouse=True)
def no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_mounts, "to_the_bottom", lambda mounts, _user: tuple(mounts))


def refusal(path: str) -> str:
    return f"path {path} is mounted on / but it is not a shared or slave mount"


def propagating(mounts: EngineMounts) -> list[str]:
    return [mount.target for mount in mounts.of([A, B]) if mount.propagates]


def test_docker_is_asked_to_propagate_until_it_refuses(caplog: pytest.LogCaptureFixture) -> None:
    mounts = EngineMounts(DOCKER, 0)
    asked = mounts.of([A, B])
    assert caplog.text == ""
    assert mounts.note_refusal(refusal("/a"), asked)
    assert propagating(mounts) == ["/b"]
    assert caplog.text.count("docker: what is mounted below '/a' while a container runs is not seen in it") == 1


def test_containers_that_are_refused_at_once_are_all_repeated() -> None:
    mounts = EngineMounts(DOCKER, 0)
    asked = mounts.of([A])
    assert [mounts.note_refusal(refusal("/a"), asked) for _ in range(2)] == [True, True]
    assert not mounts.note_refusal(refusal("/a"), mounts.of([A]))


def test_a_refusal_for_another_name_of_a_directory_counts_for_all() -> None:
    mounts = EngineMounts(DOCKER, 0)
    assert mounts.note_refusal(refusal("/elsewhere"), mounts.of([A, B]))
    assert propagating(mounts) == []


def test_another_refusal_is_not_about_mounts() -> None:
    mounts = EngineMounts(DOCKER, 0)
    assert not mounts.note_refusal("no space left on device", mounts.of([A]))
    assert propagating(mounts) == ["/a", "/b"]


def test_podman_is_never_asked_for_less(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(engine_mounts, "to_the_bottom", lambda _mounts, _user: (Mount(Path("/a"), "/a", propagates=False),))
    EngineMounts(PODMAN, 0).of([A])
    assert "podman: what is mounted below '/a'" in caplog.text
