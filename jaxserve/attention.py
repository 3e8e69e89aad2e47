"""The one place where an attention kernel is chosen and bound to a step."""

from collections.abc import Callable, Sequence
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxserve import native
from jaxserve.errors import ConfigError
from jaxserve.layers import soft_cap as bounded
from jaxserve.native.build import BuildError
from jaxserve.page_groups import PageGroups
from jaxserve.spec import Attend, CacheSpec
from kernels_pallas.ragged_paged_attention.contract import (
    PAGE_TABLE_ENTRIES,
    Cache,
    Int8Cache,
    RaggedPagedAttention,
    validate_for_gpu,
    validate_for_tpu,
)

KERNELS = {
    "reference": "kernels_pallas.ragged_paged_attention.reference",
    "cpu": "jaxserve.native.attention",
    "gpu": "kernels_pallas.ragged_paged_attention.gpu",
    "tpu": "kernels_pallas.ragged_paged_attention.tpu",
}
"""Bodies by name. A platform's own body goes here and into PLATFORM."""
PLATFORM = {"cpu": "cpu", "gpu": "gpu", "tpu": "tpu"}
PAGE_SIZE = {"cpu": 16, "gpu": 64, "tpu": 64}
"""Where nobody asks for one. The CPU's kernels lay 16 positions side by side, a GPU copies boxes of 64 rows. A TPU's
kernel issues a copy a page: for two heads of a device pages of 16 cost half as much again as the computing, of 64 a
sixth (BENCHMARKS.md); larger ones leave more memory unused at every sequence's end."""
READS_INT8 = ("reference", "cpu", "gpu", "tpu")
"""Bodies that take an Int8Cache."""
READS_FP8 = ("reference", "gpu", "tpu")
"""Bodies that take a cache of float8_e4m3fn; the reference on CPU for trying it only, where XLA copies such a cache as
float16 in each layer."""


def reads(kernel: str, kv_dtype: DTypeLike) -> bool:
    """Whether a body takes a cache of numbers of 8 bits."""
    return kernel in (READS_INT8 if jnp.dtype(kv_dtype) == jnp.int8 else READS_FP8)


def choose(
    name: str,
    platform: str,
    progress: Callable[[str], None] = lambda message: None,
    *,
    devices: int = 1,
    causal: bool = True,
    kv_dtype: DTypeLike = jnp.bfloat16,
    block_size: int | None = None,
    head_dim: int | None = None,
    value_dim: int | None = None,
    capability: str | None = None,
) -> tuple[str, str, RaggedPagedAttention]:
    """The kernel's name, the reason in words, and the kernel. Raises ConfigError for one that cannot be had.

    `value_dim` is given where the model's cache is of latents. `capability` is a GPU's compute capability, for instance
    "9.0".
    """
    chosen = PLATFORM.get(platform, "reference") if name == "auto" else name
    if chosen not in KERNELS:
        raise ConfigError(f"attention={name!r}: choose one of auto, {', '.join(KERNELS)}")
    if value_dim is not None and jnp.dtype(kv_dtype) == jnp.int8:
        raise ConfigError(
            "kv_cache_dtype int8 is not served with latent attention (MLA); leave it out, or on TPU and GPU give "
            "float8_e4m3fn"
        )
    reason = f"auto on {platform}" if name == "auto" else "asked for by name"
    if chosen in PLATFORM and platform != chosen:
        raise ConfigError(f"attention={chosen!r} does not run on {platform}; use auto")
    if chosen == "cpu":
        if devices == 1 and jnp.dtype(kv_dtype) == jnp.float8_e4m3fn:
            int8 = "" if value_dim is not None else "--kv-cache-dtype int8, which takes as much memory, or "
            raise ConfigError(
                f"kv_cache_dtype float8_e4m3fn is not read by the CPU's kernels; give {int8}--attention reference, "
                "which is slower by far"
            )
        if devices > 1:
            if name != "auto":
                raise ConfigError(f"attention='cpu' runs on one device, not on {devices}; use auto")
            reason = "plain XLA: the C++ kernels run on one device, not on a mesh"
            return "reference", reason, import_module(KERNELS["reference"]).ragged_paged_attention
        try:
            native.load(progress)
        except BuildError as error:
            if name != "auto":
                raise ConfigError(f"attention='cpu': {error}") from error
            chosen, reason = "reference", f"slower by far than the C++ kernels, but {error}"
    if chosen == "tpu":
        try:
            validate_for_tpu(block_size or _usual_page("tpu", kv_dtype), jnp.dtype(kv_dtype), 0, 0)
        except ValueError as error:
            if name != "auto":
                raise ConfigError(f"attention='tpu': {error}") from error
            chosen, reason = "reference", f"slower by far than the TPU's own kernel, but {error}"
    if chosen == "gpu":
        try:
            page = block_size or PAGE_SIZE["gpu"]
            validate_for_gpu(page, jnp.dtype(kv_dtype), head_dim or 0, capability, value_dim)
            return chosen, reason, import_module(KERNELS[chosen]).ragged_paged_attention
        except (ValueError, ImportError) as error:  # of Pallas' GPU backends, which come and go with JAX
            if name != "auto":
                raise ConfigError(f"attention='gpu': {error}") from error
            chosen, reason = "reference", f"slower by far than the GPU's own kernels, but {error}"
    return chosen, reason, import_module(KERNELS[chosen]).ragged_paged_attention


