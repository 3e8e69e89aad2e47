"""A body of /v1/embeddings or /v1/score as work for a model, and the answer that its vectors make. No transport."""

import base64
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

from jaxserve.embedding import check_dimensions, cosine, finished
from jaxserve.errors import InvalidParameter, RequestError
from jaxserve.request import EmbeddingInfo, embedding_of
from jaxserve.server.generation import in_thread_if
from jaxserve.server.openai import check_request_fields, texts_or_ids
from jaxserve.server.replies import Head
from jaxserve.server.wire import EmbeddingBody, PoolingBody, ScoreBody
from jaxserve.text import SLOW_TO_ENCODE_CHARS, PooledDelta, TextModel

MAX_INPUTS = 2048
"""OpenAI's limit."""

_encoder = msgspec.json.Encoder()


class EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingObject(msgspec.Struct):
    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingAnswer(msgspec.Struct):
    """OpenAI's answer of /v1/embeddings."""

    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage
    object: str = "list"


class ScoreObject(msgspec.Struct):
    index: int
    score: float
    object: str = "score"


class ScoreAnswer(msgspec.Struct):
    """vLLM's answer of /v1/score."""

    id: str
    created: int
    model: str
    data: list[ScoreObject]
    usage: EmbeddingUsage
    object: str = "list"


class PooledReply:
    """One answer: give it every prompt's vector through `add`, then take `body`."""

    completion_tokens = 0

    def __init__(self, head: Head, prompts: Sequence[Sequence[int]], info: EmbeddingInfo, dimensions: int | None):
        self.head = head
        self.prompts = prompts
        self.prompt_tokens = sum(map(len, prompts))
        self.vectors: list[np.ndarray | None] = [None] * len(prompts)
        self._info, self._dimensions = info, dimensions
        self._versions: set[int] = set()

    @property
    def weights_versions(self) -> list[int]:
        """Of the vectors, more than one if the weights were switched meanwhile."""
        return sorted(self._versions or {self.head.weights_version})

    @property
    def complete(self) -> bool:
        """Whether every prompt has its vector."""
        return all(vector is not None for vector in self.vectors)

    def add(self, prompt: int, delta: PooledDelta) -> None:
        self._versions.add(delta.weights_version)
        self.vectors[prompt] = finished(delta.pooled, self._info, self._dimensions)

    def body(self) -> bytes:
        """The whole answer as JSON."""
        vectors = [vector for vector in self.vectors if vector is not None]
        return _encoder.encode(self._answer(vectors, EmbeddingUsage(self.prompt_tokens, self.prompt_tokens)))

    def _answer(self, vectors: Sequence[np.ndarray], usage: EmbeddingUsage) -> Any:
        raise NotImplementedError


class EmbeddingReply(PooledReply):
    """The vectors themselves; in base64 the bytes of their little-endian float32."""

    def __init__(
        self,
        head: Head,
        prompts: Sequence[Sequence[int]],
        info: EmbeddingInfo,
        dimensions: int | None,
        encoding: Literal["float", "base64"],
    ):
        super().__init__(head, prompts, info, dimensions)
        self._encoding = encoding

    def _answer(self, vectors: Sequence[np.ndarray], usage: EmbeddingUsage) -> EmbeddingAnswer:
        shown = [
            base64.b64encode(v.astype("<f4").tobytes()).decode() if self._encoding == "base64" else v.tolist()
            for v in vectors
        ]
        return EmbeddingAnswer([EmbeddingObject(i, v) for i, v in enumerate(shown)], self.head.model, usage)


class ScoreReply(PooledReply):
    """The cosine of pairs: `pairs` are numbers of prompts."""

    def __init__(
        self, head: Head, prompts: Sequence[Sequence[int]], info: EmbeddingInfo, pairs: Sequence[tuple[int, int]]
    ):
        super().__init__(head, prompts, info, None)
        self._pairs = pairs

    def _answer(self, vectors: Sequence[np.ndarray], usage: EmbeddingUsage) -> ScoreAnswer:
        scores = [ScoreObject(i, cosine(vectors[a], vectors[b])) for i, (a, b) in enumerate(self._pairs)]
        return ScoreAnswer(self.head.id, self.head.created, self.head.model, scores, usage)


