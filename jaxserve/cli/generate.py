"""`jaxserve generate`: a file of prompts in, a JSONL file of answers out, in order, as they finish."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import msgspec
from cyclopts import Parameter, validators

from jaxserve.cli import options as cli
from jaxserve.cli.opening import opened, run
from jaxserve.cli.streams import STANDARD, open_streams
from jaxserve.config import DeviceOptions
from jaxserve.errors import InvalidParameter, JaxserveError, UnsupportedParameter
from jaxserve.request import MAX_N, ErrorInfo, SamplingParams
from jaxserve.text import TextModel

# Records in work at once, for each sequence that the engine computes at once: enough to keep its queue filled.
AHEAD = 2

_SAMPLING = {f.name: f.type for f in msgspec.structs.fields(SamplingParams)}
_NOT_HERE = ("prompt_logprobs", "prompt_logprobs_from", "logprobs")


class Choice(msgspec.Struct):
    """One continuation."""

    index: int
    text: str = ""
    finish_reason: str = ""
    completion_tokens: int = 0


class Answer(msgspec.Struct, omit_defaults=True):
    """One line of output: the record's place in the input, and its choices or its error."""

    line: int
    id: Any = None
    prompt: str | None = None
    messages: Any = None
    choices: list[Choice] = []
    prompt_tokens: int = 0
    error: dict[str, Any] | None = None


@dataclass(frozen=True)
class Record:
    """One prompt of the input, or what is wrong with its line. `line` counts from 1, as editors do."""

    line: int
    id: Any = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    sampling: dict[str, Any] | None = None
    error: JaxserveError | None = None


def generate(
    input: Path,
    model: cli.Model = None,
    *,
    output: Annotated[Path, Parameter(alias="-o", show_default=False)] = STANDARD,
    raw: bool = False,
    n: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=MAX_N))] = 1,
    config: cli.ConfigFile = None,
    models: cli.Models = cli.ModelFlags(),
    sampling: cli.Sampling = cli.SamplingFlags(),
    schedule: cli.OfflineSchedule = cli.OfflineScheduleFlags(),
    device: cli.Device = DeviceOptions(),
) -> int:
    """Answer a file of prompts; the answers are JSON lines in the order of the prompts.

    A .jsonl file has one object a line: {"prompt": ...} or {"messages": [...]}, with an "id" and sampling parameters
    of its own if wanted. In any other file each line is a prompt. A bad line gives a line with an error; the exit
    code is 1 if there was one.

    Parameters
    ----------
    input
        File of prompts; - is standard input.
    model
        Local directory (safetensors or Orbax), GGUF file or Hugging Face id; without it the embedded model answers.
    output
        File to write; without it the answers go to standard output.
    raw
        Continue each prompt as it is. Otherwise it is a user's message, if the model has a chat template.
    n
        Continuations of each prompt.
    config
        TOML file with any of these settings, flat or in the sections [model], [schedule], [device].
    """
    engine = cli.engine_options(model, models, schedule, device)

    async def work() -> int:
        async with opened(engine, cli.model_name(model)) as text:
            params = msgspec.structs.replace(sampling.params(text.defaults), n=n)
            return await answer_all(text, params, read_records(lines, jsonl), out, raw=raw)

    with contextlib.ExitStack() as files:
        lines, out = open_streams(files, input, output)
        jsonl = input.suffix == ".jsonl"
        failed = run(work())
    if failed:
        print(f"{failed} records failed; their lines carry an error", file=sys.stderr)
    return 1 if failed else 0


def read_records(lines: Iterable[bytes], jsonl: bool) -> Iterator[Record]:
    """The prompts of a file; empty lines are passed over. A line that cannot be read becomes a Record with an error."""
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            yield _read_json(number, raw) if jsonl else Record(number, prompt=raw.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError as e:
            yield Record(number, error=InvalidParameter(f"line {number} is not UTF-8: {e.reason}"))
        except msgspec.MsgspecError as e:
            yield Record(number, error=InvalidParameter(f"line {number} is not a JSON object: {e}"))


def _read_json(number: int, raw: bytes) -> Record:
    fields = msgspec.json.decode(raw, type=dict[str, Any])
    identity = fields.pop("id", None)
    prompt, messages = fields.pop("prompt", None), fields.pop("messages", None)
    error: JaxserveError | None = None
    if (prompt is None) == (messages is None):
        error = InvalidParameter(f'line {number} needs either "prompt" or "messages"', param="prompt")
    elif prompt is not None and not isinstance(prompt, str):
        error = InvalidParameter(f'line {number}: "prompt" must be a string', param="prompt")
    elif messages is not None and not (isinstance(messages, list) and all(isinstance(m, dict) for m in messages)):
        error = InvalidParameter(f'line {number}: "messages" must be a list of objects', param="messages")
    elif unknown := [name for name in fields if name not in _SAMPLING or name in _NOT_HERE]:
        error = UnsupportedParameter(
            f"line {number}: unknown key {unknown[0]!r}; known are id, prompt, messages, "
            + ", ".join(name for name in _SAMPLING if name not in _NOT_HERE),
            param=unknown[0],
        )
    if error is not None:
        return Record(number, identity, error=error)
    return Record(number, identity, prompt, messages, fields)


async def answer_all(
    text: TextModel, params: SamplingParams, records: Iterable[Record], out: IO[bytes], *, raw: bool = False
) -> int:
    """Writes an Answer a line for each record, in order, each as soon as those before it are done.

    Keeps the engine's queue filled and reads no further ahead than that. Returns how many records failed.
    """
    ahead = AHEAD * text.client.info.max_num_seqs
    failed = 0
    pending: list[asyncio.Task[Answer]] = []
    source = iter(records)
    try:
        while True:
            while len(pending) < ahead and (record := next(source, None)) is not None:
                pending.append(asyncio.create_task(_answer(text, params, record, raw)))
            if not pending:
                return failed
            answer = await pending.pop(0)
            failed += answer.error is not None
            out.write(msgspec.json.encode(answer) + b"\n")
            out.flush()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def _answer(text: TextModel, params: SamplingParams, record: Record, raw: bool) -> Answer:
    answer = Answer(record.line, record.id, record.prompt, record.messages)
    try:
        if record.error is not None:
            raise record.error
        if record.sampling:
            merged = msgspec.structs.asdict(params) | record.sampling
            params = msgspec.convert(merged, SamplingParams)
        messages = record.messages
        if messages is None and text.template is not None and not raw:
            messages = [{"role": "user", "content": record.prompt}]
        if messages is not None:
            ids = text.encode_chat(messages)
        else:
            ids = text.encode_prompt(record.prompt or "")
        choices = [Choice(i) for i in range(params.n)]
        stream: AsyncIterator[Any] = text.generate(ids, params, request_id=f"line-{record.line}")
        async for delta in stream:
            choice = choices[delta.index]
            choice.text += delta.text
            choice.completion_tokens += len(delta.token_ids)
            if delta.finish is not None:
                choice.finish_reason = delta.finish.value
        answer.prompt_tokens = len(ids)
        answer.choices = choices
    except JaxserveError as e:
        info = ErrorInfo.of(e)
        answer.error = {"type": info.kind, "message": info.message, "param": info.param}
    except msgspec.ValidationError as e:
        answer.error = {"type": "InvalidParameter", "message": f"line {record.line}: {e}", "param": None}
    return answer
