"""What the docs say to those who write an engine, publish without wsbroadcast, or set up a broker, is so."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from inspect import get_annotations, getdoc
from pathlib import Path

import pytest

import wsbroadcast
from tests.support.asgi import Peer
from tests.support.brokers import BrokerMissing, Endpoint, NATSServer, RedisServer, programs
from tests.support.examples import EXAMPLES
from tests.support.programs import NODE, needs_node
from tests.test_docs import PAGES, blocks_of
from wsbroadcast import (
    Audience,
    ConfigurationError,
    ConnectionManager,
    EngineUnavailable,
    History,
    Message,
    Publication,
)
from wsbroadcast.audience import NODES
from wsbroadcast.engines.broker.envelope import MAX_HEADER_BYTES, decode
from wsbroadcast.engines.broker.names import AudienceNames
from wsbroadcast.engines.broker.presence import PresentEngine
from wsbroadcast.engines.nats import NATSEngine
from wsbroadcast.engines.postgres.notifier import SpillTable
from wsbroadcast.engines.postgres.presence_tables import PresenceTables
from wsbroadcast.engines.postgres.tables import HistoryTables
from wsbroadcast.engines.redis import RedisEngine
from wsbroadcast.engines.sqlite.file import bells_of
from wsbroadcast.testing import BrokerContract, EngineContract, HistoryContract, PresenceContract, Recorder
from wsbroadcast.testing.nodes import NAMES, NEWS, Nodes

ENGINE = "docs/write-an-engine.md"
ENVELOPE = "docs/envelope.md"


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the rows of the first table under a heading, without its head."""
    table = PAGES[page].partition(f"# {heading}\n")[2].partition("\n|")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


# Write an engine.


PARTS = {"keep-what-is-published": "keeping_hub", "know-who-is-in-a-channel": "present_hub"}

# What they can do that the first doesn't.
CONTRACTS = {"keeping_hub": HistoryContract, "present_hub": PresenceContract}


def blocks_about_engines(module: str) -> list[str]:
    """The page's code of an engine, or of one that can do more: its parts, and its test."""
    return [
        block.source
        for block in blocks_of(ENGINE)
        if PARTS.get(block.name.partition("#")[2].partition("-#")[0], "hub") == module
    ]


def test_code_of_the_page_is_that_of_the_example() -> None:
    example = (EXAMPLES / "08_engine.py").read_text(encoding="utf-8")
    imports, *classes = blocks_about_engines("hub")[:-1]
    assert len(classes) == 3
    for code in (*classes, *imports.split("\n\n")[-1:]):
        assert code in example


def save_engines_of_the_page(directory: Path) -> None:
    for name in ("hub", *PARTS.values()):
        *parts, test = blocks_about_engines(name)
        (directory / f"{name}.py").write_text("\n\n".join(parts), encoding="utf-8")
        (directory / f"test_{name}.py").write_text(test, encoding="utf-8")


def run_contract(directory: Path, *command: str) -> str:
    """Run tests as users can, with nothing configured; return what was written at the end."""
    scope = "asyncio_default_fixture_loop_scope=function"  # pytest-asyncio warns if nobody says so
    options = ["-W", "error", "-o", scope, "-o", "asyncio_mode=strict", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, *command, *options], cwd=directory, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_engine_of_the_page_is_tested_as_the_page_says(tmp_path: Path) -> None:
    save_engines_of_the_page(tmp_path)
    (command,) = (block.source.split() for block in blocks_of(ENGINE, ""))
    assert command[0] == "python"
    # `tests/engines/test_contract.py` runs all of it; here is the question whether users can.
    assert re.search(r" 9 passed, \d+ deselected in ", run_contract(tmp_path, *command[1:], "-k", "arrive or gap"))


@pytest.mark.parametrize("name", CONTRACTS)
def test_engine_of_the_page_that_can_do_more_is_a_right_one(tmp_path: Path, name: str) -> None:
    save_engines_of_the_page(tmp_path)
    tests = [each for each in vars(CONTRACTS[name]) if each.startswith("test_")]
    said = run_contract(tmp_path, "-m", "pytest", f"test_{name}.py", "-k", " or ".join(tests))
    assert re.search(rf" {len(tests)} passed, \d+ deselected in ", said), said


def test_command_of_the_page_prints_the_whole_contract() -> None:
    (command,) = (shlex.split(block.source) for block in blocks_of(ENGINE, "sh"))
    printed = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, timeout=60).stdout
    for kind in (EngineContract, BrokerContract):
        for name, test in vars(kind).items():
            assert not name.startswith("test_") or (getdoc(test) or name) in printed, name


