"""The command line: `python -m wsbroadcast demo` and `python -m wsbroadcast publish`."""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from wsbroadcast.audience import check_channel, user_key
from wsbroadcast.exceptions import MissingDependency, WSBroadcastError
from wsbroadcast.options import Limits
from wsbroadcast.piping import Piping, as_json, as_json_line, as_text, everything, lines
from wsbroadcast.publisher import Publisher

# What a shell makes of a program that Ctrl+C has ended: 128 and the signal's number.
_INTERRUPTED = 130

_ENGINE = "WSBROADCAST_ENGINE"

Broadcast = Callable[[str | bytes], Awaitable[None]]


class CommandFailed(Exception):
    """Raised by a command that can't do its work; the text is for the person at the keyboard."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    Args:
        argv: The arguments after the program's name; by default those of the process.
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
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
        pass  # closed, or a pipe that nobody reads


def _parser() -> argparse.ArgumentParser:
    # Each command is a subparser and a function that is its `run`.
    parser = argparse.ArgumentParser(prog="python -m wsbroadcast", description="WebSocket broadcasting for FastAPI.")
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="serve a page on which browser tabs chat, stall and flood each other",
        description="Serve a page on which browser tabs chat, stall and flood each other. Ctrl+C ends it.",
    )
    demo.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    demo.add_argument(
        "--port", type=_port, default=8000, help="the port to listen on, 0 for any that is free (default: %(default)s)"
    )
    demo.set_defaults(run=_demo)
    _add_publish(commands)
    return parser


def _add_publish(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    publish = commands.add_parser(
        "publish",
        help="send messages through a broker to the connections of an app",
        description="Send messages through a broker to the connections of an app: each text is one. Without a text, "
        "each line of standard input is one, sent as it comes.",
    )
    publish.add_argument(
        "--engine",
        metavar="URL",
        default=os.environ.get(_ENGINE),
        help=f"the broker, such as redis://localhost; by default ${_ENGINE}, where other users don't see a password",
    )
    audience = publish.add_mutually_exclusive_group(required=True)
    audience.add_argument("--channel", type=_checked(check_channel), help="to the subscribers of a channel")
    audience.add_argument("--user", type=_checked(user_key), help="to the connections of a user")
    audience.add_argument("--everyone", action="store_true", help="to every connection")
    form = publish.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="refuse what isn't JSON; blank lines are passed over")
    form.add_argument("--binary", action="store_true", help="send all of standard input as one binary message")
    publish.add_argument("texts", nargs="*", metavar="text", help="a message")
    publish.set_defaults(run=_publish, refuse=publish.error)


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
            pass  # the way to end it; the server has closed its connections by now
    return 0


def _why_not_listening(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken: choose another with --port, or --port 0 for any that is free"
    return f"can't listen on {host} port {port}: {error.strerror or error}"


def _publish(arguments: argparse.Namespace) -> int:
    if not arguments.engine:
        arguments.refuse(f"name the broker: --engine URL, or ${_ENGINE}")
    if arguments.binary and arguments.texts:
        arguments.refuse("--binary sends standard input, so give no text")
    logging.getLogger("wsbroadcast").addHandler(logging.NullHandler())  # the error says it all, in one line
    try:
        asyncio.run(_publish_all(arguments))
    except (WSBroadcastError, OSError) as error:
        raise CommandFailed(str(error)) from error
    return 0


async def _publish_all(arguments: argparse.Namespace) -> None:
    audience = {} if arguments.everyone else {"channel": arguments.channel, "user": arguments.user}
    audience = {kind: name for kind, name in audience.items() if name is not None}
    texts = [(as_json if arguments.json else as_text)(os.fsencode(text)) for text in arguments.texts]
    async with Publisher(arguments.engine) as publisher:
        broadcast = partial(publisher.broadcast, **audience)
        if texts:
            await _publish_texts(broadcast, texts)
        elif arguments.binary:
            await _publish_binary(broadcast)
        else:
            await _publish_lines(Piping(broadcast, as_json_line if arguments.json else as_text))


async def _publish_texts(broadcast: Broadcast, texts: Sequence[str]) -> None:
    for number, text in enumerate(texts, 1):
        try:
            await broadcast(text)
        except WSBroadcastError as error:
            which = f"message {number} of {len(texts)}: " if len(texts) > 1 else ""
            raise CommandFailed(f"{which}{error}") from error


async def _publish_binary(broadcast: Broadcast) -> None:
    message = await everything(_standard_input(), Limits().max_message_bytes)
    if message:
        await broadcast(message)
    _say_published(1 if message else 0)


async def _publish_lines(piping: Piping) -> None:
    file = _standard_input()
    try:
        await piping.run(lines(file, Limits().max_message_bytes))
    finally:
        _say_published(piping.published)
    if piping.failures:
        number, error = piping.failures[0]
        raise CommandFailed(f"line {number}: {error}") from error


def _say_published(messages: int) -> None:
    _say(f"published {messages} message{'' if messages == 1 else 's'}")


def _standard_input() -> int:
    if sys.stdin is None:
        raise CommandFailed("standard input is closed: give the messages as arguments")
    if sys.stdin.isatty():
        _say("each line is a message; Ctrl+D ends")
    return sys.stdin.fileno()
