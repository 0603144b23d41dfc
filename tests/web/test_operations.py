"""The operations router: who may use it, what it answers, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import httpx2
import pytest
from fastapi import Depends, FastAPI, HTTPException
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from tests.support.asgi import Peer, eventually
from wsbroadcast import ConfigurationError, ConnectionManager, create_operations_router, create_router
from wsbroadcast.manager import core_of
from wsbroadcast.testing import Cluster


async def nobody() -> None:
    raise HTTPException(401, "sign in")


@pytest.fixture
def client() -> Iterator[TestClient]:
    manager = ConnectionManager()
    app = FastAPI()
    app.include_router(create_router(manager, "/ws/{channel}"))
    app.include_router(create_operations_router(manager, public=True))
    with TestClient(app) as client:
        yield client


# Who may use it.


@pytest.mark.parametrize("dependencies", [None, [], ()])
def test_router_for_everybody_has_to_be_meant(dependencies: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"dependencies=\[Depends\(only_admins\)\].*public=True"):
        create_operations_router(ConnectionManager(), dependencies=dependencies)


@pytest.mark.parametrize(
    "options",
    [
        {"dependencies": [nobody]},
        {"dependencies": Depends(nobody)},
        {"dependencies": nobody},
        {"dependencies": "nobody"},
        {"dependencies": [Depends(nobody)], "public": True},
        {"public": 1},
        {"public": "yes"},
        {"public": True, "prefix": "operations"},
        {"public": True, "prefix": "/operations/"},
        {"public": True, "prefix": ""},
        {"public": True, "allowed_origins": ["example.org/"]},
    ],
)
def test_option_that_makes_no_sense_is_an_error(options: Any) -> None:
    with pytest.raises(ConfigurationError):
        create_operations_router(ConnectionManager(), **options)


def test_manager_comes_first() -> None:
    with pytest.raises(ConfigurationError, match="needs its manager first"):
        create_operations_router(FastAPI(), public=True)  # type: ignore[arg-type]


GUARDED = ["", "operations.js", "operations.css", "nodes", "connections", "channels", "users/7", "metrics"]


def test_everything_but_two_words_is_behind_the_dependency() -> None:
    manager = ConnectionManager()
    app = FastAPI()
    app.include_router(create_operations_router(manager, dependencies=[Depends(nobody)]))
    with TestClient(app) as client:
        assert [client.get(f"/operations/{path}").status_code for path in GUARDED] == [401] * len(GUARDED)
        assert client.post("/operations/drain").status_code == 401
        assert client.post("/operations/users/7/close").status_code == 401
        assert not manager.is_draining
        for word in ("live", "ready"):
            assert (client.get(f"/operations/{word}").text, client.head(f"/operations/{word}").status_code) == (
                word,
                200,
            )
        paths = {route for route in client.get("/openapi.json").json()["paths"] if route.startswith("/operations/")}
        assert len(paths) == 9


# Whether a node is ready.


async def word(app: FastAPI, path: str = "ready") -> tuple[int, str]:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
        response = await client.get(f"/operations/{path}")
        return response.status_code, response.text


def app_of(manager: ConnectionManager, **options: Any) -> FastAPI:
    app = FastAPI()
    app.include_router(create_operations_router(manager, public=True, **options))
    return app


async def test_node_is_ready_from_its_start_to_its_drain() -> None:
    manager = ConnectionManager()
    app = app_of(manager)
    assert await word(app) == (503, "starting")  # which starts it, where no lifespan has
    assert await word(app) == (200, "ready")
    await manager.drain(over=0)
    assert await word(app) == (503, "draining")
    assert await word(app, "live") == (200, "live")
    await manager.aclose()
    assert await word(app) == (503, "stopped")
    assert await word(app, "live") == (200, "live")


@pytest.mark.parametrize(("needs_broker", "expected"), [(False, (200, "ready")), (True, (503, "unreachable"))])
async def test_broker_that_is_away_takes_nobody_out_unless_that_is_asked_for(
    needs_broker: bool, expected: tuple[int, str]
) -> None:
    cluster = Cluster(1)
    app = app_of(cluster[0], ready_needs_broker=needs_broker)
    async with cluster:
        assert await word(app) == (200, "ready")
        cluster.partition()
        assert await word(app) == expected
        cluster.heal()
        assert await word(app) == (200, "ready")


def test_routes_of_a_manager_that_has_ended_say_so() -> None:
    manager = ConnectionManager()
    app = app_of(manager)
    with TestClient(app):
        pass
    client = TestClient(app)
    for path in ("nodes", "connections", "channels", "users/7", "metrics"):
        response = client.get(f"/operations/{path}")
        assert (response.status_code, response.headers["retry-after"]) == (503, "1"), path
        assert "closed" in response.json()["detail"]


# What one node answers.


def test_connection_is_told_without_what_is_nobodys_business() -> None:
    manager = ConnectionManager()
    app = FastAPI()
    app.include_router(create_operations_router(manager, public=True))
    app.include_router(create_router(manager, "/ws/{channel}"))
    with TestClient(app) as client, client.websocket_connect("/ws/news?token=secret", headers={"x-secret": "secret"}):
        text = client.get("/operations/connections").text
        (found,) = json.loads(text)["connections"]
        assert "secret" not in text
        assert (found["channels"], found["channel_count"], found["user"]) == (["news"], 1, None)
        assert (found["address"], found["sink"], found["backlog_bytes"]) == ("testclient", "asgi", 0)
        assert 0 <= found["age"] < 60


def test_node_says_how_it_is(client: TestClient) -> None:
    with client.websocket_connect("/ws/a"), client.websocket_connect("/ws/b"):
        found = client.get("/operations/nodes").json()
        (node,) = found["nodes"]
        assert (found["answered"], found["known"], found["silent"], found["scope"]) == (1, 1, [], "process")
        assert found["asked"] == node["id"]
        assert (node["connections"], node["channels"], node["engine"]["is_ok"]) == (2, 2, True)


def test_every_connection_is_on_exactly_one_page(client: TestClient) -> None:
    with ExitStack() as stack:
        for _ in range(23):
            stack.enter_context(client.websocket_connect("/ws/news"))
        seen: list[str] = []
        after: str | None = ""
        while after is not None:
            page = client.get("/operations/connections", params={"limit": 5, "after": after}).json()
            assert (page["total"], len(page["connections"]) <= 5) == (23, True)
            seen += [each["id"] for each in page["connections"]]
            after = page["next"]
        assert len(seen) == len(set(seen)) == 23
        assert seen == sorted(seen)


def test_connections_can_be_chosen(client: TestClient) -> None:
    with client.websocket_connect("/ws/a"), client.websocket_connect("/ws/b"):
        for query, count in (("channel=a", 1), ("channel=c", 0), ("user=7", 0), ("slow=true", 0), ("", 2)):
            assert len(client.get(f"/operations/connections?{query}").json()["connections"]) == count, query


BAD = [
    "connections?limit=-1",
    "connections?limit=0",
    "connections?limit=501",
    "connections?limit=x",
    f"connections?limit={'9' * 400}",
    f"connections?after={'x' * 201}",
    f"connections?user={'x' * 10_000}",
    "connections?slow=perhaps",
    "channels?limit=-1",
    "channels?sort=age",
    f"channels?prefix={'x' * 201}",
    f"users/{'x' * 10_000}",
    "users/%00",
    "metrics?scope=world",
]


@pytest.mark.parametrize("path", BAD, ids=range(len(BAD)))
def test_nonsense_is_answered_with_422(client: TestClient, path: str) -> None:
    response = client.get(f"/operations/{path}")
    assert response.status_code == 422
    assert len(response.text) < 30_000


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("users/7", 404),
        ("users/a%2Fb", 404),
        ("users/", 422),
        ("users/%ED%A0%80", 404),
        ("nothing", 404),
        ("operations.py", 404),
        ("connections?after=%FF%00", 200),
        ("connections?channel=%0A", 200),
        ("channels?prefix=%00", 200),
    ],
)
def test_nothing_is_an_error_of_the_server(client: TestClient, path: str, status: int) -> None:
    assert client.get(f"/operations/{path}").status_code == status


@pytest.mark.parametrize("query", ["over=-1", "over=nan", "over=inf", "over=x", "over=1e9", f"node={'x' * 65}"])
def test_nonsense_drains_nobody(client: TestClient, query: str) -> None:
    assert client.post(f"/operations/drain?{query}").status_code == 422
    assert client.get("/operations/ready").text == "ready"


def test_drain_of_a_node_that_nobody_knows_is_404(client: TestClient) -> None:
    assert client.post("/operations/drain?node=nobody").status_code == 404
    assert client.get("/operations/ready").text == "ready"


@pytest.mark.parametrize("query", ["code=1", "code=1005", "code=99999", "code=x", f"reason={'x' * 124}"])
def test_close_with_a_code_that_cannot_be_sent_is_422(client: TestClient, query: str) -> None:
    assert client.post(f"/operations/users/7/close?{query}").status_code == 422


# What a page of another origin can do: nothing.

OTHERS = [
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": ""},
    {"origin": "http://testserver:81"},
    {"origin": "https://testserver"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "Cross-Site"},
    {"sec-fetch-site": "same-origin, cross-site"},
    {"sec-fetch-site": "cross-site", "origin": "http://evil.example"},
]


@pytest.mark.parametrize("headers", OTHERS, ids=range(len(OTHERS)))
@pytest.mark.parametrize("path", ["drain", "users/7/close"])
def test_page_of_another_origin_changes_nothing(client: TestClient, path: str, headers: dict[str, str]) -> None:
    assert client.post(f"/operations/{path}", headers=headers).status_code == 403
    assert client.get("/operations/ready").text == "ready"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://testserver"},
        {"sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "same-origin", "origin": "https://behind.a.proxy"},
        {"sec-fetch-site": "none"},
    ],
)
def test_programs_and_the_own_page_do(client: TestClient, headers: dict[str, str]) -> None:
    assert client.post("/operations/users/7/close", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["drain", "users/7/close"])
def test_what_changes_something_wants_a_post(client: TestClient, path: str) -> None:
    assert client.get(f"/operations/{path}").status_code in (404, 405)
    assert client.get("/operations/ready").text == "ready"


def test_page_of_an_allowed_origin_does_too() -> None:
    app = app_of(ConnectionManager(), allowed_origins=["https://ops.example"])
    with TestClient(app) as client:
        for origin, status in (("https://ops.example", 200), ("https://evil.example", 403)):
            headers = {"origin": origin, "sec-fetch-site": "cross-site"}
            assert client.post("/operations/users/7/close", headers=headers).status_code == status


# The page.


def test_page_is_served_under_a_strict_policy(client: TestClient) -> None:
    page = client.get("/operations/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    for name, media_type in (("operations.js", "text/javascript"), ("operations.css", "text/css")):
        assert f'="{name}"' in page.text
        assert client.get(f"/operations/{name}").headers["content-type"].startswith(media_type)
    assert not re.search(r"https?://(?!www\.w3\.org)|\son\w+=|<style|style=|<script>|innerHTML", page.text)
    assert "innerHTML" not in client.get("/operations/operations.js").text
    assert client.get("/operations").url.path == "/operations/"


# Where it is.


def test_router_works_below_prefixes_mounts_and_a_root_path() -> None:
    manager, outer, inner = ConnectionManager(), FastAPI(), FastAPI()
    inner.include_router(create_operations_router(manager, public=True, prefix="/ops"), prefix="/v1")
    outer.mount("/inner", inner)
    with TestClient(outer, root_path="/proxied") as client:
        for path in ("", "nodes", "operations.js", "metrics", "connections"):
            assert client.get(f"/proxied/inner/v1/ops/{path}").status_code == 200, path
        assert client.get("/proxied/inner/v1/ops/ready").text == "ready"
        document = client.get("/proxied/inner/openapi.json").json()
        assert "/v1/ops/users/{user}/close" in document["paths"]


def test_every_route_and_field_is_documented(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    operations = [
        (path, operation)
        for path, methods in document["paths"].items()
        for operation in methods.values()
        if path.startswith("/operations")
    ]
    assert len(operations) == 9
    for path, operation in operations:
        assert operation["description"], path
        assert all(each.get("description") for each in operation.get("parameters", ())), path
    for name in ("NodeReport", "Connections", "ConnectionReport", "Channels", "UserReport", "Drained", "Closed"):
        fields = document["components"]["schemas"][name]["properties"]
        undocumented = [field for field, schema in fields.items() if set(schema) <= {"type", "title"}]
        assert undocumented in ([], ["user"]), name


# All nodes.


@asynccontextmanager
async def operated(count: int) -> AsyncIterator[tuple[Cluster, list[httpx2.AsyncClient]]]:
    """Nodes that know each other, and a client of the app of each."""
    cluster = Cluster(count)
    apps = [app_of(manager) for manager in cluster]
    async with cluster:
        nodes = [core_of(manager).life.node for manager in cluster]
        await eventually(lambda: all(len(node.know_siblings().others()) == count - 1 for node in nodes))
        clients = [
            httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test/operations/") for app in apps
        ]
        try:
            yield cluster, clients
        finally:
            for client in clients:
                await client.aclose()


async def test_any_node_answers_for_all() -> None:
    async with operated(3) as (cluster, clients):
        for number, manager in enumerate(cluster):
            for _ in range(10):
                await manager.connect(Peer().websocket, user="ada", channels=["all", f"only-{number}"])
        labels = list[set[str]]()
        for client in clients:
            found = (await client.get("connections", params={"limit": 500})).json()
            assert (found["total"], len(found["connections"]), found["answered"], found["known"]) == (30, 30, 3, 3)
            assert len({each["node"] for each in found["connections"]}) == 3
            channels = (await client.get("channels")).json()
            assert [(each["name"], each["connections"]) for each in channels["channels"]] == [
                ("all", 30),
                ("only-0", 10),
                ("only-1", 10),
                ("only-2", 10),
            ]
            assert channels["is_complete"]
            user = (await client.get("users/ada")).json()
            assert (len(user["connections"]), user["is_complete"]) == (30, True)
            metrics = (await client.get("metrics")).text
            assert len(re.findall(r'^wsbroadcast_connects_total\{node="[^"]+"\} 10$', metrics, re.M)) == 3
            assert "wsbroadcast_nodes_known 3" in metrics
            labels.append(set(re.findall(r'node="([^"]+)"', metrics)))
            alone = (await client.get("metrics", params={"scope": "node"})).text
            assert len(re.findall(r"^wsbroadcast_connects_total", alone, re.M)) == 1
        assert labels[0] == labels[1] == labels[2]  # of one process all three; else counters would jump


async def test_pages_of_several_nodes_hold_everything_once() -> None:
    async with operated(3) as (cluster, clients):
        for number in range(60):
            await cluster[number % 3].connect(Peer().websocket, channels=["all", f"c{number % 17:02}"])
        for path, list_, key, count in (("connections", "connections", "id", 60), ("channels", "channels", "name", 18)):
            seen: list[Any] = []
            after: str | None = ""
            while after is not None:
                page = (await clients[1].get(path, params={"limit": 7, "after": after})).json()
                seen += page[list_]
                after = page["next"]
            keys = [each[key] for each in seen]
            assert (len(keys), keys) == (count, sorted(set(keys)))
        assert {each["name"]: each["connections"] for each in seen} == {
            "all": 60,
            **{f"c{number:02}": 4 if number < 9 else 3 for number in range(17)},
        }


async def test_user_is_closed_on_all_nodes() -> None:
    async with operated(2) as (cluster, clients):
        peers = [Peer() for _ in range(4)]
        for number, peer in enumerate(peers):
            await cluster[number % 2].connect(peer.websocket, user="a/b")
        staying = Peer()
        await cluster[1].connect(staying.websocket, user="a")
        response = (await clients[0].post("users/a%2Fb/close", params={"code": 4403, "reason": "out"})).json()
        assert (response["user"], response["connections"], response["answered"]) == ("a/b", 4, 2)
        for peer in peers:
            await peer.wait_close()
            assert peer.end == (4403, "out")
        assert staying.end is None
        assert (await clients[1].get("users/a%2Fb")).status_code == 404


async def test_close_during_an_outage_says_that_it_was_done_here_alone() -> None:
    async with operated(2) as (cluster, clients):
        here, there = Peer(), Peer()
        await cluster[0].connect(here.websocket, user="ada")
        await cluster[1].connect(there.websocket, user="ada")
        cluster.partition(0)
        response = await clients[0].post("users/ada/close")
        assert response.status_code == 503
        assert "this node only" in response.json()["detail"]
        await here.wait_close()
        assert there.end is None


async def test_outage_leaves_the_answer_of_this_node() -> None:
    async with operated(3) as (cluster, clients):
        await cluster[1].connect(Peer().websocket, channels=["news"])
        cluster.partition(1)
        found = (await clients[1].get("nodes")).json()
        assert (found["answered"], found["known"], len(found["silent"])) == (1, 3, 2)
        assert found["nodes"][0]["engine"]["is_ok"] is False
        assert (await clients[1].get("channels")).json()["channels"] == [{"name": "news", "connections": 1}]
        assert (await clients[1].get("metrics")).status_code == 200


async def test_drain_means_the_processes_of_one_server() -> None:
    async with operated(4) as (cluster, clients):
        nodes = [core_of(manager).life.node.know_siblings() for manager in cluster]
        for number, node in enumerate(nodes):
            object.__setattr__(node.me, "family", f"server {number // 2}")
        peers = [Peer() for _ in range(4)]
        for manager, peer in zip(cluster, peers, strict=True):
            await manager.connect(peer.websocket)
        response = await clients[0].post("drain", params={"over": 0})
        assert response.status_code == 202
        assert {each["id"] for each in response.json()["nodes"]} == {nodes[0].me.id, nodes[1].me.id}
        assert [manager.is_draining for manager in cluster] == [True, True, False, False]
        for peer in peers[:2]:
            await peer.wait_close()
            assert peer.end is not None
            assert peer.end[0] == 1012
        assert [peer.end for peer in peers[2:]] == [None, None]
        assert (await clients[1].get("ready")).text == "draining"
        states = (await clients[2].get("nodes")).json()["nodes"]
        assert sorted(each["is_draining"] for each in states) == [False, False, True, True]


async def test_ten_thousand_channels_are_answered_within_bounds() -> None:
    async with operated(2) as (cluster, clients):
        for number in range(100):
            channels = [f"channel-{number:02}-{each:02}" for each in range(100)]
            await cluster[number % 2].connect(Peer().websocket, channels=["all", *channels[:99]])
        began = asyncio.get_running_loop().time()
        found = (await clients[0].get("channels", params={"sort": "size", "limit": 50})).json()
        assert asyncio.get_running_loop().time() - began < 1
        assert (found["channels"][0], len(found["channels"])) == ({"name": "all", "connections": 100}, 50)
        assert (found["is_complete"], found["answered"]) == (False, 2)
        page = (await clients[0].get("channels", params={"prefix": "channel-07-", "limit": 500})).json()
        assert (len(page["channels"]), page["next"], page["is_complete"]) == (99, None, True)


async def test_too_many_questions_are_refused_for_a_moment() -> None:
    async with operated(2) as (_, clients):
        some = [clients[0].get("channels", params={"prefix": str(number)}) for number in range(200)]
        statuses = {response.status_code: response for response in await asyncio.gather(*some)}
        assert set(statuses) == {200, 503}
        assert statuses[503].headers["retry-after"] == "1"
        assert (await clients[0].get("channels")).status_code == 200


def test_who_is_drained_away_hears_1012(client: TestClient) -> None:
    with client.websocket_connect("/ws/news") as socket:
        assert client.post("/operations/drain?over=0").status_code == 202
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_text()
        assert closed.value.code == 1012
