"""What FastAPI reads of our signatures, where it would take from a request what must never come from there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from wsbroadcast.exceptions import ConfigurationError

T = TypeVar("T", bound=Callable[..., Any])


def no_dependency(instead: str, **instead_of_methods: str) -> Callable[[T], T]:
    """Make FastAPI refuse a function as a dependency, or a class with all its methods, when the route is made.

    FastAPI takes the arguments of a dependency from the query: `Depends(manager.connect)` lets a client say who it
    is. What takes no arguments isn't refused. Parameters keep their names and order, which mocks look at.

    Args:
        instead: What to write instead.
        instead_of_methods: The same for some methods.
    """

    def mark(marked: T) -> T:
        if not isinstance(marked, type):
            _refuse(marked, f"{marked.__qualname__} is not a dependency: {instead}", skip=0)
            return marked
        for name, function in inspect.getmembers(marked, inspect.isfunction):
            if name == "__init__":
                _refuse(function, f"{marked.__name__} is not a dependency: {instead}", skip=1)
            elif not name.startswith("_"):
                text = instead_of_methods.get(name, "FastAPI would take its arguments from the query; call it yourself")
                _refuse(function, f"{marked.__name__}.{name} is not a dependency: {text}", skip=1)
        return marked

    return mark


def _refuse(function: Any, error: str, skip: int) -> None:
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    for index, parameter in enumerate(parameters[skip : skip + 1], skip):
        parameters[index] = parameter.replace(annotation=_NoField(parameter.annotation, error))
        function.__signature__ = signature.replace(parameters=parameters)


class _NoField:
    """An annotation of which no query parameter can be made: pydantic asks it for a schema and gets an error.

    It shows as what it stands for, so that `help()` says the same as the source.
    """

    def __init__(self, annotation: object, error: str) -> None:
        self._annotation = annotation
        self._error = error

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> NoReturn:
        raise ConfigurationError(self._error)

    def __repr__(self) -> str:
        return repr(self._annotation)
