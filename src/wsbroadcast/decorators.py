"""The hook decorators of a manager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from wsbroadcast.hooks import HookChain

F = TypeVar("F", bound=Callable[..., Any])


class HookDecorators:
    """The decorators of a manager, such as `@manager.on_connect`, for functions with a `Hook` method's arguments."""

    hooks: HookChain

    def on_connect(self, function: F) -> F:
        """Run `function(connection)` after a connection was accepted and registered."""
        return self.hooks.add_function("on_connect", function)

    def on_disconnect(self, function: F) -> F:
        """Run `function(connection)` once after a connection ended."""
        return self.hooks.add_function("on_disconnect", function)

    def on_message(self, function: F) -> F:
        """Run `function(connection, message)` before the endpoint gets a message of a peer."""
        return self.hooks.add_function("on_message", function)

    def on_subscribe(self, function: F) -> F:
        """Run `function(connection, channel)` after a connection was subscribed to a channel."""
        return self.hooks.add_function("on_subscribe", function)

    def on_unsubscribe(self, function: F) -> F:
        """Run `function(connection, channel)` after a connection left a channel."""
        return self.hooks.add_function("on_unsubscribe", function)

    def on_broadcast(self, function: F) -> F:
        """Run `function(message, audience)` before each broadcast; it returns the message, another one, or `None`."""
        return self.hooks.add_function("on_broadcast", function)

    def on_deliver(self, function: F) -> F:
        """Run `function(delivery)` before each broadcast reaches this node's recipients."""
        return self.hooks.add_function("on_deliver", function)

    def on_gap(self, function: F) -> F:
        """Run `function(gap)` when messages from other nodes may be missing."""
        return self.hooks.add_function("on_gap", function)

    def on_error(self, function: F) -> F:
        """Run `function(error, where)` when a hook failed."""
        return self.hooks.add_function("on_error", function)
