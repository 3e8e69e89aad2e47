"""Replicas of the HTTP server on Ray Serve, each with an engine in its process; Serve starts, heals and counts them.

    serve run jaxserve.ray:app model=Qwen/Qwen3-0.6B resources=GPU=1 max_replicas=4

/metrics and /health are those of the replica that a request meets; Serve counts requests itself. There is no gRPC.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import msgspec

from jaxserve.client import EngineState
from jaxserve.config import (
    DeviceOptions,
    EngineOptions,
    MeshShape,
    ModelOptions,
    ScheduleOptions,
    ServerOptions,
    model_name,
    parse_resources,
)
from jaxserve.errors import ConfigError, EngineStopped
from jaxserve.hub import resolve_model
from jaxserve.metrics import FrontMetrics
from jaxserve.ray.placement import NEEDS, Placement, confine, remote_args
from jaxserve.server.http import HttpApp
from jaxserve.text import TextModel

try:
    from ray import serve
except ImportError:
    raise ConfigError(NEEDS) from None

_NOT_HERE = ("host", "port", "grpc_port", "in_process", "admin_key", "reload")
"""ServerOptions that are the business of Serve's proxy, or would change one replica and not the others."""


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """How many replicas there are, and what each has."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float | None = None
    """Serve adds replicas while each has more requests than this, queued ones counted. Default: as many as an engine
    computes at once."""
    max_ongoing_requests: int | None = None
    """Requests that Serve gives a replica at once; others wait at its proxy. Default: twice as many as an engine
    computes at once."""
    resources: str = "CPU=1"
    """What Ray sets aside for a replica: GPU=1, CPU=4,TPU=8. Without a GPU, TPU or the like it runs on CPU."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ConfigError(
                f"min_replicas {self.min_replicas} and max_replicas {self.max_replicas}: give 0 <= min <= max, max >= 1"
            )
        for name in ("target_ongoing_requests", "max_ongoing_requests"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be above 0, got {value}")
        parse_resources(self.resources)


def build(args: Mapping[str, Any]) -> Any:
    """A Serve application from the names and values of `serve`'s options (but _NOT_HERE) and of ReplicaOptions.

    Values may be texts, as `serve run` has them. Raises ConfigError for an unknown name or a wrong value.
    """
    sections = (ModelOptions, ScheduleOptions, DeviceOptions, ServerOptions, ReplicaOptions)
    known = {f.name for section in sections for f in fields(section)} - set(_NOT_HERE)
    if unknown := sorted(set(args) - known):
        raise ConfigError(f"there is no option {unknown[0]!r}; there are {', '.join(sorted(known))}")
    model, schedule, device, server, replicas = (_section(section, args) for section in sections)
    engine = EngineOptions(model=model, schedule=schedule, device=device)
    placement = Placement(replicas.max_replicas, replicas.max_replicas, parse_resources(replicas.resources))
    seqs = schedule.max_num_seqs or (64 if placement.on_cpu else 256)
    seqs *= MeshShape.parse(device.mesh).data if device.mesh is not None else 1
    name = model_name(model.model, server.served_model_name)
    deployment = serve.deployment(
        serve.ingress(_front)(Replica),
        name="jaxserve",
        ray_actor_options=remote_args(placement.resources),
        max_ongoing_requests=replicas.max_ongoing_requests or 2 * seqs,
        autoscaling_config={
            "min_replicas": replicas.min_replicas,
            "max_replicas": replicas.max_replicas,
            "target_ongoing_requests": replicas.target_ongoing_requests or seqs,
        },
        graceful_shutdown_timeout_s=server.shutdown_timeout,
    )
    return deployment.bind(placement.options(engine), server, name, placement.threads)


def _section(section: type, args: Mapping[str, Any]) -> Any:
    given = {f.name: args[f.name] for f in fields(section) if f.name in args}
    try:
        return msgspec.convert(given, section, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{section.__name__}: {error}") from error


class Replica:
    """The HTTP server's application over an engine in this process; ready when the model is loaded."""

    async def __init__(self, engine: EngineOptions, server: ServerOptions, name: str, threads: int | None):  # type: ignore[misc]
        confine(threads)
        from jaxserve.client.local import LocalEngine  # which starts JAX

        path = await asyncio.to_thread(resolve_model, engine.model.model, engine.model.revision)
        self._client = LocalEngine(engine, path, model_name=name)
        await self._client.start()
        text = await asyncio.to_thread(TextModel.open, path, self._client, name)
        await self._client.wait_ready()
        text.metrics = FrontMetrics(name)
        self.http = HttpApp(server, text, self._client, text.metrics)

    async def check_health(self) -> None:
        """Raises EngineStopped when the engine is gone: then Serve replaces the replica."""
        if self._client.status.state is EngineState.DEAD:
            raise EngineStopped(self._client.status.detail)

    async def __del__(self) -> None:
        """Called by Serve when the requests in flight have ended, or graceful_shutdown_timeout_s is over."""
        if client := getattr(self, "_client", None):
            await client.stop()


def _front() -> Callable[..., Awaitable[None]]:
    """The ASGI application of the replica in whose process it is called."""

    async def front(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[..., Any]) -> None:
        if scope["type"] == "lifespan":
            while (event := (await receive())["type"]) != "lifespan.shutdown":
                await send({"type": f"{event}.complete"})
            await send({"type": f"{event}.complete"})
        elif scope["type"] == "http":
            await serve.get_replica_context().servable_object.http(scope, receive, send)

    return front
