"""What the gates of attention kernels compile, for TPU and for GPU: a step's attention as a model has it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4", "tpu7x": "tpu7x:2x2x1"}
"""The slice of each kind of TPU that a kernel is compiled for."""


@dataclass(frozen=True)
class Heads:
    """Attention as a model has it, and over how many devices its heads are split."""

    query: int
    kv: int
    dim: int
    devices: int = 1
    window: int | None = None
    soft_cap: float | None = None
    causal: bool = True
    values: int | None = None
    """Of latents, which each device has whole: the numbers of a key that are its value."""


def lowered(
    kernel: Callable[..., Any], mesh: Any, heads: Heads, *, page: int, dtype: str, tokens: int, seqs: int
) -> tuple[Any, int]:
    """The kernel, not yet compiled, over a cache that no on-chip memory can hold, and the bytes of it that a device
    updates in place. In shard_map, where there are several devices; heads are split over the mesh's axis "model".

    `dtype` is the cache's, and where that is not of 8 bits the queries'.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from kernels_pallas.ragged_paged_attention.contract import Int8Cache, latent_row

    activations: Any = dtype if jnp.dtype(dtype).itemsize > 1 else jnp.bfloat16
    by_head, by_lane, whole = PartitionSpec(None, "model"), PartitionSpec(None, None, "model"), PartitionSpec()
    row, parts, kv_spec = heads.kv * 2 * heads.dim, heads.devices, by_head
    cache_spec: Any = by_lane
    if heads.values is not None:
        row, parts, kv_spec, cache_spec = latent_row(heads.dim), 1, whole, whole
    page_bytes = page * row * jnp.dtype(dtype).itemsize // parts
    pages = 256 * 2**20 // page_bytes
    cache: Any = jax.ShapeDtypeStruct((pages, page, row), dtype)
    if dtype == "int8":
        page_bytes += page * heads.kv * 2 * 4 // heads.devices
        cache = Int8Cache(cache, jax.ShapeDtypeStruct((pages, heads.kv * 2, page), jnp.float32))  # type: ignore[arg-type]
        cache_spec = Int8Cache(by_lane, by_head)  # type: ignore[arg-type]
    k = jax.ShapeDtypeStruct((tokens, heads.kv, heads.dim), activations)
    v, v_spec = (k, kv_spec) if heads.values is None else (None, None)
    specs = (by_head, kv_spec, v_spec, cache_spec, whole, whole, whole, whole)
    shapes = [
        jax.ShapeDtypeStruct((tokens, heads.query, heads.dim), activations),
        k,
        v,
        cache,
        *[jax.ShapeDtypeStruct(s, jnp.int32) for s in ((seqs,), (seqs, 8192 // page), (seqs + 1,), (3,))],
    ]
    arguments = jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)), shapes, list(specs)
    )
    options = dict(window=heads.window, soft_cap=heads.soft_cap, causal=heads.causal, value_dim=heads.values)
    step: Any = partial(kernel, scale=heads.dim**-0.5, **options)
    if mesh.size > 1:
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(by_head, cache_spec), check_vma=False)
    return jax.jit(step, donate_argnums=3).lower(*arguments), pages * page_bytes
