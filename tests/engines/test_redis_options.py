"""URLs, options and clients: where Redis is and how to get in. Nothing connects here."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import redis.asyncio
from redis.asyncio.sentinel import Sentinel

from wsbroadcast import ConfigurationError, ConnectionManager
from wsbroadcast.engines.broker.link import Host
from wsbroadcast.engines.redis import RedisEngine
from wsbroadcast.engines.redis.options import SCHEMES, target_from_client, target_from_url
from wsbroadcast.engines.redis.target import Access

PASSWORD = "Sup3r$ecret"


def attributes(access: Access | None, *names: str) -> list[Any]:
    """What redis-py understood."""
    assert access is not None
    connection = access.connection(None)
    return [getattr(connection, name) for name in names]


@pytest.mark.parametrize(
    ("url", "kind", "hosts"),
    [
        ("redis://", "server", "localhost:6379"),
        ("redis://cache", "server", "cache:6379"),
        ("rediss://cache:7000/3", "server", "cache:7000"),
        ("redis://[::1]:7000", "server", "[::1]:7000"),
        ("unix:///run/redis.sock", "server", "/run/redis.sock"),
        ("redis+unix://app:pw@/run/redis.sock?db=1", "server", "/run/redis.sock"),
        ("unix://app:p%2Fw@/run/redis%40main.sock", "server", "/run/redis@main.sock"),
        ("redis+sentinel://a,b:7000,[::1]/main", "sentinel", "a:26379,b:7000,[::1]:26379/main"),
        ("rediss+sentinel://a/main", "sentinel", "a:26379/main"),
        ("redis+cluster://a,b:7000", "cluster", "a:6379,b:7000"),
        ("rediss+cluster://app:pw@a/", "cluster", "a:6379"),
    ],
)
def test_url_says_where(url: str, kind: str, hosts: str) -> None:
    target = target_from_url(url, {})
    assert (target.kind, target.address) == (kind, hosts)


def test_schemes_are_all_that_urls_begin_with() -> None:
    assert sorted(SCHEMES) == list(SCHEMES)
    with pytest.raises(ConfigurationError, match=r"begins with one of redis://, redis\+cluster://"):
        target_from_url("http://localhost", {})


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+cluster", "rediss+cluster"])
def test_url_says_who(scheme: str) -> None:
    target = target_from_url(f"{scheme}://app:p%40%2Fw%23@cache?client_name=node", {})
    assert attributes(target.access, "username", "password", "client_name") == ["app", "p@/w#", "node"]
    assert target.access.user == "app"


def test_password_needs_no_user() -> None:
    target = target_from_url("redis://:pw@cache/2", {})
    assert attributes(target.access, "username", "password", "db") == [None, "pw", 2]
    assert target.access.user == "default"


def test_sentinels_have_a_login_of_their_own_and_share_tls() -> None:
    url = "rediss+sentinel://app:pw@a/main?sentinel_username=s&sentinel_password=spw&ssl_check_hostname=false"
    target = target_from_url(url, {})
    assert attributes(target.access, "username", "password", "db") == ["app", "pw", 0]
    assert attributes(target.sentinel_access, "username", "password") == ["s", "spw"]
    for access in (target.access, target.sentinel_access):
        (tls,) = attributes(access, "ssl_context")
        assert tls.get().check_hostname is False
    given = target_from_url("redis+sentinel://app:pw@a/main", {"sentinel_password": "spw"})
    assert attributes(given.sentinel_access, "username", "password") == [None, "spw"]


def test_connections_of_the_driver_neither_retry_nor_wait_nor_decode() -> None:
    url = "redis://cache?socket_timeout=1&retry_on_timeout=true&health_check_interval=3&protocol=3&max_connections=7"
    access = target_from_url(f"{url}&decode_responses=true&socket_connect_timeout=9&timeout=2", {}).access
    names = ("socket_timeout", "socket_connect_timeout", "health_check_interval", "protocol", "retry_on_error")
    assert attributes(access, *names) == [None, None, 0, 2, []]
    (retry, encoder) = attributes(access, "retry", "encoder")
    assert (retry._retries, encoder.decode_responses) == (0, False)


def test_options_of_the_driver_can_be_given_beside_the_url() -> None:
    class Provider(redis.CredentialProvider):
        def get_credentials(self) -> tuple[str, str]:
            return "app", "pw"

    provider = Provider()
    access = target_from_url("redis://cache", {"credential_provider": provider, "socket_keepalive": False}).access
    assert attributes(access, "credential_provider", "socket_keepalive") == [provider, False]


def test_query_has_options_of_the_engine() -> None:
    engine = RedisEngine.from_url("redis://cache:7000/2?prefix=shop&client_name=a%20b&fail_fast=TRUE")
    assert engine.address == "cache:7000"
    assert engine.names.of_node("x") == "shop:node:x"
    assert engine._fail_fast is True
    assert attributes(engine._target.access, "db", "client_name") == [2, "a b"]


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("redis://cache?fail_fast=maybe", "true or false"),
        ("redis://cache?prefix=a.b", "prefix must be"),
        ("redis://cache?colour=red", "no option 'colour': it takes prefix, fail_fast and those of redis-py's Redis"),
        ("redis://cache?socket_timeout=soon", "Invalid value for 'socket_timeout'"),
        ("redis://cache/main", "number of a database"),
        ("redis+cluster://cache/main", "number of a database"),
        ("redis://cache:port", "name:port"),
        ("redis://cache:99999", "name:port"),
        ("redis+sentinel://cache", "name of a service"),
        ("redis://cache?sentinel_password=x", "no option 'sentinel_password'"),
        ("redis://dead:1,alive:2", "redis:// has one host: with several hosts use"),
        ("rediss://dead,", "rediss:// has one host"),
        ("unix://", "unix:///path"),
        ("unix://localhost/run/redis.sock", "it has no host"),
        ("unix:///run/redis@main.sock", "an @ after its first /: it is written %40"),
        ("rediss://cache?ssl_cert_reqs=perhaps", "redis-py refuses"),
        ("rediss://cache?ssl_colour=red", "redis-py refuses"),
        ("redis://cache?ssl_cert_reqs=none", "redis-py refuses"),
    ],
)
def test_bad_url_is_explained_in_a_line(url: str, error: str) -> None:
    with pytest.raises(ConfigurationError, match=error) as raised:
        RedisEngine.from_url(url)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("character", [*"#/?@:[%&= ,", "12/", "?fail_fast=", "?prefix=", "#?prefix=", "@/", "@b/"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bad_url_never_repeats_a_password(scheme: str, character: str) -> None:
    # A password that wasn't quoted may end up in any part of a URL.
    for url in (
        f"{scheme}://app:{PASSWORD}{character}{PASSWORD}@cache:6379/0?colour=red",
        f"{scheme}://app:{PASSWORD}{character}@cache:6379/0?colour=red",
        f"{scheme}://:{character}{PASSWORD}@cache:port/x?colour=red",
        f"{scheme}://app:{PASSWORD}@cache:port/main?fail_fast=x",
        f"{scheme}://:{character}{PASSWORD}@/run/redis.sock?colour=red",
    ):
        with pytest.raises(ConfigurationError) as raised:
            RedisEngine.from_url(url)
        error: BaseException | None = raised.value
        assert "Sup3r" not in str(error)
        assert error is not None
        assert error.__cause__ is None
        assert error.__suppress_context__ or error.__context__ is None


@pytest.mark.parametrize("begin", ["/", "12/", "?", "?fail_fast=", "?prefix=", "#", "#?prefix=", "@/", "@b/", "1,2/"])
@pytest.mark.parametrize("place", ["cache:6379", "cache:6379/0", "cache/main", "/run/redis.sock"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_url_whose_password_ends_too_early_is_refused(scheme: str, place: str, begin: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        RedisEngine.from_url(f"{scheme}://app:{begin}{PASSWORD}@{place}")
    assert "Sup3r" not in str(raised.value)


def test_engine_shows_no_password() -> None:
    engine = RedisEngine(f"redis://app:{PASSWORD}@cache:7000/1")
    assert repr(engine) == "<RedisEngine cache:7000>"
    assert PASSWORD not in repr(vars(engine))


@pytest.mark.parametrize("url", [7, None, b"redis://cache", "", "redis:cache"])
def test_url_must_be_one(url: Any) -> None:
    with pytest.raises(ConfigurationError):
        target_from_url(url, {})


def test_client_says_where_and_who() -> None:
    client = redis.asyncio.Redis(host="cache", port=7000, username="app", password="pw", db=2, decode_responses=True)
    target = target_from_client(client)
    assert (target.kind, target.hosts) == ("server", (Host("cache", 7000),))
    names = ("username", "password", "db", "protocol", "socket_timeout")
    assert attributes(target.access, *names) == ["app", "pw", 2, 2, None]
    assert attributes(target.access, "encoder")[0].decode_responses is False


def test_client_from_a_url_or_a_pool_is_understood() -> None:
    tls = redis.asyncio.Redis.from_url("rediss://:pw@cache:7000?ssl_cert_reqs=none&ssl_check_hostname=false")
    target = target_from_client(tls)
    assert attributes(target.access, "password")[0] == "pw"
    assert attributes(target.access, "ssl_context")[0].check_hostname is False
    unix = redis.asyncio.Redis(unix_socket_path="/run/redis.sock")
    assert (target_from_client(unix).address, target_from_client(unix).hosts) == ("/run/redis.sock", ())
    pool = redis.asyncio.ConnectionPool(host="cache", max_connections=3)
    assert target_from_client(redis.asyncio.Redis(connection_pool=pool)).address == "cache:6379"


@pytest.mark.parametrize("is_tls", [False, True])
def test_client_of_sentinels_is_understood(is_tls: bool) -> None:
    make: Any = Sentinel  # has no types
    sentinel = make([("a", 26379), ("b", 7000)], sentinel_kwargs={"password": "spw"}, password="pw", ssl=is_tls)
    target = target_from_client(sentinel.master_for("main"))
    assert (target.kind, target.address, target.service) == ("sentinel", "a:26379,b:7000/main", "main")
    assert attributes(target.access, "password") == ["pw"]
    assert attributes(target.sentinel_access, "password") == ["spw"]
    assert hasattr(target.access.connection(None), "ssl_context") is is_tls


def test_client_of_a_cluster_is_understood() -> None:
    client = redis.asyncio.RedisCluster(host="a", port=7000, password="pw", ssl=True, ssl_check_hostname=False)
    target = target_from_client(client)
    assert (target.kind, target.address) == ("cluster", "a:7000")
    assert attributes(target.access, "password") == ["pw"]
    assert attributes(target.access, "ssl_context")[0].check_hostname is False


@pytest.mark.parametrize(
    ("client", "what"),
    [
        (object(), "not object"),
        (redis.Redis(), r"not redis\.client\.Redis, which blocks the event loop"),
        (redis.asyncio.Redis, r"not the class redis\.asyncio\.client\.Redis"),
        (redis.asyncio.ConnectionPool(), r"ConnectionPool: take redis\.asyncio\.Redis\(connection_pool=…\)"),
        (cast(Any, Sentinel)([("a", 1)]), "Sentinel: take what its `master_for` returns"),
        ("redis://localhost", "not str: a URL is the first argument"),
        (MagicMock(), "MagicMock"),
    ],
    ids=["object", "sync", "class", "pool", "sentinel", "URL", "mock"],
)
def test_client_must_be_one_of_asyncio(client: object, what: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"must be a redis\.asyncio\.Redis or RedisCluster.*{what}"):
        RedisEngine(client=client)


def test_client_is_no_url() -> None:
    with pytest.raises(ConfigurationError, match=r"not redis\.asyncio\.client\.Redis; give a client as client=…"):
        RedisEngine(redis.asyncio.Redis())  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"not redis\.asyncio\.client\.Redis.*RedisEngine\(client=…\)"):
        ConnectionManager(redis.asyncio.Redis())  # type: ignore[arg-type]


class Unreal(redis.asyncio.Connection):
    """A connection as fakeredis makes it: to nothing but an object of this process."""

    async def _connect(self) -> None:
        """Connect to nothing."""

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """Read what nobody has sent."""


NO_CONNECTION = "not a connection to a server, which RedisEngine needs; in tests use memory://"


@pytest.mark.parametrize(
    "client",
    [
        redis.asyncio.Redis(connection_pool=redis.asyncio.ConnectionPool(connection_class=Unreal)),
        redis.asyncio.Redis(connection_pool=redis.asyncio.ConnectionPool(connection_class=cast(Any, dict))),
        MagicMock(spec=redis.asyncio.Redis()),
        MagicMock(spec=redis.asyncio.RedisCluster),
    ],
    ids=["fake", "something else", "mock", "mock of a cluster"],
)
def test_client_that_connects_to_no_server_is_refused(client: object) -> None:
    with pytest.raises(ConfigurationError, match=NO_CONNECTION):
        RedisEngine(client=client)


@pytest.mark.parametrize(
    "client",
    [MagicMock(spec=redis.asyncio.Redis), cast(Any, Sentinel)([]).master_for("main")],
    ids=["mock", "no sentinel"],
)
def test_client_that_does_not_say_where_is_refused(client: object) -> None:
    with pytest.raises(ConfigurationError, match="doesn't show where it connects to"):
        RedisEngine(client=client)


def test_connection_of_the_users_own_is_taken() -> None:
    class Tunnelled(redis.asyncio.Connection):
        async def _connect(self) -> None:
            """Connect by a way of one's own, with streams of asyncio."""

    class Counted(redis.asyncio.Connection):
        async def read_response(self, *args: Any, **options: Any) -> Any:
            """Read, and count."""

    for kind in (Tunnelled, Counted):
        pool = redis.asyncio.ConnectionPool(connection_class=kind, host="cache")
        assert RedisEngine(client=redis.asyncio.Redis(connection_pool=pool)).address == "cache:6379"


