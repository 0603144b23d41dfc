"""The table for envelopes that are too large for a notification of Postgres."""

from __future__ import annotations

import re
import time

from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.text import plain

MAX_ENVELOPE_BYTES = 8 * 1024 * 1024
"""The largest that goes in: what takes less than the timeout of a publish also over 100 Mbit/s."""

KEPT_SECONDS = 60
"""For which a row is kept: longer than any node takes to read it."""

KEPT_IN_TRANSACTION_SECONDS = 900
"""The same for a row that nobody can see before the app's own transaction ends."""

# Rows that one clean-up removes, so that a publish which does it takes no longer than a moment.
_CLEAN_UP_ROWS = 64

_SCHEMA = re.compile(r"[A-Za-z0-9_-]{1,63}")

NOTIFY_ONE = "SELECT pg_notify($1, $2)"

# One statement, so one transaction and one turn of the global lock that a commit with notifications takes. Rows of a
# sub-select come in its order, so that is the order of the notifications; the count spares a row of result for each.
NOTIFY = (
    "SELECT count(pg_notify(channel, note)) FROM (SELECT channel, note"
    " FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS notes (channel, note, place) ORDER BY place) AS ordered"
)


class SpillTable:
    """One table per prefix. It is made when the first envelope needs it.

    It is unlogged: its rows live for a minute, and needn't be in the write-ahead log, in a backup or on a standby.

    Every node is told of every row, whoever it is for, and removes what has had its time. When that is to be is known
    here, and not to a link, because rows outlive links.

    Args:
        prefix: The engine's prefix.
        schema: The schema it is in; a fixed one, because nodes with other roles may have another search path.

    Raises:
        ConfigurationError: If the schema's name isn't plain.
    """

    def __init__(self, prefix: str, schema: str) -> None:
        if not isinstance(schema, str) or not _SCHEMA.fullmatch(schema):
            raise ConfigurationError(f"schema must be 1 to 63 letters, digits, - or _, not {schema!r:.80}")
        self.name = f'"{plain(schema)}"."{prefix}_spill"'
        """The table's name as SQL has it; nothing in it needs an escape."""
        definition = "(id uuid PRIMARY KEY, expires timestamptz NOT NULL, envelope bytea NOT NULL)"
        create = f"CREATE UNLOGGED TABLE IF NOT EXISTS {self.name} {definition}"
        self.permit = f"{create}; GRANT SELECT, INSERT, DELETE ON {self.name} TO"
        """What an administrator runs, but for the role."""
        # Two that create it at once would collide, IF NOT EXISTS or not.
        self.create = f"SELECT pg_advisory_xact_lock(hashtext('{self.name}')); {create}"
        self.read = f"SELECT CASE WHEN octet_length(envelope) <= $2 THEN envelope END FROM {self.name} WHERE id = $1"  # noqa: S608
        """Takes an id and a size in bytes; a larger envelope is null."""
        self.clean_up = (
            f"WITH gone AS (DELETE FROM {self.name} WHERE id IN (SELECT id FROM {self.name}"  # noqa: S608
            f" WHERE expires < clock_timestamp() LIMIT {_CLEAN_UP_ROWS} + $1::int FOR UPDATE SKIP LOCKED) RETURNING id)"
            f" SELECT (SELECT count(*) FROM gone) >= {_CLEAN_UP_ROWS} + $1::int,"
            f" (SELECT count(*) FROM {self.name}) > (SELECT count(*) FROM gone)"
        )
        """Takes how many rows more than usual to remove; tells whether there is more to remove, and more at all."""
        self.publish = (
            f"WITH spilled AS (INSERT INTO {self.name} (id, expires, envelope)"  # noqa: S608
            f" SELECT id, clock_timestamp() + interval '{KEPT_SECONDS} s', envelope"
            f" FROM unnest($3::uuid[], $4::bytea[]) AS rows (id, envelope)) {NOTIFY}"
        )
        """Takes channels, texts, ids and envelopes."""
        self.exists = f"SELECT to_regclass('{self.name}') IS NOT NULL"
        """Tells whether the table is there, which is no error in the server's log if it isn't."""
        self.insert = (
            f"INSERT INTO {self.name} (id, expires, envelope) VALUES (CAST({{id}} AS uuid), clock_timestamp()"  # noqa: S608
            f" + interval '{KEPT_IN_TRANSACTION_SECONDS} s', {{envelope}})"
        )
        """For the app's own transaction: takes `id` and `envelope`, which each driver writes in its own way."""
        # By the monotonic clock. The first clean-up is for what processes before this one have left; `None` if we know
        # of no rows.
        self._clean_up_at: float | None = time.monotonic()
        # Until then there may be rows that a clean-up can't see: their transaction has not ended.
        self._unseen_until = 0.0

    def expect_clean_up(self) -> None:
        """Take note that there is a row in the table."""
        if self._clean_up_at is None:
            self._clean_up_at = time.monotonic() + KEPT_SECONDS + 1

    def expect_commit(self) -> None:
        """Take note that there will be one if and when a transaction is committed."""
        self._unseen_until = time.monotonic() + KEPT_IN_TRANSACTION_SECONDS + 1
        self.expect_clean_up()

    def begin_clean_up(self) -> bool:
        """Return whether it is time to remove rows; somebody who then doesn't get to it tries again later."""
        now = time.monotonic()
        if self._clean_up_at is None or now < self._clean_up_at:
            return False
        self._clean_up_at = now + KEPT_SECONDS + 1
        return True

    def end_clean_up(self, *, is_behind: bool, has_more: bool) -> None:
        """Say when to begin the next one.

        Args:
            is_behind: Whether there are more rows that have had their time.
            has_more: Whether there are more rows at all.
        """
        now = time.monotonic()
        if is_behind:
            self._clean_up_at = now
        elif not has_more and now >= self._unseen_until:
            self._clean_up_at = None
