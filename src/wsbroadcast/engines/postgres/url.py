"""Makes the arguments of `asyncpg.connect` from a URL."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode

from wsbroadcast.engines import URL, split_hosts, url_text
from wsbroadcast.engines.postgres.protocol import ARGUMENTS, Connection, connect
from wsbroadcast.exceptions import ConfigurationError, kind_of

SCHEMES = ("postgres", "postgresql", "postgresql+asyncpg", "postgresql+psycopg")
"""The schemes of libpq and of SQLAlchemy, so that the app's database can have the same URL."""

_FILES = {"sslcert", "sslcrl", "sslkey", "sslrootcert"}

# The options that asyncpg reads from a URL itself, and two settings of the server that are of use here.
_USED = _FILES | {
    "application_name",
    "gsslib",
    "krbsrvname",
    "options",
    "passfile",
    "service",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
    "sslmode",
    "sslnegotiation",
    "sslpassword",
    "target_session_attrs",
}

# The options of libpq, asyncpg, psycopg, SQLAlchemy and Prisma that have no effect here, but that the app's own
# connections may need. The engine itself decides how long to wait and what to prepare.
_UNUSED = {
    "async_fallback",
    "channel_binding",
    "client_encoding",
    "command_timeout",
    "connect_timeout",
    "connection_limit",
    "gssencmode",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "pgbouncer",
    "pool_timeout",
    "prepare_threshold",
    "prepared_statement_cache_size",
    "prepared_statement_name_func",
    "statement_cache_size",
    "tcp_user_timeout",
}

# What is in the URL of a manager; from_url has taken it out.
_OURS = {"fail_fast", "prefix", "schema"}

_PLACE = re.compile(r"(?:\[(?P<v6>[^][]+)\]|(?P<name>[^][:]*))(?::(?P<port>[0-9]{1,5}))?")

_PORT = 5432


@dataclass(frozen=True)
class Target:
    """Where Postgres is, and how to log in."""

    address: str
    """Hosts, ports and the database, for logs and errors: without user and password."""
    hosts: Sequence[tuple[str, int]]
    """Names or unix sockets, with ports. If it is empty, asyncpg looks in the usual places."""
    options: Mapping[str, Any] = field(repr=False)
    """The other arguments of `asyncpg.connect`."""
    files: Mapping[str, str]
    """The files that the options name, by option."""

    async def connect(self, turn: int) -> Connection:
        """Make a connection.

        Args:
            turn: The number of the attempt. Each attempt begins with another host, because a host that doesn't answer
                takes all the time that there is.

        Raises:
            ConfigurationError: If a file isn't there. asyncpg wouldn't say which.
            Exception: If asyncpg gets no connection. It is asyncpg's error.
        """
        self._check_files()
        if not self.hosts:
            return await connect(**self.options)
        first = turn % len(self.hosts)
        hosts = [*self.hosts[first:], *self.hosts[:first]]
        names, ports = [name for name, _ in hosts], [port for _, port in hosts]
        return await connect(host=names, port=ports, **self.options)

    def _check_files(self) -> None:
        for option, path in self.files.items():
            if not os.path.isfile(path):
                raise ConfigurationError(
                    f"the option {option} of Postgres names a file that isn't there: {path!r:.200}"
                )


