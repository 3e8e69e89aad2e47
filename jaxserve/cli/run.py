"""`jaxserve run`: one prompt, or a conversation at the terminal, with a model in this process."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from jaxserve.cli import options as cli
from jaxserve.cli.opening import opened
from jaxserve.config import ModelOptions, ScheduleOptions
from jaxserve.errors import ConfigError, InvalidParameter, JaxserveError, PromptTooLong, UnsupportedParameter
from jaxserve.request import SamplingParams
from jaxserve.text import TextModel

HELP = """\
/set parameter NAME VALUE   change a sampling parameter (temperature, top_p, top_k, seed, max_tokens, stop, ...)
/set system TEXT            set the system message
/show                       the model, the parameters and the conversation so far
/clear                      forget the conversation
/bye                        leave (also Ctrl-D)
/help                       this
\"\"\"                         begins and ends a message of several lines
Ctrl-C                      stops the answer"""

# What people type who come from Ollama.
OTHER_NAMES = {"num_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}

# Sampling parameters that a conversation has no use for.
NOT_HERE = ("n", "logprobs", "prompt_logprobs", "prompt_logprobs_from")


@dataclass(frozen=True)
class Timing:
    """The durations of one answer, in seconds, and its tokens."""

    total_s: float
    load_s: float
    prompt_s: float
    prompt_tokens: int
    cached_tokens: int
    tokens: int

    def table(self) -> str:
        """Ollama's lines."""
        eval_s = self.total_s - self.prompt_s
        cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        rows = {
            "total duration": _duration(self.load_s + self.total_s),
            "load duration": _duration(self.load_s),
            "prompt eval count": f"{self.prompt_tokens} token(s){cached}",
            "prompt eval duration": _duration(self.prompt_s),
            "prompt eval rate": _rate(self.prompt_tokens, self.prompt_s),
            "eval count": f"{self.tokens} token(s)",
            "eval duration": _duration(eval_s),
            "eval rate": _rate(self.tokens, eval_s),
        }
        return "\n".join(f"{name + ':':<22}{value}" for name, value in rows.items())


def _duration(seconds: float) -> str:
    return f"{seconds:.3f}s" if seconds >= 1 else f"{seconds * 1e3:.3f}ms"


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.2f} tokens/s" if seconds > 0 else "-"


def run(
    *words: str,
    prompt: Annotated[str | None, Parameter(alias="-p")] = None,
    system: str | None = None,
    verbose: bool = False,
    config: cli.ConfigFile = None,
    models: cli.ModelsByFlag = ModelOptions(),
    sampling: cli.Sampling = cli.SamplingFlags(),
    schedule: cli.Schedule = ScheduleOptions(),
    device: cli.LazyDevice = cli.LazyDeviceFlags(),
) -> int:
    """Answer one prompt, or talk with a model at the terminal: `jaxserve run [MODEL] [PROMPT]`.

    Without a prompt, there or piped in, a conversation begins.

    Parameters
    ----------
    words
        MODEL as `jaxserve serve` takes it, and PROMPT. A single word is the prompt if it has spaces in it, or if
        --model, JAXSERVE_MODEL or the file names the model; but what lies here under that name is a model.
    prompt
        What to answer, instead of PROMPT.
    system
        System message.
    verbose
        Print the timing of each answer on stderr.
    config
        TOML file with any of these settings, flat or in the sections [model], [schedule], [device].
    """
    model, prompt = which(words, prompt, models.model)
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().rstrip("\n")
    engine = cli.engine_options(model, models, schedule, device)
    begun = time.monotonic()
    with asyncio.Runner() as loop:
        stack = contextlib.AsyncExitStack()
        text = loop.run(stack.enter_async_context(opened(engine, cli.model_name(model))))
        try:
            talk = Talk(text, sampling.params(text.defaults), system, load_s=time.monotonic() - begun)
            if prompt is not None:
                loop.run(talk.say(prompt, verbose))
            else:
                converse(talk, loop, verbose)
        finally:
            loop.run(stack.aclose())
    return 0


def which(words: Sequence[str], prompt: str | None, model: str | None) -> tuple[str | None, str | None]:
    """(model, prompt) of the words and the two flags. Raises ConfigError for more words than that."""
    if len(words) + (prompt is not None) > 2:
        raise ConfigError("run takes MODEL and one PROMPT; put a prompt of several words into quotes")
    match words:
        case [word] if (
            prompt is None and not Path(word).exists() and (model is not None or any(map(str.isspace, word)))
        ):
            return model, word
        case [word]:
            return word, prompt
        case [named, said]:
            return named, said
    return model, prompt


