"""The one signature of ragged paged attention, and what every body may assume of its arguments.

A step holds S sequences whose query tokens lie end to end in one flat axis of T rows. Where T == S every
sequence has at most one query token, and a body may leave out what longer ones need.

    q         [T, N, H]        query heads
    k, v      [T, K, H]        this step's new keys and values, N a multiple of K
    cache     [P, page, K*2*H] pages of rows [k0|v0|k1|v1|...]; a stacked cache is passed whole, with
                               page_table + layer * pages, since slicing a layer out would copy it. Of latents
                               [P, page, latent_row(H)]
    kv_lens   [S]              tokens of each sequence after this step (0 for an unused row)
    page_table[S, B]           page of the tokens [i*page, (i+1)*page) of each sequence; with a window, in the place of
                               one that none of this step's tokens sees, any page of the cache
    cu_q_lens [S+1]            query tokens of sequence s are [cu_q_lens[s], cu_q_lens[s+1])
    distribution [3]           sequences [0, d0) have one query token, [d0, d1) are prefills, [d1, d2) mixed;
                               d2 is the number of sequences

    -> out [T, N, H], cache with k and v written

A token at position p attends to positions (p - window, p]. k and v are written before anything is read.
Where `causal` is False, every token attends to all kv_lens positions of its sequence: the encoders' attention.
Its weights are the softmax of cap(scale * q.k), where cap(x) is soft_cap * tanh(x / soft_cap) (Gemma 2, 2024). A sink
(gpt-oss, 2025) is one more logit of each head in that softmax, neither scaled nor capped, whose value is zero.
Rows of `out` past cu_q_lens[d2] are unspecified but finite. Memory that no sequence has written may hold NaN.

With `value_dim` k is a latent, as multi-head latent attention has it (DeepSeek-AI 2024, arXiv 2405.04434): there is one
kv head, K is 1, its values are the first value_dim numbers of its keys, and v is None. A row of the cache is that key
alone, and zeros past it; out is [T, N, value_dim].

Positions may be counted from any multiple of `aligned(page)` before which no token sees anything: with as much taken
from kv_lens, and the page table begun so much later, no bit of a result changes.

A cache of bytes is an Int8Cache: rows as above, and a scale for each token and head of K and of V. What a token sees of
itself and of its past are the rounded numbers, so they do not depend on how a prompt was cut. A cache of float8_e4m3fn,
which has no infinity, keeps what is beyond its range as its largest number, 448; see `narrowed`.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8

KV_BLOCK = 128
"""Positions that the reference reads at once, in whole pages; the CPU's kernel takes half as many. Blocks start at
fixed positions, so a sequence is cut alike whatever its neighbours and however its prompt was chunked."""
LEAST = 1e-30
"""A head's keys or values of a token that are all nearer to zero than this are kept as zeros in an Int8Cache."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Cache:
    """Keys and values as signed bytes; byte * scale is the number. Both arrays are donated and updated in place."""

    values: Int8[Array, "P page row"]
    scales: Float[Array, "P K2 page"]
    """[P, K*2, page], rows k0, v0, k1, ...: a head's scales lie along its scores, and a page of 128 fills the lanes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[P, page, K*2*H], as of the other caches."""
        return self.values.shape


type Cache = jax.Array | Int8Cache
"""A cache of floats [P, page, row], or one of bytes."""


