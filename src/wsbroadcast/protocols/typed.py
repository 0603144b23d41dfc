"""Reads messages of clients by their types, and makes the errors that clients get for wrong ones."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.message import Message
from wsbroadcast.protocols.commands import ErrorCode, Refused
from wsbroadcast.stats import Counters
from wsbroadcast.typed.message_types import MessageTypes
from wsbroadcast.typed.mistakes import Invalid


class TypedReader:
    """Reads messages of clients, and counts those that don't fit.

    Args:
        types: The types that messages may have.
        counters: The counters of the manager.
    """

    def __init__(self, types: MessageTypes[Any], counters: Counters) -> None:
        self.types = types
        """The types that messages may have."""
        self._counters = counters
        self._throttle = Throttle()

    def read(self, raw: str | bytes) -> Any:
        """Return the message in a text of JSON.

        Raises:
            Refused: If it isn't of these types, or a validator of the app fails. A failure is logged once a minute.
        """
        try:
            return self.types.read(raw)
        except Invalid as invalid:
            raise self.refused(invalid) from None
        except Exception as error:
            raise self.failed(error) from None

    def failed(self, error: Exception) -> Refused:
        """Count and log a message for which a validator of the app failed; return the error for its client."""
        self._counters.invalid += 1
        if self._throttle.is_due("validator"):
            text = "a validator failed for a message of a client"
            logger.error(text, exc_info=error, extra=about("validator.failed"))
        return Refused(ErrorCode.FAILED, "a mistake of the server's")

    def refused(self, invalid: Invalid) -> Refused:
        """Count a message that doesn't fit; return the error for its client."""
        self._counters.invalid += 1
        return Refused(ErrorCode.INVALID_DATA, "the data doesn't fit", errors=invalid.mistakes)

    def read_command(self, raw: str | bytes) -> Any:
        """Return the command in a text of JSON.

        Raises:
            Refused: If it is not JSON.
        """
        try:
            return read_json(raw)
        except ValueError:
            self._counters.invalid += 1
            raise Refused(ErrorCode.INVALID_COMMAND, "a command is JSON") from None


def read_json(raw: str | bytes) -> Any:
    """Return the value of a text of JSON.

    Raises:
        ValueError: If it is broken, nested too deeply, or holds a number that JSON can't carry back, such as 1e999.
    """
    value = from_json(raw, allow_inf_nan=False)
    Message.json(value)  # 1e999 fails here: it was read as infinity
    return value
