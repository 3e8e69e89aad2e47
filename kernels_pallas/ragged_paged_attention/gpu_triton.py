"""Attention of shares on Ampere, and elsewhere of what gpu_hopper.py does not take: a Triton kernel, until Mosaic GPU
can replace it.

I shares, Q query tokens of a share, C chunks of the heads that share a kv head, R rows of queries of a share,
L kv tokens of a block, H head_dim; see gpu.py

JAX calls Pallas' way to Triton deprecated. jaxserve.attention takes the reference where JAX no longer has it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int, Shaped

from kernels_pallas.ragged_paged_attention.gpu_shares import MASKED, Shares
from kernels_pallas.ragged_paged_attention.tuning.gpu import GpuBlocks

LEAST_ROWS = 16
"""That its products take."""


def attend(
    shares: Shares,
    q: Float[Array, "X KC R H"],
    *,
    table: Int[Array, " SB"],
    cache: Shaped[Array, "rows row"],
    scales: Float[Array, "PK2 page"] | None,
    page: int,
    kv_heads: int,
    chunks: int,
    queries: int,
    splits: int,
    blocks: GpuBlocks,
    unit: float,
    cap: float | None,
    window: int | None,
    causal: bool,
    out_dtype: Any,
    interpret: Any,
) -> tuple[Float[Array, "IKC R H"], Float[Array, "IKC R"]]:
    """See gpu_hopper.attend."""
    (_, slots, rows, head_dim), count = q.shape, len(shares.start)
    body = partial(
        _body, page=page, kv_heads=kv_heads, chunks=chunks, queries=queries, splits=splits, length=blocks.positions,
        window=window, causal=causal, unit=unit, cap=cap,
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
    )(*shares, table, q, cache, *([] if scales is None else [scales]))
    return out.reshape(count * slots, rows, head_dim), sums.reshape(count * slots, rows)


def _body(
    row_of: Any, start_of: Any, end_of: Any, first_of: Any, table: Any, q: Any, cache: Any, *rest: Any,
    page: int, kv_heads: int, chunks: int, queries: int, splits: int, length: int, window: int | None, causal: bool,
    unit: float, cap: float | None,
) -> None:  # fmt: skip
    """One share and chunk of heads, as gpu_hopper's. Sizes are powers of two here: what is past the true ones is 0."""
    *scales, out, sums = rest
    share, slot = pl.program_id(0), pl.program_id(1)
    rows, width = (max(LEAST_ROWS, 1 << (n - 1).bit_length()) for n in q.shape[2:])
    head_dim = q.shape[3]
    r, h = (lax.broadcasted_iota(jnp.int32, (rows, width), axis) for axis in (0, 1))
    is_own = (r < q.shape[2]) & (h < head_dim)
    start, end, first = start_of[share], end_of[share], first_of[share]
    head = lax.div(slot, chunks)  # of K
    lane = head * (2 * head_dim) + lax.broadcasted_iota(jnp.int32, (length, width), 1)
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
            number = plt.load(table.at[row_of[share] + lax.div(kv, page)], mask=there, other=0)  # of its page
            row_of_page = lax.rem(kv, page)
            row = lax.broadcast_in_dim(number * page + row_of_page, (length, width), [0])
            own_rows = lax.broadcast_in_dim(there, (length, width), [0]) & is_lane

            def kept(part: int) -> jax.Array:  # [L, H]
                at = cache.at[row, lane + part * head_dim]
                return widened(plt.load(at, mask=own_rows, other=jnp.zeros((), cache.dtype)), q.dtype)

            def scaled(x: jax.Array, part: int) -> jax.Array:  # [R, L]
                for of_all in scales:
                    at = of_all.at[(number * kv_heads + head) * 2 + part, row_of_page]
                    x = x * plt.load(at, mask=there, other=0.0)[None, :]
                return x

            k, v = kept(0), kept(1)
            score = scaled(plt.dot(own, k, trans_b=True, precision=precision).astype(jnp.float32), 0)
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
            weight = scaled(weight, 1).astype(v.dtype)
            acc = acc * fade[:, None] + plt.dot(weight, v, precision=precision).astype(jnp.float32)
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


def widened(kept: Shaped[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """What a cache keeps, exactly, as numbers of the queries' type.

    Ampere has no instruction for E4M3. Seven bits further up, and without the copy of the sign that is between, they
    are float16 numbers, whose exponents count from 8 less; but for NaN, which is all ones. They are multiplied in
    float32, which has room for the smallest.
    """
    if kept.dtype != jnp.float8_e4m3fn:
        return kept.astype(dtype)
    bits = (lax.bitcast_convert_type(kept, jnp.int8).astype(jnp.int16) << 7) & ~0x4000
    numbers = lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * 256.0
    return jnp.where((bits & 0x7FFF) == (0x7F << 7), jnp.nan, numbers).astype(dtype)
