"""An engine without a model, for the tests of what lies in front of one: the next token is the last one plus one.

Also writes the tiny byte-level tokenizer that goes with it, so that a prompt "abc" is continued with "defg...".
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from jaxserve.client import EngineState, EngineStatus
from jaxserve.errors import EngineStopped, JaxserveError
from jaxserve.request import (
    Delta,
    EmbeddingInfo,
    EngineInfo,
    FinishReason,
    Logprobs,
    Request,
    Update,
    Updated,
    check_request,
)

SPECIAL_TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
BOS, EOS, IM_START, IM_END = range(4)
FIRST_BYTE = len(SPECIAL_TOKENS)
VOCAB_SIZE = FIRST_BYTE + 256
EMBEDDING = EmbeddingInfo(pooling="mean", width=4, normalised=False)

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def ids_of(text: str) -> tuple[int, ...]:
    """The ids that the tiny tokenizer gives a text: one for each UTF-8 byte."""
    return tuple(FIRST_BYTE + b for b in text.encode())


def write_tokenizer(path: Path) -> Path:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json of the tiny tokenizer into `path`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    vocab |= {letter: FIRST_BYTE + byte for byte, letter in _byte_letters().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE, "add_bos_token": False}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, IM_END], "temperature": 0.7}))
    (path / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE, "eos_token_id": EOS}))
    return path


def _byte_letters() -> dict[int, str]:
    """Byte-level BPE's printable letter for each byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def fake_info(**changes: Any) -> EngineInfo:
    known: dict[str, Any] = dict(
        model="fake",
        architecture="FakeForCausalLM",
        vocab_size=VOCAB_SIZE,
        max_model_len=512,
        max_positions=4096,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        page_size=16,
        num_pages=100,
        dtype="float32",
        num_params=0,
        platform="cpu",
        attention="reference",
        device_bytes={"weights": 0, "kv": 0, "workspace": 0},
    )
    return EngineInfo(**(known | changes))


