"""Messages and names that engines and brokers have been known to get wrong."""

from __future__ import annotations

from unicodedata import normalize

from wsbroadcast.audience import Audience
from wsbroadcast.message import Message

NEWS = Audience("channel", "news")
SPORT = Audience("channel", "sport")

MESSAGES = (
    Message.of("text"),
    Message.of(""),
    Message.of('line\nand "line", \0, \\ and 漢字 \N{GRINNING FACE}'),
    Message.of(b""),
    Message.of(bytes(range(256))),
    Message.of(b'{"v":1}\n\r\n'),
    Message.json({"number": 1.5, "nothing": None, "list": ["ü", True]}),
    Message.of("newest", key="oil"),
    Message.of(b"newest", key=" \N{GRINNING FACE}\n"),
)
"""Messages of every kind."""

NAMES = (
    *("*", ">", "a.>", "a.*", "a.b", ".", "..", "a", "a b", "a  b", " a", "a ", "a%20b", "a+b", "a/b", "a:b", "a|b"),
    *("news", "news1", "new", "News", "NEWS", "news[a-z]", "newsa", "news?", "^news$", "channel:news", "everyone"),
    *('"; DROP TABLE news', "'; DROP TABLE news", '"', "'", "''", "\\", "$1", "${a}", "%s", "%", "%%", "{}", "~", "_"),
    *("\N{GRINNING FACE}" * 50, "\N{WINKING FACE}" * 50, "x" * 200, "x" * 199, "x" * 63, "x" * 64, "X" * 64),
    *(normalize("NFC", "café"), normalize("NFD", "café"), "CAFÉ", "ß", "ss", "İ", "i", "\N{NO-BREAK SPACE}"),
)
"""Names of channels and users that a broker may take for something else, or for each other."""
