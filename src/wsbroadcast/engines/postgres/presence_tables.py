"""The tables of presence, and the functions that change them and send the change. All of it is SQL."""

from __future__ import annotations

from wsbroadcast.engines.postgres.notifier import KEPT_SECONDS, SpillTable
from wsbroadcast.engines.postgres.protocol import MAX_NOTE_BYTES
from wsbroadcast.text import plain

# For how many seconds the version of an empty channel is remembered. A node that was away for longer reads it anew.
_REMEMBER_SECONDS = 600

# How many empty channels one sweep forgets at most.
_FORGOTTEN_CHANNELS = 500

# A part of the functions' names, because nodes with two versions of this library may run at the same time.
_LAYOUT = 1

# Channels, members and infos are JSON texts, in quotes and in ASCII. Any encoding of a database has these characters,
# and envelopes are put together from them. `holders` is the number of leases under which a member was entered, `size`
# the number of members of a channel. The tables are unlogged: after a crash of the server they are empty, and each node
# takes a new lease.
_TABLES = """
CREATE UNLOGGED TABLE IF NOT EXISTS {leases} (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    incarnation text COLLATE "C" NOT NULL UNIQUE,
    until timestamptz NOT NULL
) WITH (fillfactor = 50);
CREATE UNLOGGED TABLE IF NOT EXISTS {channels} (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text COLLATE "C" NOT NULL UNIQUE,
    channel text NOT NULL,
    topic text NOT NULL,
    version bigint NOT NULL DEFAULT 0,
    size int NOT NULL DEFAULT 0,
    forget_at timestamptz
) WITH (fillfactor = 80);
CREATE INDEX IF NOT EXISTS {empty} ON {channels} (forget_at) WHERE forget_at IS NOT NULL;
CREATE UNLOGGED TABLE IF NOT EXISTS {members} (
    channel bigint NOT NULL,
    member text COLLATE "C" NOT NULL,
    info text NOT NULL,
    holders int NOT NULL,
    PRIMARY KEY (channel, member)
) WITH (fillfactor = 80);
CREATE INDEX IF NOT EXISTS {memberships} ON {members} (member);
CREATE UNLOGGED TABLE IF NOT EXISTS {holdings} (
    lease bigint NOT NULL,
    channel bigint NOT NULL,
    member text COLLATE "C" NOT NULL,
    PRIMARY KEY (lease, channel, member)
);
"""

# Leases are timed by the server's clock. If a lease was once seen as over, it stays over when that clock is set back.
_RENEW = """
CREATE OR REPLACE FUNCTION {renew}(incarnation text, fresh text, seconds float8) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE {leases} AS l SET until = clock_timestamp() + seconds * interval '1 second'
    WHERE l.incarnation = $1 AND l.until > clock_timestamp();
    IF FOUND THEN
        RETURN true;
    END IF;
    INSERT INTO {leases} (incarnation, until) VALUES (fresh, clock_timestamp() + seconds * interval '1 second');
    RETURN false;
END $$;
"""

# The caller has locked the channel. What doesn't fit into a notification goes into the table for large envelopes.
_TELL = """
CREATE OR REPLACE FUNCTION {tell}(room bigint, by_whom text, joined text, gone text, more bigint) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    c {channels};
    envelope text;
    place uuid;
BEGIN
    UPDATE {channels} AS k SET version = k.version + 1, size = k.size + more,
        forget_at = CASE WHEN k.size + more = 0 THEN clock_timestamp() + interval '{remember} s' END
    WHERE k.id = room RETURNING * INTO c;
    envelope := '{{"v":1,"type":"presence","version":' || c.version || '}}' || chr(10)
        || '{{"by":"' || by_whom || '","joined":{{' || joined || '}},"left":[' || gone || ']}}';
    IF octet_length(c.name) + octet_length(' text ') + octet_length(envelope) <= {max_note} THEN
        PERFORM pg_notify(c.topic, c.name || ' text ' || envelope);
    ELSE
        place := gen_random_uuid();
        INSERT INTO {spill} (id, expires, envelope)
        VALUES (place, clock_timestamp() + interval '{spilt} s', convert_to(envelope, 'UTF8'));
        PERFORM pg_notify('{prefix}', c.name || ' table ' || replace(place::text, '-', ''));
    END IF;
    RETURN c.version;
END $$;
"""

