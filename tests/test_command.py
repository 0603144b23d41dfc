"""The command line: what it refuses, that it serves the demo, and that it publishes."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.support.brokers import Endpoint, RedisServer, free_port
from tests.support.strict import STRICT
from wsbroadcast import EVERYONE, USERS, ConnectionManager, History, __version__
from wsbroadcast.command import _parser, main
from wsbroadcast.demo.server import url_of


def test_main_without_a_command_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "demo" in text
    assert "publish" in text


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"wsbroadcast {__version__}\n"


@pytest.mark.parametrize(
    ("argv0", "name"), [("/x/wsbroadcast/__main__.py", "python -m wsbroadcast"), ("/bin/x", "wsbroadcast")]
)
def test_help_names_the_program_as_it_was_called(
    argv0: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [argv0])
    assert main([]) == 0
    assert capsys.readouterr().out.startswith(f"usage: {name} [-h]")


def test_console_script_is_the_command_line() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["wsbroadcast"].partition(":")
    assert getattr(import_module(module), function) is main


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "demo" in text
    assert "publish" in text


@pytest.mark.parametrize("port", ["65536", "-1", "http", "", "8 0"])
def test_demo_refuses_what_is_no_port(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", f"--port={port}"])
    assert ended.value.code == 2
    assert f"a port is a number from 0 to 65535, not {port!r}" in capsys.readouterr().err


def test_demo_says_that_the_port_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        f"wsbroadcast: port {port} on 127.0.0.1 is taken: choose another with --port, or a free one with --port 0\n"
    )
    assert captured.out == ""


def test_demo_says_that_the_host_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--host", "192.0.2.1", "--port", "0"]) == 1  # an address for documentation, RFC 5737
    assert capsys.readouterr().err.startswith("wsbroadcast: can't listen on 192.0.2.1 port 0: ")


@pytest.mark.parametrize("package", ["uvicorn", "websockets"])
def test_demo_names_the_pip_command_when_a_package_is_missing(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # the import system's own way of saying "not there"
    assert main(["demo", "--port", "0"]) == 1
    assert capsys.readouterr().err == f'wsbroadcast: the demo needs {package}: pip install "wsbroadcast[demo]"\n'


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000/"),
        ("0.0.0.0", "http://localhost:8000/"),
        ("::", "http://localhost:8000/"),
        ("::1", "http://[::1]:8000/"),
    ],
)
def test_url_of_an_address_works_in_a_browser_here(host: str, url: str) -> None:
    assert url_of(host, 8000) == url


def test_demo_serves_its_page_until_it_is_interrupted() -> None:
    command = [*STRICT, "-m", "wsbroadcast", "demo", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            url = re.search(r"http://127\.0\.0\.1:\d+/", line)
            assert url is not None, line
            with urllib.request.urlopen(url[0], timeout=10) as response:
                page = response.read().decode()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert "<title>wsbroadcast demo</title>" in page
    assert errors == ""
    assert process.returncode == 0


# publish


@pytest.fixture
def url(redis_server: Endpoint, prefix: str) -> str:
    return f"{redis_server.url}?prefix={prefix}"


class Listener:
    """A subscriber of a language that knows nothing of us: reads names and payloads at the broker."""

    def __init__(self, server: Endpoint, prefix: str) -> None:
        self._client = redis.Redis.from_url(server.url)
        self._pubsub: Any = self._client.pubsub()  # type: ignore[no-untyped-call]
        self._pubsub.psubscribe(f"{prefix}:*")
        assert self._pubsub.get_message(timeout=5)["type"] == "psubscribe"
        self._skipped = len(prefix) + 1

    def receive(self, count: int = 1) -> list[tuple[str, bytes]]:
        found: list[tuple[str, bytes]] = []
        while len(found) < count:
            message = self._pubsub.get_message(timeout=30)  # a program has to start first, on a busy machine
            assert message is not None, f"only {found}"
            name = message["channel"].decode()[self._skipped :]
            if name.startswith(("everyone", "channel:", "user:")):
                found.append((name, message["data"].partition(b"\n")[2]))
        return found

    def close(self) -> None:
        self._pubsub.close()
        self._client.close()


@pytest.fixture
def listener(redis_server: Endpoint, prefix: str) -> Iterator[Listener]:
    listener = Listener(redis_server, prefix)
    yield listener
    listener.close()


@pytest.fixture
def standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    path = tmp_path / "stdin"

    def give(content: bytes) -> None:
        path.write_bytes(content)
        monkeypatch.setattr(sys, "stdin", path.open())

    yield give
    sys.stdin.close()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--channel", "news", "one", "two"], [("channel:news", b"one"), ("channel:news", b"two")]),
        (["--user", "42", "text"], [("user:42", b"text")]),
        (["--everyone", "text with\nseveral lines"], [("everyone", b"text with\nseveral lines")]),
        (["--everyone", "--json", '{"a": 1}', '"text"'], [("everyone", b'{"a": 1}'), ("everyone", b'"text"')]),
        (["--everyone", "--", "--text"], [("everyone", b"--text")]),
        (["--channel", "a\N{EM DASH}b", "\N{BELL}"], [("channel:a%E2%80%94b", "\N{BELL}".encode())]),
    ],
)
def test_publish_sends_each_text(
    url: str,
    listener: Listener,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: list[tuple[str, bytes]],
) -> None:
    assert main(["publish", "--engine", url, *arguments]) == 0
    assert listener.receive(len(expected)) == expected
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "data"),
    [(["--json", '{"a": [1]}'], {"a": [1]}), (["--json", '"b"'], "b"), (['{"a": [1]}'], '{"a": [1]}')],
)
async def test_publish_says_what_is_json(url: str, arguments: list[str], data: object) -> None:
    """A client of events gets it as an object, as of `broadcast({"a": [1]})`."""
    async with ConnectionManager(url) as manager, manager.listen("news") as messages:
        assert await asyncio.to_thread(main, ["publish", "--engine", url, "--channel", "news", *arguments]) == 0
        assert (await anext(messages)).data == data


def test_publish_takes_the_engine_from_the_environment(
    url: str, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WSBROADCAST_ENGINE", url)
    assert main(["publish", "--everyone", "text"]) == 0
    assert listener.receive() == [("everyone", b"text")]


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (b"", []),
        (b"\n", [b""]),
        (b"one\ntwo\n", [b"one", b"two"]),
        (b"one\r\n\ntwo, unfinished", [b"one", b"", b"two, unfinished"]),
        ("\N{EM DASH} \u2028\n".encode(), ["\N{EM DASH} \u2028".encode()]),
    ],
)
def test_publish_sends_each_line(
    url: str,
    listener: Listener,
    standard_input: Callable[[bytes], None],
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    messages: list[bytes],
) -> None:
    standard_input(content)
    assert main(["publish", "--engine", url, "--channel", "news"]) == 0
    assert listener.receive(len(messages)) == [("channel:news", message) for message in messages]
    assert capsys.readouterr().err == f"published {len(messages)} message{'' if len(messages) == 1 else 's'}\n"


def test_publish_keeps_the_order_of_many_lines(
    url: str,
    listener: Listener,
    standard_input: Callable[[bytes], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    messages = [b"%d" % number * (number % 50) for number in range(3000)]
    standard_input(b"".join(message + b"\n" for message in messages))
    assert main(["publish", "--engine", url, "--everyone"]) == 0
    assert [payload for _, payload in listener.receive(3000)] == messages
    assert capsys.readouterr().err == "published 3000 messages\n"


def test_publish_checks_json_line_by_line(
    url: str, listener: Listener, standard_input: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    standard_input(b'{"a": 1}\n\n [2]\nsecret\n[3]\n')
    assert main(["publish", "--engine", url, "--channel", "news", "--json"]) == 1
    assert listener.receive(2) == [("channel:news", b'{"a": 1}'), ("channel:news", b" [2]")]
    errors = capsys.readouterr().err
    assert re.fullmatch(r"published 2 messages\nwsbroadcast: line 4: not JSON: .*\n", errors)
    assert "secret" not in errors


@pytest.mark.parametrize("text", ["", "{", "NaN", '"\\ud800"', "[" * 10_000])
def test_publish_refuses_a_text_that_is_no_json(url: str, capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert main(["publish", "--engine", url, "--everyone", "--json", "[1]", text]) == 1
    assert re.fullmatch(r"wsbroadcast: not JSON: .*\n", capsys.readouterr().err)


def test_publish_stops_at_a_line_that_is_no_text(
    url: str, listener: Listener, standard_input: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    standard_input(b"one\ntwo \xff\nthree\n")
    assert main(["publish", "--engine", url, "--everyone"]) == 1
    assert listener.receive() == [("everyone", b"one")]
    assert capsys.readouterr().err == "published 1 message\nwsbroadcast: line 2: byte 5 is not UTF-8\n"


@pytest.mark.parametrize("end", [b"", b"\nthree\n"])
def test_publish_stops_at_a_line_that_is_too_long(
    url: str,
    standard_input: Callable[[bytes], None],
    capsys: pytest.CaptureFixture[str],
    end: bytes,
) -> None:
    standard_input(b"one\n" + b"x" * (16 * 1024 * 1024 + 1) + end)
    assert main(["publish", "--engine", url, "--everyone"]) == 1
    errors = capsys.readouterr().err
    assert re.search(
        r"\nwsbroadcast: line 2: message of \d+ bytes is larger than the limit of 16777216 bytes\n$", errors
    )


@pytest.mark.parametrize("content", [b"\x00\n\xff\r\n", b"x" * 200_000])
def test_publish_sends_all_of_stdin_as_one_binary_message(
    url: str,
    listener: Listener,
    standard_input: Callable[[bytes], None],
    capsys: pytest.CaptureFixture[str],
    content: bytes,
) -> None:
    standard_input(content)
    assert main(["publish", "--engine", url, "--everyone", "--binary"]) == 0
    assert listener.receive() == [("everyone", content)]
    assert capsys.readouterr().err == "published 1 message\n"


def test_publish_sends_no_binary_message_of_nothing(
    url: str, standard_input: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    standard_input(b"")
    assert main(["publish", "--engine", url, "--everyone", "--binary"]) == 0
    assert capsys.readouterr().err == "published 0 messages\n"


def test_publish_refuses_too_large_a_binary_message(
    url: str, standard_input: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    standard_input(b"x" * (16 * 1024 * 1024 + 1))
    assert main(["publish", "--engine", url, "--everyone", "--binary"]) == 1
    assert "larger than the limit of 16777216 bytes" in capsys.readouterr().err


def test_publish_says_that_stdin_is_closed(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["publish", "--engine", url, "--everyone"]) == 1
    assert capsys.readouterr().err == "wsbroadcast: standard input is closed: give the messages as arguments\n"


def test_publish_says_what_to_do_at_a_terminal(
    url: str, listener: Listener, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    master, terminal = os.openpty()
    with os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        os.write(master, b"typed\n\x04")
        assert main(["publish", "--engine", url, "--everyone"]) == 0
    os.close(master)
    assert listener.receive() == [("everyone", b"typed")]
    assert capsys.readouterr().err == "each line is a message; Ctrl+D ends it\npublished 1 message\n"


def test_publish_says_why_stdin_can_not_be_read(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Directory(io.TextIOBase):
        def isatty(self) -> bool:
            return False

        def fileno(self) -> int:
            return directory

    directory = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(sys, "stdin", Directory())
    assert main(["publish", "--engine", url, "--everyone"]) == 1
    os.close(directory)
    assert capsys.readouterr().err == "published 0 messages\nwsbroadcast: [Errno 21] Is a directory\n"


@pytest.mark.parametrize("stderr", [None, "broken"])
def test_publish_does_without_a_stderr(
    url: str, standard_input: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch, stderr: str | None
) -> None:
    standard_input(b"one\n")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", buffering=0) as raw:
        broken = io.TextIOWrapper(raw, write_through=True)
        monkeypatch.setattr(sys, "stderr", broken if stderr else None)
        assert main(["publish", "--engine", url, "--everyone"]) == 0
        assert main(["publish", "--engine", "memory://", "--everyone"]) == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--engine", "redis://localhost", "text"], "one of the arguments --channel --user --everyone is required"),
        (["--engine", "redis://localhost", "--channel", "", "text"], "argument --channel: invalid channel ''"),
        (["--engine", "redis://localhost", "--user", "a\n", "text"], "argument --user: invalid user"),
        (["--engine", "redis://localhost", "--channel", "a", "--everyone", "text"], "not allowed with argument"),
        (["--engine", "redis://localhost", "--everyone", "--json", "--binary"], "not allowed with argument"),
        (["--engine", "redis://localhost", "--everyone", "--binary", "text"], "give no text"),
        (
            ["--engine", "redis://localhost", "--user", "1", "--history", "a*=5,5", "text"],
            "a pattern of --history is for",
        ),
        (
            ["--engine", "redis://localhost", "--everyone", "--idempotency-key", "k"],
            "--idempotency-key names one message",
        ),
        (["--engine", "redis://localhost", "--everyone", "--idempotency-key=k", "1", "2"], "names one message"),
        (["--everyone", "text"], "no broker is named: give --engine URL, or set $WSBROADCAST_ENGINE"),
        (["--engine", "", "--everyone", "text"], "no broker is named: give --engine URL, or set $WSBROADCAST_ENGINE"),
    ],
)
def test_publish_refuses_a_command_line_that_makes_no_sense(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: str
) -> None:
    monkeypatch.delenv("WSBROADCAST_ENGINE", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["publish", *arguments])
    assert ended.value.code == 2
    assert error in capsys.readouterr().err


def test_publish_keeps_the_environment_out_of_its_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WSBROADCAST_ENGINE", "redis://:sesame@localhost")
    with pytest.raises(SystemExit):
        main(["publish", "--help"])
    assert "sesame" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("engine", "error"),
    [
        ("memory://", "memory:// reaches this process only"),
        ("nope://:sesame@host", "no engine for a URL with the scheme 'nope'"),
        ("redis://:sesame@127.0.0.1:{port}", "redis at 127.0.0.1:{port} is out of reach"),
    ],
)
def test_publish_says_in_one_line_what_is_wrong_with_the_broker(
    capsys: pytest.CaptureFixture[str], engine: str, error: str
) -> None:
    port = free_port()
    assert main(["publish", "--engine", engine.format(port=port), "--everyone", "text"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"wsbroadcast: {error.format(port=port)}")
    assert errors.count("\n") == 1
    assert "sesame" not in errors


def test_publish_says_that_the_password_is_wrong(
    own_redis: Callable[..., RedisServer], capsys: pytest.CaptureFixture[str]
) -> None:
    server = own_redis(password="sesame")
    assert main(["publish", "--engine", server.url.replace("sesame", "open-up"), "--everyone", "text"]) == 1
    errors = capsys.readouterr().err
    assert f"127.0.0.1:{server.port}" in errors
    assert errors.count("\n") == 1
    assert "open-up" not in errors


def test_publish_says_which_text_was_not_sent(
    own_redis: Callable[..., RedisServer], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--channel", "news", "one", "x" * (16 * 1024 * 1024 + 1), "three"]
    assert main(["publish", "--engine", own_redis().url, *arguments]) == 1
    assert capsys.readouterr().err.startswith("wsbroadcast: message 2 of 3: message of 16777217 bytes is larger")


@contextmanager
def publishing(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [*STRICT, "-m", "wsbroadcast", "publish", *arguments]
    quiet = os.environ | {"PYTHONASYNCIODEBUG": ""}  # which writes to stderr what took its time
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=quiet) as process:
        try:
            yield process
        finally:
            process.kill()


def write(process: subprocess.Popen[bytes], text: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(text)


def test_publish_sends_a_line_as_it_comes_and_ends_at_ctrl_c(url: str, listener: Listener) -> None:
    with publishing("--engine", url, "--everyone") as process:
        write(process, b"one\n")
        assert listener.receive() == [("everyone", b"one")]
        write(process, b"two\nthr")
        assert listener.receive() == [("everyone", b"two")]
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.read() == b"published 2 messages\n"
        assert process.wait(10) == 130


def test_publish_notices_at_once_that_a_line_was_not_sent(own_redis: Callable[..., RedisServer]) -> None:
    """Although its standard input stays open and nothing more comes from there."""
    server = own_redis()
    with publishing("--engine", server.url, "--everyone") as process:
        with redis.Redis.from_url(server.url) as client, client.pubsub() as pubsub:
            pubsub.subscribe("wsbroadcast:everyone")
            write(process, b"one\n")
            while (pubsub.get_message(timeout=10) or {})["type"] != "message":
                pass
        server.kill()
        write(process, b"two\n")
        assert process.stderr is not None
        errors = process.stderr.read()
        assert process.wait(10) == 1
    assert errors.startswith(b"published 1 message\nwsbroadcast: line 2: ")
    assert errors.count(b"\n") == 2


# publish, and what is kept


@pytest.fixture(params=["redis", "sqlite"])
def keeping(request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> str:
    """The URL of an engine that keeps."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/messages.db"
    return f"{request.getfixturevalue('redis_server').url}?prefix={prefix}"


