"""What the demo's page and its server say to each other."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from wsbroadcast import Stats

# Who the visitors are to each other: no two with the same name, and nobody's words move those of others.


MAX_NAME_LENGTH = 24

HUES = 8
"""As many colours as the page has for names; each visitor gets the one that the fewest have."""

# Emoji and several scripts need these two of the invisible characters: the zero width non-joiner and joiner.
_JOINERS = "\u200c\u200d"

# Letters and symbols that are drawn as nothing.
_BLANKS = "\u115f\u1160\u2800\u3164\uffa0"


@dataclass
class Visitor:
    """What the demo remembers about a connection, as its `info`."""

    name: str
    hue: int
    is_stalled: bool = False
    since: float = 0.0
    """When it came, in seconds since 1970."""


def clean_text(text: str) -> str:
    """Return a text without what would reorder or break the lines around it; empty if it shows nothing.

    Line breaks and other control characters become spaces. Invisible characters go; those that override the direction
    of text (Unicode Standard Annex 9, 2) are among them.
    """
    cleaned = "".join(_cleaned(character) for character in text)
    return cleaned if _looks(cleaned) else ""


def _cleaned(character: str) -> str:
    category = unicodedata.category(character)
    if category in ("Cc", "Zl", "Zp"):
        return " "
    if category in ("Cf", "Co", "Cs") and character not in _JOINERS:
        return ""
    return character


def clean_channel(text: str) -> str:
    """Return a channel's name, cleaned in the same way and without spaces that nobody sees."""
    return " ".join(clean_text(text).split())


def clean_name(text: str) -> str:
    """Return a visitor's name, cleaned in the same way; a text that shows nothing gives "Guest"."""
    return clean_channel(text) or "Guest"


def next_visitor(wanted: str, hue: int | None, others: Iterable[Visitor]) -> Visitor:
    """Return a visitor with a name that none of the others has, a number behind it if need be, and with a colour.

    Args:
        wanted: The name, cleaned.
        hue: The colour it has already.
        others: Those who are there.
    """
    others = list(others)
    taken = {_looks(other.name) for other in others}
    name, number = wanted, 1
    while _looks(name) in taken:
        number += 1
        name = f"{wanted[: MAX_NAME_LENGTH - len(str(number)) - 1].rstrip()} {number}"
    if hue is None:
        used = Counter(other.hue for other in others)
        hue = min(range(HUES), key=lambda one: used[one])
    return Visitor(name, hue)


def _looks(name: str) -> str:
    """Return what a name looks like at a glance: names for which it is the same are taken for one."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return "".join(
        character
        for character in folded
        if unicodedata.category(character) not in ("Cf", "Mn", "Me", "Zs") and character not in _BLANKS
    )


# What is said.


Name = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_NAME_LENGTH),
    AfterValidator(clean_name),
]


class Inbound(BaseModel):
    """What a page may send: these fields and no others."""

    model_config = ConfigDict(extra="forbid")


class Hello(Inbound):
    """Who a tab is and which channel it is in; comes first, and again when either changes."""

    type: Literal["hello"]
    name: Name
    """The one it would like; another may have it already."""
    channel: Annotated[str, AfterValidator(clean_channel)]


class Chat(Inbound):
    """A line for the tab's channel."""

    type: Literal["chat"]
    text: Annotated[str, StringConstraints(min_length=1, max_length=2000), AfterValidator(clean_text)]


class Stall(Inbound):
    """The tab is about to stop reading, so that the others can see who it is."""

    type: Literal["stall"]


class Flood(Inbound):
    """One message of a flood, for everyone; numbered, so that every tab can tell whether it misses one."""

    type: Literal["flood"]
    flood: Annotated[str, StringConstraints(max_length=32)]
    number: Annotated[int, Field(ge=1)]
    total: Annotated[int, Field(ge=1, le=10_000)]
    padding: Annotated[str, StringConstraints(max_length=4096)]


class Welcome(BaseModel):
    """The answer to `Hello`: who the tab is from now on."""

    type: Literal["welcome"] = "welcome"
    id: str
    name: str
    hue: int
    channel: str


