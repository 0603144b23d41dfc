"""What every link to a broker does, against real ones; what is special about one is tested beside it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import pytest

from tests.engines.links import Letters, used
from wsbroadcast import Audience
from wsbroadcast.engines.broker import BrokerEngine, Parcel
from wsbroadcast.engines.nats import NATSEngine
from wsbroadcast.engines.postgres import PostgresEngine
from wsbroadcast.engines.redis import RedisEngine

ENGINES: dict[str, Callable[..., BrokerEngine]] = {
    "redis": RedisEngine,
    "nats": NATSEngine,
    "postgres": PostgresEngine,
}

EVERY_BYTE = bytes(range(256))

# What brokers and their protocols have been known to take for something else.
ENVELOPES = [
    *(b"", b"\n", b"\r\n", b"*1\r\n$4\r\nPING\r\n", b"\r\nMSG a 1 1\r\nx\r\nPING\r\n", '{"v":1}\nGrüße ☕'.encode()),
    *(EVERY_BYTE, b"\xff" * 5600, b"x" * 7400, random.Random(1).randbytes(50_000), b"x" * (1024 * 1024), b"same"),
]

CHANNELS = [
    *("*", ">", "a.>", "a.*", "a", "A", ".", "a b", " ", "ä", "🎉" * 50, "%2E", '"; DROP', "$SYS", "\\*"),
    *("news", "News", "news[a-z]", "news?", "newsb", "x" * 200, "-", "%"),
]


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest, prefix: str) -> BrokerEngine:
    server = request.getfixturevalue(f"{request.param}_server")
    return ENGINES[request.param](server.url, prefix=prefix)


@pytest.fixture
def name_of(engine: BrokerEngine) -> Callable[[str], str]:
    return lambda channel: engine.names.of(Audience("channel", channel))


NameOf = Callable[[str], str]


def envelopes_of(taken: Sequence[tuple[str, bytes]], name: str) -> list[bytes]:
    return [envelope for each, envelope in taken if each == name]


async def test_what_is_published_after_subscribe_has_returned_arrives(engine: BrokerEngine, name_of: NameOf) -> None:
    async with used(engine) as here, used(engine) as there:
        for number in range(300):
            await here.link.subscribe([name_of(f"{number}")])
            await there.publish(name_of(f"{number}"), b"%d" % number)
        assert await here.letters.until(b"299") == [(name_of(f"{number}"), b"%d" % number) for number in range(300)]


async def test_every_envelope_arrives_as_it_was(engine: BrokerEngine, name_of: NameOf) -> None:
    name = name_of("news")
    async with used(engine, name) as link:
        await link.publish(name, *ENVELOPES, *ENVELOPES)
        await link.publish(name, b"end")
        assert await link.letters.until(b"end") == [(name, each) for each in (*ENVELOPES, *ENVELOPES, b"end")]


async def test_order_of_a_name_is_that_of_publishing(engine: BrokerEngine, name_of: NameOf) -> None:
    dice = random.Random(7)
    names = [name_of(f"{number}") for number in range(7)]
    sent = [Parcel(dice.choice(names), b"%d" % number + bytes(dice.choice([0, 100, 9000]))) for number in range(2000)]
    async with used(engine, *names) as here, used(engine) as there:
        rest = list(sent)
        while rest:
            batch = [rest.pop(0) for _ in range(min(len(rest), dice.randint(1, 64)))]
            assert await there.link.publish(batch) == [None] * len(batch)
        for name in names:
            await there.publish(name, b"end")
        taken = here.letters.taken
        async with asyncio.timeout(10):
            while sum(envelope == b"end" for _, envelope in taken) < len(names):
                await here.letters.until(b"end")
                await asyncio.sleep(0)
        for name in names:
            assert envelopes_of(taken, name) == [*envelopes_of(sent, name), b"end"]


async def test_names_mean_nothing_but_themselves(engine: BrokerEngine, name_of: NameOf) -> None:
    subscribed = CHANNELS[::2]
    async with used(engine, *map(name_of, subscribed)) as link:
        for channel in CHANNELS:
            await link.publish(name_of(channel), channel.encode())
        await link.publish(name_of(subscribed[0]), b"end")
        expected = [(name_of(channel), channel.encode()) for channel in subscribed]
        assert await link.letters.until(b"end") == [*expected, (name_of(subscribed[0]), b"end")]


async def test_name_arrives_once_however_often_it_is_subscribed(engine: BrokerEngine, name_of: NameOf) -> None:
    name = name_of("news")
    async with used(engine, name) as link:
        await link.link.subscribe([name, name])
        await link.link.unsubscribe([name_of("never")])
        await link.link.subscribe([])
        await link.publish(name, b"once", b"end")
        assert await link.letters.until(b"end") == [(name, b"once"), (name, b"end")]
        assert link.letters.reasons == []


async def test_name_is_silent_after_unsubscribe_and_comes_back(engine: BrokerEngine, name_of: NameOf) -> None:
    name, other = name_of("news"), name_of("other")
    async with used(engine, name, other) as link:
        publishing = asyncio.create_task(link.publish(name, b"on its way"))
        await asyncio.sleep(0)
        await link.link.unsubscribe([name])
        await publishing
        link.letters.taken.clear()
        await link.publish(name, b"nobody hears")
        await link.publish(other, b"1")
        assert await link.letters.until(b"1") == [(other, b"1")]
        await link.link.subscribe([name])
        await link.publish(name, b"2")
        assert await link.letters.until(b"2") == [(other, b"1"), (name, b"2")]


async def test_thousands_of_names_are_subscribed_at_once(engine: BrokerEngine, name_of: NameOf) -> None:
    names = [name_of(f"{number}:{'x' * 150}") for number in range(5000)]
    async with used(engine, *names) as link, asyncio.timeout(20):
        await link.publish(names[-1], b"last")
        assert await link.letters.until(b"last") == [(names[-1], b"last")]
        await link.link.unsubscribe(names)


async def test_link_publishes_and_subscribes_at_the_same_time(engine: BrokerEngine, name_of: NameOf) -> None:
    name = name_of("news")

    async def subscribe() -> None:
        for number in range(100):
            await link.link.subscribe([name_of(f"{number}")])
            await link.link.unsubscribe([name_of(f"{number}")])

    async with used(engine, name) as link:
        subscribing = asyncio.create_task(subscribe())
        for number in range(200):
            await link.publish(name, b"%d" % number)
        await subscribing
        assert [each for _, each in await link.letters.until(b"199")] == [b"%d" % number for number in range(200)]


async def test_nothing_is_delivered_after_abort(engine: BrokerEngine, name_of: NameOf) -> None:
    name = name_of("news")
    async with used(engine, name) as aborted, used(engine, name) as other:
        await other.publish(name, b"1")
        await aborted.letters.until(b"1")
        await aborted.link.abort()
        await aborted.link.abort()
        await other.publish(name, b"2")
        await other.letters.until(b"2")
        assert [each for _, each in aborted.letters.taken] == [b"1"]
        with pytest.raises(Exception, match=r"."):
            await aborted.link.publish([Parcel(name, b"3")])


async def test_link_can_be_aborted_before_it_is_open(engine: BrokerEngine) -> None:
    link, letters = engine.new_link(), Letters()
    await link.abort()
    await link.abort()
    assert letters.taken == []