def kept(url: str, history: Any, **audience: Any) -> list[Any]:
    """What an app reads, and the position behind it."""

    async def read() -> list[Any]:
        async with ConnectionManager(url, history=history) as manager:
            page = await manager.history(**audience)
            return [*(each.data for each in page.messages), str(page.position)]

    return asyncio.run(read())


@pytest.mark.parametrize(
    ("history", "audience", "options"),
    [
        (["--history", "2,60"], {"channel": "news"}, ["--channel", "news"]),
        (["--history", "9,60", "--history", "n*=2,60", "--history=x=1,1"], {"channel": "news"}, ["--channel", "news"]),
        (["--history", "2,200000"], {"user": 42}, ["--user", "42"]),
        (["--history", "2,.5e2"], {"everyone": True}, ["--everyone"]),
    ],
)
def test_publish_keeps_what_it_is_told_to(
    keeping: str, capsys: pytest.CaptureFixture[str], history: list[str], audience: dict[str, Any], options: list[str]
) -> None:
    assert main(["publish", "--engine", keeping, "--verbose", *history, *options, "1", "2", "3"]) == 0
    places = re.findall(r"^published; kept at (\S+)$", capsys.readouterr().err, re.MULTILINE)
    everything = {"*": History(), USERS: History(), EVERYONE: History()}
    assert kept(keeping, everything, **audience)[-3:] == ["2", "3", places[2]]


