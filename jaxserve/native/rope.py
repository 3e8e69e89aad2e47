"""Rotary position embedding for CPU in C++; see csrc/rope.cc."""

import jax
from jaxtyping import Array, Float


def rotate(x: Float[Array, "T N H"], cos: Float[Array, "T R"], sin: Float[Array, "T R"]) -> Float[Array, "T N H"]:
    """The pairs (i, i + R) of every head of x [T, N, H], turned by angles of these float32 cosines and sines [T, R].

    What lies behind the first 2 R of H stays. Computed in float32 and rounded once; `jaxserve.native.load` must have
    been called.
    """
    return jax.ffi.ffi_call("jaxserve_rotate", jax.ShapeDtypeStruct(x.shape, x.dtype))(x, cos, sin)
