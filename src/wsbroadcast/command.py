"""The command line, `wsbroadcast` or `python -m wsbroadcast`: `demo`, `publish`, `js`, `asyncapi` and `types`."""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from pydantic_core import from_json

from wsbroadcast import __version__
from wsbroadcast.audience import EVERYONE, check_channel, user_key
from wsbroadcast.exceptions import (
    ConfigurationError,
    EncodeError,
    MessageTooLarge,
    MissingDependency,
    WSBroadcastError,
)
from wsbroadcast.history import USERS, History
from wsbroadcast.message import Message
from wsbroadcast.options import Limits
from wsbroadcast.publication import Receipt
from wsbroadcast.publishing import Publisher

# The status that shells give a program that Ctrl+C has ended: 128 plus the signal's number.
_INTERRUPTED = 130

_ENGINE = "WSBROADCAST_ENGINE"

_HISTORY = "[PATTERN=]MESSAGES,SECONDS"

Broadcast = Callable[[str | bytes | Message], Awaitable[object]]


class CommandFailed(Exception):
    """Raised by a command that can't do its work. Its text is shown to the user."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    Args:
        argv: The arguments after the program's name; by default those of the process.

    Returns:
        int: 0 if it did its work, 1 if it couldn't (one line on standard error says why), 130 after Ctrl+C.

    Raises:
        SystemExit: With status 2, if the arguments make no sense.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] | None = arguments.run
    if run is None:
        parser.print_help()
        return 0
    try:
        return run(arguments)
    except CommandFailed as error:
        _say("wsbroadcast: " + " ".join(str(error).split()))  # one line, whatever a driver says
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED


def _say(text: str) -> None:
    try:
        sys.stderr.write(f"{text}\n")
    except (AttributeError, OSError):
        pass  # standard error is closed, or is a pipe that nobody reads any more


def _parser() -> argparse.ArgumentParser:
    # Each command is a subparser whose `run` is the function that does it.
    program = "python -m wsbroadcast" if sys.argv[0].endswith("__main__.py") else "wsbroadcast"
    parser = argparse.ArgumentParser(prog=program, description="WebSocket broadcasting for FastAPI.")
    parser.add_argument("--version", action="version", version=f"wsbroadcast {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="command")
    demo = commands.add_parser(
        "demo",
        help="serve the demo: a page whose browser tabs chat, stall and flood each other",
        description="Serve the demo: a page whose browser tabs chat, stall and flood each other. Ctrl+C ends it.",
    )
    demo.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    demo.add_argument(
        "--port", type=_port, default=8000, help="the port to listen on; 0 takes a free one (default: %(default)s)"
    )
    demo.set_defaults(run=_demo)
    _add_publish(commands)
    _add_js(commands)
    _add_document(
        commands,
        "asyncapi",
        "print a description of an app's WebSockets, as AsyncAPI",
        "Print what an app's WebSockets send to clients and receive from them, as AsyncAPI 3.0 in JSON.",
        _asyncapi,
    )
    _add_document(
        commands,
        "types",
        "print the types of an app's messages, in TypeScript",
        "Print the types of what pages receive from an app's WebSockets and send to them, as a TypeScript module.",
        _types,
    )
    return parser


def _add_document(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    help_: str,
    description: str,
    make: Callable[[Any], str],
) -> None:
    document = commands.add_parser(name, help=help_, description=description)
    document.add_argument(
        "app", help="module and name of the app, such as main:app; main:make() if a function returns the app"
    )
    document.add_argument(
        "--app-dir", metavar="DIR", default=".", help="the directory of the module (default: the current directory)"
    )
    document.set_defaults(run=partial(_document, make))


def _document(make: Callable[[Any], str], arguments: argparse.Namespace) -> int:
    from wsbroadcast.documents.loading import load_app  # imported here and below: other commands need no pydantic

    try:
        text = make(load_app(arguments.app, arguments.app_dir))
    except WSBroadcastError as error:
        raise CommandFailed(str(error)) from error
    sys.stdout.buffer.write(text.encode())  # as UTF-8, whatever encoding the terminal has
    sys.stdout.flush()
    return 0


def _asyncapi(app: Any) -> str:
    from wsbroadcast.documents.asyncapi import asyncapi

    return json.dumps(asyncapi(app), indent=2, ensure_ascii=False) + "\n"


def _types(app: Any) -> str:
    from wsbroadcast.documents.typescript import typescript

    return typescript(app)


def _add_js(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    js = commands.add_parser(
        "js",
        help="print the browser client, or copy it and its types into a directory",
        description="Print the browser client, which routers serve as wsbroadcast.js, in its readable form.",
    )
    form = js.add_mutually_exclusive_group()
    form.add_argument("--out", metavar="DIR", help="write wsbroadcast.js and wsbroadcast.d.ts into DIR instead")
    form.add_argument(
        "--sri", action="store_true", help="print the script's versioned name, and its hash for `integrity` of <script>"
    )
    js.set_defaults(run=_js)


def _js(arguments: argparse.Namespace) -> int:
    from wsbroadcast.web.client_script import DIRECTORY, NAME, client_script

    if arguments.sri:
        print(f"{client_script().name} {client_script().integrity}")  # noqa: T201
    elif arguments.out is None:
        sys.stdout.write((DIRECTORY / NAME).read_text(encoding="utf-8"))
    else:
        try:
            os.makedirs(arguments.out, exist_ok=True)
            for name in (NAME, "wsbroadcast.d.ts"):
                shutil.copyfile(DIRECTORY / name, os.path.join(arguments.out, name))
        except OSError as error:
            raise CommandFailed(f"can't write into {arguments.out!r}: {error}") from error
    return 0


def _add_publish(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    publish = commands.add_parser(
        "publish",
        help="send messages through a broker to the connections of an app",
        description="Send messages through a broker to the connections of an app. Each text is one message. Without a "
        "text, each line of standard input is one, sent as it comes.",
    )
    publish.add_argument(
        "--engine",
        metavar="URL",
        default=os.environ.get(_ENGINE),
        help=f"the broker, such as redis://localhost (default: ${_ENGINE}, where other users of the machine can't read "
        "a password)",
    )
    audience = publish.add_mutually_exclusive_group(required=True)
    audience.add_argument("--channel", type=_checked(check_channel), help="send to the subscribers of a channel")
    audience.add_argument("--user", type=_checked(user_key), help="send to the connections of a user")
    audience.add_argument("--everyone", action="store_true", help="send to every connection")
    form = publish.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="send JSON; refuse messages that aren't; skip blank lines")
    form.add_argument("--binary", action="store_true", help="send all of standard input as one binary message")
    _add_history(publish)
    publish.add_argument("texts", nargs="*", metavar="text", help="a message")
    publish.set_defaults(run=_publish, refuse=publish.error)


def _add_history(publish: argparse.ArgumentParser) -> None:
    publish.add_argument(
        "--history",
        metavar=_HISTORY,
        type=_history,
        action="append",
        default=[],
        help="keep the newest MESSAGES messages for SECONDS seconds; with PATTERN, only in channels that fit it. Give "
        "it once for each pattern (default: what the app has written at the broker)",
    )
    publish.add_argument(
        "--idempotency-key",
        metavar="KEY",
        help="a name for the one message: if it is published again under this name, nobody gets it twice (needs a "
        "history)",
    )
    publish.add_argument("--verbose", action="store_true", help="say for each message where it is kept")


def _history(text: str) -> tuple[str, History]:
    pattern, is_named, numbers = text.rpartition("=")
    messages, _, seconds = numbers.partition(",")
    try:
        if is_named and not pattern:
            raise ValueError("the pattern is empty")  # the text below replaces this one
        return pattern, History(int(messages), float(seconds), max(float(seconds), History().remember))
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(f"{error}, in {text!r:.80}") from None
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected {_HISTORY}, such as 100,300 or 'room:*=100,300', not {text!r:.80}"
        ) from None


def _checked(check: Callable[[object], str]) -> Callable[[str], str]:
    def checked(text: str) -> str:
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def _port(text: str) -> int:
    if text.isdecimal() and int(text) < 65536:
        return int(text)
    raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, not {text!r}")


def _demo(arguments: argparse.Namespace) -> int:
    from wsbroadcast.demo import server  # here, because other commands need no server

    try:
        server.check_dependencies()
        listener = server.listen(arguments.host, arguments.port)
    except MissingDependency as error:
        raise CommandFailed(str(error)) from error
    except OSError as error:
        raise CommandFailed(_why_not_listening(arguments.host, arguments.port, error)) from error
    with listener:
        url = server.url_of(*listener.getsockname()[:2])
        sys.stdout.write(f"The demo is at {url} (Ctrl+C ends it)\n")
        sys.stdout.flush()
        try:
            server.serve(listener)
        except KeyboardInterrupt:
            pass  # Ctrl+C is the way to end the demo; the server has closed its connections by now
    return 0


def _why_not_listening(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken: choose another with --port, or a free one with --port 0"
    return f"can't listen on {host} port {port}: {error.strerror or error}"


def _publish(arguments: argparse.Namespace) -> int:
    if not arguments.engine:
        arguments.refuse(f"no broker is named: give --engine URL, or set ${_ENGINE}")
    if arguments.binary and arguments.texts:
        arguments.refuse("--binary sends standard input: give no text")
    if arguments.idempotency_key is not None and not (arguments.binary or len(arguments.texts) == 1):
        arguments.refuse("--idempotency-key names one message: give one text, or --binary")
    if not arguments.channel and any(pattern for pattern, _ in arguments.history):
        arguments.refuse("a pattern of --history is for channels: leave it out with --user and --everyone")
    logging.getLogger("wsbroadcast").addHandler(logging.NullHandler())  # the one line of the error says enough
    try:
        asyncio.run(_publish_all(arguments))
    except (WSBroadcastError, OSError, ValueError) as error:  # a ValueError if the idempotency key is too long
        raise CommandFailed(str(error)) from error
    return 0


async def _publish_all(arguments: argparse.Namespace) -> None:
    audience = {} if arguments.everyone else {"channel": arguments.channel, "user": arguments.user}
    audience = {kind: name for kind, name in audience.items() if name is not None}
    texts = [(as_json if arguments.json else as_text)(os.fsencode(text)) for text in arguments.texts]
    async with Publisher(arguments.engine, history=_histories(arguments)) as publisher:
        broadcast = partial(publisher.broadcast, **audience)
        if arguments.idempotency_key is not None:
            broadcast = partial(_broadcast_once, broadcast, arguments.idempotency_key)
        if arguments.verbose:
            broadcast = partial(_tell_place, broadcast)
        if texts:
            await _publish_texts(broadcast, texts)
        elif arguments.binary:
            await _publish_binary(broadcast)
        else:
            await _publish_lines(LinePublisher(broadcast, as_json_line if arguments.json else as_text))


def _histories(arguments: argparse.Namespace) -> dict[object, History] | None:
    everything = "*" if arguments.channel else EVERYONE if arguments.everyone else USERS
    return {pattern or everything: history for pattern, history in arguments.history} or None


async def _broadcast_once(
    broadcast: Callable[..., Awaitable[Receipt]], key: str, message: str | bytes | Message
) -> Receipt:
    try:
        return await broadcast(message, idempotency_key=key)
    except ConfigurationError as error:
        raise CommandFailed(
            "--idempotency-key needs a history, which remembers the key, and the broker has none from the app: say "
            "what is kept, as in --history 100,300"
        ) from error


async def _tell_place(broadcast: Callable[..., Awaitable[Receipt]], message: str | bytes | Message) -> Receipt:
    receipt = await broadcast(message)
    if receipt.position is None:
        _say("published; nothing is kept")
    else:
        _say(f"published{' before' if receipt.is_repeat else ''}; kept at {receipt.position}")
    return receipt


async def _publish_texts(broadcast: Broadcast, texts: Sequence[str | Message]) -> None:
    for number, text in enumerate(texts, 1):
        try:
            await broadcast(text)
        except WSBroadcastError as error:
            which = f"message {number} of {len(texts)}: " if len(texts) > 1 else ""
            raise CommandFailed(f"{which}{error}") from error


async def _publish_binary(broadcast: Broadcast) -> None:
    file = _standard_input("standard input is one message")
    message = await everything(file, Limits().max_outbound_bytes)
    if message:
        await broadcast(message)
    _say_published(1 if message else 0)


async def _publish_lines(publisher: LinePublisher) -> None:
    file = _standard_input("each line is a message")
    try:
        await publisher.run(lines(file, Limits().max_outbound_bytes))
    finally:
        _say_published(publisher.published)
    if publisher.failures:
        number, error = publisher.failures[0]
        raise CommandFailed(f"line {number}: {error}") from error


def _say_published(messages: int) -> None:
    _say(f"published {messages} message{'' if messages == 1 else 's'}")


def _standard_input(what_it_is: str) -> int:
    if sys.stdin is None:
        raise CommandFailed("standard input is closed: give the messages as arguments")
    if sys.stdin.isatty():
        _say(f"{what_it_is}; Ctrl+D ends it")
    return sys.stdin.fileno()


# From standard input to a publisher: each line is one message, published as it comes.

# How many bytes are read at once, at most.
_READ_BYTES = 64 * 1024


async def lines(file: int, limit: int) -> AsyncIterator[bytes]:
    """Read the lines of a file descriptor as they come, without the newlines.

    Raises:
        MessageTooLarge: If a line is longer than the limit, in bytes. The rest isn't read.
        OSError: If the file can't be read.
    """
    rest = b""
    while chunk := await _read(file):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r")
        if len(rest) > limit:
            raise MessageTooLarge(len(rest), limit)
    if rest:
        yield rest


async def everything(file: int, limit: int) -> bytes:
    """Read a file descriptor to its end.

    Raises:
        MessageTooLarge: If there is more than the limit, in bytes.
        OSError: If the file can't be read.
    """
    whole = bytearray()
    while chunk := await _read(file):
        whole += chunk
        if len(whole) > limit:
            raise MessageTooLarge(len(whole), limit)
    return bytes(whole)


async def _read(file: int) -> bytes:
    # Each read has a thread, because no event loop can wait for terminals, pipes and files alike. It is a daemon
    # thread, so that the program can end while a read still waits.
    future: Future[bytes] = Future()
    future.set_running_or_notify_cancel()

    def read() -> None:
        try:
            future.set_result(os.read(file, _READ_BYTES))
        except OSError as error:
            future.set_exception(error)

    threading.Thread(target=read, name="wsbroadcast stdin", daemon=True).start()
    return await asyncio.wrap_future(future)


def as_text(line: bytes) -> str:
    """Return a line as a text message.

    Raises:
        EncodeError: If it isn't UTF-8.
    """
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise EncodeError(f"byte {error.start + 1} is not UTF-8") from None


def as_json(line: bytes) -> Message:
    """Return a line of JSON as a message.

    Raises:
        EncodeError: If it isn't JSON.
    """
    try:
        from_json(line, allow_inf_nan=False)
    except ValueError as error:
        raise EncodeError(f"not JSON: {error}") from None
    return Message(line, "json")


def as_json_line(line: bytes) -> Message | None:
    """Return a line as `as_json` does, or `None` if it is blank."""
    return as_json(line) if line.strip() else None


class LinePublisher:
    """Publishes lines in their order, many at a time, until one fails.

    Args:
        broadcast: Publishes one message.
        convert: Makes a message of a line, or returns `None` to skip the line.
        max_messages: How many messages may be on their way to the broker at the same time.
        max_bytes: How many bytes these may have together; no line is added once they have so many.
    """

    def __init__(
        self,
        broadcast: Broadcast,
        convert: Callable[[bytes], str | Message | None],
        *,
        max_messages: int = 512,
        max_bytes: int = 4 * 1024 * 1024,
    ) -> None:
        self.published = 0
        """How many messages the broker has taken."""
        self.failures: list[tuple[int, Exception]] = []
        """The lines that could not be published: number, counted from 1, and error. Sorted once `run` has returned."""
        self._broadcast = broadcast
        self._convert = convert
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._on_their_way: set[asyncio.Task[None]] = set()
        self._bytes = 0
        self._has_room = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None

    async def run(self, lines: AsyncIterator[bytes]) -> None:
        """Publish until the lines end, one fails, or this call is cancelled.

        It returns when nothing is on its way any more. An error of a single line isn't raised: see `failures`.

        Raises:
            MessageTooLarge: If a line is longer than the limit.
            OSError: If the lines can't be read.
        """
        reading = self._reading = asyncio.create_task(self._read(lines), name="wsbroadcast stdin")
        try:
            await asyncio.wait([reading])
        finally:
            reading.cancel()
            await asyncio.wait([reading, *self._on_their_way])
        self.failures.sort(key=lambda failure: failure[0])
        if not reading.cancelled():
            reading.result()

    async def _read(self, lines: AsyncIterator[bytes]) -> None:
        number = 1
        try:
            async for line in lines:
                message = self._convert(line)
                if message is not None:
                    await self._wait_for_room()
                    self._send(number, message, len(line))
                number += 1
        except EncodeError as error:
            self.failures.append((number, error))

    async def _wait_for_room(self) -> None:
        while len(self._on_their_way) >= self._max_messages or self._bytes >= self._max_bytes:
            self._has_room.clear()
            await self._has_room.wait()

    def _send(self, number: int, message: str | Message, size: int) -> None:
        def sent(task: asyncio.Task[None]) -> None:
            self._on_their_way.discard(task)
            self._bytes -= size
            self._has_room.set()

        task = asyncio.create_task(self._publish(number, message), name="wsbroadcast stdin message")
        self._on_their_way.add(task)
        self._bytes += size
        task.add_done_callback(sent)

    async def _publish(self, number: int, message: str | Message) -> None:
        try:
            await self._broadcast(message)
            self.published += 1
        except Exception as error:
            self.failures.append((number, error))
            if self._reading is not None:
                self._reading.cancel()
