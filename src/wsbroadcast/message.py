"""What was broadcast, validated and encoded once."""

from __future__ import annotations

from typing import Literal, Protocol

from wsbroadcast.encoding import to_json_bytes
from wsbroadcast.exceptions import EncodeError, MessageTooLarge
from wsbroadcast.text import plain

Form = Literal["text", "json", "binary"]
"""What the bytes of a message are. JSON goes out as text."""


class Encoding(Protocol):
    """Makes of a message what is written to connections."""

    def encode(self, message: Message) -> bytes:
        """Return the bytes."""


class Message:
    """One message, encoded once. Treat it as immutable.

    A `str` is a text frame, `bytes` a binary one, anything else JSON in a text frame.
    """

    __slots__ = ("_encoded", "form", "key", "payload", "size")

    def __init__(self, payload: bytes, form: Form = "text", *, key: str | None = None) -> None:
        self.payload = payload
        """The bytes of the message, UTF-8 for text and JSON."""
        self.size = len(payload)
        """The payload's size in bytes."""
        self.form = form
        """What the bytes are: `text`, `json` or `binary`."""
        self.key = key
        """Under the policy `conflate` a newer message to the same audience with the same key replaces this one."""
        # What was made of it for the wire. A message that is broadcast twice has it already.
        self._encoded: dict[Encoding, bytes] = {}

    @classmethod
    def of(cls, value: object, key: str | None = None) -> Message:
        """Encode a value. A `Message` is returned as it is, unless it gets another key.

        Raises:
            EncodeError: If the value holds a lone surrogate, NaN or an infinity, or can't be written as JSON; or if the
                key is no str.
        """
        if key is not None:
            if not isinstance(key, str):
                raise EncodeError(f"a key is a str, not {type(key).__name__}")
            key = plain(key)
        if isinstance(value, str):
            text = value if type(value) is str else plain(value)
            try:
                return cls(text.encode(), key=key)
            except UnicodeEncodeError as error:
                raise EncodeError(f"text holds a lone surrogate at position {error.start}: not UTF-8") from error
        if isinstance(value, (bytes, bytearray, memoryview)):
            return cls(bytes(value), "binary", key=key)
        if isinstance(value, Message):
            if key is None or key == value.key:
                return value
            return cls(value.payload, value.form, key=key)
        return cls.json(value, key)

    @classmethod
    def json(cls, value: object, key: str | None = None) -> Message:
        """Encode a value as JSON, a `str` too.

        Raises:
            EncodeError: If the value holds a lone surrogate, NaN or an infinity, or can't be written as JSON.
        """
        return cls(to_json_bytes(value), "json", key=key)

    @property
    def is_text(self) -> bool:
        """Whether it goes out as a text frame; as a binary one else."""
        return self.form != "binary"

    def encoded(self, encoding: Encoding) -> bytes:
        """Return the message in an encoding for the wire, made once for all connections that share it."""
        encoded = self._encoded.get(encoding)
        if encoded is None:
            encoded = self._encoded[encoding] = encoding.encode(self)
        return encoded

    def within(self, limit: int) -> Message:
        """Return the message itself.

        Raises:
            MessageTooLarge: If it is larger than the limit, in bytes.
        """
        if self.size > limit:
            raise MessageTooLarge(self.size, limit)
        return self

    @property
    def data(self) -> str | bytes:
        """The message as a client receives it: `str` for a text frame, `bytes` for a binary one."""
        return self.payload.decode() if self.is_text else self.payload  # not kept: a text may take four times the bytes

    def __repr__(self) -> str:
        return f"<Message {self.form} {self.size} bytes>"  # never the payload: a repr ends up in logs
