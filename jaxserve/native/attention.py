"""Ragged paged attention for CPU in C++: the body named `cpu`; see csrc/attention.cc."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels_pallas.ragged_paged_attention.contract import validate


def ragged_paged_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    cache: Float[Array, "P page row"],
    kv_lens: Int[Array, " S"],
    page_table: Int[Array, "S B"],
    cu_q_lens: Int[Array, " S1"],
    distribution: Int[Array, " 3"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "P page row"]]:
    """See kernels_pallas/ragged_paged_attention/contract.py; `jaxserve.native.load` must have been called.

    The softmax and both products are float32 whatever the types of q and of the cache. A token's result depends on
    its own sequence alone, bit for bit.
    """
    validate(q, k, v, cache, kv_lens, page_table, cu_q_lens, distribution, window, soft_cap, sinks)
    call = jax.ffi.ffi_call(
        "jaxserve_ragged_paged_attention",
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(cache.shape, cache.dtype)),
        input_output_aliases={3: 1},
    )
    logits = jnp.zeros(0, jnp.float32) if sinks is None else jnp.asarray(sinks, jnp.float32)
    out, new_cache = call(
        q, k, v, cache, kv_lens, page_table, cu_q_lens, distribution, logits,
        scale=np.float32(scale), window=np.int64(window or 0), soft_cap=np.float32(soft_cap or 0),
    )  # fmt: skip
    return out, new_cache


def untouched_cache(shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """A cache that costs no memory until it is written, page by page of the system's; what is in it nobody knows."""
    return jax.ffi.ffi_call("jaxserve_untouched", jax.ShapeDtypeStruct(shape, dtype))()
