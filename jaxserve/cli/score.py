"""`jaxserve score`: a JSONL file of continuations, labels or choices in, their log-likelihoods out, in order."""

import asyncio
import contextlib
import itertools
import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import msgspec
from cyclopts import Group, Parameter

from jaxserve.cli import options as cli
from jaxserve.cli.opening import opened, run
from jaxserve.cli.streams import STANDARD, open_streams, refuse_same, said
from jaxserve.cli.token_table import TokenTable
from jaxserve.config import DeviceOptions, ScheduleOptions
from jaxserve.errors import InvalidParameter, JaxserveError
from jaxserve.request import ErrorInfo
from jaxserve.score import ScoreOutput, choose, encode_pair, score
from jaxserve.text import Prompt, TextModel

AHEAD = 2
"""Requests in work at once, for each sequence that the engine computes at once: enough to keep its queue filled."""

_CONTEXTS = ("context", "prompt", "question")
_OPTIONS = ("choices", "labels")


@dataclass(frozen=True, kw_only=True)
class DeviceFlags(DeviceOptions):
    """DeviceOptions for prompts that differ in their last words."""

    block_size: int = 1
    """Tokens in a page of the KV cache. What begins alike is computed once up to a full page: with 1, to the token.
    Each step sends --max-num-seqs times --max-model-len / --block-size page numbers: give 16 for very long contexts."""


class Score(msgspec.Struct):
    """One continuation: natural logarithms."""

    text: str
    logprob: float
    num_tokens: int
    is_greedy: bool


class Answer(msgspec.Struct, omit_defaults=True):
    """One line of output: the row's line in the input, and what was found or what is wrong with it."""

    line: int
    id: Any = None
    logprob: float | None = None
    num_tokens: int | None = None
    is_greedy: bool | None = None
    scores: list[Score] | None = None
    best: int | None = None
    best_bytes: int | None = None
    best_tokens: int | None = None
    answer: int | None = None
    error: dict[str, Any] | None = None


@dataclass(frozen=True)
class Row:
    """One line of the input, or what is wrong with it. `line` counts from 1, as editors do."""

    line: int
    id: Any = None
    context: Prompt = ""
    continuations: Sequence[Prompt] = ()
    choosing: bool = False
    """The continuations are alternatives."""
    answer: int | None = None
    """Which of them is right."""
    error: JaxserveError | None = None


@dataclass
class Totals:
    """What is said at the end."""

    rows: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    scored_tokens: int = 0
    answered: int = 0
    right: dict[str, int] = field(default_factory=lambda: {"acc": 0, "acc_bytes": 0, "acc_tokens": 0})

    def add(self, answer: Answer, outputs: Sequence[ScoreOutput]) -> None:
        self.rows += 1
        self.failed += answer.error is not None
        for output in outputs:
            self.prompt_tokens += output.context_tokens + len(output.token_ids)
            self.computed_tokens += output.context_tokens + len(output.token_ids) - 1 - output.num_cached_tokens
            self.scored_tokens += len(output.token_ids)
        if answer.answer is not None and answer.error is None:
            self.answered += 1
            for name, best in zip(self.right, (answer.best, answer.best_bytes, answer.best_tokens), strict=True):
                self.right[name] += best == answer.answer

    def lines(self) -> Iterator[str]:
        yield f"rows        {self.rows}, of which {self.failed} failed"
        yield f"tokens      {self.prompt_tokens}, of which {self.computed_tokens} computed, {self.scored_tokens} scored"
        for name, right in self.right.items() if self.answered else ():
            share = right / self.answered
            error = math.sqrt(share * (1 - share) / max(1, self.answered - 1))
            yield f"{name:<12}{share:.4f} +/- {error:.4f}"


def score_file(
    input: Path,
    output: Path,
    *,
    model: cli.Model = None,
    logprobs: Path | None = None,
    delimiter: str = "",
    config: cli.ConfigFile = None,
    models: cli.Models = cli.ModelFlags(),
    schedule: cli.Schedule = ScheduleOptions(),
    device: Annotated[DeviceFlags, Parameter(name="*", group=Group("Device", sort_key=3))] = DeviceFlags(),
) -> int:
    """Write the log-likelihood of given continuations; JSON lines in, JSON lines in the same order out.

    A row is {"context", "continuation"}, or a "context", "prompt" or "question" with a list of "labels" or "choices",
    and perhaps an "answer": the right one, by its index or its text. Of several, the likeliest is named as it is, by
    byte of its text and by token; where there are answers, the shares of right ones are printed. An "id" is passed on,
    other keys are ignored. A row that cannot be scored gives a line with an error; the exit code is 1 if there was one.

    Where a continuation begins is decided as in lm-evaluation-harness: white space at the end of the context goes to
    the continuation, both are encoded as one text, and what exceeds the number of the context's own tokens is scored.

    Parameters
    ----------
    input
        JSONL file; - is standard input.
    output
        JSONL file to write; - is standard output.
    model
        Local directory (safetensors or Orbax), GGUF file or Hugging Face id; without it the embedded model scores.
    logprobs
        Parquet file to write, too: one row for each scored token. Needs pyarrow.
    delimiter
        Put between a context and each of its labels or choices; lm-evaluation-harness has " " there.
    config
        TOML file with any of these settings, flat or in the sections [model], [schedule], [device].
    """
    engine = cli.engine_options(model, models, schedule, device)

    async def work() -> Totals:
        async with opened(engine, cli.model_name(model)) as text:
            return await score_all(text, read_rows(lines, delimiter), out, table, most=schedule.max_queued_requests)

    with contextlib.ExitStack() as files:
        if logprobs is not None:
            refuse_same(input, logprobs)
        lines, out = open_streams(files, input, output)
        with said():
            table = files.enter_context(TokenTable(logprobs)) if logprobs else None
        totals = run(work())
    for line in totals.lines():
        print(line, file=sys.stderr if output == STANDARD else sys.stdout)
    return 1 if totals.failed else 0


