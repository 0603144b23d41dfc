# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""A chat behind a login: the session's cookie says who it is, and logging out closes every tab.

Run it with `uvicorn 10_login:app` in this directory and open http://localhost:8000: there are ada and bob, and the
password of both is `sesame`. Without a login, `python -m websockets ws://127.0.0.1:8000/chat` gets 401.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Iterator
from typing import Annotated, NamedTuple

from fastapi import Cookie, Depends, FastAPI, HTTPException, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel

from wsbroadcast import (
    Connection,
    ConnectionManager,
    Identity,
    PermissionDenied,
    connection_dependency,
    create_script_router,
)

SESSION_SECONDS = 3600.0

manager = ConnectionManager()
app = FastAPI(lifespan=manager.lifespan)
app.include_router(create_script_router())  # the client that the page imports


# What stands for a database.


def hashed(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=1)


class Session(NamedTuple):
    user: str
    expires_at: float


class Database:
    def __init__(self) -> None:
        self.passwords = {name: (salt := secrets.token_bytes(16), hashed("sesame", salt)) for name in ("ada", "bob")}
        self.sessions: dict[str, Session] = {}

    def add_session(self, user: str) -> str:
        now = time.time()
        for session, found in list(self.sessions.items()):
            if found.expires_at <= now:
                del self.sessions[session]  # else they are kept for ever
        session = secrets.token_urlsafe(32)
        self.sessions[session] = Session(user, now + SESSION_SECONDS)
        return session


database = Database()


def get_database() -> Iterator[Database]:
    yield database  # yours begins a transaction before this, and ends it after


DatabaseDep = Annotated[Database, Depends(get_database)]


# Who it is: the same dependency for HTTP routes and for the WebSocket. What it depends on has ended before the
# WebSocket is accepted, so nobody holds a transaction for as long as a tab is open.


async def current_session(database: DatabaseDep, session: Annotated[str, Cookie()] = "") -> Identity:
    found = database.sessions.get(session)
    if found is None or found.expires_at <= time.time():
        raise HTTPException(401, "log in first")
    return Identity(found.user, expires_at=found.expires_at)  # at which the connection is closed


@manager.on_connect
async def look_again(connection: Connection) -> None:
    # Who logs out during its own handshake isn't found by `close_user`; who does so after this is.
    if all(found.user != connection.user for found in list(database.sessions.values())):
        raise PermissionDenied("logged out")


Member = Annotated[Connection, Depends(connection_dependency(authenticate=current_session))]


@app.websocket("/chat")
async def chat(connection: Member) -> None:
    await manager.broadcast({"joined": connection.user})
    while True:
        text = await connection.receive_text()  # which closes with 1003 for a binary message, and ends this at the end
        await manager.broadcast({"from": connection.user, "text": text})


class Login(BaseModel):
    name: str
    password: str


@app.post("/login", status_code=204)
def login(login: Login, response: Response, database: DatabaseDep) -> None:  # `def`: scrypt takes its time
    salt, expected = database.passwords.get(login.name, (b"", b""))
    if not hmac.compare_digest(hashed(login.password, salt), expected):
        raise HTTPException(401, "wrong name or password")
    session = database.add_session(login.name)
    # `secure=True` as well, as soon as it is served over https.
    response.set_cookie("session", session, max_age=int(SESSION_SECONDS), httponly=True, samesite="lax")


@app.post("/logout", status_code=204)
async def logout(me: Annotated[Identity, Depends(current_session)], response: Response, database: DatabaseDep) -> None:
    for session, found in list(database.sessions.items()):
        if found.user == me.user:
            del database.sessions[session]  # first, so that nobody comes back with it
    await manager.close_user(str(me.user), reason="logged out")
    response.delete_cookie("session")


@app.get("/me")
async def who_am_i(me: Annotated[Identity, Depends(current_session)]) -> str:
    return str(me.user)


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>Chat</title>
<form id="login">
  <input id="name" value="ada" aria-label="Name">
  <input id="password" type="password" aria-label="Password">
  <button>Log in</button> <button type="button" id="logout">Log out everywhere</button>
</form>
<form id="chat"><input id="text" aria-label="Message" autocomplete="off"> <button>Send</button></form>
<p id="status" role="status">Not connected</p>
<ul id="log"></ul>
<script type="module">
  import { connect } from "./wsbroadcast.js";

  const part = (id) => document.getElementById(id);
  let ws = null;

  function show(text) {
    const line = document.createElement("li");
    line.textContent = text; // never innerHTML: what others write stays text
    part("log").append(line);
  }

  async function token() { // before each attempt: a script can't tell a refused handshake from a lost network
    const response = await fetch("me");
    return response.status === 401 ? null : ""; // the cookie goes along
  }

  function join() {
    ws?.close();
    ws = connect("chat", { plain: true, token });
    ws.on("status", (status, closed) => {
      const end = closed?.reason === "no token" ? "Log in again" : `Closed: ${closed?.code} ${closed?.reason}`;
      part("status").textContent = { open: "Connected", lost: "Coming back", closed: end }[status];
    });
    ws.on("message", ({ data }) => {
      const message = JSON.parse(data);
      show(message.joined ? `${message.joined} has joined` : `${message.from}: ${message.text}`);
    });
  }

  part("login").onsubmit = async (event) => {
    event.preventDefault();
    const body = JSON.stringify({ name: part("name").value, password: part("password").value });
    const headers = { "content-type": "application/json" };
    const response = await fetch("login", { method: "POST", headers, body });
    if (response.ok) join();
    else part("status").textContent = (await response.json()).detail;
  };
  part("logout").onclick = () => fetch("logout", { method: "POST" });
  part("chat").onsubmit = async (event) => {
    event.preventDefault();
    await ws?.publish(part("text").value); // an error without a connection: what was typed stays
    part("text").value = "";
  };
</script>
"""


@app.get("/")
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE)


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
