"""The engine for apps with several processes on one machine: an SQLite file in place of a broker."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, unquote

from wsbroadcast.engines.broker import DEFAULT_TIMING, MAX_MESSAGE_BYTES, truth
from wsbroadcast.engines.broker.envelope import encode
from wsbroadcast.engines.broker.link import Parcel
from wsbroadcast.engines.broker.names import DEFAULT_PREFIX
from wsbroadcast.engines.broker.presence import PresentEngine
from wsbroadcast.engines.sqlite.link import SQLiteLink
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.options import Timing
from wsbroadcast.publication import PresenceChange

# A write waits for another process for this part of `request_timeout`. The rest is time to report that it failed.
_BUSY_PART = 0.75


class SQLiteEngine(PresentEngine):
    """Links the processes of one machine through an SQLite file. Nothing has to be installed or started.

    The file must be on a disk of the machine, and nothing else may write to it. Processes in containers can share it if
    they run on one kernel and mount one volume.

    Args:
        path: The path of the file. It is made if there is none.
        prefix: The beginning of all names. Apps that share a file need different prefixes.
        fail_fast: Whether `start` raises if the file can't be opened now. Otherwise it starts without the file.
        max_message_bytes: The largest payload that is taken from the file, in bytes.
        timing: How long to wait for the file.

    Raises:
        ConfigurationError: If an option makes no sense.
    """

    name = "sqlite"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        prefix: str = DEFAULT_PREFIX,
        fail_fast: bool = False,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        text = os.fspath(path)
        if not text or text.startswith(":memory:") or "\0" in text:
            raise ConfigurationError(
                "the sqlite engine needs a file that other processes can open: give a path, or use memory://"
            )
        if text.startswith("sqlite:"):
            raise ConfigurationError("SQLiteEngine takes the path of a file; SQLiteEngine.from_url takes a URL")
        self._path = Path(text).absolute()
        super().__init__(
            prefix=prefix,
            address=str(self._path),
            fail_fast=fail_fast,
            max_message_bytes=max_message_bytes,
            timing=timing,
        )
        self._prefix = prefix

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make an engine from `sqlite:///relative/path.db?prefix=…&fail_fast=true`; `sqlite:////` is absolute.

        Raises:
            ConfigurationError: If the URL makes no sense.
        """
        start, _, query = url.partition("?")
        _, separator, path = start.partition("://")
        if not separator or not path.startswith("/"):
            raise ConfigurationError(
                "the URL of SQLite is sqlite:///path/of/file.db, or sqlite:////path/of/file.db from the root; for one "
                "process without a file use memory://"
            )
        options: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
        for name in options.keys() - {"fail_fast", "prefix"}:
            raise ConfigurationError(f"the URL of SQLite takes no option {name!r:.80}: it takes fail_fast and prefix")
        if "fail_fast" in options:
            options["fail_fast"] = truth("fail_fast", options["fail_fast"], "SQLite")
        return cls(unquote(path[1:]), **options)

    def new_link(self) -> SQLiteLink:
        """Make a link that isn't open yet."""
        return SQLiteLink(
            self._path,
            self._prefix,
            self._pack,
            self.told_rules,
            only_publishes=self.only_publishes,
            busy_seconds=_BUSY_PART * self._timing.request_timeout,
        )

    def _pack(self, change: PresenceChange) -> Parcel:
        # It needs no origin, because it has a version. It is made in the thread that writes.
        return Parcel(self.names.of(change.audience), encode(change, None))
