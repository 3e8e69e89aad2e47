"""Scores chunks of tokens with one model, or with two side by side: the forward of serving, without a scheduler.

T tokens of a step, R rows that meet the vocabulary at once, V vocab, D width
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxserve import attention
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.loading import Loaded
from jaxserve.models import find_model
from jaxserve.perplexity import Scores, first_scored
from jaxserve.weights import open_checkpoint

STEP_TOKENS = 512
"""Most tokens of a chunk in one forward."""
ROWS = 64
"""Positions whose logits are in memory at once."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenScores:
    """What a step found, by token; the last three are zeros where there is one model only."""

    logprob: Float[Array, " T"]
    reference_logprob: Float[Array, " T"]
    kl: Float[Array, " T"]
    same_top: Bool[Array, " T"]


def check_models(paths: Sequence[Path], ctx_size: int) -> None:
    """Raises ConfigError, before any weight is read, for models that cannot score such chunks, or not together."""
    configs = [find_model(open_checkpoint(path).config)[1] for path in paths]
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


class Evaluator:
    """`models`: the one to score, and where it is to be compared the reference. For one thread."""

    def __init__(self, models: Sequence[Loaded], ctx_size: int):
        assert 1 <= len(models) <= 2
        self._ctx_size, self._compares = ctx_size, len(models) == 2
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
            spec = m.model.cache_spec(m.config)
            shape = (spec.layers * pages, page_size, spec.row)
            self._caches.append(jnp.zeros(shape, m.kv_dtype, device=m.device))
        programs = next((m.programs for m in models if not m.programs.whole), models[0].programs)
        row, scalar = jax.ShapeDtypeStruct((self._tokens,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
        self._step = programs.get(
            ("evaluate", [(m.config, m.kernel.__module__) for m in models], pages, jax.tree.structure(self._params)),
            partial(_step, models, pages),
            *(self._params, self._caches, row, row, scalar, scalar),
            donate=1,
        )

    def score(self, chunk: Int[np.ndarray, " ctx"]) -> Scores:
        """The chunk's second half, each token given all before it. Raises CheckpointError where that is no number."""
        first, count = first_scored(self._ctx_size), self._ctx_size - 1
        targets = np.where(np.arange(count) >= first, chunk[1:], -1).astype(np.int32)
        parts = []
        for start in range(0, count, self._tokens):
            end = min(start + self._tokens, count)
            padding = (0, self._tokens - (end - start))
            self._caches, found = self._step(
                self._params,
                self._caches,
                np.pad(chunk[start:end].astype(np.int32), padding),
                np.pad(targets[start:end], padding, constant_values=-1),
                np.int32(start),
                np.int32(end),
            )
            parts.append(found)
        found = jax.tree.map(lambda *a: np.concatenate(a)[first:count], *parts)
        logprobs = [found.logprob, found.reference_logprob] if self._compares else [found.logprob]
        for name, values in zip(("model", "reference"), logprobs, strict=False):
            if not np.isfinite(values).all():
                raise CheckpointError(
                    f"the {name} gives log-probabilities that are no numbers: its weights are damaged"
                )
        if not self._compares:
            return Scores(-found.logprob.astype(np.float64))
        nll, reference = (-values.astype(np.float64) for values in logprobs)
        return Scores(nll, reference, found.kl.astype(np.float64), found.same_top)


def _step(
    models: Sequence[Loaded],
    pages: int,
    params: list[Any],
    caches: list[jax.Array],
    tokens: Int[Array, " T"],
    targets: Int[Array, " T"],
    start: Int[Array, ""],
    end: Int[Array, ""],
) -> tuple[list[jax.Array], TokenScores]:
    """A chunk's tokens [start, end) through all models; targets of -1 are not wanted."""
    size = tokens.shape[0]
    positions = jnp.minimum(start + jnp.arange(size, dtype=jnp.int32), end - 1)
    one = jnp.arange(pages, dtype=jnp.int32)[None]
    queries = jnp.stack([jnp.zeros_like(end), end - start])
    hidden, written = [], []
    for m, weights, cache in zip(models, params, caches, strict=True):
        distribution = jnp.array([0, 0, 1], jnp.int32)
        layers = m.model.cache_spec(m.config).layers
        attend = attention.bind(m.kernel, layers, end[None], one, queries, distribution)
        x, cache = m.model.forward(weights, m.config, tokens, positions, cache, attend)
        hidden.append(x)
        written.append(cache)

    def block(i: jax.Array, out: TokenScores) -> TokenScores:
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=i * ROWS, slice_size=ROWS)
        wanted = cut(targets)

        def compute() -> TokenScores:
            logits = [m.model.logits(w, m.config, cut(x)) for m, w, x in zip(models, params, hidden, strict=True)]
            found = token_scores(logits[0], logits[1] if len(logits) == 2 else None, wanted)
            return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, i * ROWS, 0), out, found)

        return jax.lax.cond((wanted >= 0).any(), compute, lambda: out)

    zeros = jnp.zeros((size,), jnp.float32)
    nothing = TokenScores(zeros, zeros, zeros, jnp.zeros((size,), jnp.bool_))
    return written, jax.lax.fori_loop(0, size // ROWS, block, nothing)


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
