"""Products of each head with a matrix of its own for CPU in C++; see csrc/heads.cc."""

import jax
import numpy as np
from jaxtyping import Array, Float


def by_head(
    x: Float[Array, "T N I"], w: Float[Array, "N M R"], first: int, outputs: int, *, transposed: bool
) -> Float[Array, "T N O"]:
    """x [T, N, I] times rows [first, first + I) of each head's matrix w [N, M, R] -> [T, N, outputs], which is R; or
    with `transposed` times rows [first, first + outputs) the other way round, where I is R.

    x and w are float32 or bfloat16; the result is of x's type, summed in float32 and rounded once. A token's bits do
    not depend on other tokens. `jaxserve.native.load` must have been called.
    """
    result = jax.ShapeDtypeStruct((*x.shape[:2], outputs), x.dtype)
    return jax.ffi.ffi_call("jaxserve_by_head", result)(x, w, first=np.int64(first), transposed=transposed)
