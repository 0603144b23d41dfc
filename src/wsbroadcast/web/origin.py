"""Which pages may open a WebSocket here. No same-origin policy covers that (RFC 6455, 10.2): the server must."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv6Address
from typing import NamedTuple

from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.text import plain

MAX_SHOWN = 200
"""How many characters of a text that a client chose are shown in a log or an answer."""

# RFC 6454, 7: scheme "://" host [ ":" port ], and nothing else. Ports have no leading zeros, as browsers write them.
_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[a-z0-9._-]+|\[[0-9a-f:.]+\])(:(?P<port>0|[1-9][0-9]{0,4}))?",
    re.IGNORECASE,
)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_PAGE_SCHEMES = {"ws": "http", "wss": "https"}


class Origin(NamedTuple):
    """The scheme, host and port of a page, in lower case. Two origins are the same if all three are."""

    scheme: str
    host: str
    port: int | None
    """The port; the scheme's default if the text has none; `None` for a scheme without a default, such as `app://`."""

    def __str__(self) -> str:
        port = "" if self.port == _DEFAULT_PORTS.get(self.scheme) else f":{self.port}"
        return f"{self.scheme}://{self.host}{port}"


def parse_origin(text: str) -> Origin | None:
    """Read an origin as browsers write it. Return `None` for `null`, and for anything else that isn't an origin.

    A host that isn't ASCII makes it no origin: browsers write such hosts in punycode (RFC 6454, 6.2).
    """
    match = _ORIGIN.fullmatch(text) if text.isascii() else None
    if match is None:
        return None
    scheme, host = match["scheme"].lower(), match["host"].lower()
    port = _DEFAULT_PORTS.get(scheme) if match["port"] is None else int(match["port"])
    if port is not None and port > 65535:
        return None
    if host.startswith("["):
        try:
            host = f"[{IPv6Address(host[1:-1])}]"
        except ValueError:
            return None
    return Origin(scheme, host, port)


class AllowedOrigins:
    """The pages that may connect.

    Args:
        origins: Origins such as `https://app.example`, compared by scheme, host and port; `"*"` for every page; `None`
            for pages of the server itself, which has the handshake's scheme and its `Host` header.
        allow_missing: Whether a handshake without an `Origin` header may connect. Browsers always send one.

    Raises:
        ConfigurationError: If one of them is not an origin.
    """

    def __init__(self, origins: Iterable[str] | None = None, *, allow_missing: bool = True) -> None:
        entries = (origins,) if isinstance(origins, str) else tuple(origins or ())
        self._is_own_only = origins is None
        self._is_everyone = "*" in entries
        self._origins = frozenset(_check_entry(entry) for entry in entries if entry != "*")
        self._allow_missing = allow_missing

    def refusal(self, scheme: str, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Return why a handshake is refused, in one line without control characters; `None` if it isn't refused.

        Args:
            scheme: The scheme of the handshake, `ws` or `wss`. A proxy that ends TLS has to pass it on.
            headers: The headers of the handshake, with names in lower case.
        """
        headers = list(headers)
        found = [value.decode("latin-1") for name, value in headers if name == b"origin"]
        if not found:
            return self._refusal_without(scheme, headers)
        if len(found) > 1:
            return f"{len(found)} Origin headers, where a browser sends one"
        if self._is_everyone:
            return None
        origin = parse_origin(found[0])
        if not self._is_own_only:
            return None if origin in self._origins else f"{_not_allowed(found[0])}: it is not in allowed_origins"
        own = _own_origin(scheme, headers)
        if origin is not None and origin == own:
            return None
        server = "the Host header is missing or none" if own is None else f"this server is {shown(str(own))}"
        return f"{_not_allowed(found[0])}: {server}. {_advice(origin, own)}"

    def _refusal_without(self, scheme: str, headers: list[tuple[bytes, bytes]]) -> str | None:
        # A browser sends no `Origin` with a GET to the page's own server, and none where nobody can read the answer, as
        # for an image. But it says in another header where a request comes from (Fetch Metadata, 2.4).
        site = dict(headers).get(b"sec-fetch-site")
        if site in (b"cross-site", b"same-site") and not self._is_everyone:
            return f"a page of another origin ({site.decode()}) asks without an Origin header"
        if self._allow_missing:
            return None
        is_own = self._is_own_only or self._is_everyone or _own_origin(scheme, headers) in self._origins
        return None if site == b"same-origin" and is_own else "no Origin header: only browsers may connect here"

    def sharing(self, scheme: str, headers: Iterable[tuple[bytes, bytes]]) -> tuple[tuple[bytes, bytes], ...]:
        """Return the headers that let a page read an HTTP response (Fetch, 3.2.3); none if it may not, or needs none.

        For requests with cookies there is never a wildcard: the answer names the page, and tells caches so.
        """
        headers = list(headers)
        vary = () if self._is_everyone else ((b"vary", b"Origin"),)
        found = [value for name, value in headers if name == b"origin"]
        if len(found) != 1 or self.refusal(scheme, headers) is not None:
            return vary
        if self._is_everyone:
            return ((b"access-control-allow-origin", b"*"),)
        return (
            (b"access-control-allow-origin", found[0]),
            (b"access-control-allow-credentials", b"true"),
            *vary,
        )


def shown(text: str) -> str:
    """Write a text that a client chose so that it is safe in a log: quoted, escaped and cut."""
    return repr(text[:MAX_SHOWN]) + ("…" if len(text) > MAX_SHOWN else "")


def _not_allowed(origin: str) -> str:
    return f"origin {shown(origin)} is not allowed"


def _own_origin(scheme: str, headers: Iterable[tuple[bytes, bytes]]) -> Origin | None:
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    return parse_origin(f"{_PAGE_SCHEMES.get(scheme, scheme)}://{hosts[0]}") if len(hosts) == 1 else None


def _advice(origin: Origin | None, own: Origin | None) -> str:
    if origin is None:
        return "It names no page."
    advice = f"If that page is yours, pass allowed_origins=[{shown(str(origin))}]"
    if own is not None and origin.host == own.host and origin.scheme != own.scheme:
        advice += "; if a proxy ends TLS, let the server trust its X-Forwarded-Proto"
    return advice


def _check_entry(entry: object) -> Origin:
    origin = parse_origin(plain(entry)) if isinstance(entry, str) else None
    if origin is None or origin.scheme in _PAGE_SCHEMES:
        raise ConfigurationError(
            f"allowed_origins: {entry!r:.200} is not an origin; write https://host or http://host:port, without a path "
            "or a slash at the end, the host as browsers send it (xn--… if it isn't ASCII), or '*' for every page"
        )
    return origin
