"""Between the messages of jaxserve.v1 and the types of request.py and text.py; no connection, no engine."""

from collections.abc import Iterator

import msgspec

from jaxserve.request import FinishReason, SamplingParams
from jaxserve.server.proto import jaxserve_v1_pb2 as pb
from jaxserve.text import TextDelta, TokenLogprob
from jaxserve.tokenizer import Tokenizer

PROMPT_LOGPROBS_PER_MESSAGE = 1024  # below the 4 MB that a client accepts by default, with 20 alternatives each
_REPEATED = frozenset({"allowed_token_ids", "banned_token_ids", "stop", "stop_token_ids"})

_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class Answer:
    """The messages that answer one GenerateRequest, made of its TextDeltas."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: pb.ResponseOptions,
        about: pb.PromptInfo,
        prompt: tuple[int, ...],
        n: int,
    ):
        self._tokenizer = tokenizer
        self._with_text = options.text if options.HasField("text") else True
        self._with_ids = options.token_ids if options.HasField("token_ids") else True
        self._about: pb.PromptInfo | None = about
        self._prompt = prompt
        self._unfinished = n
        self._usage = pb.Usage(prompt_tokens=len(prompt))

    def messages(self, delta: TextDelta) -> Iterator[pb.GenerateResponse]:
        """What to send for a delta: usually one message; none if all it holds was not asked for."""
        response = pb.GenerateResponse(index=delta.index)
        if self._about is not None:
            yield from self._all_but_last_part(delta)
            response.prompt.CopyFrom(self._about)
            self._about = None
        if self._with_text:
            response.text = delta.text
        if self._with_ids:
            response.token_ids.extend(delta.token_ids)
        if delta.logprobs:
            response.logprobs.extend(map(token_logprob, delta.logprobs))
        self._usage.completion_tokens += len(delta.token_ids)
        self._usage.cached_tokens = self._usage.cached_tokens or delta.num_cached_tokens or 0
        if delta.finish is not None:
            response.finish.CopyFrom(finish(delta))
            self._unfinished -= 1
            if not self._unfinished:
                response.usage.CopyFrom(self._usage)
        if response.text or response.token_ids or response.logprobs or delta.finish or response.HasField("prompt"):
            yield response

    def _all_but_last_part(self, delta: TextDelta) -> Iterator[pb.GenerateResponse]:
        """Messages with the prompt's log-probabilities; what remains is left in `_about`."""
        if delta.prompt_logprobs is None:
            return
        assert self._about is not None
        for k, entry in enumerate(delta.prompt_logprobs):
            if k and k % PROMPT_LOGPROBS_PER_MESSAGE == 0:
                yield pb.GenerateResponse(index=delta.index, prompt=self._about)
                self._about = pb.PromptInfo()
            if entry is None:
                token = self._prompt[k]
                self._about.logprobs.add(
                    token_id=token, token=self._tokenizer.token_str(token), bytes=self._tokenizer.token_bytes(token)
                )
            else:
                self._about.logprobs.append(token_logprob(entry))


def sampling_params(message: pb.SamplingParams, defaults: SamplingParams) -> SamplingParams:
    """The defaults with the fields that the message sets. Raises InvalidParameter, naming the field."""
    given = {field.name: value for field, value in message.ListFields()}
    for name, value in given.items():
        if name == "logit_bias":
            given[name] = dict(value)
        elif name in _REPEATED:
            given[name] = tuple(value)
    if given.get("max_tokens") == -1:
        given["max_tokens"] = None
    return msgspec.structs.replace(defaults, **given)


def token_logprob(entry: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=entry.token_id,
        token=entry.token,
        bytes=entry.bytes,
        logprob=entry.logprob,
        rank=entry.rank,
        top=map(token_logprob, entry.top),
    )


def finish(delta: TextDelta) -> pb.Finish:
    """Why the delta's continuation ended, and what ended it."""
    assert delta.finish is not None
    result = pb.Finish(reason=_FINISH[delta.finish])
    if isinstance(delta.stop_reason, str):
        result.stop_string = delta.stop_reason
    elif delta.stop_reason is not None:
        result.stop_token_id = delta.stop_reason
    elif delta.finish is FinishReason.STOP:
        result.eos_token_id = delta.token_ids[-1]
    return result
