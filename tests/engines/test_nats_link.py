from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import pytest

from tests.engines.links import Letters, Used, used
from tests.engines.nats_links import let_in, serving
from tests.support.brokers import Endpoint, NATSServer, free_port
from wsbroadcast import ConfigurationError, MessageTooLarge
from wsbroadcast.engines.broker.link import Parcel, Place
from wsbroadcast.engines.nats import NATSEngine

OwnNATS = Callable[..., NATSServer]

# Who may use one prefix, and little more.
PERMISSIONS = """
authorization { users: [ { user: alice, password: secret, permissions: {
    publish: ["app.>"], subscribe: ["app.>", "read.>"] } } ] }
"""


def permitted(server: NATSServer) -> NATSEngine:
    return NATSEngine(f"nats://{server.host}:{server.port}", user="alice", password="secret")


# What arrives.


async def test_order_is_kept_over_all_names(nats_server: Endpoint, prefix: str) -> None:
    names = [f"{prefix}.channel.{number}" for number in range(50)]
    sent = [Parcel(names[number * 7 % 50], b"%d" % number) for number in range(5000)]
    async with used(nats_server.url, *names) as here, used(nats_server.url) as there:
        for start in range(0, len(sent), 100):
            assert await there.link.publish(sent[start : start + 100]) == [None] * 100
        assert await here.letters.until(sent[-1].envelope) == sent


async def test_what_arrives_before_the_inlet_is_not_lost(nats_server: Endpoint, prefix: str) -> None:
    name = f"{prefix}.channel.a"
    link, letters = NATSEngine(nats_server.url).new_link(), Letters()
    await link.open()
    await link.subscribe([name])
    await link.publish([Parcel(name, b"1"), Parcel(name, b"2")])
    reading = asyncio.create_task(link.read(letters))
    await link.publish([Parcel(name, b"3")])
    assert [envelope for _, envelope in await letters.until(b"3")] == [b"1", b"2", b"3"]
    await link.abort()
    await asyncio.wait([reading])
    assert isinstance(reading.exception(), ConnectionError)


async def test_headers_of_others_are_left_out(nats_server: Endpoint, prefix: str) -> None:
    name = f"{prefix}.channel.a"
    async with used(nats_server.url, name) as link:
        reader, writer = await asyncio.open_connection(nats_server.host, nats_server.port)
        publications = [b"%b 1 2\r\nXa" % name.encode(), b"%b 12 13\r\nNATS/1.0\r\n\r\nb" % name.encode()]
        writer.write(b'CONNECT {"headers":true}\r\nHPUB ' + b"\r\nHPUB ".join(publications) + b"\r\nPING\r\n")
        await reader.readuntil(b"PONG")
        writer.close()
        await link.publish(name, b"c")
        assert [envelope for _, envelope in await link.letters.until(b"c")] == [b"a", b"b", b"c"]


# What the server refuses.


async def test_envelope_over_the_limit_is_refused_alone(own_nats: OwnNATS, prefix: str) -> None:
    server = own_nats(config="max_payload: 1000")
    name = f"{prefix}.channel.a"
    async with used(server.url, name) as link:
        assert link.link.max_envelope_bytes == 1000
        parcels = [Parcel(name, b"x" * size) for size in (1000, 1001, 1)]
        first, second, third = await link.link.publish(parcels)
        assert (first, third) == (None, None)
        assert isinstance(second, MessageTooLarge)
        assert (second.size, second.limit) == (1001, 1000)
        assert await link.letters.until(b"x") == [parcels[0], parcels[2]]


@pytest.mark.parametrize("size", [2000, 500])
async def test_limit_that_was_changed_is_read_again(own_nats: OwnNATS, size: int) -> None:
    server = own_nats(config="max_payload: 1000")
    async with used(server.url, "a") as link:
        await asyncio.to_thread(server.set_max_payload, size)
        await link.publish("a", b"small")
        await link.link.read_limits()
        assert link.link.max_envelope_bytes == size
        await link.publish("a", b"x" * size)
        await link.letters.until(b"x" * size)
        assert not link.reading.done()


async def test_limit_of_another_server_behind_the_same_address_says_nothing() -> None:
    ids = iter(["one", "another"])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = next(ids)
        size = {"one": 1000, "another": 2000}[name]
        writer.write(b'INFO {"server_id":"%b","max_payload":%d}\r\n' % (name.encode(), size))
        while await reader.readuntil(b"PING\r\n"):
            writer.write(b"PONG\r\n")

    async with serving(serve) as url, used(url) as link:
        await link.link.read_limits()
        assert link.link.max_envelope_bytes == 1000


@pytest.mark.parametrize(("told", "limit"), [("2000", 2000), ("true", 1000), ("-1", 1000), ('"x"', 1000)])
async def test_limit_that_a_server_tells_of_is_kept_if_it_is_one(told: str, limit: int) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"max_payload":1000}\r\n')
        while await reader.readuntil(b"PING\r\n"):
            writer.write(b'INFO {"max_payload":%b}\r\nPONG\r\n' % told.encode())

    async with serving(serve) as url, used(url) as link:
        await link.link.publish([])
        assert link.link.max_envelope_bytes == limit