def latent_row(head_dim: int) -> int:
    """Numbers in a row of latents: whole lanes of a TPU's memory, which takes as much for fewer."""
    return -(-head_dim // 128) * 128


def joined(k: Float[Array, "T K H"], v: Float[Array, "T K H"] | None, row: int) -> Float[Array, "T K parts width"]:
    """A step's new rows, of `row` numbers each: [T, K, 2, H], or of latents [T, 1, 1, row]."""
    if v is not None:
        return jnp.stack([k, v], axis=2)
    return jnp.pad(k[:, :, None], ((0, 0), (0, 0), (0, 0), (0, row - k.shape[2])))


def aligned(page: int) -> int:
    """Positions at whose multiples a block of every body begins, for pages of `page` tokens."""
    return math.lcm(max(1, KV_BLOCK // page) * page, KV_BLOCK // 2)


def quantised(x: Float[Array, "*rows H"]) -> tuple[Int8[Array, "*rows H"], Float[Array, "*rows"]]:
    """What an Int8Cache keeps of x: the largest of a row becomes 127, the others are rounded to nearest, ties to even.

    A row that holds a NaN or an infinity has a NaN for its scale.
    """
    x = x.astype(jnp.float32)
    most = jnp.abs(x).max(axis=-1, keepdims=True)
    finite = jnp.isfinite(most)
    some = finite & (most > LEAST)
    inverse = 127.0 / jnp.where(some, most, 1.0)
    values = jnp.round(jnp.where(some, x * inverse, 0.0)).astype(jnp.int8)
    scale = jnp.where(finite, jnp.where(some, most * (1.0 / 127.0), 0.0), jnp.nan)
    return values, scale[..., 0]


def narrowed(x: Float[Array, "*rows"], dtype: DTypeLike) -> Float[Array, "*rows"]:
    """x as a cache of floats keeps it. In E4M3 (OCP 8-bit Floating Point Specification, 2023) a cast makes NaN of what
    is beyond +-448; here it becomes that. A NaN stays one.
    """
    if jnp.dtype(dtype).itemsize == 1:
        most = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -most, most)
    return x.astype(dtype)


class RaggedPagedAttention(Protocol):
    """What every body implements. `window` None means the whole past, `soft_cap` None no cap, `sinks` None none,
    `value_dim` None that there are values of their own. `first_page` is added to every entry of page_table."""

    def __call__(
        self,
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
    ) -> tuple[Float[Array, "T N V"], Cache]: ...


def validate(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    cache: Cache,
    kv_lens: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None,
    causal: bool = True,
    value_dim: int | None = None,
) -> None:
    """Checks shapes and types at trace time. Raises ValueError saying what was found and what is expected."""
    if (v is None) is (value_dim is None):
        found = "no v" if v is None else f"v {v.shape}"
        raise ValueError(f"value_dim is to be given where v is None, and only there; found {value_dim} and {found}")
    v_shape = k.shape if v is None else v.shape
    if q.ndim != 3 or k.ndim != 3 or k.shape != v_shape:
        raise ValueError(f"q, k, v must be [T, heads, head_dim]; found {q.shape}, {k.shape}, {v_shape}")
    tokens, heads, head_dim = q.shape
    if k.shape[0] != tokens or k.shape[2] != head_dim or heads % k.shape[1]:
        raise ValueError(f"k {k.shape} does not fit q {q.shape}: same T and head_dim, heads a multiple of kv heads")
    row = k.shape[1] * 2 * head_dim
    if value_dim is not None:
        if k.shape[1] != 1 or not 0 < value_dim <= head_dim:
            raise ValueError(
                f"latents have one kv head, and a value_dim of 1 to head_dim {head_dim}; "
                f"found {k.shape[1]} and {value_dim}"
            )
        if isinstance(cache, Int8Cache):
            raise ValueError("latents are not kept in an Int8Cache; give a cache of floats")
        row = latent_row(head_dim)
    if len(cache.shape) != 3 or cache.shape[2] != row:
        raise ValueError(f"cache must be [pages, page_size, {row}]; found {cache.shape}")
    if isinstance(cache, Int8Cache):
        shape, values, scales = (cache.shape[0], k.shape[1] * 2, cache.shape[1]), cache.values.dtype, cache.scales.dtype
        if cache.scales.shape != shape or values != jnp.int8 or scales != jnp.float32:
            raise ValueError(
                f"an Int8Cache must have int8 values and float32 scales {list(shape)}; "
                f"found {values} and {scales} {list(cache.scales.shape)}"
            )
    elif not jnp.issubdtype(cache.dtype, jnp.floating):
        raise ValueError(f"cache must be of floats, or an Int8Cache; found {cache.dtype}")
    seqs = kv_lens.shape[0]
    if page_table.ndim != 2 or page_table.shape[0] != seqs or cu_q_lens.shape != (seqs + 1,):
        raise ValueError(
            f"page_table {page_table.shape} and cu_q_lens {cu_q_lens.shape} do not fit kv_lens {kv_lens.shape}"
        )
    if distribution.shape != (3,):
        raise ValueError(f"distribution must be [3]; found {distribution.shape}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1; found {window}")
    if window is not None and not causal:
        raise ValueError(f"a window is that of causal attention; found {window} with causal=False")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"soft_cap must be a number above 0, or None for no cap; found {soft_cap}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must be [{heads}], one logit a query head; found {sinks.shape}")


PAGE_TABLE_ENTRIES = 250_000
"""What fits the 1 MiB of a TPU's scalar memory beside the sequences' lengths."""


def validate_for_tpu(page: int, dtype: np.dtype, seqs: int, pages: int) -> None:
    """What the TPU's memories ask of pages of `page` tokens and a page table [seqs, pages]. Raises ValueError."""
    rows = 128 if dtype == np.int8 else 32 // dtype.itemsize  # an Int8Cache has the scales of a page side by side
    if page % rows:
        raise ValueError(
            f"pages of {page} tokens of {dtype.name} are not whole tiles of a TPU's memory; give a page size "
            f"(--block-size) that is a multiple of {rows}{', best 64 or 128' if rows < 128 else ''}"
        )
    if seqs * pages > PAGE_TABLE_ENTRIES:
        raise ValueError(
            f"the page table of {seqs} sequences of up to {pages} pages has {seqs * pages} entries, and a TPU's scalar "
            f"memory holds {PAGE_TABLE_ENTRIES}; raise the page size (--block-size), or lower --max-model-len or "
            "--max-num-seqs"
        )


def validate_for_gpu(
    page: int, dtype: np.dtype, head_dim: int, capability: str | None, value_dim: int | None = None
) -> None:
    """What the GPU's kernels ask of the chip, by its compute capability, and of pages of `page` tokens. `value_dim` is
    given for latents.

    Raises ValueError.
    """
    major = (capability or "").partition(".")[0]
    if not major.isdigit() or int(major) < 8:
        raise ValueError(f"it needs NVIDIA's compute capability 8.0 or above; the device has {capability or 'none'}")
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.int8, jnp.float8_e4m3fn):
        raise ValueError(f"it does not read a cache of {dtype.name} (--kv-cache-dtype)")
    if value_dim is not None and (value_dim > 512 or head_dim - value_dim > 64):
        raise ValueError(
            "its memory holds latents of up to 512 numbers that are values and 64 beside them; the model's have "
            f"{value_dim} and {head_dim - value_dim}"
        )
    if value_dim is None and head_dim > 256:
        raise ValueError(f"its memory holds heads of up to 256 numbers; the model's have {head_dim}")
    if page < 16 or page & (page - 1):
        raise ValueError(
            f"it does not read pages of {page} tokens; give a page size (--block-size) that is a power of two, at "
            "least 16, best 64"
        )
