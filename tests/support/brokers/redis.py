"""Redis or Valkey."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tests.support.brokers import programs
from tests.support.brokers.base import HOST, Broker, free_port

if TYPE_CHECKING:  # every test's conftest imports this module, and only some tests need these
    import trustme


class RedisServer(Broker):
    """Redis. What it was told to keep survives `kill`: it writes each change to its append-only file.

    Args:
        password: The password of the user `default`.
        users: Lines of an ACL file without their first word, such as `alice on >secret ~* &news:* +@all`.
        config: Further settings, such as `{"maxmemory": "1mb", "client-output-buffer-limit": "pubsub 1mb 512kb 2"}`.
        tls: Speak TLS only, to other servers too; `ca` is the file that proves it, for the names `localhost` and
            `127.0.0.1`.
        arguments: What comes before the file of settings ends, such as `--sentinel`.
    """

    name = "redis"

    def __init__(
        self,
        *,
        password: str | None = None,
        users: Sequence[str] = (),
        config: Mapping[str, str] | None = None,
        tls: bool = False,
        arguments: Sequence[str] = (),
    ) -> None:
        self._program = programs.redis_server_with_tls() if tls else self._find()
        self._secret = f":{quote(password, safe='')}@" if password else ""
        super().__init__(f"{'rediss' if tls else 'redis'}://{self._secret}{HOST}:{free_port()}/0")
        self._password = password
        self._arguments = arguments
        self.ca: Path | None = None
        self.socket_path = self.directory / "socket"
        """Its unix socket; it takes no TLS there."""
        lines = [f"{name} {value}" for name, value in (self._settings(tls) | dict(config or {})).items()]
        lines += [f"user {line}" for line in users]
        (self.directory / "redis.conf").write_text("\n".join(lines) + "\n")

    def _find(self) -> Path:
        return programs.redis_server()

    @property
    def unix_url(self) -> str:
        """The URL of its unix socket."""
        return f"unix://{self._secret}{self.socket_path}?db=0"

    def _settings(self, tls: bool) -> dict[str, str]:
        settings = {
            "bind": HOST,
            "port": "0" if tls else str(self.port),
            "unixsocket": str(self.socket_path),
            "save": '""',
            "appendonly": "yes",
            "appendfsync": "no",  # what was written outlives the process; only the machine's end would lose it
        }
        if self._password:
            quoted = json.dumps(self._password)
            settings |= {"requirepass": quoted, "masterauth": quoted}
        return settings | (self._tls_settings() if tls else {})

    def _tls_settings(self) -> dict[str, str]:
        authority = _authority()
        certificate = authority.issue_cert("localhost", HOST)
        self.ca = self.directory / "ca.pem"
        authority.cert_pem.write_to_path(self.ca)
        pair = self.directory / "server.pem"
        certificate.private_key_and_cert_chain_pem.write_to_path(pair)
        return {
            "tls-port": str(self.port),
            "tls-cert-file": str(pair),
            "tls-key-file": str(pair),
            "tls-ca-cert-file": str(self.ca),
            "tls-auth-clients": "no",
            "tls-replication": "yes",  # a sentinel goes by it too
            "tls-cluster": "yes",
        }

    def _command(self) -> Sequence[str | Path]:
        return (self._program, self.directory / "redis.conf", *self._arguments)

    def _answers(self) -> bool:
        import redis

        try:
            self.command("PING")
        except redis.AuthenticationError:
            pass  # its default user is off: an answer all the same
        except redis.RedisError as error:
            raise ConnectionError(str(error)) from error
        return True

    def command(self, *parts: str | int) -> Any:
        """Run one command on a connection of its own and return the answer, with texts decoded.

        Raises:
            redis.RedisError: If there is no answer, or it is an error.
        """
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        never = Retry(NoBackoff(), 0)
        with redis.Redis.from_url(self.unix_url, decode_responses=True, socket_timeout=5, retry=never) as client:
            return client.execute_command(*parts)


class ValkeyServer(RedisServer):
    """Valkey, where there is a Redis too."""

    def _find(self) -> Path:
        return programs.valkey_server()


@cache
def _authority() -> trustme.CA:
    import trustme

    return trustme.CA()  # one for all servers: those of a group must trust each other
