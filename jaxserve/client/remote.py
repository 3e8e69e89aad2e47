"""An engine in a process of its own: starts it, speaks to it over one stream, starts it again when it dies. No jax."""

import asyncio
import contextlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import grpc

from jaxserve.client import EngineState, EngineStatus, wire
from jaxserve.client.streams import Streams
from jaxserve.config import EngineOptions
from jaxserve.engine_process import EngineProcess
from jaxserve.errors import EngineStopped, JaxserveError
from jaxserve.request import Delta, EngineInfo, Request, Update, Updated

log = logging.getLogger("jaxserve.engine")

FIRST_BACK_OFF_S = 0.5
LAST_BACK_OFF_S = 30.0
HEALTHY_AFTER_S = 120.0
STOP_TIMEOUT_S = 10.0


class RemoteEngine:
    """An EngineClient whose engine is a child process. See client/__init__.py.

    A child that dies fails the requests in flight with EngineStopped and is started again, soon at first and then
    ever more slowly, with the weights that it was switched to last. One that dies before it was ready for the first
    time is not: its error is the user's to mend.
    """

    def __init__(
        self, options: EngineOptions, path: Path, *, model_name: str = "model", begun: EngineProcess | None = None
    ):
        """`begun`: a process to be the first, if there is one already."""
        self._options, self._path, self._model_name = options, path, model_name
        self._status = EngineStatus(EngineState.LOADING, "starting the engine process")
        self._info: EngineInfo | None = None
        self._error: JaxserveError | None = None
        self._settled = asyncio.Event()
        self._streams = Streams()
        self._outbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._channel: grpc.aio.Channel | None = None
        self._begun, self._process = begun, begun
        self._supervisor: asyncio.Task[None] | None = None
        self._draining = self._stopping = False

    @property
    def status(self) -> EngineStatus:
        if self._draining and self._status.state is EngineState.READY:
            return EngineStatus(EngineState.DRAINING, "the server is shutting down")
        return self._status

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise self._error or EngineStopped("the model is loading")
        return self._info

    @property
    def pid(self) -> int | None:
        """The engine process, while there is one."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def wait_ready(self) -> None:
        await self._settled.wait()
        if self._error is not None:
            raise self._error

    def generate(self, request: Request) -> AsyncGenerator[Delta]:
        if self.status.state is not EngineState.READY:
            raise EngineStopped(self.status.detail or "the model is loading")
        return self._streams.read(request, self._submit, self._abort)

    async def update(self, update: Update) -> Updated:
        reply = wire.decode_update_reply(await self._ask(wire.UPDATE, wire.encode(update)))
        if reply.updated is None:
            assert reply.error is not None, "a reply is one of the two"
            raise reply.error.rebuild()
        # A process that is started again has to begin where this one is.
        self._info, self._path = reply.updated.info, Path(update.path or self._path)
        return reply.updated

    async def metrics_text(self) -> bytes:
        try:
            return await self._ask(wire.METRICS, b"", timeout_s=2.0)
        except EngineStopped:
            return b""

    async def drain(self, timeout_s: float) -> None:
        self._draining = True
        await self._streams.empty(timeout_s)

    async def stop(self) -> None:
        self._stopping = True
        if self._supervisor is None:
            return
        self._outbox.put_nowait(wire.encode(wire.Stop()))
        # Loading or waiting to restart: nothing is in flight. But other hosts are to hear of it.
        if self._status.state is not EngineState.READY and self._options.place is None:
            self._kill()
            self._supervisor.cancel()
        _, pending = await asyncio.wait({self._supervisor}, timeout=STOP_TIMEOUT_S)
        if pending:
            self._kill()
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
        self._streams.fail_all(EngineStopped("the engine was stopped"))

    async def _ask(self, method: str, request: bytes, timeout_s: float | None = None) -> bytes:
        """The engine's answer to a call beside the stream. Raises EngineStopped."""
        if self._channel is None or self._status.state is not EngineState.READY:
            raise EngineStopped(self._status.detail or "the model is loading")
        try:
            return await self._channel.unary_unary(method)(request, timeout=timeout_s)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError) as error:
            raise EngineStopped("the engine died while it was asked") from error
        except asyncio.CancelledError as error:
            # The channel closed under the call; unless it was us who were cancelled.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise EngineStopped("the engine died while it was asked") from error

    def _submit(self, request: Request) -> None:
        self._outbox.put_nowait(
            wire.encode(wire.Submit(request))
        )  # here, where what cannot be encoded harms nobody else

    def _abort(self, request_id: str) -> None:
        self._outbox.put_nowait(wire.encode(wire.Abort(request_id)))

    async def _supervise(self) -> None:
        """Runs one engine process after another."""
        back_off = 0.0
        try:
            while not self._stopping:
                started = time.monotonic()
                try:
                    await self._run_once()
                except Exception as error:  # no process, no directory: the machine is short of something
                    log.exception("running the engine process failed")
                    if not self._settled.is_set():
                        self._error = EngineStopped(f"the engine process could not be run: {error}")
                if self._stopping or self._draining or self._error is not None:
                    return
                if not self._settled.is_set():
                    self._error = EngineStopped("the engine process died while it was loading; its output says why")
                    return
                healthy = time.monotonic() - started > HEALTHY_AFTER_S
                back_off = FIRST_BACK_OFF_S if healthy or not back_off else min(2 * back_off, LAST_BACK_OFF_S)
                why = self._status.detail if self._status.state is EngineState.DEAD else "the engine died"
                log.error("%s; starting the engine process again in %g s", why, back_off)
                self._status = EngineStatus(EngineState.DEAD, f"{why}; restarting in {back_off:g} s")
                await asyncio.sleep(back_off)
        finally:
            if not self._settled.is_set() and self._error is None:
                self._error = EngineStopped("the engine was stopped")
            self._status = EngineStatus(EngineState.DEAD, self._error.message if self._error else "stopped")
            self._settled.set()

    async def _run_once(self) -> None:
        """One engine process from start to end."""
        self._outbox = asyncio.Queue()
        self._status = EngineStatus(EngineState.LOADING, "starting the engine process")
        # Only this user may open it. A socket's path has at most 107 bytes, whatever TMPDIR is.
        parent = None if len(os.fsencode(tempfile.gettempdir())) < 70 else "/tmp"
        with tempfile.TemporaryDirectory(prefix="jaxserve-", dir=parent) as directory:
            socket = f"{directory}/engine.sock"
            process = self._process = self._begun or EngineProcess()
            self._begun = None
            ended = asyncio.create_task(_end_of(process))
            try:
                version = 0 if self._info is None else self._info.weights_version
                again = self._settled.is_set()
                launch = wire.Launch(self._options, str(self._path), self._model_name, socket, version, again)
                process.tell(wire.encode(launch))
                await self._converse(ended, socket)
            finally:
                process.kill()
                await ended
                self._channel = None

    async def _converse(self, exited: asyncio.Task[None], socket: str) -> None:
        """Reads the engine's stream until it or the process ends; what was in flight then fails."""
        # One attempt a moment, since the socket appears when the process has imported what it needs.
        options = (*wire.UNLIMITED, ("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200))
        async with grpc.aio.insecure_channel(f"unix:{socket}", options=options) as channel:
            self._channel = channel
            call = channel.stream_stream(wire.STREAM, None, None)(self._messages(), wait_for_ready=True)
            exited.add_done_callback(lambda _: call.cancel())
            try:
                async for data in call:
                    match wire.decode_from_engine(data):
                        case wire.Step(deltas):
                            self._streams.deliver(deltas)
                        case wire.Status() as status:
                            self._hear(status)
                            if status.state is EngineState.DEAD:
                                break
            except (grpc.aio.AioRpcError, asyncio.CancelledError):
                if not exited.done() and asyncio.current_task().cancelling():  # type: ignore[union-attr]
                    raise
            finally:
                self._outbox.put_nowait(None)
                if self._status.state is EngineState.READY:
                    self._status = EngineStatus(EngineState.DEAD, "the engine died")
                self._streams.fail_all(EngineStopped("the engine died while it served this request; send it again"))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(exited), 2.0)

    async def _messages(self) -> AsyncIterator[bytes]:
        outbox = self._outbox
        while (message := await outbox.get()) is not None:
            yield message

    def _hear(self, message: wire.Status) -> None:
        if message.state is EngineState.READY:
            self._info = message.info
            self._settled.set()
        if message.state is EngineState.DEAD and message.error is not None and not self._settled.is_set():
            self._error = message.error.rebuild()
        self._status = EngineStatus(message.state, message.detail)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()


async def _end_of(process: EngineProcess) -> None:
    """Returns when it has ended. A thread of its own waits for that, as long as the engine lives."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def wait() -> None:
        process.wait()
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=wait, name="end of the engine process", daemon=True).start()
    await ended.wait()
