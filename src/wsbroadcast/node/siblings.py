"""The other nodes of an app: which ones there are, and questions to all of them."""

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
from wsbroadcast.engines.contract import Engine, KeepsLease
from wsbroadcast.engines.lease import LeaseKeeper
from wsbroadcast.exceptions import EngineError, LimitExceeded, MessageTooLarge
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.publication import MAX_NODE_MESSAGE_BYTES, NodeMessage, NodeMessageKind

T = TypeVar("T")

HELLO_SECONDS = 5.0
"""How often, in seconds, a node says hello to the others."""

KNOWN_SECONDS = 15.0
"""For how many seconds after a hello a node counts as there. A node with a lease says hello only once, and counts while
it holds the lease."""

ANSWER_SECONDS = 1.0
"""How many seconds answers are waited for."""

MAX_SIBLINGS = 1000
"""How many other nodes are remembered."""

MAX_QUESTIONS = 32
"""How many questions are asked at the same time, and how many of other nodes are answered at the same time."""

# The sizes of answers, in bytes. If the broker doesn't take one size, the next is tried.
_BUDGETS = (MAX_NODE_MESSAGE_BYTES, 64 * 1024, 16 * 1024)

_MAX_DESCRIPTION = 255


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What identifies a node, which is a manager in a process."""

    id: str
    """A unique id, another one in each process."""
    host: str = ""
    """The name of the machine or container."""
    pid: int = 0
    """The number of the process."""
    family: str = ""
    """A text that all processes of one server share, such as the workers of `uvicorn --workers 4`."""


class Reply(NamedTuple):
    """The answer of a node to a question."""

    head: Mapping[str, Any]
    """The part that always fits into an answer."""
    items: Iterable[Any] = ()
    """A list. As many of its items are sent as fit."""


class Answer(NamedTuple, Generic[T]):
    """The answer of one node."""

    node: NodeInfo
    """The node."""
    content: T
    """The content, as `read` has returned it."""


class Answers(NamedTuple, Generic[T]):
    """The answers of all nodes that came in time."""

    given: list[Answer[T]]
    """The answers. This node's is the first."""
    silent: list[NodeInfo]
    """The known nodes that have not answered."""
    is_linked: bool
    """Whether the engine links nodes at all. `memory://` knows only this process."""

    @property
    def known(self) -> int:
        """How many nodes are known: this one, and those that said hello within 15 s or hold their lease."""
        return len(self.given) + len(self.silent)


Respond = Callable[[str, Mapping[str, Any]], Awaitable[Reply]]
"""Answers a question, given its topic and arguments. It raises `ValueError` if it doesn't understand the question."""


class _Known(NamedTuple):
    """What is known of another node."""

    info: NodeInfo
    heard_at: float
    lease: str
    """The name of its lease; empty if it holds none, and says hello from time to time."""


class _Question(Generic[T]):
    """A question that is being asked. Callers that ask the same meanwhile get the same answers."""

    def __init__(self, read: Callable[[bytes], T]) -> None:
        self.read = read
        self.got: dict[str, T] = {}
        self.changed = asyncio.Event()
        self.answers: asyncio.Future[Answers[T]] = asyncio.get_running_loop().create_future()


