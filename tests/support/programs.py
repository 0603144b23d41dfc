"""Programs that tests start and no wheel brings, but for Node; without one, its tests are skipped."""

from __future__ import annotations

import shutil
from pathlib import Path

import playwright
import pytest

BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium")

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

NODE = Path(playwright.__file__).with_name("driver") / "node"
"""Playwright brings its own."""

needs_browser = pytest.mark.skipif(
    BROWSER is None,
    reason="no chromium-headless-shell or chromium on the PATH: apt-get install chromium-headless-shell",
)
needs_nginx = pytest.mark.skipif(NGINX is None, reason="no nginx on the PATH: apt-get install nginx-light")
