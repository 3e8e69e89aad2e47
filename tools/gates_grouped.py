"""Gates of the experts' grouped product, for TPUs and GPUs that are not here: one matrix of a layer, on one device."""

from dataclasses import dataclass
from typing import Any

from gates_attention import TOPOLOGIES
from gates_gpu import described


@dataclass(frozen=True)
class Experts:
    """A layer's matrices [experts, outputs, inputs] as one device has them, and how many of them a token meets."""

    experts: int
    used: int
    outputs: int
    inputs: int


EXPERTS = {
    "mixtral-8x7b-on-8/up": Experts(8, 2, 14336 // 8, 4096),
    "mixtral-8x7b-on-8/down": Experts(8, 2, 4096, 14336 // 8),
    "qwen3-30b-a3b-on-4/up": Experts(128, 8, 768 // 4, 2048),
    "qwen3-30b-a3b-on-4/down": Experts(128, 8, 2048, 768 // 4),
}


def gates() -> list[tuple[Any, ...]]:
    """The fields of compile_gate's Gate, of each."""
    mixtral, qwen3 = list(EXPERTS)[:2], list(EXPERTS)[2:]
    found = [product(chip, mixtral[0], 64) for chip in TOPOLOGIES]
    found += [product("v6e", name, 64) for name in (mixtral[1], *qwen3)]
    found += [product("v5e", mixtral[0], 2048), product("v5e", mixtral[0], 64, "float32")]
    found += [product(chip, mixtral[0], tokens) for chip in ("h100", "a100") for tokens in (64, 2048)]
    return [*found, product("h100", qwen3[1], 64), product("h100", mixtral[0], 64, "float32")]


def product(chip: str, name: str, tokens: int, dtype: str = "bfloat16") -> tuple[Any, ...]:
    """One of them with the rows of so many tokens."""
    its = EXPERTS[name]
    nbytes = its.experts * its.outputs * its.inputs * (4 if dtype == "float32" else 2)

    def lower() -> tuple[Any, int]:
        import jax
        import jax.numpy as jnp
        from jax.experimental import topologies
        from jax.sharding import SingleDeviceSharding

        def lowered(run: Any, device: Any) -> tuple[Any, int]:
            shapes = [(tokens * its.used, its.inputs), (its.experts, its.outputs, its.inputs), (its.experts,)]
            place = SingleDeviceSharding(device)
            kinds = (dtype, dtype, jnp.int32)
            arguments = [jax.ShapeDtypeStruct(*a, sharding=place) for a in zip(shapes, kinds, strict=True)]
            return jax.jit(run).lower(*arguments), 0

        if chip in TOPOLOGIES:
            from kernels_pallas.grouped_matmul import tpu

            there = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
            return lowered(tpu.grouped_matmul, there.devices[0])
        from kernels_pallas.grouped_matmul import gpu

        with described(chip, 1) as devices:
            return lowered(gpu.grouped_matmul, devices[0])

    return f"{chip}/{name}/{dtype}/{tokens}", lower, None, nbytes
