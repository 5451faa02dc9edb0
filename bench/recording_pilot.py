"""A pilot that records how its last task was started: `python -m bench.recording_pilot SETTINGS.json RECORDING.json`.

The recording has the command and what it reads from descriptors, or the requests to an engine, so that
`bench.without_pilot` can repeat exactly these.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from bench import custom_pilot
from bench.timing_pilot import wrapped
from trio_pilot.cleanup.client import open_guardian
from trio_pilot.processes.children import Child, Children, Command
from trio_pilot.runtimes import Container, Exit, Runtime
from trio_pilot.runtimes.engine_api import Answer, EngineApi
from trio_pilot.runtimes.selection import open_runtime

Recording = dict[str, Any]


class RecordingRuntime:
    """A runtime that records the names of the container and the directory of a task."""

    def __init__(self, runtime: Runtime, recording: Recording) -> None:
        self._runtime = runtime
        self._recording = recording

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the runtime itself."""
        return getattr(self._runtime, name)

    async def run(self, container: Container) -> Exit:
        """Run a container; record its name, and the directory that contains those of all tasks."""
        self._recording.update(name=container.name, root=str(container.scratch.parent.parent), requests=[])
        return await self._runtime.run(container)


def main() -> None:
    """Run a pilot with the settings in one file until SIGTERM, and write the recording to the other."""
    settings, recording = custom_pilot.read_settings(sys.argv[1]), Recording(requests=[])
    _record_commands(recording)
    _record_requests(recording)
    runtime = open_runtime(settings.runtime, settings.task_image, settings.runtime_options)
    custom_pilot.run_pilot(settings, open_guardian(), wrapped(runtime, partial(RecordingRuntime, recording=recording)))
    Path(sys.argv[2]).write_text(json.dumps(recording))


def _record_commands(recording: Recording) -> None:
    spawn = Children.spawn

    def recording_spawn(children: Children, command: Command) -> Child:
        recording.update(argv=command.argv, env=command.env, fds=command.pass_fds, contents={})
        for descriptor in command.pass_fds:
            with suppress(OSError):  # a pipe, which the command writes to
                recording["contents"][str(descriptor)] = os.fsdecode(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
        return spawn(children, command)

    _replace_method(Children, "spawn", recording_spawn)


def _record_requests(recording: Recording) -> None:
    call = EngineApi.call

    async def recording_call(api: EngineApi, request: str, what: str, **how: Any) -> Answer:
        method, _, path = request.partition(" ")
        query = {name: value for name, value in how.items() if name not in ("body", "seconds", "accepted")}
        recording["requests"].append((method, api.prefix + path, query, how.get("body")))
        return await call(api, request, what, **how)

    _replace_method(EngineApi, "call", recording_call)


def _replace_method(owner: type, name: str, function: Callable[..., Any]) -> None:
    setattr(owner, name, function)


if __name__ == "__main__":
    main()
