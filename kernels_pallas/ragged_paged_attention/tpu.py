"""Ragged paged attention for TPU: a Pallas kernel over shares, each the queries that one block has of one sequence.

T tokens, S sequences, B pages a sequence, N query heads, K kv heads, G = N / K, H head_dim, Q query tokens of a block,
C kv tokens fetched at once, R = G * Q rows of scores, W lanes of a window (see `Window`)

Every step runs the same body twice: over blocks of one query for the sequences that decode, and over blocks of Q
consecutive tokens of the flat axis for all others. A block that several sequences share is visited once for each.
The online softmax is that of FlashAttention (Dao et al., 2022), kept in float32.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.ragged_paged_attention.contract import Cache, Int8Cache, latent_row, validate, validate_for_tpu
from kernels_pallas.ragged_paged_attention.pieces import pieces
from kernels_pallas.ragged_paged_attention.tpu_write import write
from kernels_pallas.ragged_paged_attention.tuning import Blocks, blocks_for

LANES = 128
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""A score that no score is below, and from which another one can be subtracted."""
type Interpret = bool | pltpu.InterpretParams


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
    chip: str | None = None,
    decode: Blocks | None = None,
    prefill: Blocks | None = None,
    interpret: Interpret = False,
) -> tuple[Float[Array, "T N V"], Cache]:
    """See contract.py.

    `chip` is the device kind where it cannot be found out; `decode` and `prefill` are block sizes instead of those of
    tuning/tpu.json; `interpret` runs the kernel on a CPU.
    """
    validate(q, k, v, cache, kv_lens, page_table, cu_q_lens, distribution, window, soft_cap, sinks, causal, value_dim)
    page_table = page_table + first_page
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be a number above 0; found {scale}")
    (tokens, heads, _), kv_heads, page = q.shape, k.shape[1], cache.shape[1]
    seqs, pages = page_table.shape
    kept = (cache.values if isinstance(cache, Int8Cache) else cache).dtype
    if not interpret:
        validate_for_tpu(page, kept, seqs, pages)
    decodes, total = distribution[0], distribution[2]
    if decode is None or prefill is None:
        tuned = blocks_for(chip or _chip(), kept.name, heads, kv_heads, q.shape[2], page, value_dim)
        decode, prefill = decode or tuned[0], prefill or tuned[1]
    cache = write(k, v, cache, kv_lens, page_table, cu_q_lens, total, interpret=interpret)
    attend = partial(
        _attend, cache=cache, kv_lens=kv_lens, cu_q_lens=cu_q_lens, page_table=page_table, kv_heads=kv_heads,
        scale=scale, window=window, soft_cap=soft_cap, sinks=sinks, causal=causal, value_dim=value_dim,
        interpret=interpret,
    )  # fmt: skip
    every = jnp.arange(seqs, dtype=jnp.int32)
    t = jnp.arange(tokens, dtype=jnp.int32)[:, None, None]
    out = attend(q[:seqs], seq_of=every, block_of=every, count=decodes, blocks=decode._replace(queries=1))
    if tokens == seqs:
        return jnp.where(t < decodes, out, jnp.zeros((), out.dtype)), cache
    queries = min(prefill.queries, max(16, 1 << (tokens - 1).bit_length()))
    start, end = cu_q_lens[:-1], cu_q_lens[1:]
    others = (every >= decodes) & (every < total) & (end > start)
    seq_of, block_of, count = pieces(
        start // queries, jnp.where(others, (end - 1) // queries, -1), -(-tokens // queries) + seqs - 1
    )
    rest = attend(q, seq_of=seq_of, block_of=block_of, count=count, blocks=prefill._replace(queries=queries))
    rest = jnp.where(t < cu_q_lens[total], rest, jnp.zeros((), out.dtype))
    out = jnp.pad(out, ((0, tokens - seqs), (0, 0), (0, 0)))
    return jnp.where(t < decodes, out, rest), cache


