"""The file of an SQLite engine, and the sockets beside it by which processes wake each other."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import tempfile
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

from wsbroadcast.exceptions import ConfigurationError

_MOUNTS = Path("/proc/self/mountinfo")

# File systems whose locks or shared memory don't work between machines.
_NETWORK = (
    "9p",
    "afs",
    "ceph",
    "cifs",
    "fuse.sshfs",
    "fuse.glusterfs",
    "lustre",
    "ncpfs",
    "nfs",
    "nfs4",
    "smb3",
    "smbfs",
)


# The longest path of a socket, in bytes (unix(7)). On macOS it is four less.
_MAX_SOCKET_PATH = 103


class Identity(NamedTuple):
    """What identifies a file: its device and inode."""

    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Identity | None:
        """Return the identity of the file at a path; `None` if there is none."""
        try:
            stat = path.stat()
        except OSError:
            return None
        return cls(stat.st_dev, stat.st_ino)


def file_system(path: Path, mounts: str) -> str:
    """Return the type of a path's file system; empty if unknown. `mounts` is a text like `/proc/self/mountinfo`."""
    best, kind = "", ""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) < 5 or not right:
            continue
        point = fields[4].encode().decode("unicode_escape")
        is_below = point == "/" or f"{path}/".startswith(f"{point.rstrip('/')}/")
        if is_below and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind


def check_local(path: Path) -> None:
    """Check that a file is on this machine, as far as that can be known.

    Raises:
        ConfigurationError: If it is on a network file system.
    """
    try:
        kind = file_system(path.resolve(), _MOUNTS.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return
    if kind in _NETWORK:
        raise ConfigurationError(
            f"{path} is on a network file system ({kind}), where SQLite's locks and shared memory don't work: put it "
            "on a disk of this machine, or use redis://, nats:// or postgresql:// for several machines"
        )


def bells_of(path: Path) -> Path:
    """Return the directory of the sockets of a file's nodes. It is beside the file, unless that path is too long."""
    beside = path.with_name(f"{path.name}-bells")
    if len(os.fsencode(beside)) + 1 + 24 <= _MAX_SOCKET_PATH:
        return beside
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:24]
    runtime = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(runtime) / f"wsbroadcast-{name}"


class Bell:
    """A datagram socket. Other nodes send a byte to it when they have written something.

    Args:
        directory: The directory of the sockets of all nodes.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, exist_ok=True)
        self.path = directory / f"{os.getpid()}-{token_hex(4)}"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.bind(os.fspath(self.path))
        self._others: list[str] = []
        self._seen_at = 0

    def ring(self) -> None:
        """Send all other nodes a byte. A node that has an unread byte already needs no other."""
        for other in self._look():
            try:
                self.socket.sendto(b"!", other)
            except BlockingIOError:
                pass  # its buffer is full, so it is being woken anyway
            except (ConnectionRefusedError, FileNotFoundError):
                with contextlib.suppress(OSError):
                    os.unlink(other)  # its process was killed
            except OSError:
                pass

    def _look(self) -> list[str]:
        try:
            changed_at = os.stat(self._directory).st_mtime_ns
            if changed_at != self._seen_at:
                self._others = [each.path for each in os.scandir(self._directory) if each.path != os.fspath(self.path)]
                self._seen_at = changed_at
        except OSError:
            self._others = []
        return self._others

    def answer(self) -> None:
        """Take all bytes that have come."""
        with contextlib.suppress(BlockingIOError, OSError):
            while self.socket.recv(64):
                pass

    def close(self) -> None:
        """Close the socket and remove it."""
        self.socket.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)
