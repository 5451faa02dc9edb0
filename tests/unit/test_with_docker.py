"""The entrypoint of the image with a docker daemon; tests/integration/test_images.py runs it."""

from pathlib import Path

import pytest

from images import with_docker


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """The control group of a container, as if the kernel had made it."""
    files = {"cgroup.type": "domain\n", "cgroup.procs": "1\n7\n", "cgroup.controllers": "cpu memory pids\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    return tmp_path


def test_control_groups_below_that_of_the_container_can_have_limits(top: Path) -> None:
    with_docker.divide(top)
    assert (top / "init/cgroup.procs").read_text() == "7"  # the kernel takes one process with each write
    assert (top / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"


def test_control_groups_of_the_machine_are_left_alone(top: Path) -> None:
    (top / "cgroup.type").unlink()  # that of a machine has none
    with_docker.divide(top)
    assert not (top / "init").exists()


def test_a_daemon_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(with_docker, "PID_FILES", ())
    monkeypatch.setattr(with_docker, "SOCKET", str(tmp_path / "docker.sock"))
    monkeypatch.setattr(with_docker, "LOG", str(tmp_path / "log"))
    monkeypatch.setattr(with_docker, "INIT", ("sh", "-c", "echo no control groups >&2; exit 1", "-"))
    assert with_docker.start() == "no control groups"
    monkeypatch.setattr(with_docker, "INIT", (str(tmp_path / "missing"),))
    assert "No such file or directory" in with_docker.start()
    monkeypatch.setattr(with_docker, "LOG", str(tmp_path / "no-such-directory/log"))
    assert "No such file or directory" in with_docker.start()
