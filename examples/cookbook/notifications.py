# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""Notifications with an unread count, which survives a reload and is the same in all tabs of the user.

Run it with `uvicorn notifications:app` in this directory, open http://localhost:8000/login/ada in two tabs, and
`curl -X POST "http://localhost:8000/notify/ada?text=hello"`.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from fastapi import Cookie, Depends, FastAPI, HTTPException
from fastapi.responses import FileResponse, RedirectResponse

from wsbroadcast import USERS, ConnectionManager, History, create_router

# The history is for a page that was offline for a moment. The database has everything.
manager = ConnectionManager(os.environ.get("BROKER_URL", "memory://"), history={USERS: History(messages=50)})
app = FastAPI()


async def current_user(user: Annotated[str | None, Cookie()] = None) -> str | None:
    return user  # stands for your session or token; None is refused with 401


async def logged_in(user: Annotated[str | None, Depends(current_user)]) -> str:
    if user is None:
        raise HTTPException(401, "log in first")
    return user


User = Annotated[str, Depends(logged_in)]

app.include_router(create_router(manager, "/ws", inbound="ignore", authenticate=current_user))


@contextmanager
def database() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect("notifications.db")
    try:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS notifications"
            " (id INTEGER PRIMARY KEY, user TEXT NOT NULL, text TEXT NOT NULL, is_read INTEGER NOT NULL DEFAULT 0)"
        )
        with connection:  # commits
            yield connection
    finally:
        connection.close()


@app.get("/notifications")
def load(user: User) -> list[dict[str, object]]:
    with database() as connection:
        rows = connection.execute(
            "SELECT id, text, is_read FROM notifications WHERE user = ? ORDER BY id DESC LIMIT 50", (user,)
        ).fetchall()
    return [{"id": number, "text": text, "is_read": bool(is_read)} for number, text, is_read in rows]


@app.post("/notify/{user}", status_code=204)
def notify(user: str, text: str) -> None:
    with database() as connection:
        number = connection.execute("INSERT INTO notifications (user, text) VALUES (?, ?)", (user, text)).lastrowid
    # After the commit: a user who is offline now finds it in the database.
    manager.broadcast_threadsafe({"new": {"id": number, "text": text, "is_read": False}}, user=user)


@app.post("/read", status_code=204)
def read(up_to: int, user: User) -> None:
    with database() as connection:
        connection.execute("UPDATE notifications SET is_read = 1 WHERE user = ? AND id <= ?", (user, up_to))
    manager.broadcast_threadsafe({"read_up_to": up_to}, user=user)  # to all tabs


@app.get("/login/{user}")
async def login(user: str) -> RedirectResponse:
    response = RedirectResponse("/")
    response.set_cookie("user", user, httponly=True, samesite="lax")
    return response


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_suffix(".html"))


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
