"""Writes a step's new rows into the cache on TPU, in place, as a Pallas kernel over the tiles that hold them.

XLA's scatter does so for numbers of 16 and 32 bits, row by row. A cache of eight bits it copies whole, to tiles of
another shape and back.

T tokens, S sequences, B pages a sequence, K kv heads, H head_dim, I tiles that are written, R rows of a tile
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from kernels_pallas.ragged_paged_attention.contract import Cache, Int8Cache, joined, narrowed, quantised
from kernels_pallas.ragged_paged_attention.pieces import pieces


def write(
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"] | None,
    cache: Cache,
    kv_lens: Int[Array, " S"],
    page_table: Int[Array, "S B"],
    cu_q_lens: Int[Array, " S1"],
    total: Int[Array, ""],
    *,
    interpret: bool | pltpu.InterpretParams,
) -> Cache:
    """The cache with k and v in it; rows of no sequence are dropped."""
    tokens, (_, page, row) = k.shape[0], cache.shape
    new = joined(k, v, row)  # [T, K, 2, H]: k0|v0|k1|v1|...
    put = partial(
        _put, kv_lens=kv_lens, page_table=page_table, cu_q_lens=cu_q_lens, total=total, page=page, interpret=interpret
    )
    if not isinstance(cache, Int8Cache):
        rows = math.gcd(page, 32 // cache.dtype.itemsize)
        return put(narrowed(new, cache.dtype).reshape(tokens, row), cache, rows=rows, axis=0)
    values, scales = quantised(new)
    return Int8Cache(
        put(values.reshape(tokens, row), cache.values, rows=math.gcd(page, 32), axis=0),
        put(scales.reshape(tokens, -1).T, cache.scales, rows=page, axis=1),
    )


def _put(
    new: Shaped[Array, "T row"] | Shaped[Array, "row T"],
    cache: Shaped[Array, "P page row"] | Shaped[Array, "P row page"],
    *,
    kv_lens: Int[Array, " S"],
    page_table: Int[Array, "S B"],
    cu_q_lens: Int[Array, " S1"],
    total: Int[Array, ""],
    page: int,
    rows: int,
    axis: int,
    interpret: bool | pltpu.InterpretParams,
) -> Shaped[Array, "P ..."]:
    """Writes tokens that lie along `axis` of `new` and of a page, in tiles of `rows` of them."""
    tokens, seqs, row = new.shape[axis], kv_lens.shape[0], new.shape[1 - axis]
    used = (jnp.arange(seqs, dtype=jnp.int32) < total) & (cu_q_lens[1:] > cu_q_lens[:-1])
    shift = kv_lens - cu_q_lens[1:]  # of a position over its token
    start = cu_q_lens[:-1] + shift
    most = seqs if tokens == seqs else min(tokens, tokens // rows + 2 * seqs)
    s, tile, count = pieces(start // rows, jnp.where(used, (kv_lens - 1) // rows, -1), most)
    low = jnp.maximum(start[s] - tile * rows, 0)
    high = jnp.where(count > 0, kv_lens[s] - tile * rows, 0)  # rows [low, high) of the tile are new
    page_of = page_table[s, jnp.minimum(tile * rows // page, page_table.shape[1] - 1)]
    token = jnp.clip(tile * rows - shift[s], -rows, tokens - 1)  # of the tile's first row, if it were of this step
    # What is moved and chosen must be of 32 bits.
    wide = jnp.int32 if jnp.issubdtype(cache.dtype, jnp.integer) else jnp.float32

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
        both = jnp.concatenate([new[...].astype(wide), following[...].astype(wide)], axis=axis)  # 2 * R tokens
        moved = pltpu.roll(both, lax.rem(2 * rows - lax.rem(token[i] + rows, rows), 2 * rows), axis)
        own = lax.slice_in_dim(moved, 0, rows, axis=axis)
        r = lax.broadcasted_iota(jnp.int32, own.shape, axis)
        written = (r >= low[i]) & (r < high[i])
        out[...] = jnp.where(written, own, old[...].astype(wide)).astype(out.dtype)

    # Tokens lie as they come: a tile's rows are found in the block of R where they begin and in the next.
    ends = [(0, 0), (0, 0)]
    ends[axis] = (rows, -tokens % rows + rows)
    new = jnp.pad(new, ends)

    def at(index: Any) -> tuple[Any, Any]:
        return (index, 0) if axis == 0 else (0, index)

    tiles, block = page // rows, (rows, row) if axis == 0 else (row, rows)
    in_new = [
        pl.BlockSpec(block, lambda i, n, p, tile, t, *_, j=j: at(lax.div(t[i] + rows, rows) + j)) for j in range(2)
    ]
    in_cache = pl.BlockSpec((None, *block), lambda i, n, page_of, tile, *_: (page_of[i], *at(lax.rem(tile[i], tiles))))
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6, grid=(jnp.maximum(count, 1),), in_specs=[*in_new, in_cache], out_specs=in_cache
        ),
        out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        input_output_aliases={8: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name=f"jaxserve_{'cache' if axis == 0 else 'scale'}_write",
    )(count.reshape(1), page_of, tile, token, low, high, new, new, cache)
