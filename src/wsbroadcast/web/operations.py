"""The operations router: reports of all nodes in JSON, for Prometheus and on a page; and what operators do to nodes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter, Depends, Path, Query, Request, Response, params
from starlette.exceptions import HTTPException

from wsbroadcast.audience import MAX_NAME_BYTES, user_key
from wsbroadcast.close_codes import CloseCode
from wsbroadcast.exceptions import ConfigurationError, EngineError, LifecycleError, LimitExceeded, kind_of
from wsbroadcast.manager import ConnectionManager, core_of
from wsbroadcast.node.reports import MAX_LIMIT, MAX_OVER
from wsbroadcast.node.siblings import Answer, Answers, NodeInfo
from wsbroadcast.publication import Dismissal
from wsbroadcast.stats import Stats
from wsbroadcast.telemetry.prometheus import CONTENT_TYPE, exposition
from wsbroadcast.web.origin import AllowedOrigins
from wsbroadcast.web.reports import (
    ChannelReport,
    Channels,
    Closed,
    ConnectionReport,
    Connections,
    Drained,
    DrainState,
    Head,
    NodeName,
    NodeReply,
    NodeReport,
    Nodes,
    NodeState,
    Problem,
    UserReport,
    added,
    common,
    has_more,
    named,
    page_of,
    reader,
)

_STATIC = files("wsbroadcast.web") / "static"

_PAGE_HEADERS = {
    "content-security-policy": "; ".join(
        [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src data:",  # the icon
            "connect-src 'self'",
            "frame-ancestors 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

_PARTS = {"operations.css": "text/css; charset=utf-8", "operations.js": "text/javascript; charset=utf-8"}

_NO_GUARD = (
    "the operations router shows who is connected, closes connections and drains nodes: say who may use it, by "
    "create_operations_router(manager, dependencies=[Depends(only_admins)]), or by public=True if only people who may "
    "use it can reach it, for example on a port of its own"
)

Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="The largest number of items.")]
After = Annotated[str, Query(max_length=MAX_NAME_BYTES, description="The `next` of the previous page.")]
ChannelName = Annotated[str | None, Query(max_length=MAX_NAME_BYTES, description="Only connections in this channel.")]
UserName = Annotated[str | None, Query(max_length=MAX_NAME_BYTES, description="Only connections of this user.")]
UserInPath = Annotated[str, Path(description="The user, as text.")]

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    503: {"model": Problem, "description": "The manager doesn't run, or too many questions are being asked."}
}
_CHANGES: dict[int | str, dict[str, Any]] = {
    **_PROBLEMS,
    403: {"model": Problem, "description": "The request comes from a page of another origin."},
}


class _Told(NamedTuple):
    """Whether a node is ready, in one word."""

    word: str
    is_ready: bool


class Operations:
    """Answers the requests to the router.

    Args:
        manager: The manager whose node is asked.
        ready_needs_broker: Whether a node is ready only while it reaches the broker.
        allowed_origins: Pages that may change something; `None` for pages of the server itself.
    """

    def __init__(
        self, manager: ConnectionManager, *, ready_needs_broker: bool, allowed_origins: Iterable[str] | None
    ) -> None:
        self.manager = manager
        """The manager whose node is asked."""
        self._core = core_of(manager)
        self._ready_needs_broker = ready_needs_broker
        self._origins = AllowedOrigins(allowed_origins)
        self._core.know_siblings()

    # Without login.

    async def live(self) -> Response:
        """Say that the event loop runs."""
        return _word("live", is_ok=True)

    async def ready(self) -> Response:
        """Say whether this node takes connections: not before its start, and not while it drains."""
        told = await self._readiness()
        return _word(told.word, is_ok=told.is_ready)

    async def _readiness(self) -> _Told:
        life = self._core.life
        was_started = life.is_started
        try:
            async with asyncio.timeout(1.0):
                await life.run_here()  # without a lifespan, nobody would be sent to this node to start it
                if was_started and self._ready_needs_broker and not (await life.engine.health()).is_ok:
                    return _Told("unreachable", False)
        except LifecycleError:
            return _Told("stopped", False)
        except (EngineError, TimeoutError):
            return _Told("unreachable", False) if was_started else _Told("starting", False)
        if self.manager.is_draining:
            return _Told("draining", False)
        return _Told("ready", True) if was_started else _Told("starting", False)

    # Reports of all nodes.

    async def nodes(self) -> Nodes:
        """Return all nodes of the app, each with its state."""
        answers = await self._ask("node", {}, NodeState)
        return Nodes(
            **common(answers),
            asked=answers.given[0].node.id,
            nodes=[
                NodeReport(
                    **NodeName.of(each.node).model_dump(), server=each.node.family, **each.content.head.model_dump()
                )
                for each in answers.given
            ],
        )

    async def connections(
        self,
        limit: Limit = 100,
        after: After = "",
        channel: ChannelName = None,
        user: UserName = None,
        slow: Annotated[bool, Query(description="Only slow consumers, the largest backlog first: one page.")] = False,
    ) -> Connections:
        """Return connections of all nodes, page by page, ordered by id."""
        arguments = {"limit": limit, "after": after, "channel": channel, "user": user, "slow": slow}
        answers = await self._ask("connections", arguments, Head, ConnectionReport)
        found = named(answers.given)
        if slow:
            page, next_ = sorted(found, key=lambda each: -each.backlog_bytes)[:limit], None
        else:
            page, next_ = page_of(answers.given, lambda each: each.id, limit)
        total = sum(each.content.head.total for each in answers.given)
        return Connections(**common(answers), total=total, connections=page, next=next_)

    async def channels(
        self,
        limit: Limit = 100,
        after: After = "",
        prefix: Annotated[str, Query(max_length=MAX_NAME_BYTES, description="What the names begin with.")] = "",
        sort: Annotated[Literal["name", "size"], Query(description="`size`: the largest, in one page.")] = "name",
    ) -> Channels:
        """Return the channels of all nodes, each with its number of connections."""
        by_size = sort == "size"
        arguments = {"limit": limit, "after": after, "prefix": prefix, "largest": by_size}
        answers = await self._ask("channels", arguments, Head, ChannelReport)
        if by_size:
            every = added([item for each in answers.given for item in each.content.items])
            page, next_ = sorted(every, key=lambda each: (-each.connections, each.name))[:limit], None
            is_complete = len(page) == len(every) and not any(has_more(each.content) for each in answers.given)
        else:
            page, next_ = page_of(answers.given, lambda each: each.name, limit, added)
            is_complete = next_ is None and not after
        return Channels(**common(answers), channels=page, next=next_, is_complete=is_complete and not answers.silent)

    async def user(self, user: UserInPath) -> UserReport:
        """Return a user's connections on all nodes; 404 if no node that answered has one."""
        key = _user(user)
        answers = await self._connections_of(key)
        page, next_ = page_of(answers.given, lambda each: each.id, MAX_LIMIT)
        if not page:
            told = f"{len(answers.given)} of {answers.known} nodes answered"
            raise HTTPException(404, f"the user has no connection: {told}")
        named(answers.given)
        is_complete = next_ is None and not answers.silent
        return UserReport(**common(answers), user=key, connections=page, is_complete=is_complete)

    async def metrics(
        self,
        scope: Annotated[Literal["cluster", "node"], Query(description="`node`: this one alone.")] = "cluster",
    ) -> Response:
        """Return the metrics of all nodes for Prometheus, with the label `node`."""
        if scope == "node":
            info = self._core.life.node.know_siblings().me
            stats, answered, known = {_label(info): self.manager.stats()}, 1, 1
        else:
            answers = await self._ask("stats", {}, Stats)
            stats = _by_label(answers.given)
            answered, known = len(answers.given), answers.known
        body = exposition(stats) + _NODES.format(answered=answered, known=known).encode()
        return Response(body, headers={"content-type": CONTENT_TYPE, "cache-control": "no-store"})

    # Changes.

    async def same_origin(self, request: Request) -> None:
        """Refuse requests of pages of another origin: they would use the cookies of the person who looks at the page.

        The browser itself sends `Sec-Fetch-Site`. No page can change it, and no proxy rewrites it.
        """
        site = request.headers.get("sec-fetch-site")
        if site == "same-origin":
            return
        refusal = self._origins.refusal(request.url.scheme, request.scope["headers"])
        if refusal is None and site not in (None, "none") and "origin" not in request.headers:
            refusal = "a page of another origin may not do this"
        if refusal is not None:
            raise HTTPException(403, refusal)

    async def close_user(
        self,
        user: UserInPath,
        code: Annotated[int, Query(description="The close code.")] = CloseCode.UNAUTHENTICATED,
        reason: Annotated[str, Query(max_length=123, description="The reason, at most 123 bytes.")] = "",
    ) -> Closed:
        """Close a user's connections on all nodes. After 4401, the default, a client doesn't come back by itself."""
        key = _user(user)
        try:
            dismissal = Dismissal.of_user(key, code, reason)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        answers = await self._connections_of(key)
        try:
            await self._core.control(dismissal)
        except EngineError as error:
            raise HTTPException(503, "closed on this node only: the broker didn't take it") from error
        total = sum(each.content.head.total for each in answers.given)
        return Closed(**common(answers), user=key, connections=total)

    async def drain(
        self,
        over: Annotated[float, Query(ge=0, le=MAX_OVER, description="Seconds within which all are closed.")] = 5.0,
        node: Annotated[
            str | None, Query(max_length=64, description="A node of the server; by default the node that is asked.")
        ] = None,
    ) -> Drained:
        """Send the connections of a server elsewhere: of the server that is asked, or of a node's.

        A server is all processes with the same parent on the same host, such as the workers of `uvicorn --workers 4`.
        Nodes that drain take no connections until they are started again.
        """
        siblings = self._core.life.node.know_siblings()
        found = [each for each in (siblings.me, *siblings.others()) if node in (None, each.id)]
        if not found:
            raise HTTPException(404, "no node of this id is known")
        answers = await self._ask("drain", {"family": found[0].family, "over": over}, DrainState)
        drained = [NodeName.of(each.node) for each in answers.given if each.content.head.is_meant]
        return Drained(**common(answers), nodes=drained)

    # Internal.

    async def _connections_of(self, key: str) -> Answers[NodeReply[Head, ConnectionReport]]:
        arguments = {"limit": MAX_LIMIT, "after": "", "channel": None, "user": key, "slow": False}
        return await self._ask("connections", arguments, Head, ConnectionReport)

    async def _ask(
        self, topic: str, arguments: dict[str, Any], head: type[Any], item: type[Any] = dict
    ) -> Answers[NodeReply[Any, Any]]:
        try:
            return await self._core.ask_nodes(topic, arguments, reader(head, item))
        except (LimitExceeded, LifecycleError, EngineError) as error:
            raise HTTPException(503, str(error), {"retry-after": "1"}) from error
        except TimeoutError as error:
            raise HTTPException(503, "this node is too busy to answer", {"retry-after": "1"}) from error


