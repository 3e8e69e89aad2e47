"""The engine process: one engine, served to its front end over one gRPC stream on a Unix socket.

Begun as an EngineProcess (engine_process.py); ends when its front end goes away.
"""

import asyncio
import os
import signal
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NoReturn

import grpc
import msgspec

from jaxserve.client import EngineState, EngineStatus, wire
from jaxserve.client.thread import EngineThread
from jaxserve.errors import JaxserveError
from jaxserve.host_memory import keep_objects
from jaxserve.request import Delta, ErrorInfo, FinishReason, Request, Update

CONNECT_TIMEOUT_S = 30.0
MOST_UNSENT = 2**28
"""Bytes of deltas at which the engine waits for its front end to read; only captured values are ever so many."""


class Outbox:
    """Messages on their way to the front end, from any thread to the loop's; `most`: bytes of them, about."""

    def __init__(self, loop: asyncio.AbstractEventLoop, most: int = MOST_UNSENT):
        self._loop, self._most = loop, most
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._unsent, self._sent = 0, threading.Condition()

    def put(self, message: bytes, *, wait: bool = False) -> None:
        """Adds a message; with `wait` as soon as there is room for it. The loop's thread must not wait."""
        with self._sent:
            if wait:
                self._sent.wait_for(lambda: self._unsent < self._most)
            self._unsent += len(message)
        self._loop.call_soon_threadsafe(self._queue.put_nowait, message)

    async def send(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Writes one message, when there is one."""
        message = await self._queue.get()
        await write(message)
        self._queue.task_done()
        with self._sent:
            self._unsent -= len(message)
            self._sent.notify()

    async def empty(self) -> None:
        """Returns when all is written."""
        await self._queue.join()


class _Host:
    """The engine's thread on one side, the front end's stream on the other."""

    def __init__(self, launch: wire.Launch):
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox(self._loop)
        self._thread = EngineThread(
            launch.options,
            Path(launch.path),
            model_name=launch.model_name,
            deliver=self._deliver,
            changed=self._changed,
            weights_version=launch.weights_version,
            again=launch.again,
        )
        self._thread.start()
        self._updating = asyncio.Lock()  # one waits in a thread, the others need none
        self.connected = asyncio.Event()
        self.ended = asyncio.Event()

    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            wire.SERVICE,
            {
                "Stream": grpc.stream_stream_rpc_method_handler(self._stream, wire.decode_to_engine, None),
                "Metrics": grpc.unary_unary_rpc_method_handler(self._metrics, None, None),
                "Update": grpc.unary_unary_rpc_method_handler(self._update, wire.decode_update, None),
            },
        )

    async def _stream(self, messages: AsyncIterator[wire.ToEngine], context: grpc.aio.ServicerContext) -> None:
        self.connected.set()
        writer = asyncio.create_task(self._write(context))
        try:
            async for message in messages:
                match message:
                    case wire.Submit(request):
                        self._submit(request)
                    case wire.Abort(request_id):
                        self._thread.abort(request_id)
                    case wire.Stop():
                        await asyncio.to_thread(self._thread.stop)
                        await self._outbox.empty()
                        return
        finally:
            writer.cancel()
            self.ended.set()

    async def _write(self, context: grpc.aio.ServicerContext) -> None:
        while True:
            await self._outbox.send(context.write)

    def _submit(self, request: Request) -> None:
        try:
            self._thread.submit(request)
        except JaxserveError as error:
            info = ErrorInfo.of(error)
            refused = [Delta(request.id, i, finish=FinishReason.ERROR, error=info) for i in range(request.params.n)]
            self._put(wire.Step(refused))

    async def _metrics(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return self._thread.metrics_text()

    async def _update(self, update: Update, context: grpc.aio.ServicerContext) -> bytes:
        try:
            async with self._updating:
                reply = wire.UpdateReply(await asyncio.to_thread(self._thread.update, update))
        except JaxserveError as error:
            reply = wire.UpdateReply(error=ErrorInfo.of(error))
        return wire.encode(reply)

    def _deliver(self, deltas: list[Delta]) -> None:
        self._outbox.put(wire.encode(wire.Step(deltas)), wait=True)  # on the engine's thread: the loop forwards bytes

    def _changed(self, status: EngineStatus) -> None:
        info = None
        if status.state is EngineState.READY:
            info = self._thread.info
            keep_objects()
        error = self._thread.error
        self._put(wire.Status(status.state, status.detail, info, ErrorInfo.of(error) if error else None))

    def _put(self, message: wire.FromEngine) -> None:
        self._outbox.put(wire.encode(message))


async def _serve(launch: wire.Launch) -> None:
    host = _Host(launch)
    server = grpc.aio.server(options=wire.UNLIMITED)
    server.add_generic_rpc_handlers((host.handler(),))
    server.add_insecure_port(f"unix:{launch.socket}")
    await server.start()
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        await host.connected.wait()
    await host.ended.wait()
    await server.stop(grace=1.0)
    _exit(0)  # not through asyncio.run, which would wait for a thread that may be inside a compilation


def main() -> None:
    """Reads a wire.Launch from standard input and serves it until the front end is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal's Ctrl-C reaches us too; the front end decides
    told = sys.stdin.buffer.read()
    if not told:  # the front end had nothing to serve after all, or has ended
        _exit(0)
    launch = msgspec.msgpack.decode(told, type=wire.Launch)
    try:
        asyncio.run(_serve(launch))
    except TimeoutError:
        print("the front end did not connect", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    _exit(1)


def _exit(code: int) -> NoReturn:
    """Ends the process whatever XLA's threads are in the middle of."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
