"""Requests in flight as seen from an event loop: each one's deltas, and who still waits for them."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable

from jaxserve.errors import EngineStopped, JaxserveError
from jaxserve.request import Delta, Request


class _Stream:
    """The deltas of one request that have arrived and not been read, and the task that waits for more."""

    def __init__(self, sequences: int):
        self.deltas: deque[Delta] = deque()
        self.error: JaxserveError | None = None
        self.unfinished = sequences
        self._waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class Streams:
    """Hands an engine's deltas to the generators that read them. Belongs to one event loop."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    async def read(
        self, request: Request, submit: Callable[[Request], None], abort: Callable[[str], None]
    ) -> AsyncGenerator[Delta]:
        """Submits a request and yields its deltas until all its sequences have finished; aborts it if left early.

        Raises the error that the engine answered with.
        """
        if request.id in self._streams:
            raise EngineStopped(f"request id {request.id} is in flight already")
        stream = self._streams[request.id] = _Stream(request.params.n)
        self._empty.clear()
        try:
            submit(request)
            while stream.unfinished:
                while not stream.deltas:
                    if stream.error is not None:
                        raise stream.error
                    await stream.wait()
                delta = stream.deltas.popleft()
                if delta.error is not None:
                    stream.unfinished = 0  # the engine ends all sequences of a request with the same error
                    raise delta.error.rebuild()
                stream.unfinished -= delta.finish is not None
                yield delta
        finally:
            del self._streams[request.id]
            if stream.unfinished and stream.error is None:
                abort(request.id)
            if not self._streams:
                self._empty.set()

    def deliver(self, deltas: list[Delta]) -> None:
        """Deltas of a step; those that nobody reads any more are dropped."""
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream is not None:
                stream.deltas.append(delta)
                stream.wake()

    def fail_all(self, error: JaxserveError) -> None:
        """Ends every stream with an error, after what it has not read yet."""
        for stream in self._streams.values():
            if stream.error is None:
                stream.error = error
                stream.wake()

    async def empty(self, timeout_s: float) -> bool:
        """Waits until nothing is in flight; False if that took too long."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