# The lock of the lease keeps a sweep from removing it meanwhile. The lock of the channel lasts until the commit, so the
# order of versions is the order of commits. No deadlock is possible: nobody waits for a lease while it has locked a
# channel, and several channels are locked in order. Nested loops are off, because a plan that was made for a few
# members would take very long for many.
_ENTER = """
CREATE OR REPLACE FUNCTION {enter}(
    incarnation text, name text, channel text, topic text, names text[], infos text[],
    OUT version bigint, OUT joined int[]
) LANGUAGE plpgsql SET enable_nestloop = off AS $$
#variable_conflict use_column
DECLARE
    holder bigint;
    room bigint;
    entries text;
BEGIN
    SELECT l.id INTO holder FROM {leases} AS l
    WHERE l.incarnation = $1 AND l.until > clock_timestamp() FOR KEY SHARE;
    IF holder IS NULL THEN
        UPDATE {leases} AS l SET until = '-infinity' WHERE l.incarnation = $1;
        RETURN;
    END IF;
    SELECT c.id INTO room FROM {channels} AS c WHERE c.name = $2 FOR NO KEY UPDATE;
    IF room IS NULL THEN
        INSERT INTO {channels} AS c (name, channel, topic) VALUES ($2, $3, $4)
        ON CONFLICT (name) DO UPDATE SET topic = excluded.topic RETURNING c.id INTO room;
    END IF;
    WITH given AS (
        SELECT * FROM unnest(names, infos) WITH ORDINALITY AS g (member, info, nth)
    ), added AS (
        INSERT INTO {holdings} AS h (lease, channel, member) SELECT holder, room, g.member FROM given AS g
        ON CONFLICT DO NOTHING RETURNING h.member
    ), told AS (
        INSERT INTO {members} AS m (channel, member, info, holders)
        SELECT room, g.member, g.info, (a.member IS NOT NULL)::int
        FROM given AS g LEFT JOIN added AS a ON a.member = g.member
        ON CONFLICT (channel, member) DO UPDATE SET info = excluded.info, holders = m.holders + excluded.holders
        WHERE excluded.holders > 0 OR m.info <> excluded.info RETURNING m.member, m.holders
    )
    SELECT array_agg(g.nth::int), string_agg(g.member || ':' || g.info, ',') INTO joined, entries
    FROM given AS g JOIN added AS a ON a.member = g.member JOIN told AS t ON t.member = g.member WHERE t.holders = 1;
    IF joined IS NOT NULL THEN
        version := {tell}(room, $1, entries, '', cardinality(joined));
    END IF;
END $$;
"""

# The caller has locked the channel, so that no row moves. Each row is looked up by its whole key. Otherwise the server
# might read all rows of a large channel for one member that leaves, because it guesses the channel's size wrong.
_REMOVE = """
CREATE OR REPLACE FUNCTION {remove}(
    room bigint, holder bigint, by_whom text, names text[], OUT version bigint, OUT gone text[]
) LANGUAGE plpgsql SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    held text[];
    places tid[];
BEGIN
    WITH less AS (
        DELETE FROM {holdings} AS h WHERE h.ctid = ANY (ARRAY(
            SELECT k.ctid FROM unnest(names) AS n (member) CROSS JOIN LATERAL (
                SELECT i.ctid FROM {holdings} AS i
                WHERE i.lease = holder AND i.channel = room AND i.member = n.member OFFSET 0
            ) AS k
        )) RETURNING h.member
    ) SELECT array_agg(l.member) INTO held FROM less AS l;
    SELECT array_agg(k.ctid) INTO places FROM unnest(held) AS n (member) CROSS JOIN LATERAL (
        SELECT i.ctid FROM {members} AS i WHERE i.channel = room AND i.member = n.member OFFSET 0
    ) AS k;
    WITH less AS (
        DELETE FROM {members} AS m WHERE m.ctid = ANY (places) AND m.holders = 1 RETURNING m.member
    ) SELECT array_agg(l.member) INTO gone FROM less AS l;
    UPDATE {members} AS m SET holders = m.holders - 1 WHERE m.ctid = ANY (places);
    IF gone IS NOT NULL THEN
        version := {tell}(room, by_whom, '', array_to_string(gone, ','), -cardinality(gone));
    END IF;
END $$;
"""

