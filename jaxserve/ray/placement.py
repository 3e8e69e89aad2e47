"""How many engines a Ray cluster is asked for, and what each of them gets. No Ray in here."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.config import EngineOptions, MeshShape, RayOptions, parse_resources
from jaxserve.errors import ConfigError
from jaxserve.gpu_memory import pool_variables

NEEDS = "Ray is not installed: pip install 'jaxserve[ray]'"
ACCELERATORS = ("GPU", "TPU")
CPU_MEMORY = 0.5
"""Share of the free memory that the engines of a host may use together, where they are on CPU."""


@dataclass(frozen=True)
class Placement:
    """`workers` engines, `per_host` of them at most on a host, each with these resources of Ray's."""

    workers: int
    per_host: int
    resources: Mapping[str, float]

    @property
    def on_cpu(self) -> bool:
        """Whether nothing but CPUs is asked for."""
        return not self.resources.keys() - {"CPU"}

    @property
    def threads(self) -> int | None:
        """Threads of an engine on CPU."""
        return max(1, int(self.resources.get("CPU", 1))) if self.on_cpu else None

    def options(self, engine: EngineOptions) -> EngineOptions:
        """An engine's options: on CPU, engines of one host share its memory."""
        if not self.on_cpu or engine.device.memory_utilization is not None:
            return engine
        return replace(engine, device=replace(engine.device, memory_utilization=CPU_MEMORY / self.per_host))


def place(nodes: Sequence[Mapping[str, float]], options: RayOptions, engine: EngineOptions) -> Placement:
    """Where the engines go in a cluster whose nodes have these resources.

    Raises ConfigError if there is room for none, or not for as many as were asked for.
    """
    mesh = engine.device.mesh
    devices = 1 if mesh is None else MeshShape.parse(mesh).devices
    if options.worker_resources is not None:
        resources = parse_resources(options.worker_resources)
    else:
        resources = _usual(nodes, options.workers, devices)
    room = sum(_fit(node, resources) for node in nodes)
    asked = ", ".join(f"{name}={amount:g}" for name, amount in resources.items())
    if room == 0:
        raise ConfigError(f"no node of the Ray cluster has {asked} for an engine; say otherwise with worker_resources")
    if options.workers is not None and options.workers > room:
        raise ConfigError(
            f"the Ray cluster has room for {room} engines of {asked}, not for {options.workers}: lower workers or "
            "worker_resources"
        )
    workers = options.workers or room
    return Placement(workers, min(workers, max(_fit(node, resources) for node in nodes)), resources)


def _usual(nodes: Sequence[Mapping[str, float]], workers: int | None, devices: int) -> dict[str, float]:
    """What an engine of `devices` devices gets if nobody says."""
    there = [name for name in ACCELERATORS if any(node.get(name, 0) for node in nodes)]
    if len(there) > 1:
        raise ConfigError("the Ray cluster has GPUs and TPUs: say with worker_resources which, for instance GPU=1")
    if there:
        return {"CPU": 1, there[0]: devices}
    hosts = [node["CPU"] for node in nodes if node.get("CPU", 0) >= 1]
    if not hosts:
        raise ConfigError("no node of the Ray cluster has a CPU to spare; say with worker_resources what to take")
    return {"CPU": max(1, min(hosts) // math.ceil((workers or len(hosts)) / len(hosts)))}


def _fit(node: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """How many engines a node has room for."""
    return min((int(node.get(name, 0) // amount) for name, amount in resources.items() if amount), default=1)


def remote_args(resources: Mapping[str, float]) -> dict[str, Any]:
    """The resources as Ray's functions want them."""
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    args = {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0), "resources": others}
    return {name: value for name, value in args.items() if value or name == "num_cpus"}


def confine(threads: int | None) -> None:
    """Keeps JAX in this process to CPU and to so many threads; None is for one with accelerators of its own.

    To be called before JAX starts.
    """
    if threads is None:
        os.environ.update(pool_variables())
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["NPROC"] = str(threads)  # what XLA sizes its thread pools by