def _usual_page(platform: str, kv_dtype: DTypeLike) -> int:
    if platform == "tpu" and jnp.dtype(kv_dtype) == jnp.int8:
        return 128  # a page's scales fill the lanes
    return PAGE_SIZE.get(platform, PAGE_SIZE["cpu"])


def page_size(asked: int | None, kernel: str, platform: str, kv_dtype: np.dtype, seqs: int, length: int) -> int:
    """Tokens in a page of the cache, for up to `seqs` sequences of `length` tokens.

    Raises ConfigError for pages that were asked for and that the kernel does not read.
    """
    size = asked or _usual_page(platform, kv_dtype)
    if kernel != "tpu":
        return size
    if asked is None:
        while seqs * -(-length // size) > PAGE_TABLE_ENTRIES:
            size *= 2
    try:
        validate_for_tpu(size, kv_dtype, seqs, -(-length // size))
    except ValueError as error:
        raise ConfigError(f"block_size {size}: {error}") from error
    return size


def cache_shapes(
    spec: CacheSpec, pages: int, page_size: int, dtype: DTypeLike, groups: PageGroups | None = None
) -> Cache:
    """The stacked cache of `pages` pages as `bind` wants it, as jax.ShapeDtypeStructs. A page has room for all layers,
    or with `groups` for those of one of them."""
    pages *= spec.layers if groups is None else groups.layers
    values = jax.ShapeDtypeStruct((pages, page_size, spec.row), dtype)
    if jnp.dtype(dtype) != jnp.int8:
        return values  # type: ignore[return-value]  # a shape for an array
    return Int8Cache(values, jax.ShapeDtypeStruct((pages, spec.kv_heads * 2, page_size), jnp.float32))  # type: ignore[arg-type]


def bind(
    kernel: RaggedPagedAttention,
    groups: PageGroups,
    kv_lens: Sequence[jax.Array],
    page_tables: Sequence[jax.Array],
    cu_q_lens: jax.Array,
    distribution: jax.Array,
) -> Attend:
    """Attention over a stacked cache [layers of a group * P, page, row] for one step's sequences, as a model calls it.

    Each group of layers has its page table [S, B], and kv_lens [S] that are counted from where that begins. The layers'
    pages lie end to end: a reshape between the step's argument and a custom call costs XLA:CPU a copy.
    """
    kernel = jax.jit(
        kernel, static_argnames=("scale", "window", "soft_cap", "causal", "value_dim")
    )  # traced once a step, not once a layer

    @jax.named_scope("attention")
    def attend(
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array | None,
        cache: Cache,
        *,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: jax.Array | None = None,
        causal: bool = True,
        value_dim: int | None = None,
    ) -> tuple[jax.Array, Cache]:
        group, number = _place(groups, layer, window)
        first = number * (cache.shape[0] // groups.layers)
        out, cache = kernel(
            q,
            k,
            v,
            cache,
            kv_lens[group],
            page_tables[group],
            cu_q_lens,
            distribution,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            causal=causal,
            value_dim=value_dim,
            first_page=first,  # the kernel sees the whole cache: slicing a layer out would copy it
        )
        return out.astype(q.dtype), cache

    return attend


def _place(groups: PageGroups, layer: int, window: int | None) -> tuple[int, int]:
    """The group of a layer, and its number there. Raises ConfigError where it sees more than the group keeps."""
    if len(groups.windows) == 1:
        group, number = 0, layer
    elif isinstance(layer, int | np.integer):
        group, number = groups.places[layer]
    else:
        raise ConfigError("attend is called with a traced layer; of a Config with windows it must be a number")
    kept = groups.windows[group]
    if kept is not None and (window is None or window > kept):
        raise ConfigError(
            f"attend of layer {layer} is called with window={window}, and by the Config's windows only {kept} tokens "
            "are kept"
        )
    return group, number


def dense(
    layer: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    cache: Cache,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    causal: bool = True,
    value_dim: int | None = None,
) -> tuple[jax.Array, Cache]:
    """Attention of one whole sequence over itself, without a cache: for notebooks, and the oracle of tests."""
    tokens, heads, head_dim = q.shape
    v = k[..., :value_dim] if v is None else v
    q = q.reshape(tokens, k.shape[1], -1, head_dim).astype(jnp.float32)  # [T, K, G, H]
    score = jnp.einsum("tkgh,ckh->kgtc", q, k.astype(jnp.float32)) * (scale or head_dim**-0.5)
    score = bounded(score, soft_cap)
    t = jnp.arange(tokens)
    seen = (t[None, :] <= t[:, None]) | (not causal)
    if window is not None:
        seen &= t[None, :] > t[:, None] - window
    score = jnp.where(seen[None, None], score, -jnp.inf)
    if sinks is not None:
        column = jnp.asarray(sinks, jnp.float32).reshape(*score.shape[:2], 1, 1)
        score = jnp.concatenate([score, jnp.broadcast_to(column, (*score.shape[:3], 1))], axis=-1)
    weight = jax.nn.softmax(score, axis=-1)[..., :tokens]
    out = jnp.einsum("kgtc,ckh->tkgh", weight, v.astype(jnp.float32))
    return out.reshape(tokens, heads, -1).astype(v.dtype), cache
