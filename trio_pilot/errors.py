"""The errors of this package, in one tree. Errors of other libraries are translated into it where they are called."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar


class PilotError(Exception):
    """Base of all errors that trio-pilot reports: one line with the thing, the value found, and what to do."""

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
    """The broker cannot be used: it is unreachable for too long, or refuses the connection."""

    exit_code = 3


class DeliveryLostError(BrokerError):
    """A delivery can no longer be settled: its connection is gone, and the broker has the event again."""


class DeliveryReplacedError(DeliveryLostError):
    """A delivery was lost after its event was copied to its destination: if the event comes again, it is done."""


class NotSetAsideError(BrokerError):
    """No queue and no lasting directory takes a dead letter: its event is still to be settled, and can only go back."""


class NodeError(PilotError):
    """This machine cannot run tasks: there is no runtime, image or disk. The event is not at fault."""

    exit_code = 4


class ContainerLostError(NodeError):
    """A container ended with its engine, or its end is unknown. The engine may work again: the pilot goes on."""


class NoProcessError(NodeError):
    """No process or thread can be started for the moment: a task may have taken all of them. The pilot goes on."""


class ReportError(PilotError):
    """A report to HTCondor failed. This never ends a pilot."""


class EventError(PilotError):
    """This event cannot be processed, here or on another machine."""


class DecodeError(EventError):
    """The body of a message is not in its wire format."""


class EncodeError(EventError):
    """A message cannot be written in its wire format."""


class OutfileError(EventError):
    """The output file of a task cannot be sent."""


class PublishRefusedError(EventError):
    """The broker takes messages, but not this one (too large, say)."""


class ContainerRunError(EventError):
    """A container ended with an error, as `ALIAS failed (exit code N): REASON`."""


class ContainerTimeoutError(ContainerRunError, TimeoutError):
    """A container did not end in time. In OKAY_ERRORS it is also TimeoutError and ContainerRunError."""


class ContainerOutOfMemoryError(ContainerRunError, MemoryError):
    """A container was killed because it ran out of memory."""


def names(error: BaseException) -> set[str]:
    """Return the names that OKAY_ERRORS may use for an error: its class and all base classes."""
    return {cls.__name__ for cls in type(error).__mro__}


def reported_name(error: BaseException) -> str:
    """Return the class name by which EWMS knows and counts an error: its own kinds of ContainerRunError are all one."""
    return ContainerRunError.__name__ if isinstance(error, ContainerRunError) else type(error).__name__


def leaves(group: BaseExceptionGroup[Any]) -> Iterator[Any]:
    """Yield the errors in a group of errors, and in the groups in it."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


def first(error: BaseException) -> BaseException:
    """Return the first error in a group, or the error itself if it is no group."""
    return next(leaves(error)) if isinstance(error, BaseExceptionGroup) else error


@contextmanager
def map_exceptions(mapping: Mapping[type[Exception], type[PilotError]], what: str) -> Iterator[None]:
    """Translate errors of other libraries: the first that matches is raised as its PilotError, `WHAT: the original text`."""
    try:
        yield
    except tuple(mapping) as foreign:
        error = next(error for kind, error in mapping.items() if isinstance(foreign, kind))
        raise error(f"{what}: {foreign or type(foreign).__name__}") from foreign
