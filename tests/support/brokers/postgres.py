"""PostgreSQL."""

from __future__ import annotations

import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from tests.support.brokers import programs
from tests.support.brokers.base import HOST, Broker, environment, free_port

# What makes it start fast and lose nothing but in a power cut.
_SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "fsync": "off",
    "shared_buffers": "16MB",
    "max_wal_size": "32MB",
}

# PostgreSQL's protocol 3.0, "Start-up Phase"; the code of the error is `cannot_connect_now`.
_PROTOCOL = 196608
_STARTING_UP = b"C57P03\0"


class PostgresServer(Broker):
    """PostgreSQL, with the user and the database `postgres`.

    Args:
        password: The password of `postgres`, then wanted from everybody; without it nobody needs one.
        config: Further settings, such as `{"max_connections": "10"}`.
        template: A database that was made before, to copy: `template`'s data must not be in use.
    """

    name = "postgres"
    _stop_signal = signal.SIGINT  # "fast": it doesn't wait for its connections to end

    def __init__(
        self,
        *,
        password: str | None = None,
        config: Mapping[str, str] | None = None,
        template: PostgresServer | None = None,
    ) -> None:
        self._programs = programs.postgres_programs()
        self.user = programs.postgres_user()
        secret = f":{quote(password, safe='')}" if password else ""
        super().__init__(f"postgresql://postgres{secret}@{HOST}:{free_port()}/postgres")
        self._settings = _SETTINGS | {"port": str(self.port)} | dict(config or {})
        self._password = password
        self._template = template
        self._data = self.directory / "data"
        if self.user:
            shutil.chown(self.directory, self.user)

    def start(self) -> None:
        """Start it, the first time with a new database, and wait until it answers.

        Raises:
            AssertionError: If it doesn't, with what it has written.
        """
        if not self._data.exists():
            self.create()
        super().start()

    def create(self) -> None:
        """Make the database; `start` does it too."""
        if self._template is None:
            self._run(self._programs / "initdb", "--no-sync", "--no-locale", "--encoding=UTF8", "--auth=trust",
                      "--username=postgres", "--wal-segsize=1", "--pgdata", self._data)  # fmt: skip
        else:
            self._run("cp", "-R", self._template._data, self._data)
        if self._password:
            self._demand(self._password)

    def _demand(self, password: str) -> None:
        literal = password.replace("'", "''")
        statement = f"ALTER ROLE postgres PASSWORD '{literal}'"
        self._run(self._programs / "postgres", "--single", "-D", self._data, "postgres", stdin=statement)
        (self._data / "pg_hba.conf").write_text("host all all 127.0.0.1/32 scram-sha-256\n")

    def _run(self, *command: str | Path, stdin: str = "") -> None:
        done = subprocess.run(
            command, input=stdin, user=self.user, cwd=self.directory, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}{done.stderr}"

    def _command(self) -> Sequence[str | Path]:
        settings = (f"--{name}={value}" for name, value in self._settings.items())
        return (self._programs / "postgres", "-D", self._data, *settings)

    def _answers(self) -> bool:
        """Begin to connect, break off, and read until its process for us has ended: it counts as a connection."""
        parameters = b"user\0postgres\0database\0postgres\0\0"
        with socket.create_connection((self.host, self.port), timeout=5) as sock:
            sock.sendall(struct.pack("!ii", len(parameters) + 8, _PROTOCOL) + parameters)
            sock.shutdown(socket.SHUT_WR)
            with sock.makefile("rb") as file:
                answer = file.read()
        return bool(answer) and _STARTING_UP not in answer
