"""How a weight is stored and multiplied: the one place that knows a weight's format.

A weight is a dense array in the checkpoint's layout, outputs first. Quantised formats are further leaf types that
these two functions accept, so that model files do not change with the format.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxserve import native
from jaxserve.native.linear import WEIGHT_TYPES
from jaxserve.native.linear import linear as native_linear


def linear(x: Float[Array, "T ..."], w: Float[Array, "..."], *, out: int = 1) -> Float[Array, "T ..."]:
    """x [T, inputs...] times w [outputs..., inputs...] over all input axes -> [T, outputs...].

    `out` is how many leading axes of w are outputs. Products are summed in float32 and rounded once to x's dtype.
    Contracting the last axes needs no transposed copy, and is XLA:CPU's fastest layout at batch 1 by far. On CPU the
    C++ kernel does it where it is loaded.
    """
    outputs = w.shape[:out]
    y = _product(x.reshape(x.shape[0], -1), w.reshape(math.prod(outputs), -1), x.dtype)
    return y.reshape(x.shape[0], *outputs)


def linear_f32(x: Float[Array, "S D"], w: Float[Array, "V D"]) -> Float[Array, "S V"]:
    """x [S, D] times w [V, D] -> float32 [S, V]: the vocabulary projection, never rounded."""
    return _product(x, w, jnp.float32)


def _product(x: Float[Array, "T I"], w: Float[Array, "O I"], dtype: DTypeLike) -> Float[Array, "T O"]:
    def xla(x: jax.Array, w: jax.Array) -> jax.Array:
        y = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return y.astype(dtype)

    if native.loaded() and w.dtype in WEIGHT_TYPES:
        return jax.lax.platform_dependent(x, w, cpu=lambda x, w: native_linear(x, w, dtype), default=xla)
    return xla(x, w)


def embed(w: Float[Array, "V D"], tokens: Int[Array, " T"]) -> Float[Array, "T D"]:
    """Rows of an embedding table: w [V, D], tokens [T] -> [T, D]."""
    return jnp.take(w, tokens, axis=0, mode="clip")
