"""Attention of shares on Hopper: a Mosaic GPU kernel, one warpgroup for each share and chunk of heads.

I shares, Q query tokens of a share, C chunks of the heads that share a kv head, R rows of queries of a share,
L kv tokens of a block, H head_dim; see gpu.py

Pages come to shared memory by the copy engine (TMA), several blocks ahead, and are multiplied from there by the tensor
cores (wgmma), which take 64 rows at a time: rows past R are whatever the memory held, and no one reads theirs. The
online softmax is that of FlashAttention-2 (Dao, 2023), kept in float32, its exponents to the base of 2.

The tensor cores take the right one of two matrices from shared memory, of the left one's type. Blocks of a cache of 8
bits come as they are, which is what saves time; one after the other goes through registers to a block of the queries'
type. Scales of an Int8Cache multiply scores and weights.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from kernels_pallas.ragged_paged_attention.gpu_shares import MASKED, Shares
from kernels_pallas.ragged_paged_attention.tuning.gpu import ROWS, GpuBlocks

WIDE = plgpu.Layout.WGMMA_UPCAST_2X
"""How a block lies in registers while it is made wider: four neighbours to a thread, a word of bytes."""


def takes(capability: str, dtype: Any, kept: Any, head_dim: int, page: int, value_dim: int | None = None) -> bool:
    """Whether this is the body for queries of `dtype` and a cache of `kept`; `value_dim` is given for latents.

    Blackwell has other instructions, and these multiply no float32. The narrowest tiles are 32 bytes wide, and the copy
    engine writes scales to multiples of 128 bytes. One warpgroup has no registers for the sums of 64 rows of 512.
    """
    if value_dim is not None:
        return False
    fits = head_dim * kept.itemsize % 32 == 0 and (kept != jnp.int8 or page >= 32)
    return capability.startswith("9.") and dtype in (jnp.bfloat16, jnp.float16) and fits


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
    """Attention of each share by itself, and the logarithm to the base of 2 of the sum of its exponentials.

    Shares X * splits to X * splits + splits - 1 have the X-th queries. Rows of a share that is none are not written.
    `unit` and `cap` are what makes a product of q and k an exponent of 2.
    """
    (_, slots, rows, head_dim), count = q.shape, len(shares.start)
    length, buffers = blocks.positions, blocks.buffers

    def held(shape: tuple[int, ...], dtype: Any) -> Any:
        """Shared memory in the widest tiles that divide a row: of 128, 64 or 32 bytes, as much as is swizzled."""
        size = jnp.dtype(dtype).itemsize
        swizzle = math.gcd(shape[-1] * size, 128)
        transforms = plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    boxes = length // min(page, length)  # that a block is copied in
    scratch: dict[str, Any] = dict(
        q_held=held((ROWS, head_dim), q.dtype),
        k_held=held((buffers, length, head_dim), cache.dtype),
        v_held=held((buffers, length, head_dim), cache.dtype),
        q_here=plgpu.Barrier(),
        k_here=plgpu.Barrier(num_arrivals=boxes * (1 if scales is None else 3), num_barriers=buffers),
        v_here=plgpu.Barrier(num_arrivals=boxes, num_barriers=buffers),
    )
    if cache.dtype != q.dtype:
        scratch["widened"] = held((length, head_dim), q.dtype)
    if scales is not None:
        scratch["scales_held"] = plgpu.SMEM((buffers, 2, length), jnp.float32)
    if out_dtype != q.dtype:
        scratch["result"] = held((ROWS, head_dim), out_dtype)
    if interpret:  # whose wgmma takes operands from shared memory only
        scratch["weights"] = held((ROWS, length), q.dtype)
    body = partial(
        _body, page=page, kv_heads=kv_heads, chunks=chunks, queries=queries, splits=splits, slots=slots, rows=rows,
        window=window, causal=causal, unit=unit, cap=cap,
    )  # fmt: skip
    out, sums = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((count * slots * rows, head_dim), out_dtype),
            jax.ShapeDtypeStruct((count * slots * ROWS,), jnp.float32),
        ),
        grid=(count, slots),
        grid_names=("share", "slot"),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name=f"jaxserve_attention_{'decode' if queries == 1 else 'prefill'}",
        **(dict(interpret=interpret) if interpret else {}),
    )(*shares, table, q.reshape(-1, head_dim), cache, *([] if scales is None else [scales]))
    return out.reshape(count * slots, rows, head_dim), sums.reshape(count * slots, ROWS)[:, :rows]


def _body(
    row_of: Any, start_of: Any, end_of: Any, first_of: Any, table: Any, q: Any, cache: Any, *rest: Any,
    q_held: Any, k_held: Any, v_held: Any, q_here: Any, k_here: Any, v_here: Any,
    widened: Any = None, scales_held: Any = None, result: Any = None, weights: Any = None,
    page: int, kv_heads: int, chunks: int, queries: int, splits: int, slots: int, rows: int, window: int | None,
    causal: bool, unit: float, cap: float | None,
) -> None:  # fmt: skip
    """One share and chunk of heads. What follows the cache are its scales, where it has some, and the results."""
    *scales, out, sums = rest
    buffers, length, head_dim = k_held.shape
    box, dtype, layout = min(page, length), q_held.dtype, plgpu.Layout.WGMMA
    share, slot = lax.axis_index("share"), lax.axis_index("slot")
    start, end, first = start_of[share], end_of[share], first_of[share]
    last_box = lax.div(end - 1, jnp.int32(box)) * box
    head = lax.div(slot, jnp.int32(chunks))  # of K
    column = head * (2 * head_dim)

    def iota(shape: tuple[int, int], axis: int, layout: Any = layout) -> jax.Array:
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)

    def fetch(i: jax.Array) -> None:
        """Starts the copies of block i. Those past the end bring the last box again: all of them must arrive."""
        to = lax.rem(i, jnp.int32(buffers))
        for j in range(length // box):
            at = jnp.minimum(start + i * length + j * box, last_box)
            number, first_row = table[row_of[share] + lax.div(at, jnp.int32(page))], lax.rem(at, jnp.int32(page))
            row = pl.multiple_of(number * page + first_row, box)
            for part, (held, here) in enumerate(((k_held, k_here), (v_held, v_here))):
                lane = pl.multiple_of(column + part * head_dim, head_dim)
                source = cache.at[pl.ds(row, box), pl.ds(lane, head_dim)]
                plgpu.copy_gmem_to_smem(source, held.at[to, pl.ds(j * box, box)], here.at[to])
                for of_all in scales:  # which come with the keys
                    one = (number * kv_heads + head) * 2 + part
                    source = of_all.at[one, pl.ds(pl.multiple_of(first_row, box), box)]
                    plgpu.copy_gmem_to_smem(source, scales_held.at[to, part, pl.ds(j * box, box)], k_here.at[to])

    @pl.when(start < end)
    def _() -> None:
        count = lax.div(end - start + (length - 1), jnp.int32(length))
        own = pl.multiple_of((lax.div(share, jnp.int32(splits)) * slots + slot) * rows, 8)
        plgpu.copy_gmem_to_smem(q.at[pl.ds(own, rows)], q_held.at[pl.ds(0, rows)], q_here)
        for i in range(buffers - 1):
            pl.when(i < count)(partial(fetch, jnp.int32(i)))
        plgpu.barrier_wait(q_here)

        def block(i: jax.Array, carry: Any, cut: bool) -> Any:
            """One block of kv tokens; one that is cut has some that are not for all queries to see."""
            acc, best, norm = carry  # [ROWS, H], [ROWS], [ROWS]
            at, begin = lax.rem(i, jnp.int32(buffers)), start + i * length
            ahead = i + (buffers - 1)
            pl.when(ahead < count)(partial(fetch, ahead))  # to where the block before was

            def scores(product: Any) -> jax.Array:
                plgpu.wgmma(product, q_held, keys.transpose((1, 0)))
                return product[...]

            plgpu.barrier_wait(k_here.at[at])
            keys = k_held.at[at] if widened is None else widen(k_held.at[at])
            score = pl.run_scoped(scores, plgpu.ACC((ROWS, length), jnp.float32))
            if scales:
                score = score * along(scales_held.at[at, 0])
            if cap is not None:  # tanh, of which the hardware's own is good for ten bits only
                score = 1.0 - 2.0 / (1.0 + jnp.exp2(score * cap))
            score = score * unit
            if cut:
                position = first + lax.rem(iota((ROWS, length), 0), jnp.int32(queries))
                kv = begin + iota((ROWS, length), 1)
                seen = kv <= position if causal else kv < end
                if window is not None:
                    seen &= kv > position - window
                score = jnp.where(seen, score, MASKED)
            new = jnp.maximum(best, score.max(axis=1))
            fade = jnp.exp2(best - new)
            weight = jnp.exp2(score - lax.broadcast_in_dim(new, score.shape, [0]))
            norm = norm * fade + weight.sum(axis=1)
            acc = acc * lax.broadcast_in_dim(fade, acc.shape, [0])
            # What no one has written may be NaN, and 0 * NaN is NaN.
            if scales:
                weight = weight * along(scales_held.at[at, 1])
                if cut:
                    weight = jnp.where(seen, weight, 0.0)
            weight = weight.astype(dtype)
            plgpu.barrier_wait(v_here.at[at])
            values = v_held.at[at]
            if widened is not None:
                values = widen(values, end - begin if cut else None)
            elif cut:
                pl.when(begin + length > end)(partial(clear, at, end - begin))
            return add(acc, weight, values), new, norm

        def clear(at: jax.Array, left: jax.Array) -> None:
            """Leaves the first ones, which are written."""
            values = plgpu.load(v_held.at[at], layout=layout)
            values = jnp.where(iota((length, head_dim), 0) < left, values, jnp.zeros_like(values))
            v_held[at] = values
            plgpu.commit_smem()

        def widen(block: Any, left: jax.Array | None = None) -> Any:
            """The numbers of a block of bytes, exactly; of floats the first ones only, which are written.

            All threads have read what was there before when the first one writes: a store waits for that.
            """
            numbers = plgpu.load(block, layout=WIDE)
            if jnp.issubdtype(block.dtype, jnp.floating):
                numbers = numbers.astype(jnp.float16)  # what there is an instruction for
                if left is not None:
                    there = iota((length, head_dim), 0, WIDE) < left
                    numbers = jnp.where(there, numbers, jnp.zeros_like(numbers))
            widened[...] = numbers.astype(dtype)
            plgpu.commit_smem()
            return widened

        def along(ref: Any) -> jax.Array:
            """[ROWS, L], of a number a kv token."""
            return lax.broadcast_in_dim(plgpu.load(ref, layout=layout.reduce(0)), (ROWS, length), [1])

        def add(acc: jax.Array, weight: jax.Array, values: Any) -> jax.Array:
            """acc + weight @ values"""
            if weights is None:
                sum_of: jax.Array = pl.run_state(lambda total: plgpu.wgmma(total, weight, values))(plgpu.ACC.init(acc))
                return sum_of
            weights[...] = weight
            plgpu.commit_smem()

            def product(total: Any) -> jax.Array:
                plgpu.wgmma(total, weights, values)
                return total[...]

            return acc + pl.run_scoped(product, plgpu.ACC((ROWS, head_dim), jnp.float32))

        def state(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        carry = (
            state((ROWS, head_dim), 0.0, layout),
            state((ROWS,), MASKED, layout.reduce(1)),
            state((ROWS,), 0.0, layout.reduce(1)),
        )
        whole = jnp.int32(0)  # blocks that all queries see all of
        if window is None:
            whole = jnp.minimum(count, lax.div((first + 1 if causal else end) - start, jnp.int32(length)))
            carry = lax.fori_loop(jnp.int32(0), whole, partial(block, cut=False), carry)
        acc, best, norm = lax.fori_loop(whole, count, partial(block, cut=True), carry)

        acc = acc / lax.broadcast_in_dim(norm, acc.shape, [0])
        given = q_held if result is None else result
        given[...] = acc.astype(given.dtype)
        plgpu.commit_smem()
        to = share * slots + slot
        plgpu.copy_smem_to_gmem(given.at[pl.ds(0, rows)], out.at[pl.ds(pl.multiple_of(to * rows, 8), rows)])
        sums[pl.ds(pl.multiple_of(to * ROWS, ROWS), ROWS)] = best + jnp.log2(norm)
        plgpu.wait_smem_to_gmem(0)
