"""A gRPC server on a free port with an engine that counts up behind it, and the clients that talk to it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from fake_engine import FakeEngine, ids_of
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxserve.server.grpc import GrpcServer, start_grpc
from jaxserve.server.proto import jaxserve_v1_pb2 as pb
from jaxserve.server.proto import jaxserve_v1_pb2_grpc as pb_grpc
from jaxserve.text import TextModel


class Running:
    """A server, its engine, and a channel to it."""

    def __init__(self, server: GrpcServer, engine: FakeEngine, channel: grpc.aio.Channel):
        self.server, self.engine, self.channel = server, engine, channel
        self.api = pb_grpc.JaxserveStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    async def generate(self, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
        return [message async for message in self.api.Generate(request)]

    async def refusal(self, call: Awaitable | grpc.aio.UnaryStreamCall) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            if hasattr(call, "__aiter__"):
                async for _ in call:
                    pass
            else:
                await call
        return caught.value

    async def serving(self, service: str = "") -> int:
        return (await self.health.Check(health_pb2.HealthCheckRequest(service=service))).status


@asynccontextmanager
async def running(path: Path, engine: FakeEngine | None = None, *, max_message_bytes: int = 1 << 20):
    engine = engine or FakeEngine()
    model = TextModel.open(path, engine, "toy")
    server = await start_grpc(model, engine, host="127.0.0.1", port=0, max_message_bytes=max_message_bytes)
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield Running(server, engine, channel)
    finally:
        await server.stop(None)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def text_request(text: str = "abc", **params) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=pb.Prompt(text=text), params=pb.SamplingParams(**params))


def ids(text: str) -> pb.TokenIds:
    return pb.TokenIds(ids=ids_of(text))


def score_request(continuations: int = 1) -> pb.ScoreRequest:
    return pb.ScoreRequest(prompt=pb.Prompt(text="ab"), continuations=[pb.Continuation(text="cd")] * continuations)
