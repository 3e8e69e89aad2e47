"""What crosses the seam between the front end and the engine: requests in, deltas out; token ids only.

All types are msgspec structs, so the in-process engine and the engine process see the same objects.
"""

import enum
import math
from typing import Literal

import msgspec

from jaxserve.errors import InvalidParameter, JaxserveError, PromptTooLong, UnsupportedParameter, rebuild

MAX_N = 128
MAX_TOP_LOGPROBS = 20
MAX_BIAS_IDS = 1024
MAX_STOP_IDS = 128
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 4096

_INTEGERS = ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "prompt_logprobs_from")


class FinishReason(enum.StrEnum):
    """Why a sequence ended. Every sequence ends in exactly one delta that carries one."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"


def _check(name: str, value: float, low: float, high: float) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and low <= value <= high):
        raise InvalidParameter(f"{name} must be a number in [{low:.10g}, {high:.10g}], got {value!r}", param=name)


def _check_integer(name: str, value: object) -> None:
    if type(value) is not int:
        raise InvalidParameter(f"{name} must be an integer, got {value!r}", param=name)


def _check_ids(name: str, ids: tuple[int, ...] | dict[int, float], most: int) -> None:
    if len(ids) > most:
        raise InvalidParameter(f"{name} has {len(ids)} entries, at most {most} are served", param=name)
    if any(not 0 <= i < 2**31 for i in ids):
        raise InvalidParameter(f"{name} holds a token id outside [0, 2**31)", param=name)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to sample. Names, meaning and defaults follow vLLM's class of the same name.

    temperature 0 is greedy. top_k 0 or -1 is off. logprobs k asks for the sampled token's
    log-probability under the raw model (before temperature, penalties and bias) and the k best ids;
    None is off. max_tokens None means up to the end of the context; 0 scores the prompt only.
    prompt_logprobs k asks for the same of the prompt's tokens; of those before position prompt_logprobs_from nothing
    is said, and what lies before it may come from the prefix cache.
    `stop` strings are handled where text lives; the engine sees token ids only. A single one may be given as it is.
    Raises InvalidParameter, naming the field.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] | None = None
    banned_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 0

    def __post_init__(self) -> None:
        stop: object = self.stop
        if isinstance(stop, str):  # whose letters would be as many stop strings
            msgspec.structs.force_setattr(self, "stop", (stop,))
        for name in _INTEGERS:
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name))
        _check("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _check("max_tokens", self.max_tokens, 0, 2**31 - 1)
        _check("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameter(
                f"min_tokens={self.min_tokens} is greater than max_tokens={self.max_tokens}", param="min_tokens"
            )
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_k", self.top_k, -1, 2**31 - 1)
        if not (isinstance(self.top_p, int | float) and 0.0 < self.top_p <= 1.0):
            raise InvalidParameter(f"top_p must be in (0, 1], got {self.top_p!r}", param="top_p")
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for bias in self.logit_bias.values():
            _check("logit_bias", bias, -100.0, 100.0)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidParameter("allowed_token_ids is empty: nothing could be sampled", param="allowed_token_ids")
        _check_ids("logit_bias", self.logit_bias, MAX_BIAS_IDS)
        _check_ids("allowed_token_ids", self.allowed_token_ids or (), MAX_BIAS_IDS)
        _check_ids("banned_token_ids", self.banned_token_ids, MAX_BIAS_IDS)
        _check_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_IDS)
        if len(self.bias()) > MAX_BIAS_IDS:
            raise InvalidParameter(
                f"logit_bias, allowed_token_ids and banned_token_ids name {len(self.bias())} ids together, "
                f"at most {MAX_BIAS_IDS} are served",
                param="logit_bias",
            )
        if self.allowed_token_ids is not None and not set(self.allowed_token_ids) - set(self.banned_token_ids):
            raise InvalidParameter(
                "every one of allowed_token_ids is banned: nothing could be sampled", param="allowed_token_ids"
            )
        if len(self.stop) > MAX_STOP_STRINGS or any(not s for s in self.stop):
            raise InvalidParameter(f"stop takes at most {MAX_STOP_STRINGS} non-empty strings", param="stop")
        if any(len(s) > MAX_STOP_CHARS for s in self.stop):
            raise InvalidParameter(f"stop strings may have at most {MAX_STOP_CHARS} characters", param="stop")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InvalidParameter("seed must fit in 64 bits", param="seed")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _check(name, count, 0, MAX_TOP_LOGPROBS)
        _check("prompt_logprobs_from", self.prompt_logprobs_from, 0, 2**31 - 1)
        if self.prompt_logprobs_from and self.prompt_logprobs is None:
            raise InvalidParameter(
                "prompt_logprobs_from says where prompt_logprobs begin, which were not asked for; give both",
                param="prompt_logprobs_from",
            )

    def bias(self) -> dict[int, float]:
        """What is added to which id's logit, bans as -inf; with allowed_token_ids no other id may be sampled."""
        bias = dict(self.logit_bias)
        if self.allowed_token_ids is not None:
            bias = {i: bias.get(i, 0.0) for i in self.allowed_token_ids}
        return bias | dict.fromkeys(self.banned_token_ids, -math.inf)


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One prompt, `params.n` continuations of it.

    priority: lower runs first (as in vLLM). timeout_s: seconds from arrival at the engine after which the
    work is aborted with DeadlineExceeded. cache_salt: prefixes are shared only within one salt.
    eos_token_ids end a sequence unless params.ignore_eos. embed asks for the prompt's embedding instead of
    continuations; params is EMBED then.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""
    embed: bool = False


