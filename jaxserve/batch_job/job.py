"""The loop of a job: reads a little ahead, keeps the engine's queue filled, and hands each result to the store."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from jaxserve.batch_job.records import Names, answered, refused
from jaxserve.batch_job.rows import CHAT, COMPLETIONS, EMBEDDINGS, SCORE, CustomIds, Row
from jaxserve.batch_job.store import SYNC_S, Store
from jaxserve.client import EngineState
from jaxserve.errors import (
    BatchStopped,
    EngineStopped,
    InvalidParameter,
    Overloaded,
    RequestError,
    UnsupportedParameter,
)
from jaxserve.packing import packed
from jaxserve.server.embeddings import read_embeddings, read_score
from jaxserve.server.generation import (
    Collecting,
    Generation,
    Work,
    read_chat,
    read_completion,
    system_fingerprint,
)
from jaxserve.server.openai import check_model
from jaxserve.server.replies import Head
from jaxserve.server.wire import (
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    ModelBody,
    SamplingBody,
    ScoreBody,
    parse_body,
)
from jaxserve.text import TextModel

AT_ONCE = 2
"""Rows in work for each sequence that the engine computes at once: enough to keep its queue filled."""
CHUNK_ROWS, CHUNK_BYTES = 512, 8 * 2**20
"""Rows are read so many at a time, and sent in an order in which they pack well."""
WINDOW = 16_384
"""How many rows after the first unfinished one may be begun: what a slow row may have waiting behind it."""
CREATED = 0  # the clock would make each run of a job another
MAX_DEATHS = 3
DEAD_S = 90.0

_KINDS: dict[str, tuple[type[ModelBody], str]] = {
    CHAT: (ChatBody, "chatcmpl"),
    COMPLETIONS: (CompletionBody, "cmpl"),
    EMBEDDINGS: (EmbeddingBody, "embd"),
    SCORE: (ScoreBody, "score"),
}
"""The body that a url takes, and how the ids of its answers begin."""

_log = logging.getLogger("jaxserve.batch")


class _Asked(NamedTuple):
    """A row, and what it asks of the model."""

    row: Row
    work: Work[Any]


class Job:
    """Rows through a model into a store, each that the store does not have. `rows` must be those of every run.

    given: fields for bodies that lack them. now: what chat templates take for the time. max_errors: how many failed
    rows there may be. Look at `in_flight`, `ignored` (fields of bodies that nothing here knows) and the store's counts
    at any time.
    """

    def __init__(
        self,
        rows: Iterator[Row],
        model: TextModel,
        store: Store,
        names: Names,
        *,
        given: Mapping[str, Any],
        now: datetime,
        max_errors: int | None = None,
    ):
        self.in_flight = 0
        self.ignored: set[str] = set()
        self.stopping = False
        self._rows, self._model, self._store, self._names = rows, model, store, names
        self._given, self._now, self._max_errors = given, now, max_errors
        self._fingerprint = system_fingerprint(model.client.info)
        self._ids = CustomIds()
        self._ready: deque[_Asked] = deque()
        self._read = 0  # rows
        self._exhausted = False
        self._reading, self._waking = asyncio.Lock(), asyncio.Lock()
        self._moved = asyncio.Event()  # the store has another result, or the job stops
        self._deaths = 0

    async def run(self) -> bool:
        """Works until every row has its result, or `stop` was called; whether it is the former.

        Raises BatchStopped when max_errors, the disk or the engine end it, ConfigError for an input that has become
        unreadable. Cancelling it aborts the rows in flight.
        """
        self._check_errors("")
        with contextlib.closing(self._ids):
            try:
                async with asyncio.TaskGroup() as group:
                    syncing = group.create_task(self._keep_synced())
                    at_once = AT_ONCE * self._model.client.info.max_num_seqs
                    await asyncio.gather(*(group.create_task(self._work()) for _ in range(at_once)))
                    syncing.cancel()
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return self._exhausted and not self._ready and self._store.rows == self._read

    def stop(self) -> None:
        """Begins no further row; those in flight are finished."""
        self.stopping = True
        self._moved.set()

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
            first = self._ids.first(row)
            if row.number in self._store:
                continue
            size += len(row.body)
            if row.error is not None:
                self._fail(row, row.error, asked=False)
            elif first is not None:
                error = InvalidParameter(f"custom_id {row.custom_id!r} was used before, in {first}", param="custom_id")
                self._fail(row, error, asked=False)
            elif (work := await self._translated(row)) is not None:
                found.append(_Asked(row, work))
        prompts = [asked.work.prompts[0] for asked in found]
        works = (asked.work for asked in found)
        limits = [work.params.max_tokens if isinstance(work, Generation) else 0 for work in works]
        order = packed(prompts, limits, self._model.client.info.page_size)
        self._ready.extend(found[i] for i in order)

    async def _translated(self, row: Row) -> Work[Any] | None:
        """What a row asks of the model; None if that is refused, which is its result then."""
        if row.url not in _KINDS:
            error = UnsupportedParameter(
                f"url {row.url[:100]!r} is not served in a batch; served are {', '.join(_KINDS)}", param="url"
            )
            self._fail(row, error, asked=False)
            return None
        try:
            kind, prefix = _KINDS[row.url]
            body, ignored = parse_body(row.body, kind)
            check_model(body.model, self._model.name)
            _check_offline(body)
            if len(self.ignored) < 100:
                self.ignored.update(ignored)
            name = f"{prefix}-{body.request_id or self._names.id(row)}"
            return await self._read_body(body, Head(name, CREATED, self._model.name, self._fingerprint))
        except Exception as error:
            self._fail(row, error, asked=True)
            return None

    async def _read_body(self, body: ModelBody, head: Head) -> Work[Any]:
        if isinstance(body, EmbeddingBody):
            return await read_embeddings(body, self._model, head)
        if isinstance(body, ScoreBody):
            return await read_score(body, self._model, head)
        assert isinstance(body, SamplingBody)
        self._fill(body)
        generation: Generation
        if isinstance(body, ChatBody):
            variables = {"strftime_now": self._now.strftime}
            body.chat_template_kwargs = variables | (body.chat_template_kwargs or {})
            generation = await read_chat(body, self._model, head)
        else:
            assert isinstance(body, CompletionBody)
            generation = await read_completion(body, self._model, head)
        reply = generation.reply
        reply.options = msgspec.structs.replace(reply.options, cached_tokens=False)
        return generation

    def _fill(self, body: SamplingBody) -> None:
        for name, value in self._given.items():
            limited = name == "max_tokens" and getattr(body, "max_completion_tokens", None) is not None
            if getattr(body, name) is None and not limited:
                setattr(body, name, value)

    async def _answer(self, asked: _Asked) -> None:
        """Has a row answered; again, if the engine dies meanwhile."""
        row, work = asked
        while True:
            try:
                await self._compute(row, work)
                break
            except (EngineStopped, Overloaded) as error:
                stopped = error
            except Exception as error:
                self._fail(row, error, asked=True)
                return
            await self._wait_for_engine(stopped)
            again = await self._translated(row)  # a reply takes in each delta once
            assert again is not None, "a row is refused for what it is"
            work = again
        reply = work.reply
        self._deaths = 0
        self._add(row, answered(row, self._names.id(row), reply.body()), failed=False, tokens=reply.completion_tokens)

    async def _compute[Delta](self, row: Row, work: Work[Delta]) -> None:
        sources = work.start(self._model, str(row.number), lambda i: self._names.seed(row, i))
        if len(sources) == 1:
            await _collect(0, sources[0], work.reply)
        else:
            turns = asyncio.Semaphore(self._model.client.info.max_num_seqs)
            try:
                async with asyncio.TaskGroup() as group:
                    for i, source in enumerate(sources):
                        group.create_task(_collect(i, source, work.reply, turns))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        assert work.reply.complete, "the engine ended a request without finishing all of its sequences"

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

    def _fail(self, row: Row, error: Exception, *, asked: bool) -> None:
        if not isinstance(error, RequestError):
            _log.error("%s failed", row.place, exc_info=error)
        self._add(row, refused(row, self._names.id(row), error, asked=asked), failed=True, tokens=0)
        self._check_errors(f"; the last was {row.place}: {error}")

    def _check_errors(self, last: str) -> None:
        if self._max_errors is not None and self._store.failed > self._max_errors:
            raise BatchStopped(
                f"{self._store.failed} rows have failed, more than --max-errors {self._max_errors}{last}. What is done "
                "is safe: run the same with a larger --max-errors to go on"
            )

    def _add(self, row: Row, record: bytes, *, failed: bool, tokens: int) -> None:
        self._store.add(row.number, record, failed=failed, tokens=tokens)
        self._moved.set()


async def _collect[Delta](
    prompt: int, source: AsyncGenerator[Delta], reply: Collecting[Delta], turns: asyncio.Semaphore | None = None
) -> None:
    async with turns or contextlib.nullcontext(), contextlib.aclosing(source):
        async for delta in source:
            reply.add(prompt, delta)


def _check_offline(body: ModelBody) -> None:
    """Raises UnsupportedParameter for what has no meaning in a file, or another one each time."""
    if isinstance(body, SamplingBody) and body.stream:
        raise UnsupportedParameter("stream is not served in a batch: leave it out", param="stream")
    if body.timeout is not None:
        raise UnsupportedParameter(
            "timeout is not served in a batch, whose rows must come out the same at every speed: leave it out",
            param="timeout",
        )
