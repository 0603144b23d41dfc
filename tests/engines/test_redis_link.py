"""The link to one Redis, against a real one; and against one that answers what a real one rarely does."""

from __future__ import annotations

import asyncio
import gc
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

from tests.engines.links import Letters, open_once, used
from tests.engines.redis_links import fake_redis, obliging
from tests.support.asgi import turns
from tests.support.brokers import Endpoint, RedisServer, free_port
from tests.support.proxy import FaultProxy
from tests.support.servers import eventually
from wsbroadcast import ConfigurationError
from wsbroadcast.engines.broker.link import Link, Parcel
from wsbroadcast.engines.redis import RedisEngine
from wsbroadcast.engines.redis.connection import Asker, Subscriber
from wsbroadcast.engines.redis.options import target_from_url
from wsbroadcast.exceptions import EngineError, EngineUnavailable

OwnRedis = Callable[..., RedisServer]

EVERY_BYTE = bytes(range(256))


async def publish(link: Link, name: str, *envelopes: bytes) -> None:
    assert await link.publish([Parcel(name, envelope) for envelope in envelopes]) == [None] * len(envelopes)


def numbers(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


# What it is for.


async def test_pubsub_crosses_databases(redis_server: Endpoint, prefix: str) -> None:
    place = redis_server.url.rpartition("/")[0]
    async with used(f"{place}/1", f"{prefix}:a") as receiver, used(f"{place}/2?client_name=x") as (link, _, _):
        await publish(link, f"{prefix}:a", b"hello")
        await receiver.letters.until(b"hello")


# Ways in.


async def test_link_goes_over_a_unix_socket(own_redis: OwnRedis) -> None:
    server = own_redis(password="p w@/")
    async with used(server.unix_url, "a") as (link, letters, _):
        await publish(link, "a", EVERY_BYTE)
        await letters.until(EVERY_BYTE)


async def test_link_goes_over_tls(own_redis: OwnRedis) -> None:
    server = own_redis(tls=True, password="pw")
    async with used(f"{server.url}?ssl_ca_certs={server.ca}", "a") as (link, letters, _):
        await publish(link, "a", EVERY_BYTE * 10_000, b"end")
        assert (await letters.until(b"end"))[0] == ("a", EVERY_BYTE * 10_000)
    await eventually(lambda: _is_left(server))


async def test_certificate_that_is_not_trusted_is_refused(own_redis: OwnRedis) -> None:
    server = own_redis(tls=True)
    with pytest.raises(ConfigurationError, match=r"127\.0\.0\.1:\d+ has a certificate that isn't trusted"):
        await open_once(server.url)


async def test_certificate_for_another_name_is_refused(own_redis: OwnRedis) -> None:
    server = own_redis(tls=True, config={"bind": "127.0.0.1 127.0.0.2"})
    with pytest.raises(ConfigurationError, match=r"127\.0\.0\.2:\d+ has a certificate .*: it has to name that host"):
        await open_once(f"{server.url.replace('127.0.0.1', '127.0.0.2')}?ssl_ca_certs={server.ca}")


async def test_certificate_files_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ssl_…"):
        await open_once(f"rediss://localhost:1?ssl_ca_certs={tmp_path / 'none.pem'}")


async def test_client_is_neither_used_nor_closed(own_redis: OwnRedis) -> None:
    server = own_redis(password="pw")
    async with redis.asyncio.Redis(host=server.host, port=server.port, password="pw", decode_responses=True) as client:
        await client.set("a", "b")
        async with used(RedisEngine(client=client), "a") as (link, letters, _):
            await publish(link, "a", EVERY_BYTE)
            await letters.until(EVERY_BYTE)
            assert len(server.command("CLIENT", "LIST").splitlines()) == 1 + 2 + 1  # the client's, ours, this one
        assert await client.get("a") == "b"


# Being refused.

USERS = [
    "app on >secret resetchannels &t:* +publish +subscribe +unsubscribe",
    "full on >secret ~* &* +@all",
    "mute on >secret resetchannels &t:* +subscribe +unsubscribe",
    "deaf on >secret resetchannels &t:* +publish +unsubscribe",
    "deafer on >secret resetchannels &t:* +publish +subscribe",
    "other on >secret resetchannels &u:* +publish +subscribe +unsubscribe",
    "off off >secret &* +@all",
]


@pytest.mark.parametrize(
    ("login", "says"),
    [
        ("", r"'default' \(.*[Aa]uthentication required"),
        (":wrong@", "'default' .*invalid username-password"),
        ("app:wrong@", "'app' .*invalid username-password"),
        ("nobody:secret@", "'nobody' .*invalid username-password"),
        ("off:secret@", "'off' .*disabled"),
        ("mute:secret@", r"'mute' .*'publish'.* needs &t:\* \+publish \+subscribe \+unsubscribe$"),
        ("deaf:secret@", r"'deaf' .*'subscribe'.* needs &t:\* \+publish"),
        ("deafer:secret@", "'deafer' .*'unsubscribe'"),
        ("other:secret@", r"'other' \(NOPERM .*channel"),
    ],
)
@pytest.mark.parametrize("is_unix", [False, True])
async def test_refusal_says_who_and_what_is_needed(own_redis: OwnRedis, login: str, says: str, is_unix: bool) -> None:
    server = own_redis(password="main", users=USERS)
    url = f"unix://{login}{server.socket_path}" if is_unix else f"redis://{login}{server.host}:{server.port}"
    with pytest.raises(ConfigurationError, match=says) as raised:
        await open_once(f"{url}?prefix=t")
    _shows_no_secret(raised.value, "secret", "wrong")
    assert str(server.socket_path if is_unix else server.port) in str(raised.value)


@pytest.mark.parametrize(
    ("option", "says"), [("db=1", r"'select'.*\+select"), ("client_name=x", r"'client(\|setname)?'.*\+client\|setname")]
)
async def test_options_that_need_a_permission_say_so(own_redis: OwnRedis, option: str, says: str) -> None:
    server = own_redis(users=USERS)
    with pytest.raises(ConfigurationError, match=says):
        await open_once(f"redis://app:secret@{server.host}:{server.port}?prefix=t&{option}")


async def test_unknown_database_is_refused(redis_server: Endpoint) -> None:
    with pytest.raises(ConfigurationError, match="DB index is out of range"):
        await open_once(redis_server.url.rpartition("/")[0] + "/99999")


async def test_password_where_none_is_set_is_refused(redis_server: Endpoint) -> None:
    with pytest.raises(ConfigurationError, match="without any password configured") as raised:
        await open_once(f"redis://:hunter2@{redis_server.host}:{redis_server.port}")
    _shows_no_secret(raised.value, "hunter2")


async def test_documented_permissions_are_enough(own_redis: OwnRedis) -> None:
    server = own_redis(users=USERS)
    engine = RedisEngine.from_url(f"redis://app:secret@{server.host}:{server.port}?prefix=t")
    async with used(engine, "t:channel:a") as (link, letters, _):
        await publish(link, "t:channel:a", b"hello")
        await letters.until(b"hello")
        await link.unsubscribe(["t:channel:a"])


async def test_forbidden_name_is_refused_for_itself(own_redis: OwnRedis) -> None:
    server = own_redis(users=USERS)
    engine = RedisEngine.from_url(f"redis://app:secret@{server.host}:{server.port}?prefix=t")
    async with used(engine, "t:a") as (link, letters, _):
        refusals = await link.publish([Parcel("t:a", b"1"), Parcel("u:a", b"2"), Parcel("t:a", b"3")])
        assert [type(refusal) for refusal in refusals] == [type(None), ConfigurationError, type(None)]
        assert "NOPERM" in str(refusals[1])
        assert [envelope for _, envelope in await letters.until(b"3")] == [b"1", b"3"]
        with pytest.raises(ConfigurationError, match=r"'app' \(NOPERM .* needs &t:\*"):
            await link.subscribe(["t:b", "u:b"])


async def test_unknown_command_that_repeats_the_password_is_not_passed_on() -> None:
    def answer(command: list[bytes]) -> bytes:
        if command[0] == b"AUTH":
            return b"-ERR unknown command 'AUTH', with args beginning with: 'hunter2' \r\n"
        return obliging(command)

    async with fake_redis(answer) as address:
        with pytest.raises(ConfigurationError, match="unknown command 'AUTH'") as raised:
            await open_once(f"redis://:hunter2@{address}")
    _shows_no_secret(raised.value, "hunter2")


async def test_server_that_is_no_redis_can_not_be_reached() -> None:
    async with fake_redis(lambda command: b"HTTP/1.1 400 Bad Request\r\n") as address:
        with pytest.raises(Exception) as raised:  # noqa: PT011
            await open_once(f"redis://{address}")
        assert not isinstance(raised.value, ConfigurationError)


async def test_connection_without_a_socket_is_refused(redis_server: Endpoint) -> None:
    class Writer:
        """What a connection of the user's own may have instead of asyncio's."""

        async def wait_closed(self) -> None:
            """It is."""

        def close(self) -> None:
            """There is nothing to close."""

    class Unreal(redis.asyncio.Connection):
        async def _connect(self) -> None:
            self._reader = asyncio.StreamReader()
            self._writer = Writer()  # type: ignore[assignment]

    pool = redis.asyncio.ConnectionPool(connection_class=Unreal)
    with pytest.raises(ConfigurationError, match="Unreal is not a connection to a server"):
        await open_once(RedisEngine(client=redis.asyncio.Redis(connection_pool=pool)))


@pytest.mark.parametrize("option", ["credential_provider", "socket_keepalive_options"])
async def test_option_of_the_wrong_type_is_no_outage(redis_server: Endpoint, option: str) -> None:
    options: dict[str, Any] = {option: 5}
    with pytest.raises(AttributeError, match="'int' object has no attribute"):
        await open_once(RedisEngine(redis_server.url, **options))


async def test_option_that_redis_py_can_not_send_is_refused(redis_server: Endpoint) -> None:
    with pytest.raises(ConfigurationError, match="redis-py refuses the options: Invalid input"):
        await open_once(RedisEngine(redis_server.url, password=object()))


async def test_closed_port_can_not_be_reached() -> None:
    with pytest.raises(redis.ConnectionError, match=r"Connect call failed|refused"):
        await open_once(f"redis://:hunter2@127.0.0.1:{free_port()}")


@pytest.mark.parametrize("verb", [b"AUTH", b"PUBLISH", b"subscribe"])
async def test_server_that_is_full_can_not_be_reached(verb: bytes) -> None:
    full = b"-ERR max number of clients + cluster connections reached\r\n"
    async with fake_redis(lambda command: full if command[0] == verb else obliging(command)) as address:
        with pytest.raises(ConnectionError, match="max number of clients"):
            await open_once(f"redis://:hunter2@{address}")


async def test_answer_to_a_publish_that_makes_no_sense_loses_the_link() -> None:
    def answer(command: list[bytes]) -> bytes:
        return b"+QUEUED\r\n" if command[1:2] == [b"a"] else obliging(command)

    async with fake_redis(answer) as address, used(f"redis://{address}") as (link, _, _):
        with pytest.raises(ValueError, match="answers a publish with bytes"):
            await link.publish([Parcel("a", b"1")])


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("NOPERM this user has no permissions to run the 'publish' command", ConfigurationError),
        ("OOM command not allowed when used memory > 'maxmemory'", EngineUnavailable),
        ("MISCONF Redis is configured to save RDB snapshots", EngineUnavailable),
        ("BUSY Redis is busy running a script", EngineUnavailable),
        ("NOREPLICAS Not enough good replicas to write.", EngineUnavailable),
        ("ERR unknown command 'PUBLISH'", EngineError),
    ],
)
async def test_server_that_takes_no_message_is_no_lost_link(answer: str, told: type[Exception]) -> None:
    refused = b"-%b\r\n" % answer.encode()
    async with (
        fake_redis(lambda command: refused if command[1:2] == [b"a"] else obliging(command)) as address,
        used(f"redis://{address}") as (link, _, reading),
    ):
        first, second = await link.publish([Parcel("a", b"1"), Parcel("b", b"2")])
        assert type(first) is told
        assert answer[:20] in str(first)
        assert second is None
        assert not reading.done()


