"""The steps of a release up to the upload: `scripts/release`."""

from __future__ import annotations

import argparse
import email
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import wsbroadcast
from tests.support.servers import ROOT

DIST = ROOT / "dist"

PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")

EXTRAS = "centrifuge,demo,nats,otel,postgres,prometheus,redis"
"""What a user installs, and not what a developer does."""

NEEDED = {
    "wsbroadcast/py.typed",
    "wsbroadcast/client/wsbroadcast.js",
    "wsbroadcast/client/wsbroadcast.d.ts",
    "wsbroadcast/client/wsbroadcast.min.js",
    "wsbroadcast/demo/static/index.html",
}
"""What a wheel has beside the modules."""

SMOKE = """
import asyncio, importlib, pkgutil
import wsbroadcast
for module in pkgutil.walk_packages(wsbroadcast.__path__, "wsbroadcast."):
    if not module.name.endswith("__main__") and not module.name.startswith("wsbroadcast.testing."):  # wants pytest
        importlib.import_module(module.name)

async def main():
    async with wsbroadcast.ConnectionManager() as manager:
        async with manager.listen("news") as messages:
            await manager.broadcast("hello", channel="news")
            assert (await anext(aiter(messages))).data == "hello"

asyncio.run(main())
print(wsbroadcast.__version__)
"""


class ReleaseError(Exception):
    """Something that has to be mended before the release."""


