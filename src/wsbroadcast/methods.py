"""Methods: functions of the app that clients of events call, their arguments and results checked by pydantic."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError, create_model
from starlette.concurrency import run_in_threadpool

from wsbroadcast.concurrency import finished
from wsbroadcast.connection import Connection
from wsbroadcast.exceptions import ConfigurationError, WSBroadcastError
from wsbroadcast.text import plain

F = TypeVar("F", bound=Callable[..., Any])

# So many mistakes are named to a client, and so long is the name of a place in what it sent.
_MAX_MISTAKES = 16
_MAX_LOCATION = 64

_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")

_NOTHING = inspect.Parameter.empty


class CallError(WSBroadcastError):
    """Raised by a method to answer a call with an error of the app's own: `raise CallError("sold_out", "no seats")`.

    Raises:
        ConfigurationError: If the code isn't 1 to 64 lower-case letters, digits and underscores.
    """

    def __init__(self, code: str, text: str = "") -> None:
        if not isinstance(code, str) or not _CODE.fullmatch(code):
            raise ConfigurationError(f"a code is a text such as 'sold_out', not {code!r:.80}")
        self.code = code
        """What the client's program looks at."""
        self.text = plain(text)
        """What people read."""
        super().__init__(code, self.text)


class InvalidArguments(Exception):
    """Raised when the arguments of a call don't fit; nothing has run then."""

    def __init__(self, mistakes: list[dict[str, Any]]) -> None:
        self.mistakes = mistakes
        """Where, and what is wrong, as pydantic says it; nothing of what was sent is repeated."""
        super().__init__("the arguments don't fit")


class Method:
    """A function that clients may call.

    Args:
        name: Its name for clients.
        function: `async def` or `def`; the latter runs in a thread, as FastAPI's endpoints do.

    Raises:
        ConfigurationError: If pydantic can't read its arguments, or they can't be given by name.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        """Its name for clients."""
        self.function = function
        """What runs."""
        self.is_cancellable = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004  # an object whose `__call__` is `async def`
        )
        """Whether it is a coroutine function; a thread can't be cut off."""
        try:
            hints = get_type_hints(_annotated(function), include_extras=True)
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError, NameError) as error:
            raise ConfigurationError(f"the arguments of method {name!r} can't be read: {error}") from error
        self._connection = next((each for each in parameters if _is_connection(hints.get(each))), None)
        self._names = [each for each in parameters if each != self._connection]
        _check_kinds(name, [parameters[each] for each in parameters])
        try:
            self._arguments = _model(name, {each: _field(each, parameters[each], hints) for each in self._names})
            result = hints.get("return", _NOTHING)
            self._result = None if result is _NOTHING else TypeAdapter(type(None) if result is None else result)
        except PydanticUserError as error:
            raise ConfigurationError(f"pydantic can't read the arguments of method {name!r}: {error}") from error

    @property
    def needs_connection(self) -> bool:
        """Whether it takes the connection, which a POST doesn't have."""
        return self._connection is not None

    def read(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call as the function takes them.

        Raises:
            InvalidArguments: If they don't fit.
        """
        try:
            model = self._arguments.model_validate(arguments)
        except ValidationError as error:
            raise InvalidArguments(_mistakes(error)) from None
        given = model.model_fields_set  # a default of the function's is its own
        return {name: getattr(model, f"p{i}") for i, name in enumerate(self._names) if f"p{i}" in given}

    async def run(self, arguments: dict[str, Any], connection: Connection | None) -> Any:
        """Run the function, and return its result as JSON has it.

        Args:
            arguments: What `read` has returned.
            connection: Who calls.

        Raises:
            Exception: What the function raises, or pydantic says of its result.
        """
        if self._connection is not None:
            arguments = {**arguments, self._connection: connection}
        if self.is_cancellable:
            result = await self.function(**arguments)
        else:
            result = await run_in_threadpool(partial(self.function, **arguments))
            if isinstance(result, Awaitable):
                result = await result
        finished(result, f"what the method {self.name!r} returned")
        if self._result is None:
            return result
        checked = self._result.validate_python(result, from_attributes=True)
        return self._result.dump_python(checked, mode="json", by_alias=True)


class Methods:
    """The methods of a manager, by name."""

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}

    def add(self, name: str, function: Callable[..., Any]) -> None:
        """Add one.

        Raises:
            ConfigurationError: If the name is taken, or makes no sense, or the function doesn't.
        """
        if not isinstance(name, str) or not 0 < len(name) <= 200:
            raise ConfigurationError(f'a method has a name: @manager.method("add"), not {name!r:.80}')
        if name in self._methods:
            raise ConfigurationError(f"there is a method {name!r} already")
        if not callable(function):
            raise ConfigurationError(f"method {name!r} is a function, not {function!r:.80}")
        self._methods[name] = Method(name, function)

    def get(self, name: str) -> Method | None:
        """Return the method of a name."""
        return self._methods.get(name)


class HasMethods:
    """The decorator of a manager that makes methods."""

    _methods: Methods

    def method(self, name: str) -> Callable[[F], F]:
        """Let clients of events call a function: `@manager.method("add")`.

        Its arguments are checked by pydantic against their annotations, its result against that of the function; one
        that is annotated as a `Connection` is the caller's. Plain functions run in a thread. A router's `authorize`
        is asked about the action `"call"` with the method's name in place of the channel.

        Args:
            name: What clients call it.

        Raises:
            ConfigurationError: If the name is taken, or pydantic can't read the arguments.
        """

        def add(function: F) -> F:
            self._methods.add(name, function)
            return function

        if callable(name):
            raise ConfigurationError('a method has a name: write @manager.method("add")')
        return add


def _annotated(function: Callable[..., Any]) -> Any:
    if isinstance(function, partial):
        return _annotated(function.func)
    return function if inspect.isroutine(function) else type(function).__call__


def _is_connection(annotation: object) -> bool:
    return annotation is Connection or getattr(annotation, "__origin__", None) is Connection


def _check_kinds(name: str, parameters: list[inspect.Parameter]) -> None:
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigurationError(f"clients give arguments by name, which {parameter} of method {name!r} isn't")


def _field(name: str, parameter: inspect.Parameter, hints: dict[str, Any]) -> Any:
    annotation = hints.get(name, Any)
    if parameter.default is _NOTHING:
        return annotation, Field(alias=name)
    return annotation, Field(default=None, alias=name)


def _model(name: str, fields: dict[str, Any]) -> Any:
    # By number, because pydantic keeps some names for itself; clients see the aliases.
    numbered = {f"p{i}": field for i, field in enumerate(fields.values())}
    return create_model(f"arguments of {name}", __config__=ConfigDict(extra="forbid"), **numbered)


def _mistakes(error: ValidationError) -> list[dict[str, Any]]:
    found = error.errors(include_url=False, include_context=False, include_input=False)[:_MAX_MISTAKES]
    return [
        {
            "loc": [each[:_MAX_LOCATION] if isinstance(each, str) else each for each in mistake["loc"]],
            "type": mistake["type"],
            # The one text of pydantic's own that repeats what was sent.
            "msg": "Input tag is none of those expected" if mistake["type"] == "union_tag_invalid" else mistake["msg"],
        }
        for mistake in found
    ]
