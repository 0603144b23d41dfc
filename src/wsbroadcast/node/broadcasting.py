"""The ways in which a manager broadcasts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextvars import Context
from functools import partial
from typing import Any, TypeVar

from starlette.requests import HTTPConnection
from starlette.websockets import WebSocket

from wsbroadcast.audience import UNSET, Audience, audiences_of, user_keys
from wsbroadcast.concurrency import LoopEnded, running_loop, submit, wait_in_thread, without_waiting
from wsbroadcast.connection import Connection, Exclude, find_connection
from wsbroadcast.engines.contract import (
    Engine,
    each,
    keeps_history,
    publish_all,
    publish_all_nowait,
    publish_in,
)
from wsbroadcast.exceptions import LifecycleError, kind_of
from wsbroadcast.history import (
    Appended,
    HistoryRules,
    check_key,
)
from wsbroadcast.hooks import Encode, HookChain
from wsbroadcast.message import Enveloped, JSONDefault, Message
from wsbroadcast.node.lifecycle import Lifecycle
from wsbroadcast.node.listening import Listener
from wsbroadcast.node.node import Node
from wsbroadcast.node.presence import NodePresence
from wsbroadcast.publication import (
    NOBODY,
    Publication,
    Publications,
    Receipt,
    publications_of,
)
from wsbroadcast.tracing import is_untraced
from wsbroadcast.typed.message_types import MessageTypes
from wsbroadcast.typed.sends import SendRules, typed_envelope, typed_message, typed_publications
from wsbroadcast.types import Manager

T = TypeVar("T")

_NOT_RUNNING = "the manager isn't running"
_RUN_IT = "start the app with manager.lifespan, a router made by create_router, or `async with manager`"


def _no_websocket(value: object) -> str:
    text = f"connect takes the WebSocket of an endpoint, not {kind_of(value)}"
    if isinstance(value, Connection):
        return f"{text}: it is connected"
    if isinstance(value, HTTPConnection):
        return f"{text}: write @app.websocket(…) instead of @app.get(…), and websocket: WebSocket"
    return f"{text}: connect(websocket, user=…, channels=[…])"


class Broadcasting:
    """The ways to broadcast.

    Args:
        manager: The manager that broadcasts.
        engine: Links it to other nodes.
        hooks: The hooks that run around broadcasts.
        max_bytes: The size of the largest message, in bytes.
        json_default: Writes values that JSON doesn't know.
        rules: What is kept; `None` for nothing.

    Raises:
        ConfigurationError: If there are rules, and the engine can't keep histories.
    """

    def __init__(
        self,
        manager: Manager[Connection],
        engine: Engine,
        hooks: HookChain,
        max_bytes: int,
        json_default: JSONDefault | None,
        rules: HistoryRules | None,
    ) -> None:
        self.manager = manager
        """The manager that these operations belong to."""
        self.life: Lifecycle
        """The state of the manager, and its event loop."""
        self.rules = rules
        """What is kept; `None` for nothing."""
        if rules is not None:
            # The engine again, typed as one that keeps. To check that each time takes longer than to keep a message.
            self._keeper = keeps_history(engine)
            self._keeper.keep(rules)
        self.sends: SendRules | None = None
        """The types that broadcasts have; `None` for any."""
        self._hooks = hooks
        self._max_bytes = max_bytes
        self._json_default = json_default

    def ids(self, exclude: Exclude) -> frozenset[str]:
        """Return the ids of the connections in `exclude=`. Connections that aren't known here are left out.

        Raises:
            TypeError: If it holds something else.
        """
        several: Iterable[Any] = exclude  # type: ignore[assignment]  # or one connection
        if isinstance(exclude, (Connection, WebSocket, Listener, str)) or not isinstance(exclude, Iterable):
            several = (exclude,)
        try:
            found = [one if isinstance(one, Listener) else find_connection(one, self.manager) for one in several]
        except TypeError:
            raise TypeError(
                f"exclude takes connections and WebSockets, not {exclude!r:.80}; for users write exclude_users=…"
            ) from None
        return frozenset(connection.id for connection in found if connection is not None)

    # Messages.

    def encode(self, message: object, key: str | None = None) -> Message:
        """Encode a message, and check its size.

        Raises:
            EncodeError: If it can't be sent as text, bytes or JSON, or is too large.
        """
        return Message.of(message, key, json_default=self._json_default)._within(self._max_bytes)

    def publications(
        self,
        message: object,
        channel: object = UNSET,
        user: object = UNSET,
        channels: object = UNSET,
        to: object = UNSET,
        exclude: Exclude = (),
        exclude_users: object = (),
        key: str | None = None,
        as_: Any = None,
    ) -> Publications:
        """Build the publications of a broadcast from its arguments: one for each audience.

        Raises:
            EncodeError: If the message can't be sent as text, bytes or JSON, is too large, or isn't of its type.
            ValueError: If an argument isn't valid.
        """
        audiences = audiences_of(channel, user, channels, to)
        ids = self.ids(exclude) if exclude != () else NOBODY
        users = user_keys(exclude_users) if exclude_users != () else NOBODY
        if as_ is None and self.sends is None:
            return publications_of(self.encode(message, key), audiences, ids, users)
        encode = partial(self.encode, key=key)
        return typed_publications(self.sends, message, as_, audiences, encode, ids, users, key=key)

    def _encode_typed(
        self, known: Message, types: MessageTypes[Any], audience: Audience, message: object, key: str | None
    ) -> Message:
        # A hook may have returned another message. If not, the message is checked already.
        if message is known:
            return known
        if isinstance(known, Enveloped):
            return self.encode(typed_envelope(types, self.encode(message, key), audience))
        return self.encode(typed_message(types, message, key, audience), key)

    def publications_to(self, message: Message, audience: Audience, exclude: Exclude = ()) -> Publications:
        """Build the publications of a message that needs no check of its type.

        Raises:
            MessageTooLarge: If the message is too large.
        """
        return publications_of(self.encode(message), (audience,), self.ids(exclude) if exclude != () else NOBODY)

    def send_types(self, pattern: str | Audience, annotation: Any) -> MessageTypes[Any] | None:
        """Set the type of broadcasts to the channels of a pattern, or to `EVERYONE`; return the types that are known.

        Args:
            pattern: The pattern, or `EVERYONE`.
            annotation: The type; `None` to set none.

        Raises:
            ConfigurationError: If they have another type already, or messages of this type can't be sent.
        """
        if annotation is None:
            return None if self.sends is None else self.sends.about(pattern)
        if self.sends is None:
            self.sends = SendRules({})
        return self.sends.add(pattern, annotation)

    async def broadcast(
        self,
        publications: Publications,
        transaction: object = None,
        idempotency_key: str | None = None,
        *,
        node: Node | None = None,
        counts: bool = False,
    ) -> Receipt:
        """Publish to all nodes.

        Args:
            publications: The publications of one broadcast.
            transaction: See `ConnectionManager.broadcast`.
            idempotency_key: See `ConnectionManager.broadcast`.
            node: The node, if it is known. It is known even if the manager is closed.
            counts: Whether the receipt has the number of members on all nodes, if that is known. It costs one question.
        """
        if (tracing := self._hooks.tracing) is not None and is_untraced(publications):
            with tracing.publishing(publications):
                return await self.broadcast(publications, transaction, idempotency_key, node=node, counts=counts)
        if node is None:
            node = self.life.node
            if not self.life.is_started or self.life.loop is not asyncio.get_running_loop():
                node = await self.life.run_here()
        if counts and (known := node.presence) is not None and known.counts(publications):
            return await self._broadcast_and_count(node, known, publications, transaction, idempotency_key)
        if idempotency_key is not None:
            check_key(idempotency_key, self.rules, [each.audience for each in publications], transaction)
        if len(publications) != 1:
            return await self._broadcast_several(node, publications, transaction, idempotency_key)
        publication = publications[0]
        members = node.registry.count(publication.audience, publication.exclude, publication.exclude_users)
        if self._hooks.has("on_broadcast") or not node.dispatcher.is_clear:
            prepared = await self._prepare(node, publication, waits=transaction is None)
            if prepared is None:
                return Receipt(members, is_held_back=True)
            publication = prepared
        if transaction is not None:
            await publish_in(self.life.engine, transaction, (publication,), self.rules)
        elif self.rules is None or (history := self.rules.of(publication.audience)) is None:
            await self.life.engine.publish(publication)
        else:
            appended = await self._keeper.append(publication, history, idempotency_key)
            return Receipt(members, {publication.audience: appended.position}, is_repeat=appended.is_repeat)
        return Receipt(members)

    async def _broadcast_and_count(
        self,
        node: Node,
        presence: NodePresence,
        publications: Publications,
        transaction: object,
        idempotency_key: str | None,
    ) -> Receipt:
        audience = publications[0].audience
        publishing = self.broadcast(publications, transaction, idempotency_key, node=node)
        if not self.life.engine.links_nodes:
            receipt = await publishing
            return receipt._replace(members=await presence.reached(audience))  # the broadcast doesn't wait for this
        counting = node.tasks.begin(presence.reached(audience), "count", Context())
        try:
            receipt = await publishing
        except BaseException:
            counting.cancel()
            raise
        return receipt._replace(members=await counting)

    async def broadcast_local(self, publications: Publications) -> Receipt:
        """Send to the connections of this node only."""
        if (tracing := self._hooks.tracing) is not None and is_untraced(publications):
            with tracing.publishing(publications):
                return await self.broadcast_local(publications)
        node = await self.life.run_here()
        members = node.count(publications)
        prepared = await self._prepare_all(node, publications)
        node = await self.life.run_here()
        await each(node.deliver_local, prepared)
        return Receipt(members, is_held_back=not prepared and bool(publications))

    def broadcast_nowait(self, publications: Publications) -> Receipt:
        """Publish to all nodes without awaiting anything."""
        if (tracing := self._hooks.tracing) is not None and is_untraced(publications):
            with tracing.publishing(publications):
                return self.broadcast_nowait(publications)
        if not self.life.is_started or self.life.loop is not running_loop():
            self.life.settle_here()
            if self.life.engine.links_nodes:  # its start waits for a broker, and must not be interrupted
                raise LifecycleError("the engine has to start, and broadcast_nowait can't: await `broadcast`")
            without_waiting(self.life.run_here(), "the engine has to start")
        members = self.life.node.count(publications)
        prepared: Sequence[Publication] = publications
        if self._hooks.has("on_broadcast"):
            prepared = without_waiting(self._transform_all(publications), "an on_broadcast hook has to wait")
        publish_all_nowait(self.life.engine, prepared, self.rules)
        return Receipt(members, is_held_back=not prepared and bool(publications))

    def broadcast_threadsafe(self, publications: Publications) -> Receipt:
        """Publish from a thread. The thread is blocked until the engine has taken the broadcast."""
        if (tracing := self._hooks.tracing) is not None and is_untraced(publications):
            with tracing.publishing(publications):  # here, because the event loop doesn't know the thread's span
                return self.broadcast_threadsafe(publications)
        while True:
            loop = self.life.loop
            if loop is None or not loop.is_running():
                raise LifecycleError(f"{_NOT_RUNNING}, so a thread can't reach it: {_RUN_IT}")
            if running_loop() is loop:
                raise LifecycleError(
                    "broadcast_threadsafe would block its own event loop: await `broadcast`, or call `broadcast_soon`, "
                    "which works in both"
                )
            try:
                return wait_in_thread(submit(self.broadcast(publications, counts=True), loop), loop)
            except LifecycleError as error:
                if self.life.loop is loop or isinstance(error, LoopEnded):
                    raise
                # Another event loop has taken the manager from that one, before anything was sent.

    def broadcast_soon(self, publications: Publications) -> None:
        """Publish later, in the order of the calls. It may be called from any thread."""
        if (tracing := self._hooks.tracing) is not None and is_untraced(publications):
            with tracing.publishing(publications):  # the span ends with the call; what is sent later refers to it
                return self.broadcast_soon(publications)
        node = self.life.node  # read before the loop is checked
        loop = self.life.loop
        if loop is None or not loop.is_running() or not self.life.is_started:
            raise LifecycleError(f"{_NOT_RUNNING}: {_RUN_IT}")
        try:
            node.outbox.put(publications, partial(loop.call_soon_threadsafe, node.begin_sending))
        except RuntimeError as error:
            if isinstance(error, LifecycleError):
                raise
            raise LoopEnded from None

    async def _broadcast_several(
        self, node: Node, publications: Publications, transaction: object, idempotency_key: str | None
    ) -> Receipt:
        members = node.count(publications)
        prepared = await self._prepare_all(node, publications, waits=transaction is None)
        appended: Mapping[Audience, Appended] = {}
        if transaction is None:
            appended = await publish_all(self.life.engine, prepared, self.rules, idempotency_key)
        else:
            await publish_in(self.life.engine, transaction, prepared, self.rules)
        return Receipt(
            members,
            {audience: each.position for audience, each in appended.items()},
            is_held_back=not prepared and bool(publications),
            is_repeat=bool(appended) and all(each.is_repeat for each in appended.values()),
        )

    # What is kept.

    async def _prepare_all(self, node: Node, publications: Publications, *, waits: bool = True) -> list[Publication]:
        return [found for one in publications if (found := await self._prepare(node, one, waits=waits)) is not None]

    async def _transform_all(self, publications: Publications) -> list[Publication]:
        return [found for one in publications if (found := await self._transform(one)) is not None]

    async def _prepare(self, node: Node, publication: Publication, *, waits: bool = True) -> Publication | None:
        # In a transaction of the app nobody waits for slow clients: its rows stay locked until it commits.
        loop = asyncio.get_running_loop()
        if self._hooks.has("on_broadcast"):
            transformed = await self._transform(publication)
            if transformed is None:
                return None
            publication = transformed
        if waits and not node.dispatcher.is_clear:
            await node.dispatcher.ease(publication.message.size, publication.audience, publication.exclude)
        if self.life.loop is not loop:  # it was closed, or another event loop took it
            raise self.life.elsewhere()
        return publication

    async def _transform(self, publication: Publication) -> Publication | None:
        encode: Encode = self.encode
        types = None if self.sends is None else self.sends.of(publication.audience)
        if types is not None:
            encode = partial(self._encode_typed, publication.message, types, publication.audience)
        message = await self._hooks.transform(publication.message, publication.audience, encode)
        return None if message is None else publication.with_message(message)