class Siblings:
    """Keeps in touch with the other nodes, from the start of the engine to the end of the node.

    What other nodes send is untrusted: its size is limited, `read` of the caller checks it, and it is dropped if that
    fails.

    Args:
        engine: Carries the messages of nodes.
        tasks: The tasks of the node, in which it answers.
        respond: Answers questions.
    """

    def __init__(self, engine: Engine, tasks: Tasks, respond: Respond) -> None:
        self._engine = engine
        self._tasks = tasks
        self._respond = respond
        self.me = this_process()
        """This node."""
        # The other nodes by id. The one that was heard last is the last.
        self._known: dict[str, _Known] = {}
        # The lease of this node, if something else needs one.
        self._lease: LeaseKeeper | None = None
        # The questions that are being asked, by their id, and by what is asked.
        self._asking: dict[str, _Question[Any]] = {}
        self._asked: dict[bytes, _Question[Any]] = {}
        self._answering = 0
        self._timer: asyncio.TimerHandle | None = None
        self._is_begun = self._has_greeted = self._is_ended = False
        self._throttle = Throttle()

    # From start to end.

    def begin(self) -> None:
        """Take part, because the engine is started. A second call does nothing, nor does it with `memory://`."""
        if self.me.pid != os.getpid():
            self.me = this_process()  # a forked process is another node
        if self._is_begun or self._is_ended or not self._engine.links_nodes:
            return
        self._is_begun = True
        if self._lease is not None:
            self._lease.hold(self)
        audiences = (NODES, Audience("nodes", self.me.id))
        self._engine.subscribe(audiences)
        self._tasks.spawn(self._greet(audiences), "greeting of other nodes")

    def use(self, lease: LeaseKeeper) -> None:
        """Use the lease that this node holds for something else, and know other nodes by theirs."""
        self._lease = lease
        lease.on_another.append(self.greet_again)
        if self._is_begun and not self._is_ended:
            lease.hold(self)

    async def _greet(self, audiences: tuple[Audience, ...]) -> None:
        try:
            await self._engine.confirmed(audiences)
        except EngineError as error:
            logger.warning(
                "other nodes can't be heard, so this node answers only for itself: %s",
                error,
                extra=about("nodes.unheard", engine=self._engine.name),
            )
        if not self._is_ended:
            self._say_hello()

    def end(self) -> None:
        """Say goodbye. No question is asked any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._is_begun and not self._is_ended:
            self._tell(NODES, "bye")
        self._is_ended = True
        for question in self._asking.values():
            question.changed.set()

    def greet_again(self) -> None:
        """Say hello again at once: other nodes may have forgotten this one, or know its old lease."""
        if self._has_greeted and not self._is_ended:
            self._say_hello()

    def _say_hello(self) -> None:
        self._has_greeted = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._lease_name:
            self._timer = asyncio.get_running_loop().call_later(HELLO_SECONDS, self._say_hello, context=Context())
        self._tell(NODES, "hello")

    @property
    def _lease_name(self) -> str:
        return self._lease.incarnation if self._lease is not None and self._lease.generation else ""

    # The known nodes.

    def others(self) -> list[NodeInfo]:
        """Return the other nodes that are known."""
        self._forget_old()
        return [known.info for known in self._known.values()]

    def _forget_old(self) -> None:
        now = asyncio.get_running_loop().time()
        while self._known and (first := next(iter(self._known.items())))[1].heard_at < now - KNOWN_SECONDS:
            id_, known = first
            del self._known[id_]
            if known.lease:  # the broker knows whether the lease holds
                self._known[id_] = known._replace(heard_at=now)

    async def _forget_dead(self) -> None:
        # Forgets nodes whose lease has run out. While the broker is away, that isn't known.
        if any(known.lease for known in self._known.values()) and isinstance(self._engine, KeepsLease):
            try:
                alive = await self._engine.alive()
            except EngineError:
                return
            for id_, known in list(self._known.items()):
                if known.lease and known.lease not in alive:
                    del self._known[id_]

    def take(self, message: NodeMessage) -> None:
        """Take a message of a node. It never blocks and never raises."""
        try:
            if message.sender != self.me.id and self._is_begun and not self._is_ended:
                self._take(message)
        except Exception as error:  # it may be forged, or of another release
            if self._throttle.is_due("node message"):
                text = "dropped a message of another node (%s) that can't be read: %s"
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
        elif self._answering < MAX_QUESTIONS:  # else this node counts as silent
            self._answering += 1
            self._tasks.spawn(self._answer(message), "answer to a node")

    def _meet(self, message: NodeMessage) -> None:
        self._forget_old()
        now = asyncio.get_running_loop().time()
        if (known := self._known.pop(message.sender, None)) is not None:
            self._known[message.sender] = known._replace(heard_at=now, lease=_described(message).lease)
        elif len(self._known) < MAX_SIBLINGS:
            self._known[message.sender] = _described(message)._replace(heard_at=now)
            if not message.audience.name:  # a new node, which knows no others yet
                self._tell(Audience("nodes", message.sender), "hello")

    # Questions.

    async def ask(self, topic: str, arguments: Mapping[str, Any], read: Callable[[bytes], T]) -> Answers[T]:
        """Ask all nodes, this one too; return when all known nodes have answered, or after a second.

        While the broker is away, only this node answers.

        Args:
            topic: The topic of the question.
            arguments: The arguments of the question, as JSON can have them.
            read: Makes the content of an `Answer` from its JSON. If it raises, the answer is dropped.

        Raises:
            LimitExceeded: If too many different questions are being asked already.
            ValueError: If this node itself doesn't understand the question.
        """
        body = to_json({"topic": topic, "arguments": arguments})
        question: _Question[T] | None = self._asked.get(body)
        if question is None:
            if len(self._asked) >= MAX_QUESTIONS:
                raise LimitExceeded("questions", f"{MAX_QUESTIONS} questions to the nodes are being asked already")
            self.begin()  # if nothing needed it before
            question = self._asked[body] = _Question(read)
            self._tasks.spawn(self._run(question, topic, arguments, body), "question to all nodes")
        return await asyncio.shield(question.answers)

    async def _run(self, question: _Question[T], topic: str, arguments: Mapping[str, Any], body: bytes) -> None:
        id_ = token_urlsafe(9)
        self._asking[id_] = question
        try:
            deadline = asyncio.get_running_loop().time() + ANSWER_SECONDS
            await self._forget_dead()
            asked = self.others()
            is_sent = self._is_begun and self._tell(NODES, "question", id_, body)
            own = question.read(_fitting(await self._reply(topic, arguments), MAX_NODE_MESSAGE_BYTES))
            if is_sent:
                await self._until_answered(question, deadline)
            question.answers.set_result(self._answers(question, own, asked))
        except Exception as error:  # the callers get it
            question.answers.set_exception(error)
            question.answers.exception()  # marked as retrieved: the callers may be gone
        finally:
            del self._asking[id_], self._asked[body]

    def _answers(self, question: _Question[T], own: T, asked: list[NodeInfo]) -> Answers[T]:
        others = self.others()
        known = {info.id: info for info in (*asked, *others)}  # a node that has answered may have said goodbye since
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
            pass  # this node counts as silent
        except ValueError as error:  # broken JSON, too
            if self._throttle.is_due("question"):
                text = "a question of another node was not understood: %s"
                logger.warning(text, error, extra=about("nodes.bad_question"))
        finally:
            self._answering -= 1

    # To the engine.

    def _tell(self, audience: Audience, kind: NodeMessageKind, id_: str = "", body: bytes | None = None) -> bool:
        try:
            if body is None:
                body = to_json({**asdict(self.me), "lease": self._lease_name})
            self._send(audience, kind, id_, body)
        except (EngineError, MessageTooLarge):
            return False  # the broker is away, so no node would answer
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


def _described(message: NodeMessage) -> _Known:
    match from_json(message.body):
        case {"host": str() as host, "pid": int() as pid, "family": str() as family, **rest}:
            lease = rest.get("lease", "")  # older releases don't send it
            if isinstance(lease, str) and max(len(host), len(family), len(lease)) <= _MAX_DESCRIPTION:
                return _Known(NodeInfo(message.sender, host, pid, family), 0.0, lease)
    raise ValueError("it doesn't say which node it is")


def _what_is_wrong(error: Exception) -> str:
    # The text of pydantic's error repeats what it has read: users, channels and their line breaks.
    if not isinstance(error, ValidationError):
        return str(error)
    first, *others = error.errors(include_url=False, include_context=False, include_input=False)
    return f"{first['type']} at {first['loc']!r:.200}" + (f", and {len(others)} more" if others else "")


def this_process() -> NodeInfo:
    """Describe a new node of this process."""
    id_, host, pid = token_urlsafe(9), socket.gethostname()[:_MAX_DESCRIPTION], os.getpid()
    # Without workers the parent may be any process, such as the first one of a system, which has other children too.
    has_siblings = multiprocessing.parent_process() is not None or "gunicorn.arbiter" in sys.modules
    family = f"{host} {_namespace()} {os.getppid()}" if has_siblings else id_
    return NodeInfo(id_, host, pid, family[:_MAX_DESCRIPTION])


def _namespace() -> int:
    # Containers may have the same host name and the same process ids.
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
