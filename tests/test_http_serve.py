"""The server's life: ports, gRPC beside HTTP, draining on the first signal, ending on the second."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator

import grpc
import httpx
import pytest
from fake_engine import FakeEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc
from http_harness import completion, events, in_loop, live, text_model, until

from jaxserve.bench import HttpTarget
from jaxserve.client import EngineState
from jaxserve.config import ServerOptions, authority
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.server import serve


@contextlib.asynccontextmanager
async def serving(
    engine: FakeEngine, **options: int | float | str
) -> AsyncIterator[tuple[str, str | None, asyncio.Task]]:
    """(HTTP url, gRPC address, the task of `serve`); the task must have ended when the block does."""
    found: list[tuple[str, str | None]] = []
    settings = ServerOptions(**({"port": 0, "grpc_port": 0} | options))  # type: ignore[arg-type]
    task = asyncio.create_task(serve(settings, text_model(engine), engine, lambda *a: found.append(a)))
    await until(lambda: bool(found) or task.done())
    if task.done():
        task.result()
    try:
        yield *found[0], task
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@in_loop
async def test_first_signal_drains() -> None:
    engine = FakeEngine()
    engine.steps_left = 1
    async with serving(engine) as (url, address, task), httpx.AsyncClient() as client:
        assert address is not None
        async with grpc.aio.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            serving_code = health_pb2.HealthCheckResponse.SERVING
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == serving_code
            body = completion(stream=True, max_tokens=3)
            async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                assert (await client.get(f"{url}/health")).status_code == 200
                os.kill(os.getpid(), signal.SIGTERM)
                await until(lambda: "drain" in engine.calls)
                refused = await client.get(f"{url}/health")
                assert refused.status_code == 503
                assert refused.json()["error"]["message"] == "Shutting down"
                assert (await client.post(f"{url}/v1/completions", json=completion())).status_code == 503
                assert (await health.Check(health_pb2.HealthCheckRequest())).status != serving_code
                assert engine.calls == ["drain"] and not task.done()
                engine.steps_left = None
                text = (await response.aread()).decode()
        assert "".join(part["choices"][0]["text"] for part in events(text)) == "def"
        await task
    assert engine.calls == ["drain", "stop"]
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))).close()


@in_loop
async def test_second_signal_ends_what_is_left() -> None:
    engine = FakeEngine()
    engine.steps_left = 1
    async with serving(engine) as (url, _, task), httpx.AsyncClient() as client:
        body = completion(stream=True, max_tokens=3)
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            os.kill(os.getpid(), signal.SIGINT)
            await until(lambda: "drain" in engine.calls)
            os.kill(os.getpid(), signal.SIGTERM)
            text = (await response.aread()).decode()
        first, last = events(text)
        assert first["choices"][0]["text"] == "d"
        assert last["error"]["code"] == "engine_unavailable"
        await task
    assert engine.calls == ["drain", "stop"]


@in_loop
async def test_draining_ends_after_its_time() -> None:
    engine = FakeEngine()
    engine.steps_left = 1
    async with serving(engine, shutdown_timeout=0.05) as (url, _, task), httpx.AsyncClient() as client:
        body = completion(stream=True, max_tokens=3)
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            os.kill(os.getpid(), signal.SIGTERM)
            text = (await response.aread()).decode()
        assert events(text)[-1]["error"]["code"] == "engine_unavailable"
        await task


@in_loop
async def test_the_port_is_open_while_the_engine_loads() -> None:
    engine = FakeEngine(state=EngineState.LOADING)
    async with live(engine) as url, httpx.AsyncClient() as client:
        assert (await client.get(f"{url}/health")).status_code == 503
        engine.state = EngineState.READY
        assert (await client.get(f"{url}/health")).status_code == 200
        assert (await client.post(f"{url}/v1/completions", json=completion())).status_code == 200


@in_loop
async def test_an_engine_that_cannot_start_ends_the_server() -> None:
    class Broken(FakeEngine):
        async def wait_ready(self) -> None:
            raise CheckpointError("model.safetensors: 3 tensors are missing")

    engine = Broken(state=EngineState.LOADING)
    with pytest.raises(CheckpointError, match="3 tensors"):
        async with serving(engine):
            pass
    assert engine.calls == ["stop"]


@in_loop
async def test_a_port_in_use_says_the_cure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{port}.*--port"):
            async with live(FakeEngine(), port=port):
                pass
        with pytest.raises(ConfigError):
            async with live(FakeEngine(), grpc_port=port):
                pass
    with pytest.raises(ConfigError, match="--host"):
        async with live(FakeEngine(), host="192.0.2.1"):
            pass


@in_loop
async def test_an_ipv6_address_is_in_brackets() -> None:
    """Where the server says it is, and where a client says it goes."""
    assert authority("::1", 80) == "[::1]:80" and authority("host", 80) == "host:80"
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 address of its own")
    async with live(FakeEngine(), host="::1") as url, HttpTarget(url) as target:
        assert url.startswith("http://[::1]:") and await target.model() == "fake"


def two_free_ports() -> int:
    """A port that is free, as is the one after it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first, contextlib.suppress(OSError, OverflowError):
            port = first.getsockname()[1]
            with socket.create_server(("127.0.0.1", port + 1)):
                return port


async def grpc_address(port: int) -> str | None:
    engine = FakeEngine()
    found: list[str | None] = []
    task = asyncio.create_task(
        serve(ServerOptions(port=port), text_model(engine), engine, lambda _, address: found.append(address))
    )
    await until(lambda: bool(found) or task.done())
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return found[0]


@in_loop
async def test_grpc_takes_the_next_port_or_a_free_one() -> None:
    port = two_free_ports()
    assert await grpc_address(port) == f"127.0.0.1:{port + 1}"
    with socket.create_server(("127.0.0.1", port + 1)):
        assert await grpc_address(port) not in (None, f"127.0.0.1:{port + 1}")