def check_changelog(text: str, version: str) -> None:
    """Check that the newest section is that of the version, has a date that isn't to come, and nothing is unreleased.

    Raises:
        ReleaseError: Otherwise; it says what to do.
    """
    sections = re.findall(r"^## \[(.+?)\](?: - (\S+))?\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if not sections or sections[0][0] != "Unreleased":
        raise ReleaseError("CHANGELOG.md has to begin with the section [Unreleased]; it may be empty")
    if sections[0][2].strip():
        raise ReleaseError(f"CHANGELOG.md has entries under [Unreleased]: move them to [{version}]")
    newest, day, entries = sections[1] if len(sections) > 1 else ("none", "", "")
    if newest != version:
        raise ReleaseError(f"wsbroadcast.__version__ is {version}, but the newest section of CHANGELOG.md is {newest}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", day) or date.fromisoformat(day) > date.today():
        raise ReleaseError(
            f"the section [{version}] of CHANGELOG.md needs its day, such as {date.today()}, not {day!r}"
        )
    if not entries.strip():
        raise ReleaseError(f"the section [{version}] of CHANGELOG.md is empty")


def modules() -> set[str]:
    """Return the modules that a wheel has to have, as paths."""
    source = ROOT / "src"
    return {file.relative_to(source).as_posix() for file in (source / "wsbroadcast").rglob("*.py")}


def check_wheel(wheel: Path) -> None:
    """Check that a wheel has the package and nothing else, and that its metadata can be read by an index.

    Raises:
        ReleaseError: Otherwise.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = email.message_from_bytes(archive.read(next(name for name in names if name.endswith("/METADATA"))))
    if missing := (NEEDED | modules()) - names:
        raise ReleaseError(f"{wheel.name} lacks {', '.join(sorted(missing))}")
    info = f"{wheel.name.rsplit('-', 3)[0]}.dist-info/"
    if strange := [name for name in names if not name.startswith(("wsbroadcast/", info))]:
        raise ReleaseError(f"{wheel.name} has what doesn't belong there: {', '.join(sorted(strange))}")
    if litter := [name for name in names if "__pycache__" in name or name.endswith((".orig", ".pyc", ".rej"))]:
        raise ReleaseError(f"{wheel.name} has {', '.join(sorted(litter))}")
    if f"{info}licenses/LICENSE" not in names or metadata["License-Expression"] != "MIT":
        raise ReleaseError(f"{wheel.name} has no licence")


def check_sdist(sdist: Path) -> None:
    """Check that a source distribution has exactly the files of the repository that it is to have.

    Raises:
        ReleaseError: Otherwise.
    """
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    roots = wanted["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    tracked = {
        name for name in listed.splitlines() if any(name == root or name.startswith(f"{root}/") for root in roots)
    }
    if missing := tracked - names:
        raise ReleaseError(f"{sdist.name} lacks {', '.join(sorted(missing)[:5])}")
    if strange := names - tracked - {"PKG-INFO", "pyproject.toml", ".gitignore"}:
        raise ReleaseError(f"{sdist.name} has what isn't in the repository: {', '.join(sorted(strange)[:5])}")


def build(into: Path) -> tuple[Path, Path]:
    """Build both, and return the source distribution and the wheel, which is built from it."""
    _run(sys.executable, "-m", "build", "--outdir", str(into), str(ROOT))
    sdist, wheel = next(into.glob("*.tar.gz")), next(into.glob("*.whl"))
    _run(sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel))
    return sdist, wheel


def try_in(python: str, wheel: Path) -> None:
    """Install a wheel with a Python in an environment of its own, import every module, and open the demo."""
    with tempfile.TemporaryDirectory() as directory:
        _run(python, "-m", "venv", directory)
        inside = f"{directory}/bin/python"
        install = (inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        _run(*install, str(wheel))
        _run(inside, "-m", "pip", "check")
        _run(inside, "-c", "from wsbroadcast import ConnectionManager, Publisher, create_router")
        _run(*install, f"{wheel}[{EXTRAS}]")
        _run(inside, "-m", "pip", "check")
        _run(inside, "-c", SMOKE)
        with _served_demo(inside) as url, urllib.request.urlopen(url, timeout=10) as answer:
            if b"<title>wsbroadcast demo" not in answer.read():
                raise ReleaseError(f"the demo with {python} shows another page")


@contextmanager
def _served_demo(python: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, "-u", "-m", "wsbroadcast", "demo", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/") as demo:
        try:
            for line in demo.stdout or ():
                if f":{port}" in line:
                    break
            else:
                raise ReleaseError(f"the demo with {python} ended without giving its address")
            yield f"http://127.0.0.1:{port}/"
        finally:
            demo.terminate()


def _run(*command: str) -> None:
    print("+", *(part if "\n" not in part else "…" for part in command), flush=True)
    plain = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    if subprocess.run(command, env=plain, check=False).returncode:
        raise ReleaseError(f"{command[0]} failed")


def _runs(python: str) -> bool:
    return subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True, check=False).returncode == 0


def _clean() -> None:
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    if changed:
        raise ReleaseError(f"there is what isn't committed:\n{changed}")


def release(pythons: Sequence[str], *, tests: bool) -> None:
    """Do every step up to the upload.

    Raises:
        ReleaseError: If one of them fails.
    """
    version = wsbroadcast.__version__
    _clean()
    check_changelog((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    if tests:
        _run(str(ROOT / ".ci" / "run"))
    shutil.rmtree(DIST, ignore_errors=True)
    sdist, wheel = build(DIST)
    check_sdist(sdist)
    check_wheel(wheel)
    for python in pythons:
        try_in(python, wheel)
    print(
        f"\nwsbroadcast {version} is built and tried with {', '.join(pythons)}. To release it:\n"
        f"  git tag -a {version} -m 'wsbroadcast {version}' && git push origin {version}\n"
        f"  python -m twine upload {sdist.relative_to(ROOT)} {wheel.relative_to(ROOT)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/release", description=__doc__)
    parser.add_argument("--without-tests", action="store_true", help="where .ci/run has passed already")
    arguments = parser.parse_args()
    found = [python for python in PYTHONS if shutil.which(python) and _runs(python)]
    if not found:
        sys.exit(f"none of {', '.join(PYTHONS)} is on the PATH")
    if absent := [python for python in PYTHONS if python not in found]:
        print(f"not tried: {', '.join(absent)}, which this machine lacks", file=sys.stderr)
    try:
        release(found, tests=not arguments.without_tests)
    except ReleaseError as error:
        sys.exit(f"no release: {error}")


if __name__ == "__main__":
    main()