async def test_limit_is_not_read_over_a_link_that_is_gone(own_nats: OwnNATS) -> None:
    server = own_nats()
    await NATSEngine(server.url).new_link().read_limits()
    async with used(server.url) as link:
        await server.stopped()
        with pytest.raises(ConnectionError):
            await link.link.read_limits()
        await link.link.abort()
        await link.link.read_limits()
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_denied_publications_are_told_apart(own_nats: OwnNATS) -> None:
    async with used(permitted(own_nats(config=PERMISSIONS)), "app.channel.a", "read.b") as link:
        parcels = [
            Parcel("app.channel.a", b"1"),
            Parcel("read.b", b"2"),
            Parcel("Read.b", b"3"),
            Parcel("app.channel.a", b"4"),
        ]
        first, second, third, fourth = await link.link.publish(parcels)
        assert (first, fourth) == (None, None)
        for error, name in ((second, "read.b"), (third, "Read.b")):
            assert isinstance(error, ConfigurationError)
            assert f"doesn't let the user 'alice' publish to '{name}': grant publish on '{name[:4]}.>'" in str(error)
            assert "secret" not in str(error)
        assert await link.letters.until(b"4") == [parcels[0], parcels[3]]
        await link.publish("app.channel.a", b"still there")


async def test_denied_subscription_names_what_to_grant(own_nats: OwnNATS) -> None:
    server = own_nats(config=PERMISSIONS)
    async with used(permitted(server), "app.channel.a") as link:
        with pytest.raises(
            ConfigurationError, match=r"subscribe to 'other\.channel\.b': grant subscribe on 'other\.>'"
        ):
            await link.link.subscribe(["app.channel.c", "other.channel.b"])
        await link.publish("app.channel.c", b"still there")
        assert await link.letters.until(b"still there") == [("app.channel.c", b"still there")]
        with pytest.raises(ConfigurationError):
            await link.link.subscribe(["other.channel.b"])


async def test_permission_that_is_withdrawn_loses_the_link(own_nats: OwnNATS) -> None:
    server = own_nats(config=PERMISSIONS)
    async with used(permitted(server), "app.channel.a") as link:
        config = server.directory / "nats.conf"
        config.write_text(config.read_text().replace('subscribe: ["app.>", ', "subscribe: ["))
        process = server._process
        assert process is not None
        os.kill(process.pid, signal.SIGHUP)
        error = await link.lost()
        assert isinstance(error, ConfigurationError)
        assert 'Subscription to "app.channel.a"' in str(error)


async def test_too_many_subscriptions_are_refused(own_nats: OwnNATS, prefix: str) -> None:
    async with used(own_nats(config="max_subscriptions: 3").url) as link:
        with pytest.raises(ConfigurationError, match="maximum subscriptions exceeded"):
            await link.link.subscribe([f"{prefix}.user.{number}" for number in range(5)])
        assert isinstance(await link.lost(), ConfigurationError)


# How it ends.


async def test_killed_server_ends_everything(own_nats: OwnNATS, prefix: str) -> None:
    server = own_nats()
    async with used(server.url, f"{prefix}.a") as link:
        server.pause()
        calls = [
            asyncio.create_task(link.link.publish([Parcel(f"{prefix}.a", b"1")])),
            asyncio.create_task(link.link.subscribe([f"{prefix}.b"])),
        ]
        await asyncio.sleep(0)
        server.kill()
        why = await link.lost()
        assert isinstance(why, ConnectionError)
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert results == [why, why]
        with pytest.raises(ConnectionError):
            await link.link.publish([Parcel(f"{prefix}.a", b"2")])
        with pytest.raises(ConnectionError):
            await link.link.unsubscribe([f"{prefix}.a"])


async def test_server_that_stops_in_order_loses_the_link(own_nats: OwnNATS) -> None:
    server = own_nats()
    async with used(server.url) as link:
        await server.stopped()
        assert isinstance(await link.lost(), ConnectionError)


async def test_node_that_the_server_cuts_off_loses_the_link(own_nats: OwnNATS, prefix: str) -> None:
    server = own_nats(config='write_deadline: "1s"\nmax_pending: 1MB')
    async with used(server.url, f"{prefix}.a") as slow:
        sock = slow.link.__dict__["_login"].writer.transport
        sock.pause_reading()
        async with used(server.url) as fast:
            for _ in range(40):
                await fast.publish(f"{prefix}.a", b"x" * 1_000_000)
        sock.resume_reading()
        assert isinstance(await slow.lost(), ConnectionError)
        assert len(slow.letters.taken) < 40


