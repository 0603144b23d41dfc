"""Events behind a real nginx: buffering, a compressor, and the location that the documentation shows."""

from __future__ import annotations

import asyncio
import re
import time
import zlib
from pathlib import Path

import pytest

from tests.integration.test_proxy import _MAIN
from tests.support.brokers import free_port
from tests.support.programs import NGINX, needs_nginx
from tests.support.servers import ROOT, UVICORN, Server, eventually
from tests.support.sse import EventParser, request

pytestmark = needs_nginx

(DOCUMENTED,) = re.findall(
    r"^```nginx\n(.*?)^```", (ROOT / "docs" / "sse.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)
PLAIN = "location /sse/ { proxy_pass http://127.0.0.1:8000; proxy_set_header Host $http_host; }"
GZIP = "gzip on; gzip_types text/event-stream; gzip_min_length 1; gzip_proxied any; gzip_http_version 1.0;"


@pytest.mark.parametrize("location", [DOCUMENTED, PLAIN, GZIP + PLAIN], ids=["documented", "buffering", "gzip"])
async def test_events_come_through_nginx_one_by_one(location: str, tmp_path: Path) -> None:
    port = free_port()
    with Server(UVICORN, tmp_path / "log", "tests.support.streams:app") as server:
        assert location.count("127.0.0.1:8000") == 1
        inside = location.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        config = tmp_path / "nginx.conf"
        documented = f"server {{ listen 127.0.0.1:{port}; {inside} }}"
        config.write_text(_MAIN.format(directory=tmp_path, documented=documented))
        nginx = await asyncio.create_subprocess_exec(str(NGINX), "-c", str(config), "-p", str(tmp_path))
        try:

            async def listens() -> bool:
                try:
                    async with request(port, "/sse/x", "HEAD") as answer:
                        return answer.status == 200
                except OSError:
                    return False

            await eventually(listens)
            async with request(port, "/sse/kept-nginx", Accept_Encoding="gzip") as stream:
                inflate = zlib.decompressobj(wbits=31) if "content-encoding" in stream.headers else None
                assert (inflate is not None) is location.startswith("gzip on")
                parser, seen = EventParser(), [""]
                for number in range(-1, 3):
                    wanted = "hello" if number < 0 else f"message {number}"
                    if number >= 0:
                        await server.post(f"/broadcast?channel=kept-nginx&text=message%20{number}")
                    started = time.monotonic()
                    while wanted not in seen:
                        piece = await stream.piece()
                        assert piece
                        events = parser.feed(inflate.decompress(piece) if inflate else piece)
                        seen += [event.data if event.name == "message" else event.name for event in events]
                    assert time.monotonic() - started < 2
        finally:
            nginx.terminate()
            await nginx.wait()
