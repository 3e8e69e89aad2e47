"""Everything that can happen while an answer is under way, in the order it happened, in one mailbox."""

import asyncio
import enum
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

Receive = Callable[[], Awaitable[Any]]


class Signal(enum.Enum):
    """DISCONNECTED: the client is gone. TICK: the time that `tick_after` was given has passed."""

    DISCONNECTED = enum.auto()
    TICK = enum.auto()


@dataclass(slots=True, frozen=True)
class Ended:
    """The deltas of prompt number `prompt` have ended; `error` says why if not because all was said."""

    prompt: int
    error: Exception | None = None


type Event[Delta] = tuple[int, Delta] | Ended | Signal


class Mailbox[Delta]:
    """Events from several producers to one consumer, which takes all that have come at once."""

    def __init__(self) -> None:
        self._events: list[Event[Delta]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def put(self, event: Event[Delta]) -> None:
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Event[Delta]]:
        """Waits until there is an event, and takes all there are."""
        if not self._events:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._events = self._events, []
        return events

    def tick_after(self, seconds: float) -> None:
        """Puts one TICK after so many seconds, in place of one asked for before."""
        self.stop_ticking()
        self._timer = self._loop.call_later(seconds, self.put, Signal.TICK)

    def stop_ticking(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


@asynccontextmanager
async def under_way[Delta](
    sources: Sequence[AsyncGenerator[Delta]], receive: Receive, at_once: int
) -> AsyncIterator[Mailbox[Delta]]:
    """A mailbox of what the sources yield (`at_once` of them at a time) and of the client's hanging up.

    Leaving the context closes every source, which aborts its work in the engine.
    """
    mailbox = Mailbox[Delta]()
    turns = asyncio.Semaphore(at_once)
    tasks = [asyncio.create_task(_pump(i, source, mailbox, turns)) for i, source in enumerate(sources)]
    tasks.append(asyncio.create_task(_watch(receive, mailbox)))
    try:
        yield mailbox
    finally:
        mailbox.stop_ticking()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump[Delta](
    prompt: int, source: AsyncGenerator[Delta], mailbox: Mailbox[Delta], turns: asyncio.Semaphore
) -> None:
    async with turns, aclosing(source):
        try:
            async for delta in source:
                mailbox.put((prompt, delta))
        except Exception as error:
            mailbox.put(Ended(prompt, error))
        else:
            mailbox.put(Ended(prompt))


async def _watch[Delta](receive: Receive, mailbox: Mailbox[Delta]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    mailbox.put(Signal.DISCONNECTED)
