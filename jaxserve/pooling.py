"""From the hidden states of a step to one vector a sequence; what is done to that vector is embedding.py's."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.request import PoolingKind


def pool(hidden: Float[Array, "T D"], cu_q_lens: Int[Array, " S1"], kind: PoolingKind) -> Float[Array, "S D"]:
    """The pooled hidden state of each sequence, float32 [S, D]; of a row of no sequence anything finite.

    Sequence s has the tokens [cu_q_lens[s], cu_q_lens[s + 1]). `last` takes that of its last token in this step, which
    may be a prompt's last piece; `mean` and `cls`, the mean of all and the first one, want prompts whole. On CPU a
    sequence's result does not depend on the others, bit for bit.
    """
    size, seqs = hidden.shape[0], cu_q_lens.shape[0] - 1
    begin, end = cu_q_lens[:-1], cu_q_lens[1:]
    if kind != "mean":
        rows = begin if kind == "cls" else end - 1
        return hidden[jnp.clip(rows, 0, size - 1)].astype(jnp.float32)
    t = jnp.arange(size, dtype=jnp.int32)
    sequence = jnp.searchsorted(end, t, side="right").astype(jnp.int32)  # [T], S where there is none

    def in_order(hidden: jax.Array, sequence: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(hidden, sequence, seqs + 1, indices_are_sorted=True)[:seqs]

    def product(hidden: jax.Array, sequence: jax.Array) -> jax.Array:
        chosen = (jnp.arange(seqs, dtype=jnp.int32)[:, None] == sequence[None, :]).astype(jnp.float32)  # [S, T]
        return jnp.dot(chosen, hidden, precision=jax.lax.Precision.HIGHEST)

    sums = jax.lax.platform_dependent(hidden.astype(jnp.float32), sequence, cpu=in_order, default=product)
    return sums / jnp.maximum(end - begin, 1).astype(jnp.float32)[:, None]
