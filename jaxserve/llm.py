"""The Python API: a model in this process, prompts in, finished texts out; the same engine as the server's."""

import asyncio
import operator
import os
import threading
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rich.progress

from jaxserve import captured
from jaxserve.client.local import LocalEngine
from jaxserve.config import DEFAULT_MODEL_NAME, OFFLINE_DECODE_STEPS, engine_options_of
from jaxserve.embedding import check_dimensions, finished
from jaxserve.errors import EngineStopped, InvalidParameter
from jaxserve.hub import resolve_model
from jaxserve.packing import packed
from jaxserve.request import EngineInfo, FinishReason, SamplingParams, Update, embedding_of
from jaxserve.score import ScoreOutput, encode_pair, score_output, scoring_params
from jaxserve.text import Prompt, TextModel, TokenLogprob

PACKED = 4096
"""So many prompts at a time are ordered, see packing.py."""
PROGRESS_FROM = 16
"""Shorter lists finish before a progress bar is any use."""


@dataclass
class CompletionOutput:
    """One continuation."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    """stop or length."""
    stop_reason: int | str | None = None
    """The stop string or stop_token_ids entry that ended it; None for end of sequence and length."""
    captured: dict[str, np.ndarray] = field(default_factory=dict)
    """Of each value that LLM(capture=...) asked for, [N, ...] of the N tokens of prompt and continuation that the model
    has read: all but the last one, or of max_tokens 0 all. float32 where the model computes in bfloat16."""


@dataclass
class RequestOutput:
    """A prompt and its params.n continuations."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int = 0
    weights_version: int = 0
    """How often `update_params` had been called for the weights that computed it."""


