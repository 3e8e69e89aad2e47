"""The GPU's gates of compile_gate.py: its attention kernels, for GPUs that are not here."""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def described(chip: str, devices: int) -> Iterator[list[Any]]:
    """Devices to compile for, and what kernels see of them while they are traced."""
    import jax

    from jaxserve.planning.topology import Topology

    found = Topology.parse(f"{chip}:{devices}").devices()
    seen = jax.sharding.AbstractDevice(found[0].device_kind, found[0].core_count, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=seen)):
        yield found


@dataclass(frozen=True)
class Heads:
    """Attention as a model has it, and over how many devices its heads are split."""

    query: int
    kv: int
    dim: int
    devices: int = 1
    window: int | None = None
    soft_cap: float | None = None


HEADS = {
    "llama3-8b": Heads(32, 8, 128),
    "llama3-8b-on-8": Heads(32, 8, 128, devices=8),
    "qwen3-0.6b": Heads(16, 8, 128),
    "gemma2-9b": Heads(16, 8, 256, window=4096, soft_cap=50.0),
    "phi3-mini": Heads(32, 32, 96),
    "phi2": Heads(32, 32, 80),
    "llama3.2-1b": Heads(32, 8, 64),
    "16-heads-of-192": Heads(16, 16, 192),
}


def gates() -> list[tuple[str, Callable[[], tuple[Any, int]]]]:
    """Names of programs, and what lowers each and says the bytes of its cache that a device updates in place."""
    found = [attention("h100", model) for model in HEADS]
    found += [attention(chip, "llama3-8b") for chip in ("h200", "a100")]
    found += [attention("a100", model) for model in ("gemma2-9b", "phi3-mini")]
    found += [attention("h100", "llama3-8b", page=page) for page in (16, 128)]
    found += [attention("h100", "llama3-8b", dtype=dtype) for dtype in ("float16", "float32")]
    found += [attention("h100", "llama3-8b", seqs=1, tokens=1), attention("h100", "llama3-8b", seqs=256, tokens=256)]
    return found


def attention(
    chip: str, model: str, *, page: int = 64, dtype: str = "bfloat16", tokens: int = 512, seqs: int = 64
) -> tuple[str, Callable[[], tuple[Any, int]]]:
    """The kernel over a cache that no on-chip memory can hold; in shard_map, where there are several devices."""
    heads = HEADS[model]

    def lower() -> tuple[Any, int]:
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        from kernels_pallas.ragged_paged_attention.gpu import ragged_paged_attention

        row = heads.kv * 2 * heads.dim
        page_bytes = page * row * jnp.dtype(dtype).itemsize // heads.devices
        pages = 256 * 2**20 // page_bytes
        by_head, by_lane, whole = PartitionSpec(None, "model"), PartitionSpec(None, None, "model"), PartitionSpec()
        specs = (by_head, by_head, by_head, by_lane, whole, whole, whole, whole)
        shapes = [
            ((tokens, heads.query, heads.dim), dtype),
            *[((tokens, heads.kv, heads.dim), dtype)] * 2,
            ((pages, page, row), dtype),
            *[(shape, jnp.int32) for shape in ((seqs,), (seqs, 8192 // page), (seqs + 1,), (3,))],
        ]
        options = dict(scale=heads.dim**-0.5, window=heads.window, soft_cap=heads.soft_cap)
        with described(chip, heads.devices) as devices:
            mesh = Mesh(np.array(devices), ("model",))
            arguments = [
                jax.ShapeDtypeStruct(shape, of, sharding=NamedSharding(mesh, spec))
                for (shape, of), spec in zip(shapes, specs, strict=True)
            ]
            run: Any = partial(ragged_paged_attention, **options)
            if heads.devices > 1:
                run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(by_head, by_lane), check_vma=False)
            return jax.jit(run, donate_argnums=3).lower(*arguments), pages * page_bytes

    kind = "decode" if tokens == seqs else "mixed"
    return f"{chip}/{model}/{dtype}/page{page}/{kind}-{tokens}", lower


def registers(dump: Path) -> Iterator[tuple[str, int, int]]:
    """(kernel, registers a thread, bytes a thread spills) by what ptxas, which is in the plugin, has written to `dump`.

    Of Mosaic's kernels only, and of none that this process has compiled before.
    """
    for path in sorted(dump.glob("*.ptxas")):
        said = path.read_text()
        kernel = re.search(r"entry function 'jaxserve_(\w+)_mosaic_gpu_kernel'", said)
        spilled = re.findall(r"(\d+) bytes spill", said)
        used = re.search(r"Used (\d+) registers", said)
        if kernel and used:
            yield kernel[1], int(used[1]), sum(map(int, spilled))
