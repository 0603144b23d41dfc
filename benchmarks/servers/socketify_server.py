"""socketify: uWebSockets, in C++, behind Python handlers; channels are its topics.

`app.run()` would ask libuv again and again from an asyncio loop, at full load even when nothing happens. No handler
here awaits anything, so libuv's own loop runs instead and sleeps while it waits: the cheapest way to use uWebSockets.
"""

import json

from _serve import CHANNEL, options
from socketify import App, CompressOptions, OpCode

chosen = options()
app = App()


def upgrade(response, request, context) -> None:
    response.upgrade(
        request.get_header("sec-websocket-key"),
        request.get_header("sec-websocket-protocol"),
        request.get_header("sec-websocket-extensions"),
        context,
        {"path": request.get_url()},
    )


def topic_of(websocket) -> str:
    path = websocket.get_user_data()["path"]
    return CHANNEL if path in ("/ws", "/loop") else path


def opened(websocket) -> None:
    websocket.subscribe(topic_of(websocket))


def received(websocket, message, opcode) -> None:
    if websocket.get_user_data()["path"] == "/loop":
        for one in json.loads(message):
            app.publish(CHANNEL, one, OpCode.TEXT, chosen.deflate)
    else:
        app.publish(topic_of(websocket), message, OpCode.TEXT, chosen.deflate)


app.ws(
    "/*",
    {
        "compression": CompressOptions.SHARED_COMPRESSOR if chosen.deflate else CompressOptions.DISABLED,
        "max_payload_length": 1024 * 1024,
        "max_backpressure": 1024 * 1024,
        "idle_timeout": 0,
        "upgrade": upgrade,
        "open": opened,
        "message": received,
    },
)
app.listen({"port": chosen.port, "host": "127.0.0.1"}, lambda config: None)
app.loop.uv_loop.run()
