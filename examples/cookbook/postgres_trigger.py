# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo,postgres]"]
# ///
"""A trigger of Postgres tells the browser: any program writes to a table, and the page shows the change.

Run it with `DATABASE_URL=postgresql://postgres@localhost/postgres uvicorn postgres_trigger:app` in this directory, open
http://localhost:8000, and write to the table `orders` with psql.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
from fastapi import FastAPI
from fastapi.responses import FileResponse

from wsbroadcast import ConnectionManager, History, create_router

URL = os.environ.get("DATABASE_URL", "postgresql://postgres@localhost/postgres")

# The manager makes the table `wsbroadcast_history_outbox`. When a transaction that wrote there commits, the message is
# kept, numbered and sent. When it is rolled back, nothing is sent.
SCHEMA = r"""
CREATE TABLE IF NOT EXISTS orders (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, item text NOT NULL, state text NOT NULL DEFAULT 'new'
);

CREATE OR REPLACE FUNCTION tell_of_order() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO wsbroadcast_history_outbox (name, body) VALUES (
        'wsbroadcast:channel:orders',
        E'{"v":1,"type":"json"}\n' || CASE TG_OP
            WHEN 'DELETE' THEN jsonb_build_object('deleted', OLD.id)::text
            ELSE jsonb_build_object('id', NEW.id, 'item', NEW.item, 'state', NEW.state)::text
        END
    );
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER tell_of_order AFTER INSERT OR UPDATE OR DELETE ON orders
    FOR EACH ROW EXECUTE FUNCTION tell_of_order();
"""

manager = ConnectionManager(URL, history={"orders": History(messages=1000)})


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with manager, asyncpg.create_pool(URL, min_size=1) as pool:
        await pool.execute(SCHEMA)  # in your app, this is a migration
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)
app.include_router(create_router(manager, "/ws", channel="orders", inbound="ignore"))


@app.get("/orders")
async def load() -> dict[str, Any]:
    position = await manager.position("orders")  # before the query, so that no change is lost in between
    rows = await app.state.pool.fetch("SELECT id, item, state FROM orders ORDER BY id")
    return {"orders": [dict(row) for row in rows], "position": position}


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_suffix(".html"))


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