_NODES = """\
# HELP wsbroadcast_nodes_known Nodes that this one knows, itself included.
# TYPE wsbroadcast_nodes_known gauge
wsbroadcast_nodes_known {known}
# HELP wsbroadcast_nodes_answered Nodes whose metrics are here.
# TYPE wsbroadcast_nodes_answered gauge
wsbroadcast_nodes_answered {answered}
"""


def _label(info: NodeInfo) -> str:
    return f"{info.host}:{info.pid}"


def _by_label(given: list[Answer[NodeReply[Stats, Any]]]) -> dict[str, Stats]:
    # Two managers of one process are both told apart by their ids, so a series stays the same whichever node is asked.
    times = Counter(_label(each.node) for each in given)
    stats: dict[str, Stats] = {}
    for each in given:
        label = _label(each.node)
        stats[label if times[label] == 1 else f"{label}:{each.node.id}"] = each.content.head
    return stats


def _user(text: str) -> str:
    try:
        return user_key(text)
    except ValueError as error:
        raise HTTPException(422, str(error)) from error


def _word(word: str, *, is_ok: bool) -> Response:
    headers = {"content-type": "text/plain; charset=utf-8", "cache-control": "no-store"}
    return Response(word, 200 if is_ok else 503, headers)


def _part(name: str, media_type: str) -> Callable[[], Any]:
    async def part() -> Response:
        return Response(_STATIC.joinpath(name).read_bytes(), headers={**_PAGE_HEADERS, "content-type": media_type})

    return part


