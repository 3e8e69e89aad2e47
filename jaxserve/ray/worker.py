"""An engine in a process of its own, to which Ray hands rows of a job, many at a time. No Ray in here."""

import asyncio
import pickle
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
import pyarrow

from jaxserve import packing
from jaxserve.batch_job.answers import Answers, Result
from jaxserve.batch_job.identity import describe, describe_engine
from jaxserve.batch_job.records import Names
from jaxserve.batch_job.rows import Row
from jaxserve.config import EngineOptions
from jaxserve.errors import BatchStopped, EngineStopped, JaxserveError, Overloaded
from jaxserve.hub import resolve_model
from jaxserve.ray.placement import confine
from jaxserve.request import ErrorInfo
from jaxserve.server.generation import Generation, Work
from jaxserve.text import TextModel

BUSY_S = 0.05  # until a request that found the queue full is sent again


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a worker has to know of its job."""

    engine: EngineOptions
    name: str
    digest: str
    seed: int
    given: Mapping[str, Any]
    settings: Mapping[str, Any]
    now: datetime
    threads: int | None
    """Of an engine on CPU."""


class Answered(msgspec.Struct, frozen=True):
    """What a worker says to some rows: their results, or what ended its engine."""

    results: tuple[Result, ...] = ()
    head: Mapping[str, str] = {}
    """The store's head as this worker would begin it: what its model, code and engine are."""
    ignored: frozenset[str] = frozenset()
    error: ErrorInfo | None = None


class Worker:
    """An engine that answers tables of one cell. Several threads may call it; their rows share its batches.

    Construction loads the model. What ends the engine, then or later, is told in answer to every call.
    """

    def __init__(self, assignment: Assignment):
        confine(assignment.threads)
        self._assignment = assignment
        self._error: ErrorInfo | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="answers", daemon=True).start()
        try:
            self._call(self._open())
        except JaxserveError as error:
            self._error = ErrorInfo.of(error)

    def __call__(self, batch: Any) -> Any:
        """From a pyarrow.Table of pickled rows (a list of Row in each cell of "rows") to one of pickled Answered."""
        said = [self._call(self._answer(unpacked(cell))) for cell in batch.column("rows")]
        return pyarrow.table({"answered": pyarrow.array(map(pickle.dumps, said), pyarrow.large_binary())})

    def _call[T](self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self) -> None:
        from jaxserve.client.local import LocalEngine  # which starts JAX

        job = self._assignment
        path = await asyncio.to_thread(resolve_model, job.engine.model.model, job.engine.model.revision)
        client = LocalEngine(job.engine, path, model_name=job.name)
        await client.start()
        text = await asyncio.to_thread(TextModel.open, path, client, job.name)
        await client.wait_ready()
        self._page_size = client.info.page_size
        self._answers = Answers(text, Names(job.digest, job.seed), given=job.given, now=job.now)
        known = await asyncio.to_thread(describe, job.digest, path, job.name, job.engine, job.settings)
        self._head = known | describe_engine(client.info, job.engine)

    async def _answer(self, rows: list[Row]) -> Answered:
        if self._error is not None:
            return Answered(error=self._error)
        asked = [(row, await self._answers.read(row)) for row in rows]
        results = [one for _, one in asked if isinstance(one, Result)]
        wanted = [(row, one) for row, one in asked if not isinstance(one, Result)]
        limits = [one.params.max_tokens if isinstance(one, Generation) else 0 for _, one in wanted]
        order = packing.packed([one.prompts[0] for _, one in wanted], limits, self._page_size)
        try:
            results += await asyncio.gather(*(self._generate(*wanted[i]) for i in order))
        except EngineStopped as error:
            stopped = BatchStopped(f"{error}. What is done is safe: run the same again to go on")
            return Answered(error=ErrorInfo.of(stopped))
        return Answered(tuple(results), self._head, frozenset(self._answers.ignored))

    async def _generate(self, row: Row, work: Work[Any]) -> Result:
        while True:
            try:
                return await self._answers.generate(row, work)
            except Overloaded:
                await asyncio.sleep(BUSY_S)
            again = await self._answers.read(row)
            assert not isinstance(again, Result), "a row is refused for what it is"
            work = again


def packed(rows: list[Row]) -> Any:
    """A pyarrow.Table of one cell: so nothing between here and the worker can divide them."""
    return pyarrow.table({"rows": pyarrow.array([pickle.dumps(rows)], pyarrow.large_binary())})


def unpacked(cell: Any) -> Any:
    """What was pickled into a cell."""
    return pickle.loads(cell.as_buffer())
