"""URLs that name several hosts."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

_START = re.compile(r"(\s*[a-z][a-z0-9+.-]*:)//([^/?#]*)", re.IGNORECASE)

# `urlsplit` leaves these out, so that a line's end after a URL does no harm.
_LEFT_OUT = dict.fromkeys(map(ord, "\t\r\n"))


def split(url: str) -> SplitResult:
    """Split a URL like `urlsplit`, but let its hosts be a list: `redis+sentinel://a,b:7000,[::1]/main`.

    `urlsplit` of newer Pythons, such as 3.13.5 and 3.14, refuses an IPv6 address after other hosts.
    What stands before the path isn't checked here: that is for whoever reads the hosts.

    Raises:
        ValueError: If it can't be split.
    """
    url = url.translate(_LEFT_OUT)
    start = _START.match(url)
    if start is None:
        return urlsplit(url)
    scheme, netloc = start.groups()
    return urlsplit(f"{scheme}//{url[start.end() :]}")._replace(netloc=netloc)
