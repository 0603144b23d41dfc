"""README and docs: every Python block runs and does what the text around it says, every link leads somewhere."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import re
import tomllib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect

import wsbroadcast
from wsbroadcast import (
    CloseCode,
    ConnectionManager,
    Hook,
    Limits,
    SlowConsumer,
    Stats,
    WSBroadcastError,
    should_reconnect,
)

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md")))
}

Namespace = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block of Python."""

    name: str
    """Page and heading, and from the second under a heading on a number."""
    page: str
    line: int
    source: str

    def run(self) -> Namespace:
        """Run it as a module of its own; tracebacks name the page and its line."""
        namespace: Namespace = {"__name__": "block"}
        code = compile("\n" * self.line + self.source, self.page, "exec", dont_inherit=True)
        exec(code, namespace)
        return namespace


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def blocks_of(page: str, wanted: str = "python") -> list[Block]:
    """The fenced blocks of a language."""
    blocks: list[Block] = []
    heading, language, start = "", None, 0
    lines = PAGES[page].splitlines()
    for number, line in enumerate(lines):
        if line.startswith("```"):
            if language is None:
                language, start = line.removeprefix("```"), number + 1
                continue
            if language == wanted:
                before = sum(block.name.partition("-#")[0] == f"{page}#{heading}" for block in blocks)
                name = f"{page}#{heading}" + (f"-#{before + 1}" if before else "")
                blocks.append(Block(name, page, start, "\n".join(lines[start:number]) + "\n"))
            language = None
        elif language is None and line.startswith("#"):
            heading = slug(line.lstrip("# "))
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


# What to do with the blocks that make an app. Each function gets a started client and the block's names.


def close_of(socket: WebSocketTestSession) -> tuple[int, str]:
    """Read until the server closes."""
    while (message := socket.receive())["type"] != "websocket.close":
        pass
    return message["code"], message["reason"]


