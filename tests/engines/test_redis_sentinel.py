"""The link to the Redis that sentinels name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme
from redis.asyncio.sentinel import Sentinel

from tests.engines.links import open_once, used
from tests.engines.redis_links import Answer, fake_redis, obliging
from tests.support.brokers import RedisServer, free_port
from tests.support.brokers.redis_groups import RedisSentinel
from tests.support.servers import eventually
from wsbroadcast import ConfigurationError
from wsbroadcast.engines.broker.link import Parcel
from wsbroadcast.engines.redis import RedisEngine
from wsbroadcast.options import Timing


def url_of(group: RedisSentinel) -> str:
    return f"redis+sentinel://{group.sentinel.host}:{group.sentinel.port}/{group.service}"


def tls_url_of(group: RedisSentinel, ca: Path | None) -> str:
    return f"{url_of(group).replace('redis', 'rediss', 1)}?ssl_ca_certs={ca}"


async def test_link_goes_to_the_primary(own_sentinel: RedisSentinel) -> None:
    async with used(url_of(own_sentinel), "a") as (link, letters, _):
        assert await link.publish([Parcel("a", b"hello")]) == [None]
        await letters.until(b"hello")
        assert "a" in own_sentinel.primary.command("PUBSUB", "CHANNELS")


async def test_client_of_a_sentinel_is_taken(own_sentinel: RedisSentinel) -> None:
    make: Any = Sentinel  # has no types
    client = make([(own_sentinel.sentinel.host, own_sentinel.sentinel.port)]).master_for(own_sentinel.service)
    async with used(RedisEngine(client=client), "a") as (link, letters, _):
        await link.publish([Parcel("a", b"hello")])
        await letters.until(b"hello")
    await client.aclose()


async def test_link_goes_over_tls(tls_sentinel: RedisSentinel, tmp_path: Path) -> None:
    tls: dict[str, Any] = {"ssl": True, "ssl_ca_certs": str(tls_sentinel.sentinel.ca)}
    make: Any = Sentinel
    sentinels = [(tls_sentinel.sentinel.host, tls_sentinel.sentinel.port)]
    client = make(sentinels, sentinel_kwargs=tls, **tls).master_for(tls_sentinel.service)
    for engine in (RedisEngine(tls_url_of(tls_sentinel, tls_sentinel.sentinel.ca)), RedisEngine(client=client)):
        async with used(engine, "a") as (link, letters, _):
            await link.publish([Parcel("a", b"hello")])
            await letters.until(b"hello")
            assert "a" in tls_sentinel.primary.command("PUBSUB", "CHANNELS")
    await client.aclose()
    stranger = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(stranger)
    with pytest.raises(ConfigurationError, match="has a certificate that isn't trusted"):
        await open_once(tls_url_of(tls_sentinel, stranger))


async def test_next_link_goes_to_the_promoted_replica(tls_sentinel: RedisSentinel) -> None:
    # Over TLS; `test_nodes_follow_the_sentinels` does it without.
    url = tls_url_of(tls_sentinel, tls_sentinel.sentinel.ca)

    async def is_promoted() -> bool:
        # As the supervisor does: open until it goes.
        try:
            async with used(url, "a") as (link, letters, _):
                await link.publish([Parcel("a", b"hello")])
                await letters.until(b"hello")
                channels: list[str] = tls_sentinel.replica.command("PUBSUB", "CHANNELS")
                return "a" in channels
        except (OSError, redis.RedisError):
            return False

    async with used(url, "a") as before:
        await tls_sentinel.primary.killed()
        assert isinstance(await before.lost(), OSError)
        await eventually(is_promoted, timeout=20)


async def test_unknown_service_is_a_configuration_error(own_sentinel: RedisSentinel) -> None:
    with pytest.raises(ConfigurationError, match="know no service of this name"):
        await open_once(url_of(own_sentinel) + "s")


async def test_redis_that_is_no_sentinel_is_a_configuration_error(redis_server: RedisServer) -> None:
    with pytest.raises(ConfigurationError, match="is it a sentinel"):
        await open_once(f"redis+sentinel://{redis_server.host}:{redis_server.port}/main")


async def test_sentinel_may_want_a_login(own_redis: Callable[..., RedisServer], own_sentinel: RedisSentinel) -> None:
    users = ["asker on >secret +sentinel|get-master-addr-by-name", "mute on >secret +ping"]
    primary = own_sentinel.primary
    settings = {"sentinel monitor main": f"{primary.host} {primary.port} 1"}
    sentinel = own_redis(users=[*users, "default on nopass ~* &* +@all"], config=settings, arguments=["--sentinel"])
    url = f"redis+sentinel://{sentinel.host}:{sentinel.port}/main?sentinel_password=secret&sentinel_username="
    async with used(f"{url}asker", "a") as (link, _, _):
        await link.publish([Parcel("a", b"hello")])
    with pytest.raises(ConfigurationError, match=r"'mute' .* needs \+sentinel\|get-master-addr-by-name"):
        await open_once(f"{url}mute")
    with pytest.raises(ConfigurationError, match=r"'nobody' .*invalid username-password"):
        await open_once(f"{url}nobody")


async def test_documented_permissions_are_enough(own_sentinel: RedisSentinel) -> None:
    rules = ["on", ">secret", "resetchannels", "&t:*", "+publish", "+subscribe", "+unsubscribe"]
    own_sentinel.primary.command("ACL", "SETUSER", "app", *rules)
    url = url_of(own_sentinel).replace("://", "://app:secret@") + "?prefix=t"
    with pytest.raises(ConfigurationError, match=r"'app' .* needs &t:\* \+publish \+subscribe \+unsubscribe \+role"):
        await open_once(url)
    own_sentinel.primary.command("ACL", "SETUSER", "app", "+role")
    async with used(RedisEngine.from_url(url), "t:a") as (link, letters, _):
        await link.publish([Parcel("t:a", b"hello")])
        await letters.until(b"hello")


# Sentinels that don't agree.


def _names(address: str) -> Answer:
    """A sentinel that names this address."""
    name, port = address.rsplit(":", 1)

    def answer(command: list[bytes]) -> bytes:
        if command[0] == b"SENTINEL":
            return b"*2\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(name), name.encode(), len(port), port.encode())
        return obliging(command)

    return answer


def _has_role(role: bytes) -> Answer:
    return lambda command: b"*1\r\n$%d\r\n%b\r\n" % (len(role), role) if command == [b"ROLE"] else obliging(command)


def _silent(command: list[bytes]) -> bytes:
    return b""


@asynccontextmanager
async def sentinels(*answers: Answer) -> AsyncIterator[str]:
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(fake_redis(answer)) for answer in answers]
        yield f"redis+sentinel://{','.join(addresses)}/main"


async def test_majority_of_the_sentinels_is_believed() -> None:
    async with (
        fake_redis(_has_role(b"master")) as master,
        fake_redis(_has_role(b"slave")) as old,
        sentinels(_names(old), _names(master), _names(master)) as url,
        used(url, "a") as (link, _, _),
    ):
        assert await link.publish([Parcel("a", b"hello")]) == [None]


async def test_sentinels_that_are_away_or_hang_are_left_out() -> None:
    async with (
        fake_redis(_has_role(b"master")) as master,
        sentinels(_silent, _names(master), _silent) as url,
        used(url.replace("/main", f",127.0.0.1:{free_port()}/main"), "a") as (link, _, _),
    ):
        assert await link.publish([Parcel("a", b"hello")]) == [None]


async def test_primary_that_has_become_a_replica_is_left_alone() -> None:
    async with fake_redis(_has_role(b"slave")) as old, sentinels(_names(old)) as url:
        with pytest.raises(ConnectionError, match="is not the master"):
            await open_once(url)


async def test_no_sentinel_at_all_can_not_be_reached() -> None:
    with pytest.raises(redis.ConnectionError):
        await open_once(f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{free_port()}/main")
    async with sentinels(_silent) as url:
        for timing, seconds in [(Timing(), "0.5"), (Timing(connect_timeout=0.3), "0.1")]:
            with pytest.raises(TimeoutError, match=f"doesn't answer within {seconds} s"):
                await open_once(RedisEngine(url, timing=timing))


async def test_asking_sentinels_can_be_cancelled() -> None:
    async with sentinels(_silent, _silent) as url:
        link = RedisEngine(url).new_link()
        opening = asyncio.create_task(link.open())
        await asyncio.sleep(0.02)
        opening.cancel()
        await asyncio.wait([opening])
        await link.abort()
