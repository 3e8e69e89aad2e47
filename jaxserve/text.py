"""Text in, text out: the one binding of a tokenizer, a chat template and an engine client."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec

from jaxserve.chat import ChatTemplate, load_chat_template
from jaxserve.client import EngineClient
from jaxserve.errors import ConfigError, InvalidParameter, PromptTooLong, UnsupportedParameter
from jaxserve.host_memory import give_back
from jaxserve.metrics import FrontMetrics
from jaxserve.request import EMBED, Delta, FinishReason, Logprobs, Request, SamplingParams, check_request
from jaxserve.tokenizer import Detokenizer, StopStrings, Tokenizer, load_tokenizer, read_gguf, text_gguf
from jaxserve.tokenizer.base import read_json

# generation_config.json's names and ours; as in vLLM the rest of that file, do_sample too, changes nothing.
_DEFAULTS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}

SLOW_TO_ENCODE_CHARS = 16_384
"""A longer text is tokenised in a thread, so that other streams go on."""
_CHARS_A_TOKEN = 8  # more than those of nearly any text that fits

# What a request may not set as a variable of the template.
_NOT_VARIABLES = frozenset(
    {"self", "tokenizer", "messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"}
)


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token, its text and bytes, its log-probability and rank (1: most likely).

    `top` holds the best ids, best first, each with an empty `top`; the token itself only if it is one of them.
    `token` has U+FFFD where the token is a part of a character; `bytes` are exact.
    """

    token_id: int
    token: str
    bytes: bytes
    logprob: float
    rank: int
    top: tuple["TokenLogprob", ...] = ()


class TextDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What was added to continuation `index` of a request.

    `text` may be empty while characters or the beginning of a stop string are held back; the texts of an index
    join to its whole text. token_ids end with the id that ended the sequence, or that completed a stop string.
    finish is set on the last delta of an index, and stop_reason to the stop string or the stop_token_ids entry
    behind it (None for EOS and length). prompt_logprobs come with the first delta of index 0.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    num_cached_tokens: int | None = None
    finish: FinishReason | None = None
    stop_reason: int | str | None = None
    weights_version: int | None = None
    """On the first delta of an index; see EngineInfo."""
    captured: tuple[bytes, ...] | None = None
    """As in Delta."""


class PooledDelta(msgspec.Struct, frozen=True, kw_only=True):
    """All that comes of a text that is embedded: its pooled hidden state, which embedding.finished takes."""

    pooled: bytes
    num_cached_tokens: int
    weights_version: int


type Prompt = str | Sequence[int]
"""Text, or token ids."""


