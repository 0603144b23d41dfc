"""What FastAPI must not take from a query: who it is, where to, which broker."""

# No postponed annotations: FastAPI reads them, and the dependencies here are local.

import inspect
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any
from unittest.mock import create_autospec

import pytest
from fastapi import APIRouter, Depends, FastAPI, WebSocket
from fastapi.testclient import TestClient

from tests.support.asgi import Peer
from wsbroadcast import (
    ConfigurationError,
    Connection,
    ConnectionManager,
    Handshake,
    Health,
    Identity,
    ManagerDep,
    Publisher,
    Stats,
    TokenFrom,
    connection_dependency,
    create_router,
)
from wsbroadcast.signatures import no_dependency

MANAGER = ConnectionManager()


class Subclass(ConnectionManager):
    """As apps have them."""


def public_methods(owner: object) -> dict[str, Callable[..., Any]]:
    names = [name for name, _ in inspect.getmembers(type(owner), inspect.isfunction) if not name.startswith("_")]
    return {f"{type(owner).__name__}.{name}": getattr(owner, name) for name in names}


METHODS = public_methods(MANAGER) | public_methods(Publisher("redis://localhost"))
WITH_ARGUMENTS = {name: method for name, method in METHODS.items() if inspect.signature(method).parameters}
WITHOUT_ARGUMENTS = {name: method for name, method in METHODS.items() if name not in WITH_ARGUMENTS}


def on_a_websocket_route(dependency: Any) -> None:
    app = FastAPI()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket, found: Annotated[Any, Depends(dependency)]) -> None: ...


def on_an_http_route(dependency: Any) -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint(found: Annotated[Any, Depends(dependency)]) -> None: ...


def as_an_endpoint(dependency: Any) -> None:
    FastAPI().add_api_websocket_route("/ws", dependency)


def of_a_router(dependency: Any) -> None:
    router = APIRouter(dependencies=[Depends(dependency)])

    @router.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None: ...


def of_a_dependency(dependency: Any) -> None:
    async def outer(found: Annotated[Any, Depends(dependency)]) -> None: ...

    on_a_websocket_route(outer)


def as_authenticate(dependency: Any) -> None:
    create_router(MANAGER, authenticate=dependency)


EVERYWHERE = pytest.mark.parametrize(
    "use",
    [on_a_websocket_route, on_an_http_route, as_an_endpoint, of_a_router, of_a_dependency, as_authenticate],
)


@EVERYWHERE
@pytest.mark.parametrize(
    "connect",
    [MANAGER.connect, Subclass().connect, partial(MANAGER.connect, info=1), ConnectionManager.connect],
    ids=["method", "of a subclass", "partial", "function"],
)
def test_connect_is_no_dependency(use: Callable[[Any], None], connect: Any) -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"ConnectionManager\.connect is not a dependency: .* in the query who it is; take a Conn",
    ):
        use(connect)


@EVERYWHERE
@pytest.mark.parametrize(
    ("dependency", "text"),
    [
        (Identity, "Identity is not a dependency: a client would say in the query who it is"),
        (Handshake, "Handshake is not a dependency: a client would say in the query who it is"),
        (Connection, "Connection is not a dependency: take a ConnectionDep"),
        (ConnectionManager, "ConnectionManager is not a dependency: take a ManagerDep"),
        (Subclass, "ConnectionManager is not a dependency: take a ManagerDep"),
        (Publisher, "Publisher is not a dependency: make one at the top of a module"),
        (TokenFrom, r"TokenFrom is not a dependency: name the places, as in Depends\(TokenFrom\(header=True\)\)"),
        (connection_dependency, r"it makes one, so call it once: Depends\(connection_dependency\(…\)\)"),
    ],
)
def test_what_an_app_makes_is_no_dependency(use: Callable[[Any], None], dependency: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        use(dependency)


@pytest.mark.parametrize("name", WITH_ARGUMENTS)
def test_method_with_arguments_is_no_dependency(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is not a dependency"):
        on_a_websocket_route(WITH_ARGUMENTS[name])


@pytest.mark.parametrize("name", WITHOUT_ARGUMENTS)
def test_method_without_arguments_may_be_a_dependency(name: str) -> None:
    on_an_http_route(WITHOUT_ARGUMENTS[name])


def test_every_method_is_looked_at() -> None:
    assert {"ConnectionManager.connect", "ConnectionManager.bind", "Publisher.broadcast"} <= set(WITH_ARGUMENTS)
    assert {"ConnectionManager.stats", "ConnectionManager.health", "Publisher.health"} <= set(WITHOUT_ARGUMENTS)


def test_results_may_be_what_a_route_returns() -> None:
    app = FastAPI(lifespan=MANAGER.lifespan)

    @app.get("/stats")
    async def stats(manager: ManagerDep) -> Stats:
        return manager.stats()

    @app.get("/health")
    async def health(health: Annotated[Health, Depends(MANAGER.health)]) -> Health:
        return health

    @app.get("/me")
    async def me() -> Identity:
        return Identity("ada")

    with TestClient(app) as client:
        assert client.get("/stats").json()["connections"] == 0
        expected = {"engine": "memory", "is_ok": True, "detail": "", "is_ready": True}
        assert client.get("/health").json() == expected
        assert client.get("/me").json() == {"user": "ada", "info": None, "expires_at": None}


def test_signature_shows_what_the_source_says() -> None:
    assert list(inspect.signature(MANAGER.connect).parameters) == [
        *("websocket", "user", "channels", "info", "subprotocol", "headers", "expires_at", "since")
    ]
    assert str(inspect.signature(ConnectionManager.disconnect)).startswith("(self, websocket: 'WebSocket | Connection'")
    assert str(inspect.signature(Identity)).startswith("(user: str | int | uuid.UUID | None, info: Any = None")


async def test_mocks_take_the_arguments_of_the_real_thing() -> None:
    mock = create_autospec(ConnectionManager, instance=True)
    websocket = Peer().websocket
    await mock.connect(websocket, user="ada")
    mock.connect.assert_called_once_with(websocket, user="ada")
    with pytest.raises(TypeError):
        mock.connect(websocket, nobody="ada")


@pytest.mark.parametrize("wrap", [lambda token: token, Depends, lambda token: Annotated[str, Depends(token)]])
def test_token_that_nobody_checks_is_no_user(wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(ConfigurationError, match="authenticate is a TokenFrom, which finds a token and doesn't check"):
        create_router(MANAGER, authenticate=wrap(TokenFrom(query="token")))


def test_function_may_be_marked_by_itself() -> None:
    @no_dependency("call it")
    def function(name: str, age: int = 0) -> str:
        return name

    with pytest.raises(ConfigurationError, match="function is not a dependency: call it"):
        on_an_http_route(function)
    assert function("ada") == "ada"
