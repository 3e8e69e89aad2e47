"""Gates of products with quantised matrices, for TPUs and GPUs that are not here: a matrix or a stack, a whole step.

A step is held to make no quantised matrix anew in floating point, which is what XLA alone would do of most.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from gates_attention import TOPOLOGIES
from gates_gpu import described
from gates_quantised_judged import of_a_quantised_step
from gates_step import CACHE_BYTES, LAYERS, MODELS


@dataclass(frozen=True)
class Matrix:
    """[outputs, inputs] as one device has it, in a block format."""

    outputs: int
    inputs: int
    format: str
    vocabulary: bool = False
    experts: int | None = None
    """Of a stack of them."""
    used: int = 1
    """How many of its matrices a token meets."""


MATRICES = {
    "llama3-8b/up/q4_0": Matrix(14336, 4096, "Q4_0"),
    "llama3-8b/up/q8_0": Matrix(14336, 4096, "Q8_0"),
    "llama3-8b/up/q4_k": Matrix(14336, 4096, "Q4_K"),
    "llama3-8b/vocabulary/q6_k": Matrix(128256, 4096, "Q6_K", vocabulary=True),
    "llama3-8b-on-8/down/q4_0": Matrix(4096, 14336 // 8, "Q4_0"),
    "llama2-7b/down/q4_0": Matrix(4096, 11008, "Q4_0"),
}
STACKS = {
    "mixtral-8x7b/up/q4_k": Matrix(14336, 4096, "Q4_K", experts=8, used=2),
    "mixtral-8x7b/down/q4_0": Matrix(4096, 14336, "Q4_0", experts=8, used=2),
    "mixtral-8x7b-on-8/down/q8_0": Matrix(4096, 14336 // 8, "Q8_0", experts=8, used=2),
    "qwen3-30b-a3b/up/q4_k": Matrix(768, 2048, "Q4_K", experts=128, used=8),
    "qwen3-30b-a3b/down/q6_k": Matrix(2048, 768, "Q6_K", experts=128, used=8),
    "qwen3-30b-a3b-on-4/up/q4_0": Matrix(768 // 4, 2048, "Q4_0", experts=128, used=8),
    "qwen3-30b-a3b-on-8/down/q4_0": Matrix(2048, 768 // 8, "Q4_0", experts=128, used=8),
}
STEPS = (
    ("llama-3.1-8b", "q4_0", "v5e:2x4", "1x8", 64),
    ("llama-3.1-8b", "q4_0", "h100:1", "1", 64),
    ("qwen3-30b-a3b", "q4_k", "v6e:2x4", "expert=8", 32),
    ("qwen3-30b-a3b", "q4_k", "h100:1", "1", 32),
    ("mixtral-8x7b", "q4_0", "v5e:2x4", "2x4", 64),
)
"""Model, quantization, topology, mesh, and sequences: so many that no rows of tokens are of a matrix's shape."""


def gates() -> list[tuple[Any, ...]]:
    """The fields of compile_gate's Gate, of each."""
    first, second, *others = MATRICES
    found = [product(chip, first, 64) for chip in TOPOLOGIES] + [product("v6e", second, 64)]
    found += [product("v5e", name, 64) for name in (second, *others)]
    found += [product("v5e", first, 2048), product("v5e", second, 64, "float32")]
    found += [product(chip, name, 64) for chip in ("h100", "a100") for name in (first, second)]
    found += [product("h100", name, 32) for name in others]
    found.append(product("h100", first, 2048))
    first, second, _, qwen3, *others = STACKS
    found += [product(chip, qwen3, 64) for chip in (*TOPOLOGIES, "h100", "a100")]
    found += [product(chip, first, tokens) for chip in ("v5e", "h100") for tokens in (64, 2048)]
    found += [product(chip, name, 64) for chip in ("v6e", "h100") for name in (second, *others)]
    found += [product("v5e", name, 64) for name in (second, *list(STACKS)[2:3], *others)]
    return [*found, product("v5e", qwen3, 64, "float32"), *(step(*of) for of in STEPS)]