def create_operations_router(
    manager: ConnectionManager,
    *,
    dependencies: Sequence[params.Depends] | None = None,
    public: bool = False,
    prefix: str = "/operations",
    ready_needs_broker: bool = False,
    allowed_origins: Iterable[str] | None = None,
) -> APIRouter:
    """Make a router for operators, who see all nodes and can act on them; for `app.include_router`.

    `/live` and `/ready` need no login and say one word. The dependencies guard everything else: the page at the prefix
    and a slash, `/nodes`, `/connections`, `/channels`, `/users/{user}`, `/metrics`, `POST /users/{user}/close` and
    `POST /drain`. Any node can be asked. It answers for all nodes, within a second, and says how many of them have
    answered. Requests that change something are refused if they come from pages of other origins.

    As soon as the router is made, the manager's node tells the others every 5 s that it is there. The router brings the
    manager's lifespan along, like one of `create_router`.

    Args:
        manager: The manager whose node is asked.
        dependencies: FastAPI dependencies that raise if somebody may not use the router.
        public: Whether everybody who can reach it may use it. Only without dependencies.
        prefix: The path of the router, after the app's own prefix.
        ready_needs_broker: Whether `/ready` says no while the broker is away. Then it says no on all nodes at once.
        allowed_origins: Pages that may change something; by default pages of the server itself, as in `create_router`.

    Raises:
        ConfigurationError: If it would be open to everybody without `public=True`, or an option makes no sense.
    """
    _check(manager, dependencies, public, prefix)
    operations = Operations(manager, ready_needs_broker=ready_needs_broker, allowed_origins=allowed_origins)
    router = APIRouter(prefix=prefix, lifespan=manager.lifespan, tags=["operations"])
    for path, endpoint in (("/live", operations.live), ("/ready", operations.ready)):
        not_ready: dict[int | str, dict[str, Any]] = {503: {"description": "Not now. The word says why."}}
        responses = not_ready if path == "/ready" else None
        router.add_api_route(path, endpoint, response_class=_Plain, responses=responses)
        router.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
    guarded = APIRouter(dependencies=dependencies)
    _add_reports(guarded, operations)
    _add_changes(guarded, operations)
    guarded.add_api_route("/", _part("operations.html", "text/html; charset=utf-8"), include_in_schema=False)
    for name, media_type in _PARTS.items():
        guarded.add_api_route(f"/{name}", _part(name, media_type), include_in_schema=False)
    router.include_router(guarded)
    return router


