"""Signatures: checks of the app's functions, and protection of ours from use as FastAPI dependencies."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from functools import partial, update_wrapper, wraps
from types import FunctionType, MethodType, NoneType, UnionType
from typing import Any, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from wsbroadcast.exceptions import ConfigurationError, kind_of

T = TypeVar("T", bound=Callable[..., Any])


def check_callable(function: object, arguments: Sequence[str], what: str) -> None:
    """Check that a function of the app can be called with these arguments, as far as its signature is known.

    Args:
        function: The function.
        arguments: The names of the arguments, for the error.
        what: What the error calls the function.

    Raises:
        ConfigurationError: If it isn't a function, or takes other arguments.
    """
    if not callable(function):
        raise ConfigurationError(f"{what} is a function, not {kind_of(function)}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function written in C may have no signature
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        name = getattr(function, "__qualname__", None) or repr(function)
        raise ConfigurationError(
            f"{what} is called with ({', '.join(arguments)}), which {name}{signature} doesn't take: {error}"
        ) from None


def annotated(function: Callable[..., Any]) -> Any:
    """Return the object that has the annotations of a callable: the callable itself, or its `__call__`."""
    if isinstance(function, partial):
        return annotated(function.func)
    return function if inspect.isroutine(function) else type(function).__call__


def is_coroutine_function(function: Callable[..., Any]) -> bool:
    """Return whether something is `async def`, or an object whose `__call__` is."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    )


def check_named(rule: str, parameters: Iterable[inspect.Parameter]) -> None:
    """Check that all parameters of a function can be given by name.

    Raises:
        ConfigurationError: If one can't.
    """
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigurationError(f"{rule}, and {parameter} can't be")


def may_return_none(function: Callable[..., Any]) -> bool:
    """Tell whether a function is annotated to return either `None` or something else."""
    if isinstance(function, partial):
        function = function.func
    if not isinstance(function, (FunctionType, MethodType)):
        function = type(function).__call__
    try:
        return _is_optional(get_type_hints(function, localns=_Names(function)).get("return"))
    except Exception:  # an annotation that Python can't evaluate
        return False


def _is_optional(annotation: object) -> bool:
    annotation = getattr(annotation, "__value__", annotation)  # an alias of a `type` statement
    arguments = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return NoneType in arguments or any(map(_is_optional, arguments))
    return get_origin(annotation) in (Awaitable, Coroutine) and _is_optional(arguments[-1])


class _Names(dict[str, Any]):
    """The names in a function's annotations. A name that is imported only for type checkers stands for some object."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(vars(builtins) | getattr(function, "__globals__", {}))

    def __missing__(self, name: str) -> object:
        return object


def without_parentheses(method: T) -> T:
    """Let a method such as `manager.on_connect` or `manager.lifespan` raise a plain error if it is called with `()`."""

    @wraps(method)
    def checked(self: Any, *arguments: Any, **others: Any) -> Any:
        if not arguments and not others:
            raise ConfigurationError(f"write manager.{method.__name__} without parentheses after it")
        return method(self, *arguments, **others)

    return cast("T", checked)


def no_dependency(instead: str, **instead_of_methods: str) -> Callable[[T], T]:
    """Make FastAPI refuse a function, or a class with all its methods, as a dependency, when the route is made.

    FastAPI takes the arguments of a dependency from the query. So `Depends(manager.connect)` would let a client choose
    its user. A function without arguments isn't refused. Parameters keep their names and order, which mocks check.

    Args:
        instead: What to write instead.
        instead_of_methods: What to write instead of some methods, by name.
    """

    def mark(marked: T) -> T:
        if not isinstance(marked, type):
            _refuse(marked, f"{marked.__qualname__} is not a dependency: {instead}", skip=0)
            return marked
        for name, function in inspect.getmembers(marked, inspect.isfunction):
            if name == "__init__":
                _refuse(function, f"{marked.__name__} is not a dependency: {instead}", skip=1)
            elif not name.startswith("_"):
                if name not in vars(marked):  # an inherited method: each class that has it has its own text
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
    del copy.__wrapped__  # type: ignore[attr-defined]  # it is not a wrapper of the original
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
    """An annotation that can't be a query parameter: pydantic asks it for a schema and gets an error.

    Its `repr` is that of the annotation in the source, so that `help()` shows the same.
    """

    def __init__(self, annotation: object, error: str) -> None:
        self._annotation = annotation
        self._error = error

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> NoReturn:
        raise ConfigurationError(self._error)

    def __repr__(self) -> str:
        return repr(self._annotation)
