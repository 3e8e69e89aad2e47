"""Attention of shares on Ampere, and elsewhere of what gpu_hopper.py does not take: a Triton kernel, until Mosaic GPU
can replace it.

I shares, Q query tokens of a share, C chunks of the heads that share a kv head, R rows of queries of a share,
L kv tokens of a block, H head_dim, V numbers of a value; see gpu.py

A latent comes to shared memory once and is both key and value. Triton wants powers of two: its 576 numbers are 512,
which are the values, and 64, and a score is the sum of two products.

JAX calls Pallas' way to Triton deprecated. jaxserve.attention takes the reference where JAX no longer has it.
"""

import operator
from functools import partial, reduce
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
    value_dim: int | None,
    out_dtype: Any,
    interpret: Any,
) -> tuple[Float[Array, "IKC R V"], Float[Array, "IKC R"]]:
    """See gpu_hopper.attend."""
    (_, slots, rows, head_dim), count = q.shape, len(shares.start)
    width = head_dim if value_dim is None else value_dim
    body = partial(
        _body, page=page, kv_heads=kv_heads, chunks=chunks, queries=queries, splits=splits, length=blocks.positions,
        window=window, causal=causal, unit=unit, cap=cap, latent=value_dim is not None,
    )  # fmt: skip
    out, sums = pl.pallas_call(
        body,
        grid=(count, slots),
        out_shape=(
            jax.ShapeDtypeStruct((count, slots, rows, width), out_dtype),
            jax.ShapeDtypeStruct((count, slots, rows), jnp.float32),
        ),
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.buffers),
        interpret=interpret,
        name=f"jaxserve_attention_{'decode' if queries == 1 else 'prefill'}",
    )(*shares, table, q, cache, *([] if scales is None else [scales]))
    return out.reshape(count * slots, rows, width), sums.reshape(count * slots, rows)


def _body(
    row_of: Any, start_of: Any, end_of: Any, first_of: Any, table: Any, q: Any, cache: Any, *rest: Any,
    page: int, kv_heads: int, chunks: int, queries: int, splits: int, length: int, window: int | None, causal: bool,
    unit: float, cap: float | None, latent: bool,
) -> None:  # fmt: skip
    """One share and chunk of heads, as gpu_hopper's. Sizes are powers of two here: what is past the true ones is 0. Of
    kv tokens that is their last one again, which weighs nothing."""
    *scales, out, sums = rest
    share, slot = pl.program_id(0), pl.program_id(1)
    rows, head_dim, value_dim = _whole(q.shape[2]), q.shape[3], out.shape[3]
    start, end, first = start_of[share], end_of[share], first_of[share]
    head = jnp.int32(0) if latent else lax.div(slot, chunks)  # of K
    parts = [(0, value_dim), (value_dim, head_dim - value_dim)]  # of a key: (first, numbers)
    parts = parts[: 1 if value_dim == head_dim else 2]
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    @pl.when(start < end)
    def attend_share() -> None:
        def queries_in(first: int, numbers: int) -> jax.Array:  # [R, numbers]
            r, h = (lax.broadcasted_iota(jnp.int32, (rows, _whole(numbers)), axis) for axis in (0, 1))
            at = q.at[lax.div(share, splits), slot, r, h + first]
            return plt.load(at, mask=(r < q.shape[2]) & (h < numbers), other=0.0)

        own = [queries_in(*part) for part in parts]
        position = first + lax.rem(lax.iota(jnp.int32, rows), queries)

        def block(i: jax.Array, carry: Any) -> Any:
            acc, best, norm = carry  # [R, H], [R], [R]
            kv = start + i * length + lax.iota(jnp.int32, length)
            read = jnp.minimum(kv, end - 1)  # what lies past may be NaN, and 0 * NaN is NaN
            number = plt.load(table.at[row_of[share] + lax.div(read, page)])  # of its page
            row_of_page = lax.rem(read, page)
            row = number * page + row_of_page

            def kept(first: int, numbers: int) -> jax.Array:  # [L, numbers]
                shape = length, _whole(numbers)
                h = lax.broadcasted_iota(jnp.int32, shape, 1)
                at = cache.at[lax.broadcast_in_dim(row, shape, [0]), head * (2 * head_dim) + first + h]
                mask, other = (None, None) if numbers == shape[1] else (h < numbers, jnp.zeros((), cache.dtype))
                return widened(plt.load(at, mask=mask, other=other), q.dtype)

            def scaled(x: jax.Array, part: int) -> jax.Array:  # [R, L]
                for of_all in scales:
                    at = of_all.at[(number * kv_heads + head) * 2 + part, row_of_page]
                    x = x * plt.load(at)[None, :]
                return x

            keys = [kept(*part) for part in parts]
            v = keys[0] if latent else kept(head_dim, head_dim)
            products = (plt.dot(a, k, trans_b=True, precision=precision) for a, k in zip(own, keys, strict=True))
            score = scaled(reduce(operator.add, products).astype(jnp.float32), 0)
            if cap is not None:
                score = 1.0 - 2.0 / (1.0 + jnp.exp2(score * cap))
            score = score * unit
            seen = jnp.broadcast_to((kv < end)[None, :], (rows, length))
            if causal:
                seen &= kv[None, :] <= position[:, None]
            if window is not None:
                seen &= kv[None, :] > position[:, None] - window
            score = jnp.where(seen, score, MASKED)
            new = jnp.maximum(best, score.max(axis=1))
            fade = jnp.exp2(best - new)
            weight = jnp.exp2(score - new[:, None])
            norm = norm * fade + weight.sum(axis=1)
            weight = scaled(weight, 1).astype(v.dtype)
            acc = acc * fade[:, None] + plt.dot(weight, v, precision=precision).astype(jnp.float32)
            return acc, new, norm

        carry = (
            jnp.zeros((rows, _whole(value_dim)), jnp.float32),
            jnp.full((rows,), MASKED, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
        )
        acc, best, norm = lax.fori_loop(0, lax.div(end - start + (length - 1), length), block, carry)
        r, h = (lax.broadcasted_iota(jnp.int32, acc.shape, axis) for axis in (0, 1))
        is_own = (r < q.shape[2]) & (h < value_dim)
        plt.store(out.at[share, slot, r, h], (acc / norm[:, None]).astype(out.dtype), mask=is_own)
        row = lax.iota(jnp.int32, rows)
        plt.store(sums.at[share, slot, row], best + jnp.log2(norm), mask=row < q.shape[2])


def _whole(numbers: int) -> int:
    """The power of two that Triton wants where there are so many."""
    return max(LEAST_ROWS, 1 << (numbers - 1).bit_length())


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
