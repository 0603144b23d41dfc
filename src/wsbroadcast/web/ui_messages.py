"""A run in the form of the Vercel AI SDK: the response of the `POST` that begins it, or of a `GET` that resumes it."""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from wsbroadcast.audience import UserId, check_stream_id, user_key
from wsbroadcast.exceptions import ConfigurationError, StreamNotFound, kind_of
from wsbroadcast.manager import ConnectionManager, core_of
from wsbroadcast.node.streams import Follower
from wsbroadcast.protocols.ui_messages import HEADERS, Parts, UIMessages
from wsbroadcast.streams.ledger import StreamStatus
from wsbroadcast.streams.run import Run
from wsbroadcast.transports.http import WrittenStream
from wsbroadcast.web.viewers import Viewers


class UIMessageResponse(Response):
    """Writes a run for as long as its peer is there.

    Args:
        manager: Carries the stream.
        id_: The stream's id.
        run: The id of the run; `None` for the newest one, if that is running.
        viewer: The user who asks, as text.
        parts: Makes chunks from data.
        ended: Whether the newest run is also shown after its end.
    """

    def __init__(
        self,
        manager: ConnectionManager,
        id_: str,
        run: str | None,
        viewer: str | None,
        parts: Parts | None,
        *,
        ended: bool = False,
    ) -> None:
        super().__init__(headers=HEADERS)
        self._core = core_of(manager)
        self._core.use_streams()
        self._id = id_
        self._run = run
        self._viewer = viewer
        self._parts = parts
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the response."""
        headers = [each for each in self.raw_headers if each[0] != b"content-length"]
        stream = WrittenStream(scope, receive, send, headers, is_event_source=False)
        viewers = Viewers(self._core)
        async with viewers.answering(stream.websocket):
            try:
                await self._find()
                await viewers.let_in(stream.websocket)
                async with viewers.following(stream.websocket, self._id, self._viewer, stream.left) as follower:
                    self._check(follower)
                    await stream.begin_with()
                    dialect = UIMessages(follower.run, self._parts)
                    await viewers.write(stream, follower, follower.take_nowait(), dialect)
            except StreamNotFound:
                if self._run is not None:
                    raise
                await stream.say_nothing()
        if self.background is not None:
            await self.background()

    async def _find(self) -> None:
        if self._run is not None:
            return
        try:
            known = await self._core.find_stream(check_stream_id(self._id))
        except ValueError:  # the id comes from a URL
            raise StreamNotFound(self._id) from None
        if known is None or (known.end is not None and not self._ended):
            raise StreamNotFound(self._id)

    def _check(self, follower: Follower) -> None:
        is_it = follower.user == self._viewer if self._run is None else follower.run == self._run
        if not is_it:
            raise StreamNotFound(self._id)


def ui_message_stream(
    manager: ConnectionManager,
    run: Run | StreamStatus | str,
    *,
    user: UserId | None = None,
    parts: Parts | None = None,
    ended: bool = False,
) -> Response:
    """Return a run as a UI message stream of the Vercel AI SDK, for `useChat`.

    ```
    @app.post("/api/chat")
    async def chat(body: Chat, user: User) -> Response:
        run = await manager.start_stream(f"chat:{body.id}", partial(answer, body.messages), user=user)
        return ui_message_stream(manager, run)

    @app.get("/api/chat/{id}/stream")
    async def resume(id: str, user: User) -> Response:
        return ui_message_stream(manager, f"chat:{id}", user=user)
    ```

    The stream has the whole run from its beginning, and what comes next. All viewers get the same `messageId`, the
    `run_id`, so a page that resumes replaces what it has. The stream ends with `finish`, with `abort` if the run was
    stopped, or with `error` if it failed or is lost. It also ends with `error` if a viewer is sent away earlier, for
    example by a drain. A viewer that leaves, or `stop()` in a page, doesn't stop the run: use `stop_stream` for that.

    Text stays text. Data `{"type": "tool_call", "id": …, "name": …, "input": …}` is a tool call, and
    `{"type": "tool_result", "id": …, "output": …}`, or with `error`, its result. `{"type": "reasoning", "text": …}` is
    reasoning. All other data becomes a part `data-…`, named by its `type`.

    Args:
        manager: The manager that carries the stream.
        run: In the route that begins the run: the run, or its status if a worker produces it. In a route that resumes:
            the id of the stream. If none is running, the answer is 204, as the SDK expects.
        user: The user who asks, if `run` is an id. For a stream of another user the answer is 204, too.
        parts: Called with data first. It returns chunks of the protocol, which are sent unchanged, or `None`.
        ended: Whether a route that resumes also shows the last run after its end, for as long as it is kept. Then a
            page misses nothing if it loaded its messages before the answer was saved, and a stopped answer is still
            there after a reload. The page must recognize a saved answer by the `run_id`, or it shows it twice.

    Raises:
        ConfigurationError: If `run` is something else, or the engine can't carry streams.
        ValueError: If `user` is not an id.
    """
    viewer = None if user is None else user_key(user)
    if isinstance(run, Run):
        return UIMessageResponse(manager, run.id, run.run_id, viewer, parts)
    if isinstance(run, StreamStatus):
        return UIMessageResponse(manager, run.id, run.run, viewer, parts)
    if not isinstance(run, str):
        raise ConfigurationError(f"expected a run, its status, or the id of a stream, not {kind_of(run)}")
    return UIMessageResponse(manager, run, None, viewer, parts, ended=ended)