class Refused(BaseModel):
    """Why something the tab asked for didn't happen."""

    type: Literal["refused"] = "refused"
    text: str


class ChatLine(BaseModel):
    """What somebody wrote in a channel."""

    type: Literal["chat"] = "chat"
    sender: str
    name: str
    hue: int
    channel: str
    text: str


class FloodLine(BaseModel):
    """One message of somebody's flood."""

    type: Literal["flood"] = "flood"
    flood: str
    name: str
    number: int
    total: int
    padding: str


class Notice(BaseModel):
    """Somebody came to a channel, or left it; with the close code if the connection has ended."""

    type: Literal["notice"] = "notice"
    event: Literal["joined", "left"]
    name: str
    channel: str
    code: int | None = None
    reason: str = ""


class Guest(BaseModel):
    """Somebody who is connected."""

    id: str
    name: str
    hue: int
    channel: str
    is_stalled: bool
    since: float
    """When it came, in seconds since 1970."""


class Counted(BaseModel):
    """What a worker has counted, as `manager.stats()` tells it."""

    type: Literal["counted"] = "counted"
    worker: str
    connections: int
    connects: int
    deliveries: int
    behind: int
    backlog_bytes: int
    dropped: dict[str, int]
    evicted: dict[str, int]
    sinks: dict[str, int]

    @classmethod
    def of(cls, worker: str, stats: Stats) -> Self:
        """Return what is told of the stats of a worker."""
        return cls(worker=worker, **{name: getattr(stats, name) for name in cls.model_fields if hasattr(stats, name)})


def total(counted: Sequence[Counted]) -> Counted:
    """Return what all workers have counted together."""
    return Counted(
        worker="",
        connections=sum(each.connections for each in counted),
        connects=sum(each.connects for each in counted),
        deliveries=sum(each.deliveries for each in counted),
        behind=sum(each.behind for each in counted),
        backlog_bytes=sum(each.backlog_bytes for each in counted),
        dropped=_added(each.dropped for each in counted),
        evicted=_added(each.evicted for each in counted),
        sinks=_added(each.sinks for each in counted),
    )


def _added(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    added: Counter[str] = Counter()
    for part in parts:
        added.update(part)
    return dict(added)


class Ended(BaseModel):
    """A connection that has ended, and how."""

    type: Literal["ended"] = "ended"
    id: str
    name: str
    code: int | None
    reason: str
    at: float
    """Seconds since 1970."""


class State(BaseModel):
    """What the page shows beside the chat; asked for over HTTP, so that a stalled tab can go on watching."""

    stats: Counted
    """Of all workers together."""
    workers: int
    roster: list[Guest]
    """Those who came first, if there are very many."""
    visitors: int
    """All of them."""
    ended: list[Ended]
    """The latest first."""
    max_backlog_bytes: int
    send_timeout: float


# The comparison.


class Tick(BaseModel):
    """What is broadcast by both managers, ten times a second."""

    type: Literal["tick"] = "tick"
    number: int
    at: float
    """When it was made, on the server's own clock."""
    padding: str = ""


class Clock(Inbound):
    """Asks what the time is on the server's clock."""

    type: Literal["clock"]
    sent: float
    """The time on the client's; comes back with the answer."""


class ClockAnswer(BaseModel):
    """The answer to `Clock`."""

    type: Literal["clock"] = "clock"
    sent: float
    at: float


class StallClient(Inbound):
    """Let a client of each manager stop reading."""

    type: Literal["stall"]


class WakeClient(Inbound):
    """Let it read on."""

    type: Literal["wake"]


class StallState(BaseModel):
    """How the stalled client fares; what was last, if nobody stalls now. Times are on the server's clock."""

    type: Literal["stall"] = "stall"
    phase: Literal["idle", "busy", "stalled"]
    """`busy` while it connects, and while it catches up in the end."""
    started_at: float | None
    over_at: float | None
    """When it began to read again."""
    seconds: float
    """How long it lasts if nobody wakes the client before."""
    ended_at: float | None
    """When our manager ended its connection."""
    code: int | None
    reason: str
    waiting_bytes: int
    """What waits in our manager for slow consumers."""
    problem: str
    """Why nobody could be stalled."""