def read_rows(lines: Iterable[bytes], delimiter: str = "") -> Iterator[Row]:
    """The rows of a file; empty lines are passed over. A line that cannot be read becomes a Row with an error."""
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        identity = None
        try:
            fields = msgspec.json.decode(raw, type=dict[str, Any])
            identity = fields.get("id")
            yield _row(number, fields, delimiter)
        except msgspec.MsgspecError as e:
            yield Row(number, error=InvalidParameter(f"line {number} is not a JSON object: {e}"))
        except InvalidParameter as e:
            yield Row(number, identity, error=InvalidParameter(f"line {number}: {e.message}", param=e.param))


def _row(number: int, fields: dict[str, Any], delimiter: str) -> Row:
    """Raises InvalidParameter, naming the key."""
    context = _prompt(_only(fields, _CONTEXTS), fields)
    kind = _only(fields, ("continuation", *_OPTIONS))
    if kind == "continuation":
        return Row(number, fields.get("id"), context, [_prompt(kind, fields)])
    options = fields[kind]
    if not (isinstance(options, list) and options and all(isinstance(o, str) for o in options)):
        raise InvalidParameter(f'"{kind}" must be a list of strings, at least one', param=kind)
    answer = fields.get("answer")
    if isinstance(answer, str) and answer in options:
        answer = options.index(answer)
    if answer is not None and not (type(answer) is int and 0 <= answer < len(options)):
        raise InvalidParameter(f'"answer" must be one of "{kind}", or its index from 0; got {answer!r}', param="answer")
    if isinstance(context, str):
        context += delimiter
    elif delimiter:
        raise InvalidParameter("a context of token ids takes no --delimiter", param="context")
    return Row(number, fields.get("id"), context, options, True, answer)


def _only(fields: dict[str, Any], names: Sequence[str]) -> str:
    """The one of the names that the row has."""
    found = [name for name in names if name in fields]
    if len(found) != 1:
        said = " and ".join(f'"{name}"' for name in found) or "none"
        raise InvalidParameter(f"one of {', '.join(f'"{n}"' for n in names)} is needed, got {said}", param=names[0])
    return found[0]


def _prompt(name: str, fields: dict[str, Any]) -> Prompt:
    value = fields[name]
    if isinstance(value, str) or (isinstance(value, list) and all(type(i) is int for i in value)):
        return value
    raise InvalidParameter(f'"{name}" must be a string or a list of token ids', param=name)


async def score_all(
    text: TextModel, rows: Iterable[Row], out: IO[bytes], table: TokenTable | None = None, *, most: int = 1024
) -> Totals:
    """Writes an Answer a line for each row, in order, each as soon as those before it are done.

    Keeps the engine's queue filled, with no more than `most` requests, and reads no further ahead than that.
    """
    ahead = min(AHEAD * text.client.info.max_num_seqs, most)
    turns = asyncio.Semaphore(ahead)  # gives way in the order of asking: continuations of one context stay together
    totals = Totals()
    pending: deque[asyncio.Task[tuple[Answer, list[ScoreOutput]]]] = deque()
    source = iter(rows)
    try:
        while True:
            for row in itertools.islice(source, ahead - len(pending)):
                pending.append(asyncio.create_task(_answer(text, row, turns)))
            if not pending:
                return totals
            answer, outputs = await pending[0]
            pending.popleft()
            totals.add(answer, outputs)
            out.write(msgspec.json.encode(answer) + b"\n")
            out.flush()
            if table is not None:
                for i, output in enumerate(outputs):
                    table.add(answer.line, i, output, text.tokenizer)
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def _answer(text: TextModel, row: Row, turns: asyncio.Semaphore) -> tuple[Answer, list[ScoreOutput]]:
    answer = Answer(row.line, row.id)

    async def one(i: int, continuation: Prompt) -> ScoreOutput:
        async with turns:
            ids, start = encode_pair(text, row.context, continuation)
            return await score(text, ids, start, request_id=f"line-{row.line}-{i}")

    try:
        if row.error is not None:
            raise row.error
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(i, c)) for i, c in enumerate(row.continuations)]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
    except JaxserveError as e:
        info = ErrorInfo.of(e)
        named = f"line {row.line}"
        message = info.message if info.message.startswith(named) else f"{named}: {info.message}"
        answer.error = {"type": info.kind, "message": message, "param": info.param}
        return answer, []
    outputs = [task.result() for task in tasks]
    if not row.choosing:
        (output,) = outputs
        answer.logprob, answer.num_tokens, answer.is_greedy = output.logprob, len(output.token_ids), output.is_greedy
        return answer, outputs
    options = [str(option) for option in row.continuations]
    answer.scores = [
        Score(option, output.logprob, len(output.token_ids), output.is_greedy)
        for option, output in zip(options, outputs, strict=True)
    ]
    answer.best, answer.best_bytes, answer.best_tokens = choose(outputs, options)
    answer.answer = row.answer
    return answer, outputs
