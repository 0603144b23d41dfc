"""Tells whether this process is one of several that serve the same app, which the memory engine doesn't link."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

from wsbroadcast.logs import logger

Frame = tuple[str, Mapping[str, Any]]
"""The module of a function that is running, and the function's variables."""

# Where a server has the number of its workers: in an attribute of a variable of a function that called us. That is the
# number in force, wherever it was set: an option, a file, the environment, an argument of `run`.
_SERVERS = {
    "uvicorn.server": ("self", "config.workers", "config.reload"),
    "hypercorn.asyncio.run": ("config", "workers", None),
    "gunicorn.arbiter": ("self", "num_workers", None),
    "granian.server.common": ("self", "workers", None),
}

# The option that uvicorn, FastAPI, gunicorn, hypercorn and granian have in common.
_OPTION = re.compile(r"(?<!\S)(?:--workers|-w)[ =]?(\d+)(?!\S)")


def warn_of_several_workers() -> None:
    """Log a warning if this is one of several processes."""
    is_child = multiprocessing.parent_process() is not None
    sign = sign_of_several_workers(os.environ, sys.argv, is_child, _frames())
    if sign:
        logger.warning(
            "%s, and memory:// doesn't link them: a broadcast reaches only the connections of the process it is made "
            "in. Give the ConnectionManager the URL of a broker, such as redis://localhost, or run one worker",
            sign,
        )


def sign_of_several_workers(
    environ: Mapping[str, str], argv: Sequence[str], is_child: bool, frames: Iterable[Frame]
) -> str:
    """Say how we know that several processes serve the app; empty if nothing says so.

    A known server that called us knows best. Of an unknown one `WEB_CONCURRENCY` tells, and in a child process the
    command line of its parent, which `multiprocessing` hands on, and the variable of granian: from Python 3.14 on a
    child no longer has the stack of its parent.
    """
    servers = [(number, module) for module, variables in frames for number in _workers(module, variables)]
    if servers:
        number, module = max(servers)
        return f"{module.partition('.')[0]} runs {number} workers" if number > 1 else ""
    options = _OPTION.findall(" ".join(argv[1:])) if is_child else []
    if options and int(options[-1]) > 1:
        return f"the command line asks for {int(options[-1])} workers"
    variables = ("GRANIAN_WORKERS", "WEB_CONCURRENCY") if is_child else ("WEB_CONCURRENCY",)
    for variable in () if options else variables:
        concurrency = environ.get(variable, "")
        if concurrency.isdecimal() and int(concurrency) > 1:
            return f"{variable} asks for {int(concurrency)} workers"
    return ""


def _workers(module: str, variables: Mapping[str, Any]) -> Iterator[int]:
    if module not in _SERVERS:
        return
    variable, number, reload = _SERVERS[module]
    try:
        workers = attrgetter(number)(variables[variable])
        if reload is not None and attrgetter(reload)(variables[variable]):
            workers = 1  # which is what reloading makes of any number
    except Exception:  # another function there, or a version in which it is elsewhere
        return
    if isinstance(workers, int):
        yield workers


def _frames() -> Iterator[Frame]:
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module in _SERVERS:
            yield module, frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
