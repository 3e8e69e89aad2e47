"""How a weight is stored and multiplied: the one place that knows a weight's format.

A weight is a dense array in the checkpoint's layout, outputs first. Quantised formats are further leaf types that
these two functions accept, so that model files do not change with the format.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def linear(x: Float[Array, "T ..."], w: Float[Array, "..."], *, out: int = 1) -> Float[Array, "T ..."]:
    """x [T, inputs...] times w [outputs..., inputs...] over all input axes -> [T, outputs...].

    `out` is how many leading axes of w are outputs. Products are summed in float32 and rounded once to x's dtype.
    Contracting the last axes needs no transposed copy, and is XLA:CPU's fastest layout at batch 1 by far.
    """
    inputs = w.ndim - out
    contract = (tuple(range(1, 1 + inputs)), tuple(range(out, w.ndim)))
    y = jax.lax.dot_general(x, w, (contract, ((), ())), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def linear_f32(x: Float[Array, "S D"], w: Float[Array, "V D"]) -> Float[Array, "S V"]:
    """x [S, D] times w [V, D] -> float32 [S, V]: the vocabulary projection, never rounded."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def embed(w: Float[Array, "V D"], tokens: Int[Array, " T"]) -> Float[Array, "T D"]:
    """Rows of an embedding table: w [V, D], tokens [T] -> [T, D]."""
    return jnp.take(w, tokens, axis=0, mode="clip")
