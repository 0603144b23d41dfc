"""Litestar's channels plug-in with its memory backend."""

from _serve import CHANNEL, serve
from litestar import Litestar, WebSocket, websocket
from litestar.channels import ChannelsPlugin
from litestar.channels.backends.memory import MemoryChannelsBackend
from litestar.exceptions import WebSocketDisconnect


async def _serve_channel(socket: WebSocket, channels: ChannelsPlugin, channel: str) -> None:
    await socket.accept()
    async with (
        channels.start_subscription(channel) as subscriber,
        subscriber.run_in_background(socket.send_text, join=False),
    ):
        try:
            while True:
                data = await socket.receive_text()
                await channels.wait_published(data, channel)
        except WebSocketDisconnect:
            pass


@websocket("/ws")
async def everyone(socket: WebSocket, channels: ChannelsPlugin) -> None:
    await _serve_channel(socket, channels, CHANNEL)


@websocket("/ws/{channel:str}")
async def of_a_channel(socket: WebSocket, channels: ChannelsPlugin, channel: str) -> None:
    await _serve_channel(socket, channels, channel)


app = Litestar(
    [everyone, of_a_channel],
    plugins=[ChannelsPlugin(backend=MemoryChannelsBackend(), arbitrary_channels_allowed=True)],
)

if __name__ == "__main__":
    serve(app)
