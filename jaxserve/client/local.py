"""An engine in a thread of the front end's own process: for --in-process, notebooks and tests."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

from jaxserve.client import EngineState, EngineStatus
from jaxserve.client.streams import Streams
from jaxserve.client.thread import EngineThread
from jaxserve.config import EngineOptions
from jaxserve.errors import EngineStopped
from jaxserve.request import Delta, EngineInfo, Request, Update, Updated
from jaxserve.spec import Params


class LocalEngine:
    """An EngineClient whose engine shares this process. See client/__init__.py."""

    def __init__(self, options: EngineOptions, path: Path, *, model_name: str = "model"):
        self._thread = EngineThread(options, path, model_name=model_name, deliver=self._deliver, changed=self._changed)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: Streams | None = None
        self._draining = False
        self._updating = asyncio.Lock()

    @property
    def status(self) -> EngineStatus:
        if self._draining and self._thread.status.state is EngineState.READY:
            return EngineStatus(EngineState.DRAINING, "the server is shutting down")
        return self._thread.status

    @property
    def info(self) -> EngineInfo:
        return self._thread.info

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._streams = Streams()
        self._thread.start()

    async def wait_ready(self) -> None:
        await asyncio.to_thread(self._thread.wait_ready)

    def generate(self, request: Request) -> AsyncGenerator[Delta]:
        if self._streams is None or self.status.state is not EngineState.READY:
            raise EngineStopped(self.status.detail or "the model is loading")
        return self._streams.read(request, self._thread.submit, self._thread.abort)

    async def update(self, update: Update, params: Params | None = None) -> Updated:
        """As an EngineClient's, or from `params`, a tree of arrays like the model's param_specs."""
        async with self._updating:  # one waits in a thread, the others need none
            return await asyncio.to_thread(self._thread.update, update, params)

    async def metrics_text(self) -> bytes:
        return self._thread.metrics_text()

    async def drain(self, timeout_s: float) -> None:
        self._draining = True
        if self._streams is not None:
            await self._streams.empty(timeout_s)

    async def stop(self) -> None:
        await asyncio.to_thread(self._thread.stop)
        if self._streams is not None:
            self._streams.fail_all(EngineStopped("the engine was stopped"))

    def _deliver(self, deltas: list[Delta]) -> None:
        if self._loop is not None and self._streams is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._streams.deliver, deltas)

    def _changed(self, status: EngineStatus) -> None:
        dead = status.state is EngineState.DEAD
        if dead and self._loop is not None and self._streams is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._streams.fail_all, EngineStopped(status.detail))
