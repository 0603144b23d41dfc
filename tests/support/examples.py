"""The examples, to import: their names are no names of modules. And what is said in an example as in the docs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from starlette.testclient import TestClient

EXAMPLES = Path(__file__).parents[2] / "examples"


def _forget_models() -> None:
    # SQLModel knows the models of all modules in one place, and an example is loaded more than once.
    if (sqlmodel := sys.modules.get("sqlmodel")) is not None:
        sqlmodel.main.default_registry.dispose()
        sqlmodel.SQLModel.metadata.clear()


def load(path: Path) -> ModuleType:
    """Import an example afresh, so that every test has its own manager."""
    _forget_models()
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def talk_in_rooms_and_hear_news(client: TestClient) -> None:
    """Talk in rooms that a router makes, and announce what the channel of the news hears, where nobody can say it."""
    with (
        client.websocket_connect("/ws/rooms/tea") as ada,
        client.websocket_connect("/ws/rooms/tea") as bob,
        client.websocket_connect("/ws/rooms/news") as mallory,
        client.websocket_connect("/ws/news") as eva,
    ):
        ada.send_text("hello")
        assert ada.receive_text() == bob.receive_text() == "hello"
        mallory.send_text("not from the server")
        assert mallory.receive_text() == "not from the server"
        eva.send_text("thrown away")
        assert client.post("/announce", params={"text": "breaking"}).is_success
        assert eva.receive_text() == "breaking"


def announce(client: TestClient) -> None:
    """Announce something to a channel, and hear it twice."""
    with client.websocket_connect("/ws/news") as ada, client.websocket_connect("/ws/news") as bob:
        assert client.post("/announce/news", params={"text": "hello"}).status_code == 204
        assert ada.receive_text() == bob.receive_text() == "hello"
