"""Shows on stderr how far a model has come until it is ready: one live line on a terminal, plain lines elsewhere."""

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator

from rich.console import Console

from jaxserve.client import EngineClient, EngineState

_EVERY_S = 0.1
_PLAIN_EVERY_S = 2.0


@contextlib.asynccontextmanager
async def progress(client: EngineClient) -> AsyncIterator[None]:
    """Shows `client.status` while the body runs; the body waits for the engine."""
    watcher = asyncio.create_task(_watch(client))
    try:
        yield
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher


@contextlib.contextmanager
def reporting() -> Iterator[Callable[[str], None]]:
    """Shows what the body calls it with; for work in this process that has no engine to watch."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _PlainLines().show
        return
    with console.status("loading") as line:
        yield line.update


async def _watch(client: EngineClient) -> None:
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("starting the engine") as line:
            while client.status.state is not EngineState.READY:
                line.update(client.status.detail or "starting the engine")
                await asyncio.sleep(_EVERY_S)
        return
    lines = _PlainLines()
    while client.status.state is not EngineState.READY:
        lines.show(client.status.detail)
        await asyncio.sleep(_EVERY_S)


class _PlainLines:
    """A new kind of work is said at once, a new figure of the same kind now and then."""

    def __init__(self) -> None:
        self._shown, self._at = "", 0.0

    def show(self, detail: str) -> None:
        same_kind = _kind(detail) == _kind(self._shown)
        if detail and detail != self._shown and (not same_kind or time.monotonic() - self._at >= _PLAIN_EVERY_S):
            print(detail, file=sys.stderr, flush=True)
            self._shown, self._at = detail, time.monotonic()


def _kind(detail: str) -> str:
    return re.sub(r"[\d.,]+", "#", detail)
