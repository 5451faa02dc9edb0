"""How long a pilot waits for a container engine."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineTimeouts:
    """Times in seconds. The defaults are what a pilot uses; tests give shorter ones."""

    request: float = 60.0  # for an answer: an engine that starts a hundred containers at once takes its time for each
    ping: float = 3.0  # for the answer to a ping

    create_grace: float = 5.0  # for the answer to a create request after its task is cancelled

    # While a container runs, the engine is pinged: without that, a frozen engine would be waited for forever. The first
    # ping is sent after `first_ping`, the next when the container has run for twice as long, and so on, but the interval
    # never exceeds `longest_ping`.
    first_ping: float = 2.0
    longest_ping: float = 60.0

    fetch_logs: float = 60.0  # to read what a container has written
    fetch_logs_cancelled: float = 2.0  # the same, if its task is cancelled

    removal: float = 10.0  # to stop and remove a container, besides its kill grace; then the background goes on with it
    last_removal: float = 3.0  # for the last attempt, when the runtime closes; after that the guardian removes it

    pull_silence: float = 300.0  # without progress of a pull: while it unpacks a large layer, the engine reports nothing
    pull_report: float = 10.0  # between two log lines about a pull

    # If a registry limits the rate of pulls, thousands of pilots may have come at once. So each one comes back after a
    # random time, at first up to `first_pause`, then up to twice as long each time, and gives up after `rate_limit`.
    rate_limit: float = 900.0
    first_pause: float = 5.0
    longest_pause: float = 120.0


DEFAULT_TIMEOUTS = EngineTimeouts()