class LLM:
    """A loaded model. `options` are the fields of ModelOptions, ScheduleOptions and DeviceOptions, and `capture`.

        with LLM() as llm:
            print(llm.chat([{"role": "user", "content": "What is the capital of France?"}]).outputs[0].text)

    capture: names of values inside the model, or patterns such as "layers.*.mlp", one or a list: what they are for each
    token comes with every answer, in CompletionOutput.captured, and stays in memory with it. See taps.py.

    Raises ConfigError for an unknown option or model, CheckpointError for weights that do not fit. Any thread may
    call the methods; calls from several threads share the engine's batches.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **options: Any):
        model = None if model is None else os.fspath(model)
        # A list may be of any length: nobody else waits behind it.
        offline = {"max_queued_requests": 2**31 - 1, "decode_steps": OFFLINE_DECODE_STEPS}
        engine_options = engine_options_of(model, offline | options)
        path = resolve_model(model, engine_options.model.revision)
        name = model or DEFAULT_MODEL_NAME
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="LLM", daemon=True)
        self._thread.start()
        self.engine = LocalEngine(engine_options, path, model_name=name)
        self._closed = False
        try:
            self.text = TextModel.open(path, self.engine, name)
            self._call(self.engine.start())
            self._call(self.engine.wait_ready())
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> EngineInfo:
        """What the engine worked out: sizes, precision, memory."""
        return self.engine.info

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> Any:
        """Continues each prompt: a RequestOutput for one prompt, a list of them, in order, for a list.

        params: one for all, or one a prompt; None takes the model's own defaults. progress None shows a bar on
        stderr for long lists. Raises RequestError before anything runs if a prompt or a parameter is refused.
        """
        single = _is_one(prompts)
        many: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item, arg-type]
        texts = [p if isinstance(p, str) else None for p in many]
        ids = [self._ids(p) for p in many]
        outputs = self._run(texts, ids, self._params(params, len(ids)), progress)
        return outputs[0] if single else outputs

    def chat(
        self,
        conversations: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        **template_kwargs: Any,
    ) -> Any:
        """Answers a conversation (a list of messages), or each of a list of conversations. Otherwise as `generate`."""
        single = len(conversations) > 0 and isinstance(conversations[0], Mapping)
        many: list[Any] = [conversations] if single else list(conversations)
        ids = [self.text.encode_chat(messages, template_kwargs=template_kwargs) for messages in many]
        outputs = self._run([None] * len(ids), ids, self._params(params, len(ids)), progress)
        return outputs[0] if single else outputs

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[Prompt], *, progress: bool | None = None
    ) -> list[ScoreOutput]:
        """The log-likelihood of continuations[i] given prompts[i]: a list of ScoreOutput, in order.

        Where in their tokens the continuation begins is what `score.encode_pair` says. Continuations of one prompt
        that stand side by side compute it once, to the last full page: LLM(block_size=1) shares every token.
        Raises InvalidParameter when the lists differ in length or nothing is left to score.
        """
        if isinstance(prompts, str) or isinstance(continuations, str):
            raise InvalidParameter("prompts and continuations must be lists: give [text]", param="prompts")
        if len(prompts) != len(continuations):
            raise InvalidParameter(f"{len(prompts)} prompts and {len(continuations)} continuations", param="prompts")
        pairs = [encode_pair(self.text, p, c) for p, c in zip(prompts, continuations, strict=True)]
        params = [scoring_params(start) for _, start in pairs]
        results = self._run([None] * len(pairs), [ids for ids, _ in pairs], params, progress)
        return [
            score_output(ids, start, result.prompt_logprobs, result.num_cached_tokens)
            for result, (ids, start) in zip(results, pairs, strict=True)
        ]

    def embed(
        self, texts: Prompt | Sequence[Prompt], *, dimensions: int | None = None, progress: bool | None = None
    ) -> np.ndarray:
        """The embedding of a text, float32 [width], or of each of a list of texts [N, width].

        `dimensions` cuts them, where the model was trained for that. Raises RequestError before anything runs if a
        text is refused, or if the model is one that generates.
        """
        single = _is_one(texts)
        many: list[Prompt] = [texts] if single else list(texts)  # type: ignore[list-item, arg-type]
        info = embedding_of(self.info)
        check_dimensions(dimensions, info)
        ids = [self.text.encode_embedded(t) if isinstance(t, str) else _token_ids(t) for t in many]
        streams = [self.text.embed(i, request_id=uuid.uuid4().hex) for i in ids]
        rows = [np.empty(0, np.float32)] * len(streams)

        with _Bar(len(streams), progress) as bar:

            async def work(i: int) -> None:
                async with aclosing(streams[i]) as deltas:
                    async for delta in deltas:
                        rows[i] = finished(delta.pooled, info, dimensions)
                bar.advance(len(ids[i]))

            self._call(self._at_once(range(len(streams)), work))
        if single:
            return rows[0]
        return np.stack(rows) if rows else np.zeros((0, dimensions or info.width), np.float32)

    def update_params(self, params: Any, *, in_flight: Literal["wait", "abort"] = "wait") -> int:
        """Goes on with other weights of the same model, without compiling anything; returns their version, from 1 on.

        params: a tree of numpy or JAX arrays of any floating type, like the tree that the model file's param_specs
        describes (they are copied), or the path of a checkpoint directory or GGUF file. Both weights are in memory
        until the switch, which is between two steps. What other threads have in flight finishes first and new requests
        wait for it; with in_flight "abort" it ends with ModelChanged. Nothing that the prefix cache holds is used
        afterwards. Raises CheckpointError naming every tensor that is missing, unknown or misshapen, or ConfigError;
        everything is as it was then.
        """
        if params is None:
            raise InvalidParameter("params is None: give a tree of arrays or a checkpoint's path", param="params")
        path = str(params) if isinstance(params, str | Path) else None
        update = Update(path=path, in_flight=in_flight)
        return self._call(self.engine.update(update, params if path is None else None)).info.weights_version

    def metrics_text(self) -> str:
        """The engine's metrics in the Prometheus text format."""
        return self._call(self.engine.metrics_text()).decode()

    def close(self) -> None:
        """Ends the engine and frees its memory. May be called again."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _finish(self) -> None:
        await self.engine.stop()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:  # calls of other threads: their requests have failed by now, and they still have to say so
            await asyncio.wait(others, timeout=5.0)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _call[T](self, work: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            work.close()
            raise EngineStopped("this LLM is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # a Ctrl-C here aborts the requests there
            raise

    def _params(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if params is None:
            params = self.text.defaults
        if isinstance(params, SamplingParams):
            return [params] * count
        if not isinstance(params, Sequence) or not all(isinstance(one, SamplingParams) for one in params):
            raise InvalidParameter("params must be SamplingParams, or a list of them", param="params")
        if len(params) != count:
            raise InvalidParameter(f"{count} prompts and {len(params)} sampling parameters", param="params")
        return list(params)

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Text through the tokenizer; ids of any integer type as they are."""
        return self.text.encode_prompt(prompt) if isinstance(prompt, str) else _token_ids(prompt)

    def _run(
        self,
        texts: list[str | None],
        ids: list[tuple[int, ...]],
        params: list[SamplingParams],
        progress: bool | None,
    ) -> list[RequestOutput]:
        with _Bar(len(ids), progress) as bar:
            return self._call(self._gather(texts, ids, params, bar))

    async def _gather(
        self,
        texts: list[str | None],
        ids: list[tuple[int, ...]],
        params: list[SamplingParams],
        bar: "_Bar",
    ) -> list[RequestOutput]:
        outputs: list[RequestOutput | None] = [None] * len(ids)
        streams = [self.text.generate(i, p, request_id=uuid.uuid4().hex) for i, p in zip(ids, params, strict=True)]
        limits, size = [p.max_tokens for p in params], self.info.page_size
        cuts = (slice(start, start + PACKED) for start in range(0, len(ids), PACKED))
        order = [cut.start + i for cut in cuts for i in packed(ids[cut], limits[cut], size)]

        async def work(i: int) -> None:
            output = RequestOutput(texts[i], list(ids[i]), [CompletionOutput(k) for k in range(params[i].n)])
            values: list[list[tuple[bytes, ...]]] = [[] for _ in output.outputs]
            async with aclosing(streams[i]) as deltas:
                async for delta in deltas:
                    _add(output, delta)
                    if delta.captured is not None:
                        values[delta.index].append(delta.captured)
            for part, pieces in zip(output.outputs, values, strict=True):
                part.captured = {
                    tap.name: captured.values(tap, b"".join(piece))
                    for tap, piece in zip(self.info.taps, zip(*pieces, strict=True), strict=False)
                }
            outputs[i] = output
            bar.advance(sum(len(o.token_ids) for o in output.outputs))

        await self._at_once(order, work)
        return [o for o in outputs if o is not None]

    async def _at_once(self, order: Sequence[int], work: Callable[[int], Coroutine[Any, Any, None]]) -> None:
        """work(i) in this order, no more at once than keep the engine busy; the first error ends the others."""
        left = iter(order)

        async def worker() -> None:
            for i in left:  # shared: each worker takes the next that is left
                await work(i)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(order), 2 * self.info.max_num_seqs)):
                    group.create_task(worker())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None


