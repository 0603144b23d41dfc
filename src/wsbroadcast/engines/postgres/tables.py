"""The tables of histories, and the functions that keep, number and send in one step. All of it is SQL."""

from __future__ import annotations

from wsbroadcast.history import History, HistoryRules
from wsbroadcast.logs import about, logger
from wsbroadcast.text import plain

# A row whose notification has only its place stays so many seconds at least: longer than any node takes to read it.
_LARGE_SECONDS = 60

# A row with a key stays so many seconds at least, however few messages are kept.
_KEY_SECONDS = 300

# After each 32 appends under a name, rows beyond the limit are removed, at most 1000. No batch has so many parcels.
_TRIM_EVERY, _TRIM_ROWS = 32, 1000

# A part of the functions' names, because nodes with two versions of this library may run at the same time.
_LAYOUT = 1

# A random epoch of 72 bits. It is made of the last bytes of random UUIDs, which have no fixed bits.
_EPOCH = (
    "translate(encode(substring(uuid_send(gen_random_uuid()) FROM 11) || "
    "substring(uuid_send(gen_random_uuid()) FROM 14), 'base64'), '+/', '-_')"
)

# The file of the counters. It is another one if a dump was restored, whose counters begin again at earlier numbers.
_GENERATION = "pg_relation_filenode('{counters}')"

# The tables are unlogged: after a crash of the server, and on a promoted standby, they are empty. So every history that
# may have lost something gets a new epoch. The rules are logged: programs that only publish must find them even then.
_TABLES = """
CREATE UNLOGGED TABLE IF NOT EXISTS {counters} (
    name text COLLATE "C" PRIMARY KEY,
    epoch text COLLATE "C" NOT NULL DEFAULT {epoch},
    top bigint NOT NULL,
    forget_at timestamptz NOT NULL
) WITH (fillfactor = 50);
CREATE UNLOGGED TABLE IF NOT EXISTS {history} (
    epoch text COLLATE "C" NOT NULL,
    place bigint NOT NULL,
    kept_at timestamptz NOT NULL,
    stays_until timestamptz NOT NULL,
    expires timestamptz NOT NULL,
    is_kept boolean NOT NULL,
    key bytea,
    envelope bytea,
    PRIMARY KEY (epoch, place)
);
CREATE TABLE IF NOT EXISTS {rules} (
    id boolean PRIMARY KEY DEFAULT true CHECK (id),
    rules text NOT NULL,
    generation oid NOT NULL
);
CREATE INDEX IF NOT EXISTS {expires} ON {history} (expires);
CREATE UNIQUE INDEX IF NOT EXISTS {keys} ON {history} (epoch, key) WHERE key IS NOT NULL;
CREATE UNLOGGED TABLE IF NOT EXISTS {outbox} (
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    id bigint GENERATED ALWAYS AS IDENTITY,
    name text COLLATE "C" NOT NULL,
    channel text NOT NULL DEFAULT '{prefix}',
    form text DEFAULT 'text',
    body text,
    envelope bytea,
    is_kept boolean NOT NULL DEFAULT true,
    messages int NOT NULL DEFAULT {default.messages},
    seconds float8 NOT NULL DEFAULT {default.seconds},
    remember float8 NOT NULL DEFAULT {default.remember}
);
CREATE INDEX IF NOT EXISTS {xids} ON {outbox} (xid);
"""

