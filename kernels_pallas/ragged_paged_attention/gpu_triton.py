"""Attention of shares on Ampere, and of float32 on any GPU: a Triton kernel, until Mosaic GPU can replace it.

I shares, Q query tokens of a share, C chunks of the heads that share a kv head, R rows of queries of a share,
L kv tokens of a block, H head_dim; see gpu.py

JAX calls Pallas' way to Triton deprecated. jaxserve.attention takes the reference where JAX no longer has it.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from kernels_pallas.ragged_paged_attention.tuning.gpu import GpuBlocks

LEAST_ROWS = 16
"""That its products take."""
MASKED = -1e30
"""A score that no score is below, and from which another one can be subtracted."""


def attend(
    shares: Any,
    q: Float[Array, "X KC R H"],
    *,
    table: Int[Array, " SB"],
    cache: Float[Array, "rows row"],
    page: int,
    kv_heads: int,
    chunks: int,
    queries: int,
    splits: int,
    blocks: GpuBlocks,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    causal: bool,
    out_dtype: Any,
    interpret: Any,
) -> tuple[Float[Array, "IKC R H"], Float[Array, "IKC R"]]:
    """See gpu_hopper.attend."""
    (_, slots, rows, head_dim), count = q.shape, len(shares.start)
    body = partial(
        _body, page=page, chunks=chunks, queries=queries, splits=splits, length=blocks.positions, window=window,
        causal=causal, unit=(scale if soft_cap is None else soft_cap) * math.log2(math.e),
        cap=None if soft_cap is None else 2.0 * math.log2(math.e) * scale / soft_cap,
    )  # fmt: skip
    out, sums = pl.pallas_call(
        body,
        grid=(count, slots),
        out_shape=(
            jax.ShapeDtypeStruct((count, slots, rows, head_dim), out_dtype),
            jax.ShapeDtypeStruct((count, slots, rows), jnp.float32),
        ),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=blocks.buffers),
        interpret=interpret,
        name=f"jaxserve_attention_{'decode' if queries == 1 else 'prefill'}",
    )(*shares, table, q, cache)
    return out.reshape(count * slots, rows, head_dim), sums.reshape(count * slots, rows)


def _body(
    row_of: Any, start_of: Any, end_of: Any, first_of: Any, table: Any, q: Any, cache: Any, out: Any, sums: Any, *,
    page: int, chunks: int, queries: int, splits: int, length: int, window: int | None, causal: bool, unit: float,
    cap: float | None,
) -> None:  # fmt: skip
    """One share and chunk of heads, as gpu_hopper's. Sizes are powers of two here: what is past the true ones is 0."""
    share, slot = pl.program_id(0), pl.program_id(1)
    rows, width = (max(LEAST_ROWS, 1 << (n - 1).bit_length()) for n in q.shape[2:])
    head_dim = q.shape[3]
    r, h = (lax.broadcasted_iota(jnp.int32, (rows, width), axis) for axis in (0, 1))
    is_own = (r < q.shape[2]) & (h < head_dim)
    start, end, first = start_of[share], end_of[share], first_of[share]
    lane = lax.div(slot, chunks) * (2 * head_dim) + lax.broadcasted_iota(jnp.int32, (length, width), 1)
    is_lane = lax.broadcasted_iota(jnp.int32, (length, width), 1) < head_dim
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    @pl.when(start < end)
    def attend_share() -> None:
        own = plt.load(q.at[lax.div(share, splits), slot, r, h], mask=is_own, other=0.0)
        position = first + lax.rem(lax.broadcasted_iota(jnp.int32, (rows, length), 0), queries)

        def block(i: jax.Array, carry: Any) -> Any:
            acc, best, norm = carry  # [R, H], [R], [R]
            kv = start + i * length + lax.iota(jnp.int32, length)
            there = kv < end
            pages = plt.load(table.at[row_of[share] + lax.div(kv, page)], mask=there, other=0)
            row = lax.broadcast_in_dim(pages * page + lax.rem(kv, page), (length, width), [0])
            own_rows = lax.broadcast_in_dim(there, (length, width), [0]) & is_lane
            k = plt.load(cache.at[row, lane], mask=own_rows, other=0.0)  # [L, H]
            v = plt.load(cache.at[row, lane + head_dim], mask=own_rows, other=0.0)
            score = plt.dot(own, k, trans_b=True, precision=precision).astype(jnp.float32)
            if cap is not None:
                score = 1.0 - 2.0 / (1.0 + jnp.exp2(score * cap))
            score = score * unit
            kv = lax.broadcast_in_dim(kv, (rows, length), [1])
            seen = kv < end
            if causal:
                seen &= kv <= position
            if window is not None:
                seen &= kv > position - window
            score = jnp.where(seen, score, MASKED)
            new = jnp.maximum(best, score.max(axis=1))
            fade = jnp.exp2(best - new)
            weight = jnp.exp2(score - new[:, None])
            norm = norm * fade + weight.sum(axis=1)
            acc = acc * fade[:, None] + plt.dot(weight.astype(v.dtype), v, precision=precision).astype(jnp.float32)
            return acc, new, norm

        carry = (
            jnp.zeros((rows, width), jnp.float32),
            jnp.full((rows,), MASKED, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
        )
        acc, best, norm = lax.fori_loop(0, lax.div(end - start + (length - 1), length), block, carry)
        plt.store(out.at[share, slot, r, h], (acc / norm[:, None]).astype(out.dtype), mask=is_own)
        row = lax.iota(jnp.int32, rows)
        plt.store(sums.at[share, slot, row], best + jnp.log2(norm), mask=row < q.shape[2])
