"""Products with dense weights for CPU in C++, and the layout that they want their weights in; see csrc/linear.cc."""

import ctypes

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxserve import native
from jaxserve.native.memory import aligned

PANEL = 16
"""Rows of a weight that lie side by side."""
WEIGHT_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 30}
"""What weights may be of, and ggml's codes for it."""


def pack(w: np.ndarray) -> np.ndarray:
    """w [N, K] of one of WEIGHT_TYPES -> its panels of `panels_shape`, filled up with zeros.

    `jaxserve.native.load` must have been called, as for all of this module. Threads may pack at once.
    """
    assert w.ndim == 2 and w.dtype in WEIGHT_TYPES, f"{w.dtype} {w.shape}"
    w = np.ascontiguousarray(w)
    panels = aligned(panels_shape(w.shape[0], w.shape[1], w.dtype), w.dtype)
    native.handlers().jaxserve_pack(
        ctypes.c_void_p(w.ctypes.data),
        ctypes.c_int64(w.shape[0]),
        ctypes.c_int64(w.shape[1]),
        ctypes.c_int64(WEIGHT_TYPES[w.dtype]),
        ctypes.c_void_p(panels.ctypes.data),
    )
    return panels


def panels_shape(outputs: int, depth: int, dtype: DTypeLike) -> tuple[int, int, int]:
    """[N / 16, K, 16] of weights [outputs, depth]; K is more than `depth` where the processor takes several at once.

    Of bfloat16 alone the loaded library has to be asked: other types are known without one.
    """
    wide = depth
    if np.dtype(dtype) == ml_dtypes.bfloat16:
        function = native.handlers().jaxserve_panel_depth
        function.restype = ctypes.c_int64
        wide = function(ctypes.c_int64(WEIGHT_TYPES[np.dtype(dtype)]), ctypes.c_int64(depth))
    return -(-outputs // PANEL), wide, PANEL


def linear(
    x: Float[Array, "T K"], panels: Float[Array, "P K 16"], outputs: int, dtype: DTypeLike
) -> Float[Array, "T N"]:
    """x [T, K] times a packed w of `outputs` rows -> [T, outputs] of `dtype`, float32 or bfloat16, summed in float32.

    Where the processor multiplies weights of bfloat16 by such numbers, rows of float32 are rounded: to 16 bits of
    mantissa with AMX, to bfloat16 with AVX512-BF16. A row of the result depends on its own row of x alone, bit for bit.
    Rows of zeros at the end cost nothing.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], outputs), dtype)
    return jax.ffi.ffi_call("jaxserve_linear", shape)(x, panels)


def grouped_linear(
    x: Float[Array, "R K"], panels: Float[Array, "E P K 16"], sizes: Int[Array, " E"], outputs: int, dtype: DTypeLike
) -> Float[Array, "R N"]:
    """The same with E packed matrices: the first sizes[0] rows of x by the first one, and so on up to the last row.

    Only the matrices that have rows are read, and of a matrix's rows those of zeros at the end cost nothing. Sizes that
    do not add up to R are an error when the program runs.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], outputs), dtype)
    return jax.ffi.ffi_call("jaxserve_grouped_linear", shape)(x, panels, sizes)


def embed(
    panels: Float[Array, "P K 16"], tokens: Int[Array, " T"], outputs: int, depth: int, dtype: DTypeLike
) -> Float[Array, "T D"]:
    """Rows `tokens` [T] of a packed w [outputs, depth] -> [T, depth] of `dtype`.

    Ids past the end take the last row; those below 0 are nobody's and take zeros.
    """
    shape = jax.ShapeDtypeStruct((tokens.shape[0], depth), dtype)
    return jax.ffi.ffi_call("jaxserve_embed", shape)(panels, tokens, outputs=np.int64(outputs))