EMBED = SamplingParams(max_tokens=0)
"""The params of a request that asks for an embedding: nothing is sampled."""


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """The log-probability of one token, its rank (1 = most likely), and the best alternatives, best first."""

    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class ErrorInfo(msgspec.Struct, frozen=True, array_like=True):
    """An error on its way to another process: a class name of errors.py, its message and parameter."""

    kind: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: JaxserveError) -> "ErrorInfo":
        return cls(type(error).__name__, error.message, error.param)

    def rebuild(self) -> JaxserveError:
        return rebuild(self.kind, self.message, self.param)


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What one step added to one sequence of one request.

    logprobs holds one entry per token of token_ids when they were asked for. prompt_logprobs comes with the
    first delta of index 0, one entry per prompt token, None for the first and for those before
    prompt_logprobs_from. finish is set on the last delta; stop_token_id says which id ended it (that id is the last
    of token_ids). error is set with finish ERROR. embedding is the pooled hidden state, float32 in the machine's byte
    order, of a request that asked for it. captured holds, for each of EngineInfo.taps, the values of the next positions
    of the sequence, [N, *shape] in the machine's byte order: each position once, but for the last token, which no step
    reads.
    """

    request_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] | None = None
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    num_cached_tokens: int | None = None
    finish: FinishReason | None = None
    stop_token_id: int | None = None
    error: ErrorInfo | None = None
    weights_version: int | None = None
    """Of all tokens of this sequence; on its first delta."""
    embedding: bytes | None = None
    captured: tuple[bytes, ...] | None = None


class TapInfo(msgspec.Struct, frozen=True, array_like=True):
    """A value inside the model of which an engine brings out what it is for each token: see taps.py."""

    name: str
    shape: tuple[int, ...]
    """Of one token."""
    dtype: str


type PoolingKind = Literal["last", "mean", "cls"]
"""Which hidden state of a prompt is its embedding: its last token's, the mean of all, its first token's."""


class EmbeddingInfo(msgspec.Struct, frozen=True, kw_only=True):
    """How a model makes embeddings of texts, as its checkpoint or the options say."""

    pooling: PoolingKind
    width: int
    normalised: bool = True
    """To length 1."""
    shortened: bool = False
    """The model was trained for embeddings that are cut to fewer dimensions (Matryoshka, Kusupati et al. 2022)."""
    sizes: tuple[int, ...] = ()
    """Those that it was trained for; empty: any."""
    longest: int | None = None
    """Tokens that a text may have by the checkpoint's files, where they say."""
    prompt: str = ""
    """What is put before every text."""
    lower: bool = False
    """Texts are put into lower case first."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded engine says of itself; all that a front end needs to check a request."""

    model: str
    architecture: str
    vocab_size: int
    max_model_len: int
    """Longest prompt plus completion that is served."""
    max_positions: int
    """The same of the model, whatever is served of it."""
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    dtype: str
    num_params: int
    platform: str
    attention: str
    device_bytes: dict[str, int]
    """Bytes by kind, of all devices together: weights, kv, slots, workspace."""
    mesh: str = "1x1"
    """Devices, as --mesh says it: replicas of the engine x devices of each."""
    windows: tuple[int | None, ...] = (None,)
    """Of each group of layers that has pages of its own, how many tokens it keeps; None: all. See page_groups.py."""
    priorities: bool = True
    """Requests are scheduled by their priority; otherwise first come, first served."""
    embedding: EmbeddingInfo | None = None
    """Of an engine that gives embeddings, and those only; None: it generates."""
    weights_version: int = 0
    """How often weights or model code were switched since the engine's first start."""
    taps: tuple[TapInfo, ...] = ()
    """What every delta brings of the model's inner values."""


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """What a running engine is to switch to: the weights at `path`, or its model code as the file now is.

    in_flight: what becomes of requests that have begun. wait: they finish first, and others wait for them. abort: they
    end with ModelChanged. Requests that have not begun run on what is new.
    """

    path: str | None = None
    """A checkpoint directory or GGUF file."""
    code: bool = False
    in_flight: Literal["wait", "abort"] = "wait"


