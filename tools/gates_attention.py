"""What the gates of attention kernels compile, for TPU and for GPU: a step's attention as a model has it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any


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

    from kernels_pallas.ragged_paged_attention.contract import Int8Cache

    activations: Any = dtype if jnp.dtype(dtype).itemsize > 1 else jnp.bfloat16
    row = heads.kv * 2 * heads.dim
    page_bytes = page * row * jnp.dtype(dtype).itemsize // heads.devices
    pages = 256 * 2**20 // page_bytes
    by_head, by_lane, whole = PartitionSpec(None, "model"), PartitionSpec(None, None, "model"), PartitionSpec()
    cache: Any = jax.ShapeDtypeStruct((pages, page, row), dtype)
    cache_spec: Any = by_lane
    if dtype == "int8":
        page_bytes += page * heads.kv * 2 * 4 // heads.devices
        cache = Int8Cache(cache, jax.ShapeDtypeStruct((pages, heads.kv * 2, page), jnp.float32))  # type: ignore[arg-type]
        cache_spec = Int8Cache(by_lane, by_head)  # type: ignore[arg-type]
    specs = (by_head, by_head, by_head, cache_spec, whole, whole, whole, whole)
    shapes = [
        jax.ShapeDtypeStruct((tokens, heads.query, heads.dim), activations),
        *[jax.ShapeDtypeStruct((tokens, heads.kv, heads.dim), activations)] * 2,
        cache,
        *[jax.ShapeDtypeStruct(s, jnp.int32) for s in ((seqs,), (seqs, 8192 // page), (seqs + 1,), (3,))],
    ]
    arguments = jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)), shapes, list(specs)
    )
    options = dict(scale=heads.dim**-0.5, window=heads.window, soft_cap=heads.soft_cap, causal=heads.causal)
    step: Any = partial(kernel, **options)
    if mesh.size > 1:
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(by_head, cache_spec), check_vma=False)
    return jax.jit(step, donate_argnums=3).lower(*arguments), pages * page_bytes
