"""From this process to the other nodes; an engine is picked by the scheme of its URL."""

from __future__ import annotations

from urllib.parse import urlsplit

from wsbroadcast.engines.base import Engine
from wsbroadcast.engines.memory import MemoryEngine
from wsbroadcast.exceptions import ConfigurationError

_SCHEMES: dict[str, type[Engine]] = {"memory": MemoryEngine}


def create_engine(engine: str | Engine) -> Engine:
    """Return the engine that a URL names; an engine object is returned as it is.

    Raises:
        ConfigurationError: If no engine has the URL's scheme. The URL itself is not repeated: it may hold a password.
    """
    if isinstance(engine, Engine):
        return engine
    if not isinstance(engine, str):
        raise ConfigurationError(f"engine must be a URL or an Engine, not {type(engine).__name__}")
    try:
        scheme = urlsplit(engine).scheme
    except ValueError:
        raise ConfigurationError("the engine's URL can't be parsed") from None  # the parser's error repeats a password
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in sorted(_SCHEMES))
        raise ConfigurationError(f"no engine for a URL with the scheme {scheme!r}; known are {known}")
    return _SCHEMES[scheme].from_url(engine)
