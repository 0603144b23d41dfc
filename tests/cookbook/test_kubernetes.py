"""The manifests of the cookbook agree with each other, with the library, and with what the app does when it runs."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import shlex
import signal
import sys
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.async_api import expect
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.cookbook.conftest import PATIENCE_MS, RECIPES, Studio
from tests.support.brokers import Endpoint, free_port
from tests.support.examples import EXAMPLES
from tests.support.programs import needs_browser
from tests.support.servers import eventually
from wsbroadcast import ClientTiming, ConnectionManager, SlowConsumer
from wsbroadcast.engines.redis import RedisEngine

yaml = pytest.importorskip("yaml")

expect.set_options(timeout=PATIENCE_MS)

FOLDER = RECIPES / "kubernetes"
KINDS: dict[str, Any] = {each["kind"]: each for each in yaml.safe_load_all((FOLDER / "app.yaml").read_text())}
POD = KINDS["Deployment"]["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
COMMAND: list[str] = CONTAINER["command"]
READY, LIVE = (CONTAINER[probe]["httpGet"] for probe in ("readinessProbe", "livenessProbe"))


def option(name: str) -> str:
    return COMMAND[COMMAND.index(name) + 1]


def test_everything_finds_what_it_names() -> None:
    labels = POD["metadata"]["labels"]
    spec = {kind: each["spec"] for kind, each in KINDS.items()}
    assert spec["Deployment"]["selector"]["matchLabels"] == labels
    assert spec["Service"]["selector"] == spec["PodDisruptionBudget"]["selector"]["matchLabels"] == labels
    target = spec["HorizontalPodAutoscaler"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", KINDS["Deployment"]["metadata"]["name"])
    assert "replicas" not in spec["Deployment"]  # or each `apply` would undo what the autoscaler did
    assert spec["HorizontalPodAutoscaler"]["minReplicas"] >= 2  # who leaves one has somewhere to go
    ((rule,), (tls,)) = spec["Ingress"]["rules"], spec["Ingress"]["tls"]
    assert tls["hosts"] == [rule["host"]]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    (port,) = spec["Service"]["ports"]
    assert (backend["name"], backend["port"]["name"]) == (KINDS["Service"]["metadata"]["name"], port["name"])


def test_ports_are_those_that_the_server_listens_on() -> None:
    (port,) = CONTAINER["ports"]
    assert option("--port") == str(port["containerPort"])
    assert [KINDS["Service"]["spec"]["ports"][0]["targetPort"], READY["port"], LIVE["port"]] == [port["name"]] * 3
    dockerfile = (FOLDER / "Dockerfile").read_text()
    assert re.findall(r"^EXPOSE (\d+)$", dockerfile, re.MULTILINE) == [option("--port")]
    assert set(re.findall(r"^COPY (\S+)", dockerfile, re.MULTILINE)) == {f"{COMMAND[1].partition(':')[0]}.py"}
    (image,) = re.findall(r"docker build -t (\S+)", dockerfile)
    assert image == CONTAINER["image"]


def test_there_is_time_for_a_drain_before_the_pod_is_killed() -> None:
    _, seconds = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    drain = inspect.signature(ConnectionManager).parameters["drain"].default
    parts = (int(seconds), drain, SlowConsumer().close_timeout, int(option("--timeout-graceful-shutdown")))
    assert parts == (5, 5.0, 1.0, 10), "the comment in the manifest says so"
    assert POD["spec"]["terminationGracePeriodSeconds"] > sum(parts) + 10  # and for the lifespan of the app
    # When the drain begins, the ingress has long been told.
    probe = CONTAINER["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] < int(seconds)


def test_ingress_waits_longer_than_the_server_is_silent() -> None:
    found = KINDS["Ingress"]["metadata"]["annotations"]
    annotations = {name.removeprefix("nginx.ingress.kubernetes.io/"): value for name, value in found.items()}
    timing = ClientTiming()
    longest = max(timing.ping_interval, timing.stream_ping_interval, 20)  # 20 s are uvicorn's own pings
    assert int(annotations["proxy-read-timeout"]) >= 2 * longest
    assert int(annotations["proxy-send-timeout"]) >= 2 * longest
    assert "http_503" in annotations["proxy-next-upstream"].split()


def test_broker_is_one_that_reaches_all_pods_and_the_image_has_its_driver() -> None:
    (url,) = (each["value"] for each in CONTAINER["env"] if each["name"] == "BROKER_URL")
    assert RedisEngine(url) is not None
    assert "wsbroadcast[demo,redis]" in shlex.split((FOLDER / "Dockerfile").read_text().partition("RUN ")[2])


@asynccontextmanager
async def pod(engine: str, directory: Path) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """Run what the manifest says, on a port of this machine; yields its address when it is ready."""
    port = free_port()
    replaced = {option("--port"): str(port), option("--host"): "127.0.0.1"}
    command = [sys.executable, "-m", *(replaced.get(part, part) for part in COMMAND)]
    environment = os.environ | {"BROKER_URL": engine, "OPERATIONS_PASSWORD": "sesame"}
    with (directory / f"{port}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, cwd=EXAMPLES, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        await eventually(lambda: _answers(address + READY["path"], 200, "ready"), timeout=60)
        yield address, process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _answers(url: str, status: int, text: str) -> bool:
    async with httpx2.AsyncClient() as client:
        try:
            response = await client.get(url)
        except httpx2.HTTPError:
            return False
    return (response.status_code, response.text.strip()) == (status, text)


async def _end_of(socket: ClientConnection) -> int | None:
    try:
        while True:
            await socket.recv()
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else None


@needs_browser
async def test_pods_see_each_other_and_one_that_is_stopped_sends_its_clients_away(
    studio: Studio, redis_server: Endpoint, prefix: str, tmp_path: Path
) -> None:
    engine = f"{redis_server.url}?prefix={prefix}"
    async with AsyncExitStack() as stack:
        (leaving, process), (staying, _) = [await stack.enter_async_context(pod(engine, tmp_path)) for _ in range(2)]
        assert await _answers(leaving + LIVE["path"], 200, "live")
        ada, bob = [
            await stack.enter_async_context(connect(f"{address.replace('http', 'ws')}/ws/tea"))
            for address in (leaving, staying)
        ]
        await ada.send("milk?")
        assert await bob.recv() == "milk?"

        page = await studio.open("about:blank", size=(1180, 400))
        await page.context.set_extra_http_headers({"authorization": f"Basic {b64encode(b'ops:sesame').decode()}"})
        await page.goto(f"{staying}/operations/")
        await expect(page.locator("#nodes tbody tr")).to_have_count(2)
        await studio.take("kubernetes", {"/operations/, whichever pod answers": page})

        async with httpx2.AsyncClient(auth=("ops", "sesame")) as client:
            assert (await client.post(f"{leaving}/operations/drain?over=0.1")).status_code == 202
        assert await _end_of(ada) == 1012  # comes back, to the other pod
        await eventually(lambda: _answers(leaving + READY["path"], 503, "draining"), timeout=30)
        assert await _answers(staying + READY["path"], 200, "ready")
        assert await _answers(leaving + LIVE["path"], 200, "live")  # nobody kills it for that
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 30) == -signal.SIGTERM  # uvicorn ends by it when all is done
        async with connect(f"{staying.replace('http', 'ws')}/ws/tea") as ada:
            await ada.send("sugar?")
            assert await bob.recv() == "sugar?"
