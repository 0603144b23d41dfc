"""Where NATS is, and how to log in: from a URL, or from the options of nats-py."""

from __future__ import annotations

import random
import ssl
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from ipaddress import ip_address
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from wsbroadcast.engines import URL, url_text
from wsbroadcast.engines.broker.link import Host
from wsbroadcast.exceptions import ConfigurationError, MissingDependency, kind_of

NATS_PORT = 4222

_SCHEMES = ("nats", "tls")

# The options of nats-py's `connect` for login and encryption. All others are about reconnecting, timeouts and buffers,
# which the engine does itself.
OPTIONS = frozenset(
    {
        "name",
        "nkeys_seed",
        "nkeys_seed_str",
        "password",
        "signature_cb",
        "tls",
        "tls_handshake_first",
        "tls_hostname",
        "token",
        "user",
        "user_credentials",
        "user_jwt_cb",
    }
)

# The types of options. With a wrong type a server or nats-py would misunderstand it, or it would look like an outage.
_KINDS: Mapping[str, tuple[tuple[Any, ...], Sequence[str]]] = {
    "a str": ((str,), ("name", "nkeys_seed_str", "tls_hostname")),
    "a str, or a function that returns one": ((str, Callable), ("password", "token", "user")),
    "a function": ((Callable,), ("signature_cb", "user_jwt_cb")),
    "True or False": ((bool,), ("tls_handshake_first",)),
    "an ssl.SSLContext": ((ssl.SSLContext,), ("tls",)),
}

_SIGNING = frozenset({"nkeys_seed", "nkeys_seed_str", "signature_cb", "user_credentials", "user_jwt_cb"})

_FORM = "a server of NATS is written nats://host:4222, several nats://a:4222,b:4222, a user before it user:password@"


def parse_host(text: str) -> Host:
    """Read `host` or `host:port`.

    Raises:
        ConfigurationError: If it is neither. The error doesn't repeat the text, which may be a part of a password.
    """
    try:
        parts = urlsplit(f"//{text}")
        port = parts.port or NATS_PORT
    except ValueError:
        raise ConfigurationError(_FORM) from None
    if not parts.hostname or parts.netloc != text:
        raise ConfigurationError(_FORM)
    return Host(parts.hostname, port)


