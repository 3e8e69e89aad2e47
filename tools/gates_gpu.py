"""The GPU's gates of compile_gate.py: its attention kernels, and whole steps, for GPUs that are not here.

XLA's CUDA compiler needs neither GPU nor driver: it is told the chip's figures (`CHIPS`, from NVIDIA's specifications).
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Chip:
    """What XLA asks of a GPU."""

    kind: str
    capability: tuple[int, int]
    cores: int
    shared: int
    """Bytes of shared memory that a block of threads may have; a multiprocessor has 1 KiB more."""
    cache: int
    bandwidth: int
    memory: int
    clock: float

    def target(self) -> str:
        """XLA's GpuTargetConfigProto, as text."""
        major, minor = self.capability
        return f"""gpu_device_info {{
            threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
            shared_memory_per_core: {self.shared + 1024} threads_per_core_limit: 2048 core_count: {self.cores}
            fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            memory_bandwidth: {self.bandwidth} l2_cache_size: {self.cache} clock_rate_ghz: {self.clock}
            device_memory_size: {self.memory} shared_memory_per_block_optin: {self.shared}
            cuda_compute_capability {{ major: {major} minor: {minor} }}
            registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "{self.kind}"
        """


CHIPS = {
    "h100": Chip("NVIDIA H100 80GB HBM3", (9, 0), 132, 227 << 10, 50 << 20, 3352 * 10**9, 85 * 10**9, 1.98),
    "h200": Chip("NVIDIA H200", (9, 0), 132, 227 << 10, 60 << 20, 4800 * 10**9, 150 * 10**9, 1.98),
    "a100": Chip("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 << 10, 40 << 20, 2039 * 10**9, 85 * 10**9, 1.41),
}


@contextlib.contextmanager
def described(chip: str, devices: int) -> Iterator[list[Any]]:
    """Devices to compile for, and what kernels see of them while they are traced."""
    import jax
    from jax.experimental import topologies

    found = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=CHIPS[chip].target(), topology=f"1x1x{devices}"
    ).devices
    device = jax.sharding.AbstractDevice(CHIPS[chip].kind, CHIPS[chip].cores, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
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
    return [*found, step("h100", 8, 64), step("h100", 8, 512)]


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


STEP_LAYERS = 4


def step(chip: str, devices: int, tokens: int) -> tuple[str, Callable[[], tuple[Any, int]]]:
    """A whole step of Llama 3.1 8B, but of few layers, on a mesh: 64 sequences, with prompts where tokens are more."""

    def lower() -> tuple[Any, int]:
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import AxisType, Mesh

        from jaxserve.batch import Shape
        from jaxserve.models import find_model
        from jaxserve.sharding import EVERY, Partition, bytes_per_device
        from jaxserve.spec import ParamSpec
        from jaxserve.step import Programs, Sizes
        from kernels_pallas.ragged_paged_attention.gpu import ragged_paged_attention

        hf = json.loads((ROOT / "configs/models/llama-3.1-8b.json").read_text())
        model, config = find_model(hf | {"num_hidden_layers": STEP_LAYERS}, None)
        with described(chip, devices) as found:
            mesh = Mesh(np.array(found).reshape(1, devices), EVERY, axis_types=(AxisType.Auto,) * 2)
            partition = Partition(mesh, model, config)
            specs = model.param_specs(partition.config)
            params = jax.tree.map(
                lambda spec: partition.leaf(spec, jnp.bfloat16), specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec)
            )
            dtype = jnp.dtype("bfloat16")
            programs = Programs(model, config, partition, ragged_paged_attention, dtype, params)
            sizes = Sizes(8192, 64, 512, 64, 4096)
            _, function, arguments, donate, results = programs.step(Shape(tokens, 64), sizes)
            lowered = jax.jit(function, donate_argnums=donate, out_shardings=results).lower(*arguments)
            return lowered, bytes_per_device(programs.state(sizes).cache)

    return f"{chip}x{devices}/llama3-8b-of-{STEP_LAYERS}-layers/step-{tokens}", lower


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
