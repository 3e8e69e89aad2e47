"""Products with dense weights for CPU in C++; see csrc/linear.cc."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

WEIGHT_TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def linear(x: Float[Array, "T K"], w: Float[Array, "N K"], dtype: DTypeLike) -> Float[Array, "T N"]:
    """x [T, K] times w [N, K] -> [T, N] of `dtype`, summed in float32; `jaxserve.native.load` must have been called.

    A row of the result depends on its own row of x alone, bit for bit.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), dtype)
    return jax.ffi.ffi_call("jaxserve_linear", shape)(x, w)
