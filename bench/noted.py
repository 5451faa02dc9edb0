"""A pilot that notes how its last task was started: `python -m bench.noted SETTINGS.json NOTES.json`.

So whoever does that without a pilot can do the very same: by the command, or by the requests to an engine.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import inside
from bench.timed import wrapped
from trio_pilot.cleanup.client import open_guardian
from trio_pilot.processes.children import Child, Children, Command
from trio_pilot.runtimes import Container, Exit, Runtime
from trio_pilot.runtimes.engine_api import Answer, EngineApi
from trio_pilot.runtimes.selection import open_runtime

Notes = dict[str, Any]


class NotedRuntime:
    """A runtime, and the notes of what it runs."""

    def __init__(self, runtime: Runtime, notes: Notes) -> None:
        self._runtime = runtime
        self._notes = notes

    def __getattr__(self, name: str) -> Any:
        """Give what is the runtime's."""
        return getattr(self._runtime, name)

    async def run(self, container: Container) -> Exit:
        """Run a container; note its name, and the directory that those of all tasks are in."""
        self._notes.update(name=container.name, root=str(container.scratch.parent.parent), requests=[])
        return await self._runtime.run(container)


def main() -> None:
    """Serve with the settings in one file until SIGTERM, and write the notes to the other."""
    settings, notes = inside.settings(sys.argv[1]), Notes(requests=[])
    _note_commands(notes)
    _note_requests(notes)
    runtime = open_runtime(settings.runtime, settings.task_image, settings.runtime_options)
    inside.run(settings, open_guardian(), wrapped(runtime, partial(NotedRuntime, notes=notes)))
    Path(sys.argv[2]).write_text(json.dumps(notes))


def _note_commands(notes: Notes) -> None:
    spawn = Children.spawn

    def noting(children: Children, command: Command) -> Child:
        notes.update(argv=command.argv, env=command.env, fds=command.pass_fds)
        return spawn(children, command)

    _exchange(Children, "spawn", noting)


def _note_requests(notes: Notes) -> None:
    call = EngineApi.call

    async def noting(api: EngineApi, request: str, what: str, **how: Any) -> Answer:
        method, _, path = request.partition(" ")
        query = {name: value for name, value in how.items() if name not in ("body", "seconds", "accepted")}
        notes["requests"].append((method, api.prefix + path, query, how.get("body")))
        return await call(api, request, what, **how)

    _exchange(EngineApi, "call", noting)


def _exchange(owner: type, name: str, function: Callable[..., Any]) -> None:
    setattr(owner, name, function)


if __name__ == "__main__":
    main()
