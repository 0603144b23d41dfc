# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""A chat behind a login. A session cookie says who the user is, and a logout closes all tabs of the user.

Run it with `uvicorn 10_login:app` in this directory, open http://localhost:8000, and log in as `ada` or `bob` with the
password `sesame`. A page that loses its connection comes back as long as its session lasts. Without a login,
`python -m websockets ws://127.0.0.1:8000/chat` gets 401.
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


# This stands for your database.


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
                del self.sessions[session]  # otherwise they would be kept for ever
        session = secrets.token_urlsafe(32)
        self.sessions[session] = Session(user, now + SESSION_SECONDS)
        return session


database = Database()


def get_database() -> Iterator[Database]:
    yield database  # in your app, a transaction begins before this line and ends after it


DatabaseDep = Annotated[Database, Depends(get_database)]


# One dependency says who the user is, for HTTP routes and for the WebSocket. `get_database` ends before the WebSocket
# is accepted, so an open tab holds no transaction.


async def current_session(database: DatabaseDep, session: Annotated[str, Cookie()] = "") -> Identity:
    found = database.sessions.get(session)
    if found is None or found.expires_at <= time.time():
        raise HTTPException(401, "log in first")
    return Identity(found.user, expires_at=found.expires_at)  # the connection is closed at this time


@manager.on_connect
async def look_again(connection: Connection) -> None:
    # `close_user` doesn't find a connection during its handshake. A logout at that time is noticed here.
    if all(found.user != connection.user for found in list(database.sessions.values())):
        raise PermissionDenied("logged out")


Member = Annotated[Connection, Depends(connection_dependency(authenticate=current_session))]


@app.websocket("/chat")
async def chat(connection: Member) -> None:
    await manager.broadcast({"joined": connection.user})
    while True:
        text = await connection.receive_text()  # bytes close the connection with 1003; raises when the client leaves
        await manager.broadcast({"from": connection.user, "text": text})


class Login(BaseModel):
    name: str
    password: str


@app.post("/login", status_code=204)
def login(login: Login, response: Response, database: DatabaseDep) -> None:  # `def`, because scrypt is slow
    salt, expected = database.passwords.get(login.name, (b"", b""))
    if not hmac.compare_digest(hashed(login.password, salt), expected):
        raise HTTPException(401, "wrong name or password")
    session = database.add_session(login.name)
    # Add `secure=True` when you serve this over https.
    response.set_cookie("session", session, max_age=int(SESSION_SECONDS), httponly=True, samesite="lax")


@app.post("/logout", status_code=204)
async def logout(me: Annotated[Identity, Depends(current_session)], response: Response, database: DatabaseDep) -> None:
    for session, found in list(database.sessions.items()):
        if found.user == me.user:
            del database.sessions[session]  # before the close, so that nobody reconnects with it
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
    line.textContent = text; // never innerHTML: others must not be able to add HTML
    part("log").append(line);
  }

  async function token() { // called before each attempt: to a script, a refused handshake looks like a lost network
    const response = await fetch("me");
    return response.status === 401 ? null : ""; // the browser sends the cookie
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
    await ws?.publish(part("text").value); // raises without a connection, so the text stays
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
