"""The quantised product in plain XLA: any platform, the oracle of every other body. Makes the matrix first."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels_pallas.quantised_matmul.contract import group_of


def quantised_matmul(
    x: Float[Array, "T K"],
    codes: Int[Array, "A B"],
    scales: Float[Array, "G N"],
    minima: Float[Array, "G N"] | None = None,
    *,
    inputs_first: bool,
    dtype: DTypeLike | None = None,
) -> Float[Array, "T N"]:
    """See contract.py."""
    group_of(x, codes, scales, minima, inputs_first=inputs_first)
    w = rounded(codes if inputs_first else codes.T, scales, minima, x.dtype)
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(dtype or x.dtype)


def rounded(
    codes: Int[Array, "K N"], scales: Float[Array, "G N"], minima: Float[Array, "G N"] | None, dtype: jnp.dtype
) -> Float[Array, "K N"]:
    """The weights that rows of `dtype` are multiplied by, inputs first."""
    found = jnp.finfo(dtype)
    # What comes before must not be moved behind the rounding, nor the rounding be left out.
    return jax.lax.reduce_precision(dequantised(codes, scales, minima), found.nexp, found.nmant).astype(dtype)


def dequantised(
    codes: Int[Array, "K N"], scales: Float[Array, "G N"], minima: Float[Array, "G N"] | None
) -> Float[Array, "K N"]:
    """code * scale - minimum in float32, inputs first."""
    (inputs, outputs), groups = codes.shape, scales.shape[0]
    w = codes.astype(jnp.float32).reshape(groups, inputs // groups, outputs) * scales[:, None, :]
    if minima is not None:
        w -= minima[:, None, :]
    return w.reshape(inputs, outputs)