def product(chip: str, name: str, tokens: int, dtype: str = "bfloat16") -> tuple[Any, ...]:
    """One of them with the rows of so many tokens."""
    its = (MATRICES | STACKS)[name]
    bits = 4 if its.format in ("Q4_0", "Q4_K") else 8

    def lower() -> tuple[Any, int]:
        import jax
        import jax.numpy as jnp
        from jax.experimental import topologies
        from jax.sharding import SingleDeviceSharding

        from jaxserve.formats import FORMATS
        from jaxserve.scaled import scaled_shapes
        from kernels_pallas.grouped_matmul.contract import Quantised

        def lowered(kernel: Any, device: Any) -> tuple[Any, int]:
            place, stacked = SingleDeviceSharding(device), its.experts is not None
            shape = (*([its.experts] if stacked else []), its.outputs, its.inputs)
            format, sizes = FORMATS[its.format], (its.outputs, its.inputs)
            w = scaled_shapes(format, shape, *sizes, dtype, vocabulary=its.vocabulary, stacked=stacked)
            x = jax.ShapeDtypeStruct((tokens * its.used, its.inputs), dtype)

            def multiply(x: Any, codes: Any, scales: Any, minima: Any, sizes: Any) -> Any:
                if stacked:
                    return kernel.grouped_matmul(x, Quantised(codes, scales, minima, format.group), sizes)
                return kernel.quantised_matmul(x, codes, scales, minima, inputs_first=w.inputs_first)

            rows = jax.ShapeDtypeStruct((its.experts,), jnp.int32) if stacked else None
            given = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
                (x, w.codes, w.scales, w.minima, rows),
            )
            return jax.jit(multiply).lower(*given), 0

        kernels = "quantised_matmul" if its.experts is None else "grouped_matmul"
        if chip in TOPOLOGIES:
            there = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
            return lowered(import_module(f"kernels_pallas.{kernels}.tpu"), there.devices[0])
        with described(chip, 1) as devices:
            return lowered(import_module(f"kernels_pallas.{kernels}.gpu"), devices[0])

    return f"{chip}/{name}/{dtype}/{tokens}", lower, None, (its.experts or 1) * its.outputs * its.inputs * bits // 8


def step(model: str, quantization: str, topology: str, mesh: str, seqs: int) -> tuple[Any, ...]:
    """A step that decodes, of two layers of a model."""

    def lower() -> tuple[Any, int]:
        from jaxserve.batch import Shape
        from jaxserve.sharding import bytes_per_device

        draft = _draft(model, quantization, topology, mesh)
        programs = draft.programs
        sizes = draft.sizing.sizes(CACHE_BYTES // draft.sizing.page_bytes)
        with programs.partition.tracing():
            lowered = programs.step(Shape(seqs, seqs), sizes).lower()
        return lowered, bytes_per_device(programs.state(sizes).cache)

    def facts() -> dict[str, Any]:
        import jax

        params = _draft(model, quantization, topology, mesh).programs.params
        matrices = _codes(params)
        shapes = {tuple(a.sharding.shard_shape(a.shape)) for a in matrices}
        # All but the embedding's, of which rows are taken, are multiplied with.
        return {"shapes": sorted(shapes), "products": len(matrices) - 1, "weights": len(jax.tree.leaves(params))}

    return f"step/{model}/{quantization}/{topology}/decode", lower, of_a_quantised_step, 0, facts


@cache
def _draft(model: str, quantization: str, topology: str, mesh: str) -> Any:
    from jaxserve.config import DeviceOptions, EngineOptions, MeshShape, ModelOptions, ScheduleOptions
    from jaxserve.planning.planner import Draft, described
    from jaxserve.planning.topology import Topology

    path = MODELS / f"{model}.json"
    options = EngineOptions(
        model=ModelOptions(max_model_len=8192, quantization=quantization),
        schedule=ScheduleOptions(max_num_seqs=64, max_num_batched_tokens=512),
        device=DeviceOptions(mesh=mesh),
    )
    where = Topology.parse(topology)
    devices = described(where, MeshShape.parse(mesh))
    return Draft.of(options, path, json.loads(path.read_text()) | {"num_hidden_layers": LAYERS}, where, devices)


def _codes(params: Any) -> list[Any]:
    from jaxserve.scaled import Scaled, leaves_of

    return [leaf.codes for leaf in leaves_of(params) if isinstance(leaf, Scaled)]
