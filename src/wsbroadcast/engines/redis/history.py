"""What Redis keeps of what is published. A script numbers, keeps and sends each envelope in one step.

Each name has two keys in its slot. The *position* is a hash: the epoch `e`, the offset of the newest envelope `s`, and
the generation `g` of the server that made the epoch. The *stream* holds the newest envelopes, each with the id
`<offset>-<milliseconds since 1970, by the server>`. The position lives longer than the stream. So a client that comes
back to a quiet name is told that it missed nothing.

A server's generation is its replication id, which changes with every start and every promotion. Then envelopes may be
lost that were confirmed before, so the epoch changes too. Offsets alone can't show that the newest envelopes are others
now.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import sha1

from wsbroadcast.engines.broker.history import new_epoch
from wsbroadcast.engines.broker.link import Entry, Keep, KeptParcel, Stretch
from wsbroadcast.engines.redis.connection import Asker
from wsbroadcast.engines.redis.protocol import ErrorReply, Reply, pack
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable
from wsbroadcast.history import Appended, History, HistoryRules
from wsbroadcast.logs import about, logger
from wsbroadcast.publication import Position

# Lua doesn't count larger numbers exactly, and Redis doesn't take them as a time.
_MOST = 2**53

# About how many bytes one call of the reading script returns. The server does nothing else meanwhile.
_PAGE_BYTES = 4 * 1024 * 1024

# How many positions are asked for at once. What is published meanwhile then waits for only some of them.
_ASK_POSITIONS = 500

# For how many names the commands are remembered, because each append needs one. Past this many, all are dropped.
_REMEMBERED = 8192

_INFO = pack("INFO", "replication")

# How much is kept when a link tests whether the server keeps anything.
_SHORT = History(messages=1, seconds=1, remember=1)

# The text that a server puts before and after an error that was raised inside a script.
_AROUND = re.compile(
    r"^(ERR Error running script \(call to f_[0-9a-f]+\): @user_script: *\d+: )?(@user_script: *\d+: )?-?"
    r"| script: ([0-9a-f]{40}, )?on @user_script:\d+\.$"
)

# How a server words NOPERM inside a script.
_FORBIDDEN = re.compile(r"^(ERR )?(ACL failure in script: |(?=The user executing the script can't ))")

# The beginning of each script. ARGV: the generation as it was last seen, and milliseconds to remember the position; the
# last one is a fresh epoch. If that generation differs from the stored one, either may be old, so the script asks the
# server for its generation.
_SETTLE = """
local call, stream, position = redis.call, KEYS[1], KEYS[2]
local known = call('HMGET', position, 'e', 'g', 's')
local epoch, top = known[1], known[3] or '0'
if not epoch or known[2] ~= ARGV[1] then
  local generation = string.match(call('INFO', 'replication'), 'master_replid:(%x+)')
  if not epoch or known[2] ~= generation then
    epoch, top = ARGV[#ARGV], '0'
    call('HSET', position, 'e', epoch, 'g', generation, 's', top)
    call('PEXPIRE', position, ARGV[2])
    call('DEL', stream)
  end
end
"""

# KEYS: stream, position, and for an idempotency key the key that remembers its position. ARGV goes on with:
# milliseconds to keep the stream, PUBLISH or SPUBLISH, the name, how many envelopes are kept (0: not this one), the
# envelope up to the last brace of its header, and the rest of the envelope. It returns `<epoch>:<offset>`, with `:1`
# added for a repeat. If memory is short, Redis refuses the first command that writes, but none after it. So all is done
# or nothing. An append that was refused leaves its id at the stream, although its entry is removed. The next append has
# the same offset. In the same millisecond, or if the clock was set back since, it takes a later time. The name is not
# in KEYS, although it has their slot: while the slot moves to another node, a name in KEYS would stop every append.
_APPEND = (
    _SETTLE
    + """
if KEYS[3] then
  local before = call('GET', KEYS[3])
  if before and string.match(before, '^(.+):') == epoch then return before .. ':1' end
end
local offset = string.format('%.0f', top + 1)
local place = epoch .. ':' .. offset
local id, refusal
call('HSET', position, 's', offset)
call('PEXPIRE', position, ARGV[2])
if ARGV[6] ~= '0' then
  local now, later = call('TIME'), 1
  local ms = now[1] .. string.sub(now[2] + 1000000, 2, 4)
  id = offset .. '-' .. ms
  local kept = redis.pcall('XADD', stream, 'MAXLEN', '~', ARGV[6], id, 'd', ARGV[7] .. ARGV[8])
  while type(kept) == 'table' and string.find(kept.err, 'equal or smaller', 1, true) do
    ms, later = string.format('%.0f', ms + later), later * 2
    id = offset .. '-' .. ms
    kept = redis.pcall('XADD', stream, 'MAXLEN', '~', ARGV[6], id, 'd', ARGV[7] .. ARGV[8])
  end
  if type(kept) == 'table' then id, refusal = nil, kept else call('PEXPIRE', stream, ARGV[3]) end
end
if not refusal then
  local sent = redis.pcall(ARGV[4], ARGV[5], ARGV[7] .. ',"epoch":"' .. epoch ..
    '","offset":' .. offset .. ',"previous":' .. top .. ARGV[8])
  if type(sent) == 'table' then refusal = sent end
end
if refusal then
  call('HSET', position, 's', top)
  if id then call('XDEL', stream, id) end
  return refusal
end
if KEYS[3] then call('SET', KEYS[3], place, 'PX', 300000) end
return place
"""
)

# A position that somebody asks for is remembered longer, because connections in a quiet channel know it too.
_POSITION = (
    _SETTLE
    + """
if call('PTTL', position) < ARGV[2] / 2 then call('PEXPIRE', position, ARGV[2]) end
"""
)

# ARGV goes on with: the lowest and the highest id, and how many envelopes. It returns the position, the time, the
# places of the envelopes as `<offset>-<milliseconds>-<size>`, the newest first, then all envelopes in one text, and
# whether there are more. It is one text, because a long list would be parsed from its beginning with each piece that
# arrives.
_READ = (
    _POSITION
    + """
local now, places, envelopes, bytes = call('TIME'), {}, {}, 0
local left, high = tonumber(ARGV[5]), ARGV[4]
while left > 0 and bytes < PAGE do
  local some = call('XREVRANGE', stream, high, ARGV[3], 'COUNT', math.min(left, 16))
  for _, entry in ipairs(some) do
    local envelope = entry[2][2]
    places[#places + 1] = entry[1] .. '-' .. #envelope
    envelopes[#envelopes + 1] = envelope
    bytes = bytes + #envelope
  end
  left = left - 16
  if #some < 16 then left = 0 else high = string.format('%.0f', string.match(some[16][1], '%d+') - 1) end
end
local ms = now[1] .. string.sub(now[2] + 1000000, 2, 4)
return {epoch, top, ms, table.concat(places, ' '), table.concat(envelopes), left > 0 and 1 or 0}
""".replace("PAGE", str(_PAGE_BYTES))
)

_POSITION += "return epoch .. ':' .. top\n"


class Script:
    """A script, and how it is called.

    Args:
        text: Its text.
    """

    def __init__(self, text: str) -> None:
        text = re.sub(r"\n *", "\n", text)  # shorter, because it is sent often
        # The first call of each batch sends the text. After a restart or SCRIPT FLUSH the server doesn't know the hash.
        self._calls = ("EVALSHA", sha1(text.encode()).hexdigest()), ("EVAL", text)  # noqa: S324  # what Redis calls it

    def call(self, keys: Sequence[str], *arguments: str | bytes, is_first: bool) -> bytes:
        """Return the command."""
        return pack(*self._calls[is_first], b"%d" % len(keys), *keys, *arguments)

    def head(self, keys: Sequence[str], *arguments: str | bytes, more: int, is_first: bool) -> bytes:
        """Return the beginning of the command. The caller appends `more` arguments to it."""
        begun = self.call(keys, *arguments, is_first=is_first)
        return b"*%d%b" % (len(keys) + len(arguments) + more + 3, begun[begun.index(b"\r") :])


APPEND, POSITION, READ = Script(_APPEND), Script(_POSITION), Script(_READ)


_Begun = dict[str, tuple[History, bytes]]


class Keeper:
    """Reads and writes what one server keeps.

    Args:
        asker: The connection to the server.
        prefix: The beginning of all names.
        verb: The command that publishes: PUBLISH or SPUBLISH.
    """

    def __init__(self, asker: Asker, prefix: str, verb: str) -> None:
        self._asker = asker
        self._prefix = prefix
        self.verb = verb
        """The command that publishes."""
        self.generation = ""
        """The generation of the server as it was last seen; empty before `learn`."""
        # The beginning of an append's command, by name: for later appends of a batch, and for the first.
        self._known: tuple[_Begun, _Begun] = {}, {}

    async def learn(self) -> None:
        """Find out the generation of the server.

        Raises:
            ConfigurationError: If the server doesn't tell it.
            ConnectionError: If the server is a replica, which takes nothing.
        """
        (answer,) = await self._asker.ask(_INFO)
        self._take_generation(answer)

    def _take_generation(self, answer: Reply) -> None:
        if isinstance(answer, ErrorReply):
            error = self.explain(answer)
            if isinstance(error, ConfigurationError):
                raise ConfigurationError(
                    f"{error}; history= needs +info, as presence= does: it shows whether what was kept may be lost"
                )
            raise error
        found = re.search(rb"\bmaster_replid:([0-9a-f]{40})\b", answer if isinstance(answer, bytes) else b"")
        if found is None:
            raise ConfigurationError(
                f"Redis at {self._asker.where} has no master_replid in INFO replication, by which history= sees "
                "whether what was kept may be lost: connect to the server itself, or leave history= out"
            )
        assert isinstance(answer, bytes)
        if re.search(rb"\brole:slave\b", answer):
            raise ConnectionError(f"Redis at {self._asker.where} is a replica, which takes no writes")
        generation = found[1].decode()
        if generation != self.generation:
            self.generation = generation
            self._known = {}, {}

    def trial(self, probe: str | None) -> list[bytes]:
        """Return commands that test, with a name of no audience, whether the server keeps anything."""
        if probe is None:
            return [_INFO]
        parcel, fresh = KeptParcel(probe, b'{"v":1}\n', Keep(_SHORT)), new_epoch()
        appends = [self.append(parcel, fresh.encode(), is_first=is_first) for is_first in (True, False)]
        return [_INFO, *appends, self._read(probe, None, "+", 1, fresh, _SHORT)]

    def take_trial(self, answers: Sequence[Reply]) -> None:
        """Take the answers of the trial.

        Raises:
            ConfigurationError: If the server can't keep anything. It isn't raised if it only takes nothing now.
        """
        for answer in answers[:1]:
            self._take_generation(answer)
        for answer in answers[1:]:
            if isinstance(answer, ErrorReply):
                error = self.explain(answer)
                if not isinstance(error, EngineError):
                    raise error
                if not isinstance(error, EngineUnavailable):
                    raise ConfigurationError(f"{error}: history= needs scripts and streams, from Redis 5 on")

    async def ask(self, *commands: bytes) -> list[Reply]:
        """Send commands in one go; return their answers.

        Raises:
            Exception: If an answer is an error. It is made of the first one by `explain`.
        """
        answers = await self._asker.ask(*commands)
        for answer in answers:
            if isinstance(answer, ErrorReply):
                raise self.explain(answer)
        return answers

    # Appending.

    async def ready(self) -> None:
        """Find out the server's generation if it isn't known yet."""
        if not self.generation:
            await self.learn()

    def append(self, parcel: KeptParcel, fresh: bytes, *, is_first: bool) -> bytes:
        """Return the command that keeps a parcel.

        Args:
            parcel: The parcel.
            fresh: An epoch that no history has yet.
            is_first: Whether this is the first append of the batch.
        """
        name, envelope = parcel
        history, key = parcel.keep
        end = envelope.index(b"\n") - 1
        size = len(envelope) - end
        known = self._known[is_first].get(name)
        if key is not None or size - 2 > history.max_kept_bytes:
            messages = history.messages if size - 2 <= history.max_kept_bytes else 0
            begun = self._begun(parcel, messages, is_first=is_first)
        elif known is not None and known[0] is history:
            begun = known[1]
        else:
            begun = self._begun(parcel, history.messages, is_first=is_first)
            if len(self._known[is_first]) >= _REMEMBERED:
                self._known[is_first].clear()
            self._known[is_first][name] = history, begun
        # The part that differs from one parcel to the next.
        return b"%b$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
            *(begun, end, envelope[:end]),
            *(size, envelope[end:], len(fresh), fresh),
        )

    def _begun(self, parcel: KeptParcel, messages: int, *, is_first: bool) -> bytes:
        name = parcel.name
        history, key = parcel.keep
        return APPEND.head(
            self._keys(name) if key is None else (*self._keys(name), f"{self._prefix}:key:{{{name}}}:{key}"),
            *(self.generation, _ms(history.remember), _ms(history.seconds), self.verb, name),
            str(min(messages, _MOST)),
            more=3,
            is_first=is_first,
        )

    def appended(self, answer: Reply) -> Appended:
        """Read the answer to an append."""
        if isinstance(answer, bytes):
            epoch, _, rest = answer.decode().partition(":")
            offset, _, repeat = rest.partition(":")
            if offset:
                return Appended(Position(epoch, int(offset)), repeat == "1")
        raise ValueError(f"Redis at {self._asker.where} answers a publish with {type(answer).__name__}")

    # Reading.

    async def read(self, name: str, since: int | None, history: History) -> Stretch:
        """Read what was kept under a name after an offset, and from which offset on it is complete."""
        await self.ready()
        found: list[Entry] = []
        top, high, has_more = None, "+", True
        while has_more:
            few = history.messages - len(found)
            (answer,) = await self._asker.ask(self._read(name, since, high, few, new_epoch(), history))
            position, entries, has_more = self._page(answer)
            if top is None:
                top = position
            elif position.epoch != top.epoch:
                return await self.read(name, since, history)  # the history was removed meanwhile
            found += entries
            high = str(found[-1].offset - 1) if found else ""
        assert top is not None
        base = top.offset
        for entry in found:
            if entry.offset != base:
                break  # the next one was too large to be kept, or more than the last few were removed
            base -= 1
        return Stretch(top, found[::-1], base)

    def _read(self, name: str, since: int | None, high: str, few: int, fresh: str, history: History) -> bytes:
        low = "-" if since is None else str(since + 1)
        most = str(min(few, _MOST))
        known = self.generation, _ms(history.remember)
        return READ.call(self._keys(name), *known, low, high, most, fresh, is_first=True)

    def _page(self, answer: Reply) -> tuple[Position, list[Entry], bool]:
        match answer:
            case ErrorReply():
                raise self.explain(answer)
            case [bytes(epoch), bytes(offset), bytes(now), bytes(places), bytes(envelopes), int(has_more)]:
                pass
            case _:
                raise ValueError(f"Redis at {self._asker.where} answers a read with {type(answer).__name__}")
        entries, end, time = [], 0, int(now)
        for place in places.split():
            at, kept, size = place.split(b"-")
            begin, end = end, end + int(size)
            entries.append(Entry(envelopes[begin:end], int(at), (time - int(kept)) / 1000, int(at) - 1))
        return Position(epoch.decode(), int(offset)), entries, bool(has_more)

    async def positions(self, names: Sequence[str], histories: Sequence[History]) -> list[Position]:
        """Read the newest position under each name."""
        await self.ready()
        found: list[Position] = []
        for start in range(0, len(names), _ASK_POSITIONS):
            fresh = new_epoch()
            some = zip(names[start : start + _ASK_POSITIONS], histories[start:], strict=False)
            commands = [
                POSITION.call(self._keys(name), self.generation, _ms(history.remember), f"{fresh}{at}", is_first=not at)
                for at, (name, history) in enumerate(some)
            ]
            for answer in await self._asker.ask(*commands):
                if isinstance(answer, ErrorReply):
                    raise self.explain(answer)
                found.append(self.appended(answer).position)
        return found

    async def forget(self, name: str) -> None:
        """Remove what is kept under a name. The next command for this name makes a new epoch."""
        await self.ask(pack("DEL", *self._keys(name)))

    def explain(self, answer: ErrorReply) -> Exception:
        """Return the exception for an error reply, as `Asker.explain` does. It may come from inside a script."""
        error = ErrorReply(_FORBIDDEN.sub("NOPERM ", _AROUND.sub("", str(answer))))
        if error.code in (
            "ASK",
            "TRYAGAIN",
        ):  # not MOVED, after which the link must ask again which node has which slot
            return EngineUnavailable(f"Redis at {self._asker.where} is moving a slot to another node; nothing was sent")
        return self._asker.explain(error)

    def _keys(self, name: str) -> tuple[str, str]:
        # The braces give the keys the name's slot. No name has braces itself.
        return f"{self._prefix}:history:{{{name}}}", f"{self._prefix}:position:{{{name}}}"


def _ms(seconds: float) -> str:
    return str(int(min(seconds * 1000, _MOST)) or 1)


class Written:
    """The rules that are written at the broker. All links of an engine share this object.

    Args:
        prefix: The beginning of all names.
    """

    def __init__(self, prefix: str) -> None:
        self.key = f"{prefix}:histories"
        """The key that has the rules."""
        # The rules of other nodes, as they were read last.
        self._others: HistoryRules | None = None
        # What the last line in the log was about.
        self._told: object = None

    def questions(self, rules: HistoryRules | None) -> list[bytes]:
        """Return commands that read the rules at the broker, and write ours."""
        question = pack("GET", self.key)
        return [question] if rules is None else [question, pack("SET", self.key, rules.to_json())]

    def again(self, rules: HistoryRules) -> bytes:
        """Return the command that writes our rules if there are none any more."""
        return pack("SET", self.key, rules.to_json(), "NX")

    def take(self, answers: Sequence[Reply], rules: HistoryRules | None, keeper: Keeper) -> HistoryRules | None:
        """Take the answers; return our rules, or else those of other nodes.

        Raises:
            ConfigurationError: If we have rules, and may not write them.
        """
        for answer in answers:
            if isinstance(answer, ErrorReply):
                error = keeper.explain(answer)
                if rules is not None and not isinstance(error, EngineError):
                    raise error
                logger.info(
                    "the rules of histories in %s can't be read or written (%s): that needs +get",
                    self.key,
                    error,
                    extra=about("history.rules_unknown", engine="redis"),
                )
                return rules or self._others  # the server isn't ready yet: the rules that were read before
        found, self._others = answers[0], None
        if not isinstance(found, bytes) or (rules is not None and found == rules.to_json()):
            return rules
        try:
            others = self._others = HistoryRules.from_json(found)
        except ConfigurationError as error:
            self._warn(found, f"{error}; programs that only publish keep nothing until it is removed")
            return rules
        if rules is not None:
            self._warn(
                found, f"another node keeps other histories: {others} there, {rules} here; the last to start decides"
            )
        return rules or others

    def _warn(self, found: bytes, text: str) -> None:
        if found != self._told:
            self._told = found
            logger.warning("%s in Redis: %s", self.key, text, extra=about("history.rules_differ", engine="redis"))