class Updated(msgspec.Struct, frozen=True, kw_only=True):
    """What an update came to: the engine as it is now, and how long it took, in seconds."""

    info: EngineInfo
    load_s: float
    """To read, check and place what is new, or to compile it, while requests were served as before."""
    wait_s: float
    """From then to the switch: what requests in flight took to finish."""


def check_request(request: Request, info: EngineInfo) -> None:
    """Refuses what this engine cannot serve. Called at the edge and again by the engine.

    Raises InvalidParameter, UnsupportedParameter or PromptTooLong.
    """
    params, prompt = request.params, request.prompt_token_ids
    _check_task(request, info)
    if not prompt:
        raise InvalidParameter("the prompt is empty: at least one token is needed", param="prompt")
    if bad := [i for i in prompt if not 0 <= i < info.vocab_size]:
        raise InvalidParameter(
            f"prompt token id {bad[0]} is out of range: the vocabulary has {info.vocab_size} ids", param="prompt"
        )
    if request.embed and len(prompt) > info.max_model_len:
        raise PromptTooLong(
            f"This model's maximum context length is {info.max_model_len} tokens. However, the input has {len(prompt)} "
            "tokens. Please shorten it, or give truncate_prompt_tokens.",
            param="prompt",
        )
    wanted = len(prompt) + (1 if params.max_tokens is None else params.max_tokens)
    # Then the last token is predicted, and does not take a place; unless its values are wanted.
    scoring = params.max_tokens == 0 and not info.taps
    if wanted > info.max_model_len + scoring:
        asked = f"{params.max_tokens} in the completion" if params.max_tokens is not None else "at least 1 to generate"
        raise PromptTooLong(
            f"This model's maximum context length is {info.max_model_len} tokens. However, you requested "
            f"{wanted} tokens ({len(prompt)} in the prompt, {asked}). Please shorten the prompt or max_tokens.",
            param="prompt",
        )
    if params.prompt_logprobs_from > max(0, len(prompt) - 1):
        raise InvalidParameter(
            f"prompt_logprobs_from is {params.prompt_logprobs_from}, and the last token of the prompt is "
            f"{len(prompt) - 1}",
            param="prompt_logprobs_from",
        )
    for name, ids in (
        ("logit_bias", params.logit_bias),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("banned_token_ids", params.banned_token_ids),
        ("stop_token_ids", params.stop_token_ids),
    ):
        if any(i >= info.vocab_size for i in ids):
            raise InvalidParameter(
                f"{name} holds a token id out of range: the vocabulary has {info.vocab_size} ids", param=name
            )
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else request.eos_token_ids)}
    if len(ends) > MAX_STOP_IDS:
        raise InvalidParameter(
            f"{len(ends)} stop and end-of-sequence ids, at most {MAX_STOP_IDS} are served", param="stop_token_ids"
        )
    if params.min_tokens and params.allowed_token_ids is not None:
        if not set(params.allowed_token_ids) - set(params.banned_token_ids) - ends:
            raise InvalidParameter(
                "every one of allowed_token_ids ends the sequence, which min_tokens forbids", param="min_tokens"
            )
    if request.priority and not info.priorities:
        raise UnsupportedParameter(
            "priority is not served by a server that schedules first come, first served; leave it out, or start the "
            "server with --scheduling-policy priority",
            param="priority",
        )
    if request.timeout_s is not None and not 0 < request.timeout_s < 1e9:
        raise InvalidParameter(
            f"timeout must be a number of seconds above 0 and below 1e9, got {request.timeout_s}", param="timeout"
        )


def embedding_of(info: EngineInfo) -> EmbeddingInfo:
    """How the engine makes embeddings. Raises UnsupportedParameter for one that generates."""
    if info.embedding is None:
        raise UnsupportedParameter(
            "this model generates text and gives no embeddings: serve an embedding model, or this one with --task "
            "embed",
            param="model",
        )
    return info.embedding


def _check_task(request: Request, info: EngineInfo) -> None:
    if request.embed:
        embedding_of(info)
    elif info.embedding is not None:
        raise UnsupportedParameter(
            "this model gives embeddings and generates no text: use /v1/embeddings, or Embed over gRPC; to generate, "
            "serve another model, or this one with --task generate if it can",
            param="model",
        )
