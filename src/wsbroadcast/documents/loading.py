"""Imports an app by its name, in the form that servers use: `main:app`."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from functools import reduce
from importlib import import_module
from typing import Any

from wsbroadcast.exceptions import ConfigurationError


def load_app(name: str, directory: str = ".") -> Any:
    """Import an app and return it. What its module prints goes to standard error.

    Args:
        name: Module and attribute, such as `main:app` or `shop.web:site.app`. Without a colon the attribute is `app`.
            If it ends with `()`, the attribute is called, and must return the app.
        directory: A directory where the module is looked for, beside the installed ones.

    Raises:
        ConfigurationError: If there is no such module or attribute, or the module fails.
    """
    module_name, _, attribute = name.partition(":")
    path, is_factory = attribute.removesuffix("()") or "app", attribute.endswith("()")
    if not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise ConfigurationError(f"an app is a module and a name in it, such as main:app, not {name!r:.80}")
    place = os.path.abspath(directory)
    sys.path.insert(0, place)
    try:
        with redirect_stdout(sys.stderr):
            module: Any = import_module(module_name)
            found = reduce(getattr, path.split("."), module)
            return found() if is_factory else found
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigurationError(f"there is no module {error.name!r} in {directory!r}, nor installed") from error
        raise ConfigurationError(f"{module_name} can't be imported: {error}") from error
    except AttributeError as error:
        if error.name in path.split("."):
            raise ConfigurationError(f"{module_name} has no {path!r}") from error
        raise _failed(module_name, error) from error
    except (Exception, SystemExit) as error:
        raise _failed(module_name, error) from error
    finally:
        sys.path.remove(place)


def _failed(module: str, error: BaseException) -> ConfigurationError:
    return ConfigurationError(f"{module} can't be imported: {type(error).__name__}: {error}")