def test_publish_keeps_what_the_app_has_said_at_the_broker(
    keeping: str, standard_input: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"news": History(messages=2), USERS: History()}
    assert kept(keeping, said, channel="news")[:-1] == []
    standard_input(b"1\n2\n3\n")
    assert main(["publish", "--engine", keeping, "--channel", "news", "--verbose"]) == 0
    *_, last, count = capsys.readouterr().err.splitlines()
    assert kept(keeping, said, channel="news") == ["2", "3", last.removeprefix("published; kept at ")]
    assert count == "published 3 messages"
    assert main(["publish", "--engine", keeping, "--channel", "weather", "--verbose", "sun"]) == 0
    assert capsys.readouterr().err == "published; nothing is kept\n"
    assert main(["publish", "--engine", keeping, "--user", "42", "psst"]) == 0
    assert kept(keeping, said, user=42)[:-1] == ["psst"]
    # What a publisher is told itself is its own: the app's word stands.
    assert main(["publish", "--engine", keeping, "--everyone", "--history", "5,60", "text"]) == 0
    assert main(["publish", "--engine", keeping, "--channel", "news", "4"]) == 0
    assert kept(keeping, said, channel="news")[:-1] == ["3", "4"]


def test_publish_sends_a_key_once(keeping: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["publish", "--engine", keeping, "--channel", "news", "--verbose", "--history", "100,300"]
    for key in ("a", "a", "b"):
        assert main([*command, "--idempotency-key", key, "text"]) == 0
    first, again, other = capsys.readouterr().err.splitlines()
    place = first.removeprefix("published; kept at ")
    assert again == f"published before; kept at {place}"
    assert other.startswith("published; kept at ")
    assert kept(keeping, History(), channel="news") == ["text", "text", other.removeprefix("published; kept at ")]


def test_publish_says_why_a_key_can_not_be_kept_to(keeping: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["publish", "--engine", keeping, "--channel", "news", "text"]
    assert main([*command, "--idempotency-key", "a"]) == 1
    assert capsys.readouterr().err.endswith("say what is kept, as in --history 100,300\n")
    assert main([*command, "--history", "1,1", "--idempotency-key", "x" * 201]) == 1
    expected = "wsbroadcast: idempotency_key is a text of 1 to 200 bytes of UTF-8, not 'xxx"
    assert capsys.readouterr().err.startswith(expected)


def test_publish_keeps_nothing_of_what_fits_no_pattern(keeping: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", "--engine", keeping, "--channel", "news", "--verbose", "--history", "x*=5,60", "text"]) == 0
    assert capsys.readouterr().err == "published; nothing is kept\n"


def test_publish_understands_histories() -> None:
    options = ["--history=2,.5e2", "--history", "room:*=100,300", "--history=a=b=1,200000"]
    histories = _parser().parse_args(["publish", "--channel", "news", *options]).history
    assert histories == [
        ("", History(2, 50.0)),
        ("room:*", History(100, 300.0)),
        ("a=b", History(1, 200_000.0, remember=200_000.0)),
    ]


@pytest.mark.parametrize("text", ["", "10", "=1,2", "x=1,2,3", "1.5,60", "10,a minute", "10;60", "room:*"])
def test_publish_refuses_what_is_no_history(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["publish", "--engine", "redis://localhost", "--channel", "news", f"--history={text}", "text"])
    assert ended.value.code == 2
    expected = f"expected [PATTERN=]MESSAGES,SECONDS, such as 100,300 or 'room:*=100,300', not {text!r}"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("0,5", "History.messages must be a whole number greater than 0, not 0"),
        ("a=b=5,-1", "History.seconds must be a positive number, not -1.0"),
        ("5,nan", "History.seconds must be a positive number, not nan"),
        ("5,inf", "History.seconds must be a positive number, not inf"),
    ],
)
def test_publish_refuses_a_history_that_makes_no_sense(
    capsys: pytest.CaptureFixture[str], text: str, error: str
) -> None:
    with pytest.raises(SystemExit):
        main(["publish", "--engine", "redis://localhost", "--channel", "news", f"--history={text}", "text"])
    assert f"{error}, in {text!r}" in capsys.readouterr().err