_LEAVE = """
CREATE OR REPLACE FUNCTION {leave}(
    incarnation text, name text, names text[], OUT version bigint, OUT gone text[]
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    holder bigint;
    room bigint;
BEGIN
    SELECT l.id INTO holder FROM {leases} AS l WHERE l.incarnation = $1;
    SELECT c.id INTO room FROM {channels} AS c WHERE c.name = $2 FOR NO KEY UPDATE;
    SELECT r.version, r.gone INTO version, gone FROM {remove}(room, holder, $1, names) AS r;
END $$;
"""

# Two sweeps at once take different leases. A lease that somebody has deleted by hand has no incarnation any more. Only
# an index has the entries of a lease in the order in which they are taken.
_SWEEP = """
CREATE OR REPLACE FUNCTION {sweep}(most int)
RETURNS TABLE (channel text, version bigint, by_whom text, gone text[])
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
#variable_conflict use_column
DECLARE
    dead bigint[];
    part record;
BEGIN
    SELECT array_agg(o.id) INTO dead FROM (
        SELECT l.id FROM {leases} AS l WHERE l.until <= clock_timestamp() ORDER BY l.id FOR UPDATE SKIP LOCKED
    ) AS o;
    UPDATE {leases} AS l SET until = '-infinity' WHERE l.id = ANY (dead);
    WITH RECURSIVE held (lease) AS (
        SELECT min(h.lease) FROM {holdings} AS h
        UNION ALL SELECT (SELECT min(h.lease) FROM {holdings} AS h WHERE h.lease > e.lease) FROM held AS e
        WHERE e.lease IS NOT NULL
    )
    SELECT dead || array_agg(e.lease) INTO dead FROM held AS e
    WHERE e.lease IS NOT NULL AND NOT EXISTS (SELECT FROM {leases} AS l WHERE l.id = e.lease);
    FOR part IN
        SELECT s.channel AS room, s.lease AS holder, array_agg(s.member) AS names FROM (
            SELECT h.channel, d.lease, h.member FROM unnest(dead) AS d (lease) CROSS JOIN LATERAL (
                SELECT k.channel, k.member FROM {holdings} AS k WHERE k.lease = d.lease ORDER BY k.channel LIMIT most
            ) AS h LIMIT most
        ) AS s GROUP BY s.channel, s.lease ORDER BY s.channel, s.lease
    LOOP
        SELECT c.channel INTO channel FROM {channels} AS c WHERE c.id = part.room FOR NO KEY UPDATE;
        SELECT coalesce(max(l.incarnation), '') INTO by_whom FROM {leases} AS l WHERE l.id = part.holder;
        SELECT r.version, r.gone INTO version, gone
        FROM {remove}(part.room, part.holder, by_whom, part.names) AS r;
        IF version IS NOT NULL THEN
            RETURN NEXT;
        END IF;
    END LOOP;
    DELETE FROM {leases} AS l
    WHERE l.id = ANY (dead) AND NOT EXISTS (SELECT FROM {holdings} AS h WHERE h.lease = l.id);
    DELETE FROM {channels} AS c WHERE c.id = ANY (ARRAY(
        SELECT k.id FROM {channels} AS k WHERE k.forget_at < clock_timestamp() LIMIT {forgotten} FOR UPDATE SKIP LOCKED
    ));
END $$;
"""

