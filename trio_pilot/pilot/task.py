"""An event on its way, and how its task can end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from trio_pilot.brokers import Delivery
from trio_pilot.errors import EventError, NodeError
from trio_pilot.files.task_directory import TaskFiles


@dataclass(slots=True, eq=False)
class Task:
    """An event on its way: the delivery by which it is settled, and its files."""

    delivery: Delivery  # replaced when the broker has lost it and delivers the event again
    files: TaskFiles
    headers: Mapping[str, Any] | None = None  # of the event's body, for its output; known once it is staged
    is_settled: bool = False  # or settling was given up: no other delivery is settled for it any more

    @property
    def is_lost(self) -> bool:
        """Whether the broker has taken the event back, as far as is known."""
        return self.delivery.source.has_lost(self.delivery)


@dataclass(frozen=True, slots=True)
class Success:
    """The output was sent, or the task wrote none."""


@dataclass(frozen=True, slots=True)
class EventFailed:
    """The event is at fault: another node would do no better."""

    error: EventError


@dataclass(frozen=True, slots=True)
class NodeFailed:
    """The node is at fault, or the engine that was lost: the event is not charged with it."""

    error: NodeError


Outcome: TypeAlias = Success | EventFailed | NodeFailed
