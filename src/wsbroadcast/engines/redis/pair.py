"""Two connections to one Redis server, one to publish and one to receive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from wsbroadcast.engines.link import Parcel
from wsbroadcast.engines.redis.replies import ErrorReply, Reply
from wsbroadcast.engines.redis.target import Access, Host
from wsbroadcast.engines.redis.wire import Asker, Listener, Wire
from wsbroadcast.exceptions import ConfigurationError

T = TypeVar("T")


class Pair:
    """Both connections, and the commands that go over them.

    Args:
        access: How to get in.
        host: Where; `None` for a unix socket.
        needs: The permissions that we need, as in `ACL SETUSER`.
        lost: Called with the reason when one of them has ended.
        is_sharded: Use the commands of sharded pub/sub.
    """

    def __init__(
        self,
        access: Access,
        host: Host | None,
        needs: str,
        lost: Callable[[Exception], None],
        *,
        is_sharded: bool = False,
    ) -> None:
        self.asker = Asker(access, host, needs, lost)
        self.listener = Listener(access, host, needs, lost, is_sharded=is_sharded)
        verb = b"SPUBLISH" if is_sharded else b"PUBLISH"
        self._head = b"*3\r\n$%d\r\n%b\r\n" % (len(verb), verb)

    @property
    def wires(self) -> tuple[Wire, Wire]:
        """Both connections."""
        return self.asker, self.listener

    async def open(self, probe: str | None) -> None:
        """Connect, and see whether we may do everything that we will do.

        Args:
            probe: A name like those that will be used, of no audience; `None` to take it on trust.

        Raises:
            ConfigurationError: If the server refuses us.
        """
        await together(self.asker.open(), self.listener.open())
        if probe is None:
            return
        (answer,) = await self.asker.ask(self._packed(Parcel(probe, b"")))
        if isinstance(answer, ErrorReply):
            raise self.asker.explain(answer)
        await self.listener.subscribe([[probe]])
        await self.listener.unsubscribe([[probe]])

    async def publish(self, parcels: Iterable[Parcel]) -> list[Exception | None]:
        """Publish in one write; return for each parcel what it was refused with.

        Raises:
            Exception: If the connection is lost, or this is the wrong server by now.
        """
        answers = await self.asker.ask(*map(self._packed, parcels))
        return [None if type(answer) is int else self._refusal(answer) for answer in answers]

    def _packed(self, parcel: Parcel) -> bytes:
        name, envelope = parcel.name.encode(), parcel.envelope
        return b"%b$%d\r\n%b\r\n$%d\r\n%b\r\n" % (self._head, len(name), name, len(envelope), envelope)

    def _refusal(self, answer: Reply) -> Exception:
        if not isinstance(answer, ErrorReply):
            raise ValueError(f"Redis at {self.asker.where} answers a publish with {type(answer).__name__}")
        error = self.asker.explain(answer)
        if isinstance(error, ConnectionError):
            raise error
        return error


async def together(*work: Coroutine[Any, Any, T]) -> list[T]:
    """Run coroutines at the same time; if one fails, end the others and raise its error.

    No `TaskGroup`, which before Python 3.13 forgets that it is being cancelled when one of its tasks fails (gh-116720).

    Raises:
        Exception: The first error, or a `ConfigurationError` among several.
    """
    tasks = [asyncio.create_task(each, name="wsbroadcast engine redis") for each in work]
    if not tasks:
        return []
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    errors = [task.exception() for task in tasks if not task.cancelled()]
    failures = sorted(filter(None, errors), key=lambda error: not isinstance(error, ConfigurationError))
    if failures:
        raise failures[0]
    return [task.result() for task in tasks]