def test_page_has_every_attribute_of_the_contract_with_its_default() -> None:
    rows = {name.strip("`"): default for name, default, _ in rows_of(ENGINE, "Run the contract")}
    names = get_annotations(Nodes) | get_annotations(BrokerContract)
    assert rows.keys() == names.keys()
    for name, default in rows.items():
        assert default.strip("`").split()[0].rstrip(",") == str(getattr(BrokerContract, name))


# The envelope.


def test_page_has_every_reason_for_which_an_envelope_is_dropped() -> None:
    sources = Path(wsbroadcast.__file__).parent.rglob("engines/**/*.py")
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    reasons = set(re.findall(r'(?:BadEnvelope|_drop)\("(\w+)"', code))
    assert {row[0].strip("`") for row in rows_of(ENVELOPE, "What is dropped")} == reasons
    assert f"{MAX_HEADER_BYTES:,} bytes" in PAGES[ENVELOPE]


def test_names_of_the_page_are_those_at_the_broker() -> None:
    audiences = [
        Audience("everyone"),
        NEWS,
        Audience("user", "7"),
        NODES,
        Audience("nodes", "kX2"),
        Audience("stream", "chat"),
        Audience("run", "mH3"),
        Audience("channel", "a.b c"),
    ]
    for audience, (_, colon, point) in zip(audiences, rows_of(ENVELOPE, "Names"), strict=True):
        assert colon == f"`{AudienceNames().of(audience)}`"
        assert point == f"`{AudienceNames(separator='.').of(audience)}`"


def test_python_of_the_page_makes_names_and_envelopes() -> None:
    (block,) = blocks_of(ENVELOPE)
    made = block.run()
    assert [made["name_of"](name) for name in NAMES] == [
        AudienceNames().of(Audience("channel", name)) for name in NAMES
    ]
    assert decode(made["envelope_of"]("héllo"), NEWS, 100) == (Publication(Message.of("héllo"), NEWS), None)


@needs_node
def test_javascript_of_the_page_makes_names_and_envelopes() -> None:
    (block,) = blocks_of(ENVELOPE, "js")
    code = f"{block.source}\nconsole.log(JSON.stringify([{json.dumps(NAMES)}.map((n) => nameOf(n)), envelopeOf([1])]))"
    done = subprocess.run([NODE, "-e", code], capture_output=True, check=True)
    names, envelope = json.loads(done.stdout)
    assert names == [AudienceNames().of(Audience("channel", name)) for name in NAMES]
    assert decode(envelope.encode(), NEWS, 100) == (Publication(Message.of("[1]"), NEWS), None)


COMMANDS = {block.source.rpartition("| ")[2].split()[0]: block.source for block in blocks_of(ENVELOPE, "sh")}


def test_page_has_a_command_for_each_broker() -> None:
    assert list(COMMANDS) == ["redis-cli", "nats", "nc", "psql"]


async def reaches_an_app(broker: Endpoint, prefix: str, command: str) -> None:
    """Check that what a shell command sends to a broker comes to the right connections of an app."""
    reader, stranger = Peer(), Peer()
    async with ConnectionManager(f"{broker.url}?prefix={prefix}") as manager:
        await manager.connect(reader.websocket, channels=["news"])
        await manager.connect(stranger.websocket)
        await run(command)
        assert await reader.wait_messages(1) == ["hello"]
        assert stranger.messages == []
        assert manager.stats().engine.bad_envelopes == {}