# Keeps, numbers and sends a batch. Its counters are locked in the order of their names, so that two batches never block
# each other. They are locked until the commit, so that the order of numbers is the order of commits.
#
# Arguments by name: names (each once, sorted), counts, messages, seconds, remembers. Arguments by parcel: channels;
# names_at, the index of its name, null if it isn't kept; nths, its number among the parcels of its name; forms and
# bodies, null if it doesn't fit into a notification; envelopes, null if the body says the same; are_kept; keys.
_APPEND = """
CREATE OR REPLACE FUNCTION {append}(
    names text[], counts int[], messages int[], seconds float8[], remembers float8[],
    channels text[], names_at int[], nths int[], forms text[], bodies text[], envelopes bytea[], are_kept boolean[],
    keys bytea[], OUT epochs text[], OUT bases bigint[], OUT repeats bigint[]
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    moment timestamptz;
    tops bigint[];
    less int[];
    last bigint;
BEGIN
    IF cardinality(names) = 1 THEN  -- takes half the time
        UPDATE {counters} AS c SET top = c.top + counts[1],
            forget_at = clock_timestamp() + remembers[1] * interval '1 second'
        WHERE c.name = names[1] RETURNING ARRAY[c.epoch], ARRAY[c.top] INTO epochs, tops;
    END IF;
    IF epochs IS NULL THEN
        WITH counted AS (
            INSERT INTO {counters} AS c (name, top, forget_at)
            SELECT a.name, a.count, clock_timestamp() + a.remember * interval '1 second'
            FROM unnest(names, counts, remembers) AS a (name, count, remember)
            ON CONFLICT (name) DO UPDATE SET top = c.top + excluded.top, forget_at = excluded.forget_at
            RETURNING c.epoch, c.top
        )
        SELECT array_agg(n.epoch), array_agg(n.top) INTO epochs, tops FROM counted AS n;
    END IF;
    IF keys IS NOT NULL THEN
        SELECT array_agg((
            SELECT h.place FROM {history} AS h WHERE h.epoch = epochs[p.name_at] AND h.key = p.key
        )) INTO repeats FROM unnest(names_at, keys) AS p (name_at, key);
        IF array_remove(repeats, NULL) = '{{}}' THEN
            repeats := NULL;
        ELSE
            less := array_fill(0, ARRAY[cardinality(names)]);
            FOR i IN 1..cardinality(repeats) LOOP
                IF repeats[i] IS NULL THEN
                    nths[i] := nths[i] - less[names_at[i]];
                ELSE
                    less[names_at[i]] := less[names_at[i]] + 1;
                    channels[i] := NULL;
                END IF;
            END LOOP;
            FOR i IN 1..cardinality(names) LOOP
                CONTINUE WHEN less[i] = 0;
                UPDATE {counters} AS c SET top = c.top - less[i] WHERE c.name = names[i];
                tops[i] := tops[i] - less[i];
                counts[i] := counts[i] - less[i];
            END LOOP;
        END IF;
    END IF;
    FOR i IN 1..cardinality(names) LOOP
        bases[i] := tops[i] - counts[i];
    END LOOP;
    moment := clock_timestamp();
    INSERT INTO {history} (epoch, place, kept_at, stays_until, expires, is_kept, key, envelope)
    SELECT epochs[p.name_at], bases[p.name_at] + p.nth, moment, moment + p.stays,
        moment + greatest(seconds[p.name_at] * interval '1 second', p.stays), p.is_kept, p.key,
        CASE p.form WHEN 'text' THEN CASE WHEN p.is_kept THEN convert_to(p.body, 'UTF8') END
            WHEN 'base64' THEN CASE WHEN p.is_kept THEN decode(p.body, 'base64') END
            ELSE p.envelope END
    FROM (
        SELECT *, CASE WHEN q.key IS NOT NULL THEN interval '{key_seconds} s'
            WHEN q.form IS NULL THEN interval '{large_seconds} s' ELSE interval '0' END AS stays
        FROM unnest(channels, names_at, nths, forms, bodies, envelopes, are_kept, keys)
            AS q (channel, name_at, nth, form, body, envelope, is_kept, key)
    ) AS p
    WHERE p.channel IS NOT NULL AND p.name_at IS NOT NULL
        AND (p.is_kept OR p.key IS NOT NULL OR p.form IS NULL);
    PERFORM count(pg_notify(p.channel, CASE WHEN p.name_at IS NULL THEN p.body ELSE
        names[p.name_at] || ' ' || coalesce(p.form, 'row') || ':' || epochs[p.name_at] || ':'
        || bases[p.name_at] + p.nth || coalesce(' ' || p.body, '') END))
    FROM unnest(channels, names_at, nths, forms, bodies) AS p (channel, name_at, nth, form, body)
    WHERE p.channel IS NOT NULL;
    FOR i IN 1..cardinality(names) LOOP
        CONTINUE WHEN tops[i] / {trim_every} = bases[i] / {trim_every};
        last := tops[i] - messages[i];
        DELETE FROM {history} AS h
        WHERE h.epoch = epochs[i] AND h.place BETWEEN last - {trim_rows} AND last AND h.stays_until <= moment;
    END LOOP;
END $$;
"""

