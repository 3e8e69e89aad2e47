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
    w = dequantised(codes if inputs_first else codes.T, scales, minima)
    # What comes before must not be moved behind the rounding, nor the rounding be left out.
    w = jax.lax.reduce_precision(w, *_bits(x.dtype)).astype(x.dtype)
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(dtype or x.dtype)


def dequantised(
    codes: Int[Array, "K N"], scales: Float[Array, "G N"], minima: Float[Array, "G N"] | None
) -> Float[Array, "K N"]:
    """code * scale - minimum in float32, inputs first."""
    (inputs, outputs), groups = codes.shape, scales.shape[0]
    w = codes.astype(jnp.float32).reshape(groups, inputs // groups, outputs) * scales[:, None, :]
    if minima is not None:
        w -= minima[:, None, :]
    return w.reshape(inputs, outputs)


def _bits(dtype: jnp.dtype) -> tuple[int, int]:
    found = jnp.finfo(dtype)
    return found.nexp, found.nmant
