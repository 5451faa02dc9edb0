from pathlib import Path

import pytest
import trio

from tests.support.lab import Lab
from trio_pilot.files import late_sync
from trio_pilot.processes import threads

pytestmark = pytest.mark.mock_clock


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, bool]]:
    seen: list[tuple[Path, bool]] = []
    monkeypatch.setattr(late_sync, "sync", lambda path: seen.append((path, path.exists())))

    async def at_once(function: object, *arguments: object, abandon_on_cancel: bool) -> None:
        assert abandon_on_cancel
        assert callable(function)
        function(*arguments)

    monkeypatch.setattr(threads, "run_sync", at_once)  # a MockClock does not wait for threads
    return seen


async def test_an_output_that_is_sent_at_once_is_not_synced(lab: Lab, synced: list[tuple[Path, bool]]) -> None:
    lab.put(*range(20))
    await lab.run()
    assert synced == []


async def test_an_output_that_is_confirmed_late_is_synced_once(lab: Lab, synced: list[tuple[Path, bool]]) -> None:
    lab.broker.delays["sink.confirm"] = 60
    lab.put(1)
    await lab.run()
    assert [path.name.split("-")[0] for path, _ in synced][:2] == ["outfile", "task"]
    assert len(synced) == 3
    assert all(there for _, there in synced)
    assert lab.outputs() == ["1"]


async def test_an_output_that_is_sent_in_the_meantime_is_not_synced(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []

    async def slowly(function: object, path: Path, *, abandon_on_cancel: bool) -> None:
        del function, abandon_on_cancel
        kept.append(path)
        await trio.sleep(5)

    monkeypatch.setattr(threads, "run_sync", slowly)
    lab.broker.delays["sink.confirm"] = 12  # sent from second 1 on, checked in second 10
    lab.put(1, 2, 3)
    await lab.run(max_concurrent_tasks=2)
    assert len(kept) == 2
    assert sorted(lab.outputs()) == ["1", "2", "3"]