def test_engine_takes_a_client_or_a_url() -> None:
    client = redis.asyncio.Redis()
    assert RedisEngine(client=client).address == "localhost:6379"
    both: list[tuple[str | None, dict[str, Any]]] = [("redis://cache", {}), (None, {"username": "app"})]
    for url, options in both:
        with pytest.raises(ConfigurationError, match="a client, or a URL"):
            RedisEngine(url, client=client, **options)


def test_permissions_are_those_that_the_options_need() -> None:
    assert target_from_url("redis://a", {}).permissions("x") == "&x:* +publish +subscribe +unsubscribe"
    options = {"db": 2, "client_name": "n"}
    assert target_from_url("redis://a", options).permissions("x").endswith(" +select +client|setname")
    assert target_from_url("redis+sentinel://a/main", {}).permissions("x").endswith(" +role")
    assert "+spublish +ssubscribe +sunsubscribe" in target_from_url("redis+cluster://a", {}).permissions("x")


def test_missing_driver_is_said_with_the_command_that_installs_it() -> None:
    code = """
import sys
sys.modules["redis"] = None
from wsbroadcast import MissingDependency
from wsbroadcast.engines import create_engine
try:
    create_engine("redis://localhost")
except MissingDependency as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout == 'the Redis engine needs redis-py: pip install "wsbroadcast[redis]"\n'
