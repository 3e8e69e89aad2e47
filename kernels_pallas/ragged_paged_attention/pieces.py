"""Lists the blocks of several sequences one after the other: what a kernel's grid runs over."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def pieces(
    first: Int[Array, " S"], last: Int[Array, " S"], most: int
) -> tuple[Int[Array, " most"], Int[Array, " most"], Int[Array, ""]]:
    """Lists first[s] .. last[s] for every s: the s and the number of each, and how many there are, at most `most`.

    What stands past their end is in range and means nothing.
    """
    seqs = first.shape[0]
    counts = jnp.maximum(last - first + 1, 0)
    ends = jnp.cumsum(counts)
    i = jnp.minimum(jnp.arange(most, dtype=jnp.int32), jnp.maximum(ends[-1] - 1, 0))
    s = jnp.minimum(jnp.searchsorted(ends, i, side="right", method="compare_all").astype(jnp.int32), seqs - 1)
    return s, jnp.maximum(first[s] + i - (ends - counts)[s], 0), ends[-1]
