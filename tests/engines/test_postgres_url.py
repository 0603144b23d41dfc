from __future__ import annotations

import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from wsbroadcast.engines.postgres import PostgresEngine
from wsbroadcast.engines.postgres.url import Target, read_url
from wsbroadcast.exceptions import ConfigurationError, MissingDependency

SECRET = "s3cr3t"


def read(url: str, **more: Any) -> Target:
    return read_url(url, more)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGHOST", raising=False)
    monkeypatch.delenv("PGPORT", raising=False)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg", "postgresql+psycopg"])
def test_url_has_the_schemes_of_libpq_and_sqlalchemy(scheme: str) -> None:
    target = read(f"{scheme}://ann:p%40ss@db.local:6000/app")
    assert target.hosts == [("db.local", 6000)]
    assert target.options["user"] == "ann"
    assert target.options["password"] == "p@ss"
    assert target.options["database"] == "app"
    assert target.address == "db.local:6000/app"


@pytest.mark.parametrize(
    ("url", "hosts", "address"),
    [
        ("postgres://localhost", [("localhost", 5432)], "localhost:5432"),
        ("postgres://[::1]:6000/app", [("::1", 6000)], "[::1]:6000/app"),
        ("postgres://a:1,b/app", [("a", 1), ("b", 5432)], "a:1,b:5432/app"),
        ("postgres:///app?host=a,b&port=1,2", [("a", 1), ("b", 2)], "a:1,b:2/app"),
        ("postgres:///app?host=a,b&port=7", [("a", 7), ("b", 7)], "a:7,b:7/app"),
        ("postgres:///?host=/run/Pg&dbname=app", [("/run/Pg", 5432)], "/run/Pg:5432/app"),
        ("postgres://%2Frun%2FPg:6000/app", [("/run/Pg", 6000)], "/run/Pg:6000/app"),
        ("postgres://:6000/app", [("localhost", 6000)], "localhost:6000/app"),
        ("postgres:///app", [], "localhost/app"),
        ("postgres://ann@/app", [], "localhost/app"),
    ],
)
def test_url_names_hosts_and_sockets(url: str, hosts: list[tuple[str, int]], address: str) -> None:
    target = read(url)
    assert target.hosts == hosts
    assert target.address == address


def test_url_leaves_the_rest_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "db.local")
    monkeypatch.setenv("PGPORT", "7000")
    assert read("postgres://").address == "db.local"
    assert set(read("postgres://").options) == {"server_settings"}
    assert read("postgres:///?port=6000").options["port"] == 6000
    assert read("postgres://other").hosts == [("other", 7000)]


def test_url_options_go_to_the_driver() -> None:
    target = read("postgresql+asyncpg://a/app?ssl=require&application_name=shop&connect_timeout=3")
    assert target.options["dsn"] == "postgresql:///?sslmode=require"
    assert target.options["server_settings"] == {"application_name": "shop"}
    assert read("postgres://a").options["server_settings"] == {"application_name": "wsbroadcast"}


def test_url_of_several_hosts_means_the_primary() -> None:
    assert read("postgres://a,b").options["dsn"] == "postgresql:///?target_session_attrs=primary"
    assert read("postgres://a,b?target_session_attrs=any").options["dsn"].endswith("=any")


def test_options_of_asyncpg_are_passed_on() -> None:
    options = read("postgres://a", password="x", server_settings={"jit": "off"}).options
    assert options["password"] == "x"
    assert options["server_settings"] == {"application_name": "wsbroadcast", "jit": "off"}
    with pytest.raises(ConfigurationError, match="no option 'passwort'"):
        read("postgres://a", passwort="x")
    with pytest.raises(ConfigurationError, match="no option 'loop'"):
        read("postgres://a", loop=None)


@pytest.mark.parametrize("option", ["fail_fast=true", "prefix=shop", "schema=events"])
def test_option_of_a_manager_s_url_is_an_argument_of_an_engine(option: str) -> None:
    name = option.partition("=")[0]
    with pytest.raises(ConfigurationError, match=f"{name} is an argument of PostgresEngine"):
        PostgresEngine(f"postgresql://localhost?{option}")
    PostgresEngine.from_url(f"postgresql://localhost?{option}")


