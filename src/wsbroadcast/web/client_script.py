"""Serves the browser's client beside the sockets. It is always the one of this version of the server."""

from __future__ import annotations

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256, sha384
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

NAME = "wsbroadcast.js"
"""The name that pages import."""

DIRECTORY = Path(__file__).parents[1] / "client"
"""The directory of the client's files: its source, its types, and what is served."""

_ANY_NAME = re.compile(r"wsbroadcast(\.[0-9a-f]+)?\.js")

# A script of another origin may then be used as a module, and browsers don't guess its type.
_HEADERS = {
    "Access-Control-Allow-Origin": "*",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
}
_ALWAYS_ASK = "no-cache"
_NEVER_ASK = "public, max-age=31536000, immutable"


def is_script(path: str) -> bool:
    """Return whether the path of a URL names the client. No channel may have that name."""
    return _ANY_NAME.fullmatch(path.rpartition("/")[2]) is not None


class ClientScript:
    """The client as it is served: minified, and compressed for browsers that take that."""

    def __init__(self) -> None:
        self._plain = (DIRECTORY / "wsbroadcast.min.js").read_bytes()
        self._gzipped = (DIRECTORY / "wsbroadcast.min.js.gz").read_bytes()
        self.hash = sha256(self._plain).hexdigest()[:16]
        """Identifies this content: what is served as `wsbroadcast.<hash>.js` never changes."""
        self.integrity = f"sha384-{b64encode(sha384(self._plain).digest()).decode()}"
        """The value of `integrity=` in a script tag or an import map (Subresource Integrity)."""

    @property
    def name(self) -> str:
        """The name under which the content never changes."""
        return f"wsbroadcast.{self.hash}.js"

    def response(self, request: Request) -> Response:
        """Answer a request for it, by its plain name or by one that never changes.

        A request for the name of another version gets this version, marked as not to be cached: during a deploy, a page
        of one node may ask another node.
        """
        is_gzipped = _takes_gzip(request.headers.get("accept-encoding", ""))
        tag = f'"{self.hash}-gzip"' if is_gzipped else f'"{self.hash}"'
        asked = request.url.path.rpartition("/")[2]
        headers = {**_HEADERS, "ETag": tag, "Cache-Control": _NEVER_ASK if asked == self.name else _ALWAYS_ASK}
        if tag in re.findall(r'"[^"]*"', request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=headers)
        if is_gzipped:
            headers["Content-Encoding"] = "gzip"
        content = self._gzipped if is_gzipped else self._plain
        headers["Content-Length"] = str(len(content))
        body = b"" if request.method == "HEAD" else content
        return Response(body, headers=headers, media_type="text/javascript")


@cache
def client_script() -> ClientScript:
    """Return the client. Its files are read once."""
    return ClientScript()


def script_routes(path: str) -> list[BaseRoute]:
    """Make the routes of the client. They are beside a router's path, before its first parameter."""
    before, parameter, _ = path.partition("{")
    base = before.rpartition("/")[0] if parameter else path.rstrip("/")
    return _routes(f"{base}/{NAME}")


def _routes(path: str) -> list[BaseRoute]:
    async def serve(request: Request) -> Response:
        return client_script().response(request)

    hashed = f"{path.removesuffix('.js')}.{{wsbroadcast_hash:str}}.js"
    return [Route(each, serve, name="wsbroadcast_client", include_in_schema=False) for each in (path, hashed)]


def create_script_router(path: str = f"/{NAME}") -> APIRouter:
    """Make a router that serves only the browser's client, for apps with endpoints of their own.

    Routers of `create_router` serve it already, beside their sockets.

    Args:
        path: The path of the script. The name that never changes is beside it, with the hash before `.js`.
    """
    return APIRouter(routes=_routes(path))


def _takes_gzip(accepted: str) -> bool:
    # RFC 9110, 12.5.3: `gzip;q=0` means that the client doesn't take it.
    for each in accepted.lower().split(","):
        coding, _, weight = (part.strip() for part in each.partition(";"))
        if coding in ("gzip", "*"):
            return not re.fullmatch(r"q=0(\.0*)?", weight)
    return False
