"""The lowest versions that pyproject.toml allows: the library works with them, too."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.npm import once
from tests.support.servers import ROOT

EXTRAS = ("centrifuge", "nats", "postgres", "prometheus", "redis")
"""Whose lowest versions are tried. OpenTelemetry's packages want one version of all of them, and tests need its SDK."""

LEFT_OUT = "gzip"
"""What they can't: Starlette's `GZipMiddleware` of that time holds events back, as docs/sse.md says."""

TESTS = [
    "tests/test_broadcasting.py",
    "tests/test_manager.py",
    "tests/engines/test_contract.py",
    "tests/integration/test_typed.py",
    "tests/telemetry/test_prometheus.py",
    *(f"tests/web/test_{name}.py" for name in ("authenticate", "dependencies", "documentation", "http_streams")),
    *(f"tests/web/test_{name}.py" for name in ("inbound", "operations", "origin", "protocol", "routing", "tokens")),
]


def lowest() -> list[str]:
    """Return what pip is to install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = [*project["dependencies"], *(one for extra in EXTRAS for one in project["optional-dependencies"][extra])]
    found = [re.fullmatch(r"([\w\[\]-]+)>=([\d.]+)", one) for one in ranges]
    assert all(found), f"each has to be a name with its lowest version: {ranges}"
    # Starlette's test client was one of httpx then.
    return [*(f"{match[1]}=={match[2]}.*" for match in found if match), "httpx"]


@pytest.fixture
def old_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def install(directory: Path) -> None:
        quiet = ["--quiet", "--disable-pip-version-check", "--no-warn-conflicts"]
        command = [sys.executable, "-m", "pip", "install", *quiet, "--target", str(directory / "packages"), *lowest()]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr

    return once(tmp_path_factory, "lowest", install) / "packages"


@pytest.mark.timeout(500)  # a machine that is slow, and a registry that is
def test_lowest_versions_pass(old_packages: Path, tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(old_packages), os.environ.get("PYTHONPATH")]))
    ours = ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT")  # its ports are none of another process's
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    plain |= {name: os.environ[name] for name in ours if name in os.environ}
    options = shlex.split("-q -n 0 -p no:cacheprovider -W ignore::DeprecationWarning --timeout 60")
    command = [sys.executable, "-m", "pytest", *options, f"--basetemp={tmp_path / 'run'}"]
    command += ["-k", f"not ({LEFT_OUT})", *TESTS]
    printed = tmp_path / "printed"  # no pipe: whatever it leaves behind would keep one open
    with printed.open("wb") as output:
        done = subprocess.run(
            command, cwd=ROOT, env=plain | {"PYTHONPATH": path}, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    assert done.returncode == 0, "\n".join(printed.read_text(errors="replace").splitlines()[-60:])
