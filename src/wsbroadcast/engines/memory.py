"""The engine of a single process: what is published is received at once."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import sys
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Self

from wsbroadcast.engines.contract import Engine, Health, Receiver
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable, LifecycleError
from wsbroadcast.logs import logger
from wsbroadcast.publication import Control, Publication

# Programs that serve an app with several processes, and the option that they have in common.
_SERVER = re.compile(r"(uvicorn|gunicorn|hypercorn|granian|fastapi)(\.exe|[/\\]__main__\.py)?$")
_OPTION = re.compile(r"(?<!\S)(?:--workers|-w)[ =]?(\d+)(?!\S)")


class MemoryEngine(Engine):
    """Reaches the connections of this process only. No I/O, nothing to configure."""

    name = "memory"
    links_nodes = False

    def __init__(self) -> None:
        self._receiver: Receiver | None = None
        # Where it was started: the event loop, and the process, which may have been forked off since.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make an engine from `memory://`."""
        if url.removeprefix("memory:").strip("/"):
            raise ConfigurationError("the memory engine takes no host and no path: write memory://")
        return cls()

    async def start(self, receiver: Receiver) -> None:
        """Begin to hand publications to the receiver; warn if this is one of several processes.

        Raises:
            LifecycleError: If it runs already.
        """
        loop = self._loop
        if self._receiver is not None and loop is not None and loop.is_running() and self._process == os.getpid():
            raise LifecycleError("the memory engine is started already: each manager needs one of its own")
        _warn_of_several_workers()
        self._receiver, self._loop, self._process = receiver, asyncio.get_running_loop(), os.getpid()

    async def aclose(self) -> None:
        """Stop."""
        self._receiver = self._loop = None

    def publish(self, publication: Publication | Control) -> Coroutine[Any, Any, None]:
        """Deliver to this node's connections; returns when they have it."""
        return self._started().deliver(publication)  # its coroutine, without one of our own around it

    def publish_nowait(self, publication: Publication | Control) -> None:
        """Deliver to this node's connections, behind what waits for `on_deliver` hooks."""
        self._started().take(publication)

    async def health(self) -> Health:
        """Tell whether the engine was started."""
        return Health(self.name, self._receiver is not None, "" if self._receiver else "not started")

    def _started(self) -> Receiver:
        if self._receiver is None:
            raise EngineUnavailable("the memory engine is not started")
        return self._receiver


def _warn_of_several_workers() -> None:
    sign = sign_of_several_workers(os.environ, sys.argv, is_child=multiprocessing.parent_process() is not None)
    if sign:
        logger.warning(
            "%s, and memory:// doesn't link them: a broadcast reaches only the connections of the process it is made "
            "in. Give the ConnectionManager the URL of a broker, such as redis://localhost, or run one worker",
            sign,
        )


def sign_of_several_workers(environ: Mapping[str, str], argv: Sequence[str], *, is_child: bool) -> str:
    """Say how we know that several processes serve the app; empty if nothing says so.

    The command line counts if it is that of a server, or of the parent of a `multiprocessing` child, which gets it. A
    number that a program or a file gives to its server isn't known.
    """
    options = argv[1:] if is_child or _SERVER.search(" ".join(argv[:1])) else []
    if "--reload" in options:  # which makes one worker of any number
        return ""
    numbers = [(int(number), "the command line") for number in _OPTION.findall(" ".join(options))]
    if not numbers:
        variables = ("GRANIAN_WORKERS", "WEB_CONCURRENCY") if is_child else ("WEB_CONCURRENCY",)
        numbers = [(int(environ[each]), each) for each in variables if environ.get(each, "").isdecimal()]
    number, where = max(numbers[-1:], default=(1, ""))
    return f"{where} asks for {number} workers" if number > 1 else ""
