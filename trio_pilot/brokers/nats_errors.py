"""Errors of NATS, translated: refusals last, other errors may pass with another connection."""

import nats.errors
import nats.js.errors

from trio_pilot.brokers.reconnecting import ConnectError, LostError, TooLargeError
from trio_pilot.errors import BrokerError

NOT_ENABLED = 10039  # JetStream's error code: for this account
REFUSED = "refuses the user and password, or token"


class GoneError(LostError):
    """A stream, or the consumer of a delivery, does not exist, or no longer."""


class RefusedError(Exception):
    """The server does not permit a request."""


def translated(error: Exception, answer_timeout: float) -> Exception:
    """Return a BrokerError for a refusal, which lasts, and a LostError for an error that may pass."""
    text = text_of(error)
    match error:
        case BrokerError() | LostError() | TooLargeError():
            return error
        case nats.js.errors.NoStreamResponseError() | nats.js.errors.NotFoundError() | nats.errors.NoRespondersError():
            return GoneError("there is no such stream, or consumer, any more")
        case nats.js.errors.APIError() if error.err_code == NOT_ENABLED:
            return BrokerError("does not let this account use JetStream")
        case nats.js.errors.ServiceUnavailableError() if error.err_code is None:
            return LostError("there is no JetStream (nats-server needs -js), or not yet")
        case nats.js.errors.APIError():
            return LostError(f"{error.description} ({error.err_code})")
        case nats.errors.AuthorizationError():
            return BrokerError(REFUSED)
        case TimeoutError():
            return LostError(f"the server has not answered for {answer_timeout:g} s")
    if "authorization" in text.lower() or "authentication" in text.lower():
        return BrokerError(REFUSED)
    if "permissions violation" in text.lower():
        return BrokerError(f"refuses the pilot: {text}")
    return ConnectError(text)


def text_of(error: Exception) -> str:
    """Return the text of an error, without nats-py's prefix."""
    return getattr(error, "strerror", None) or str(error).removeprefix("nats: ") or type(error).__name__
