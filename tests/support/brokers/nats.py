"""NATS, alone or with JetStream."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.support.brokers import programs
from tests.support.brokers.base import HOST, Broker, free_port


class NATSServer(Broker):
    """NATS. It keeps nothing.

    Args:
        user: The only user who may connect; stands in `url`.
        password: The password of that user.
        config: Text for its configuration file, such as `max_payload: 4096` or an `authorization` block with users
            and their permissions.
    """

    name = "nats"

    def __init__(self, *, user: str | None = None, password: str | None = None, config: str = "") -> None:
        self._program = programs.nats_server()
        secret = f"{quote(user, safe='')}:{quote(password or '', safe='')}@" if user else ""
        super().__init__(f"nats://{secret}{HOST}:{free_port()}")
        lines = [f"listen: {json.dumps(f'{HOST}:{self.port}')}", config]
        if user:
            lines.append(f"authorization {{ user: {json.dumps(user)}, password: {json.dumps(password)} }}")
        (self.directory / "nats.conf").write_text("\n".join(lines) + "\n")

    def _command(self) -> Sequence[str | Path]:
        return (self._program, "--config", self.directory / "nats.conf")

    def _answers(self) -> bool:
        return bool(self.info())

    def set_max_payload(self, size: int) -> None:
        """Change its setting `max_payload`, as an administrator does while it runs; return when it is in force."""
        path = self.directory / "nats.conf"
        rest = re.sub(r"max_payload: \d+\n", "", path.read_text())
        path.write_text(f"{rest}max_payload: {size}\n")
        assert self._process is not None, "it does not run"
        self._process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 10
        while self.info()["max_payload"] != size:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.01)

    def info(self) -> dict[str, Any]:
        """Return what it tells every client about itself: `version`, `max_payload`, `server_id` …

        Raises:
            OSError: If it doesn't say it within two seconds.
        """
        with socket.create_connection((self.host, self.port), timeout=2) as sock, sock.makefile("rb") as file:
            line = file.readline()
        if not line.startswith(b"INFO "):
            raise ConnectionError(f"expected INFO, got {line[:100]!r}")
        info: dict[str, Any] = json.loads(line.removeprefix(b"INFO "))
        return info


class JetStreamServer(NATSServer):
    """NATS with JetStream; what is in memory ends with the process, what is in files doesn't.

    Args:
        config: As for `NATSServer`.
        limits: Settings of JetStream, such as `max_memory_store: 1MB`.
    """

    def __init__(self, *, config: str = "", limits: str = "") -> None:
        super().__init__(config=config)
        path = self.directory / "nats.conf"
        store = json.dumps(str(self.directory / "jetstream"))
        path.write_text(f"{path.read_text()}jetstream {{ store_dir: {store}\n{limits} }}\n")


@contextmanager
def jetstream_cluster() -> Iterator[list[JetStreamServer]]:
    """Run three servers of one cluster that keep streams together; its leader may not be found yet."""
    routes = [free_port() for _ in range(3)]
    urls = ", ".join(json.dumps(f"nats://{HOST}:{port}") for port in routes)
    with ExitStack() as stack:
        servers = []
        for number, port in enumerate(routes):
            listen = json.dumps(f"{HOST}:{port}")
            config = f"server_name: s{number}\ncluster {{ name: c, listen: {listen}, routes: [{urls}] }}"
            servers.append(stack.enter_context(JetStreamServer(config=config)))
        yield servers
