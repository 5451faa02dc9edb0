"""One tree of errors; whatever a foreign library raises is translated into it at the seam."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar


class PilotError(Exception):
    """Anything that trio-pilot itself reports: one line that says what, the value found, and what to do."""

    exit_code: ClassVar[int] = 1


class TasksFailedError(PilotError):
    """The pilot has done its work, but some tasks failed."""


class SettingsError(PilotError):
    """A setting is missing or wrong."""

    exit_code = 2


class UsageError(PilotError):
    """The command line is wrong."""

    exit_code = SettingsError.exit_code


class BrokerError(PilotError):
    """The broker cannot be used: unreachable for too long, or it refuses us."""

    exit_code = 3


class DeliveryLostError(BrokerError):
    """A delivery can no longer be settled: the connection it came by is gone, and the broker has it again."""


class DeliveryReplacedError(DeliveryLostError):
    """A delivery was lost, but not before its event was copied to where it belongs: should it come again, it is done."""


class NodeError(PilotError):
    """This machine cannot run tasks: no runtime, no image, no disk. Never the event's fault."""

    exit_code = 4


class ContainerLostError(NodeError):
    """A container ended with its engine, or nobody knows how. The engine may work again: the pilot goes on."""


class ReportError(PilotError):
    """What the pilot does cannot be told to HTCondor. It never ends a pilot."""


class EventError(PilotError):
    """This event cannot be done, and another machine would do no better."""


class DecodeError(EventError):
    """The body of a message is not what the wire format says."""


class EncodeError(EventError):
    """What is to be sent cannot be written in the wire format."""


class OutfileError(EventError):
    """What a task left in the place of its output file cannot be sent."""


class PublishRefusedError(EventError):
    """The broker takes messages, but not this one (too large, say)."""


class ContainerRunError(EventError):
    """A container ended with an error, as `ALIAS failed (exit code N): REASON`."""


class ContainerTimeoutError(ContainerRunError, TimeoutError):
    """A container was not done in time. OKAY_ERRORS knows it as TimeoutError, and as ContainerRunError."""


class ContainerOutOfMemoryError(ContainerRunError, MemoryError):
    """A container was killed for want of memory."""


def names(error: BaseException) -> set[str]:
    """Give the names by which OKAY_ERRORS may call an error: its class and all the classes above."""
    return {cls.__name__ for cls in type(error).__mro__}


def reported_name(error: BaseException) -> str:
    """Return the class name by which EWMS knows and counts an error: its own kinds of ContainerRunError are all one."""
    return ContainerRunError.__name__ if isinstance(error, ContainerRunError) else type(error).__name__


def leaves(group: BaseExceptionGroup[Any]) -> Iterator[Any]:
    """Give the errors in a group of errors, and in the groups in it."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


def first(error: BaseException) -> BaseException:
    """Give the first error in a group, or what is no group as it is."""
    return next(leaves(error)) if isinstance(error, BaseExceptionGroup) else error


@contextmanager
def map_exceptions(mapping: Mapping[type[Exception], type[PilotError]], what: str) -> Iterator[None]:
    """Translate foreign errors at a seam: the first match is raised as ours, `WHAT: the foreign text`."""
    try:
        yield
    except tuple(mapping) as foreign:
        ours = next(ours for theirs, ours in mapping.items() if isinstance(foreign, theirs))
        raise ours(f"{what}: {foreign or type(foreign).__name__}") from foreign
