"""The one place where an attention kernel is chosen and bound to a step."""

from importlib import import_module

import jax
import jax.numpy as jnp

from jaxserve.errors import ConfigError
from jaxserve.spec import Attend
from kernels_pallas.ragged_paged_attention.contract import RaggedPagedAttention

KERNELS = {"reference": "kernels_pallas.ragged_paged_attention.reference"}
"""Bodies by name. A platform's own body goes here and into PLATFORM."""
PLATFORM = {"cpu": "reference", "gpu": "reference", "tpu": "reference"}


def choose(name: str, platform: str) -> tuple[str, str, RaggedPagedAttention]:
    """The kernel's name, the reason in words, and the kernel. Raises ConfigError for an unknown name."""
    chosen = PLATFORM.get(platform, "reference") if name == "auto" else name
    if chosen not in KERNELS:
        raise ConfigError(f"attention={name!r}: choose one of auto, {', '.join(KERNELS)}")
    reason = f"auto on {platform}" if name == "auto" else "asked for by name"
    return chosen, reason, import_module(KERNELS[chosen]).ragged_paged_attention


def bind(
    kernel: RaggedPagedAttention,
    kv_lens: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
) -> Attend:
    """Attention over a stacked cache [L, P, page, row] for one step's sequences, as a model file calls it."""
    kernel = jax.jit(kernel, static_argnames=("scale", "window"))  # traced once a step, not once a layer

    def attend(
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        cache: jax.Array,
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        layers, pages, page, row = cache.shape
        out, flat = kernel(
            q,
            k,
            v,
            cache.reshape(layers * pages, page, row),
            kv_lens,
            page_table + layer * pages,  # the kernel sees the whole cache: slicing a layer out would copy it
            cu_q_lens,
            distribution,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            window=window,
        )
        return out.astype(q.dtype), flat.reshape(cache.shape)

    return attend


def dense(
    layer: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one whole sequence over itself, without a cache: for notebooks, and the oracle of tests."""
    tokens, heads, head_dim = q.shape
    q = q.reshape(tokens, k.shape[1], -1, head_dim).astype(jnp.float32)  # [T, K, G, H]
    score = jnp.einsum("tkgh,ckh->kgtc", q, k.astype(jnp.float32)) * (scale or head_dim**-0.5)
    t = jnp.arange(tokens)
    seen = t[None, :] <= t[:, None]
    if window is not None:
        seen &= t[None, :] > t[:, None] - window
    weight = jax.nn.softmax(jnp.where(seen[None, None], score, -jnp.inf), axis=-1)
    out = jnp.einsum("kgtc,ckh->tkgh", weight, v.astype(jnp.float32))
    return out.reshape(tokens, heads, head_dim).astype(v.dtype), cache