# It is one statement, so that version and members are of one moment.
_MEMBERS = """
SELECT c.version, (SELECT string_agg(m.member || ':' || m.info, ',') FROM {members} AS m WHERE m.channel = c.id)
FROM {channels} AS c WHERE c.name = $1
"""

_CHANNELS_OF = """
SELECT c.channel FROM {members} AS m JOIN {channels} AS c ON c.id = m.channel WHERE m.member = $1
"""

# Prepares a connection for its first use. Returns how many of the needed tables and functions are there.
_PREPARE = """
SELECT set_config('lock_timeout', $1, false), set_config('default_transaction_isolation', 'read committed', false),
    (SELECT count(*) FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
     WHERE n.nspname = $2 AND c.relname = ANY ($3::text[]::name[]))
    + (SELECT count(*) FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
     WHERE n.nspname = $2 AND p.proname = ANY ($3::text[]::name[]))
"""


class PresenceTables:
    """The SQL for the tables and functions of one prefix. Their names need no escapes.

    Args:
        prefix: The engine's prefix.
        schema: The schema that they are in.
        spill: The table for large envelopes.
    """

    prepare_sql = _PREPARE

    def __init__(self, prefix: str, schema: str, spill: SpillTable) -> None:
        self.schema = plain(schema)
        """The schema that they are in."""
        tables = {each: f"{prefix}_presence_{each}" for each in ("leases", "channels", "members", "holdings")}
        functions = {
            each: f"{prefix}_presence_{each}_{_LAYOUT}"
            for each in ("renew", "tell", "enter", "remove", "leave", "sweep")
        }
        self.parts = [*tables.values(), *functions.values(), f"{prefix}_spill"]
        """The names of all that has to be there."""
        names = {each: f'"{self.schema}"."{name}"' for each, name in (tables | functions).items()}
        names |= {each: f'"{prefix}_presence_{each}"' for each in ("empty", "memberships")}
        numbers = {"remember": _REMEMBER_SECONDS, "forgotten": _FORGOTTEN_CHANNELS, "max_note": MAX_NOTE_BYTES}

        def sql(template: str) -> str:
            return template.format(**names, **numbers, spill=spill.name, spilt=KEPT_SECONDS, prefix=prefix)

        # All is made or nothing. The lock keeps two nodes apart, because IF NOT EXISTS doesn't.
        self.create_sql = f"SELECT pg_advisory_xact_lock(hashtext('{names['leases']}')); {spill.create_sql};" + "".join(
            map(sql, (_TABLES, _RENEW, _TELL, _ENTER, _REMOVE, _LEAVE, _SWEEP))
        )
        """Makes what isn't there yet. An administrator may run it, too."""
        made = "" if self.schema == "public" else f'CREATE SCHEMA IF NOT EXISTS "{self.schema}"; '
        self.permit_sql = f'{made}GRANT USAGE, CREATE ON SCHEMA "{self.schema}" TO {{role}}'
        """Lets a role make them."""
        used = ", ".join([*(names[each] for each in tables), spill.name])
        self.grant_sql = (
            f'GRANT USAGE ON SCHEMA "{self.schema}" TO {{role}}; '
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON {used} TO {{role}}"
        )
        """Lets a role use them."""
        self.renew_sql = sql("SELECT {renew}($1, $2, $3)")
        self.alive_sql = sql("SELECT incarnation FROM {leases} WHERE until > clock_timestamp()")
        self.enter_sql = sql("SELECT * FROM {enter}($1, $2, $3, $4, $5, $6)")
        self.leave_sql = sql("SELECT * FROM {leave}($1, $2, $3)")
        self.sweep_sql = sql("SELECT * FROM {sweep}($1)")
        self.members_sql, self.channels_of_sql = sql(_MEMBERS), sql(_CHANNELS_OF)
        self.count_sql = sql("SELECT size FROM {channels} WHERE name = $1")
