import os
from pathlib import Path

import pytest

from trio_pilot.cli import root_warning
from trio_pilot.processes import proc


@pytest.mark.parametrize(
    ("user", "users", "mark", "is_warned"),
    [
        (0, "0 0 4294967295", "none", True),
        (0, "         0          0 4294967295\n", "none", True),
        (0, "0 5001 1", "none", False),
        (0, "0 0 4294967295", ".", False),
        (5001, "0 0 4294967295", "none", False),
    ],
    ids=["root", "as in a kernel", "in a user namespace", "in a container", "a user"],
)
def test_only_root_of_the_machine_is_warned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: int, users: str, mark: str, is_warned: bool
) -> None:
    (tmp_path / "uid_map").write_text(users)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(proc, "UID_MAP", tmp_path / "uid_map")
    monkeypatch.setattr(root_warning, "OF_CONTAINERS", (str(tmp_path / mark),))
    assert (root_warning.root_warning() is not None) is is_warned
