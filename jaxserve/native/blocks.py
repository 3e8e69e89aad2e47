"""Products with quantised weights for CPU in C++, and the layout that they want their weights in; see csrc/blocks.h."""

import ctypes

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from jaxserve import native
from jaxserve.formats import Format
from jaxserve.native.memory import aligned


def pack(format: Format, rows: np.ndarray, depth: int) -> np.ndarray:
    """`rows` of whole blocks, uint8 [N, row_bytes] for weights [N, depth], as uint8 panels of 16 rows each.

    `jaxserve.native.load` must have been called, as for all of this module. Threads may pack at once.
    """
    outputs, code, row_bytes = rows.shape[0], ctypes.c_int64(format.code), format.row_bytes(depth)
    assert format.quantised and rows.dtype == np.uint8 and rows.shape[1] == row_bytes, f"{format.name} {rows.shape}"
    rows = np.ascontiguousarray(rows)
    panels = aligned((panel_bytes(format, outputs, depth),), np.dtype(np.uint8))
    native.handlers().jaxserve_pack_blocks(
        code,
        ctypes.c_void_p(rows.ctypes.data),
        ctypes.c_int64(outputs),
        ctypes.c_int64(depth),
        ctypes.c_int64(row_bytes),
        ctypes.c_void_p(panels.ctypes.data),
    )
    return panels


def panel_bytes(format: Format, outputs: int, depth: int) -> int:
    """Bytes of the panels of weights [outputs, depth]."""
    library = native.handlers()
    library.jaxserve_panels_size.restype = ctypes.c_int64
    size: int = library.jaxserve_panels_size(
        ctypes.c_int64(format.code), ctypes.c_int64(outputs), ctypes.c_int64(depth)
    )
    return size


def linear(
    x: Float[Array, "T K"], panels: UInt8[Array, " B"], format: Format, outputs: int, dtype: DTypeLike
) -> Float[Array, "T N"]:
    """x [T, K] times a packed w of `outputs` rows -> [T, outputs] of `dtype`, float32 or bfloat16.

    x is rounded to bytes, 32 of a row under one scale, and multiplied in whole numbers. For Q2_K to Q6_K on processors
    with AMX it is 128 of a row, and scales of weights are rounded to 2^-15 of the largest of 256 weights. A row of the
    result depends on its own row of x alone, bit for bit. Rows of zeros at the end cost nothing.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], outputs), dtype)
    return jax.ffi.ffi_call("jaxserve_linear_blocks", shape)(x, panels, format=np.int64(format.code))


def grouped_linear(
    x: Float[Array, "R K"],
    panels: UInt8[Array, "E B"],
    sizes: Int[Array, " E"],
    format: Format,
    outputs: int,
    dtype: DTypeLike,
) -> Float[Array, "R N"]:
    """The same with E packed matrices: the first sizes[0] rows of x by the first one, and so on up to the last row.

    Only the matrices that have rows are read, and of a matrix's rows those of zeros at the end cost nothing. Sizes that
    do not add up to R are an error when the program runs.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], outputs), dtype)
    return jax.ffi.ffi_call("jaxserve_grouped_linear_blocks", shape)(x, panels, sizes, format=np.int64(format.code))


def embed(
    panels: UInt8[Array, " B"], tokens: Int[Array, " T"], format: Format, outputs: int, depth: int, dtype: DTypeLike
) -> Float[Array, "T K"]:
    """Rows `tokens` [T] of a packed w [outputs, depth] -> [T, depth] of `dtype`.

    Ids past the end take the last row; those below 0 are nobody's and take zeros.
    """
    shape = jax.ShapeDtypeStruct((tokens.shape[0], depth), dtype)
    call = jax.ffi.ffi_call("jaxserve_embed_blocks", shape)
    return call(panels, tokens, format=np.int64(format.code), outputs=np.int64(outputs))