# Appends at the commit all that a transaction of the app has put into the outbox. So counters are locked only during
# the commit, and in order. After a rollback no number was taken.
_FLUSH = """
CREATE OR REPLACE FUNCTION {flush}() RETURNS trigger LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    rows {outbox}[];
BEGIN
    WITH mine AS (DELETE FROM {outbox} AS o WHERE o.xid = pg_current_xact_id() RETURNING o)
    SELECT array_agg(m.o ORDER BY (m.o).id) INTO rows FROM mine AS m;
    IF rows IS NULL THEN
        RETURN NULL;
    END IF;
    PERFORM {append}(
        a.names, a.counts, a.messages, a.seconds, a.remembers,
        b.channels, b.names_at, b.nths, b.forms, b.bodies, b.envelopes, b.are_kept, NULL
    )
    FROM (
        SELECT array_agg(n.name ORDER BY n.name) AS names, array_agg(n.count::int ORDER BY n.name) AS counts,
            array_agg(n.messages ORDER BY n.name) AS messages, array_agg(n.seconds ORDER BY n.name) AS seconds,
            array_agg(n.remember ORDER BY n.name) AS remembers
        FROM (
            SELECT r.name, count(*) AS count, max(r.messages) AS messages, max(r.seconds) AS seconds,
                max(r.remember) AS remember
            FROM unnest(rows) AS r GROUP BY r.name
        ) AS n
    ) AS a, (
        SELECT array_agg(p.channel ORDER BY p.id) AS channels, array_agg(p.name_at::int ORDER BY p.id) AS names_at,
            array_agg(p.nth::int ORDER BY p.id) AS nths, array_agg(p.form ORDER BY p.id) AS forms,
            array_agg(p.body ORDER BY p.id) AS bodies, array_agg(p.envelope ORDER BY p.id) AS envelopes,
            array_agg(p.is_kept ORDER BY p.id) AS are_kept
        FROM (
            SELECT r.*, dense_rank() OVER (ORDER BY r.name) AS name_at,
                row_number() OVER (PARTITION BY r.name ORDER BY r.id) AS nth
            FROM unnest(rows) AS r
        ) AS p
    ) AS b;
    RETURN NULL;
END $$;
"""

_FORGET = """
CREATE OR REPLACE FUNCTION {forget}(which text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    gone text;
BEGIN
    DELETE FROM {counters} AS c WHERE c.name = which RETURNING c.epoch INTO gone;
    DELETE FROM {history} AS h WHERE h.epoch = gone;
    RETURN gone IS NOT NULL;
END $$;
"""

# Removes some rows that are too old, and some counters whose time is over. Neither waits for another one's lock. The
# counters are checked in the order of their names: each append would have to write to an index on the time.
_TRIM = """
CREATE OR REPLACE FUNCTION {trim}(INOUT after text, OUT has_more boolean) LANGUAGE plpgsql AS $$
DECLARE
    moment timestamptz := clock_timestamp();
    rows_gone bigint;
    seen bigint;
    last text;
    old text[];
BEGIN
    DELETE FROM {history} WHERE ctid = ANY (ARRAY(
        SELECT h.ctid FROM {history} AS h WHERE h.expires < moment ORDER BY h.expires
        LIMIT {trim_rows} FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS rows_gone = ROW_COUNT;
    SELECT count(*), max(c.name), array_agg(c.name) FILTER (WHERE c.forget_at < moment) INTO seen, last, old
    FROM (SELECT * FROM {counters} AS k WHERE k.name > after ORDER BY k.name LIMIT {trim_rows}) AS c;
    IF old IS NOT NULL THEN
        DELETE FROM {counters} WHERE ctid = ANY (ARRAY(
            SELECT c.ctid FROM {counters} AS c WHERE c.name = ANY (old) AND c.forget_at < moment FOR UPDATE SKIP LOCKED
        ));
    END IF;
    after := CASE WHEN seen = {trim_rows} THEN last ELSE '' END;
    has_more := rows_gone = {trim_rows} OR (seen = {trim_rows} AND old IS NOT NULL);
END $$;
"""

