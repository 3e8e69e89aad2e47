"""The loop of a job: reads a little ahead, keeps the engine's queue filled, and hands each result to the store."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxserve.batch_job.answers import Answers, Result
from jaxserve.batch_job.captures import Captures
from jaxserve.batch_job.rows import CustomIds, Row
from jaxserve.batch_job.store import SYNC_S, Store
from jaxserve.client import EngineState
from jaxserve.errors import BatchStopped, EngineStopped, Overloaded
from jaxserve.packing import packed
from jaxserve.server.generation import Generation, Work
from jaxserve.text import TextModel

AT_ONCE = 2
"""Rows in work for each sequence that the engine computes at once: enough to keep its queue filled."""
CHUNK_ROWS, CHUNK_BYTES = 512, 8 * 2**20
"""Rows are read so many at a time, and sent in an order in which they pack well."""
WINDOW = 16_384
"""How many rows after the first unfinished one may be begun: what a slow row may have waiting behind it."""
MAX_DEATHS = 3
DEAD_S = 90.0


class _Asked(NamedTuple):
    """A row, and what it asks of the model."""

    row: Row
    work: Work[Any]


class Job:
    """Rows through a model into a store, each that the store does not have. `rows` must be those of every run.

    max_errors: how many failed rows there may be. captures: where the model's inner values go, if it brings them. Look
    at `in_flight`, `ignored` and the store's counts at any time.
    """

    def __init__(
        self,
        rows: Iterator[Row],
        model: TextModel,
        answers: Answers,
        store: Store,
        *,
        max_errors: int | None = None,
        captures: Captures | None = None,
    ):
        self.in_flight = 0
        self.stopping = False
        self._rows, self._model, self._answers, self._store = rows, model, answers, store
        self._max_errors, self._captures = max_errors, captures
        self._ids = CustomIds()
        self._ready: deque[_Asked] = deque()
        self._read = 0  # rows
        self._exhausted = False
        self._reading, self._waking, self._writing = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()
        self._moved = asyncio.Event()  # the store has another result, or the job stops
        self._deaths = 0

    async def run(self) -> bool:
        """Works until every row has its result, or `stop` was called; whether it is the former.

        Raises BatchStopped when max_errors, the disk or the engine end it, ConfigError for an input that has become
        unreadable. Cancelling it aborts the rows in flight.
        """
        check_errors(self._store, self._max_errors)
        with contextlib.closing(self._ids):
            try:
                async with asyncio.TaskGroup() as group:
                    syncing = group.create_task(self._keep_synced())
                    at_once = AT_ONCE * self._model.client.info.max_num_seqs
                    await asyncio.gather(*(group.create_task(self._work()) for _ in range(at_once)))
                    syncing.cancel()
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        complete = self._exhausted and not self._ready and self._store.rows == self._read
        if complete and self._captures is not None:
            await self._write(self._captures, last=True)
            self._captures.finish()
        return complete

    @property
    def ignored(self) -> set[str]:
        """Fields of bodies that nothing here knows."""
        return self._answers.ignored

    def stop(self) -> str:
        """Begins no further row; says what becomes of those in flight."""
        self.stopping = True
        self._moved.set()
        return f"finishing {self.in_flight} rows in flight; once more stops at once"

    async def _keep_synced(self) -> None:
        while True:
            await asyncio.sleep(SYNC_S)
            await asyncio.to_thread(self._store.sync)

    async def _work(self) -> None:
        while (asked := await self._next()) is not None:
            self.in_flight += 1
            try:
                await self._answer(asked)
            finally:
                self.in_flight -= 1

    async def _next(self) -> _Asked | None:
        async with self._reading:
            while not self._ready and not self._exhausted and not self.stopping:
                await self._read_chunk()
            return self._ready.popleft() if self._ready and not self.stopping else None

    async def _read_chunk(self) -> None:
        """Reads and translates the next rows that have no result yet, and orders them; see packing.py."""
        found: list[_Asked] = []
        size = 0
        while len(found) < CHUNK_ROWS and size < CHUNK_BYTES and not self.stopping:
            if self._read - self._store.rows >= WINDOW:
                if found:
                    break
                self._moved.clear()
                await self._moved.wait()
                continue
            row = next(self._rows, None)
            if row is None:
                self._exhausted = True
                break
            self._read += 1
            if self._read % 32 == 0:
                await asyncio.sleep(0)  # answers are coming in
            row = self._ids.checked(row)
            if row.number in self._store:
                continue
            size += len(row.body)
            asked = await self._answers.read(row)
            if isinstance(asked, Result):
                self._add(asked)
            else:
                found.append(_Asked(row, asked))
        prompts = [asked.work.prompts[0] for asked in found]
        works = (asked.work for asked in found)
        limits = [work.params.max_tokens if isinstance(work, Generation) else 0 for work in works]
        order = packed(prompts, limits, self._model.client.info.page_size)
        self._ready.extend(found[i] for i in order)

    async def _answer(self, asked: _Asked) -> None:
        """Has a row answered; again, if the engine dies meanwhile."""
        row, work = asked
        while True:
            recording = None if self._captures is None else self._captures.record(row, work.prompts)
            try:
                result = await self._answers.generate(row, work, None if recording is None else recording.add)
                break
            except (EngineStopped, Overloaded) as error:
                stopped = error
            if recording is not None:
                recording.drop()
            await self._wait_for_engine(stopped)
            again = await self._answers.read(row)  # a reply takes in each delta once
            assert not isinstance(again, Result), "a row is refused for what it is"
            work = again
        if result.failure is None:
            self._deaths = 0
        if self._captures is None or recording is None:
            self._add(result)
            return
        if result.failure is None:
            self._captures.answered(row.number, await asyncio.to_thread(recording.finish))
        else:
            recording.drop()
        self._add(result)
        await self._write(self._captures)

    async def _write(self, captures: Captures, *, last: bool = False) -> None:
        """Writes the files of captured values that are due."""
        async with self._writing:
            while captures.due(self._store.rows, last=last):
                await asyncio.to_thread(self._store.sync)  # whose rows are in a file must be known ever after
                await asyncio.to_thread(captures.write)

    async def _wait_for_engine(self, error: Exception) -> None:
        """Returns when the engine takes requests again. Raises BatchStopped if it stays away, or dies over and over."""
        await asyncio.sleep(0.05)
        client = self._model.client
        async with self._waking:
            if client.status.state is EngineState.READY:
                return
            self._deaths += 1
            if self._deaths >= MAX_DEATHS:
                raise BatchStopped(
                    f"the engine died {self._deaths} times and finished no row in between ({error}); its output says "
                    "why. What is done is safe: run the same again to go on"
                )
            clock = asyncio.get_running_loop().time
            dead_since = clock()
            while (status := client.status).state is not EngineState.READY:
                if status.state is not EngineState.DEAD:
                    dead_since = clock()
                elif clock() - dead_since > DEAD_S:
                    raise BatchStopped(f"{status.detail}. What is done is safe: run the same again to go on")
                await asyncio.sleep(0.1)

    def _add(self, result: Result) -> None:
        try:
            add(self._store, result, self._max_errors)
        finally:
            self._moved.set()


def add(store: Store, result: Result, max_errors: int | None) -> None:
    """Puts a result into the store. Raises BatchStopped if more rows than max_errors have failed by now."""
    failed = result.failure is not None
    store.add(result.number, result.record, failed=failed, tokens=result.tokens)
    if failed:
        check_errors(store, max_errors, f"; the last was {result.failure}")


def check_errors(store: Store, max_errors: int | None, last: str = "") -> None:
    """Raises BatchStopped if more rows than max_errors have failed. `last` says which was the last."""
    if max_errors is not None and store.failed > max_errors:
        raise BatchStopped(
            f"{store.failed} rows have failed, more than --max-errors {max_errors}{last}. What is done is safe: run "
            "the same with a larger --max-errors to go on"
        )
