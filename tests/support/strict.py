"""Runs a test in its own Python process, where every warning is an error."""

from __future__ import annotations

import sys

STRICT = (
    sys.executable,
    "-Werror",
    # redis-py 8.1 on Python 3.14; pyproject.toml has it too
    "-Wignore:'asyncio.iscoroutinefunction' is deprecated:DeprecationWarning:redis.asyncio.connection",
)
