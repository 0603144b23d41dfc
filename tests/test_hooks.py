from __future__ import annotations

import asyncio
import copy
import logging
import pickle
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from functools import partial
from inspect import signature
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Optional, cast, get_args
from unittest.mock import MagicMock

import pytest
from starlette.websockets import WebSocket

from wsbroadcast import (
    HOLD_BACK,
    Audience,
    ConfigurationError,
    Connection,
    ConnectionManager,
    Delivery,
    EncodeError,
    HoldBack,
    Hook,
    Message,
    PermissionDenied,
)
from wsbroadcast.audience import EVERYONE
from wsbroadcast.hooks import HookChain, HookEvent, is_delivering
from wsbroadcast.stats import Counters

if TYPE_CHECKING:
    from decimal import Decimal as Unimported

EVENTS = get_args(HookEvent)
OBSERVED = [event for event in EVENTS if event not in ("on_broadcast", "on_deliver", "on_error")]
REFUSABLE = ["on_connect", "on_subscribe", "on_message"]
MESSAGE = Message.of("text")


def chain_of(timeout: float = 5.0) -> tuple[HookChain, Counters]:
    counters = Counters()
    return HookChain(timeout, counters), counters


def chain_with(
    event: HookEvent, hook: Callable[..., Any], timeout: float = 5.0
) -> tuple[HookChain, Counters, list[Any]]:
    """A chain with a hook; the list has the arguments of a hook behind it."""
    chain, counters = chain_of(timeout)
    after: list[Any] = []
    chain.add_function(event, hook)
    chain.add_function(event, lambda *args: after.append(args))
    return chain, counters, after


def connection_named(name: str) -> Connection:
    return cast(Connection, SimpleNamespace(id=name))


def delivery_to(*names: str) -> Delivery:
    return Delivery(MESSAGE, EVERYONE, [connection_named(name) for name in names])


def hook_that(behave: Callable[[], Any], is_async: bool) -> Callable[..., Any]:
    """A hook for any event, `async def` or `def`."""

    def hook(*args: object) -> Any:
        return behave()

    async def async_hook(*args: object) -> Any:
        await asyncio.sleep(0)
        return behave()

    return async_hook if is_async else hook


def fail() -> None:
    raise KeyError("mine")


both = pytest.mark.parametrize("is_async", [False, True], ids=["def", "async def"])


# Which hooks run.


async def test_only_overridden_methods_are_ever_called() -> None:
    class Greeter(Hook):
        async def on_connect(self, connection: Connection) -> None: ...

    chain, _ = chain_of()
    chain.add(Greeter())
    assert [event for event in EVENTS if chain.has(event)] == ["on_connect"]
    chain.add(Hook())
    assert [event for event in EVENTS if chain.has(event)] == ["on_connect"]


@pytest.mark.parametrize("hook", [None, "hook", Hook, object()])
def test_what_is_no_hook_is_refused(hook: Any) -> None:
    chain, _ = chain_of()
    with pytest.raises(ConfigurationError, match="an instance of Hook"):
        chain.add(hook)


async def test_hooks_that_override_nothing_change_nothing() -> None:
    hook = Hook()
    connection = connection_named("1")
    assert await cast(Any, hook.on_broadcast(MESSAGE, EVERYONE)) is None
    delivery = delivery_to("1", "2")
    await cast(Any, hook.on_deliver(delivery))
    assert [recipient.id for recipient in delivery.recipients] == ["1", "2"]
    for result in (
        hook.on_connect(connection),
        hook.on_disconnect(connection),
        hook.on_message(connection, "text"),
        hook.on_subscribe(connection, "a"),
        hook.on_unsubscribe(connection, "a"),
        hook.on_gap(cast(Any, None)),
        hook.on_error(KeyError(), "where"),
    ):
        await cast(Any, result)


@pytest.mark.parametrize("event", OBSERVED)
async def test_observers_run_in_the_order_in_which_they_were_given(event: HookEvent) -> None:
    chain, _ = chain_of()
    seen: list[tuple[str, tuple[object, ...]]] = []

    async def first(*args: object) -> None:
        await asyncio.sleep(0)
        seen.append(("first", args))

    def second(*args: object) -> None:
        seen.append(("second", args))

    chain.add_function(event, first)
    chain.add_function(event, second)
    await chain.observe(event, 1, "two")
    assert seen == [("first", (1, "two")), ("second", (1, "two"))]


