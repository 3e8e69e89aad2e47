"""How a text is cut, as llama.cpp's llama-perplexity or as a sliding window, and what is said of the scores.

Pure numpy. N scored tokens; every logarithm is natural
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxserve.errors import ConfigError
from jaxserve.tokenizer import Tokenizer

LEAST_CTX = 8
"""Chunks of fewer tokens would leave nothing to take an error of."""
KL_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)
DELTA_P_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1)


class Estimate(NamedTuple):
    """A figure and its standard error."""

    value: float
    error: float


class Window(NamedTuple):
    """Tokens that a model sees at once, and the position from which on each scores the next one."""

    tokens: Int[np.ndarray, " ctx"]
    first: int


@dataclass(frozen=True, eq=False)
class Scores:
    """What one model says of the scored tokens, and with a reference how far it is from that."""

    nll: Float[np.ndarray, " N"]
    """Minus the log-probability of each token."""
    reference_nll: Float[np.ndarray, " N"] | None = None
    kl: Float[np.ndarray, " N"] | None = None
    """Divergence of the model's distribution of the token from the reference's, over the whole vocabulary."""
    same_top: Bool[np.ndarray, " N"] | None = None
    """Both models' likeliest token is the same."""

    @classmethod
    def join(cls, parts: "Sequence[Scores]") -> "Scores":
        """The scores of several chunks, in order."""

        def column(name: str) -> Any:
            held = [getattr(part, name) for part in parts]
            return None if held[0] is None else np.concatenate(held)

        return cls(*(column(field.name) for field in fields(cls)))


class Comparison(NamedTuple):
    """A model beside its reference; probabilities are shares of 1."""

    reference_ppl: Estimate
    correlation: float
    """Of the two models' log-probabilities."""
    log_ratio: Estimate
    """ln(PPL / reference PPL)."""
    ratio: Estimate
    difference: Estimate
    kl: Estimate
    kl_max: float
    kl_min: float
    kl_percentiles: Mapping[float, float]
    delta_p: Estimate
    """Probability of the text's own token, less what the reference gives it."""
    delta_p_max: float
    delta_p_min: float
    delta_p_percentiles: Mapping[float, float]
    delta_p_rms: Estimate
    same_top: Estimate


