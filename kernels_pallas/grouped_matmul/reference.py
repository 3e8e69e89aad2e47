"""The grouped product in plain XLA, one matrix after the other: any platform, the oracle of every other body."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul.contract import Quantised, Weights, validate
from kernels_pallas.grouped_matmul.groups import bounds
from kernels_pallas.quantised_matmul.reference import rounded


def grouped_matmul(
    x: Float[Array, "R I"], w: Weights, sizes: Int[Array, " E"], first: Int[Array, ""] | None = None
) -> Float[Array, "R O"]:
    """See contract.py. Every row is multiplied by every matrix that has rows; the others are not read."""
    validate(x, w, sizes, first)
    (begin, end), rows = bounds(sizes, first), jnp.arange(x.shape[0])

    def multiply(e: jax.Array, y: jax.Array) -> jax.Array:
        if isinstance(w, Quantised):
            count = x.shape[1] // w.group
            scales, minima = w.scales[e, :count], None if w.minima is None else w.minima[e, :count]
            own = rounded(w.codes[e], scales, minima, x.dtype).T
        else:
            own = w[e]
        product = jax.lax.dot_general(x, own, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        its = (rows >= begin[e]) & (rows < end[e])
        return jnp.where(its[:, None], product, y)

    def step(e: jax.Array, y: jax.Array) -> jax.Array:
        skipped: jax.Array = jax.lax.cond(sizes[e] > 0, multiply, lambda e, y: y, e, y)
        return skipped

    none = jnp.zeros((x.shape[0], w.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, w.shape[0], step, none).astype(x.dtype)