def readme_chat(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        with client.websocket_connect("/ws") as bob:
            ada.send_text("hello")
            assert ada.receive_text() == bob.receive_text() == "Broadcast: hello"
        ada.send_text("alone")
        assert ada.receive_text() == "Broadcast: alone"
        assert len(block["manager"].active_connections) == 1


def readme_shorter_ways(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws/news") as ada, client.websocket_connect("/ws/news") as bob:
        ada.send_text("hello")
        assert ada.receive_text() == bob.receive_text() == "hello"
        assert client.post("/announce", params={"text": "breaking"}).status_code == 200
        assert ada.receive_text() == bob.receive_text() == "breaking"
        with client.websocket_connect("/feed") as feed:
            feed.send_text("from the feed")
            assert ada.receive_text() == bob.receive_text() == "from the feed"
            client.post("/announce", params={"text": "not for the feed"})
            client.portal.call(block["manager"].broadcast, "for everyone")  # type: ignore[union-attr]
            assert feed.receive_text() == "for everyone"


def first_broadcast(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        with client.websocket_connect("/ws") as bob:
            ada.send_text("hello")
            assert [ada.receive_text(), ada.receive_text()] == ["You wrote: hello", "Somebody says: hello"]
            assert bob.receive_text() == "Somebody says: hello"
        assert ada.receive_text() == "Somebody left"


def first_broadcast_shorter(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada, client.websocket_connect("/ws") as bob:
        ada.send_text("to bob")
        assert bob.receive_text() == "to bob"
        bob.send_bytes(b"to ada")
        assert ada.receive_bytes() == b"to ada"


def channels(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada, client.websocket_connect("/ws") as bob:
        ada.send_json({"join": "news"})
        ada.send_json({"say": "hello", "in": "news"})
        assert ada.receive_json() == {"channel": "news", "text": "hello"}
        ada.send_json({"say": "hello all", "in": "lobby"})
        assert ada.receive_json() == bob.receive_json() == {"channel": "lobby", "text": "hello all"}
        ada.send_json({"leave": "news"})
        ada.send_json({"say": "nobody listens", "in": "news"})
        ada.send_json("nonsense")
        assert ada.receive_json() == {"error": "I don't understand"}
        bob.send_text("{broken")
        assert close_of(bob)[0] == 1007


def channels_by_url(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/chat/ws/news") as ada, client.websocket_connect("/chat/ws/sport") as bob:
        bob.send_text("goal")
        assert bob.receive_text() == "goal"
        ada.send_text("hello")
        assert ada.receive_text() == "hello"


def users(client: TestClient, block: Namespace) -> None:
    tab = "/ws?token=secret-of-ada"
    with (
        client.websocket_connect(tab) as one,
        client.websocket_connect(tab) as two,
        client.websocket_connect("/ws?token=secret-of-bob") as bob,
    ):
        client.post("/notify/1", params={"text": "hello"})
        client.post("/notify/2", params={"text": "hello bob"})
        assert one.receive_json() == two.receive_json() == {"text": "hello"}
        assert bob.receive_json() == {"text": "hello bob"}
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/ws?token=guessed"):
        pass


def hooks(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        assert ada.receive_text() == "Welcome!"
        with client.websocket_connect("/ws") as bob:
            assert bob.receive_text() == "Welcome!"
            assert ada.receive_text() == "2 are here"
            bob.send_text("my password is 1234")
            bob.send_text("hello")
            assert ada.receive_text() == bob.receive_text() == "hello"
            bob.close(4321)
        assert ada.receive_text() == "somebody left with code 4321"


def http_route(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/news") as ada:
        assert client.post("/publish", params={"headline": "hello"}).json() == {"listeners": 1}
        assert ada.receive_json() == {"headline": "hello"}


def own_lifespan(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        ada.send_text("hello")
        assert ada.receive_text() == "hello"


def threads(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        client.post("/report", params={"text": "done"})
        assert ada.receive_text() == "done"
        client.post("/import")
        assert [ada.receive_json()["imported"] for _ in range(3)] == [1, 2, 3]


def background_task(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        first = ada.receive_json()["tick"]
        assert ada.receive_json()["tick"] == first + 1


def only_sends(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/feed") as ada:
        assert "hello" in ada.receive_json()
        ada.send_text("ignored")
        client.portal.call(block["manager"].broadcast, "news")  # type: ignore[union-attr]
        assert ada.receive_text() == "news"


def access(client: TestClient, block: Namespace) -> None:
    for path in ("/ws", "/chat/news"):
        with pytest.raises(WebSocketDisconnect), client.websocket_connect(path):
            pass
    with (
        client.websocket_connect("/ws?token=secret") as ada,
        client.websocket_connect("/chat/news?token=secret") as eva,
    ):
        ada.send_text("hello")
        assert ada.receive_json() == eva.receive_json() == {"from": "ada", "text": "hello"}
        assert block["manager"].stats().users == 1
    with client.websocket_connect("/chat/private-news?token=secret") as bob:
        assert close_of(bob) == (1008, "not for you")


def ban(client: TestClient, block: Namespace) -> None:
    with (
        client.websocket_connect("/ws/ada") as ada,
        client.websocket_connect("/ws/ada") as other_tab,
        client.websocket_connect("/ws/bob") as bob,
    ):
        assert client.post("/ban/ada").json() == {"closed": 2}
        for socket in (ada, other_tab):
            assert socket.receive_json() == {"banned": True}
            assert close_of(socket) == (1008, "banned")
        bob.send_text("still here")
        assert bob.receive_text() == "still here"
        bob.send_text("bye")
        assert close_of(bob) == (1000, "")


def bad_input(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        ada.send_json({"channel": "news", "text": "hello"})
        assert ada.receive_json() == {"channel": "news", "text": "hello"}
        for nonsense in ("{", "[1]", '{"channel": "", "text": ""}', json.dumps({"channel": "x" * 5000, "text": ""})):
            ada.send_text(nonsense)
            assert "error" in ada.receive_json()
        ada.send_bytes(b"{}")
        assert close_of(ada)[0] == 1003


def by_role(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws/guest") as guest, client.websocket_connect("/ws/bot") as bot:
        bot.send_text("one")
        assert guest.receive_text() == "somebody said something"
        with client.websocket_connect("/ws/staff") as staff:
            staff.send_text("two")
            assert staff.receive_text() == "two"
            assert guest.receive_text() == "somebody said something"
        client.portal.call(block["manager"].send, block["manager"].connections[1], "three")  # type: ignore[union-attr]
        assert bot.receive_text() == "three"


def prices(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/prices") as ada:
        client.put("/prices/oil", params={"price": 70.5})
        assert ada.receive_json() == {"oil": 70.5}


def stats(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws"):
        assert client.get("/stats").json()["connections"] == 1
        assert client.get("/health").json() == {"engine": "memory", "is_ok": True, "detail": ""}


def fast_path(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        ada.send_text("hello")
        assert ada.receive_text() == "hello"


def order(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        assert [ada.receive_text() for _ in range(3)] == ["1", "2", "3"]
        assert close_of(ada) == (1000, "")


EXERCISES: dict[str, Callable[[TestClient, Namespace], None]] = {
    "README.md#wsbroadcast": readme_chat,
    "README.md#three-shorter-ways": readme_shorter_ways,
    "docs/explanation.md#order": order,
    "docs/how-to.md#send-from-an-http-route": http_route,
    "docs/how-to.md#send-from-an-http-route-#2": own_lifespan,
    "docs/how-to.md#send-from-a-thread": threads,
    "docs/how-to.md#send-from-a-background-task": background_task,
    "docs/how-to.md#write-an-endpoint-that-only-sends": only_sends,
    "docs/how-to.md#let-only-some-people-in": access,
    "docs/how-to.md#close-a-connection-or-throw-a-user-out": ban,
    "docs/how-to.md#handle-bad-input-from-clients": bad_input,
    "docs/how-to.md#send-something-else-to-some-of-the-recipients": by_role,
    "docs/how-to.md#choose-what-happens-to-slow-consumers": prices,
    "docs/how-to.md#see-what-is-going-on": stats,
    "docs/servers.md#uvicorn": fast_path,
    "docs/tutorial.md#first-broadcast": first_broadcast,
    "docs/tutorial.md#first-broadcast-#2": first_broadcast_shorter,
    "docs/tutorial.md#channels": channels,
    "docs/tutorial.md#channels-#2": channels_by_url,
    "docs/tutorial.md#users": users,
    "docs/tutorial.md#hooks": hooks,
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_block_runs_and_does_what_the_text_says(block: Block) -> None:
    namespace = block.run()
    tests = [function for name, function in namespace.items() if name.startswith("test_")]
    for test in tests:
        run_test(test)
    if "app" in namespace and not tests:
        with TestClient(namespace["app"]) as client:
            EXERCISES[block.name](client, namespace)


def run_test(test: Callable[[], Coroutine[Any, Any, None] | None]) -> None:
    """Run a test that a block defines."""
    if inspect.iscoroutinefunction(test):
        asyncio.run(test())
    else:
        test()


def test_every_exercise_has_its_block() -> None:
    assert EXERCISES.keys() <= {block.name for block in BLOCKS}


async def test_hook_class_of_the_tutorial_keeps_secrets() -> None:
    (block,) = (block for block in BLOCKS if block.name == "docs/tutorial.md#hooks-#2")
    manager: ConnectionManager = block.run()["manager"]
    async with manager:
        await manager.broadcast("my token")
        await manager.broadcast("hello")
        stats = manager.stats()
        assert (stats.vetoed, stats.broadcasts) == (1, 1)


# The pages among each other, and against the code.


def links_of(page: str) -> list[str]:
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in links_of(page):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_docs_are_all_linked_from_their_index() -> None:
    assert {f"docs/{link}" for link in links_of("docs/README.md")} >= set(PAGES) - {
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/README.md",
    }


REFERENCE = PAGES["docs/reference.md"]


def mentions(text: str, name: str) -> bool:
    return re.search(rf"(?<![\w]){re.escape(name)}(?!\w)", text) is not None


@pytest.mark.parametrize("name", wsbroadcast.__all__)
def test_reference_mentions_every_public_name(name: str) -> None:
    assert mentions(REFERENCE, name)


@pytest.mark.parametrize("kind", [ConnectionManager, Hook])
def test_reference_mentions_what_a_class_can_do(kind: type) -> None:
    public = {name for name in dir(kind) if not name.startswith("_")} | {"__version__"}
    assert {name for name in public if not mentions(REFERENCE, name)} == set()


@pytest.mark.parametrize(
    ("section", "kind"),
    [("ConnectionManager", ConnectionManager), ("Connection", wsbroadcast.Connection), ("Hooks", Hook)],
)
def test_reference_mentions_nothing_that_is_not_there(section: str, kind: type) -> None:
    text = REFERENCE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    methods = re.findall(r"^\| `(?:await )?([a-z_]+)\(", text, re.MULTILINE)
    assert methods
    assert [name for name in methods if not hasattr(kind, name)] == []


@pytest.mark.parametrize("options", [SlowConsumer, Limits])
def test_reference_has_every_option_with_its_default(options: type[SlowConsumer | Limits]) -> None:
    for field in dataclasses.fields(options):
        default = f'`"{field.default}"`' if isinstance(field.default, str) else f"{field.default:,}"
        assert re.search(rf"^\| `{field.name}` \| {re.escape(default)}( s| bytes)? \|", REFERENCE, re.MULTILINE), (
            field.name
        )


def test_reference_has_every_field_of_stats() -> None:
    fields = {field.name for field in dataclasses.fields(Stats)}
    section = REFERENCE.partition("\n## Stats")[2].partition("\n## ")[0]
    named = {
        name for row in re.findall(r"^\| (`.+?`) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert named == fields


def test_reference_has_every_close_code_and_whether_to_come_back() -> None:
    rows = re.findall(r"^\| `CloseCode\.(\w+)` \| (\d+) \|.*\| (yes|no) \|$", REFERENCE, re.MULTILINE)
    assert rows == [(code.name, str(code.value), "yes" if should_reconnect(code) else "no") for code in CloseCode]


def test_reference_has_the_tree_of_errors() -> None:
    def below(kind: type[BaseException]) -> dict[str, Any]:
        ours = (child for child in kind.__subclasses__() if child.__module__ == WSBroadcastError.__module__)
        return {child.__name__: below(child) for child in ours}

    tree = REFERENCE.partition("\n## Errors")[2].partition("```")[2].partition("```")[0]
    found: dict[str, Any] = {}
    path = [found]
    for indent, name in re.findall(r"^([│├└─ ]*)(\w+)", tree.strip(), re.MULTILINE):
        del path[len(indent) // 4 + 1 :]
        path.append(path[-1].setdefault(name, {}))
    assert found == {"WSBroadcastError": below(WSBroadcastError)}


def test_browsers_come_back_for_the_codes_of_should_reconnect() -> None:
    (listed,) = re.findall(r"COME_BACK = new Set\(\[([\d, ]+)\]\)", PAGES["docs/how-to.md"])
    codes = {int(code) for code in listed.split(",")}
    ours = {1006, *CloseCode}
    assert codes == {code + moved for code in ours for moved in (0, 3000) if should_reconnect(code)} - {4006}


def test_ci_runs_the_commands_of_the_readme() -> None:
    """The set-up, and the last command, which passes the tests."""
    commands = [command for block in blocks_of("README.md", "") for command in block.source.splitlines()]
    assert commands == [
        "pip install wsbroadcast",
        "python3 -m venv .venv",
        '.venv/bin/pip install -e ".[demo,test]"',
        ".venv/bin/python -m wsbroadcast demo",
        ".venv/bin/python -m pytest",
    ]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f"\n{commands[-1]} " in ci
    assert '-e ".[demo,test]"' in ci


def test_lowest_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|", PAGES["docs/servers.md"], re.MULTILINE))
    wanted = [f"{name}>={lowest[title]}" for name, title in (("fastapi", "FastAPI"), ("starlette", "Starlette"))]
    assert project["dependencies"] == wanted
    assert project["requires-python"] == f">={lowest['Python']}"
