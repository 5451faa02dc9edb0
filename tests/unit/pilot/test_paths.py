import pytest

from trio_pilot.pilot.container_runs import PLAIN_PATH

ODD = [*" `$';*?[&|<>({!#~^", '"', "\\", "\n", "\t", "\udcff"]


@pytest.mark.parametrize("odd", ODD, ids=ascii)
def test_a_path_that_a_shell_reads_as_something_else_is_not_plain(odd: str) -> None:
    assert not PLAIN_PATH.fullmatch(f"/a{odd}b")


@pytest.mark.parametrize("path", ["/scratch/slot1_2/dir.3", "/tmp/pytest-of-root/a0", "/a+b@c%d:e=f,g-h", "/données"])
def test_usual_paths_are_plain(path: str) -> None:
    assert PLAIN_PATH.fullmatch(path)
