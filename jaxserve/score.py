"""Log-likelihoods: where a continuation begins among the tokens, what the model says of it, which choice that makes.

The rules are those of EleutherAI's lm-evaluation-harness, so that figures can be compared.
"""

import math
import operator
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple

from jaxserve.errors import InvalidParameter
from jaxserve.request import SamplingParams
from jaxserve.text import Prompt, TextModel, TokenLogprob


@dataclass
class ScoreOutput:
    """The log-likelihood of a continuation given its context (natural logarithm)."""

    logprob: float
    token_ids: list[int]
    token_logprobs: list[float]
    is_greedy: bool
    """Every token is the one that greedy decoding would take."""
    context_tokens: int
    """Tokens before the continuation, BOS included."""
    num_cached_tokens: int
    """How many of them were not computed, since another request had begun alike."""


class Choice(NamedTuple):
    """Which of several continuations is the likeliest: as it is, by byte of its text, by token; the first of equals."""

    raw: int
    per_byte: int
    per_token: int


def encode_pair(text: TextModel, context: Prompt, continuation: Prompt) -> tuple[tuple[int, ...], int]:
    """The tokens of both, and the position at which the continuation begins.

    White space at the end of the context goes to the continuation, as its first word is spelt with it. Both are
    encoded as one text; the continuation is what follows as many tokens as the context alone is encoded to. So it may
    lack a character that the tokenizer joins to the context's last one. Without any context BOS stands before the
    continuation, or EOS where there is no BOS. A part that is given as token ids is taken as it is.
    Raises InvalidParameter where nothing is left to score, or no token precedes it.
    """
    if isinstance(context, str) and isinstance(continuation, str):
        stripped = context.rstrip()
        if stripped:
            ids, start = text.encode_prompt(context + continuation), len(text.encode_prompt(stripped))
        else:
            ids, start = _after_nothing(text, context + continuation), 1
    else:
        before = text.encode_prompt(context) if isinstance(context, str) else _as_ids(context)
        ids, start = (*before, *_without_bos(text, continuation)), len(before)
    if not 1 <= start < len(ids):
        raise InvalidParameter(
            "a continuation needs at least one token of its own, and one token before it", param="continuation"
        )
    return ids, start


def scoring_params(start: int) -> SamplingParams:
    """What a request asks to score its prompt from position `start` on, and no more."""
    return SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0, prompt_logprobs_from=start)


def score_output(
    ids: Sequence[int], start: int, logprobs: Sequence[TokenLogprob | None] | None, cached: int
) -> ScoreOutput:
    """The answer to `scoring_params(start)`, as its prompt_logprobs have it."""
    scored = [entry for entry in (logprobs or ())[start:] if entry is not None]
    assert len(scored) == len(ids) - start, "the engine scores every prompt token from `start` on"
    values = [entry.logprob for entry in scored]
    greedy = all(entry.rank == 1 for entry in scored)
    return ScoreOutput(math.fsum(values), list(ids[start:]), values, greedy, start, cached)


async def score(text: TextModel, ids: Sequence[int], start: int, *, request_id: str) -> ScoreOutput:
    """The log-likelihood of ids[start:] given ids[:start]. Raises what TextModel.generate raises."""
    logprobs: Sequence[TokenLogprob | None] | None = None
    cached = 0
    async with aclosing(text.generate(ids, scoring_params(start), request_id=request_id)) as deltas:
        async for delta in deltas:
            logprobs = delta.prompt_logprobs or logprobs
            cached = delta.num_cached_tokens or cached
    return score_output(ids, start, logprobs, cached)


def choose(scores: Sequence[ScoreOutput], texts: Sequence[str]) -> Choice:
    """The likeliest of one context's continuations; `texts` are what their bytes are counted of."""
    size = [max(1, len(text.encode(errors="surrogatepass"))) for text in texts]
    by_byte = [s.logprob / n for s, n in zip(scores, size, strict=True)]
    by_token = [s.logprob / len(s.token_ids) for s in scores]
    return Choice(*(max(range(len(v)), key=v.__getitem__) for v in ([s.logprob for s in scores], by_byte, by_token)))


def _after_nothing(text: TextModel, continuation: str) -> tuple[int, ...]:
    tokenizer = text.tokenizer
    first = tokenizer.bos_token_id
    if first is None:
        first = next(iter(text.eos_token_ids), None)
    ids = _without_bos(text, continuation)
    return ids if first is None or ids[:1] == (first,) else (first, *ids)


def _without_bos(text: TextModel, part: Prompt) -> tuple[int, ...]:
    if isinstance(part, str):
        return tuple(text.tokenizer.encode(part, add_special_tokens=False, parse_special=True))
    return _as_ids(part)


def _as_ids(ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(operator.index, ids))
