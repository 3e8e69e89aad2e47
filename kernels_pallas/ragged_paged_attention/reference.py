"""Ragged paged attention in plain XLA: any platform, linear in the batch, the oracle of every other body.

T tokens, S sequences, B pages a sequence, N query heads, K kv heads, G = N / K, H head_dim,
Q query tokens of a tile, C kv tokens of a block
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.ragged_paged_attention.contract import (
    KV_BLOCK,
    Cache,
    Int8Cache,
    joined,
    narrowed,
    quantised,
    validate,
)

DECODE_TILE = 8
"""Sequences of one query token that are computed side by side; a tile costs as much as its longest sequence."""
PREFILL_TILE = 64
"""Query tokens of one sequence that are computed side by side."""


def ragged_paged_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"] | None,
    cache: Cache,
    kv_lens: Int[Array, " S"],
    page_table: Int[Array, "S B"],
    cu_q_lens: Int[Array, " S1"],
    distribution: Int[Array, " 3"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    causal: bool = True,
    value_dim: int | None = None,
    first_page: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, "T N V"], Cache]:
    """See contract.py."""
    validate(q, k, v, cache, kv_lens, page_table, cu_q_lens, distribution, window, soft_cap, sinks, causal, value_dim)
    page_table = page_table + first_page
    tokens, heads, head_dim = q.shape
    seqs, page = kv_lens.shape[0], cache.shape[1]
    decodes, total = distribution[0], distribution[2]
    cache = write(k, v, cache, kv_lens, page_table, cu_q_lens, total)

    pages = max(1, KV_BLOCK // page)
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages)))  # whole blocks
    attend = partial(
        _attend_tile,
        cache=cache,
        pages=pages,
        kv_heads=k.shape[1],
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        causal=causal,
        value_dim=value_dim,
    )
    out = jnp.zeros((tokens + PREFILL_TILE, heads, value_dim or head_dim), q.dtype)  # the last tile may hang over
    q = jnp.pad(q, ((0, PREFILL_TILE), (0, 0), (0, 0)))

    # Sequences [0, decodes) own the tokens [0, decodes): a tile is a slice of both.
    width = min(DECODE_TILE, seqs)
    lens = jnp.pad(jnp.where(jnp.arange(seqs) < decodes, kv_lens, 0), (0, -seqs % width))
    tables = jnp.pad(page_table, ((0, -seqs % width), (0, 0)))

    def decode_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        start = i * width
        tile_lens = jax.lax.dynamic_slice_in_dim(lens, start, width)
        tile = attend(
            jax.lax.dynamic_slice_in_dim(q, start, width)[:, None],
            first=tile_lens - 1,
            ends=tile_lens,
            table=jax.lax.dynamic_slice_in_dim(tables, start, width),
        )  # [width, 1, N, H]
        return jax.lax.dynamic_update_slice_in_dim(out, tile[:, 0], start, 0)

    out = jax.lax.fori_loop(0, -(-decodes // width), decode_tile, out)
    if tokens == seqs:
        return out[:tokens], cache

    # A prefill tile's overhang belongs to sequences that come later and overwrite it.
    def prefill(s: jax.Array, out: jax.Array) -> jax.Array:
        start, q_len = cu_q_lens[s], cu_q_lens[s + 1] - cu_q_lens[s]
        table = jax.lax.dynamic_slice_in_dim(page_table, s, 1)  # [1, B]

        def tile(i: jax.Array, out: jax.Array) -> jax.Array:
            row = start + i * PREFILL_TILE
            first = kv_lens[s] - q_len + i * PREFILL_TILE
            tile = attend(
                jax.lax.dynamic_slice_in_dim(q, row, PREFILL_TILE)[None],
                first=first[None],
                ends=(jnp.minimum(kv_lens[s], first + PREFILL_TILE) if causal else kv_lens[s])[None],
                table=table,
            )  # [1, Q, N, H]
            return jax.lax.dynamic_update_slice_in_dim(out, tile[0], row, 0)

        return jax.lax.fori_loop(0, -(-q_len // PREFILL_TILE), tile, out)

    out = jax.lax.fori_loop(decodes, total, prefill, out)
    return out[:tokens], cache


def write(
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"] | None,
    cache: Cache,
    kv_lens: Int[Array, " S"],
    page_table: Int[Array, "S B"],
    cu_q_lens: Int[Array, " S1"],
    total: Int[Array, ""],
) -> Cache:
    """Scatters this step's rows to their pages; rows of no sequence are dropped."""
    tokens, seqs, page = k.shape[0], kv_lens.shape[0], cache.shape[1]
    t = jnp.arange(tokens, dtype=jnp.int32)
    s = jnp.clip(jnp.searchsorted(cu_q_lens[1:], t, side="right").astype(jnp.int32), 0, seqs - 1)  # [T]
    position = kv_lens[s] - cu_q_lens[s + 1] + t
    row = page_table[s, jnp.maximum(position, 0) // page] * page + position % page
    dropped = jnp.asarray(cache.shape[0] * page, jnp.int32)  # past the end
    row = jnp.where((t < cu_q_lens[total]) & (position >= 0), row, dropped)
    new = joined(k, v, cache.shape[2])  # [T, K, 2, H]: k0|v0|k1|v1|...
    if tokens == 1:  # XLA makes a scatter of one row a select over a copy of the whole cache
        row, new = jnp.stack([row[0], dropped]), jnp.concatenate([new, new])

    def scatter(rows: jax.Array, new: jax.Array) -> jax.Array:
        flat = rows.reshape(-1, rows.shape[2])
        return flat.at[row].set(new.reshape(len(new), -1), mode="drop").reshape(rows.shape)

    if not isinstance(cache, Int8Cache):
        return scatter(cache, narrowed(new, cache.dtype))
    values, scales = quantised(new)
    scales = scales.reshape(len(scales), -1)  # [T, K*2]
    return Int8Cache(
        scatter(cache.values, values), cache.scales.at[row // page, :, row % page].set(scales, mode="drop")
    )


def _attend_tile(
    q: Float[Array, "A Q N H"],
    *,
    first: Int[Array, " A"],
    ends: Int[Array, " A"],
    table: Int[Array, "A B"],
    cache: Cache,
    pages: int,
    kv_heads: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " N"] | None,
    causal: bool,
    value_dim: int | None,
) -> Float[Array, "A Q N V"]:
    """A sequences, Q consecutive query tokens each, the first at position `first`; reads positions [0, ends)."""
    (seqs, queries, heads, head_dim), dtype = q.shape, q.dtype
    groups, page = heads // kv_heads, cache.shape[1]
    held, block = cache.values if isinstance(cache, Int8Cache) else cache, pages * page
    parts, width = (2, head_dim) if value_dim is None else (1, value_dim)
    key_dim = held.shape[2] // (kv_heads * parts)  # of latents with the zeros that follow
    # Queries and a cache of other numbers meet in float32, but for those of 8 bits, which queries' types hold exactly.
    computed = dtype if held.dtype.itemsize == 1 or held.dtype == dtype else jnp.dtype(jnp.float32)
    rows = max(2, queries * groups)  # XLA:CPU's matrix-vector product sums in another order
    q = q.reshape(seqs, queries, kv_heads, groups, head_dim).transpose(0, 2, 1, 3, 4)
    q = q.reshape(seqs, kv_heads, queries * groups, head_dim)  # [A, K, Q*G, H]
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - queries * groups), (0, key_dim - head_dim)))
    q = (q.astype(jnp.float32) * scale).astype(computed)
    position = first[:, None] + jnp.arange(rows, dtype=jnp.int32)[None, :] // groups  # [A, rows]

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        best, norm, acc = carry  # [A, K, rows], [A, K, rows], [A, K, rows, H]
        ids = jax.lax.dynamic_slice_in_dim(table, i * pages, pages, axis=1)  # [A, pages]
        kv = jnp.take(held, ids, axis=0, mode="clip").reshape(seqs, block, kv_heads, parts, key_dim)
        kv = kv.transpose(3, 0, 2, 1, 4)  # [2, A, K, C, H]
        at = i * block + jnp.arange(block, dtype=jnp.int32)  # [C]
        written = at[None, :] < ends[:, None]  # [A, C]; what lies past may be NaN, and 0 * NaN is NaN
        if window is not None:
            written &= at[None, :] > first[:, None] - window  # before that the pages may be another's
        kv = jnp.where(written[None, :, None, :, None], kv, jnp.zeros((), kv.dtype))
        kv = kv.astype(computed)
        if isinstance(cache, Int8Cache):
            scales = jnp.take(cache.scales, ids, axis=0, mode="clip").reshape(seqs, pages, kv_heads, 2, page)
            scales = scales.transpose(3, 0, 2, 1, 4).reshape(2, seqs, kv_heads, 1, block)  # [2, A, K, 1, C]
            scales = jnp.where(written[None, :, None, None, :], scales, 0.0)
        seen = jnp.broadcast_to(written[:, None, :], (seqs, rows, block))  # [A, rows, C]
        if causal:
            seen &= at[None, None, :] <= position[:, :, None]
        if window is not None:
            seen &= at[None, None, :] > position[:, :, None] - window
        score = jnp.einsum("akrh,akch->akrc", q, kv[0], preferred_element_type=jnp.float32)
        if isinstance(cache, Int8Cache):
            score = score * scales[0]
        if soft_cap is not None:
            score = soft_cap * jnp.tanh(score / soft_cap)
        score = jnp.where(seen[:, None], score, -jnp.inf)
        new_best = jnp.maximum(best, score.max(axis=-1))
        base = jnp.where(jnp.isfinite(new_best), new_best, 0.0)  # a row that has seen nothing yet
        weight = jnp.exp(score - base[..., None])  # [A, K, rows, C]
        fade = jnp.exp(best - base)
        norm = norm * fade + weight.sum(axis=-1)
        if isinstance(cache, Int8Cache):
            weight = weight * scales[1]
        v = kv[-1][..., :width]
        new = jnp.einsum("akrc,akch->akrh", weight.astype(kv.dtype), v, preferred_element_type=jnp.float32)
        return new_best, norm, acc * fade[..., None] + new

    low = jnp.zeros((), jnp.int32)
    if window is not None:
        low = jnp.maximum(jnp.where(ends > 0, first - window + 1, jnp.iinfo(jnp.int32).max).min(), 0) // block
    high = -(-ends.max() // block)
    shape = (seqs, kv_heads, rows)
    best, norm = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.float32)
    if sinks is not None:  # as if a position without a value had been scored already
        own = jnp.asarray(sinks, jnp.float32).reshape(kv_heads, groups)[:, jnp.arange(rows) % groups]  # [K, rows]
        best, norm = jnp.broadcast_to(own, shape), jnp.ones(shape, jnp.float32)
    _, norm, acc = jax.lax.fori_loop(low, high, step, (best, norm, jnp.zeros((*shape, width), jnp.float32)))
    out = acc / jnp.where(norm > 0, norm, 1.0)[..., None]
    out = out[:, :, : queries * groups].reshape(seqs, kv_heads, queries, groups, width).transpose(0, 2, 1, 3, 4)
    return out.reshape(seqs, queries, heads, width).astype(dtype)