async def run(command: str) -> bytes:
    """Run a shell command, with the programs of brokers on its PATH; return what it has written."""
    path = os.pathsep.join([os.environ["PATH"], str(programs.postgres_programs())])
    done = await asyncio.to_thread(
        subprocess.run, ["sh", "-c", command], capture_output=True, timeout=20, env=os.environ | {"PATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_command_for_redis_reaches_an_app(redis_server: Endpoint, prefix: str) -> None:
    try:
        program = programs.redis_cli()
    except BrokerMissing as missing:
        pytest.skip(str(missing))
    command = COMMANDS["redis-cli"].replace("wsbroadcast:", f"{prefix}:")
    await reaches_an_app(redis_server, prefix, command.replace("redis-cli", f"{program} -u {redis_server.url}"))


async def test_command_for_postgres_reaches_an_app(postgres_server: Endpoint, prefix: str) -> None:
    command = COMMANDS["psql"].replace("wsbroadcast", prefix)
    await reaches_an_app(postgres_server, prefix, command.replace("psql", f"psql {postgres_server.url}"))


async def test_command_for_nc_reaches_an_app(nats_server: Endpoint, prefix: str) -> None:
    # A shell has it or doesn't; what it would send is all that matters.
    bash = f"""nc() {{ exec 3<>/dev/tcp/$3/$4; cat >&3; grep -q PONG <&3; }}; {COMMANDS["nc"]}"""
    command = bash.replace("wsbroadcast.", f"{prefix}.").replace("localhost 4222", f"127.0.0.1 {nats_server.port}")
    await reaches_an_app(nats_server, prefix, f"bash -c {shlex.quote(command)}")


async def test_command_for_nats_has_an_envelope() -> None:
    command = COMMANDS["nats"]
    assert f"nats pub {AudienceNames(separator='.').of(NEWS)} " in command
    envelope = await run(command.rpartition("|")[0])
    assert decode(envelope, NEWS, 100) == (Publication(Message.of("hello"), NEWS), None)


# Deployment.

DEPLOYMENT = "docs/deployment.md"
(FIRST_RIGHTS, MORE_RIGHTS, PRESENCE_RIGHTS), (WITH_JETSTREAM,), (WITH_PRESENCE,) = (
    [block.source for block in blocks_of(DEPLOYMENT, "") if block.source.startswith(start)]
    for start in ("ACL ", "jetstream ", "publish: ")
)


async def keeps(url: str) -> None:
    """Check that a broker keeps and forgets something for the user of a URL."""
    async with ConnectionManager(url, history=History()) as manager:
        await manager.broadcast("hello", channel="news", idempotency_key="k")
        assert [each.data for each in (await manager.history("news")).messages] == ["hello"]
        await manager.forget("news")
        assert (await manager.position("news")).offset == 0


async def knows_who_is_there(engine: PresentEngine) -> None:
    """Check that a broker does for an engine what it needs for presence."""
    await engine.renew(10)
    assert await engine.enter("news", {"ann": b""}) is not None
    assert await engine.channels_of("ann") == {"news"}
    assert await engine.sweep() == []
    assert await engine.leave("news", ["ann"]) is not None


async def test_permissions_of_the_page_for_redis_are_enough(own_redis: Callable[..., RedisServer]) -> None:
    server = own_redis()
    url = f"redis://wsbroadcast:secret@{server.host}:{server.port}"
    server.command(*FIRST_RIGHTS.split())
    async with ConnectionManager(url) as manager:
        await manager.broadcast("hello", channel="news")
    with pytest.raises(ConfigurationError, match=r"needs .* \+evalsha"):
        await keeps(url)
    server.command(*MORE_RIGHTS.split())
    await keeps(url)
    engine = RedisEngine(url)
    await engine.start(Recorder())
    try:
        with pytest.raises(EngineUnavailable, match=r"needs .* \+zscore"):
            await engine.renew(10)
        server.command(*PRESENCE_RIGHTS.split())
        await knows_who_is_there(engine)
    finally:
        await engine.aclose()


async def test_configuration_of_the_page_for_nats_is_enough(
    own_nats: Callable[..., NATSServer], tmp_path: Path
) -> None:
    server = own_nats(config=WITH_JETSTREAM.replace("/var/lib/nats", str(tmp_path)))
    for storage in ("memory", "file"):
        await keeps(f"nats://wsbroadcast:secret@{server.host}:{server.port}?history_storage={storage}")


async def test_permissions_of_the_page_for_presence_on_nats_are_enough(
    own_nats: Callable[..., NATSServer], tmp_path: Path
) -> None:
    config = WITH_JETSTREAM.replace("/var/lib/nats", str(tmp_path))
    before, _, rest = config.partition("publish: [")
    server = own_nats(config=f"{before}{WITH_PRESENCE}{rest.partition(']')[2]}")
    engine = NATSEngine(f"nats://wsbroadcast:secret@{server.host}:{server.port}")
    engine.uses_lease = True
    await engine.start(Recorder())
    try:
        await knows_who_is_there(engine)
    finally:
        await engine.aclose()


def test_statements_of_the_page_for_postgres_are_those_that_errors_name() -> None:
    history = HistoryTables("wsbroadcast", "public")
    presence = PresenceTables("wsbroadcast", "public", SpillTable("wsbroadcast", "public"))
    statements = [block.source.strip() for block in blocks_of(DEPLOYMENT, "sql")]
    granted = [history.grant_sql.format(role="app"), presence.grant_sql.format(role="app")]
    assert statements == [history.permit_sql.format(role="app"), *granted]
    assert presence.permit_sql == history.permit_sql
    sources = [block.source for block in blocks_of(DEPLOYMENT, "sh")]
    commands = [shlex.split(source) for source in sources if source.startswith("python -c")]
    made = history.create_sql, presence.create_sql
    for command, sql in zip(commands, made, strict=True):
        printed = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, timeout=60).stdout
        assert printed.strip() == sql.strip()


def test_path_of_the_page_keeps_the_bells_beside_the_file() -> None:
    found = re.search(r"path within (\d+) bytes", PAGES[DEPLOYMENT])
    assert found is not None
    for more, is_beside in ((0, True), (1, False)):
        path = Path("/" + "x" * (int(found[1]) - 1 + more))
        assert (bells_of(path).parent == path.parent) == is_beside
