"""The examples, to import: their names are no names of modules. And what is said in an example as in the docs."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from starlette.testclient import TestClient, WebSocketTestSession

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


def centrifuge_says(websocket: WebSocketTestSession, *commands: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Send commands of the Centrifuge protocol, and yield what comes from then on."""
    if commands:
        websocket.send_text("\n".join(map(json.dumps, commands)))
    while True:
        for line in websocket.receive_text().split("\n"):
            yield json.loads(line)


def follow_news_by_centrifuge(client: TestClient, token: str, path: str, channel: str = "news") -> None:
    """Subscribe by the Centrifuge protocol to a channel, and hear there what is posted to a path."""
    with client.websocket_connect("/connection/websocket") as ada:
        connect, subscribe = {"id": 1, "connect": {"token": token}}, {"id": 2, "subscribe": {"channel": channel}}
        said = centrifuge_says(ada, connect, subscribe)
        assert next(each for each in said if each.get("id") == 1)["connect"]["subs"].keys() == {"#ada"}
        assert "subscribe" in next(each for each in said if each.get("id") == 2)
        assert client.post(path, params={"text": "hello"}).is_success
        pushes = (each["push"] for each in said if "push" in each)
        assert next(each["pub"]["data"] for each in pushes if "pub" in each) == {"text": "hello"}
        answer = next(
            each for each in centrifuge_says(ada, {"id": 3, "subscribe": {"channel": "#bob"}}) if "id" in each
        )
        assert answer["error"]["code"] == 103
