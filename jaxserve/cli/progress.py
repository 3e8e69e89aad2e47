"""Shows on stderr how far a model's loading or a job's rows are: live on a terminal, plain lines elsewhere."""

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxserve.client import EngineClient, EngineState

_EVERY_S = 0.1
_PLAIN_EVERY_S = 2.0
_ROWS_EVERY_S = 10.0


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


class RowProgress:
    """How many of about `total` rows are done, tokens a second, the time that is left, and errors."""

    def __init__(self, total: int):
        console = Console(stderr=True)
        self._total = total
        self._begun = self._said = time.monotonic()
        self._before: tuple[int, int] | None = None  # rows and tokens of an earlier run
        self._bar = Progress(
            TextColumn("rows"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[rest]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, rest="")

    def __enter__(self) -> "RowProgress":
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def update(self, rows: int, failed: int, tokens: int) -> None:
        """Shows the counts, which are those of the whole job."""
        if self._before is None:
            self._before = rows, tokens
            self._bar.reset(self._task, completed=rows)  # what an earlier run did is no speed of this one
        now = time.monotonic()
        elapsed = max(now - self._begun, 1e-9)
        rest = f"{(tokens - self._before[1]) / elapsed:.0f} tokens/s, {failed} errors"
        if not self._bar.disable:
            self._bar.update(self._task, completed=rows, rest=rest)
        elif now - self._said >= _ROWS_EVERY_S:
            self._said = now
            speed = (rows - self._before[0]) / elapsed
            left = f"{max(0, self._total - rows) / speed:.0f} s left" if speed else "time left unknown"
            print(f"{rows}/{self._total} rows, {rest}, {left}", file=sys.stderr, flush=True)


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
