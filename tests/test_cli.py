"""The command line: what it refuses, and that it serves the demo."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from wsbroadcast.cli import main
from wsbroadcast.demo.server import url_of


def test_main_without_a_command_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "python -m wsbroadcast" in capsys.readouterr().err


def test_help_lists_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "demo" in capsys.readouterr().out


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
        f"wsbroadcast: port {port} on 127.0.0.1 is taken: "
        "choose another with --port, or --port 0 for any that is free\n"
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
    command = [sys.executable, "-W", "error", "-m", "wsbroadcast", "demo", "--port", "0"]
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
