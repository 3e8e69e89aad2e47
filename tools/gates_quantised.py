"""Gates of products with quantised matrices, for TPUs and GPUs that are not here: one matrix alone, and a whole step.

A step is held to make no quantised matrix anew in floating point, which is what XLA alone would do of most.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from gates_attention import TOPOLOGIES
from gates_gpu import described
from gates_step import CACHE_BYTES, LAYERS, MODELS, SHAPES


@dataclass(frozen=True)
class Matrix:
    """[outputs, inputs] as one device has it, in a block format."""

    outputs: int
    inputs: int
    format: str
    vocabulary: bool = False


MATRICES = {
    "llama3-8b/up/q4_0": Matrix(14336, 4096, "Q4_0"),
    "llama3-8b/up/q8_0": Matrix(14336, 4096, "Q8_0"),
    "llama3-8b/up/q4_k": Matrix(14336, 4096, "Q4_K"),
    "llama3-8b/vocabulary/q6_k": Matrix(128256, 4096, "Q6_K", vocabulary=True),
    "llama3-8b-on-8/down/q4_0": Matrix(4096, 14336 // 8, "Q4_0"),
    "llama2-7b/down/q4_0": Matrix(4096, 11008, "Q4_0"),
}
STEPS = (("v5e:2x4", "1x8"), ("h100:1", "1"))


def gates() -> list[tuple[Any, ...]]:
    """The fields of compile_gate's Gate, of each."""
    first, second, *others = MATRICES
    found = [product(chip, first, 64) for chip in TOPOLOGIES] + [product("v6e", second, 64)]
    found += [product("v5e", name, 64) for name in (second, *others)]
    found += [product("v5e", first, 2048), product("v5e", second, 64, "float32")]
    found += [product(chip, name, 64) for chip in ("h100", "a100") for name in (first, second)]
    found += [product("h100", name, 32) for name in others]
    return [*found, product("h100", first, 2048), *(step(*place) for place in STEPS)]


def product(chip: str, name: str, tokens: int, dtype: str = "bfloat16") -> tuple[Any, ...]:
    """One of them with so many rows."""
    its = MATRICES[name]
    bits = 4 if its.format in ("Q4_0", "Q4_K") else 8

    def lower() -> tuple[Any, int]:
        import jax
        from jax.experimental import topologies
        from jax.sharding import SingleDeviceSharding

        from jaxserve.formats import FORMATS
        from jaxserve.scaled import scaled_shapes

        def lowered(kernel: Any, device: Any) -> tuple[Any, int]:
            place, shape = SingleDeviceSharding(device), (its.outputs, its.inputs)
            w = scaled_shapes(FORMATS[its.format], shape, *shape, dtype, vocabulary=its.vocabulary)
            x = jax.ShapeDtypeStruct((tokens, its.inputs), dtype)
            given = [x, w.codes, w.scales, *([] if w.minima is None else [w.minima])]
            placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in given]
            run = jax.jit(lambda *arrays: kernel(*arrays, inputs_first=w.inputs_first))
            return run.lower(*placed), 0

        if chip in TOPOLOGIES:
            from kernels_pallas.quantised_matmul import tpu

            there = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
            return lowered(tpu.quantised_matmul, there.devices[0])
        from kernels_pallas.quantised_matmul import gpu

        with described(chip, 1) as devices:
            return lowered(gpu.quantised_matmul, devices[0])

    return f"{chip}/{name}/{dtype}/{tokens}", lower, None, its.outputs * its.inputs * bits // 8


def step(topology: str, mesh: str) -> tuple[Any, ...]:
    """A step that decodes of Llama 3.1 8B with weights in Q4_0, two layers of it."""

    def lower() -> tuple[Any, int]:
        from jaxserve.batch import Shape
        from jaxserve.sharding import bytes_per_device

        draft = _draft(topology, mesh)
        programs = draft.programs
        sizes = draft.sizing.sizes(CACHE_BYTES // draft.sizing.page_bytes)
        with programs.partition.tracing():
            lowered = programs.step(Shape(*SHAPES["decode"]), sizes).lower()
        return lowered, bytes_per_device(programs.state(sizes).cache)

    def look(compiled: Any, large: Iterable[str]) -> tuple[dict[str, float], list[str]]:
        text, matrices = compiled.as_text(), _codes(_draft(topology, mesh).programs.params)
        shapes = {tuple(a.sharding.shard_shape(a.shape)) for a in matrices}
        problems = [f"makes a quantised matrix anew: {what}" for what in made_anew(text, shapes)]
        calls = sum(" custom-call(" in line and "jaxserve_quantised_matmul" in line for line in text.splitlines())
        if calls != len(matrices) - 1:  # all but the embedding's, of which rows are taken
            problems.append(f"{len(matrices)} matrices are quantised, and {calls} products call the kernel")
        return {}, problems

    return f"step/llama-3.1-8b/q4_0/{topology}/decode", lower, look


@cache
def _draft(topology: str, mesh: str) -> Any:
    from jaxserve.config import DeviceOptions, EngineOptions, MeshShape, ModelOptions, ScheduleOptions
    from jaxserve.planning.planner import Draft, described
    from jaxserve.planning.topology import Topology

    path = MODELS / "llama-3.1-8b.json"
    options = EngineOptions(
        model=ModelOptions(max_model_len=8192, quantization="q4_0"),
        schedule=ScheduleOptions(max_num_seqs=64, max_num_batched_tokens=512),
        device=DeviceOptions(mesh=mesh),
    )
    where = Topology.parse(topology)
    devices = described(where, MeshShape.parse(mesh))
    return Draft.of(options, path, json.loads(path.read_text()) | {"num_hidden_layers": LAYERS}, where, devices)


def _codes(params: Any) -> list[Any]:
    from jaxserve.scaled import Scaled, leaves_of

    return [leaf.codes for leaf in leaves_of(params) if isinstance(leaf, Scaled)]


def made_anew(hlo: str, shapes: set[tuple[int, ...]]) -> Iterator[str]:
    """The instructions of a compiled program, those inside its fusions apart, that make an array of floating-point
    numbers of one of the shapes, or of one with its axes exchanged."""
    wanted = shapes | {shape[::-1] for shape in shapes}
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        found = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (?:bf16|f16|f32)\[([\d,]+)\]\S* (?!parameter)", line)
        if found and tuple(map(int, found[1].split(","))) in wanted:
            yield line.strip()[:160]
