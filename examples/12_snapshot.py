# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]", "sqlmodel"]
# ///
"""A page loads a list from a database and follows every change, also after a reconnect.

Run it with `pip install sqlmodel` and `uvicorn 12_snapshot:app` in this directory, and open http://localhost:8000 in
several tabs. `curl -X PUT "http://127.0.0.1:8000/tasks/1?title=milk"` adds a task to all of them. Disconnect a machine,
write another task, and connect the machine again: its page gets the task.
"""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from sqlmodel import Field, Session, SQLModel, create_engine, select

from wsbroadcast import ConnectionManager, History, Position, create_router

PAGE = """<!doctype html>
<title>Tasks</title>
<h1>Tasks</h1>
<ul></ul>
<script type="module">
  import { connect } from "/follow/wsbroadcast.js";

  const list = document.querySelector("ul");

  function show(task) {
    let item = document.getElementById(`task-${task.id}`);
    if (!item) {
      item = document.createElement("li");
      item.id = `task-${task.id}`;
      list.append(item);
    }
    item.textContent = task.title;
  }

  async function state() {  // called at first, and when more was missed than is kept
    const snapshot = await (await fetch("/tasks")).json();
    list.replaceChildren();
    snapshot.tasks.forEach(show);
    return snapshot.position;
  }

  connect("/follow", { state }).on("message", ({ data }) => show(data));
</script>
"""


class Task(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    title: str


class Snapshot(BaseModel):
    tasks: list[Task]
    position: Position


engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///tasks.db"))
manager = ConnectionManager(history={"tasks": History(messages=1000, seconds=3600)})


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    SQLModel.metadata.create_all(engine)
    yield
    engine.dispose()


def session() -> Iterator[Session]:
    with Session(engine) as opened:
        yield opened


SessionDep = Annotated[Session, Depends(session)]

app = FastAPI(lifespan=lifespan)
app.include_router(
    create_router(manager, "/follow", channel="tasks", inbound="ignore", http=True)
)  # `http=True`: also over HTTP, where a proxy lets no WebSocket through


@app.get("/")
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE)


async def position() -> Position:
    return await manager.position("tasks")


@app.get("/tasks")
def load(position: Annotated[Position, Depends(position)], session: SessionDep) -> Snapshot:
    # The position was read before this query. A task that is written in between comes twice, and none is missed.
    return Snapshot(tasks=list(session.exec(select(Task))), position=position)


@app.put("/tasks/{number}", status_code=204)
def write(number: int, title: str, session: SessionDep) -> None:
    task = session.merge(Task(id=number, title=title))
    session.commit()  # before the broadcast, so that a page that loads the list then has this task
    session.refresh(task)
    manager.broadcast_threadsafe(task, channel="tasks")


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