class FakeEngine:
    """An EngineClient that counts up.

    Sequence k of a request begins with last + 1 + k; `script(request, k)` gives other tokens (an EOS is appended
    when it runs out). Sampled tokens have rank 1 and logprob -0.25, prompt tokens rank 2 and logprob -1.25; the
    other of the best ids are token + 1, token + 2, ... one nat apart.

    Set these at any time: `state`; `refuse` is raised instead of a first delta, `fail_after` (tokens, error) in the
    middle; `delay_s` passes before each step; `gate`, when given, must be set before a step runs, and `steps_left`,
    when given, must not be 0 and is counted down; `tokens_per_delta`; `num_cached_tokens`.
    Look at these: `requests` as they came, `aborted` and `finished` request ids, `running` now, `calls`.
    """

    def __init__(
        self,
        *,
        script: Callable[[Request, int], Sequence[int]] | None = None,
        delay_s: float = 0.0,
        state: EngineState = EngineState.READY,
        **info: Any,
    ):
        self.script = script
        self.delay_s = delay_s
        self.state = state
        self.detail = ""
        self.gate: asyncio.Event | None = None
        self.steps_left: int | None = None
        self.refuse: JaxserveError | None = None
        self.fail_after: tuple[int, BaseException] | None = None
        self.tokens_per_delta = 1
        self.num_cached_tokens = 0
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.finished: list[str] = []
        self.running: set[str] = set()
        self.calls: list[str] = []
        self.updates: list[Update] = []
        self._info = fake_info(**info)

    @property
    def status(self) -> EngineStatus:
        return EngineStatus(self.state, self.detail)

    @property
    def info(self) -> EngineInfo:
        if self.state is EngineState.LOADING:
            raise EngineStopped("the engine is loading")
        return self._info

    async def start(self) -> None:
        self.calls.append("start")

    async def wait_ready(self) -> None:
        while self.state is EngineState.LOADING:
            await asyncio.sleep(0.005)

    async def update(self, update: Update) -> Updated:
        """Raises `refuse`, or counts the weights' version up."""
        self.updates.append(update)
        if self.refuse is not None:
            raise self.refuse
        self._info = msgspec.structs.replace(self._info, weights_version=self._info.weights_version + 1)
        return Updated(info=self._info, load_s=0.25, wait_s=0.5)

    async def metrics_text(self) -> bytes:
        return b"# HELP fake_engine_up Always 1.\n# TYPE fake_engine_up gauge\nfake_engine_up 1.0\n"

    async def drain(self, timeout_s: float) -> None:
        self.calls.append("drain")
        self.state = EngineState.DRAINING
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self.running and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        self.calls.append("stop")
        self.state = EngineState.DEAD

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        self.requests.append(request)
        if self.state is not EngineState.READY:
            raise EngineStopped(f"the engine is {self.state.value}")
        check_request(request, self._info)
        self.running.add(request.id)
        try:
            if self.refuse is not None:
                raise self.refuse
            async for delta in self._deltas(request):
                yield delta
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted.append(request.id)
            raise
        else:
            self.finished.append(request.id)
        finally:
            self.running.discard(request.id)

    def _embedded(self, request: Request) -> Delta:
        """(length, first id, last id, 0, ...) of the prompt."""
        assert self._info.embedding is not None
        vector = np.zeros(self._info.embedding.width, np.float32)
        prompt = request.prompt_token_ids
        vector[:3] = len(prompt), prompt[0], prompt[-1]
        return Delta(request.id, num_cached_tokens=0, finish=FinishReason.STOP, embedding=vector.tobytes())

    def _held(self) -> bool:
        return self.steps_left == 0 or (self.gate is not None and not self.gate.is_set())

    async def _deltas(self, request: Request) -> AsyncIterator[Delta]:
        if request.embed:
            yield self._embedded(request)
            return
        params, prompt = request.params, request.prompt_token_ids
        left = {k: self._tokens(request, k) for k in range(params.n)}
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            first = max(1, params.prompt_logprobs_from)
            scored = [_logprobs(t, params.prompt_logprobs, rank=2) for t in prompt[first:]]
            prompt_logprobs = (*[None] * first, *scored)
        sent = 0
        first = True
        while left:
            await asyncio.sleep(self.delay_s)
            while self._held() and self.state is not EngineState.DEAD:
                await asyncio.sleep(0.002)
            if self.steps_left:
                self.steps_left -= 1
            for k in list(left):
                tokens, finish, stop_id = left[k]
                if self.fail_after is not None and sent >= self.fail_after[0]:
                    raise self.fail_after[1]
                if self.state is EngineState.DEAD:
                    raise EngineStopped("the engine is dead")
                now, later = tokens[: self.tokens_per_delta], tokens[self.tokens_per_delta :]
                sent += len(now)
                logprobs = None
                if params.logprobs is not None:
                    logprobs = tuple(_logprobs(t, params.logprobs, rank=1) for t in now)
                yield Delta(
                    request.id,
                    index=k,
                    token_ids=now,
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs if first else None,
                    num_cached_tokens=self.num_cached_tokens if first else None,
                    finish=None if later else finish,
                    stop_token_id=None if later else stop_id,
                    weights_version=self._info.weights_version if first else None,
                )
                first = False
                if later:
                    left[k] = (later, finish, stop_id)
                else:
                    del left[k]

    def _tokens(self, request: Request, k: int) -> tuple[tuple[int, ...], FinishReason, int | None]:
        """All tokens of sequence k, why it ends, and the id that ended it."""
        params, prompt = request.params, request.prompt_token_ids
        room = self._info.max_model_len - len(prompt)
        most = room if params.max_tokens is None else min(params.max_tokens, room)
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(request.eos_token_ids))
        if self.script is None:
            planned = [(prompt[-1] + 1 + k + i) % self._info.vocab_size for i in range(most)]
        else:
            planned = [*self.script(request, k)]
            while params.ignore_eos and planned and len(planned) < most:
                planned += planned
            if not params.ignore_eos:
                planned.append(request.eos_token_ids[0] if request.eos_token_ids else EOS)
        tokens: list[int] = []
        for token in planned[:most]:
            tokens.append(token)
            if token in ends and len(tokens) > params.min_tokens:
                return tuple(tokens), FinishReason.STOP, token
        return tuple(tokens), FinishReason.LENGTH, None


def embeds(**changes: Any) -> FakeEngine:
    """One that gives embeddings: the `vector` of a text."""
    return FakeEngine(embedding=EMBEDDING, **changes)


def vector(text: str) -> list[float]:
    """The embedding of "abc" is (3, id of a, id of c, 0)."""
    return [len(text), FIRST_BYTE + ord(text[0]), FIRST_BYTE + ord(text[-1]), 0]


def _logprobs(token: int, k: int, *, rank: int) -> Logprobs:
    ids = [token, *(token + i for i in range(1, 32))]
    ids = [i % VOCAB_SIZE for i in ids]
    if rank == 2:
        ids[0], ids[1] = ids[1], ids[0]
    values = [-0.25 - i for i in range(len(ids))]
    return Logprobs(values[rank - 1], rank, tuple(ids[:k]), tuple(values[:k]))
