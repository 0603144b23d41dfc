"""The engine of apps with several processes on one machine, and no broker: a file of SQLite."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, unquote

from wsbroadcast.engines.broker import DEFAULT_TIMING, MAX_MESSAGE_BYTES, truth
from wsbroadcast.engines.broker.history import KeepingEngine
from wsbroadcast.engines.broker.names import DEFAULT_PREFIX
from wsbroadcast.engines.sqlite.link import SQLiteLink
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.options import Timing

# The part of `request_timeout` that a write waits for another process; the rest is for saying that it failed.
_BUSY_PART = 0.75


class SQLiteEngine(KeepingEngine):
    """Links the processes of one machine through a file of SQLite; nothing has to be installed or started.

    The file is on a disk of the machine, and belongs to the engine alone. Processes in containers share it if they run
    on one kernel and mount one volume.

    Args:
        path: Where the file is; it is made if there is none.
        prefix: What all names begin with; apps that share a file take one each.
        fail_fast: Whether `start` raises if the file can't be opened now, instead of beginning degraded.
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
                "the sqlite engine needs a file that other processes can open; memory:// needs none"
            )
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
            ConfigurationError: If it makes no sense.
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
            raise ConfigurationError(f"the URL of SQLite has an option {name!r:.80}; it takes fail_fast, prefix")
        if "fail_fast" in options:
            options["fail_fast"] = truth("fail_fast", options["fail_fast"], "SQLite")
        return cls(unquote(path[1:]), **options)

    def new_link(self) -> SQLiteLink:
        """Make a link that isn't open yet."""
        return SQLiteLink(
            self._path,
            self._prefix,
            self.told_rules,
            only_publishes=self.only_publishes,
            busy_seconds=_BUSY_PART * self._timing.request_timeout,
        )
