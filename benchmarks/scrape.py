"""What it costs to scrape the metrics of one process ten times a second, and whether messages come later for it.

A manager in this process has many connections, and a channel with some of them gets a message every 5 ms. Turns with
and without scraping alternate. Printed is the time of the processor that scrapes took, as a share of one core, and how
long messages took from `broadcast` until the last peer had it.

    python benchmarks/scrape.py
    python benchmarks/scrape.py --connections 10000 --seconds 10
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.asgi import Peer
from wsbroadcast import ConnectionManager
from wsbroadcast.telemetry.prometheus import exposition

_PAUSE = 0.005
_SCRAPE_PAUSE = 0.1


class Turn:
    """One stretch of messages, with or without scrapes."""

    def __init__(self) -> None:
        self.delays: list[float] = []
        self.scraping = 0.0
        self.scrapes = 0
        self.bytes = 0
        self.seconds = 0.0

    async def run(self, manager: ConnectionManager, peers: list[Peer], seconds: float, *, scrapes: bool) -> None:
        """Broadcast for so many seconds; scrape as Prometheus would, in the event loop of the app."""
        began = time.perf_counter()
        next_scrape = began
        while (now := time.perf_counter()) < began + seconds:
            before = len(peers[-1].sent)
            await manager.broadcast("x" * 100, channel="measured")
            if scrapes and now >= next_scrape:  # in the worst place: a message is on its way
                next_scrape += _SCRAPE_PAUSE
                self._scrape(manager)
            while len(peers[-1].sent) == before:  # noqa: ASYNC110  # an event would be one more turn
                await asyncio.sleep(0)
            self.delays.append(time.perf_counter() - now)
            await asyncio.sleep(_PAUSE)
        self.seconds += time.perf_counter() - began

    def _scrape(self, manager: ConnectionManager) -> None:
        before = time.process_time()
        self.bytes = len(exposition({"node": manager.stats()}))
        self.scraping += time.process_time() - before
        self.scrapes += 1

    def line(self, name: str) -> str:
        """What was measured, for the table."""
        ordered = sorted(self.delays)
        middle, high = statistics.median(ordered) * 1000, ordered[int(len(ordered) * 0.99)] * 1000
        share = 100 * self.scraping / self.seconds
        return (
            f"{name:10} {self.scrapes / self.seconds:10.1f} {share:10.2f} {middle:12.3f} {high:12.3f} {self.bytes:10}"
        )


async def _measure(connections: int, seconds: float) -> None:
    async with ConnectionManager() as manager:
        peers = [Peer() for _ in range(connections)]
        for number, peer in enumerate(peers):
            channels = ["measured"] if number % 100 == 0 or number == connections - 1 else [f"c{number % 1000}"]
            await manager.connect(peer.websocket, user=f"u{number}", channels=channels)
        without, scraped = Turn(), Turn()
        for _ in range(5):
            await without.run(manager, peers, seconds / 5, scrapes=False)
            await scraped.run(manager, peers, seconds / 5, scrapes=True)
    print(f"{connections} connections, {seconds:g} s with and without\n")
    print(f"{'':10} {'scrapes/s':>10} {'% of core':>10} {'median ms':>12} {'99 % ms':>12} {'bytes':>10}")
    print(without.line("without"))
    print(scraped.line("scraped"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each kind (default: %(default)s)")
    arguments = parser.parse_args()
    asyncio.run(_measure(arguments.connections, arguments.seconds))


if __name__ == "__main__":
    main()