@pytest.mark.parametrize("event", EVENTS)
@both
def test_decorator_adds_a_function_and_returns_it(event: HookEvent, is_async: bool) -> None:
    manager = ConnectionManager()
    function = hook_that(lambda: None, is_async)
    assert not manager.hooks.has(event)
    assert getattr(manager, event)(function) is function
    assert [each for each in EVENTS if manager.hooks.has(each)] == [event]


# Observers fail open.


@pytest.mark.parametrize("event", OBSERVED)
@both
async def test_observer_that_raises_stops_nobody(
    event: HookEvent, is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    chain, counters, seen = chain_with(event, hook_that(fail, is_async))
    errors: list[tuple[Exception, str]] = []
    chain.add_function("on_error", lambda error, where: errors.append((error, where)))
    await chain.observe(event, "argument")
    assert seen == [("argument",)]
    assert counters.hook_errors == 1
    [(error, where)] = errors
    assert isinstance(error, KeyError)
    assert where.startswith(f"{event} hook hook_that")
    assert where in caplog.text
    assert "KeyError: 'mine'" in caplog.text


@both
async def test_failing_error_hook_stops_nobody(is_async: bool, caplog: pytest.LogCaptureFixture) -> None:
    chain, counters = chain_of()
    seen: list[str] = []
    chain.add_function("on_connect", hook_that(fail, is_async))
    chain.add_function("on_error", hook_that(fail, is_async))
    chain.add_function("on_error", lambda error, where: seen.append(where))
    await chain.observe("on_connect", connection_named("1"))
    assert len(seen) == 1
    assert counters.hook_errors == 2
    assert "on_error hook hook_that" in caplog.text


@pytest.mark.parametrize("event", REFUSABLE)
@both
async def test_observer_may_refuse_on_purpose(event: HookEvent, is_async: bool) -> None:
    def refuse() -> None:
        raise PermissionDenied("no")

    chain, counters, after = chain_with(event, hook_that(refuse, is_async))
    errors: list[object] = []
    chain.add_function("on_error", lambda *args: errors.append(args))
    with pytest.raises(PermissionDenied, match="no"):
        await chain.observe(event, "argument")
    assert (after, errors, counters.hook_errors) == ([], [], 0)  # on purpose is no failure


@pytest.mark.parametrize("event", REFUSABLE)
async def test_observer_may_refuse_out_of_a_task_group(event: HookEvent) -> None:
    async def deny() -> None:
        await asyncio.sleep(0)  # a task that starts eagerly would fail inside `create_task`
        raise PermissionDenied("no")

    async def refuse(*args: object) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(deny())

    chain, counters, _ = chain_with(event, refuse)
    with pytest.raises(PermissionDenied, match="no"):
        await chain.observe(event, "argument")
    assert counters.hook_errors == 0


# What a guard returns.


async def check(*args: object) -> None:
    raise PermissionDenied("no")


def generate(*args: object) -> Iterator[None]:
    yield


async def generate_async(*args: object) -> AsyncIterator[None]:
    yield


async def forget_await(*args: object) -> object:
    return check(*args)


UNFINISHED = pytest.mark.parametrize(
    ("hook", "why"),
    [
        (forget_await, "a coroutine that nobody awaits"),
        (generate, "a generator, and nothing of it has run"),
        (generate_async, "a generator, and nothing of it has run"),
    ],
)


@pytest.mark.parametrize("event", REFUSABLE)
@UNFINISHED
async def test_guard_that_has_not_run_refuses(
    event: HookEvent, hook: Callable[..., Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    chain, counters, _ = chain_with(event, hook)
    with pytest.raises(PermissionDenied, match="not allowed"):
        await chain.observe(event, "argument")
    assert counters.hook_errors == 1
    assert why in str(caplog.records[0].exc_info)


@pytest.mark.parametrize("event", [event for event in OBSERVED if event not in REFUSABLE])
@UNFINISHED
async def test_observer_that_has_not_run_is_an_error(event: HookEvent, hook: Callable[..., Any], why: str) -> None:
    chain, counters, _ = chain_with(event, hook)
    await chain.observe(event, "argument")
    assert counters.hook_errors == 1


@UNFINISHED
async def test_broadcast_hook_that_has_not_run_holds_the_message_back(hook: Callable[..., Any], why: str) -> None:
    chain, counters, _ = chain_with("on_broadcast", hook)
    with pytest.raises(ConfigurationError, match=f"on_broadcast hook .* returned is {why}"):
        await chain.transform(MESSAGE, EVERYONE)
    chain.add_function("on_deliver", hook)
    with pytest.raises(ConfigurationError, match=f"on_deliver hook .* returned is {why}"):
        await chain.deliver(delivery_to("a"))
    assert counters.hook_errors == 2


@pytest.mark.parametrize("event", REFUSABLE)
@both
async def test_guard_may_return_false(event: HookEvent, is_async: bool) -> None:
    chain, counters, after = chain_with(event, hook_that(lambda: False, is_async))
    with pytest.raises(PermissionDenied, match="not allowed"):
        await chain.observe(event, "argument")
    assert (after, counters.hook_errors) == ([], 0)


@pytest.mark.parametrize("event", OBSERVED)
@pytest.mark.parametrize("result", [None, 0, "", True, "text", {}])
async def test_observer_may_return_anything_else(event: HookEvent, result: object) -> None:
    chain, counters, _ = chain_with(event, lambda *args: result)
    await chain.observe(event, "argument")
    assert counters.hook_errors == 0


@pytest.mark.parametrize("event", REFUSABLE)
async def test_guard_that_is_no_coroutine_function_is_awaited(event: HookEvent) -> None:
    chain, counters, _ = chain_with(event, lambda *args: check(*args))
    with pytest.raises(PermissionDenied, match="no"):
        await chain.observe(event, "argument")
    assert counters.hook_errors == 0


async def test_group_with_an_error_in_it_is_an_error_of_the_hook() -> None:
    def refuse(*args: object) -> None:
        raise ExceptionGroup("two", [PermissionDenied("no"), KeyError("broken")])

    chain, counters, _ = chain_with("on_connect", refuse)
    await chain.observe("on_connect", "argument")
    assert counters.hook_errors == 1


@pytest.mark.parametrize("event", [event for event in OBSERVED if event not in REFUSABLE])
async def test_what_can_not_be_refused_is_an_error_like_others(event: HookEvent) -> None:
    def refuse(*args: object) -> None:
        raise PermissionDenied("no")

    chain, counters, after = chain_with(event, refuse)
    await chain.observe(event, "argument")
    assert after == [("argument",)]
    assert counters.hook_errors == 1


# A hook that hangs, or is cancelled.


async def test_observer_that_hangs_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    cleaned_up: list[bool] = []

    async def hang(connection: Connection) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cleaned_up.append(True)

    chain, counters, after = chain_with("on_connect", hang, timeout=0.05)
    async with asyncio.timeout(5):
        await chain.observe("on_connect", "argument")
    assert (cleaned_up, after) == ([True], [("argument",)])
    assert counters.hook_errors == 1
    assert "was cut off after 0.05 s" in caplog.text
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("event", ["on_broadcast", "on_deliver"])
async def test_broadcast_hook_that_hangs_is_cut_off_and_the_caller_told(event: HookEvent) -> None:
    chain, counters = chain_of(timeout=0.05)

    async def hang(*args: object) -> None:
        await asyncio.get_running_loop().create_future()

    chain.add_function(event, hang)
    async with asyncio.timeout(5):
        with pytest.raises(TimeoutError, match=rf"{event} hook .*hang was cut off after 0\.05 s"):
            await run(chain, event)
    assert counters.hook_errors == 1


async def test_hook_that_swallows_its_end_is_not_cancelled_twice() -> None:
    chain, _ = chain_of(timeout=0.02)
    seen: list[str] = []

    async def stubborn(connection: Connection) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            seen.append("swallowed")
        await asyncio.sleep(0.05)
        seen.append("finished")

    chain.add_function("on_connect", stubborn)
    async with asyncio.timeout(5):
        await chain.observe("on_connect", "argument")
    assert seen == ["swallowed", "finished"]
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_timeout_error_of_the_hook_itself_is_not_taken_for_ours() -> None:
    chain, _ = chain_of()
    errors: list[Exception] = []

    async def wait_for_a_database(connection: Connection) -> None:
        raise TimeoutError("the database")

    chain.add_function("on_connect", wait_for_a_database)
    chain.add_function("on_error", lambda error, where: errors.append(error))
    await chain.observe("on_connect", "argument")
    assert [str(error) for error in errors] == ["the database"]


@both
async def test_hook_that_raises_cancelled_error_itself_is_an_error(is_async: bool) -> None:
    def cancel_oneself() -> None:
        raise asyncio.CancelledError

    chain, counters, after = chain_with("on_connect", hook_that(cancel_oneself, is_async))
    await chain.observe("on_connect", "argument")
    assert after == [("argument",)]
    assert counters.hook_errors == 1
    chain.add_function("on_broadcast", hook_that(cancel_oneself, is_async))
    with pytest.raises(RuntimeError, match="was cancelled from within"):
        await chain.transform(MESSAGE, EVERYONE)


async def test_hook_that_awaits_what_was_cancelled_is_an_error() -> None:
    chain, counters = chain_of()

    async def wait_for_cancelled_work(connection: Connection) -> None:
        task = asyncio.ensure_future(asyncio.sleep(60))
        asyncio.get_running_loop().call_soon(task.cancel)
        await task

    chain.add_function("on_connect", wait_for_cancelled_work)
    await chain.observe("on_connect", "argument")
    assert counters.hook_errors == 1


@pytest.mark.parametrize("event", ["on_connect", "on_broadcast", "on_deliver"])
async def test_cancelled_caller_is_cancelled_and_nothing_else_runs(event: HookEvent) -> None:
    started = asyncio.Event()

    async def wait(*args: object) -> None:
        started.set()
        await asyncio.get_running_loop().create_future()

    chain, counters, after = chain_with(event, wait)
    caller = asyncio.ensure_future(run(chain, event))
    await started.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert (after, counters.hook_errors) == ([], 0)


async def run(chain: HookChain, event: HookEvent) -> None:
    if event == "on_broadcast":
        await chain.transform(MESSAGE, EVERYONE)
    elif event == "on_deliver":
        await chain.deliver(delivery_to("1"))
    else:
        await chain.observe(event, "argument")


async def test_hook_may_return_any_awaitable() -> None:
    class Later:
        def __await__(self) -> Generator[Any, None, str]:
            yield from asyncio.sleep(0).__await__()
            return "later"

    chain, _ = chain_of()
    hooks: list[Callable[..., Awaitable[object]]] = [
        lambda message, audience: Later(),
        lambda message, audience: asyncio.ensure_future(asyncio.sleep(0, "task")),
    ]
    for hook, expected in zip(hooks, ["later", "task"], strict=True):
        chain, _, _ = chain_with("on_broadcast", hook)
        message = await chain.transform(MESSAGE, EVERYONE)
        assert message is not None
        assert message.data == expected


async def test_errors_thrown_into_a_hook_reach_it() -> None:
    chain, _ = chain_of()
    caught: list[str] = []

    async def careful(connection: Connection) -> None:
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_exception, KeyError("from the future"))
        try:
            await future
        except KeyError as error:
            caught.append(error.args[0])

    chain.add_function("on_connect", careful)
    await chain.observe("on_connect", "argument")
    assert caught == ["from the future"]


# on_broadcast.


@both
async def test_broadcast_hooks_change_what_the_one_before_returned(is_async: bool) -> None:
    chain, counters = chain_of()

    def add(letter: str) -> Callable[..., Any]:
        def change(message: Message, audience: Audience) -> object:
            assert audience == EVERYONE
            return f"{message.data!s}{letter}"

        async def change_later(message: Message, audience: Audience) -> object:
            await asyncio.sleep(0)
            return change(message, audience)

        return change_later if is_async else change

    chain.add_function("on_broadcast", add("1"))
    chain.add_function("on_broadcast", add("2"))
    message = await chain.transform(Message.of("text", "key"), EVERYONE)
    assert message is not None
    assert (message.data, message.key) == ("text12", "key")
    assert counters.vetoed == counters.hook_errors == 0


async def test_broadcast_hook_may_return_the_message_itself() -> None:
    chain, _, _ = chain_with("on_broadcast", lambda message, audience: message)
    assert await chain.transform(MESSAGE, EVERYONE) is MESSAGE


@both
async def test_broadcast_hook_holds_the_message_back(is_async: bool) -> None:
    chain, counters, after = chain_with("on_broadcast", hook_that(lambda: HOLD_BACK, is_async))
    assert await chain.transform(MESSAGE, EVERYONE) is None
    assert (after, counters.vetoed, counters.hook_errors) == ([], 1, 0)


@both
async def test_broadcast_hook_that_returns_nothing_changes_nothing(is_async: bool) -> None:
    """As one that only writes a log."""
    chain, counters, _ = chain_with("on_broadcast", hook_that(lambda: None, is_async))
    assert await chain.transform(MESSAGE, EVERYONE) is MESSAGE
    chain.add_function("on_broadcast", lambda message, audience: "changed")
    chain.add_function("on_broadcast", hook_that(lambda: None, is_async))
    message = await chain.transform(MESSAGE, EVERYONE)
    assert message is not None
    assert (message.data, counters.vetoed, counters.hook_errors) == ("changed", 0, 0)


@pytest.mark.parametrize("same", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_hold_back_is_one_object_that_says_what_it_is(same: Callable[[object], object]) -> None:
    assert same(HOLD_BACK) is HOLD_BACK
    assert repr(HOLD_BACK) == "HOLD_BACK"
    assert isinstance(HOLD_BACK, HoldBack)


def test_hold_back_is_no_message() -> None:
    with pytest.raises(EncodeError):
        Message.of(HOLD_BACK)


KEYS = [("text", "caller"), (Message.of("text"), "caller"), (Message.of("text", "mine"), "mine")]


@pytest.mark.parametrize(("result", "key"), KEYS)
async def test_message_of_a_broadcast_hook_keeps_its_own_key(result: object, key: str) -> None:
    chain, _, _ = chain_with("on_broadcast", lambda message, audience: result)
    message = await chain.transform(Message.of("before", "caller"), EVERYONE)
    assert message is not None
    assert (message.data, message.key) == ("text", key)


@pytest.mark.parametrize(("result", "key"), KEYS)
def test_message_for_one_recipient_keeps_its_own_key(result: object, key: str) -> None:
    [recipient] = recipients = [connection_named("1")]
    delivery = Delivery(Message.of("before", "caller"), EVERYONE, recipients)
    delivery.replace(recipient, result)
    [message] = [message for message, some in delivery._parts() if some]
    assert (message.data, message.key) == ("text", key)


# Annotations of hooks that were written when None held a message back.


def one(value: object) -> Message | None: ...
async def guard(message: Message, audience: Audience) -> Message | None: ...
def old_guard(message: Message, audience: Audience) -> Optional[Message]: ...  # noqa: UP045
def later(message: Message, audience: Audience) -> Awaitable[Message | None]: ...  # type: ignore[empty-body]
async def typed_only(message: Message, audience: Audience) -> Unimported | None: ...
async def watch(message: Message, audience: Audience) -> None: ...
async def explicit(message: Message, audience: Audience) -> Message | HoldBack: ...  # type: ignore[empty-body]
async def nested(message: Message, audience: Audience) -> dict[str, int | None]: ...  # type: ignore[empty-body]
async def bare(message, audience): ...  # type: ignore[no-untyped-def]
async def nonsense(message: Message, audience: Audience) -> object: ...


nonsense.__annotations__["return"] = "1 +"


class Guard(Hook):
    async def on_broadcast(self, message: Message, audience: Audience) -> Message | None: ...


class Called:
    def __call__(self, message: Message, audience: Audience) -> Message | None: ...


@pytest.mark.parametrize(
    ("hook", "is_warned"),
    [
        (guard, True),
        (old_guard, True),
        (later, True),
        (typed_only, True),
        (Guard().on_broadcast, True),
        (Called(), True),
        (partial(guard), True),
        (watch, False),
        (explicit, False),
        (nested, False),
        (bare, False),
        (nonsense, False),
        (MagicMock(), False),
        (print, False),
        (Hook().on_broadcast, False),
    ],
)
def test_broadcast_hook_that_may_return_none_is_warned_of(
    hook: Callable[..., Any], is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    chain_with("on_broadcast", hook)
    warnings = [record.getMessage() for record in caplog.records if record.name == "wsbroadcast"]
    assert len(warnings) == is_warned
    assert all("may return None" in text and "return HOLD_BACK" in text for text in warnings)


@pytest.mark.parametrize("event", [event for event in EVENTS if event != "on_broadcast"])
def test_other_hooks_may_return_none(event: HookEvent, caplog: pytest.LogCaptureFixture) -> None:
    chain_with(event, one if len(signature(getattr(Hook, event)).parameters) == 2 else guard)
    assert not caplog.records


@pytest.mark.parametrize("event", ["on_broadcast", "on_deliver"])
@both
async def test_broadcast_hook_that_raises_tells_the_caller(event: HookEvent, is_async: bool) -> None:
    chain, counters, after = chain_with(event, hook_that(fail, is_async))
    errors: list[object] = []
    chain.add_function("on_error", lambda *args: errors.append(args))
    with pytest.raises(KeyError, match="mine"):
        await run(chain, event)
    assert (after, counters.hook_errors) == ([], 1)
    assert errors == []  # the caller has it


async def test_broadcast_hook_that_returns_what_can_not_be_sent_is_an_error() -> None:
    chain, counters, _ = chain_with("on_broadcast", lambda message, audience: object())
    with pytest.raises(EncodeError):
        await chain.transform(MESSAGE, EVERYONE)
    assert counters.hook_errors == 1


# on_deliver.


def parts_of(delivery: Delivery) -> list[tuple[object, list[str]]]:
    return [(message.data, [recipient.id for recipient in some]) for message, some in delivery._parts()]


def test_delivery_untouched_is_one_part() -> None:
    assert parts_of(delivery_to("1", "2")) == [("text", ["1", "2"])]


async def test_deliver_hook_may_remove_recipients_and_give_some_another_message() -> None:
    chain, _ = chain_of()

    async def personal(delivery: Delivery) -> None:
        await asyncio.sleep(0)
        one, two, _three = delivery.recipients
        delivery.recipients = delivery.recipients[:2]
        delivery.replace(two, {"for": "you"})
        assert one.id == "1"

    chain.add_function("on_deliver", personal)
    delivery = delivery_to("1", "2", "3")
    await chain.deliver(delivery)
    assert parts_of(delivery) == [("text", ["1"]), ('{"for":"you"}', ["2"])]


async def test_delivering_is_known_inside_the_hook_only() -> None:
    chain, _ = chain_of()
    seen: list[bool] = []
    chain.add_function("on_deliver", lambda delivery: seen.append(is_delivering()))
    chain.add_function("on_deliver", hook_that(fail, is_async=True))
    with pytest.raises(KeyError):
        await chain.deliver(delivery_to("1"))
    assert seen == [True]
    assert not is_delivering()


def test_recipient_that_was_removed_gets_no_message_of_its_own() -> None:
    delivery = delivery_to("1", "2")
    delivery.replace(delivery.recipients[1], "personal")
    del delivery.recipients[1]
    assert parts_of(delivery) == [("text", ["1"])]


def test_last_replacement_counts() -> None:
    delivery = delivery_to("1")
    delivery.replace(delivery.recipients[0], "first")
    delivery.replace(delivery.recipients[0], "second")
    assert parts_of(delivery) == [("text", []), ("second", ["1"])]


async def delivered(change: Callable[[Delivery], object], *names: str) -> list[tuple[object, list[str]]]:
    chain, _, _ = chain_with("on_deliver", change)
    delivery = delivery_to(*names)
    await chain.deliver(delivery)
    return parts_of(delivery)


def doubled_by_append(delivery: Delivery) -> None:
    delivery.recipients.append(delivery.recipients[0])


def doubled_by_extend(delivery: Delivery) -> None:
    delivery.recipients.extend(delivery.recipients)


def doubled_by_assignment(delivery: Delivery) -> None:
    delivery.recipients = [*delivery.recipients, *reversed(delivery.recipients)]


@pytest.mark.parametrize("change", [doubled_by_append, doubled_by_extend, doubled_by_assignment])
@pytest.mark.parametrize("instead", [False, True])
async def test_recipient_that_is_there_twice_is_taken_once(change: Callable[[Delivery], None], instead: bool) -> None:
    def hook(delivery: Delivery) -> None:
        if instead:
            delivery.replace(delivery.recipients[0], "personal")
        change(delivery)

    parts = await delivered(hook, "1", "2")
    assert parts == ([("text", ["2"]), ("personal", ["1"])] if instead else [("text", ["1", "2"])])


async def test_each_hook_sees_what_the_one_before_it_left_once() -> None:
    chain, _ = chain_of()
    seen: list[int] = []
    chain.add_function("on_deliver", doubled_by_extend)
    chain.add_function("on_deliver", lambda delivery: seen.append(len(delivery.recipients)))
    await chain.deliver(delivery_to("1", "2"))
    assert seen == [2]


@pytest.mark.parametrize("kind", [tuple, iter, lambda some: {one.id: one for one in some}.values()])
async def test_recipients_may_be_assigned_in_any_form(kind: Callable[[Any], Any]) -> None:
    def hook(delivery: Delivery) -> None:
        delivery.recipients = kind(delivery.recipients[1:])

    assert await delivered(hook, "1", "2", "3") == [("text", ["2", "3"])]


@pytest.mark.parametrize("stranger", [None, "1", MagicMock(spec=WebSocket)])
async def test_recipient_that_is_no_connection_is_an_error(stranger: Any) -> None:
    with pytest.raises(TypeError, match="is a Connection, not"):
        await delivered(lambda delivery: delivery.recipients.append(stranger), "1")
    with pytest.raises(TypeError, match="is a Connection, not"):
        await delivered(lambda delivery: delivery.replace(stranger, "personal"), "1")


async def test_recipients_that_are_no_list_are_an_error() -> None:
    def hook(delivery: Delivery) -> None:
        delivery.recipients = None  # type: ignore[assignment]  # what the test is about

    with pytest.raises(TypeError, match=r"Delivery\.recipients is a list"):
        await delivered(hook, "1")


def test_replacement_must_be_sendable() -> None:
    delivery = delivery_to("1")
    with pytest.raises(EncodeError):
        delivery.replace(delivery.recipients[0], "\ud800")
    assert parts_of(delivery) == [("text", ["1"])]


# A hook that blocks.


@both
async def test_hook_that_blocks_the_loop_is_named(is_async: bool, caplog: pytest.LogCaptureFixture) -> None:
    chain, counters = chain_of(timeout=0.01)
    chain.blocked_seconds = 0.05
    chain.add_function("on_connect", hook_that(lambda: time.sleep(0.06), is_async))
    with caplog.at_level(logging.WARNING, "wsbroadcast"):
        await chain.observe("on_connect", "argument")
    [warning] = [record.getMessage() for record in caplog.records if record.name == "wsbroadcast"][:1]
    assert warning.startswith("on_connect hook hook_that")
    assert re.search(r"blocked the event loop for 0\.\d s", warning)
    assert "asyncio.to_thread" in warning
    assert counters.hook_errors == 0  # it ended by itself, so there is nothing to cut off


async def test_hook_that_waits_is_not_named(caplog: pytest.LogCaptureFixture) -> None:
    chain, _ = chain_of()
    chain.blocked_seconds = 0.05

    async def wait(connection: Connection) -> None:
        await asyncio.sleep(2 * chain.blocked_seconds)

    chain.add_function("on_connect", wait)
    await chain.observe("on_connect", "argument")
    assert not [record for record in caplog.records if record.name == "wsbroadcast"]