def _chip() -> str | None:
    """The device kind that is compiled for: the mesh's where there is one, else that of the TPU that is here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return str(device.device_kind)
    return str(jax.devices()[0].device_kind) if jax.default_backend() == "tpu" else None


class Window(NamedTuple):
    """The whole lane tiles of a cache row in which one head's k (or v) lies, and where in them it begins. A latent's
    two overlap: its values are the beginning of its key.

    The matrix unit multiplies whole tiles. Queries are zero where a window holds something else than their k, and of
    the values' window the rest is dropped, so that no head_dim costs a shift of lanes a kv token.
    """

    start: Any
    size: int
    offset: int


def _windows(kv_heads: int, head_dim: int, part: int) -> list[Window]:
    """Of every head's k (`part` 0) or v (1)."""
    found = []
    for h in range(kv_heads):
        at = (2 * h + part) * head_dim
        start = at // LANES * LANES
        stop = min(-(-(at + head_dim) // LANES) * LANES, kv_heads * 2 * head_dim)
        found.append(Window(start, stop - start, at - start))
    return found


def _for_each_head(
    keys: list[Window], values: list[Window], head_dim: int, visit: Callable[[Any, Window, Window], None]
) -> None:
    """Visits the heads in a loop of the kernel, as many in a turn as it takes for windows to repeat, and at least two:
    one head's products fill the matrix unit while the other's softmax is computed."""
    kv_heads, row = len(keys), 2 * head_dim
    turn = next(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and (n == kv_heads or n * row % LANES == 0))
    if turn == 1 and kv_heads % 2 == 0:
        turn = 2

    def visit_turn(first: Any, lane: Any) -> None:
        for h, (key, value) in enumerate(zip(keys[:turn], values[:turn], strict=True)):
            visit(first + h, key._replace(start=lane + key.start), value._replace(start=lane + value.start))

    if turn == kv_heads:
        visit_turn(0, 0)
    else:
        pl.loop(0, kv_heads // turn)(lambda i: visit_turn(i * turn, pl.multiple_of(i * (turn * row), LANES)))


def _into_windows(q: Float[Array, "T K G H"], windows: list[Window]) -> Float[Array, "T K G W"]:
    head_dim, width = q.shape[-1], max(w.size for w in windows)
    if width == head_dim:
        return q
    offsets = {w.offset for w in windows}
    if len(offsets) == 1:
        (o,) = offsets
        return jnp.pad(q, ((0, 0), (0, 0), (0, 0), (o, width - head_dim - o)))
    ends = [(w.offset, width - head_dim - w.offset) for w in windows]
    return jnp.stack([jnp.pad(q[:, h], ((0, 0), (0, 0), e)) for h, e in enumerate(ends)], axis=1)


def _out_of_windows(out: Float[Array, "T K G W"], windows: list[Window], head_dim: int) -> Float[Array, "T K G H"]:
    if out.shape[-1] == head_dim:
        return out
    offsets = {w.offset for w in windows}
    if len(offsets) == 1:
        (o,) = offsets
        return out[..., o : o + head_dim]
    return jnp.stack([out[:, h, :, w.offset : w.offset + head_dim] for h, w in enumerate(windows)], axis=1)


def _attend(
    q: Float[Array, "T N H"],
    *,
    seq_of: Int[Array, " I"],
    block_of: Int[Array, " I"],
    count: Int[Array, ""],
    blocks: Blocks,
    cache: Cache,
    kv_lens: Int[Array, " S"],
    cu_q_lens: Int[Array, " S1"],
    page_table: Int[Array, "S B"],
    kv_heads: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " N"] | None,
    causal: bool,
    value_dim: int | None,
    interpret: Interpret,
) -> Float[Array, "T N V"]:
    """The first `count` shares; rows of tokens in none of them are whatever the memory held."""
    (tokens, heads, head_dim), dtype = q.shape, q.dtype
    groups, (_, page, row) = heads // kv_heads, cache.shape
    held = [cache.values, cache.scales] if isinstance(cache, Int8Cache) else [cache]
    queries, pages, buffers = blocks.queries, min(blocks.pages, page_table.shape[1]), blocks.buffers
    if value_dim is None:
        keys, values = _windows(kv_heads, head_dim, 0), _windows(kv_heads, head_dim, 1)
    else:
        keys, values = [Window(0, row, 0)], [Window(0, latent_row(value_dim), 0)]
    width = max(w.size for w in values)
    rows = queries * groups
    q = _into_windows(q.reshape(tokens, kv_heads, groups, head_dim), keys)  # [T, K, G, W]
    if queries == 1:  # heads lie on sublanes
        block = (None, kv_heads, groups)
        shape: tuple[int, ...] = (tokens, kv_heads, groups)
        specs = [pl.BlockSpec((*block, w), lambda i, n, s, b, *_: (b[i], 0, 0, 0)) for w in (q.shape[-1], width)]
    else:  # heads lie side by side, so that a head's queries of one group are whole tiles
        padded = -(-tokens // queries) * queries
        q = jnp.pad(q.reshape(tokens, -1), ((0, padded - tokens), (0, 0)))
        shape = (padded,)
        specs = [pl.BlockSpec((queries, w), lambda i, n, s, b, *_: (b[i], 0)) for w in (q.shape[-1], heads * width)]
    lanes = (width,) if queries == 1 else (heads * width,)

    # The scores of a step stay as the matrix unit gives them; what they are to be multiplied by waits for the exponent.
    unit = (soft_cap or scale) * math.log2(math.e)
    inputs: list[jax.Array] = [q, *held]
    in_specs = [specs[0], *[pl.BlockSpec(memory_space=pltpu.HBM)] * len(held)]
    fetched = [pltpu.VMEM((buffers, pages * page, row), held[0].dtype)]
    if len(held) > 1:  # scales lie along the scores, pages end to end
        fetched.append(pltpu.VMEM((buffers, 2 * kv_heads, pages * page), jnp.float32))
    if sinks is not None:
        own = jnp.asarray(sinks, jnp.float32).reshape(kv_heads, groups, 1, 1) / (soft_cap or scale)
        own = jnp.broadcast_to(own, (kv_heads, groups, queries, LANES)).reshape(kv_heads, rows, LANES)
        inputs.append(own)
        in_specs.append(pl.BlockSpec((kv_heads, rows, LANES), lambda i, *_: (0, 0, 0)))
    body = partial(
        _body, page=page, pages=pages, buffers=buffers, queries=queries, keys=keys, values=values, head_dim=head_dim,
        table_width=page_table.shape[1], window=window, unit=unit, sinks=sinks is not None, arrays=len(held),
        causal=causal, cap=None if soft_cap is None else scale / soft_cap,
    )  # fmt: skip
    out = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(jnp.maximum(count, 1),),
            in_specs=in_specs,
            out_specs=specs[1],
            scratch_shapes=[
                *fetched,
                pltpu.SemaphoreType.DMA((len(held), buffers)),
                pltpu.SMEM((4,), jnp.int32),
                pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows, width), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((*shape, *lanes), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=blocks.vmem,
            disable_bounds_checks=True,  # half of what issuing a copy costs; the interpreter's stay on in tests
        ),
        interpret=interpret,
        name=f"jaxserve_attention_{'decode' if queries == 1 else 'prefill'}",
    )(count.reshape(1), seq_of, block_of, kv_lens, cu_q_lens, page_table.reshape(-1), *inputs)
    out = out[:tokens].reshape(tokens, kv_heads, groups, width)
    out = _out_of_windows(out, values, value_dim or head_dim)
    return out.reshape(tokens, heads, out.shape[-1])


class Span(NamedTuple):
    """What a share reads, all of it scalars."""

    seq: jax.Array
    first: jax.Array
    """Position of the share's first query."""
    last: jax.Array
    """Position of its last query."""
    page: jax.Array
    """Pages [page, end_page) of the sequence are read."""
    end_page: jax.Array


NEXT_SHARE, NEXT_PAGE, FILL, DRAIN = range(4)
"""Scalars that last from share to share: what is fetched next, the buffer it goes to, the buffer that is read next."""


def _body(
    count: Any, seq_of: Any, block_of: Any, kv_lens: Any, cu_q_lens: Any, page_table: Any,
    q: Any, *rest: Any,
    page: int, pages: int, buffers: int, queries: int, keys: list[Window], values: list[Window], head_dim: int,
    table_width: int, window: int | None, unit: float, cap: float | None, sinks: bool, arrays: int, causal: bool,
) -> None:  # fmt: skip
    """One share. Fetches run ahead of it, into the shares that follow. The cache is of `arrays`: of two its scales."""
    cache, (sink, rest) = rest[:arrays], (rest[arrays] if sinks else None, rest[arrays + sinks :])
    out, fetched, (arrived, cursor, best, norm, acc) = rest[0], rest[1 : 1 + arrays], rest[1 + arrays :]
    buffer, scales = fetched[0], fetched[1] if arrays > 1 else None
    kv_heads, rows, width = acc.shape
    groups = rows // queries
    q_width = q.shape[-1] if queries == 1 else q.shape[-1] // (kv_heads * groups)
    length = pages * page  # C
    share = pl.program_id(0)

    def span(i: jax.Array) -> Span:
        s = seq_of[i]
        start, end = cu_q_lens[s], cu_q_lens[s + 1]
        shift = kv_lens[s] - end  # of a position over its token
        first = jnp.maximum(start, block_of[i] * queries) + shift
        last = jnp.minimum(end, block_of[i] * queries + queries) - 1 + shift
        if not causal:  # every query sees what the sequence's last one does
            first = last = kv_lens[s] - 1
        low = 0 if window is None else jnp.maximum(first - window + 1, 0) // page
        return Span(s, first, last, jnp.int32(low), lax.div(last, page) + 1)

    def copies(seq: jax.Array, first: jax.Array, slot: jax.Array, j: Any) -> list[Any]:
        number, at = page_table[seq * table_width + first + j], j * page
        tokens = pl.ds(at if isinstance(at, int) else _lane(at, page), page)
        to = [buffer.at[slot, tokens], *([scales.at[slot, :, tokens]] if scales is not None else [])]
        return [pltpu.make_async_copy(cache[n].at[number], to[n], arrived.at[n, slot]) for n in range(arrays)]

    def fetch() -> None:
        """Starts the next copies of all shares' sequence, if any are left."""
        i = cursor[NEXT_SHARE]

        @pl.when(i < count[0])
        def _() -> None:
            at, slot = span(i), cursor[FILL]
            first = at.page + cursor[NEXT_PAGE]
            left = at.end_page - first

            @pl.when(left >= pages)  # no loop: issuing copies is what the scalar unit is slow at
            def _() -> None:
                for j in range(pages):
                    for copy in copies(at.seq, first, slot, j):
                        copy.start()

            @pl.when(left < pages)
            def _() -> None:
                @pl.loop(0, left)
                def _(j: jax.Array) -> None:
                    for copy in copies(at.seq, first, slot, j):
                        copy.start()

            done = first + pages >= at.end_page
            cursor[NEXT_SHARE] = i + done.astype(jnp.int32)
            cursor[NEXT_PAGE] = jnp.where(done, 0, cursor[NEXT_PAGE] + pages)
            cursor[FILL] = _following(slot, buffers)

    @pl.when(share == 0)
    def _() -> None:
        for name in range(4):
            cursor[name] = jnp.int32(0)

    if queries > 1:

        @pl.when((share == 0) | (block_of[share] != block_of[jnp.maximum(share - 1, 0)]))
        def clear() -> None:
            out[...] = jnp.zeros_like(out)

    @pl.when(share < count[0])
    def _() -> None:
        at = span(share)
        best[...] = jnp.full_like(best, MASKED) if sink is None else sink[...]
        norm[...] = jnp.zeros_like(norm) if sink is None else jnp.ones_like(norm)
        acc[...] = jnp.zeros_like(acc)

        def compute(start: jax.Array, slot: jax.Array, edge: bool) -> None:
            """One block of kv tokens from position `start`; at an `edge` some are not for all queries to see."""
            seen, there = None, None
            if edge:
                position = at.first
                # Row g * Q + t is token t of the block; other sequences' are dropped at the end.
                if queries > 1 and causal:
                    t = lax.broadcasted_iota(jnp.int32, (rows, length), 0) & (queries - 1)
                    position = kv_lens[at.seq] - cu_q_lens[at.seq + 1] + block_of[share] * queries + t  # [R, C]
                kv = start + lax.broadcasted_iota(jnp.int32, (rows, length), 1)
                seen = kv <= position
                if window is not None:
                    seen &= kv > position - window
                # [C, W], or of what lies along the scores [1, C]
                shape, axis = ((length, width), 0) if scales is None else ((1, length), 1)
                there = start + lax.broadcasted_iota(jnp.int32, shape, axis) <= at.last

            def head(h: jax.Array, key: Window, value: Window) -> None:
                k = buffer[slot, :, pl.ds(key.start, key.size)].astype(q.dtype)  # [C, W]
                v = buffer[slot, :, pl.ds(value.start, value.size)]
                v_scale = None if scales is None else scales[slot, pl.ds(2 * h + 1, 1), :]  # [1, C]
                if there is not None:  # what was not fetched may be NaN, and 0 * NaN is NaN
                    if v_scale is None:
                        v = jnp.where(there[:, : value.size], v.astype(jnp.float32), 0.0)
                    else:
                        v_scale = jnp.where(there, v_scale, 0.0)
                score = _product(_queries(q, h, key.size, queries, groups, q_width), k, 1)  # [R, C]
                if scales is not None:
                    score = score * scales[slot, pl.ds(2 * h, 1), :]
                if cap is not None:
                    score = jnp.tanh(score * cap)
                if seen is not None:
                    score = jnp.where(seen, score, MASKED)
                old = best[h]
                new = jnp.maximum(old, jnp.max(score, axis=1, keepdims=True))  # [R, LANES]
                weight = jnp.exp2((score - new[:, :1]) * unit)
                fade = jnp.exp2((old - new) * unit)
                best[h] = new
                norm[h] = norm[h] * fade + jnp.sum(weight, axis=1, keepdims=True)
                if v_scale is not None:
                    weight = weight * v_scale
                lanes = pl.ds(0, value.size)
                new_values = _product(weight.astype(q.dtype), v.astype(q.dtype), 0)  # [R, W]
                acc[h, :, lanes] = acc[h, :, lanes] * fade[:, :1] + new_values

            _for_each_head(keys, values, head_dim, head)

        @pl.loop(0, pl.cdiv(at.end_page - at.page, pages))
        def _(i: jax.Array) -> None:
            pl.loop(0, jnp.where((share == 0) & (i == 0), buffers, 1))(lambda _: fetch())
            slot, first = cursor[DRAIN], at.page + i * pages
            left = at.end_page - first

            @pl.when(left >= pages)
            def _() -> None:  # for as many bytes as all of the pages have
                for n, array in enumerate(fetched):
                    pltpu.make_async_copy(array.at[slot], array.at[slot], arrived.at[n, slot]).wait()

            @pl.when(left < pages)
            def _() -> None:
                @pl.loop(0, left)
                def _(j: jax.Array) -> None:
                    for copy in copies(at.seq, first, slot, j):
                        copy.wait()

            start = first * page
            whole = start + length <= at.first + 1
            if window is not None:
                whole &= start > at.last - window
            pl.when(whole)(lambda: compute(start, slot, edge=False))
            pl.when(jnp.logical_not(whole))(lambda: compute(start, slot, edge=True))
            cursor[DRAIN] = _following(slot, buffers)

        if queries == 1:
            out[...] = (acc[...] / norm[:, :, :1]).astype(out.dtype)
            return
        token = lax.broadcasted_iota(jnp.int32, (queries, width), 0) + block_of[share] * queries
        own = (token >= cu_q_lens[at.seq]) & (token < cu_q_lens[at.seq + 1])

        @pl.loop(0, kv_heads)
        def _(h: jax.Array) -> None:
            for g in range(groups):
                part, lanes = pl.ds(g * queries, queries), pl.ds(_lane((h * groups + g) * width, width), width)
                result = acc[h, part] / norm[h, part, :1]
                out[:, lanes] = jnp.where(own, result, out[:, lanes].astype(jnp.float32)).astype(out.dtype)


def _following(slot: jax.Array, buffers: int) -> jax.Array:
    return jnp.where(slot == buffers - 1, 0, slot + 1)


def _queries(q: Any, h: Any, size: int, queries: int, groups: int, width: int) -> jax.Array:
    """Head h's queries, [R, W]: row g * Q + t is token t of the block for the g-th of the heads that share its k."""
    if queries == 1:
        return q[h, :, :size]
    heads = [h * groups + g for g in range(groups)]
    return jnp.concatenate([q[:, pl.ds(_lane(n * width, width), size)] for n in heads], axis=0)


def _lane(at: Any, width: int) -> Any:
    """Tells the compiler that a multiple of `width` lanes is one of whole tiles, where it is."""
    return pl.multiple_of(at, LANES) if width % LANES == 0 else at


def _product(x: jax.Array, y: jax.Array, contracted: int) -> jax.Array:
    """x's last axis with that axis of y, in float32; float32 numbers are not rounded to bfloat16 on the way."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)
