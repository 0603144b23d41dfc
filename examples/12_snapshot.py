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
<script>
  const list = document.querySelector("ul");
  let position = null;

  function show(task) {
    let item = document.getElementById(`task-${task.id}`);
    if (!item) {
      item = document.createElement("li");
      item.id = `task-${task.id}`;
      list.append(item);
    }
    item.textContent = task.title;
  }

  async function load() {
    const snapshot = await (await fetch("/tasks")).json();
    list.replaceChildren();
    snapshot.tasks.forEach(show);
    position = snapshot.position;
  }

  const follow = () => new Promise((ended) => {
    const url = `${location.origin.replace("http", "ws")}/follow?since=${position}`;
    const socket = new WebSocket(url, "wsbroadcast.v1");  // the protocol that tells positions
    socket.onclose = ended;
    socket.onmessage = ({ data }) => {
      const event = JSON.parse(data);
      if (event.type === "gap" || event.recovered === false) {
        position = null;  // too much was missed: begin with a snapshot again
        socket.close();
        return;
      }
      if (event.position) position = event.position;
      if (event.type === "message") show(event.data);
    };
  });

  (async () => {
    for (;;) {
      try {
        if (!position) await load();
        await follow();
      } catch (error) {
        console.warn(error);
      }
      await new Promise((done) => setTimeout(done, 500 + 1000 * Math.random()));
    }
  })();
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
