"""A body of /v1/chat/completions or /v1/completions as work for a model, and who collects its answer. No transport."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from jaxserve import __version__
from jaxserve.errors import RequestError
from jaxserve.request import EngineInfo, SamplingParams
from jaxserve.server.openai import (
    chat_messages,
    chat_params,
    completion_params,
    completion_prompts,
    template_arguments,
)
from jaxserve.server.replies import ChatReply, CompletionReply, Echo, Head, Reply
from jaxserve.server.wire import ChatBody, CompletionBody, SamplingBody
from jaxserve.text import SLOW_TO_ENCODE_CHARS, TextDelta, TextModel, TokenLogprob


class Collecting[Delta](Protocol):
    """An answer that is not streamed, as it grows."""

    @property
    def prompts(self) -> Sequence[Sequence[int]]: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def complete(self) -> bool: ...
    def add(self, prompt: int, delta: Delta) -> None: ...
    def body(self) -> bytes: ...


class Work[Delta](Protocol):
    """What a body asks of the model: Generation is that of texts, Pooling that of vectors."""

    @property
    def prompts(self) -> Sequence[Sequence[int]]: ...
    @property
    def reply(self) -> Collecting[Delta]: ...
    def start(
        self, model: TextModel, unique: str, seed_of: Callable[[int], int] | None = None
    ) -> list[AsyncGenerator[Delta]]: ...


@dataclass(frozen=True)
class Generation:
    """What a body asks of the model, and the Reply that takes in its deltas."""

    body: SamplingBody
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    reply: Reply

    def start(
        self, model: TextModel, unique: str, seed_of: Callable[[int], int] | None = None
    ) -> list[AsyncGenerator[TextDelta]]:
        """The deltas of each prompt; nothing is queued before they are iterated. Raises RequestError.

        `unique` names the request to the engine. `seed_of` gives a prompt's number a seed if the body has none;
        without it the engine draws one.
        """
        body, params = self.body, [self.params] * len(self.prompts)
        if seed_of is not None and self.params.seed is None:
            params = [msgspec.structs.replace(self.params, seed=seed_of(i)) for i in range(len(self.prompts))]
        try:
            return [
                model.generate(
                    prompt,
                    params[i],
                    request_id=f"{unique}-{i}",
                    priority=body.priority or 0,
                    timeout_s=body.timeout,
                    cache_salt=body.cache_salt or "",
                )
                for i, prompt in enumerate(self.prompts)
            ]
        except RequestError as error:
            if error.param == "prompt" and isinstance(body, ChatBody):
                error.param = "messages"
            raise


async def read_chat(body: ChatBody, model: TextModel, head: Head) -> Generation:
    """What a chat request means. Raises RequestError."""
    params, options = chat_params(body, model.defaults, model.tokenizer)
    messages = chat_messages(body.messages)
    arguments = template_arguments(body)
    text = "".join(str(m["content"]) for m in messages)

    def encode() -> tuple[int, ...]:
        model.check_length(text, "messages")
        return model.encode_chat(messages, **arguments)

    prompt = await in_thread_if(len(text) > SLOW_TO_ENCODE_CHARS, encode)
    return Generation(body, [prompt], params, ChatReply(head, [prompt], options))


async def read_completion(body: CompletionBody, model: TextModel, head: Head) -> Generation:
    """What a completion request means. Raises RequestError."""
    params, options = completion_params(body, model.defaults, model.tokenizer)
    given = completion_prompts(body.prompt, options.n)
    texts = [p for p in given if isinstance(p, str)]

    def encode(text: str) -> tuple[int, ...]:
        model.check_length(text, "prompt")
        return model.encode_prompt(text)

    encoded = await in_thread_if(sum(map(len, texts)) > SLOW_TO_ENCODE_CHARS, lambda: [encode(t) for t in texts])
    prompts = encoded if texts else [p for p in given if not isinstance(p, str)]
    tokenizer = model.tokenizer
    shown: list[str] = []
    firsts: list[TokenLogprob] = []
    if options.echo and all(prompts):  # an empty one is refused when it is started
        skip = params.skip_special_tokens
        shown = texts or [tokenizer.decode(p, skip_special_tokens=skip) for p in prompts]
        for prompt in prompts:
            token = prompt[0]
            name, spelled = tokenizer.token_str(token), tokenizer.token_bytes(token)
            firsts.append(TokenLogprob(token_id=token, token=name, bytes=spelled, logprob=0.0, rank=1))
    hidden = tokenizer.special_ids if params.skip_special_tokens else frozenset()
    echoed = Echo(shown, firsts, hidden, 1 if options.echo and tokenizer.strips_leading_space else 0)
    return Generation(body, prompts, params, CompletionReply(head, prompts, options, echoed))


def system_fingerprint(info: EngineInfo) -> str:
    """OpenAI's `system_fingerprint`: what answers, in short."""
    served = f"{__version__} {info.architecture} {info.num_params} {info.dtype} {info.platform} {info.attention}"
    return "b" + hashlib.sha256(served.encode()).hexdigest()[:12]


async def in_thread_if[Result](slow: bool, work: Callable[[], Result]) -> Result:
    """What `work` gives, had in a thread if it is slow."""
    return await asyncio.to_thread(work) if slow else work()
