"""Errors of RabbitMQ: reply codes, and the texts that pika hides in errors within errors."""

from trio_pilot.brokers.reconnecting import LostError

# Reply codes of AMQP 0-9-1, "Constants".
NO_ROUTE = 312
ACCESS_REFUSED = 403
NOT_FOUND = 404
PRECONDITION_FAILED = 406
NOT_ALLOWED = 530


class ClosedError(LostError):
    """A channel is closed: by the server, for the reason that `code` gives, or with its connection (`code` 0)."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def causes(error: BaseException) -> list[BaseException]:
    """Return an error and all errors that pika has wrapped in it."""
    inner = [one for one in (*error.args, *getattr(error, "exceptions", ())) if isinstance(one, BaseException)]
    if isinstance(exception := getattr(error, "exception", None), BaseException):
        inner.append(exception)
    return [error, *(deeper for one in inner for deeper in causes(one))]


def text_of(error: BaseException) -> str:
    """Return the text of the innermost cause of an error of pika's."""
    cause = causes(error)[-1]
    text = getattr(cause, "reply_text", None) or getattr(cause, "strerror", None) or str(cause)
    return str(text) or type(cause).__name__


def closed_error(error: Exception) -> ClosedError:
    """Translate the error with which pika reports the end of a channel."""
    return ClosedError(getattr(error, "reply_code", 0), text_of(error))
