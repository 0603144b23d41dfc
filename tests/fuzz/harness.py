"""Runs a fuzz target under atheris; without it, the targets are plain functions."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

IS_FUZZING = Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent


def watched() -> AbstractContextManager[Any]:
    """What is imported inside is watched for new paths, where a target is run by hand."""
    if not IS_FUZZING:
        return nullcontext()
    manager: AbstractContextManager[Any] = importlib.import_module("atheris").instrument_imports(
        include=["wsbroadcast", "starlette"]
    )
    return manager


def fuzz(check: Callable[[bytes], None]) -> None:
    """Give a target bytes until it fails, or the time of the command line is over."""
    atheris = importlib.import_module("atheris")
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()