# Made last: if a table has no trigger, rows stay in it.
_TRIGGER = """
DROP TRIGGER IF EXISTS flush ON {outbox};
CREATE CONSTRAINT TRIGGER flush AFTER INSERT ON {outbox} DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION {flush}();
"""

# Makes the counters that a question misses.
_MADE = """
    INSERT INTO {counters} (name, top, forget_at)
    SELECT a.name, 0, clock_timestamp() + a.remember * interval '1 second' FROM asked AS a
    WHERE NOT EXISTS (SELECT FROM {counters} AS c WHERE c.name = a.name) ORDER BY a.name COLLATE "C"
    ON CONFLICT DO NOTHING RETURNING name, epoch, top
"""

# It is one statement, so that number and rows are of one moment.
_READ = """
WITH asked AS (SELECT $1::text AS name, $2::float8 AS remember), made AS ({made}),
    found AS (SELECT epoch, top FROM {counters} WHERE name = $1 UNION ALL SELECT epoch, top FROM made)
SELECT f.epoch, f.top, h.place, h.age, h.envelope FROM found AS f LEFT JOIN LATERAL (
    SELECT k.place, extract(epoch FROM clock_timestamp() - k.kept_at)::float8 AS age, k.envelope FROM {history} AS k
    WHERE k.epoch = f.epoch AND k.place > $3 AND k.is_kept ORDER BY k.place DESC LIMIT $4
) AS h ON true
"""

_POSITIONS = """
WITH given AS (SELECT * FROM unnest($1::text[], $2::float8[]) WITH ORDINALITY AS g (name, remember, nth)),
    asked AS (SELECT name, max(remember) AS remember FROM given GROUP BY name), made AS ({made})
SELECT coalesce(c.epoch, m.epoch), coalesce(c.top, m.top) FROM given AS g
LEFT JOIN {counters} AS c ON c.name = g.name LEFT JOIN made AS m ON m.name = g.name ORDER BY g.nth
"""

_ROW = """
SELECT CASE WHEN octet_length(envelope) <= $3 THEN envelope END FROM {history} WHERE epoch = $1 AND place = $2
"""

# Writes the rules, if there are any and they differ from those in the table. Returns those that were there, and whether
# the role has all permissions. No statement waits for a lock longer than its caller waits for an answer.
_OPEN = """
WITH before AS (SELECT rules, generation FROM {rules}), written AS (
    INSERT INTO {rules} (rules, generation) SELECT $1::text, {generation}
    WHERE $1 IS NOT NULL AND NOT EXISTS (SELECT FROM before WHERE rules = $1)
    ON CONFLICT (id) DO UPDATE SET rules = excluded.rules
)
SELECT (SELECT rules FROM before), (SELECT generation <> {generation} FROM before),
    set_config('lock_timeout', $2, false), (
    SELECT bool_and(has_table_privilege(t, p))
    FROM unnest($3::text[]) AS t, unnest('{{SELECT,INSERT,UPDATE,DELETE}}'::text[]) AS p
)
"""

# Without their counters, rows belong to no history any more.
_RENEW = """
WITH renewed AS (UPDATE {rules} SET generation = {generation} WHERE generation <> {generation} RETURNING id)
DELETE FROM {counters} WHERE EXISTS (SELECT FROM renewed)
"""


