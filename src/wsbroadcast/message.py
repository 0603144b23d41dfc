"""What was broadcast, validated and encoded once."""

from __future__ import annotations

from typing import Any

from wsbroadcast.encoding import to_json_bytes
from wsbroadcast.exceptions import EncodeError, MessageTooLarge
from wsbroadcast.text import plain


class Message:
    """One message in the only form it will ever be encoded to. Treat it as immutable.

    A `str` is a text frame, `bytes` a binary one, anything else JSON in a text frame.
    """

    __slots__ = ("frames", "is_text", "key", "payload", "size")

    def __init__(self, payload: bytes, *, is_text: bool, key: str | None = None) -> None:
        self.payload = payload
        """The bytes of the message, UTF-8 for text."""
        self.size = len(payload)
        """The payload's size in bytes."""
        self.is_text = is_text
        """Whether it goes out as a text frame."""
        self.key = key
        """Under the policy `conflate` a newer message to the same audience with the same key replaces this one."""
        # Finished frames by wire form, filled by `delivery.frames`.
        self.frames: dict[Any, bytes] = {}

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
                return cls(text.encode(), is_text=True, key=key)
            except UnicodeEncodeError as error:
                raise EncodeError(f"text holds a lone surrogate at position {error.start}: not UTF-8") from error
        if isinstance(value, (bytes, bytearray, memoryview)):
            return cls(bytes(value), is_text=False, key=key)
        if isinstance(value, Message):
            if key is None or key == value.key:
                return value
            return cls(value.payload, is_text=value.is_text, key=key)
        return cls.json(value, key)

    @classmethod
    def json(cls, value: object, key: str | None = None) -> Message:
        """Encode a value as JSON, a `str` too.

        Raises:
            EncodeError: If the value holds a lone surrogate, NaN or an infinity, or can't be written as JSON.
        """
        return cls(to_json_bytes(value), is_text=True, key=key)

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
        kind = "text" if self.is_text else "binary"
        return f"<Message {kind} {self.size} bytes>"  # never the payload: a repr ends up in logs
