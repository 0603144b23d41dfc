"""Signatures: what functions of the app have to take, and what FastAPI must not read of ours."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial, update_wrapper, wraps
from types import FunctionType, MethodType, NoneType, UnionType
from typing import Any, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from wsbroadcast.exceptions import ConfigurationError, kind_of

T = TypeVar("T", bound=Callable[..., Any])


def check_callable(function: object, arguments: Sequence[str], what: str) -> None:
    """Check that a function of the app's can be called with these arguments, where that can be known.

    Args:
        function: The function.
        arguments: Their names, for the error.
        what: How the error calls the function.

    Raises:
        ConfigurationError: If it isn't a function, or takes other arguments.
    """
    if not callable(function):
        raise ConfigurationError(f"{what} is a function, not {kind_of(function)}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        name = getattr(function, "__qualname__", None) or repr(function)
        raise ConfigurationError(
            f"{what} is called with ({', '.join(arguments)}), which {name}{signature} doesn't take: {error}"
        ) from None


def may_return_none(function: Callable[..., Any]) -> bool:
    """Tell whether a function is annotated to return something or `None`, and not only `None`."""
    if isinstance(function, partial):
        function = function.func
    if not isinstance(function, (FunctionType, MethodType)):
        function = type(function).__call__
    try:
        return _is_optional(get_type_hints(function, localns=_Names(function)).get("return"))
    except Exception:  # an annotation that means nothing to Python
        return False


def _is_optional(annotation: object) -> bool:
    annotation = getattr(annotation, "__value__", annotation)  # of a `type` statement
    arguments = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return NoneType in arguments or any(map(_is_optional, arguments))
    return get_origin(annotation) in (Awaitable, Coroutine) and _is_optional(arguments[-1])


class _Names(dict[str, Any]):
    """The names in a function's annotations; one that is imported for a type checker only stands for something."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(vars(builtins) | getattr(function, "__globals__", {}))

    def __missing__(self, name: str) -> object:
        return object


def without_parentheses(method: T) -> T:
    """Tell those who call a method that something else is to call, such as a decorator, to leave out `()`."""

    @wraps(method)
    def checked(self: Any, *arguments: Any, **others: Any) -> Any:
        if not arguments and not others:
            raise ConfigurationError(f"write manager.{method.__name__} without parentheses behind it")
        return method(self, *arguments, **others)

    return cast("T", checked)


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
                if name not in vars(marked):  # it may be the method of several classes, each with its own text
                    function = _copy(function, marked)
                text = instead_of_methods.get(name, "FastAPI would take its arguments from the query; call it yourself")
                _refuse(function, f"{marked.__name__}.{name} is not a dependency: {text}", skip=1)
        return marked

    return mark


def _copy(function: FunctionType, owner: type) -> FunctionType:
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    update_wrapper(copy, function)
    del copy.__wrapped__  # type: ignore[attr-defined]  # it stands for itself
    copy.__dict__.update(function.__dict__)
    copy.__qualname__ = f"{owner.__qualname__}.{function.__name__}"
    setattr(owner, function.__name__, copy)
    return copy


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