@dataclass
class Talk:
    """A conversation with a model: what was said, and how the next answer is sampled."""

    text: TextModel
    params: SamplingParams
    system: str | None = None
    load_s: float = 0.0
    turns: list[dict[str, str]] = field(default_factory=list)
    answers: int = 0

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as the chat template takes it."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]

    async def say(self, prompt: str, verbose: bool = False) -> str:
        """Streams the answer to stdout and remembers it; what was said is forgotten when there is no answer.

        A model without a chat template continues the prompt instead.
        """
        chat = self.text.template is not None
        if self.system and not chat:
            raise UnsupportedParameter(
                "this model has no chat template, so it takes no system message; leave it out", param="system"
            )
        self.turns.append({"role": "user", "content": prompt})
        pieces: list[str] = []
        try:
            ids = self.text.encode_chat(self.messages) if chat else self.text.encode_prompt(prompt)
            timing = await self._stream(ids, pieces)
        finally:
            if pieces:
                self.turns.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.turns.pop()
            print(flush=True)
        if verbose:
            print(f"\n{timing.table()}", file=sys.stderr, flush=True)
        return "".join(pieces)

    async def _stream(self, ids: tuple[int, ...], pieces: list[str]) -> Timing:
        self.answers += 1
        load_s, self.load_s = self.load_s, 0.0  # loading counts once
        begun = time.monotonic()
        first: float | None = None
        tokens = cached = 0
        async with contextlib.aclosing(
            self.text.generate(ids, self.params, request_id=f"run-{self.answers}")
        ) as deltas:
            async for delta in deltas:
                if delta.token_ids and first is None:
                    first = time.monotonic()
                tokens += len(delta.token_ids)
                cached = delta.num_cached_tokens or cached
                if delta.text:
                    pieces.append(delta.text)
                    print(delta.text, end="", flush=True)
        ended = time.monotonic()
        return Timing(ended - begun, load_s, (first or ended) - begun, len(ids), cached, tokens)

    def set(self, name: str, value: str) -> None:
        """Changes a sampling parameter by name. Raises JaxserveError or msgspec.DecodeError."""
        name = OTHER_NAMES.get(name, name)
        types = {f.name: f.type for f in msgspec.structs.fields(SamplingParams) if f.name not in NOT_HERE}
        if name not in types:
            raise UnsupportedParameter(f"no parameter {name!r}; there are {', '.join(types)}", param=name)
        parsed: Any = value
        if name == "stop":
            parsed = (value,)
        elif value[:1] in "[{":
            parsed = msgspec.json.decode(value)
        elif value.lower() in ("none", "null"):
            parsed = None
        try:
            converted = msgspec.convert(parsed, types[name], strict=False)
        except msgspec.ValidationError as error:
            raise InvalidParameter(f"{name} is wrong: {error}", param=name) from error
        self.params = msgspec.structs.replace(self.params, **{name: converted})

    def show(self) -> str:
        """The model, the parameters and the conversation, as text."""
        info = self.text.client.info
        lines = [
            f"model        {self.text.name}: {info.architecture}, {info.num_params / 1e6:.1f} M parameters, "
            f"{info.dtype}, context {info.max_model_len} tokens",
            "parameters   " + msgspec.json.encode(self.params).decode(),
        ]
        return "\n".join([*lines, *(f"{m['role']:<12} {m['content']}" for m in self.messages)])


def converse(talk: Talk, loop: asyncio.Runner, verbose: bool) -> None:
    """Reads messages and commands until /bye or the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` a history and line editing)
    print(f"{talk.text.name}: type a message, or /help", file=sys.stderr)
    while True:
        try:
            line = read_message()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\nUse /bye or Ctrl-D to leave.", file=sys.stderr)
            continue
        if line.strip() == "/bye":
            return
        try:
            if line.startswith("/"):
                print(command(talk, line.strip()), flush=True)
            elif line.strip():
                loop.run(talk.say(line, verbose))
        except KeyboardInterrupt:
            print("(stopped)", file=sys.stderr)
        except PromptTooLong as e:
            print(f"{e} /clear forgets the conversation.", file=sys.stderr)
        except (JaxserveError, msgspec.MsgspecError) as e:
            print(f"error: {e}", file=sys.stderr)


def read_message() -> str:
    '''A line, or the lines between two """. Raises EOFError at the end of input.'''
    line = input(">>> ")
    if not line.startswith('"""'):
        return line
    lines = [line[3:]]
    while not lines[-1].endswith('"""'):
        lines.append(input("... "))
    lines[-1] = lines[-1][:-3]
    return "\n".join(lines).strip("\n")


def command(talk: Talk, line: str) -> str:
    """Carries out a line that begins with a slash; what to tell the user."""
    match line.split(maxsplit=3):
        case ["/help" | "/?"]:
            return HELP
        case ["/clear"]:
            talk.turns.clear()
            return "Forgot the conversation."
        case ["/show"]:
            return talk.show()
        case ["/set", "parameter", name, value]:
            talk.set(name, value)
            return f"Set parameter {name} to {value}."
        case ["/set", "system", *words] if words:
            talk.system = line.split(maxsplit=2)[2]
            return "Set the system message."
        case ["/set", *_]:
            return "/set wants more: /set parameter NAME VALUE, or /set system TEXT."
        case _:
            return f"Unknown command {line!r}; /help lists them."
