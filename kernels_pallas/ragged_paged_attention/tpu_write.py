"""Writes a step's new rows into the cache on TPU, in place, as a Pallas kernel over the tiles that hold them.

XLA's scatter does so for numbers of 16 and 32 bits, row by row. A cache of eight bits it copies whole, to tiles of
another shape and back.

T tokens, S sequences, B pages a sequence, K kv heads, H head_dim, I tiles that are written, R rows of a tile
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.ragged_paged_attention.pieces import pieces


def write(
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    cache: Float[Array, "P page row"],
    kv_lens: Int[Array, " S"],
    page_table: Int[Array, "S B"],
    cu_q_lens: Int[Array, " S1"],
    total: Int[Array, ""],
    *,
    interpret: bool | pltpu.InterpretParams,
) -> Float[Array, "P page row"]:
    """The cache with k and v in it; rows of no sequence are dropped."""
    tokens, seqs, (_, page, row) = k.shape[0], kv_lens.shape[0], cache.shape
    rows = math.gcd(page, 32 // cache.dtype.itemsize)
    used = (jnp.arange(seqs, dtype=jnp.int32) < total) & (cu_q_lens[1:] > cu_q_lens[:-1])
    shift = kv_lens - cu_q_lens[1:]  # of a position over its token
    start = cu_q_lens[:-1] + shift
    most = seqs if tokens == seqs else min(tokens, tokens // rows + 2 * seqs)
    s, tile, count = pieces(start // rows, jnp.where(used, (kv_lens - 1) // rows, -1), most)
    low = jnp.maximum(start[s] - tile * rows, 0)
    high = jnp.where(count > 0, kv_lens[s] - tile * rows, 0)  # rows [low, high) of the tile are new
    page_of = page_table[s, jnp.minimum(tile * rows // page, page_table.shape[1] - 1)]
    token = jnp.clip(tile * rows - shift[s], -rows, tokens - 1)  # of the tile's first row, if it were of this step

    def body(
        count: Any,
        page_of: Any,
        tile: Any,
        token: Any,
        low: Any,
        high: Any,
        new: Any,
        following: Any,
        old: Any,
        out: Any,
    ) -> None:
        i = pl.program_id(0)
        both = jnp.concatenate([new[...].astype(jnp.float32), following[...].astype(jnp.float32)])  # [2 * R, row]
        own = pltpu.roll(both, lax.rem(2 * rows - lax.rem(token[i] + rows, rows), 2 * rows), 0)[:rows]
        r = lax.broadcasted_iota(jnp.int32, (rows, row), 0)
        written = (r >= low[i]) & (r < high[i])
        out[...] = jnp.where(written, own, old[...].astype(jnp.float32)).astype(out.dtype)

    # Tokens lie as they come: a tile's rows are found in the block of R where they begin and in the next.
    new = jnp.stack([k, v], axis=2).reshape(tokens, row).astype(cache.dtype)  # [T, k0|v0|k1|v1|...]
    new = jnp.pad(new, ((rows, -tokens % rows + rows), (0, 0)))
    tiles = page // rows
    in_new = [
        pl.BlockSpec((rows, row), lambda i, n, p, tile, t, *_, j=j: (lax.div(t[i] + rows, rows) + j, 0))
        for j in range(2)
    ]
    in_cache = pl.BlockSpec((None, rows, row), lambda i, n, page_of, tile, *_: (page_of[i], lax.rem(tile[i], tiles), 0))
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6, grid=(jnp.maximum(count, 1),), in_specs=[*in_new, in_cache], out_specs=in_cache
        ),
        out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        input_output_aliases={8: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="jaxserve_cache_write",
    )(count.reshape(1), page_of, tile, token, low, high, new, new, cache)
