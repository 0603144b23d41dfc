"""Methods: functions of the app that clients call. Pydantic checks their arguments and results."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError, create_model
from starlette.concurrency import run_in_threadpool

from wsbroadcast.concurrency import finished
from wsbroadcast.connection import Connection
from wsbroadcast.exceptions import ConfigurationError, WSBroadcastError
from wsbroadcast.signatures import annotated, check_named, is_coroutine_function
from wsbroadcast.text import plain
from wsbroadcast.typed.mistakes import Mistake, bounded, mistakes_of

F = TypeVar("F", bound=Callable[..., Any])

_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")

_NOTHING = inspect.Parameter.empty


class CallError(WSBroadcastError):
    """Raised by a method to answer a call with an error of the app: `raise CallError("sold_out", "no seats")`.

    Args:
        code: For the client's program: 1 to 64 lower-case letters, digits and underscores.
        text: For people.

    Raises:
        ConfigurationError: If the code has another form.
    """

    def __init__(self, code: str, text: str = "") -> None:
        if not isinstance(code, str) or not _CODE.fullmatch(code):
            raise ConfigurationError(
                f"a code is 1 to 64 lower-case letters, digits and underscores, such as 'sold_out', not {code!r:.80}"
            )
        self.code = code
        """For the client's program."""
        self.text = plain(text)
        """For people."""
        super().__init__(code, self.text)


class InvalidArguments(Exception):
    """Raised when the arguments of a call don't fit. The method has not run."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        self.mistakes = mistakes
        """Where and what is wrong, in pydantic's words. Nothing that was sent is repeated."""
        super().__init__("the arguments don't fit")


class Method:
    """A function that clients may call.

    Args:
        name: Its name for clients.
        function: `async def` or `def`. A `def` runs in a thread, as FastAPI's endpoints do.

    Raises:
        ConfigurationError: If pydantic can't read the arguments, or they can't be given by name.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        """Its name for clients."""
        self.function = function
        """The function."""
        self.is_cancellable = is_coroutine_function(function)
        """Whether the function is `async def`. A thread can't be cut off."""
        try:
            hints = get_type_hints(annotated(function), include_extras=True)
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError, NameError) as error:
            raise ConfigurationError(f"the arguments of method {name!r} can't be read: {error}") from error
        self._connection = next((each for each in parameters if _is_connection(hints.get(each))), None)
        self._names = [each for each in parameters if each != self._connection]
        check_named(f"clients give the arguments of method {name!r} by name", parameters.values())
        try:
            self.arguments: type[BaseModel] = _model(
                name, {each: _field(each, parameters[each], hints) for each in self._names}
            )
            """The model of its arguments."""
            self._validate = bounded(self.arguments.__pydantic_core_schema__).validate_python
            result = hints.get("return", _NOTHING)
            self.result: TypeAdapter[Any] | None = None
            """The type of its result; `None` if it isn't annotated."""
            if result is not _NOTHING:
                self.result = TypeAdapter(type(None) if result is None else result)
        except PydanticUserError as error:
            raise ConfigurationError(f"pydantic can't read the arguments of method {name!r}: {error}") from error

    @property
    def needs_connection(self) -> bool:
        """Whether the function takes the connection. A call by POST has none."""
        return self._connection is not None

    def read(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call in the form that the function takes.

        Raises:
            InvalidArguments: If the arguments don't fit.
        """
        try:
            model: Any = self._validate(arguments)
        except ValidationError as error:
            raise InvalidArguments(mistakes_of(error)) from None
        given = model.model_fields_set  # the function fills in its own defaults
        return {name: getattr(model, f"p{i}") for i, name in enumerate(self._names) if f"p{i}" in given}

    async def run(self, arguments: dict[str, Any], connection: Connection | None) -> Any:
        """Run the function, and return its result in the form of JSON.

        Args:
            arguments: What `read` has returned.
            connection: The connection of the caller; `None` for a call by POST.

        Raises:
            Exception: If the function raises, or pydantic can't write its result.
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
        if self.result is None:
            return result
        checked = self.result.validate_python(result, from_attributes=True)
        return self.result.dump_python(checked, mode="json", by_alias=True)


class Methods:
    """The methods of a manager, by name."""

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}

    def add(self, name: str, function: Callable[..., Any]) -> None:
        """Add a method.

        Raises:
            ConfigurationError: If the name is taken or makes no sense, or the function can't be a method.
        """
        if not isinstance(name, str) or not 0 < len(name) <= 200:
            raise ConfigurationError(f'a method has a name: @manager.method("add"), not {name!r:.80}')
        if name in self._methods:
            raise ConfigurationError(f"there is a method {name!r} already")
        if not callable(function):
            raise ConfigurationError(f"method {name!r} is a function, not {function!r:.80}")
        self._methods[name] = Method(name, function)

    @property
    def by_name(self) -> Mapping[str, Method]:
        """All methods, by name."""
        return self._methods

    def get(self, name: str) -> Method | None:
        """Return the method of a name; `None` if there is none."""
        return self._methods.get(name)


class HasMethods:
    """The decorator of a manager for methods."""

    _methods: Methods

    def method(self, name: str) -> Callable[[F], F]:
        """Let clients that speak `wsbroadcast.v1` call a function: `@manager.method("add")`.

        Pydantic checks the arguments and the result against the function's annotations. A parameter that is annotated
        as `Connection` gets the caller's connection. A `def` function runs in a thread. A router's `authorize` is asked
        about the action `"call"`, with the method's name in place of the channel. Without `authorize`, every connected
        client may call.

        Arguments that don't fit are answered with `invalid_arguments` and their places, without what was sent.
        `CallError` is an answer of your own, `PermissionDenied` is answered with `forbidden`, and anything else is
        logged and answered with `failed`. A connection has 16 calls at once, each for `ClientTiming.call_timeout`. They
        end with the connection. A thread can't be cut off: its call is answered in time, and keeps its place until the
        thread has ended.

        Args:
            name: The name that clients use.

        Raises:
            ConfigurationError: If the name is taken, or pydantic can't read the arguments.
        """

        def add(function: F) -> F:
            self._methods.add(name, function)
            return function

        if callable(name):
            raise ConfigurationError('a method has a name: write @manager.method("add")')
        return add


def _is_connection(annotation: object) -> bool:
    return annotation is Connection or getattr(annotation, "__origin__", None) is Connection


def _field(name: str, parameter: inspect.Parameter, hints: dict[str, Any]) -> Any:
    annotation = hints.get(name, Any)
    if parameter.default is _NOTHING:
        return annotation, Field(alias=name)
    return annotation, Field(default=None, alias=name, json_schema_extra=_forget_default)


def _forget_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)  # a placeholder for the function's own default


def _model(name: str, fields: dict[str, Any]) -> Any:
    # The fields are numbered, because pydantic reserves some names. Clients see the aliases.
    numbered = {f"p{i}": field for i, field in enumerate(fields.values())}
    return create_model(f"arguments of {name}", __config__=ConfigDict(extra="forbid"), **numbered)
