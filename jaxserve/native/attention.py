"""Ragged paged attention for CPU in C++: the body named `cpu`; see csrc/attention.cc."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels_pallas.ragged_paged_attention.contract import Cache, Int8Cache, validate


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
    """See kernels_pallas/ragged_paged_attention/contract.py; `jaxserve.native.load` must have been called.

    The softmax and both products are float32 whatever the types of q and of the cache. A token's result depends on
    its own sequence alone, bit for bit.
    """
    validate(q, k, v, cache, kv_lens, page_table, cu_q_lens, distribution, window, soft_cap, sinks, causal, value_dim)
    if not isinstance(cache, Int8Cache) and cache.dtype.itemsize == 1:
        raise ValueError(f"the CPU's kernel does not read a cache of {cache.dtype}; use the reference, or an Int8Cache")
    none = jnp.zeros(0, jnp.float32)
    values = jnp.zeros((0, 0, 0), q.dtype) if v is None else v
    held, scales = (cache.values, cache.scales) if isinstance(cache, Int8Cache) else (cache, none)
    call = jax.ffi.ffi_call(
        "jaxserve_ragged_paged_attention",
        (
            jax.ShapeDtypeStruct((*q.shape[:2], value_dim or q.shape[2]), q.dtype),
            *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (held, scales)),
        ),
        input_output_aliases={3: 1, 4: 2} if scales.size else {3: 1},
    )
    out, held, scales = call(
        q, k, values, held, scales, kv_lens, page_table, jnp.asarray(first_page, jnp.int32), cu_q_lens, distribution,
        none if sinks is None else jnp.asarray(sinks, jnp.float32),
        scale=np.float32(scale), window=np.int64(window or 0), soft_cap=np.float32(soft_cap or 0), causal=causal,
        value_dim=np.int64(value_dim or 0),
    )  # fmt: skip
    return out, Int8Cache(held, scales) if isinstance(cache, Int8Cache) else held


def untouched_cache(shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """A cache that costs no memory until it is written, page by page of the system's; what is in it nobody knows."""
    return jax.ffi.ffi_call("jaxserve_untouched", jax.ShapeDtypeStruct(shape, dtype))()
