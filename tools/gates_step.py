"""Gates of whole steps: real models' widths on real slices, the step's function as an engine compiles it.

Two layers will do: a block's messages between devices are told from others by the scope that they are in, and all that
a step has are held to a stored number, so that none is missed for lack of a name. Messages are counted as instructions
of the compiled program; a reduce-scatter and the all-gather that undoes it would count as two.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from gates_step_judged import of_a_step

MODELS = Path(__file__).parent.parent / "configs" / "models"
PLACES = {"v5e:2x4": "1x8", "v6e:2x4": "2x4", "v5p:2x2x2": "1x8", "h100:8": "1x8"}
"""By topology its mesh: all chips together, and once two replicas."""
DECODED = {
    "llama-3.1-8b": tuple(PLACES),
    "mixtral-8x7b": tuple(PLACES),
    "qwen3-0.6b": tuple(PLACES),
    "qwen3-30b-a3b": ("v6e:2x4",),
    "deepseek-v2-lite": ("v5e:2x4", "h100:8"),
    "llama-3.3-70b": ("v5p:2x2x2",),
}
"""Where a model's step of one token a sequence is compiled."""
SHAPES = {"decode": (64, 64), "mixed": (512, 64), "mixed-8": (512, 8)}
"""Tokens and sequences of each kind of step."""
MIXED = {
    ("llama-3.1-8b", "v5e:2x4"): "mixed",
    ("qwen3-0.6b", "v5p:2x2x2"): "mixed-8",
    ("mixtral-8x7b", "v6e:2x4"): "mixed-8",
    ("llama-3.1-8b", "h100:8"): "mixed-8",
}
"""Where a step with prompts is compiled, too, which costs most: each model and each topology once. With 8 sequences
sampling is compiled for one number of rows instead of three, and all that prompts change is there."""
LAYERS = 2
CACHE_BYTES = 256 * 2**20
"""Of each device: more than any on-chip memory holds."""
MESSAGES = {"all-reduce": 2}
"""That a block may cost: one after attention, one after the feed-forward."""


def gates() -> list[tuple[Any, ...]]:
    """The fields of compile_gate's Gate, of each."""
    decoded = [step(name, topology, "decode") for name, where in DECODED.items() for topology in where]
    return decoded + [step(*at, kind) for at, kind in MIXED.items()]


def step(name: str, topology: str, kind: str) -> tuple[Any, ...]:
    """One model's step on one slice."""

    def facts() -> dict[str, Any]:
        import jax

        draft = _draft(name, topology)
        programs = draft.programs
        row = programs.model.cache_spec(programs.partition.config).row
        cache = programs.partition.cache(jax.ShapeDtypeStruct((1, 1, row), programs.dtype))
        (row,) = cache.sharding.shard_shape(cache.shape)[2:]
        return {
            "weights": len(jax.tree.leaves(programs.params)),
            "row": row,
            "planned": draft.weights + _pages(draft) * draft.sizing.page_bytes + draft.sizing.slots,
            "messages": {what: count * LAYERS for what, count in MESSAGES.items()},
        }

    return f"step/{name}/{topology}/{kind}", lambda: lowered(name, topology, kind), of_a_step, 0, facts


def lowered(name: str, topology: str, kind: str) -> tuple[Any, int]:
    """The step, not yet compiled, and the bytes of the state that each device updates in place."""
    from jaxserve.batch import Shape
    from jaxserve.sharding import bytes_per_device

    draft = _draft(name, topology)
    sizes = draft.sizing.sizes(_pages(draft))
    state = draft.programs.state(sizes)
    return draft.programs.step(Shape(*SHAPES[kind]), sizes).lower(), bytes_per_device(state.cache)


def _pages(draft: Any) -> int:
    return CACHE_BYTES // draft.sizing.page_bytes


@cache
def _draft(name: str, topology: str) -> Any:
    from jaxserve.config import DeviceOptions, EngineOptions, MeshShape, ModelOptions, ScheduleOptions
    from jaxserve.planning.planner import Draft, described
    from jaxserve.planning.topology import Topology

    path = MODELS / f"{name}.json"
    options = EngineOptions(
        model=ModelOptions(max_model_len=8192),
        schedule=ScheduleOptions(max_num_seqs=64, max_num_batched_tokens=512),
        device=DeviceOptions(mesh=PLACES[topology]),
    )
    where = Topology.parse(topology)
    mesh = described(where, MeshShape.parse(PLACES[topology]))
    return Draft.of(options, path, json.loads(path.read_text()) | {"num_hidden_layers": LAYERS}, where, mesh)
