"""Scores chunks of tokens with one model, or with two side by side: the forward of serving, without a scheduler.

T tokens of a step, R rows that meet the vocabulary at once, V vocab, D width
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt16

from jaxserve import attention
from jaxserve.embedding import HEADLESS
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.loading import Loaded, open_model
from jaxserve.logits_file import CUT, Rows
from jaxserve.page_groups import PageGroups
from jaxserve.perplexity import Scores, first_scored
from kernels_pallas.ragged_paged_attention.contract import Cache

STEP_TOKENS = 512
"""Most tokens of a chunk in one forward."""
ROWS = 64
"""Positions whose logits are in memory at once."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Distributions:
    """Logits as llama-perplexity's file keeps them; see logits_file.py."""

    numbers: UInt16[Array, "T V"]
    scale: Float[Array, " T"]
    lowest: Float[Array, " T"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenScores:
    """What a step found, by token; those of a comparison are zeros where there is one model only."""

    logprob: Float[Array, " T"]
    reference_logprob: Float[Array, " T"]
    kl: Float[Array, " T"]
    same_top: Bool[Array, " T"]
    distribution: Distributions | None = None


def check_models(paths: Sequence[Path], ctx_size: int, code: str | None = None) -> int:
    """The words of their vocabulary.

    Raises ConfigError, before any weight is read, for models that cannot score such chunks, or not together.
    """
    models = [open_model(path, code) for path in paths]
    for path, (checkpoint, model, _) in zip(paths, models, strict=True):
        if not model.causal or checkpoint.config.get(HEADLESS):
            raise ConfigError(f"{path} gives embeddings and predicts no tokens: there is nothing to score")
    configs = [config for _, _, config in models]
    for path, config in zip(paths, configs, strict=True):
        if ctx_size > config.max_positions:
            raise ConfigError(
                f"ctx_size {ctx_size} exceeds the {config.max_positions} positions of {path}; "
                f"give --ctx-size {config.max_positions} or less"
            )
        if config.vocab != configs[0].vocab:
            raise ConfigError(
                f"{path} has a vocabulary of {config.vocab} tokens and {paths[0]} one of {configs[0].vocab}; "
                "give the model that was quantised as reference"
            )
    vocab: int = configs[0].vocab
    return vocab


class Evaluator:
    """`models`: the one to score, and where it is to be compared the reference, on the same devices. For one thread.

    `base`: the reference is not a model but distributions of a file. `saves`: the distributions are wanted, too.
    """

    def __init__(self, models: Sequence[Loaded], ctx_size: int, *, base: bool = False, saves: bool = False):
        assert 1 <= len(models) <= (1 if base or saves else 2)
        self._ctx_size, self._compares = ctx_size, base or len(models) == 2
        # The last token of a chunk predicts nothing that is known.
        steps = -(-(ctx_size - 1) // STEP_TOKENS)
        self._tokens = -(-(ctx_size - 1) // (steps * ROWS)) * ROWS
        page_size = attention.page_size(
            None, models[0].attention, models[0].device.platform, models[0].kv_dtype, 1, ctx_size
        )
        pages = -(-ctx_size // page_size)
        self._params = [m.params for m in models]
        self._caches = []
        for m in models:
            spec = m.model.cache_spec(m.partition.config)
            shapes = m.partition.cache(attention.cache_shapes(spec, pages, page_size, m.kv_dtype))
            self._caches.append(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), shapes))
        everywhere = models[0].partition.everywhere
        # Collectives of queued steps can take each other's threads on a CPU, which XLA ends the process for.
        self._wait = models[0].device.platform == "cpu" and models[0].partition.mesh.size > 1
        programs = next((m.programs for m in models if not m.programs.whole), models[0].programs)
        whole = partial(jax.ShapeDtypeStruct, sharding=everywhere)
        row, scalar = whole((self._tokens,), jnp.int32), whole((), jnp.int32)
        given = _no_distributions(self._tokens, models[0].config.vocab, whole) if base else None

        def traced(*arguments: Any) -> tuple[list[Cache], TokenScores]:
            with models[0].partition.tracing():
                return _step(models, pages, saves, *arguments)

        self._step = programs.get(
            (
                "evaluate",
                [(m.config, m.kernel.__module__) for m in models],
                pages,
                saves,
                jax.tree.structure(self._params),
            ),
            traced,
            *(self._params, self._caches, row, row, scalar, scalar, given),
            donate=1,
            out_shardings=(jax.tree.map(lambda a: a.sharding, self._caches), everywhere),
        )

    def score(self, chunk: Int[np.ndarray, " ctx"], first: int | None = None) -> Scores:
        """The tokens after position `first`, each given all before it; None is the chunk's second half.

        Raises CheckpointError where that is no number.
        """
        return self.score_and_keep(chunk, first)[0]

    def score_and_keep(
        self, chunk: Int[np.ndarray, " ctx"], first: int | None = None, base: Rows | None = None
    ) -> tuple[Scores, Rows | None]:
        """The same, and with `saves` the distributions of the scored tokens; `base`: the reference's of these."""
        assert 2 <= len(chunk) <= self._ctx_size
        first, count = first_scored(self._ctx_size) if first is None else first, len(chunk) - 1
        targets = np.where(np.arange(count) >= first, chunk[1:], -1).astype(np.int32)
        parts = []
        for start in range(0, count, self._tokens):
            end = min(start + self._tokens, count)
            padding = (0, self._tokens - (end - start))
            given = None
            if base is not None:  # has rows of the scored tokens only, [first, count)
                given = _no_distributions(self._tokens, base.numbers.shape[1], np.zeros)
                if end > first:
                    own, theirs = slice(max(first - start, 0), end - start), slice(max(start - first, 0), end - first)
                    given.numbers[own], given.scale[own] = base.numbers[theirs], base.scale[theirs]
                    given.lowest[own] = base.lowest[theirs]
            self._caches, found = self._step(
                self._params,
                self._caches,
                np.pad(chunk[start:end].astype(np.int32), padding),
                np.pad(targets[start:end], padding, constant_values=-1),
                np.int32(start),
                np.int32(end),
                given,
            )
            if self._wait:
                jax.block_until_ready(found)
            parts.append(found)
        found = jax.tree.map(lambda *a: np.concatenate(a)[first:count], *parts)
        logprobs = [found.logprob, found.reference_logprob] if self._compares else [found.logprob]
        for name, values in zip(("model", "reference"), logprobs, strict=False):
            if not np.isfinite(values).all():
                raise CheckpointError(
                    f"the {name} gives log-probabilities that are no numbers: its weights are damaged"
                )
        kept = found.distribution and Rows(*(getattr(found.distribution, f.name) for f in fields(Rows)))
        if not self._compares:
            return Scores(-found.logprob.astype(np.float64)), kept
        nll, reference = (-values.astype(np.float64) for values in logprobs)
        return Scores(nll, reference, found.kl.astype(np.float64), found.same_top), kept


def _step(
    models: Sequence[Loaded],
    pages: int,
    saves: bool,
    params: list[Any],
    caches: list[Cache],
    tokens: Int[Array, " T"],
    targets: Int[Array, " T"],
    start: Int[Array, ""],
    end: Int[Array, ""],
    base: Distributions | None,
) -> tuple[list[Cache], TokenScores]:
    """A chunk's tokens [start, end) through all models; targets of -1 are not wanted."""
    size = tokens.shape[0]
    positions = jnp.minimum(start + jnp.arange(size, dtype=jnp.int32), end - 1)
    one = jnp.arange(pages, dtype=jnp.int32)[None]
    queries = jnp.stack([jnp.zeros_like(end), end - start])
    hidden, written = [], []
    for m, weights, cache in zip(models, params, caches, strict=True):
        distribution = jnp.array([0, 0, 1], jnp.int32)
        config, kernel = m.partition.config, m.partition.over_heads(m.kernel)
        groups = PageGroups.single(m.model.cache_spec(config).layers)
        attend = attention.bind(kernel, groups, [end[None]], [one], queries, distribution)
        x, cache = m.model.forward(weights, config, tokens, positions, cache, attend)
        hidden.append(x)
        written.append(cache)

    def block(i: jax.Array, out: TokenScores) -> TokenScores:
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=i * ROWS, slice_size=ROWS)
        wanted = cut(targets)

        def compute() -> TokenScores:
            logits = [_logits(m, w, cut(x)) for m, w, x in zip(models, params, hidden, strict=True)]
            if base is not None:
                found = scores_by_file(logits[0], jax.tree.map(cut, base), wanted)
            else:
                found = token_scores(logits[0], logits[1] if len(logits) == 2 else None, wanted)
            if saves:
                found = replace(found, distribution=distributions(logits[0]))
            return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, i * ROWS, 0), out, found)

        return jax.lax.cond((wanted >= 0).any(), compute, lambda: out)

    zeros = jnp.zeros((size,), jnp.float32)
    none = _no_distributions(size, models[0].config.vocab, jnp.zeros) if saves else None
    nothing = TokenScores(zeros, zeros, zeros, jnp.zeros((size,), jnp.bool_), none)
    return written, jax.lax.fori_loop(0, size // ROWS, block, nothing)


def _logits(m: Loaded, weights: Any, hidden: Float[Array, "R D"]) -> Float[Array, "R V"]:
    """Of all words, on every device: each is a part of every distribution."""
    logits = m.partition.by_token(m.model.logits(weights, m.partition.config, hidden))
    return m.partition.whole(logits)[:, : m.config.vocab]


def token_scores(
    logits: Float[Array, "R V"], reference: Float[Array, "R V"] | None, targets: Int[Array, " R"]
) -> TokenScores:
    """The scores of `targets`, one a row; those of a target of -1 mean nothing."""
    at = jnp.maximum(targets, 0)[:, None]  # [R, 1]
    logq = jax.nn.log_softmax(logits, axis=-1)
    of_token = jnp.take_along_axis(logq, at, axis=-1)[:, 0]
    if reference is None:
        zeros = jnp.zeros_like(of_token)
        return TokenScores(of_token, zeros, zeros, jnp.zeros(of_token.shape, jnp.bool_))
    logp = jax.nn.log_softmax(reference, axis=-1)
    p, q = jnp.exp(logp), jnp.exp(logq)
    # q - p sums to zero but for the rounding of both normalisers, which it takes out of the first term.
    kl = (jnp.where(p > 0, p * (logp - logq), 0.0) + (q - p)).sum(axis=-1)
    same = jnp.argmax(logits, axis=-1) == jnp.argmax(reference, axis=-1)
    of_reference = jnp.take_along_axis(logp, at, axis=-1)[:, 0]
    return TokenScores(of_token, of_reference, jnp.maximum(kl, 0.0), same)


def scores_by_file(logits: Float[Array, "R V"], base: Distributions, targets: Int[Array, " R"]) -> TokenScores:
    """The same by llama-perplexity's rule: words that its file knows to be less likely than e^-CUT are left out."""
    at = jnp.maximum(targets, 0)[:, None]  # [R, 1]
    logq = jax.nn.log_softmax(logits, axis=-1)
    logp = base.scale[:, None] * base.numbers.astype(jnp.float32) + base.lowest[:, None]
    kl = jnp.where(logp > -CUT, jnp.exp(logp) * (logp - logq), 0.0).sum(axis=-1)
    same = jnp.argmax(logits, axis=-1) == jnp.argmax(base.numbers, axis=-1)
    of_token, of_base = (jnp.take_along_axis(x, at, axis=-1)[:, 0] for x in (logq, logp))
    return TokenScores(of_token, of_base, kl, same)


def distributions(logits: Float[Array, "R V"]) -> Distributions:
    """As the file keeps them."""
    top = logits.max(axis=-1, keepdims=True)
    low = jnp.maximum(logits.min(axis=-1, keepdims=True), top - CUT)
    scale = (top - low) / 65535.0
    steps = (logits - low) / jnp.where(scale > 0, scale, 1.0)
    numbers = jnp.round(jnp.clip(steps, 0.0, 65535.0)).astype(jnp.uint16)
    lowest = low - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return Distributions(numbers, scale[:, 0], lowest[:, 0])


def _no_distributions(tokens: int, vocab: int, new: Callable[[tuple[int, ...], Any], Any]) -> Distributions:
    return Distributions(new((tokens, vocab), jnp.uint16), new((tokens,), jnp.float32), new((tokens,), jnp.float32))
