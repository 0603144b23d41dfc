"""Clients of centrifuge-python, JSON and Protobuf, that do what `centrifuge.mjs` lets those of JavaScript do."""

# The SDK isn't installed for who checks types: a test puts it on the path of a process of its own.
# mypy: ignore-errors

from __future__ import annotations

import asyncio
import json
import sys

from centrifuge import (
    CentrifugeError,
    Client,
    ClientEventHandler,
    StreamPosition,
    SubscriptionEventHandler,
    UnauthorizedError,
)


def plain(data):
    return json.loads(data or b"null") if isinstance(data, bytes) else data


def who(info):
    return info and {
        "client": info.client,
        "user": info.user,
        "conn_info": plain(info.conn_info),
        "chan_info": plain(info.chan_info),
    }


def publication(each):
    return {"data": plain(each.data), "offset": each.offset or 0, "info": who(each.info)}


def told(event, ctx):
    if event == "publication":
        return publication(ctx.pub)
    if event in ("join", "leave"):
        return {"info": who(ctx.info)}
    if event == "subscribed":
        position = ctx.stream_position and {"offset": ctx.stream_position.offset, "epoch": ctx.stream_position.epoch}
        return {
            "position": position,
            "was_recovering": ctx.was_recovering,
            "recovered": ctx.recovered,
            "data": plain(ctx.data),
        }
    if event == "connected":
        return {"client": ctx.client, "data": plain(ctx.data)}
    if event == "error":
        return {"code": ctx.code, "message": str(ctx.error)}
    return {name: getattr(ctx, name) for name in ("code", "reason") if hasattr(ctx, name)}


def log_of(kind, log, events, channel=None):
    """Make a handler of the SDK that writes what it is told."""

    def handler(event):
        async def on(self, ctx):
            log.append({"on": event, "channel": channel or getattr(ctx, "channel", None), **told(event, ctx)})

        return on

    return type("Log", (kind,), {f"on_{event}": handler(event) for event in events})()


OF_SUBSCRIPTIONS = ("subscribing", "subscribed", "unsubscribed", "publication", "join", "leave", "error")
OF_CLIENTS = ("connecting", "connected", "disconnected", *OF_SUBSCRIPTIONS)


class Tab:
    def __init__(self, url, *, protobuf=False, tokens=None, token="", data=None, maxServerPingDelay=10_000, **_):  # noqa: N803
        self.log = []
        self.is_protobuf = protobuf
        self.client = Client(
            url,
            log_of(ClientEventHandler, self.log, OF_CLIENTS),
            use_protobuf=protobuf,
            token=token,
            get_token=self.tokens("get_token", tokens),
            data=None if data is None else self.encoded(data),
            min_reconnect_delay=0.05,
            max_reconnect_delay=0.5,
            max_server_ping_delay=maxServerPingDelay / 1000,
            proxy=None,
        )

    def encoded(self, data):
        return json.dumps(data).encode() if self.is_protobuf else data

    def tokens(self, name, tokens):
        async def give(*_):
            self.log.append({"on": name})
            token = tokens.pop(0) if len(tokens) > 1 else tokens[0]
            if token is None:
                raise UnauthorizedError
            return token

        return give if tokens else None


TABS = {}


async def answer(call):
    try:
        return await call
    except CentrifugeError as error:
        return {"error": {"code": getattr(error, "code", None), "message": str(error)}}


async def act(do, tab, options):
    if do == "open":
        it = TABS[tab] = Tab(**options)
        if options.get("connect", True):
            await it.client.connect()
        return None
    it = TABS[tab]
    client, channel = it.client, options.get("channel")
    sub = client.get_subscription(channel) if channel else None
    if do in ("connect", "disconnect"):
        return await getattr(client, do)()
    if do == "subscribe":
        return await (sub or new_subscription(it, **options)).subscribe()
    if do in ("unsubscribe", "remove"):
        await sub.unsubscribe()
        return client.remove_subscription(sub) if do == "remove" else None
    if do == "cut":
        return client._conn.transport.abort()
    if do == "look":
        states = {name: each.state.value for name, each in client.subscriptions().items()}
        return {"state": client.state.value, "log": it.log, "subscriptions": states}
    return await answer(ask(do, it, channel, options))


def new_subscription(it, channel, tokens=None, state=None, data=None, token="", **_):
    async def get_state(_):
        it.log.append({"on": "get_state", "channel": channel})
        found = state.pop(0) if len(state) > 1 else state[0]
        return StreamPosition(found["offset"], found["epoch"])

    return it.client.new_subscription(
        channel,
        log_of(SubscriptionEventHandler, it.log, OF_SUBSCRIPTIONS, channel),
        token=token,
        get_token=it.tokens("get_subscription_token", tokens),
        data=None if data is None else it.encoded(data),
        min_resubscribe_delay=0.05,
        max_resubscribe_delay=0.5,
        get_state=get_state if state else None,
    )


async def ask(do, it, channel, options):
    client = it.client
    if do == "publish":
        await client.publish(channel, it.encoded(options["data"]))
        return {}
    if do == "rpc":
        return {"data": plain((await client.rpc(options["method"], it.encoded(options["data"]))).data)}
    if do == "history":
        since = options.get("since") and StreamPosition(options["since"]["offset"], options["since"]["epoch"])
        found = await client.history(channel, options.get("limit", 0), since, options.get("reverse", False))
        publications = [publication(each) for each in found.publications]
        return {"publications": publications, "offset": found.offset, "epoch": found.epoch}
    if do == "presence":
        return {"clients": {key: who(each) for key, each in (await client.presence(channel)).clients.items()}}
    if do == "presence_stats":
        found = await client.presence_stats(channel)
        return {"num_clients": found.num_clients, "num_users": found.num_users}
    raise ValueError(do)


async def main():
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        print(json.dumps(await act(command.pop("do"), command.pop("tab"), command)), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
