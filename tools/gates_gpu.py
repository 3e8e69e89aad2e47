"""The GPU's gates of compile_gate.py: its attention kernels, for GPUs that are not here."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from gates_attention import Heads, lowered


@contextlib.contextmanager
def described(chip: str, devices: int) -> Iterator[list[Any]]:
    """Devices to compile for, and what kernels see of them while they are traced."""
    import jax

    from jaxserve.planning.topology import Topology

    found = Topology.parse(f"{chip}:{devices}").devices()
    seen = jax.sharding.AbstractDevice(found[0].device_kind, found[0].core_count, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=seen)):
        yield found


HEADS = {
    "llama3-8b": Heads(32, 8, 128),
    "llama3-8b-on-8": Heads(32, 8, 128, devices=8),
    "gemma2-9b": Heads(16, 8, 256, window=4096, soft_cap=50.0),
    "phi3-mini": Heads(32, 32, 96),
    "phi2": Heads(32, 32, 80),
    "llama3.2-1b": Heads(32, 8, 64),
    "16-heads-of-192": Heads(16, 16, 192),
    "deepseek-v2-lite-on-1": Heads(16, 1, 576, values=512),
    "deepseek-v2": Heads(128, 1, 576, devices=4, values=512),
}


def gates() -> list[tuple[str, Callable[[], tuple[Any, int]]]]:
    """Names of programs, and what lowers each and says the bytes of its cache that a device updates in place."""
    found = [attention("h100", model) for model in HEADS if model != "deepseek-v2"]
    found += [attention(chip, "llama3-8b") for chip in ("h200", "a100")]
    found += [attention("a100", model) for model in ("gemma2-9b", "phi3-mini", "deepseek-v2-lite-on-1")]
    found += [attention("h100", "llama3-8b", page=page) for page in (16, 128)]
    found += [attention("h100", "llama3-8b", dtype=dtype) for dtype in ("float16", "float32")]
    for dtype in ("int8", "float8_e4m3fn"):
        found += [attention(chip, "llama3-8b", dtype=dtype) for chip in ("h100", "a100")]
        found += [attention("h100", model, dtype=dtype) for model in ("llama3.2-1b", "gemma2-9b")]
    found += [attention("h100", "llama3-8b-on-8", dtype="int8"), attention("h100", "llama3-8b", dtype="int8", page=16)]
    found += [attention("h100", "phi2", dtype="float8_e4m3fn")]
    for chip in ("h100", "a100"):
        found += [attention(chip, "deepseek-v2", dtype=dtype) for dtype in ("bfloat16", "float8_e4m3fn")]
    found += [attention("a100", "deepseek-v2-lite-on-1", dtype="float32")]
    found += [attention("h100", "deepseek-v2-lite-on-1", seqs=1, tokens=1)]
    found += [attention("h100", "llama3-8b", seqs=1, tokens=1), attention("h100", "llama3-8b", seqs=256, tokens=256)]
    return found


def attention(
    chip: str, model: str, *, page: int = 64, dtype: str = "bfloat16", tokens: int = 512, seqs: int = 64
) -> tuple[str, Callable[[], tuple[Any, int]]]:
    """The kernel on as many of the chip as a model's heads are split over."""
    heads = HEADS[model]

    def lower() -> tuple[Any, int]:
        import numpy as np
        from jax.sharding import Mesh

        from kernels_pallas.ragged_paged_attention.gpu import ragged_paged_attention

        with described(chip, heads.devices) as devices:
            mesh = Mesh(np.array(devices), ("model",))
            return lowered(ragged_paged_attention, mesh, heads, page=page, dtype=dtype, tokens=tokens, seqs=seqs)

    kind = "decode" if tokens == seqs else "mixed"
    return f"{chip}/{model}/{dtype}/page{page}/{kind}-{tokens}", lower