@dataclass
class TextModel:
    """A served model as text sees it."""

    client: EngineClient
    tokenizer: Tokenizer
    template: ChatTemplate | None
    name: str
    defaults: SamplingParams
    """What a request that does not say gets: generation_config.json, or a .gguf file's general.sampling keys, over
    SamplingParams' own defaults, and max_tokens None (up to the end of the context) unless there is max_new_tokens."""
    eos_token_ids: tuple[int, ...]
    metrics: FrontMetrics | None = None

    @classmethod
    def open(cls, path: Path, client: EngineClient, name: str) -> "TextModel":
        """Reads tokenizer, chat template and generation defaults of a checkpoint directory or .gguf file.

        Raises ConfigError, and CheckpointError for a broken .gguf file.
        """
        tokenizer, template, generation, source = _described(path)
        give_back()  # a large vocabulary in pieces
        eos = generation.get("eos_token_id")
        eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if any(not isinstance(i, int) for i in eos_ids):
            raise ConfigError(f"{path}: eos_token_id must be an id or a list of ids, got {eos!r}")
        given = {ours: generation[key] for key, ours in _DEFAULTS.items() if generation.get(key) is not None}
        try:
            defaults = msgspec.convert({"max_tokens": None, **given}, SamplingParams)
        except (msgspec.ValidationError, InvalidParameter) as error:
            raise ConfigError(f"{source}: {error}") from error
        return cls(
            client=client,
            tokenizer=tokenizer,
            template=template,
            name=name,
            defaults=defaults,
            eos_token_ids=tuple(dict.fromkeys([*tokenizer.eos_token_ids, *eos_ids])),
        )

    def encode_prompt(self, prompt: str, *, parse_special: bool = True) -> tuple[int, ...]:
        """The ids of a raw prompt, with bos where the model wants one.

        A raw prompt is the model's whole input, so the text of a control token is that token, as in vLLM and
        llama.cpp; parse_special=False for text that comes from somebody else. Any thread may call this.
        """
        return tuple(self.tokenizer.encode(prompt, parse_special=parse_special))

    def check_length(self, text: str, param: str) -> None:
        """Raises PromptTooLong for a text of which a beginning has twice the tokens that there is room for.

        All of a few megabytes take a core for seconds, and much memory; this says no for less. A text's tokens are
        those of its parts but for a few, so none is refused that would fit. Any thread may call this.
        """
        most = self.client.info.max_model_len
        chars = max(SLOW_TO_ENCODE_CHARS, _CHARS_A_TOKEN * most)
        while chars < len(text):
            count = len(self.tokenizer.encode(text[:chars], add_special_tokens=False))
            if count > 2 * most:
                raise PromptTooLong(
                    f"This model's maximum context length is {most} tokens. However, the first {chars} of the "
                    f"{len(text)} characters are {count} tokens alone. Please shorten the prompt.",
                    param=param,
                )
            chars *= 4

    def encode_embedded(self, text: str, longest: int | None = None) -> tuple[int, ...]:
        """The ids of a text to embed, with all that the model wants around it. Any thread may call this.

        Of more than `longest` ids the last ones of the text itself are left out. Raises InvalidParameter for an empty
        text, or where what is around it leaves no room.
        """
        if not text:
            raise InvalidParameter("the text is empty: there is nothing to embed", param="input")
        info = self.client.info.embedding
        if info is not None:
            text = info.prompt + (text.lower() if info.lower else text)
        ids = self.encode_prompt(text)
        if longest is None or len(ids) <= longest:
            return ids
        bare = tuple(self.tokenizer.encode(text, add_special_tokens=False, parse_special=True))
        before = next((k for k in range(len(ids)) if ids[k : k + len(bare)] == bare), 0)
        kept = longest - (len(ids) - len(bare))
        if kept < 1:
            raise InvalidParameter(
                f"{longest} tokens leave no room for the text: the model wants {len(ids) - len(bare)} of its own",
                param="truncate_prompt_tokens",
            )
        return ids[: before + kept] + ids[before + len(bare) :]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """The ids of a conversation; the text of a control token inside it is just text. Any thread may call this.

        Raises UnsupportedParameter for a model without a chat template, InvalidParameter for messages it refuses.
        """
        if self.template is None:
            raise UnsupportedParameter(
                f"model {self.name} has no chat template; use completions, or give it one: chat_template.jinja in its "
                "directory, tokenizer.chat_template in a .gguf file",
                param="messages",
            )
        variables = dict(template_kwargs or {})
        if taken := sorted(_NOT_VARIABLES & variables.keys()):
            raise InvalidParameter(
                f"chat_template_kwargs may not hold {taken[0]}; leave it out", param="chat_template_kwargs"
            )
        ids = self.template.encode(
            self.tokenizer,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **variables,
        )
        return tuple(ids)

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        timeout_s: float | None = None,
        cache_salt: str = "",
    ) -> AsyncGenerator[TextDelta, None]:
        """The text of params.n continuations as it comes, until each has ended; closing the generator aborts.

        Raises at once what check_request refuses, and EngineStopped while the engine loads for the first time;
        while iterated, what EngineClient.generate raises. A stop string ends its continuation; the engine is told
        once all have ended, and what it still sends for one that has is dropped.
        """
        arrival = time.monotonic()
        info = self.client.info
        request = Request(
            id=request_id,
            prompt_token_ids=tuple(prompt_token_ids),
            params=params,
            eos_token_ids=tuple(i for i in self.eos_token_ids if i < info.vocab_size),
            priority=priority,
            timeout_s=timeout_s,
            cache_salt=cache_salt,
        )
        check_request(request, info)
        return self._deltas(request, arrival)

    def embed(
        self,
        prompt_token_ids: Sequence[int],
        *,
        request_id: str,
        priority: int = 0,
        timeout_s: float | None = None,
        cache_salt: str = "",
    ) -> AsyncGenerator[PooledDelta, None]:
        """One PooledDelta of a prompt. Raises as `generate` does; so is it closed."""
        arrival = time.monotonic()
        request = Request(
            id=request_id,
            prompt_token_ids=tuple(prompt_token_ids),
            params=EMBED,
            priority=priority,
            timeout_s=timeout_s,
            cache_salt=cache_salt,
            embed=True,
        )
        check_request(request, self.client.info)
        return self._pooled(request, arrival)

    async def _pooled(self, request: Request, arrival: float) -> AsyncGenerator[PooledDelta, None]:
        timer = self.metrics.track(arrival) if self.metrics is not None else None
        outcome = "error"
        try:
            generator = cast(AsyncGenerator[Delta, None], self.client.generate(request))
            async with aclosing(generator) as deltas:
                async for delta in deltas:
                    assert delta.embedding is not None, "a model that gives embeddings gives nothing else"
                    outcome = "stop"
                    yield PooledDelta(
                        pooled=delta.embedding,
                        num_cached_tokens=delta.num_cached_tokens or 0,
                        weights_version=delta.weights_version or 0,
                    )
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "abort" if outcome == "error" else outcome
            raise
        except BaseException:
            outcome = "error"
            raise
        finally:
            if timer is not None:
                timer.finish(outcome, len(request.prompt_token_ids), [0])

    async def _deltas(self, request: Request, arrival: float) -> AsyncGenerator[TextDelta, None]:
        sequences = [_Sequence(self.tokenizer, request) for _ in range(request.params.n)]
        prompt_tokens, running = len(request.prompt_token_ids), len(sequences)
        timer = self.metrics.track(arrival) if self.metrics is not None else None
        outcome = "error"
        try:
            generator = cast(AsyncGenerator[Delta, None], self.client.generate(request))
            async with aclosing(generator) as deltas:
                async for delta in deltas:
                    sequence = sequences[delta.index]
                    if sequence.ended:
                        continue
                    text_delta = sequence.push(delta)
                    if timer is not None and text_delta.token_ids:
                        timer.tokens(len(text_delta.token_ids))
                    if text_delta.finish is not None:
                        running -= 1
                        outcome = text_delta.finish.value
                    if not running:
                        # Before the last delta goes out: whoever takes it may never come back.
                        if timer is not None:
                            timer.finish(outcome, prompt_tokens, [s.tokens for s in sequences])
                            timer = None
                        if any(s.cut_short for s in sequences):
                            await deltas.aclose()
                    yield text_delta
            assert not running, "the engine ended a request before its sequences"
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "abort"
            raise
        except BaseException:
            outcome = "error"
            raise
        finally:
            if timer is not None:
                timer.finish(outcome, prompt_tokens, [s.tokens for s in sequences])


