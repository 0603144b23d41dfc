"""The other nodes of an app: which there are, and what they answer when one of them asks."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextvars import Context
from dataclasses import asdict, dataclass
from secrets import token_urlsafe
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic_core import ValidationError, from_json, to_json

from wsbroadcast.audience import NODES, Audience
from wsbroadcast.concurrency import Tasks
from wsbroadcast.engines.contract import Engine
from wsbroadcast.exceptions import EngineError, LimitExceeded, MessageTooLarge
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.publication import MAX_NODE_MESSAGE_BYTES, NodeMessage, NodeMessageKind

T = TypeVar("T")

HELLO_SECONDS = 5.0
"""A node says so often that it is there."""

KNOWN_SECONDS = 15.0
"""For so long after that it counts as one of the app's."""

ANSWER_SECONDS = 1.0
"""For so long answers are waited for."""

MAX_SIBLINGS = 1000
"""As many other nodes are remembered."""

MAX_QUESTIONS = 32
"""As many questions are asked at the same time, and as many of others are answered."""

# For so many bytes an answer is made, if the broker doesn't take the one before.
_BUDGETS = (MAX_NODE_MESSAGE_BYTES, 64 * 1024, 16 * 1024)

_MAX_DESCRIPTION = 255


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Which node it is: a manager in a process."""

    id: str
    """Unique, and a new one in each process."""
    host: str = ""
    """The name of the machine or container."""
    pid: int = 0
    """The process."""
    family: str = ""
    """The same for the processes of one server, such as the workers of `uvicorn --workers 4`."""


class Reply(NamedTuple):
    """What a node answers to a question."""

    head: Mapping[str, Any]
    """What fits into an answer in any case."""
    items: Iterable[Any] = ()
    """A list, of which as much is sent as fits."""


class Answer(NamedTuple, Generic[T]):
    """What came from a node."""

    node: NodeInfo
    """Which."""
    content: T
    """What it says, as the one who asked has read it."""


class Answers(NamedTuple, Generic[T]):
    """What came from all nodes within the time."""

    given: list[Answer[T]]
    """Those that came; this node's is the first."""
    silent: list[NodeInfo]
    """The nodes that are known and have not answered."""
    is_linked: bool
    """Whether the engine links nodes at all: `memory://` knows this process only."""

    @property
    def known(self) -> int:
        """How many nodes there are, as far as this one knows: this one, and those heard of within 15 s."""
        return len(self.given) + len(self.silent)


Respond = Callable[[str, Mapping[str, Any]], Awaitable[Reply]]
"""Answers a question by its topic and arguments. Raises `ValueError` for one that it doesn't understand."""


class _Question(Generic[T]):
    """One that is being asked; whoever asks the same meanwhile gets the same answers."""

    def __init__(self, read: Callable[[bytes], T]) -> None:
        self.read = read
        self.got: dict[str, T] = {}
        self.changed = asyncio.Event()
        self.answers: asyncio.Future[Answers[T]] = asyncio.get_running_loop().create_future()


