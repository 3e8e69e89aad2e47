"""The gRPC server around its calls: cancellation, deadlines, health, reflection, limits, shutdown."""

import asyncio
import socket
from pathlib import Path

import grpc
import pytest
from fake_engine import FakeEngine, write_tokenizer
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_running import running, score_request, text_request, until

from jaxserve.client import EngineState
from jaxserve.errors import ConfigError
from jaxserve.server.grpc import start_grpc
from jaxserve.server.proto import jaxserve_v1_pb2 as pb
from jaxserve.server.proto import jaxserve_v1_pb2_grpc as pb_grpc
from jaxserve.text import TextModel

SERVICE = "jaxserve.v1.Jaxserve"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("toy"))


def test_what_is_no_message_is_the_callers_mistake(toy: Path) -> None:
    async def main() -> None:
        async with running(toy) as r:
            for method in ("Generate", "Tokenize"):
                kind = r.channel.unary_stream if method == "Generate" else r.channel.unary_unary
                call = kind(f"/{SERVICE}/{method}")(b"\xff\xff no message")
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await (call.read() if method == "Generate" else call)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert f"{SERVICE}/{method}" in str(caught.value.details())
            assert (await r.generate(text_request(max_tokens=2)))[0], "others are answered"

    asyncio.run(main())


def test_a_text_of_megabytes_is_refused_by_its_beginning_unless_it_is_to_be_counted(toy: Path) -> None:
    async def main() -> None:
        async with running(toy, max_message_bytes=1 << 24) as r:
            long = "ab " * 100_000
            with pytest.raises(grpc.aio.AioRpcError, match="the first 16384 of the 300000 characters are") as caught:
                await r.generate(text_request(long))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            counted = await r.api.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text=long)))
            assert len(counted.tokens) >= 300_000 > counted.max_model_len

    asyncio.run(main())


# Cancellation and deadlines


def test_a_cancelled_call_aborts_its_work(toy: Path) -> None:
    async def main() -> None:
        async with running(toy, FakeEngine(delay_s=0.01)) as r:
            call = r.api.Generate(text_request(max_tokens=400, ignore_eos=True))
            await call.read()
            call.cancel()
            await until(lambda: r.engine.aborted)
            assert not r.engine.running

    asyncio.run(main())


def test_a_call_cancelled_while_it_waits(toy: Path) -> None:
    async def main() -> None:
        async with running(toy) as r:
            r.engine.gate = asyncio.Event()  # never set: no step ever runs
            calls = [
                asyncio.ensure_future(r.generate(text_request())),
                asyncio.ensure_future(r.api.Score(score_request(3))),
            ]
            await until(lambda: len(r.engine.running) == 4)
            for call in calls:
                call.cancel()
            await until(lambda: len(r.engine.aborted) == 4)
            assert not r.engine.running
            await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(main())


