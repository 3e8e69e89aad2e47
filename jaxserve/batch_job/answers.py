"""A row through a model: what it asks, and the record of what the HTTP server would answer. No order, no disk."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from jaxserve.batch_job.records import Names, answered, refused
from jaxserve.batch_job.rows import CHAT, COMPLETIONS, EMBEDDINGS, SCORE, Row
from jaxserve.errors import BatchStopped, EngineStopped, Overloaded, RequestError, UnsupportedParameter
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

CREATED = 0  # the clock would make each run of a job another

_KINDS: dict[str, tuple[type[ModelBody], str]] = {
    CHAT: (ChatBody, "chatcmpl"),
    COMPLETIONS: (CompletionBody, "cmpl"),
    EMBEDDINGS: (EmbeddingBody, "embd"),
    SCORE: (ScoreBody, "score"),
}
"""The body that a url takes, and how the ids of its answers begin."""

_log = logging.getLogger("jaxserve.batch")


class Result(msgspec.Struct, frozen=True, array_like=True):
    """What became of row `number`: its line of output, and of a row that failed in words where and why."""

    number: int
    record: bytes
    tokens: int = 0
    failure: str | None = None


class Answers:
    """Answers rows with a model that is ready. The same row gets the same record, whoever answers it and when.

    given: fields for bodies that lack them. now: what chat templates take for the time. `ignored` are the fields of
    bodies that nothing here knows, the first hundred of them.
    """

    def __init__(self, model: TextModel, names: Names, *, given: Mapping[str, Any], now: datetime):
        self.ignored: set[str] = set()
        self._model, self._names, self._given, self._now = model, names, given, now
        self._fingerprint = system_fingerprint(model.client.info)

    def refused(self, row: Row, error: Exception, *, asked: bool) -> Result:
        """A row that failed; `asked` if the server would have been asked at all."""
        if not isinstance(error, RequestError):
            _log.error("%s failed", row.place, exc_info=error)
        record = refused(row, self._names.id(row), error, asked=asked)
        return Result(row.number, record, failure=f"{row.place}: {error}")

    async def read(self, row: Row) -> Work[Any] | Result:
        """What a row asks of the model; or its result, if that is refused."""
        if row.error is not None:
            return self.refused(row, row.error, asked=False)
        if row.url not in _KINDS:
            error = UnsupportedParameter(
                f"url {row.url[:100]!r} is not served in a batch; served are {', '.join(_KINDS)}", param="url"
            )
            return self.refused(row, error, asked=False)
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
            return self.refused(row, error, asked=True)

    async def generate(self, row: Row, work: Work[Any], also: Callable[[int, Any], None] | None = None) -> Result:
        """The result of a row that was read; `also` gets each delta, after the number of its prompt.

        Raises EngineStopped and Overloaded: then read it anew and try again; BatchStopped if `also` does.
        """
        try:
            await self._generate(row, work, also)
        except (BatchStopped, EngineStopped, Overloaded):
            raise
        except Exception as error:
            return self.refused(row, error, asked=True)
        reply = work.reply
        return Result(row.number, answered(row, self._names.id(row), reply.body()), reply.completion_tokens)

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

    async def _generate[Delta](self, row: Row, work: Work[Delta], also: Callable[[int, Delta], None] | None) -> None:
        sources = work.start(self._model, str(row.number), lambda i: self._names.seed(row, i))
        if len(sources) == 1:
            await _collect(0, sources[0], work.reply, also)
        else:
            turns = asyncio.Semaphore(self._model.client.info.max_num_seqs)
            try:
                async with asyncio.TaskGroup() as group:
                    for i, source in enumerate(sources):
                        group.create_task(_collect(i, source, work.reply, also, turns))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        assert work.reply.complete, "the engine ended a request without finishing all of its sequences"


async def _collect[Delta](
    prompt: int,
    source: AsyncGenerator[Delta],
    reply: Collecting[Delta],
    also: Callable[[int, Delta], None] | None,
    turns: asyncio.Semaphore | None = None,
) -> None:
    async with turns or contextlib.nullcontext(), contextlib.aclosing(source):
        async for delta in source:
            reply.add(prompt, delta)
            if also is not None:
                also(prompt, delta)


def _check_offline(body: ModelBody) -> None:
    """Raises UnsupportedParameter for what has no meaning in a file, or another one each time."""
    if isinstance(body, SamplingBody) and body.stream:
        raise UnsupportedParameter("stream is not served in a batch: leave it out", param="stream")
    if body.timeout is not None:
        raise UnsupportedParameter(
            "timeout is not served in a batch, whose rows must come out the same at every speed: leave it out",
            param="timeout",
        )