class _Plain(Response):
    media_type = "text/plain"


def _add_reports(router: APIRouter, operations: Operations) -> None:
    for path, endpoint, model in (
        ("/nodes", operations.nodes, Nodes),
        ("/connections", operations.connections, Connections),
        ("/channels", operations.channels, Channels),
        ("/users/{user:path}", operations.user, UserReport),
    ):
        responses = dict(_PROBLEMS)
        if path.startswith("/users"):
            responses[404] = {"model": Problem, "description": "No node that answered has a connection of the user."}
        router.add_api_route(path, endpoint, response_model=model, responses=responses)
    router.add_api_route("/metrics", operations.metrics, response_class=_Plain, responses=_PROBLEMS)


def _add_changes(router: APIRouter, operations: Operations) -> None:
    guard = [Depends(operations.same_origin)]
    for path, endpoint, model, status in (
        ("/users/{user:path}/close", operations.close_user, Closed, 200),
        ("/drain", operations.drain, Drained, 202),
    ):
        router.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            response_model=model,
            status_code=status,
            responses=_CHANGES,
            dependencies=guard,
        )


def _check(manager: object, dependencies: object, public: object, prefix: object) -> None:
    if not isinstance(manager, ConnectionManager):
        raise ConfigurationError(
            f"the router needs its manager first, not {kind_of(manager)}: create_operations_router(manager, …)"
        )
    if not isinstance(prefix, str) or not prefix.startswith("/") or prefix.endswith("/"):
        raise ConfigurationError(
            f'prefix begins with a slash and doesn\'t end with one, such as "/operations", not {prefix!r:.80}'
        )
    if not isinstance(public, bool):
        raise ConfigurationError(f"public must be True or False, not {public!r:.80}")
    if dependencies is not None:
        if isinstance(dependencies, (str, params.Depends)) or not isinstance(dependencies, Sequence):
            raise ConfigurationError("dependencies must be a list: write dependencies=[Depends(only_admins)]")
        for each in dependencies:
            if not isinstance(each, params.Depends):
                raise ConfigurationError(
                    f"dependencies has {kind_of(each)} in it: write dependencies=[Depends(only_admins)]"
                )
    if not dependencies and not public:
        raise ConfigurationError(_NO_GUARD)
    if dependencies and public:
        raise ConfigurationError("public=True lets everybody in, dependencies= only some: leave one of them out")