def split_url(url: URL, ours: set[str]) -> tuple[str, dict[str, str]]:
    """Take the engine's own options out of the URL's query.

    Raises:
        ConfigurationError: If the URL can't be parsed.
    """
    parts = _parsed(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    rest = urlencode([(name, value) for name, value in query if name not in ours])
    return parts._replace(query=rest).geturl(), {name: value for name, value in query if name in ours}


def read_url(url: URL, more: Mapping[str, Any]) -> Target:
    """Read a URL of libpq or SQLAlchemy.

    What the URL doesn't say is taken from where libpq takes it: `PGHOST`, `PGUSER`, `~/.pgpass` and so on.

    Args:
        url: The URL.
        more: Further arguments of `asyncpg.connect`, such as an `ssl.SSLContext` or a function that returns a password.

    Raises:
        ConfigurationError: If the URL makes no sense. The error repeats no part of it except the name of an option,
            because an unquoted password may be in any part.
    """
    parts = _parsed(url)
    query = _query(parts.query)
    login, _, places = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    port = query.pop("port", "")
    hosts = _hosts(unquote(places) or query.pop("host", ""), port)
    options: dict[str, Any] = {
        "user": unquote(user) or query.pop("user", ""),
        "password": unquote(password) or query.pop("password", ""),
        "database": unquote(parts.path.removeprefix("/")) or query.pop("dbname", "") or query.pop("database", ""),
        "port": _port(port) if port and not hosts else None,
    }
    return _target(hosts, {name: value for name, value in options.items() if value}, query, more)


def _parsed(url: URL) -> SplitResult:
    text = url_text(url)
    if text is None:
        raise ConfigurationError(
            f"the URL of Postgres is a str, not {kind_of(url)}: the engine makes connections of its own"
        )
    try:
        parts = split_hosts(text)
    except ValueError:
        raise ConfigurationError("the URL of Postgres can't be parsed") from None
    if parts.scheme not in SCHEMES:
        raise ConfigurationError(f"a URL of Postgres begins with {', '.join(f'{each}://' for each in SCHEMES)}")
    if (
        parts.fragment or "@" in parts.path or "@" in parts.query
    ):  # else one of these parts might be a piece of a password
        raise ConfigurationError("the URL of Postgres has a #, /, ? or @ that must be written %23, %2F, %3F or %40")
    return parts


def _query(text: str) -> dict[str, str]:
    query = dict(parse_qsl(text, keep_blank_values=True))
    if "ssl" in query:  # SQLAlchemy's name for it
        query["sslmode"] = query.pop("ssl")
    known = _USED | _UNUSED | {"database", "dbname", "host", "password", "port", "user"}
    for name in query:
        if name in _OURS:
            raise ConfigurationError(f"{name} is an argument of PostgresEngine, and not in its URL")
        if name not in known:
            raise ConfigurationError(f"the Postgres engine has no option {name!r:.40}")
    return {name: value for name, value in query.items() if name not in _UNUSED}


def _hosts(places: str, ports: str) -> list[tuple[str, int]]:
    if not places:
        return []
    hosts = []
    given = ports.split(",")
    for number, place in enumerate(places.split(",")):
        match = _PLACE.fullmatch(place)
        if match is None:
            raise ConfigurationError("the URL of Postgres can't be parsed: a host is written name:port")
        port = match["port"] or given[number if number < len(given) else -1] or os.environ.get("PGPORT", "")
        hosts.append((match["v6"] or match["name"] or "localhost", _port(port)))
    return hosts


def _port(text: str) -> int:
    if not text:
        return _PORT
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ConfigurationError("the port in the URL of Postgres must be a number from 1 to 65535")
    return int(text)


def _target(
    hosts: list[tuple[str, int]], options: dict[str, Any], query: dict[str, str], more: Mapping[str, Any]
) -> Target:
    for name in more:
        if name not in ARGUMENTS:
            raise ConfigurationError(
                f"the Postgres engine has no option {name!r:.40}; it takes those of asyncpg.connect"
            )
    if not isinstance(more.get("server_settings", {}), Mapping):
        raise ConfigurationError(f"server_settings is a dict, not {kind_of(more['server_settings'])}")
    if len(hosts) > 1:
        query.setdefault("target_session_attrs", "primary")  # a standby can't LISTEN
    settings = {"application_name": query.pop("application_name", "wsbroadcast")}
    if query:
        options["dsn"] = f"postgresql:///?{urlencode(query)}"  # some of them can't be given as arguments
    options |= {**more, "server_settings": settings | dict(more.get("server_settings", {}))}
    files = {name: value for name, value in query.items() if name in _FILES and value}
    return Target(_address(hosts, str(options.get("database", ""))), hosts, options, files)


def _address(hosts: list[tuple[str, int]], database: str) -> str:
    places = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in hosts]
    address = ",".join(places) or os.environ.get("PGHOST") or "localhost"
    return f"{address}/{database}" if database else address