def test_a_deadline_aborts_the_work(toy: Path) -> None:
    async def main() -> None:
        async with running(toy) as r:
            r.engine.gate = asyncio.Event()
            limit = 0.49  # gRPC rounds it up to milliseconds
            for call in (r.api.Generate(text_request(), timeout=limit), r.api.Score(score_request(), timeout=limit)):
                assert (await r.refusal(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: not r.engine.running)
            assert all(0 < request.timeout_s <= 0.5 for request in r.engine.requests)

    asyncio.run(main())


def test_a_channel_that_closes_aborts_its_work(toy: Path) -> None:
    async def main() -> None:
        async with running(toy) as r:
            r.engine.gate = asyncio.Event()
            async with grpc.aio.insecure_channel(r.server.address) as channel:
                call = pb_grpc.JaxserveStub(channel).Generate(text_request())
                await until(lambda: r.engine.running)
                await channel.close()
            assert call.done()
            await until(lambda: not r.engine.running)
            assert r.engine.aborted

    asyncio.run(main())


# Health, reflection, shutdown


def test_health_follows_the_engine(toy: Path) -> None:
    async def main() -> None:
        async with running(toy, FakeEngine(state=EngineState.LOADING)) as r:
            watch = r.health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert (await watch.read()).status == NOT_SERVING
            assert await r.serving() == await r.serving(SERVICE) == NOT_SERVING
            for state, expected in (
                (EngineState.READY, SERVING),
                (EngineState.DEAD, NOT_SERVING),
                (EngineState.READY, SERVING),
            ):
                r.engine.state = state
                assert (await watch.read()).status == expected
            assert await r.serving() == await r.serving(SERVICE) == SERVING

            await r.server.drain()
            assert (await watch.read()).status == NOT_SERVING
            assert await r.serving() == NOT_SERVING
            assert await r.generate(text_request()), "draining still answers"

            unknown = await r.refusal(r.health.Check(health_pb2.HealthCheckRequest(service="nobody")))
            assert unknown.code() is grpc.StatusCode.NOT_FOUND
            watch.cancel()

    asyncio.run(main())


def test_reflection(toy: Path) -> None:
    def look(address: str) -> tuple[set[str], list[str]]:
        with grpc.insecure_channel(address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            service = DescriptorPool(database).FindServiceByName(SERVICE)
            return set(database.get_services()), [method.name for method in service.methods]

    async def main() -> None:
        async with running(toy) as r:
            services, methods = await asyncio.to_thread(look, r.server.address)
            assert services == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
            assert methods == ["Generate", "Score", "Embed", "ListModels", "Tokenize", "Detokenize"]

    asyncio.run(main())


def test_stop_lets_calls_finish_but_does_not_wait_for_watchers(toy: Path) -> None:
    async def main() -> None:
        async with running(toy) as r:
            r.engine.gate = asyncio.Event()
            watch = r.health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            call = asyncio.ensure_future(r.generate(text_request(max_tokens=4)))
            await until(lambda: r.engine.running)
            stopping = asyncio.ensure_future(r.server.stop(3600))
            assert (await watch.read()).status == NOT_SERVING
            r.engine.gate.set()
            assert "".join(m.text for m in await call) == "defg"
            async with asyncio.timeout(60):
                await stopping

    asyncio.run(main())


def test_stop_cuts_off_what_takes_too_long(toy: Path) -> None:
    async def main() -> None:
        async with running(toy) as r:
            r.engine.gate = asyncio.Event()
            call = asyncio.ensure_future(r.refusal(r.api.Generate(text_request())))
            await until(lambda: r.engine.running)
            await r.server.stop(0.05)
            assert (await call).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            assert r.engine.aborted

    asyncio.run(main())


def test_a_busy_port_says_what_to_do(toy: Path) -> None:
    async def main() -> None:
        engine = FakeEngine()
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}.*--grpc-port"):
                await start_grpc(
                    TextModel.open(toy, engine, "toy"), engine, host="127.0.0.1", port=port, max_message_bytes=4096
                )
        async with running(toy) as r:  # nor may two of ours share one
            port = int(r.server.address.rpartition(":")[2])
            with pytest.raises(ConfigError):
                await start_grpc(
                    TextModel.open(toy, engine, "toy"), engine, host="127.0.0.1", port=port, max_message_bytes=4096
                )

    asyncio.run(main())


def test_a_client_that_pings_through_a_long_silence_keeps_its_call(toy: Path) -> None:
    async def main() -> None:
        async with running(toy) as r:
            r.engine.gate = asyncio.Event()
            options = [("grpc.keepalive_time_ms", 1000), ("grpc.http2.max_pings_without_data", 0)]
            async with grpc.aio.insecure_channel(r.server.address, options=options) as channel:
                call = pb_grpc.JaxserveStub(channel).Generate(text_request(max_tokens=4))
                asyncio.get_running_loop().call_later(5.5, r.engine.gate.set)  # gRPC's own limit is three pings
                assert "".join([m.text async for m in call]) == "defg"

    asyncio.run(main())
