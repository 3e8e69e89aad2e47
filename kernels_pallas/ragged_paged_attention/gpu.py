"""Ragged paged attention for GPU: cuts a step into shares, has a Pallas kernel attend them, and merges what they give.

T tokens, S sequences, B pages a sequence, N query heads, K kv heads, G = N / K, H head_dim, V numbers of a value,
I shares, Q query tokens of a share, C chunks of the heads that share a kv head, R rows of queries of a share

A share is some queries of one sequence and a stretch of its kv tokens. Sequences that decode are cut along their kv
tokens (split-KV: flash-decoding, Dao et al., 2023), so that few long ones fill the GPU, all others along their queries.
Row h * Q + t of a share is its t-th query token for the h-th head of the chunk. The body for Hopper is
gpu_hopper.py's, that for whatever it does not take, other generations and latents above all, gpu_triton.py's; both take
shares and give the same.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas.ragged_paged_attention import gpu_hopper, gpu_triton
from kernels_pallas.ragged_paged_attention.contract import Cache, Int8Cache, validate, validate_for_gpu
from kernels_pallas.ragged_paged_attention.gpu_shares import Shares
from kernels_pallas.ragged_paged_attention.pieces import pieces
from kernels_pallas.ragged_paged_attention.reference import write
from kernels_pallas.ragged_paged_attention.tuning.gpu import GpuBlocks, blocks_for

LOG2_E = math.log2(math.e)
type Interpret = bool | plgpu.InterpretGPUParams


class Chip(NamedTuple):
    """What a kernel is compiled for."""

    kind: str
    capability: str
    """Compute capability: 8.0 and above is Ampere, 9.0 Hopper."""
    cores: int
    """Multiprocessors."""


KNOWN = (Chip("NVIDIA H100", "9.0", 132), Chip("NVIDIA H200", "9.0", 132), Chip("NVIDIA A100", "8.0", 108))
"""Chips that may be compiled for where none is, by the beginning of their device kind; another is taken for the first,
as Mosaic GPU takes it."""


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
    chip: Chip | None = None,
    decode: GpuBlocks | None = None,
    prefill: GpuBlocks | None = None,
    interpret: Interpret = False,
) -> tuple[Float[Array, "T N V"], Cache]:
    """See contract.py.

    `chip` is the device where it cannot be found out; `decode` and `prefill` are block sizes instead of those of
    tuning/gpu.json; `interpret` runs a body on a CPU: True that in Triton, InterpretGPUParams that for Hopper, which
    has none for latents.
    """
    validate(q, k, v, cache, kv_lens, page_table, cu_q_lens, distribution, window, soft_cap, sinks, causal, value_dim)
    page_table = page_table + first_page
    kept = (cache.values if isinstance(cache, Int8Cache) else cache).dtype
    if kept.itemsize > 1 and q.dtype != kept:
        raise ValueError(
            f"the GPU's kernels want a cache of the queries' type, or of 8 bits; found {kept} and {q.dtype}"
        )
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be a number above 0; found {scale}")
    (tokens, heads, head_dim), kv_heads, page = q.shape, k.shape[1], cache.shape[1]
    chip = chip or _chip()
    if not interpret:
        validate_for_gpu(page, kept, head_dim, chip.capability, value_dim)
    hopper = gpu_hopper.takes(chip.capability, q.dtype, kept, head_dim, page, value_dim)
    if interpret:
        hopper = interpret is not True and value_dim is None
    if decode is None or prefill is None:
        types = kept.name, q.dtype.name
        tuned = blocks_for(
            chip.kind, hopper, *types, heads, kv_heads, head_dim, page, value_dim, capability=chip.capability
        )
        decode, prefill = decode or tuned[0], prefill or tuned[1]
    cache = write(k, v, cache, kv_lens, page_table, cu_q_lens, distribution[2])
    rows, scales = (cache.values, cache.scales) if isinstance(cache, Int8Cache) else (cache, None)
    attend = partial(
        gpu_hopper.attend if hopper else partial(gpu_triton.attend, value_dim=value_dim),
        page=page, kv_heads=kv_heads, table=page_table.reshape(-1), cache=rows.reshape(-1, rows.shape[2]),
        scales=None if scales is None else scales.reshape(-1, page), window=window, causal=causal,
        interpret=interpret if hopper else bool(interpret),
        # By these a product of q and k becomes an exponent of 2.
        unit=(scale if soft_cap is None else soft_cap) * LOG2_E,
        cap=None if soft_cap is None else 2.0 * LOG2_E * scale / soft_cap,
    )  # fmt: skip
    step = _Step(kv_lens, page_table.shape[1], cu_q_lens, distribution, page, kv_heads, window, causal)
    t = jnp.arange(tokens, dtype=jnp.int32)[:, None, None]
    out = _decode(attend, q[: kv_lens.shape[0]], step, sinks, decode, chip)
    if tokens == kv_lens.shape[0]:
        return jnp.where(t < distribution[0], out, jnp.zeros((), out.dtype)), cache
    rest = _prefill(attend, q, step, sinks, prefill)
    out = jnp.pad(out, ((0, tokens - len(out)), (0, 0), (0, 0)))
    out = jnp.where(t < distribution[0], out, rest)
    return jnp.where(t < cu_q_lens[distribution[2]], out, jnp.zeros((), out.dtype)), cache


def _chip() -> Chip:
    """The device that is compiled for: the mesh's where there is one, else the GPU that is here."""
    here = jax.devices()[0] if jax.default_backend() == "gpu" else None
    described = jax.sharding.get_abstract_mesh().abstract_device
    if here is not None and (described is None or described.device_kind == here.device_kind):
        return Chip(here.device_kind, here.compute_capability, here.core_count)
    kind = KNOWN[0].kind if described is None else described.device_kind
    return next((chip for chip in KNOWN if kind.startswith(chip.kind)), KNOWN[0])._replace(kind=kind)


