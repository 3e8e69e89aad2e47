"""Root-mean-square norm and layer norm for CPU in C++; see csrc/norm.cc."""

import jax
import numpy as np
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "T D"], weight: Float[Array, " D"], eps: float, *, around_one: bool = False
) -> Float[Array, "T D"]:
    """x [T, D] over its root mean square, times weight [D], in x's type; `jaxserve.native.load` must have been called.

    With `around_one` times 1 + weight, both in float32, and only that is rounded to x's type.
    A row of the result depends on its own row of x alone, bit for bit.
    """
    call = jax.ffi.ffi_call("jaxserve_rms_norm", jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, weight, eps=np.float32(eps), around_one=around_one)


def layer_norm(
    x: Float[Array, "T D"], weight: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "T D"]:
    """x [T, D] less its mean, over its standard deviation, times weight [D] plus bias [D]; float32, rounded once.

    `jaxserve.native.load` must have been called. A row depends on its own row of x alone, bit for bit.
    """
    call = jax.ffi.ffi_call("jaxserve_layer_norm", jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, weight, bias, eps=np.float32(eps))
