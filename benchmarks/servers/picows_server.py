"""picows: frames written in Cython; a set of transports per channel."""

import json
from collections import defaultdict

from _serve import options, run
from picows import WSFrame, WSListener, WSMsgType, WSTransport, WSUpgradeRequest, ws_create_server

channels: defaultdict[bytes, set[WSTransport]] = defaultdict(set)


class Listener(WSListener):
    def __init__(self, path: bytes) -> None:
        self.is_loop = path == b"/loop"
        self.transports = channels[b"/ws" if self.is_loop else path]

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transports.add(transport)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self.transports.discard(transport)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type != WSMsgType.TEXT:
            return
        if self.is_loop:
            for message in json.loads(frame.get_payload_as_bytes()):
                self.broadcast(message.encode())
        else:
            self.broadcast(frame.get_payload_as_bytes())

    def broadcast(self, payload: bytes) -> None:
        for transport in self.transports:
            transport.send(WSMsgType.TEXT, payload)


def listen(request: WSUpgradeRequest) -> Listener:
    return Listener(request.path)


async def main(port: int) -> None:
    server = await ws_create_server(listen, "127.0.0.1", port, backlog=4096, enable_auto_pong=False)
    await server.serve_forever()


if __name__ == "__main__":
    run(main(options().port), options().loop)