class _Step(NamedTuple):
    """What does not differ between the two halves of a step."""

    kv_lens: jax.Array
    table_width: int
    cu_q_lens: jax.Array
    distribution: jax.Array
    page: int
    kv_heads: int
    window: int | None
    causal: bool

    def start(self, first: jax.Array) -> jax.Array:
        """Position of the first kv token that a query at `first` may see, down to a whole page."""
        if self.window is None:
            return jnp.zeros_like(first)
        return jnp.maximum(first - self.window + 1, 0) // self.page * self.page


def _decode(
    attend: Any, q: Float[Array, "S N H"], step: _Step, sinks: jax.Array | None, blocks: GpuBlocks, chip: Chip
) -> Float[Array, "S N V"]:
    """Of sequences with one query token, each in as many shares as fill the GPU with the others'."""
    (seqs, heads, head_dim), kv_heads = q.shape, step.kv_heads
    groups = heads // kv_heads
    chunks = -(-groups // blocks.rows)
    chunk = -(-groups // chunks)  # heads of a chunk
    longest = -(-step.table_width * step.page // blocks.positions)
    splits = min(blocks.splits(seqs * kv_heads * chunks, chip.cores), longest)
    lens = jnp.where(jnp.arange(seqs) < step.distribution[0], step.kv_lens, 0)
    low = step.start(lens - 1)
    each = -(-(lens - low) // (blocks.positions * splits))  # blocks of a share
    each = jnp.maximum(each, blocks.least) * blocks.positions
    start = low[:, None] + jnp.arange(splits, dtype=jnp.int32)[None, :] * each[:, None]  # [S, splits]
    end = jnp.minimum(start + each[:, None], lens[:, None])
    row = jnp.arange(seqs, dtype=jnp.int32) * step.table_width
    shares = Shares(
        *(jnp.broadcast_to(a, start.shape).reshape(-1) for a in (row[:, None], start, end, lens[:, None] - 1))
    )

    rows = -(-chunk // 8) * 8
    q = _padded(q.reshape(seqs, kv_heads, groups, head_dim), 2, chunks * chunk)
    q = _padded(q.reshape(seqs, kv_heads * chunks, chunk, head_dim), 2, rows)
    merges = splits > 1 or sinks is not None
    out, exponent = attend(
        shares, q, chunks=chunks, queries=1, splits=splits, blocks=blocks, out_dtype=jnp.float32 if merges else q.dtype
    )
    out, exponent = (a.reshape(seqs, splits, kv_heads, chunks, rows, -1)[:, :, :, :, :chunk] for a in (out, exponent))
    out, exponent = (a.reshape(seqs, splits, kv_heads, chunks * chunk, -1)[:, :, :, :groups] for a in (out, exponent))
    if not merges:
        return out.reshape(seqs, heads, -1)
    exponent = jnp.where((start < end)[:, :, None, None], exponent[..., 0], -jnp.inf)
    most = exponent.max(axis=1)  # [S, K, G]
    if sinks is not None:
        own = jnp.asarray(sinks, jnp.float32).reshape(kv_heads, groups) * LOG2_E
        most = jnp.maximum(most, own[None])
    most = jnp.where(jnp.isfinite(most), most, 0.0)  # a row of no sequence
    weight = jnp.exp2(exponent - most[:, None])[..., None]  # [S, splits, K, G, 1]
    total = weight.sum(axis=1)
    if sinks is not None:
        total = total + jnp.exp2(own[None] - most)[..., None]
    out = jnp.where(weight > 0, weight * out, 0.0).sum(axis=1) / jnp.where(total > 0, total, 1.0)
    return out.reshape(seqs, heads, -1).astype(q.dtype)


def _prefill(
    attend: Any, q: Float[Array, "T N H"], step: _Step, sinks: jax.Array | None, blocks: GpuBlocks
) -> Float[Array, "T N V"]:
    """Of all other sequences, each in shares of consecutive query tokens; other rows are finite."""
    (tokens, heads, head_dim), kv_heads = q.shape, step.kv_heads
    seqs, groups = len(step.kv_lens), heads // kv_heads
    chunks = -(-groups // blocks.heads)
    chunk = -(-groups // chunks)  # heads of a chunk
    queries = blocks.rows // (1 << (chunk - 1).bit_length())
    begin, q_lens = step.cu_q_lens[:-1], jnp.diff(step.cu_q_lens)
    s = jnp.arange(seqs, dtype=jnp.int32)
    others = (s >= step.distribution[0]) & (s < step.distribution[2])
    last = jnp.where(others, -(-q_lens // queries) - 1, -1)
    most = tokens // queries + seqs
    seq_of, block_of, count = pieces(jnp.zeros_like(last), last, most)
    first = (step.kv_lens - q_lens)[seq_of] + block_of * queries
    lens = step.kv_lens[seq_of]
    end = jnp.minimum(lens, first + queries) if step.causal else lens
    end = jnp.where(jnp.arange(most) < count, end, 0)
    shares = Shares(seq_of * step.table_width, step.start(first), end, first)
    shares = Shares(*(a[::-1] for a in shares))  # the last ones have most to read: they go first

    token = (begin[seq_of] + block_of * queries)[::-1, None] + jnp.arange(queries, dtype=jnp.int32)[None, :]  # [I, Q]
    q = _padded(q.reshape(tokens, kv_heads, groups, head_dim), 2, chunks * chunk)
    own = jnp.take(q, token, axis=0, mode="clip").reshape(most, queries, kv_heads * chunks, chunk, head_dim)
    own = own.transpose(0, 2, 3, 1, 4).reshape(most, kv_heads * chunks, chunk * queries, head_dim)
    out_dtype = jnp.float32 if sinks is not None else q.dtype
    out, exponent = attend(shares, own, chunks=chunks, queries=queries, splits=1, blocks=blocks, out_dtype=out_dtype)

    # Where a token's rows are among all shares'.
    t = jnp.arange(tokens, dtype=jnp.int32)
    s_of = jnp.clip(jnp.searchsorted(step.cu_q_lens[1:], t, side="right", method="compare_all"), 0, seqs - 1)
    before = jnp.cumsum(last + 1) - (last + 1)  # shares of the sequences before
    at = t - begin[s_of]
    share = most - 1 - jnp.clip(before[s_of] + at // queries, 0, most - 1)

    def by_token(a: jax.Array) -> jax.Array:  # of [I * K * C * chunk * Q, ...]
        a = a.reshape(most, kv_heads, chunks * chunk, queries, -1)[share, :, :groups, at % queries]  # [T, K, G, ...]
        return a.reshape(tokens, heads, -1)

    out = by_token(out)
    if sinks is not None:
        seen = by_token(exponent) - jnp.asarray(sinks, jnp.float32)[None, :, None] * LOG2_E
        out = (out / (1.0 + jnp.exp2(-seen))).astype(q.dtype)
    return out


def _padded(a: jax.Array, axis: int, to: int) -> jax.Array:
    """Zeros behind it, where it is shorter along an axis."""
    return jnp.pad(a, [(0, to - n if i == axis else 0) for i, n in enumerate(a.shape)])
