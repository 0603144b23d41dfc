"""The class that FastAPI's tutorial has its readers write, for the demo to compare with.

It is the tutorial's own, with types added:
https://fastapi.tiangolo.com/advanced/websockets/#handling-disconnections-and-multiple-clients
"""

from fastapi import WebSocket


class ConnectionManager:
    """A list of sockets; a broadcast awaits one after the other."""

    def __init__(self) -> None:
        self.active_connections: list[WebSocket] = []

    async def connect(self, websocket: WebSocket) -> None:
        """Accept a socket and put it on the list."""
        await websocket.accept()
        self.active_connections.append(websocket)

    def disconnect(self, websocket: WebSocket) -> None:
        """Take a socket off the list."""
        self.active_connections.remove(websocket)

    async def send_personal_message(self, message: str, websocket: WebSocket) -> None:
        """Send to one socket."""
        await websocket.send_text(message)

    async def broadcast(self, message: str) -> None:
        """Send to all of them."""
        for connection in self.active_connections:
            await connection.send_text(message)
