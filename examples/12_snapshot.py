# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""Snapshot and follow: a page loads what there is, then gets every change since, over all its reconnects.

Run it with `uvicorn 12_snapshot:app` in this directory, and open http://localhost:8000 in several tabs. Then
`curl -X PUT "http://127.0.0.1:8000/tasks/1?title=milk"`. Put a machine to sleep and write another task: its page gets
that when it wakes up.
"""

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from wsbroadcast import ConnectionManager, History, create_router

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

  async function state() {  // at the beginning, and when too much was missed
    const snapshot = await (await fetch("/tasks")).json();
    list.replaceChildren();
    snapshot.tasks.forEach(show);
    return snapshot.position;
  }

  connect("/follow", { state }).on("message", ({ data }) => show(data));
</script>
"""


tasks: dict[int, str] = {}  # stands for your database

manager = ConnectionManager(history={"tasks": History(messages=1000, seconds=3600)})
app = FastAPI()
app.include_router(create_router(manager, "/follow", channel="tasks", inbound="ignore"))  # it reads `?since=`


@app.get("/")
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE)


@app.get("/tasks")
async def load() -> dict[str, object]:
    position = await manager.position("tasks")  # first, so that nothing falls in between
    return {"tasks": [{"id": number, "title": title} for number, title in tasks.items()], "position": str(position)}


@app.put("/tasks/{number}", status_code=204)
async def write(number: int, title: str) -> None:
    tasks[number] = title  # first, so that nobody is told of what a snapshot doesn't have
    await manager.broadcast({"id": number, "title": title}, channel="tasks")


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