def chunks(tokenizer: Tokenizer, text: str, ctx_size: int, limit: int | None = None) -> Int[np.ndarray, "C ctx"]:
    """The text's tokens in chunks of `ctx_size`, of which the first `limit`; what is left over is dropped.

    One newline at the end of the text is not part of it. Where the tokenizer puts BOS before a text, each chunk begins
    with it, in the place of its own first token. Raises ConfigError for a text of fewer than two chunks.
    """
    if ctx_size < LEAST_CTX:
        raise ConfigError(f"ctx_size must be at least {LEAST_CTX}, got {ctx_size}")
    if limit is not None and limit < 1:
        raise ConfigError(f"chunks must be at least 1, got {limit}")
    ids = _ids(tokenizer, text)
    if len(ids) < 2 * ctx_size:
        cure = f"lower --ctx-size to {len(ids) // 2} or less, or " if len(ids) >= 2 * LEAST_CTX else ""
        raise ConfigError(
            f"the text is {len(ids)} tokens long, and a context of {ctx_size} needs at least {2 * ctx_size}; "
            f"{cure}give a longer text"
        )
    count = min(len(ids) // ctx_size, limit or len(ids))
    return with_bos(tokenizer, np.array(ids[: count * ctx_size], np.int32).reshape(count, ctx_size))


def with_bos(tokenizer: Tokenizer, cut: Int[np.ndarray, "C ctx"]) -> Int[np.ndarray, "C ctx"]:
    """The chunks, each beginning with BOS where the tokenizer puts one before a text."""
    bos, cut = _bos(tokenizer), cut.astype(np.int32)
    if bos:
        cut[:, 0] = bos[0]
    return cut


def windows(tokenizer: Tokenizer, text: str, ctx_size: int, stride: int, limit: int | None = None) -> list[Window]:
    """The text's tokens in windows of `ctx_size`, each `stride` further on, of which the first `limit`.

    Every token but the first is scored once: in each window what the one before it did not reach; the last window may
    be shorter. So a token has at least ctx_size - stride before it, as far as the text goes. The text begins as that
    of `chunks`, with BOS where the tokenizer puts it; later windows begin in its midst. This is how Hugging Face's
    guide to perplexity cuts a text.
    Raises ConfigError for a text of fewer than three tokens, and a stride that would pass over some.
    """
    if ctx_size < LEAST_CTX:
        raise ConfigError(f"ctx_size must be at least {LEAST_CTX}, got {ctx_size}")
    if not 1 <= stride < ctx_size:
        raise ConfigError(f"stride must be in [1, {ctx_size - 1}], less than --ctx-size, got {stride}")
    if limit is not None and limit < 1:
        raise ConfigError(f"chunks must be at least 1, got {limit}")
    ids = np.array(_ids(tokenizer, text), np.int32)
    if len(ids) < 3:
        raise ConfigError(f"the text is {len(ids)} tokens long, of which the first is not scored; give a longer text")
    starts = range(0, max(1, len(ids) - ctx_size + stride), stride)[:limit]
    return [Window(ids[at : at + ctx_size], ctx_size - stride - 1 if at else 0) for at in starts]


def first_scored(ctx_size: int) -> int:
    """The position from which on a chunk's tokens are predicted with enough before them: it scores the next one."""
    return ctx_size // 2


def perplexity(nll: Float[np.ndarray, " N"]) -> Estimate:
    """e to the mean; the error by that of the mean."""
    running = Running()
    running.add(nll)
    return running.perplexity()


@dataclass
class Running:
    """The mean of numbers that come in parts, which are not kept (Chan, Golub and LeVeque 1983)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of the squared distances from the mean."""

    def add(self, values: Float[np.ndarray, " N"]) -> None:
        count, mean = self.count + len(values), float(values.mean())
        apart = mean - self.mean
        self.squares += float(((values - mean) ** 2).sum()) + apart**2 * self.count * len(values) / count
        self.mean += apart * len(values) / count
        self.count = count

    def perplexity(self) -> Estimate:
        """e to the mean of what was minus log-probabilities; the error by that of the mean, none of a single number."""
        value = _exp(self.mean)
        return Estimate(value, value * math.sqrt(self.squares / self.count / max(1, self.count - 1)))


def compare(scores: Scores) -> Comparison:
    """All that is said of scores that have a reference."""
    nll, base, kl, same = scores.nll, scores.reference_nll, scores.kl, scores.same_top
    assert base is not None and kl is not None and same is not None, "scores of two models"
    ppl, base_ppl = _exp(float(nll.mean())), _exp(float(base.mean()))
    log_ratio = _mean(nll - base)
    ratio = _exp(log_ratio.value)
    delta_p = np.exp(-nll) - np.exp(-base)
    square = _mean(delta_p**2)
    rms = math.sqrt(square.value)
    share = float(same.mean())
    spread = float(nll.std() * base.std())
    return Comparison(
        reference_ppl=perplexity(base),
        correlation=float(((nll - nll.mean()) * (base - base.mean())).mean()) / spread if spread else 1.0,
        log_ratio=log_ratio,
        ratio=Estimate(ratio, ratio * log_ratio.error),
        # To first order each token moves the difference by this much.
        difference=Estimate(ppl - base_ppl, _mean(ppl * nll - base_ppl * base).error),
        kl=_mean(kl),
        kl_max=float(kl.max()),
        kl_min=float(kl.min()),
        kl_percentiles=_percentiles(kl, KL_PERCENTILES),
        delta_p=_mean(delta_p),
        delta_p_max=float(delta_p.max()),
        delta_p_min=float(delta_p.min()),
        delta_p_percentiles=_percentiles(delta_p, DELTA_P_PERCENTILES),
        delta_p_rms=Estimate(rms, square.error / (2 * rms) if rms else 0.0),
        same_top=Estimate(share, math.sqrt(share * (1 - share) / (len(same) - 1))),
    )


def _bos(tokenizer: Tokenizer) -> list[int]:
    bos = tokenizer.encode("")[:1]
    return bos if bos == [tokenizer.bos_token_id] else []


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    # Without an EOS that the tokenizer may add: it is not a word of the text.
    return _bos(tokenizer) + tokenizer.encode(text.removesuffix("\n"), add_special_tokens=False)


def _mean(values: Float[np.ndarray, " N"]) -> Estimate:
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(len(values) - 1))


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf  # the largest that a float64 holds


def _percentiles(values: Float[np.ndarray, " N"], which: tuple[float, ...]) -> dict[float, float]:
    return dict(zip(which, np.percentile(values, which).tolist(), strict=True))
