"""An app whose sockets have types: what documents are made of in tests."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Generic, Literal, TypeVar

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, Field
from starlette.routing import Mount

from tests.support import described_models
from wsbroadcast import (
    EVERYONE,
    USERS,
    Connection,
    ConnectionManager,
    create_asyncapi_router,
    create_router,
    create_sse_router,
)

T = TypeVar("T")


class Say(BaseModel):
    """What somebody says."""

    type: Literal["say"] = "say"
    text: str = Field(max_length=100)
    reply_to: int | None = None


class Typing(BaseModel):
    type: Literal["typing"] = "typing"


class Post(BaseModel):
    id: int
    tags: set[str] = set()


class Said(BaseModel):
    type: Literal["said"] = "said"
    at: datetime
    post: Post
    thread: list[Said] = []


class Left(BaseModel):
    type: Literal["left"] = "left"
    user: str


class Notice(BaseModel):
    type: Literal["notice"] = "notice"
    post: described_models.Post


class Page(BaseModel, Generic[T]):
    items: list[T]
    next: str | None = None


manager = ConnectionManager(sends={USERS: Notice, EVERYONE: Notice})
other = ConnectionManager()


@manager.method("posts")
async def posts(page: int, size: Annotated[int, Field(le=100)] = 20) -> Page[Post]:
    return Page(items=[Post(id=page)])


@manager.method("who am I")
def who(connection: Connection) -> str:
    return connection.id


@manager.method("ping")
async def ping() -> None: ...


app = FastAPI(title="Chat", version="1.2.3", description="Rooms to talk in.")
rooms = create_router(manager, "/ws/{room}", channel="room:{room}", receives=Say | Typing, sends=Said | Left, http=True)
app.include_router(rooms, prefix="/v1", tags=["rooms"])
app.include_router(create_router(manager, "/lobby"))
app.include_router(create_router(manager, "/commands/{channel:path}", inbound="commands", receives=Say))
app.include_router(create_router(manager, "/texts", accepts="text", inbound="handle"))
app.include_router(create_sse_router(manager, "/news/{topic}", channel="news:{topic}", sends=Left))
app.include_router(create_asyncapi_router(manager))

inner = APIRouter()
inner.include_router(create_router(other, "/other/{id}", receives=Say, sends=described_models.Post), prefix="/{tenant}")
mounted = FastAPI()
mounted.include_router(inner)
app.router.routes.append(Mount("/mounted/{place}", app=mounted))


@app.get("/lobby")
async def page_of_the_lobby() -> Post:
    return Post(id=1)