class Siblings:
    """Keeps in touch with the other nodes, from the start of the engine to the end of the node.

    What comes from others is untrusted: it is bounded, read by the one who asked, and dropped if that fails.

    Args:
        engine: Carries what nodes say.
        tasks: Of the node; its answers run in them.
        respond: Answers questions.
    """

    def __init__(self, engine: Engine, tasks: Tasks, respond: Respond) -> None:
        self._engine = engine
        self._tasks = tasks
        self._respond = respond
        self.me = this_process()
        """This node."""
        # With when it was heard of; the one that was heard of last comes last.
        self._known: dict[str, tuple[NodeInfo, float]] = {}
        # By their id, and by what is asked.
        self._asking: dict[str, _Question[Any]] = {}
        self._asked: dict[bytes, _Question[Any]] = {}
        self._answering = 0
        self._timer: asyncio.TimerHandle | None = None
        self._is_begun = self._is_ended = False
        self._throttle = Throttle()

    # From start to end.

    def begin(self) -> None:
        """Take part: the engine is started. Does nothing the second time, or if the engine links no nodes."""
        if self.me.pid != os.getpid():
            self.me = this_process()  # a process that was forked off is another one
        if self._is_begun or self._is_ended or not self._engine.links_nodes:
            return
        self._is_begun = True
        audiences = (NODES, Audience("nodes", self.me.id))
        self._engine.subscribe(audiences)
        self._tasks.spawn(self._greet(audiences), "greeting of other nodes")

    async def _greet(self, audiences: tuple[Audience, ...]) -> None:
        try:
            await self._engine.confirmed(audiences)
        except EngineError as error:
            logger.warning(
                "other nodes are not heard, so that this one answers for itself alone: %s",
                error,
                extra=about("nodes.unheard", engine=self._engine.name),
            )
        if not self._is_ended:
            self._say_hello()

    def end(self) -> None:
        """Take leave; nobody is asked any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._is_begun and not self._is_ended:
            self._tell(NODES, "bye")
        self._is_ended = True
        for question in self._asking.values():
            question.changed.set()

    def greet_again(self) -> None:
        """Say hello at once: the broker was away, and others may have forgotten this node."""
        if self._timer is not None:
            self._timer.cancel()
            self._say_hello()

    def _say_hello(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(HELLO_SECONDS, self._say_hello, context=Context())
        self._tell(NODES, "hello")

    # Who there is.

    def others(self) -> list[NodeInfo]:
        """Return the other nodes that were heard of within 15 s."""
        self._forget_old()
        return [info for info, _ in self._known.values()]

    def _forget_old(self) -> None:
        oldest = asyncio.get_running_loop().time() - KNOWN_SECONDS
        while self._known and self._known[id_ := next(iter(self._known))][1] < oldest:
            del self._known[id_]

    def take(self, message: NodeMessage) -> None:
        """Take what a node says. Never blocks, never raises."""
        try:
            if message.sender != self.me.id and self._is_begun and not self._is_ended:
                self._take(message)
        except Exception as error:  # it may be forged, or of another release
            if self._throttle.is_due("node message"):
                text = "dropped what a node said (%s), which can't be read: %s"
                logger.warning(text, message.kind, _what_is_wrong(error), extra=about("nodes.bad_message"))

    def _take(self, message: NodeMessage) -> None:
        if message.kind == "hello":
            self._meet(message)
        elif message.kind == "bye":
            self._known.pop(message.sender, None)
            self._notify()
        elif message.kind == "answer":
            question = self._asking.get(message.id)
            if question is not None and message.sender in self._known and message.sender not in question.got:
                question.got[message.sender] = question.read(message.body)
                question.changed.set()
        elif self._answering < MAX_QUESTIONS:  # else it counts as silent
            self._answering += 1
            self._tasks.spawn(self._answer(message), "answer to a node")

    def _meet(self, message: NodeMessage) -> None:
        self._forget_old()
        now = asyncio.get_running_loop().time()
        if (known := self._known.pop(message.sender, None)) is not None:
            self._known[message.sender] = known[0], now
        elif len(self._known) < MAX_SIBLINGS:
            self._known[message.sender] = _described(message.sender, message.body), now
            if not message.audience.name:  # a newcomer, which knows nobody yet
                self._tell(Audience("nodes", message.sender), "hello")

    # Questions.

    async def ask(self, topic: str, arguments: Mapping[str, Any], read: Callable[[bytes], T]) -> Answers[T]:
        """Ask all nodes, this one too; return when all that are known have answered, and after a second in any case.

        While the broker is away, this node answers alone.

        Args:
            topic: What is asked.
            arguments: The rest of the question, as JSON knows it.
            read: Makes of an answer's JSON what is returned of it; what it raises drops the answer.

        Raises:
            LimitExceeded: If too many different questions are being asked already.
            ValueError: If this node itself doesn't understand it.
        """
        body = to_json({"topic": topic, "arguments": arguments})
        question: _Question[T] | None = self._asked.get(body)
        if question is None:
            if len(self._asked) >= MAX_QUESTIONS:
                raise LimitExceeded("questions", f"{MAX_QUESTIONS} questions to the nodes are being asked already")
            self.begin()  # where it was needed only after the start
            question = self._asked[body] = _Question(read)
            self._tasks.spawn(self._run(question, topic, arguments, body), "question to all nodes")
        return await asyncio.shield(question.answers)

    async def _run(self, question: _Question[T], topic: str, arguments: Mapping[str, Any], body: bytes) -> None:
        id_ = token_urlsafe(9)
        self._asking[id_] = question
        try:
            asked = self.others()
            deadline = asyncio.get_running_loop().time() + ANSWER_SECONDS
            is_sent = self._is_begun and self._tell(NODES, "question", id_, body)
            own = question.read(_fitting(await self._reply(topic, arguments), MAX_NODE_MESSAGE_BYTES))
            if is_sent:
                await self._until_answered(question, deadline)
            question.answers.set_result(self._answers(question, own, asked))
        except Exception as error:  # who asked gets it
            question.answers.set_exception(error)
            question.answers.exception()  # looked at: who asked may be gone
        finally:
            del self._asking[id_], self._asked[body]

    def _answers(self, question: _Question[T], own: T, asked: list[NodeInfo]) -> Answers[T]:
        others = self.others()
        known = {info.id: info for info in (*asked, *others)}  # one that has answered may have taken leave since
        given = [Answer(known[sender], content) for sender, content in question.got.items() if sender in known]
        silent = [info for info in others if info.id not in question.got]
        return Answers([Answer(self.me, own), *given], silent, self._engine.links_nodes)

    async def _until_answered(self, question: _Question[Any], deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                while not self._is_ended and any(info.id not in question.got for info in self.others()):
                    question.changed.clear()
                    await question.changed.wait()
        except TimeoutError:
            pass

    def _notify(self) -> None:
        for question in self._asking.values():
            question.changed.set()

    async def _reply(self, topic: str, arguments: Mapping[str, Any]) -> Reply:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await self._respond(topic, arguments)

    async def _answer(self, message: NodeMessage) -> None:
        try:
            match from_json(message.body):
                case {"topic": str() as topic, "arguments": dict() as arguments}:
                    reply = await self._reply(topic, arguments)
                    reply = reply._replace(items=list(reply.items))
                case _:
                    raise ValueError("no question")
            for budget in _BUDGETS:
                try:
                    self._send(Audience("nodes", message.sender), "answer", message.id, _fitting(reply, budget))
                    return
                except MessageTooLarge:
                    continue
        except (EngineError, TimeoutError):
            pass  # it counts as silent
        except ValueError as error:  # broken JSON, too
            if self._throttle.is_due("question"):
                text = "a question of another node was not understood: %s"
                logger.warning(text, error, extra=about("nodes.bad_question"))
        finally:
            self._answering -= 1

    # To the engine.

    def _tell(self, audience: Audience, kind: NodeMessageKind, id_: str = "", body: bytes | None = None) -> bool:
        try:
            self._send(audience, kind, id_, to_json(asdict(self.me)) if body is None else body)
        except (EngineError, MessageTooLarge):
            return False  # the broker is away: nobody hears, nobody answers
        return True

    def _send(self, audience: Audience, kind: NodeMessageKind, id_: str, body: bytes) -> None:
        self._engine.publish_nowait(NodeMessage(audience, kind, self.me.id, id_, body))


def _fitting(reply: Reply, budget: int) -> bytes:
    """Write an answer, with as many items as fit."""
    start = to_json({"head": reply.head})[:-1] + b',"items":['
    size, parts, is_cut = len(start) + 32, list[bytes](), False
    for item in reply.items:
        part = to_json(item)
        size += len(part) + 1
        if size > budget:
            is_cut = True
            break
        parts.append(part)
    return start + b",".join(parts) + (b'],"is_cut":true}' if is_cut else b'],"is_cut":false}')


def _described(id_: str, body: bytes) -> NodeInfo:
    match from_json(body):
        case {"host": str() as host, "pid": int() as pid, "family": str() as family}:
            if max(len(host), len(family)) <= _MAX_DESCRIPTION:
                return NodeInfo(id_, host, pid, family)
    raise ValueError("it doesn't say which node it is")


def _what_is_wrong(error: Exception) -> str:
    # The text of pydantic's error shows what it has read: users, channels and their line breaks.
    if not isinstance(error, ValidationError):
        return str(error)
    first, *others = error.errors(include_url=False, include_context=False, include_input=False)
    return f"{first['type']} at {first['loc']!r:.200}" + (f", and {len(others)} more" if others else "")


def this_process() -> NodeInfo:
    """Describe a new node of this process."""
    id_, host, pid = token_urlsafe(9), socket.gethostname()[:_MAX_DESCRIPTION], os.getpid()
    # Without workers the parent may be anything, such as a system's first process, which has other children as well.
    has_siblings = multiprocessing.parent_process() is not None or "gunicorn.arbiter" in sys.modules
    family = f"{host} {_namespace()} {os.getppid()}" if has_siblings else id_
    return NodeInfo(id_, host, pid, family[:_MAX_DESCRIPTION])


def _namespace() -> int:
    # Containers may share the name of their machine, and have the same process ids each.
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