@pytest.mark.parametrize(
    "url",
    [
        f"mysql://ann:{SECRET}@host/app",
        f"postgres://ann:{SECRET}/more@host/app",
        f"postgres://ann:12/{SECRET}@host/app",
        f"postgres://ann:{SECRET}#more@host/app",
        f"postgres://ann:{SECRET}@host:port/app",
        f"postgres://ann:{SECRET}@host:0/app",
        f"postgres://ann:{SECRET}@host:99999/app",
        f"postgres://ann:{SECRET}@ho[st/app",
        f"postgres://ann:{SECRET}@a:b:c/app",
        f"postgres://ann:{SECRET}@host/app?host=a&port=x{SECRET}",
        f"postgres://ann:a?{SECRET}@host/app",
        f"postgres://ann:a?prefix={SECRET}@host/app",
        f"postgres://ann:{SECRET}@host/app?prefx=shop",
        f"postgres://ann:{SECRET}@host/app?prefix=a b",
        f"postgres://ann:{SECRET}@host/app?schema=",
        f"postgres://ann:{SECRET}@host/app?schema=a%22b",
        f"postgres://ann:{SECRET}@host/app?fail_fast=maybe",
    ],
)
def test_bad_url_is_refused_without_a_part_of_it(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        PostgresEngine.from_url(url)
    assert SECRET not in "".join(traceback.format_exception_only(caught.value))
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@pytest.mark.parametrize(
    ("url", "what"),
    [
        (None, "NoneType"),
        (7, "int"),
        (b"postgres://host", "bytes"),
        (asyncpg.Pool.__new__(asyncpg.Pool), r"asyncpg\.pool\.Pool"),
        (create_async_engine("postgresql+asyncpg://host"), r"sqlalchemy\..*AsyncEngine"),
    ],
    ids=["nothing", "number", "bytes", "pool", "SQLAlchemy"],
)
def test_url_that_is_no_text_is_refused(url: Any, what: str) -> None:
    with pytest.raises(ConfigurationError, match=f"a str, not {what}: the engine makes connections of its own"):
        PostgresEngine(url)


def test_server_settings_are_a_dict() -> None:
    with pytest.raises(ConfigurationError, match="server_settings is a dict, not int"):
        PostgresEngine(server_settings=5)


def test_engine_without_its_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = "wsbroadcast.engines.postgres.protocol"
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    monkeypatch.delitem(sys.modules, driver)
    with pytest.raises(MissingDependency, match=r'pip install "wsbroadcast\[postgres\]"'):
        import_module(driver)


def test_engine_takes_its_own_options_from_the_url() -> None:
    socket = PostgresEngine.from_url("postgres:///app?prefix=shop&host=/run/pg")
    assert socket.address == "/run/pg:5432/app"
    engine = PostgresEngine.from_url(f"postgres://ann:{SECRET}@host/app?prefix=shop&fail_fast=true&sslmode=disable")
    assert repr(engine) == "<PostgresEngine host:5432/app>"
    assert engine.names.of_node("n") == "shop:node:n"
    assert SECRET not in repr(engine._target)


async def test_file_that_is_not_there_is_named() -> None:
    missing = str(Path(__file__).with_suffix(".pem"))
    target = read(f"postgres://127.0.0.1:1?sslmode=verify-full&sslrootcert={missing}")
    with pytest.raises(ConfigurationError, match=r"sslrootcert of Postgres names a file that isn't there"):
        await target.connect(0)


async def test_each_attempt_begins_with_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    async def connect(host: Any = None, port: Any = None, **_: Any) -> None:
        tried.append((host, port))

    target = read("postgres://a:1,b:2")
    monkeypatch.setattr("wsbroadcast.engines.postgres.url.connect", connect)
    for turn in range(3):
        await target.connect(turn)
    await read("postgres:///app").connect(0)
    assert tried == [(["a", "b"], [1, 2]), (["b", "a"], [2, 1]), (["a", "b"], [1, 2]), (None, None)]