class HistoryTables:
    """The SQL for the tables and functions of one prefix. Their names need no escapes.

    Args:
        prefix: The engine's prefix.
        schema: The schema that they are in.
    """

    def __init__(self, prefix: str, schema: str) -> None:
        self.schema = plain(schema)
        """The schema that they are in."""
        tables = {"history": "history", **{each: f"history_{each}" for each in ("counters", "outbox", "rules")}}
        functions = {each: f"history_{each}_{_LAYOUT}" for each in ("append", "flush", "forget", "trim")}
        self.parts = [f"{prefix}_{name}" for name in (*tables.values(), *functions.values())]
        """The names of all that has to be there."""
        names = {each: f'"{self.schema}"."{prefix}_{name}"' for each, name in (tables | functions).items()}
        names |= {each: f'"{prefix}_history_{each}"' for each in ("expires", "keys", "xids")}
        numbers = {"key_seconds": _KEY_SECONDS, "large_seconds": _LARGE_SECONDS}
        numbers |= {"trim_every": _TRIM_EVERY, "trim_rows": _TRIM_ROWS}

        def sql(template: str) -> str:
            return template.format(**names, **numbers, epoch=_EPOCH, prefix=prefix, default=History())

        names |= {"made": sql(_MADE), "generation": sql(_GENERATION)}

        self.tables = [names[each] for each in ("history", "counters", "outbox")]
        """The tables that a role must be allowed to read and to write."""
        # All is made or nothing. The lock keeps two nodes apart, because IF NOT EXISTS doesn't.
        self.create_sql = f"SELECT pg_advisory_xact_lock(hashtext('{names['history']}'));" + "".join(
            map(sql, (_TABLES, _APPEND, _FLUSH, _FORGET, _TRIM, _TRIGGER))
        )
        """Makes what isn't there yet. An administrator may run it, too."""
        made = "" if self.schema == "public" else f'CREATE SCHEMA IF NOT EXISTS "{self.schema}"; '
        self.permit_sql = f'{made}GRANT USAGE, CREATE ON SCHEMA "{self.schema}" TO {{role}}'
        """Lets a role make them."""
        self.grant_sql = (
            f'GRANT USAGE ON SCHEMA "{self.schema}" TO {{role}}; GRANT SELECT, INSERT, UPDATE, DELETE ON'
            f" {', '.join(self.tables)}, {names['rules']} TO {{role}}"
        )
        """Lets a role use them."""
        self.open_sql, self.renew_sql = sql(_OPEN), sql(_RENEW)
        self.read_sql, self.positions_sql, self.row_sql = sql(_READ), sql(_POSITIONS), sql(_ROW)
        self.may_learn_sql = sql("SELECT has_table_privilege(to_regclass('{rules}'), 'SELECT')")
        """Tells whether the role may read the rules; null if there are none."""
        self.learn_sql = sql("SELECT rules FROM {rules}")
        self.exists_sql = sql("SELECT to_regclass('{outbox}') IS NOT NULL")
        self.append_sql = sql("SELECT * FROM {append}($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)")
        self.forget_sql = sql("SELECT {forget}($1)")
        self.trim_sql = sql("SELECT * FROM {trim}($1)")
        values = ("name", "channel", "form", "body", "envelope", "is_kept", "messages", "seconds", "remember")
        self.outbox_sql = (
            sql("INSERT INTO {outbox} (") + ", ".join(values) + ") VALUES ("  # noqa: S608
            + ", ".join(f"{{{value}}}" for value in values) + ") RETURNING current_database()"
        )  # fmt: skip
        """For the app's own transaction: takes what `outgoing` returns, which each driver writes in its own way."""
        # The rules of other nodes that were logged last.
        self._warned_of: str | None = None

    def compare(self, rules: HistoryRules, before: str, where: str) -> None:
        """Log a warning, once for each, if other rules were there before."""
        if before != self._warned_of and before != rules.to_json().decode():
            self._warned_of = before
            logger.warning(
                "%s: another node keeps other histories: %s there, %r from now on",
                where,
                before,
                rules,
                extra=about("history.rules_differ", engine="postgres"),
            )
