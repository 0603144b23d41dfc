"""Programs that tests start beside the brokers. Without one, its tests are skipped, with the command that brings it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import playwright
import pytest

BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium")

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

NODE = Path(playwright.__file__).with_name("driver") / "node"
"""The one that Playwright brings, and needs for itself."""


def _why_no_node() -> str:
    done = subprocess.run((NODE, "--version"), capture_output=True, text=True)
    return f"{done.stderr.strip()}: apt-get install libatomic1" if done.returncode else ""


_NO_BROWSER = "no chromium-headless-shell or chromium on the PATH: apt-get install chromium-headless-shell"
_NO_NODE = _why_no_node()

needs_node = pytest.mark.skipif(bool(_NO_NODE), reason=_NO_NODE or "Node runs")
needs_browser = pytest.mark.skipif(BROWSER is None or bool(_NO_NODE), reason=_NO_NODE if BROWSER else _NO_BROWSER)
needs_nginx = pytest.mark.skipif(NGINX is None, reason="no nginx on the PATH: apt-get install nginx-light")