@dataclass(kw_only=True, eq=False)
class Target:
    """The servers of one NATS, and nats-py's options for the login."""

    hosts: tuple[Host, ...]
    """The servers that were given."""
    must_encrypt: bool
    """Whether a server without TLS is refused, before anything is sent to it."""
    options: Mapping[str, Any] = field(repr=False)
    last: Host | None = field(default=None, repr=False)
    """The server that last accepted the login."""
    # The other servers of the cluster, as the last connected server has named them.
    _discovered: list[Host] = field(default_factory=list, repr=False)

    @property
    def address(self) -> str:
        """The address for logs and errors, without user and password."""
        return ",".join(str(host) for host in self.hosts)

    @property
    def who(self) -> str:
        """What errors call the user."""
        if isinstance(user := self.options.get("user"), str):
            return f"the user {user!r:.80}"
        for option, who in _WHO.items():
            if self.options.get(option) is not None:
                return who
        return "a connection without user and password"

    @property
    def signs(self) -> bool:
        """Whether the login is by a signature."""
        return not _SIGNING.isdisjoint(self.options)

    def route(self) -> list[Host]:
        """Return the servers in the order in which to try them, at random.

        If servers hang, there may be time for only three. So the first three are the one that last accepted the login,
        one that was given and one that was discovered.
        """
        given, found = _shuffled(self.hosts), _shuffled(self._discovered)
        last = [] if self.last is None else [self.last]
        first = dict.fromkeys((*last, *given[:1], *found[:1]))
        others = [host for host in (*given, *found) if host not in first]
        # The last one isn't always the first: it may accept the login again, and still carry no messages.
        return _shuffled(first) + _shuffled(others)

    def discover(self, addresses: Iterable[str]) -> None:
        """Remember the other servers of the cluster, as a server names them; forget those of before.

        Raises:
            ConfigurationError: If one of the addresses makes no sense.
        """
        hosts = [_found(parse_host(address), self.hosts[0]) for address in addresses]
        known = {(host.name, host.port) for host in self.hosts}
        self._discovered[:] = [host for host in dict.fromkeys(hosts) if (host.name, host.port) not in known]

    @classmethod
    def parse(cls, servers: URL | Sequence[URL], options: Mapping[str, Any]) -> Self:
        """Read servers and options.

        Raises:
            ConfigurationError: If they make no sense. The error repeats nothing that may hold a password.
            MissingDependency: If nkeys are used, and the package that signs with them isn't installed.
        """
        given = servers if isinstance(servers, (list, tuple)) else [servers]
        texts = [text for each in given if (text := url_text(each)) is not None]
        if len(texts) < len(given):
            raise ConfigurationError(f"servers are URLs, not {kind_of(servers)}: {_FORM}")
        schemes, logins, hosts = set(), [], []
        for text in ",".join(texts).split(","):
            scheme, separator, rest = text.strip().rpartition("://")
            login, _, place = rest.rstrip("/").rpartition("@")
            if "?" in place:
                raise ConfigurationError("options are arguments of NATSEngine, and not in its URL")
            if separator and scheme not in _SCHEMES:
                raise ConfigurationError(f"a URL of NATS begins with nats:// or tls://; {_FORM}")
            schemes.add(scheme)
            logins.append(login)
            hosts.append(parse_host(place))
        options = {**options, **_credentials(logins, options)}
        _check(options)
        must_encrypt = "tls" in schemes or bool(options.get("tls") or options.get("tls_handshake_first"))
        return cls(hosts=tuple(dict.fromkeys(hosts)), must_encrypt=must_encrypt, options=options)


_WHO = {
    "user": "the user",
    "user_credentials": "the credentials",
    "nkeys_seed": "the nkey",
    "nkeys_seed_str": "the nkey",
    "signature_cb": "the signature",
    "token": "the token",
}


def _credentials(logins: Sequence[str], options: Mapping[str, Any]) -> dict[str, str]:
    # nats-py gets these as options, not in the URL. It wouldn't decode them there, nor use them for discovered servers.
    if not any(logins):
        return {}
    if not {*logins} <= {logins[0], ""}:
        raise ConfigurationError(
            "the URL of NATS has one user and password for all servers: write them only before the first server"
        )
    if {"user", "password", "token"} & options.keys():
        raise ConfigurationError("user, password and token are given in the URL or in options: give them only once")
    user, separator, password = logins[0].partition(":")
    if separator:
        return {"user": unquote(user), "password": unquote(password)}
    return {"token": unquote(user)}  # NATS's own rule for a URL without a password


def _check(options: Mapping[str, Any]) -> None:
    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        raise ConfigurationError(
            f"the NATS engine has no option {unknown[0]!r:.80}; of nats-py it takes {', '.join(sorted(OPTIONS))}"
        )
    if (options.get("user") is None) != (options.get("password") is None):
        raise ConfigurationError("the NATS engine needs user and password together: give both")
    for what, (kinds, names) in _KINDS.items():
        for name in names:
            if options.get(name) is not None and not isinstance(options[name], kinds):
                raise ConfigurationError(f"{name} is {what}, not {kind_of(options[name])}")
    nkeys = [name for name in ("user_credentials", "nkeys_seed", "nkeys_seed_str") if options.get(name)]
    if nkeys and find_spec("nkeys") is None:
        raise MissingDependency(f'{nkeys[0]} needs the package nkeys: pip install "nats-py[nkeys]"')


def _found(host: Host, given: Host) -> Host:
    # Servers name each other by IP address, while their certificates have the name that they share.
    return host._replace(tls_hostname=given.name) if _is_ip(host.name) and not _is_ip(given.name) else host


def _shuffled(hosts: Collection[Host]) -> list[Host]:
    return random.sample([*hosts], len(hosts))


def _is_ip(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