def has_chat_template(path: Path) -> bool:
    """Whether a model has one. Raises what TextModel.open raises for its tokenizer and template."""
    return _described(path)[1] is not None


def _described(path: Path) -> tuple[Tokenizer, ChatTemplate | None, dict[str, Any], Path]:
    """A checkpoint's tokenizer, its template, what its generation_config.json says or would say, and where that is."""
    if (file := text_gguf(path)) is not None:
        text = read_gguf(file)
        try:
            template = ChatTemplate(text.templates, text.named) if text.templates else None
        except ConfigError as error:
            raise ConfigError(f"{file}: {error.message}") from error
        return text.tokenizer, template, text.generation, file
    source = path / "generation_config.json"
    generation = read_json(source)
    if "eos_token_id" not in generation:
        generation["eos_token_id"] = read_json(path / "config.json").get("eos_token_id")
    return load_tokenizer(path), load_chat_template(path), generation, source


class _Sequence:
    """One continuation: its text so far held back, its stop strings, its end."""

    def __init__(self, tokenizer: Tokenizer, request: Request):
        self.ended = False
        self.cut_short = False
        """Ended here, by a stop string, while the engine goes on."""
        self._tokenizer = tokenizer
        self._request = request
        self._text = Detokenizer(
            tokenizer,
            skip_special_tokens=request.params.skip_special_tokens,
            prompt_tail=request.prompt_token_ids,
        )
        self._stop = StopStrings(request.params.stop, request.params.include_stop_str_in_output)
        self.tokens = 0

    def push(self, delta: Delta) -> TextDelta:
        params = self._request.params
        ids, finish = delta.token_ids, delta.finish
        stop_reason: int | str | None = None
        if finish is FinishReason.STOP and (
            params.ignore_eos or delta.stop_token_id not in self._request.eos_token_ids
        ):
            stop_reason = delta.stop_token_id
        shown = len(ids)
        if delta.stop_token_id is not None and not params.include_stop_str_in_output:
            shown -= 1
        text, matched = self._new_text(ids, shown, last=finish is not None)
        if matched is not None:
            self.cut_short = finish is None
            count, stop_reason = matched
            ids, finish = ids[:count], FinishReason.STOP
        self.tokens += len(ids)
        self.ended = finish is not None
        return TextDelta(
            index=delta.index,
            text=text,
            token_ids=ids,
            logprobs=None if delta.logprobs is None else self._described(ids, delta.logprobs),
            prompt_logprobs=self._prompt_logprobs(delta),
            num_cached_tokens=delta.num_cached_tokens,
            finish=finish,
            stop_reason=stop_reason,
            weights_version=delta.weights_version,
            captured=delta.captured,
        )

    def _new_text(self, ids: Sequence[int], shown: int, last: bool) -> tuple[str, tuple[int, str] | None]:
        """The text that the first `shown` ids add; if a stop string ends it, how many ids that took, and which."""
        params = self._request.params
        if not params.stop:
            text = self._text.push(ids[:shown])
            return text + self._text.flush() if last else text, None
        text = ""
        for count, token in enumerate(ids[:shown], 1):
            # As in vLLM: a stop string that is complete within the first min_tokens tokens does not stop.
            armed = self.tokens + count > params.min_tokens
            out, matched = self._stop.push(self._text.push((token,)), armed=armed)
            text += out
            if matched is not None:
                return text, (count, matched)
        if last:
            out, matched = self._stop.push(self._text.flush(), armed=self.tokens + len(ids) > params.min_tokens)
            text += out
            if matched is not None:
                return text, (len(ids), matched)
            text += self._stop.flush()
        return text, None

    def _prompt_logprobs(self, delta: Delta) -> tuple[TokenLogprob | None, ...] | None:
        if delta.prompt_logprobs is None:
            return None
        pairs = zip(self._request.prompt_token_ids, delta.prompt_logprobs, strict=True)
        return tuple(None if entry is None else self._describe(i, entry) for i, entry in pairs)

    def _described(self, ids: Sequence[int], logprobs: Sequence[Logprobs]) -> tuple[TokenLogprob, ...]:
        return tuple(self._describe(i, entry) for i, entry in zip(ids, logprobs, strict=False))

    def _describe(self, token_id: int, entry: Logprobs) -> TokenLogprob:
        def token(i: int, logprob: float, rank: int, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
            return TokenLogprob(i, self._tokenizer.token_str(i), self._tokenizer.token_bytes(i), logprob, rank, top)

        best = zip(entry.top_ids, entry.top_logprobs, strict=True)
        top = tuple(token(i, logprob, rank) for rank, (i, logprob) in enumerate(best, 1))
        return token(token_id, entry.logprob, entry.rank, top)
