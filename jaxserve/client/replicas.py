"""Several engines of this process seen as one: how they start and end, and what they say together."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import jax
import msgspec
from jax.sharding import Mesh

from jaxserve.client.routing import Router
from jaxserve.client.spanning import leading
from jaxserve.config import EngineOptions, MeshShape
from jaxserve.engine import Engine
from jaxserve.errors import JaxserveError
from jaxserve.loading import Progress
from jaxserve.metrics import JoinedMetrics
from jaxserve.request import Delta, EngineInfo, Request, Update
from jaxserve.runner import Prepared
from jaxserve.sharding import meshes
from jaxserve.spec import Params


def open_engine(
    options: EngineOptions,
    path: Path,
    *,
    model_name: str,
    deliver: Callable[[list[Delta]], None],
    progress: Progress = lambda message: None,
    weights_version: int = 0,
    lost: Callable[[JaxserveError], None] = lambda error: None,
    again: bool = False,
    ahead: bool = False,
) -> "Engine | Replicas":
    """The engine that the options ask for; `ahead`: only compiled. Raises ConfigError or CheckpointError.

    Of several hosts, `lost` and `again` are as Leader has them.
    """
    if options.place is not None:
        with leading(options, path, progress, lost=lost, again=again) as (mesh, followers):
            engine = Engine(
                options, path, model_name=model_name, deliver=deliver, progress=progress, mesh=mesh,
                weights_version=weights_version, followers=followers,
            )  # fmt: skip
            followers.wait_ready(engine.runner, progress)
            return engine
    kind = Engine if MeshShape.parse(options.device.mesh or "1").data == 1 else Replicas
    return kind(
        options,
        path,
        model_name=model_name,
        deliver=deliver,
        progress=progress,
        weights_version=weights_version,
        ahead=ahead,
    )


class Replicas:
    """An Engine on each replica of the mesh, each with its own weights, pages, scheduler and thread. As an Engine.

    `deliver` is called by the threads of all replicas.
    """

    def __init__(
        self,
        options: EngineOptions,
        path: Path,
        *,
        model_name: str,
        deliver: Callable[[list[Delta]], None],
        progress: Progress = lambda message: None,
        weights_version: int = 0,
        ahead: bool = False,
    ):
        shape = MeshShape.parse(options.device.mesh or "1")
        self._deliver = deliver

        def opened(index: int, mesh: Mesh, options: EngineOptions) -> Engine:
            return Engine(
                options,
                path,
                model_name=model_name,
                deliver=self._pass_on,
                progress=lambda message: progress(f"replica {index}: {message}"),
                mesh=mesh,
                index=index,
                weights_version=weights_version,
                ahead=ahead,
            )

        first, *others = meshes(shape, jax.local_devices())
        engine = opened(0, first, options)
        same = _sized_as(options, engine.info)
        try:
            with ThreadPoolExecutor(len(others), thread_name_prefix="replica") as pool:
                rest = list(pool.map(opened, range(1, shape.data), others, repeat(same)))
        except BaseException:
            engine.runner.close()
            raise
        self.engines = [engine, *rest]
        self.metrics = JoinedMetrics([e.metrics for e in self.engines])
        self._shape = shape
        self._router = Router(
            [e.info for e in self.engines],
            [e.scheduler.tables for e in self.engines],
            prefix_caching=options.schedule.enable_prefix_caching,
        )

    @property
    def info(self) -> EngineInfo:
        return _joined(self._shape, [e.info for e in self.engines])

    def submit(self, request: Request) -> None:
        """Queues a request at one of the replicas. What it is refused with comes back as a delta with an error."""
        self.engines[self._router.admit(request)].submit(request)

    def abort(self, request_id: str) -> None:
        """Ends a request where it is; its pages are free for the next step. No delta follows."""
        index = self._router.withdraw(request_id)
        if index is not None:
            self.engines[index].abort(request_id)

    def prepare(self, update: Update, params: Params | None = None) -> list[Prepared]:
        """What each replica is to switch to, one after the other: one that fails leaves all as they are."""
        return [prepared for engine in self.engines for prepared in engine.prepare(update, params)]

    def switch(self, prepared: list[Prepared], *, abort: bool) -> list[Future[None]]:
        """Switches every replica, each as soon as it can."""
        each = zip(self.engines, prepared, strict=True)
        return [done for engine, one in each for done in engine.switch([one], abort=abort)]

    def stop(self) -> None:
        """Ends all loops after the steps that are running; whatever is unfinished gets EngineStopped."""
        for engine in self.engines:
            engine.stop()

    def run(self) -> None:
        """All loops, until `stop`. If one fails, the others are stopped and its error is raised."""
        ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

        def loop(engine: Engine) -> None:
            try:
                engine.run()
            except Exception as error:
                ended.put(error)
            else:
                ended.put(None)

        threads = [
            threading.Thread(target=loop, args=(engine,), name=f"engine {i}", daemon=True)
            for i, engine in enumerate(self.engines)
        ]
        for thread in threads:
            thread.start()
        errors = [ended.get()]
        self.stop()
        errors += [ended.get() for _ in threads[1:]]
        for error in errors:
            if error is not None:
                raise error

    def _pass_on(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if delta.finish is not None:
                self._router.finished(delta.request_id)
        self._deliver(deltas)


def _sized_as(options: EngineOptions, info: EngineInfo) -> EngineOptions:
    """The options of the other replicas: what was worked out for the first one holds for all."""
    return replace(
        options,
        model=replace(options.model, max_model_len=info.max_model_len),
        device=replace(options.device, num_kv_pages=info.num_pages),
    )


def _joined(shape: MeshShape, infos: list[EngineInfo]) -> EngineInfo:
    """What the replicas are together: sequences, pages and bytes add up, the sizes of a step and a request do not."""
    kinds = infos[0].device_bytes
    return msgspec.structs.replace(
        infos[0],
        max_num_seqs=sum(info.max_num_seqs for info in infos),
        num_pages=sum(info.num_pages for info in infos),
        device_bytes={kind: sum(info.device_bytes[kind] for info in infos) for kind in kinds},
        mesh=str(shape),
    )
