"""The command line: `python -m wsbroadcast demo`."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Sequence

from wsbroadcast.exceptions import MissingDependency


class CommandFailed(Exception):
    """Raised by a command that can't do its work; the text is for the person at the keyboard."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    Args:
        argv: The arguments after the program's name; by default those of the process.
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        run(arguments)
    except CommandFailed as error:
        sys.stderr.write(f"wsbroadcast: {error}\n")
        return 1
    except KeyboardInterrupt:
        pass  # the way to end the demo; the server has closed its connections by now
    return 0


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
    return parser


def _port(text: str) -> int:
    if text.isdecimal() and int(text) < 65536:
        return int(text)
    raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, not {text!r}")


def _demo(arguments: argparse.Namespace) -> None:
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
        server.serve(listener)


def _why_not_listening(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken: choose another with --port, or --port 0 for any that is free"
    return f"can't listen on {host} port {port}: {error.strerror or error}"
