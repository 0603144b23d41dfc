"""What it costs to read a message by its types: beside a bare `TypeAdapter.validate_json` of the same message.

    python benchmarks/message_types.py

Each round takes the time of both, one after the other; the ratio is the median of the rounds. A message has 200 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from timeit import timeit
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from wsbroadcast.protocols.typed import TypedReader
from wsbroadcast.stats import Counters
from wsbroadcast.typed.message_types import MessageTypes

ROUNDS = 41
NUMBER = 20_000


class Say(BaseModel):
    type: Literal["say"] = "say"
    text: str
    to: str
    likes: int
    tags: list[str]


class Price(BaseModel):
    type: Literal["price"] = "price"
    symbol: str
    bid: float
    ask: float
    text: str


class Typing(BaseModel):
    type: Literal["typing"] = "typing"


BARE = Annotated[Say | Price | Typing, Field(discriminator="type")]


def sized(message: BaseModel, size: int = 200) -> str:
    """The JSON of a message whose text is as long as is missing."""
    missing = size - len(message.model_dump_json())
    return message.model_copy(update={"text": "x" * missing}).model_dump_json()


MESSAGES = {
    "texts": sized(Say(text="", to="alice", likes=3, tags=["a", "b", "c"])),
    "floats": sized(Price(symbol="ACME", bid=17.25, ask=17.5, text="")),
}


def ratio(raw: str) -> tuple[float, float, float]:
    """Seconds of the bare adapter and of ours, and the ratio."""
    adapter: TypeAdapter[Any] = TypeAdapter(BARE)
    types: MessageTypes[Any] = MessageTypes(Say | Price | Typing, "receives")
    reader = TypedReader(types, Counters())
    assert reader.read(raw) == adapter.validate_json(raw)

    def bare() -> None:
        adapter.validate_json(raw)

    def ours() -> None:
        reader.read(raw)

    pairs = [(_seconds(bare), _seconds(ours)) for _ in range(ROUNDS)]
    ones, others = zip(*pairs, strict=True)
    return median(ones), median(others), median(other / one for one, other in pairs)


def _seconds(function: Callable[[], None]) -> float:
    return timeit(function, number=NUMBER) / NUMBER


def main() -> None:
    for name, raw in MESSAGES.items():
        one, other, quotient = ratio(raw)
        print(f"{name}: {len(raw)} bytes, bare {one * 1e6:.2f} µs, ours {other * 1e6:.2f} µs, ratio {quotient:.2f}")


if __name__ == "__main__":
    main()
