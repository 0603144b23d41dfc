# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]", "sqlmodel"]
# ///
"""Pages get rows of SQLModel when they are committed. A change that is rolled back is never sent.

Run it with `uvicorn stock:app` in this directory, open http://localhost:8000 in two tabs, and buy until all is sold.
"""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import FileResponse
from pydantic import BaseModel
from sqlalchemy import event
from sqlalchemy.orm import SessionTransaction
from sqlmodel import Field, Session, SQLModel, create_engine, select

from wsbroadcast import ConnectionManager, History, Position, create_router


class Product(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str
    stock: int


class Order(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    product_id: int = Field(foreign_key="product.id")


class Snapshot(BaseModel):
    products: list[Product]
    position: Position


engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///stock.db"))
manager = ConnectionManager(history={"products": History()})


class Shop(Session):
    """A session that sends the products it has committed to the pages."""


@event.listens_for(Shop, "after_flush")
def remember(session: Shop, context: object) -> None:
    innermost = session.get_nested_transaction() or session.get_transaction()
    changed = [row for row in (*session.new, *session.dirty) if isinstance(row, Product)]
    session.info.setdefault("changed", []).extend((innermost, row.model_dump()) for row in changed)


@event.listens_for(Shop, "after_soft_rollback")
def forget(session: Shop, ended: SessionTransaction) -> None:
    remembered = session.info.get("changed", [])
    session.info["changed"] = [each for each in remembered if not is_within(each[0], ended)]


def is_within(transaction: SessionTransaction | None, outer: SessionTransaction) -> bool:
    while transaction is not None and transaction is not outer:
        transaction = transaction.parent
    return transaction is outer


@event.listens_for(Shop, "after_commit")
def tell(session: Shop) -> None:
    if not session.in_nested_transaction():  # the end of a savepoint is not yet a commit
        for _, row in session.info.pop("changed", []):
            manager.broadcast_soon(row, channel="products")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    SQLModel.metadata.create_all(engine)
    with Session(engine) as session:
        if session.exec(select(Product)).first() is None:
            session.add_all([Product(name="Teapot", stock=3), Product(name="Cup", stock=12)])
            session.commit()
    yield
    engine.dispose()


app = FastAPI(lifespan=lifespan)
app.include_router(create_router(manager, "/ws", channel="products", inbound="ignore"))


def shop() -> Iterator[Shop]:
    with Shop(engine) as session:
        yield session


ShopDep = Annotated[Shop, Depends(shop)]


async def position() -> Position:
    return await manager.position("products")


@app.get("/products")
def load(position: Annotated[Position, Depends(position)], session: ShopDep) -> Snapshot:
    return Snapshot(products=list(session.exec(select(Product))), position=position)  # FastAPI read the position before


@app.post("/orders", status_code=204)
def order(product: int, session: ShopDep) -> None:
    row = session.get(Product, product)
    if row is None:
        raise HTTPException(404, "no such product")
    session.add(Order(product_id=product))
    session.flush()  # locks a database of SQLite
    session.refresh(row, with_for_update=True)  # locks the row in other databases
    row.stock -= 1
    session.flush()
    if row.stock < 0:
        raise HTTPException(409, "sold out")  # the session ends without a commit, which rolls back
    session.commit()


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_suffix(".html"))


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
