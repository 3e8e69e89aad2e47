"""Shows on stderr how far an engine has come until it is ready: one live line on a terminal, plain lines elsewhere."""

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import AsyncIterator

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


async def _watch(client: EngineClient) -> None:
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("starting the engine") as line:
            while client.status.state is not EngineState.READY:
                line.update(client.status.detail or "starting the engine")
                await asyncio.sleep(_EVERY_S)
        return
    shown, shown_at = "", 0.0
    while client.status.state is not EngineState.READY:
        detail = client.status.detail
        # A new kind of work is said at once, a new figure of the same kind now and then.
        same_kind = _kind(detail) == _kind(shown)
        if detail and detail != shown and (not same_kind or time.monotonic() - shown_at >= _PLAIN_EVERY_S):
            print(detail, file=sys.stderr, flush=True)
            shown, shown_at = detail, time.monotonic()
        await asyncio.sleep(_EVERY_S)


def _kind(detail: str) -> str:
    return re.sub(r"[\d.,]+", "#", detail)
