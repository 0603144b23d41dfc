# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""A room that shows who is in it, on all workers. Several tabs are one person, and a reload is no leaving.

Run it with `uvicorn 19_who_is_online:app --workers 4` in this directory. Open http://localhost:8000/?user=ada and
http://localhost:8000/?user=bob in several tabs: two people are there. Reload a tab: nobody is told of it. Close all
tabs of one user: ten seconds later the others are told that this user has left.
`curl -X POST "http://localhost:8000/tell/eva?text=hello"` answers `{"is_online":false}` and sends eva an e-mail.
"""

import os

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from wsbroadcast import Connection, ConnectionManager, Identity, Presence, create_router

COLOURS = ("crimson", "teal", "orange", "navy")


def shown(connection: Connection[str]) -> dict[str, str]:
    return {"colour": connection.info}  # others see this of a member; keep it small


manager = ConnectionManager(
    os.environ.get("BROKER_URL", "sqlite:///online.db"), presence={"room:*": Presence(info=shown)}
)


async def current_user(user: str) -> Identity:  # stands for your login
    return Identity(user, info=COLOURS[sum(user.encode()) % len(COLOURS)])


app = FastAPI()
app.include_router(
    create_router(manager, "/ws/{room}", channel="room:{room}", inbound="ignore", authenticate=current_user)
)
mails: list[tuple[str, str]] = []  # stands for your mail server


@manager.on_joined
async def joined(channel: str, user: str) -> None:
    await manager.broadcast(f"{user} is here", channel=channel)


@manager.on_left
async def left(channel: str, user: str) -> None:
    await manager.broadcast(f"{user} has left", channel=channel)


@app.get("/rooms/{room}")
async def members(room: str) -> list[str]:
    return sorted(member.id for member in await manager.presence(f"room:{room}"))


@app.post("/tell/{user}")
async def tell(user: str, text: str) -> dict[str, bool]:
    receipt = await manager.broadcast(text, user=user)
    if not receipt.members:  # 0: on no node; `None`: the broker can't tell
        mails.append((user, text))
    return {"is_online": bool(receipt.members)}


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>Who is online</title>
<h1>In the room: <span id="count"></span></h1>
<ul id="members"></ul>
<ul id="log"></ul>
<script type="module">
  import { connect } from "./ws/wsbroadcast.js";

  const user = new URLSearchParams(location.search).get("user") ?? "guest";
  const ws = connect(`ws/tea?user=${encodeURIComponent(user)}`);
  const members = ws.members();
  const part = (id) => document.getElementById(id);

  function line({ text, colour }) {
    const item = document.createElement("li");
    item.textContent = text; // never innerHTML: others must not be able to add HTML
    item.style.color = colour;
    return item;
  }

  ws.on("presence", () => {
    const lines = [...members.values()].map(({ user, info }) => line({ text: user, colour: info.colour }));
    part("members").replaceChildren(...lines);
    part("count").textContent = members.count;
  });
  ws.on("message", ({ data }) => part("log").prepend(line({ text: data, colour: "" })));
</script>
"""


@app.get("/")
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE)


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
