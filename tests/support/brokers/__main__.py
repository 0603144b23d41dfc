"""Runs brokers to try the library with by hand; `scripts/brokers` starts it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack

from tests.support.brokers import Broker, BrokerMissing, NATSServer, PostgresServer, RedisServer

KINDS: dict[str, Callable[[], Broker]] = {"redis": RedisServer, "nats": NATSServer, "postgres": PostgresServer}


def main(names: list[str]) -> None:
    unknown = sorted(set(names) - set(KINDS))
    if unknown:
        sys.exit(f"expected {', '.join(KINDS)} or nothing for all of them, got {' '.join(unknown)!r}")
    with ExitStack() as stack:
        started = [_run(name, stack) for name in names or KINDS]
        if not any(started):
            sys.exit(1)
        print("Ctrl+C ends them; they keep nothing.", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            pass


def _run(name: str, stack: ExitStack) -> bool:
    try:
        broker = stack.enter_context(KINDS[name]())
    except BrokerMissing as missing:
        print(f"{name:10}{missing}", file=sys.stderr)
        return False
    print(f"{name:10}{broker.url}", flush=True)
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
