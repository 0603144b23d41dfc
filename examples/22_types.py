# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""Messages with types: an auction. Models check the messages that clients send and those that they get.

Run it with `uvicorn 22_types:app` in this directory. Connect ada with
`python -m websockets "ws://127.0.0.1:8000/auctions/lamp?name=ada"`, and bob with `name=bob`. Type
`{"type": "bid", "amount": 10}`: both get the new price. Type `{"type": "bid", "amount": 5}`: the answer is `too_low`.
Type `{"type": "bid"}`: the answer says what is missing. No connection is closed.
"""

from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import Depends, FastAPI, Query
from pydantic import BaseModel, Field

from wsbroadcast import CallError, Connection, ConnectionManager, create_router


class Bid(BaseModel):
    type: Literal["bid"] = "bid"
    amount: int = Field(gt=0, le=1_000_000)


class Cheer(BaseModel):
    type: Literal["cheer"] = "cheer"
    emoji: Literal["👏", "🔥"] = "👏"


class NewPrice(BaseModel):
    type: Literal["new_price"] = "new_price"
    amount: int
    by: str
    at: datetime


class Auction:
    """The highest bid for one thing. In your app, this is a row of a database."""

    def __init__(self) -> None:
        self.amount = 0
        self.by = "nobody"
        self.at = datetime.now(UTC)
        self.secret_reserve = 500


auctions: dict[str, Auction] = {}


def auction_of(thing: str) -> Auction:
    """A dependency of FastAPI: `thing` is the parameter of the path."""
    return auctions.setdefault(thing, Auction())


async def current_user(name: Annotated[str, Query(min_length=1, max_length=20)]) -> str:
    return name


manager = ConnectionManager()
app = FastAPI()


@manager.on(Bid)
async def bid(
    message: Bid, connection: Connection, channel: str, auction: Annotated[Auction, Depends(auction_of)]
) -> None:
    if message.amount <= auction.amount:
        raise CallError("too_low", f"more than {auction.amount}, please")
    auction.amount, auction.by, auction.at = message.amount, str(connection.user), datetime.now(UTC)
    await manager.broadcast(auction, channel=channel, as_=NewPrice)  # the reserve stays a secret


app.include_router(
    create_router(
        manager,
        "/auctions/{thing}",
        channel="auction:{thing}",
        authenticate=current_user,
        receives=Bid | Cheer,
        sends=NewPrice | Cheer,
    )
)


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