async def test_answer_after_a_cancelled_call_disturbs_nobody(own_nats: OwnNATS, prefix: str) -> None:
    server = own_nats()
    name = f"{prefix}.a"
    async with used(server.url, name) as link:
        server.pause()
        for call in (link.link.publish([Parcel(name, b"1")]), link.link.subscribe([f"{prefix}.b"])):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await call
        server.resume()
        await link.publish(name, b"2")
        assert [envelope for _, envelope in await link.letters.until(b"2")] == [b"1", b"2"]


async def test_abort_does_not_wait_for_a_server_that_hangs(own_nats: OwnNATS, prefix: str) -> None:
    server = own_nats()
    async with used(server.url, f"{prefix}.a") as link:
        server.pause()
        publishing = asyncio.create_task(link.link.publish([Parcel(f"{prefix}.a", b"x" * 1_000_000)] * 20))
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await link.link.abort()
            await link.link.abort()
        assert isinstance(await link.lost(), ConnectionError)
        with pytest.raises(ConnectionError):
            await publishing


async def test_nothing_is_sent_or_delivered_after_abort() -> None:
    received = bytearray()
    ended: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
    aborted = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await let_in(reader, writer)
        await reader.readuntil(b"PING\r\n")
        writer.write(b"PONG\r\n")
        await aborted.wait()
        try:
            while data := await reader.read(65536):
                received.extend(data)
            ended.set_result(None)
        except OSError as error:
            ended.set_result(error)

    async with serving(serve) as url, used(url) as link:
        publishing = asyncio.create_task(link.link.publish([Parcel("a", b"x" * 1_000_000)] * 20))
        await asyncio.sleep(0)
        await link.link.abort()
        aborted.set()
        assert isinstance(await ended, ConnectionResetError)
        assert len(received) < 20_000_000
        await asyncio.wait([publishing])
        assert isinstance(publishing.exception(), ConnectionError)


async def test_messages_that_come_with_an_end_are_not_delivered_after_it(nats_server: Endpoint, prefix: str) -> None:
    name = f"{prefix}.a"
    async with used(nats_server.url, name) as link, used(nats_server.url) as other:
        for _ in range(10):
            await other.publish(name, *(b"%d" % number for number in range(100)))
        await link.link.abort()
        count = len(link.letters.taken)
        await other.publish(name, b"late")
        assert len(link.letters.taken) == count


async def test_garbage_loses_the_link_and_is_no_end_in_silence() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await let_in(reader, writer)
        await reader.readuntil(b"PING\r\n")
        writer.write(b"PONG\r\nMSG a 1 garbage\r\n")
        await reader.read()

    async with serving(serve) as url, used(url) as link:
        assert isinstance(await link.lost(), ValueError)


async def test_inlet_that_fails_loses_the_link(nats_server: Endpoint, prefix: str) -> None:
    async with used(nats_server.url, f"{prefix}.a") as link:

        def fail(name: str, envelope: bytes, place: Place | None = None) -> None:
            raise RuntimeError("no room")

        link.letters.take = fail  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="no room"):
            await link.link.publish([Parcel(f"{prefix}.a", b"1")])
        assert isinstance(await link.lost(), RuntimeError)


async def test_server_says_why_it_ends_the_connection() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await let_in(reader, writer)
        await reader.readuntil(b"PING\r\n")
        writer.write(b"PONG\r\n-ERR 'Slow Consumer'\r\n")

    async with serving(serve) as url, used(url) as link:
        error = await link.lost()
        assert isinstance(error, ConnectionError)
        assert "Slow Consumer" in str(error)


async def test_pings_of_the_server_are_answered(own_nats: OwnNATS) -> None:
    server = own_nats(config='ping_interval: "250ms"\nping_max: 2')
    async with used(server.url) as link:
        await asyncio.wait([link.reading], timeout=1.0)  # without an answer it ends after three intervals
        assert not link.reading.done()
        await link.publish("a", b"1")


async def test_link_that_is_not_open_does_nothing() -> None:
    link = NATSEngine(f"nats://127.0.0.1:{free_port()}").new_link()
    for call in (link.read(Letters()), link.publish([]), link.subscribe([]), link.unsubscribe([])):
        with pytest.raises(ConnectionError, match="isn't open"):
            await call
    await link.abort()


async def test_cancelled_calls_leave_nothing_behind(nats_server: Endpoint, prefix: str) -> None:
    before = asyncio.all_tasks()

    async def call(link: Used, step: int) -> None:
        match step % 3:
            case 0:
                await link.link.publish([Parcel(f"{prefix}.a", b"x")] * 10)
            case 1:
                await link.link.subscribe([f"{prefix}.{step}"])
            case 2:
                await link.link.unsubscribe([f"{prefix}.a"])

    for step in range(30):
        async with used(nats_server.url, f"{prefix}.a") as link:
            task = asyncio.create_task(call(link, step))
            for _ in range(step // 3):
                await asyncio.sleep(0)
            task.cancel()
            await link.link.abort()
            await asyncio.wait([task])
            assert task.cancelled() or task.exception() is None
    assert asyncio.all_tasks() == before