@dataclass(frozen=True)
class Pooling:
    """What a body asks of the model, and the reply that takes in its vectors; as a Generation."""

    body: PoolingBody
    prompts: Sequence[Sequence[int]]
    fields: tuple[str, ...]
    """The field that each prompt came from, for errors."""
    reply: PooledReply

    def start(
        self, model: TextModel, unique: str, seed_of: Callable[[int], int] | None = None
    ) -> list[AsyncGenerator[PooledDelta]]:
        """The vector of each prompt; nothing is queued before they are iterated. Raises RequestError."""
        body = self.body
        return vectors_of(
            self.prompts, model, self.fields, unique,
            priority=body.priority or 0, timeout_s=body.timeout, cache_salt=body.cache_salt or "",
        )  # fmt: skip


async def read_embeddings(body: EmbeddingBody, model: TextModel, head: Head) -> Pooling:
    """What a request for embeddings means. Raises RequestError."""
    check_request_fields(body)
    given = texts_or_ids(body.input, "input")
    check_count(len(given), "input")
    info = embedding_of(model.client.info)
    check_dimensions(body.dimensions, info)
    fields = ("input",) * len(given)
    prompts = await encoded(given, body.truncate_prompt_tokens, model, fields)
    reply = EmbeddingReply(head, prompts, info, body.dimensions, body.encoding_format or "float")
    return Pooling(body, prompts, fields, reply)


async def read_score(body: ScoreBody, model: TextModel, head: Head) -> Pooling:
    """What a request for scores means: text_1[i] with text_2[i], or one text_1 with all. Raises RequestError."""
    check_request_fields(body)
    first, second = ([t] if isinstance(t, str) else t for t in (body.text_1, body.text_2))
    for name, texts in (("text_1", first), ("text_2", second)):
        if not texts:
            raise InvalidParameter(f"{name} is empty", param=name)
        check_count(len(texts), name)
    if len(first) not in (1, len(second)):
        raise InvalidParameter(
            f"text_1 has {len(first)} texts and text_2 {len(second)}: give one text_1 for all, or one for each",
            param="text_1",
        )
    info = embedding_of(model.client.info)
    fields = ("text_1",) * len(first) + ("text_2",) * len(second)
    prompts = await encoded([*first, *second], body.truncate_prompt_tokens, model, fields)
    pairs = [(i if len(first) > 1 else 0, len(first) + i) for i in range(len(second))]
    return Pooling(body, prompts, fields, ScoreReply(head, prompts, info, pairs))


def check_count(count: int, param: str) -> None:
    """Raises InvalidParameter for more texts than one request may have."""
    if count > MAX_INPUTS:
        raise InvalidParameter(
            f"{count} texts, at most {MAX_INPUTS} are served in one request; send several requests", param=param
        )


def vectors_of(
    prompts: Sequence[Sequence[int]], model: TextModel, fields: Sequence[str], unique: str, **options: Any
) -> list[AsyncGenerator[PooledDelta]]:
    """The vector of each prompt, by `TextModel.embed` with these options; nothing is queued before they are iterated.

    `fields` names where each came from, for errors. Raises RequestError.
    """
    found = []
    for i, (prompt, field) in enumerate(zip(prompts, fields, strict=True)):
        try:
            found.append(model.embed(prompt, request_id=f"{unique}-{i}", **options))
        except RequestError as error:
            if error.param == "prompt":
                error.param = field
            raise
    return found


async def encoded(
    given: Sequence[str | tuple[int, ...]], longest: int | None, model: TextModel, fields: Sequence[str]
) -> list[tuple[int, ...]]:
    """The token ids of each, cut to the `longest` (truncate_prompt_tokens); of given ids nobody knows the ends to keep.

    `fields` names where each came from, for errors. Raises RequestError.
    """
    most = model.client.info.max_model_len
    if longest is not None and not (longest == -1 or 1 <= longest <= most):
        raise InvalidParameter(
            f"truncate_prompt_tokens must be -1 or in [1, {most}], got {longest}", param="truncate_prompt_tokens"
        )
    if longest == -1:
        longest = most

    def encode(i: int) -> tuple[int, ...]:
        text = given[i]
        if not isinstance(text, str):
            return text if longest is None else text[:longest]
        try:
            if longest is None:
                model.check_length(text, "input")
            return model.encode_embedded(text, longest)
        except RequestError as error:
            if error.param in ("input", "prompt"):
                error.param = fields[i]
            raise

    chars = sum(len(text) for text in given if isinstance(text, str))
    return await in_thread_if(chars > SLOW_TO_ENCODE_CHARS, lambda: [encode(i) for i in range(len(given))])