@pytest.mark.parametrize("code", ["LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "MOVED 7 a:1", "TRYAGAIN"])
async def test_server_that_can_not_now_is_a_lost_link(code: str) -> None:
    broken = False

    def answer(command: list[bytes]) -> bytes:
        return (
            b"-%b now\r\n" % code.encode() if broken and command[0] in (b"PUBLISH", b"subscribe") else obliging(command)
        )

    async with fake_redis(answer) as address, used(f"redis://{address}") as (link, _, _):
        await publish(link, "a", b"1")
        broken = True
        with pytest.raises(ConnectionError, match=code):
            await link.publish([Parcel("a", b"2")])
        with pytest.raises(ConnectionError, match=code):
            await link.subscribe(["a"])


async def test_link_opens_while_another_node_tries_whether_it_may_publish() -> None:
    def answer(command: list[bytes]) -> bytes:
        confirmation = obliging(command)
        if command[0] == b"subscribe":
            confirmation += b"*3\r\n$7\r\nmessage\r\n$%d\r\n%b\r\n$0\r\n\r\n" % (len(command[1]), command[1])
        return confirmation

    async with fake_redis(answer) as address, used(f"redis://{address}") as (link, letters, _):
        assert letters.taken == []
        await link.subscribe(["a"])
        assert await letters.until(b"") == [("a", b"")]


async def test_envelope_that_this_redis_finds_too_large_loses_the_link(own_redis: OwnRedis) -> None:
    server = own_redis(config={"proto-max-bulk-len": "1mb"})
    async with used(server.url) as used_link:
        assert "invalid bulk length" in str(await used_link.link.publish([Parcel("a", bytes(2_000_000))]))
        await used_link.lost()


def test_link_knows_how_large_an_envelope_may_be() -> None:
    assert 16 * 1024**2 < RedisEngine().new_link().max_envelope_bytes < 31 * 1024**2
    assert RedisEngine(max_message_bytes=1024**4).new_link().max_envelope_bytes == 512 * 1024**2


async def test_largest_envelope_arrives_with_the_settings_of_redis(redis_server: Endpoint, prefix: str) -> None:
    async with used(redis_server.url, f"{prefix}:a") as (link, letters, _):
        await publish(link, f"{prefix}:a", bytes(link.max_envelope_bytes), b"end")
        assert len((await letters.until(b"end"))[0][1]) == link.max_envelope_bytes


# Being lost.


async def _kill(server: RedisServer) -> None:
    await server.killed()


async def _kick_subscribers(server: RedisServer) -> None:
    server.command("CLIENT", "KILL", "TYPE", "pubsub")


async def _kick_publishers(server: RedisServer) -> None:
    server.command("CLIENT", "KILL", "TYPE", "normal")


@pytest.mark.parametrize("fault", [_kill, _kick_subscribers, _kick_publishers])
@pytest.mark.parametrize("is_tls", [False, True])
async def test_lost_connection_ends_reading(
    own_redis: OwnRedis, fault: Callable[[RedisServer], Awaitable[None]], is_tls: bool
) -> None:
    server = own_redis(tls=is_tls)
    url = f"{server.url}?ssl_ca_certs={server.ca}" if is_tls else server.url
    async with used(url, "a") as used_link:
        await fault(server)
        assert isinstance(await used_link.lost(), OSError)


async def test_killed_broker_fails_what_is_being_done(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with used(server.url, "a") as used_link:
        server.pause()
        doing: list[asyncio.Task[Any]] = [
            asyncio.create_task(used_link.link.publish([Parcel("a", b"1")])),
            asyncio.create_task(used_link.link.subscribe(["b"])),
        ]
        await asyncio.sleep(0)
        await server.killed()
        await used_link.lost()
        for outcome in await asyncio.gather(*doing, return_exceptions=True):
            assert isinstance(outcome, OSError)
        with pytest.raises(OSError):  # noqa: PT011
            await used_link.link.publish([Parcel("a", b"2")])
        with pytest.raises(OSError):  # noqa: PT011
            await used_link.link.unsubscribe(["a"])


async def test_slow_consumer_that_redis_cuts_off_loses_the_link(own_redis: OwnRedis) -> None:
    server = own_redis(config={"client-output-buffer-limit": "pubsub 1mb 512kb 2"})
    async with used(server.url) as publisher, FaultProxy(server) as proxy, used(proxy.url, "a") as receiver:
        await publish(publisher.link, "a", b"first")
        await receiver.letters.until(b"first")
        proxy.pause()
        for _ in range(40):
            await publish(publisher.link, "a", bytes(1_000_000))
        proxy.resume()
        assert isinstance(await receiver.lost(), OSError)
        assert not publisher.reading.done()


async def test_abort_throws_away_what_was_not_sent(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with used(server.url, "a") as receiver, FaultProxy(server) as proxy, used(proxy.url) as stuck:
        proxy.pause()
        publishing = asyncio.create_task(
            stuck.link.publish([Parcel("a", bytes(1_000_000))] * 40 + [Parcel("a", b"end")])
        )
        await asyncio.sleep(0.1)
        publishing.cancel()
        await stuck.link.abort()
        proxy.resume()
        await eventually(lambda: _equals(lambda: proxy.open, 0))
        await publish(receiver.link, "a", b"later")
        envelopes = [envelope for _, envelope in await receiver.letters.until(b"later")]
        assert b"end" not in envelopes
        assert len(envelopes) < 40


async def test_link_can_be_aborted_before_it_is_open_and_again(redis_server: Endpoint) -> None:
    link = RedisEngine(redis_server.url).new_link()
    await link.abort()
    with pytest.raises(ConnectionError, match="isn't open"):
        await link.publish([Parcel("a", b"1")])
    await link.open()
    await link.abort()
    await link.abort()


@pytest.mark.parametrize("kind", ["tcp", "tls", "unix"])
async def test_link_can_be_cancelled_anywhere(own_redis: OwnRedis, kind: str) -> None:
    server = own_redis(tls=kind == "tls", password="pw")
    urls = {"tcp": server.url, "tls": f"{server.url}?ssl_ca_certs={server.ca}", "unix": server.unix_url}
    engine = RedisEngine(urls[kind])

    async def live(link: Link) -> None:
        await link.open()
        reading = asyncio.create_task(link.read(Letters()), name="wsbroadcast test read")
        try:
            await link.subscribe(["a", "b"])
            await link.publish([Parcel("a", b"1")] * 3)
            await link.unsubscribe(["a"])
        finally:
            reading.cancel()

    turns, is_whole = 0, False
    while not is_whole:
        link = engine.new_link()
        living = asyncio.create_task(live(link))
        for _ in range(turns):
            await asyncio.sleep(0)
        is_whole = living.done()
        living.cancel()
        await asyncio.wait([living])
        assert is_whole or living.cancelled()
        await link.abort()
        turns += 1 if turns < 100 else 10
    gc.collect()  # what warns when it is collected, does so now
    assert turns > 10
    await eventually(lambda: _is_left(server))


@pytest.mark.parametrize("kind", ["tcp", "tls", "unix"])
async def test_opening_can_be_cancelled_while_the_broker_hangs(own_redis: OwnRedis, kind: str) -> None:
    server = own_redis(tls=kind == "tls", password="pw")
    url = {"tcp": server.url, "tls": f"{server.url}?ssl_ca_certs={server.ca}", "unix": server.unix_url}[kind]
    server.pause()
    for _ in range(3):
        link = RedisEngine(url).new_link()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await link.open()
        await link.abort()
    server.resume()
    await eventually(lambda: _is_left(server))


# What can only be told without a server.


def _listener() -> tuple[Subscriber, Letters, list[Exception]]:
    losses: list[Exception] = []
    listener = Subscriber(target_from_url("redis://", {}).access, None, "", losses.append)
    letters = Letters()
    listener.inlet = letters
    return listener, letters, losses


class Mute(asyncio.Transport):
    """What is written goes nowhere."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass


async def test_refusal_of_one_command_is_raised_when_the_others_are_answered_too() -> None:
    listener, letters, losses = _listener()
    listener._transport = Mute()
    subscribing = asyncio.create_task(listener.subscribe([["a", "b"], ["bad"], [], ["c"], ["worse"]]))
    await turns(3)
    for answer in (obliging([b"subscribe", b"a", b"b"]), b"-NOPERM bad\r\n", obliging([b"subscribe", b"c"])):
        listener.data_received(answer)
        await turns(3)
        assert not subscribing.done()
    listener.data_received(b"-NOPERM worse\r\n")
    with pytest.raises(ConfigurationError, match="NOPERM bad"):
        await subscribing
    subscribing = asyncio.create_task(listener.subscribe([["a", "c"]]))
    await turns(3)
    listener.data_received(obliging([b"subscribe", b"a", b"c"]))
    await subscribing
    assert (letters.reasons, losses) == ([], [])


def test_repeated_confirmation_is_a_gap() -> None:
    listener, letters, losses = _listener()
    listener.data_received(b"*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n")
    assert (letters.reasons, losses) == (["the broker confirmed a subscription again"], [])


@pytest.mark.parametrize(
    ("wire", "says"),
    [
        (b"*3\r\n$11\r\nunsubscribe\r\n$1\r\na\r\n:0\r\n", "ended a subscription"),
        (b"-NOAUTH Authentication required.\r\n", "NOAUTH"),
        (b"HTTP/1.1 400\r\n", "expected the protocol of Redis"),
        (b"*3\r\n$7\r\nmessage\r\n$1\r\n\xff\r\n$0\r\n\r\n", "utf-8"),
    ],
)
def test_what_nobody_asked_for_loses_the_link(wire: bytes, says: str) -> None:
    listener, letters, losses = _listener()
    listener.data_received(wire)
    listener.connection_lost(None)
    assert letters.taken == []
    assert len(losses) == 1
    assert says in str(losses[0])


def test_inlet_that_raises_loses_the_link() -> None:
    listener, letters, losses = _listener()
    letters.take = lambda name, envelope, place=None: 1 / 0  # type: ignore[method-assign, assignment]
    listener.data_received(b"*3\r\n$7\r\nmessage\r\n$1\r\na\r\n$1\r\n1\r\n")
    assert [type(loss) for loss in losses] == [ZeroDivisionError]


def test_answer_that_nobody_asked_for_loses_the_link() -> None:
    losses: list[Exception] = []
    asker = Asker(target_from_url("redis://", {}).access, None, "", losses.append)
    asker.data_received(b"+OK\r\n")
    assert "nobody asked for" in str(losses[0])


async def _is_left(server: RedisServer) -> bool:
    """Whether nobody is connected but who asks, and nothing is subscribed."""
    clients = server.command("CLIENT", "LIST").splitlines()
    return len(clients) == 1 and server.command("PUBSUB", "CHANNELS") == []


async def _equals(ask: Callable[[], object], expected: object) -> bool:
    return ask() == expected


def _shows_no_secret(error: BaseException, *secrets: str) -> None:
    text = "".join(traceback.format_exception(error))
    chain: list[BaseException | None] = [error, error.__cause__, error.__context__]
    for secret in secrets:
        assert not any(secret in repr(getattr(each, "args", ())) for each in chain)
        assert secret not in "".join(line for line in text.splitlines() if "Error" in line)