class _Bar:
    """A progress bar of requests on stderr; `show` None: for long lists."""

    def __init__(self, count: int, show: bool | None):
        self._bar = rich.progress.Progress(
            "[progress.description]{task.description}",
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            "{task.fields[rate]}",
            console=rich.console.Console(stderr=True),
            disable=not (count >= PROGRESS_FROM if show is None else show),
        )
        self._task, self._tokens = self._bar.add_task("requests", total=count, rate=""), 0

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def advance(self, tokens: int) -> None:
        """One more request has ended, which took `tokens`."""
        self._tokens += tokens
        elapsed = self._bar.tasks[0].elapsed or 0.0
        self._bar.update(self._task, advance=1, rate=f"{self._tokens / elapsed:.0f} tokens/s" if elapsed else "")


def _is_one(prompts: Any) -> bool:
    """Whether it is one prompt, a text or token ids, and no list of them."""
    if isinstance(prompts, str):
        return True
    return len(prompts) > 0 and np.ndim(prompts[0]) == 0 and hasattr(prompts[0], "__index__")


def _token_ids(prompt: Any) -> tuple[int, ...]:
    """Token ids of any integer type. Raises InvalidParameter."""
    try:
        return tuple(map(operator.index, prompt))
    except TypeError:
        raise InvalidParameter(
            f"a prompt must be a text or a sequence of token ids, got {prompt!r:.80}", param="prompts"
        ) from None


def _add(output: RequestOutput, delta: Any) -> None:
    part = output.outputs[delta.index]
    part.text += delta.text
    part.token_ids += delta.token_ids
    if delta.logprobs is not None:
        part.logprobs = (part.logprobs or []) + list(delta.logprobs)
    if delta.prompt_logprobs is not None:
        output.prompt_logprobs = list(delta.prompt_logprobs)
    if delta.weights_version is not None:
        output.weights_version = delta.weights_version
    if delta.num_cached_tokens is not None and delta.index == 0:
        output.num_cached_tokens = delta.num_cached_tokens
    if delta.finish is not None:
        part.finish_reason = FinishReason(delta.finish).value
        part.stop_reason = delta.stop_reason
