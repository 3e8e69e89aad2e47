"""Plans an engine on devices that are only described: what it needs of each, whether it fits, how fast it could be.

Everything but the compiling is what a start does, on shapes: no weight is read and nothing is computed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import jax
import msgspec
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxserve.batch import Shape
from jaxserve.config import EngineOptions, MeshShape
from jaxserve.dry_run import trace
from jaxserve.errors import ConfigError, NoRoom
from jaxserve.gguf import find_gguf
from jaxserve.loading import Chosen, Progress, choose, kv_dtype_for, memory_share
from jaxserve.models import find_model
from jaxserve.page_groups import pages_held
from jaxserve.planning.chips import CHIPS, Chip
from jaxserve.planning.estimate import Estimate, Work, fitting_context
from jaxserve.planning.steps import CompileStep, Step, compile_step
from jaxserve.planning.topology import Topology
from jaxserve.sharding import EVERY, bytes_per_device, meshes
from jaxserve.sizing import Sizing
from jaxserve.step import Programs, Sizes
from jaxserve.weights import Checkpoint, open_config, open_header
from jaxserve.weights.keep import check_scaled, scaled_leaf

USERS = (1, 16, 64)
"""Whose speed is estimated, besides as many as there may be."""
CONTEXT = 1024
"""Tokens that each of them has in the KV cache."""
GUESSED_WORKSPACE = 2**30
"""Bytes that a step is taken to need where none could be compiled."""
MOST_UTILIZATION = 0.95
"""What is still advised as --memory-utilization: the rest is the programs' code and what the runtime takes."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A plan. Bytes, pages and sizes of the engine are those of one device or one replica, estimates those of all."""

    model: str
    architecture: str
    num_params: int
    dtype: str
    kv_cache_dtype: str
    attention: str
    topology: str
    devices: int
    """That are used."""
    hosts: int
    mesh: str
    chip: dict[str, Any]
    """Its facts, and where they are from."""
    fits: bool
    problem: str | None
    """What does not fit, in the words of a start."""
    cure: str | None
    """The smallest change that would make it fit, as far as arithmetic tells."""
    device_bytes: dict[str, int]
    """By kind: weights, kv, slots, workspace; padding, by which arrays are larger as the device lays them out; code, of
    every step that will be compiled, as if each were as large as the one of its kind that was."""
    memory: int
    """Bytes that programs may have of a device."""
    usable: int
    """Those of them that --memory-utilization leaves for all but padding and code."""
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    kv_pages: int | None
    kv_tokens: int | None
    """That the pages hold in sequences of max_model_len."""
    steps: tuple[Step, ...]
    """Those that were compiled: the largest, and the largest that decodes."""
    messages_per_block: float | None
    decode: tuple[Estimate, ...]
    prefill: Estimate | None
    compile_seconds: float
    command: str | None = None
    """What to start."""


@dataclass(frozen=True)
class Draft:
    """An engine as far as it can be known without compiling."""

    chosen: Chosen
    programs: Programs
    sizing: Sizing
    shape: MeshShape
    topology: Topology
    num_params: int
    weights: int
    """Bytes of a device."""

    @classmethod
    def of(
        cls,
        options: EngineOptions,
        path: Path,
        hf: dict[str, Any],
        topology: Topology,
        mesh: Mesh,
        progress: Progress = lambda message: None,
        checkpoint: Checkpoint | None = None,
    ) -> "Draft":
        """Of the model of a config.json `hf`, which lies at `path`; `checkpoint` says what is quantised in it. Raises
        ConfigError as a start would."""
        model, device, platform = options.model, options.device, topology.chip.platform
        if platform == "cpu":  # one CPU has kernels for weights as they are stored, a mesh of them plain XLA
            device = replace(device, attention="reference")
        chosen = choose(
            model, device, path, hf, *find_model(hf, model.model_code), mesh, platform, topology.capability, progress
        )
        if model.model_code is not None:
            trace(chosen.model, chosen.config, chosen.dtype)
        kv_dtype = kv_dtype_for(model, device, chosen.attention, {}, chosen.dtype)
        specs = chosen.model.param_specs(chosen.config)
        if model.quantization is not None:
            check_scaled(model.quantization)
        params = jax.tree.map(scaled_leaf(checkpoint, model, chosen.partition, chosen.dtype), specs)
        pooling = chosen.embedding.pooling if chosen.embedding is not None else None
        programs = Programs(chosen.model, chosen.config, chosen.partition, chosen.kernel, kv_dtype, params, pooling)
        num_params = sum(int(np.prod(spec.shape)) for spec in jax.tree.leaves(specs))
        weights = bytes_per_device(params)
        sizing = Sizing(
            programs, options, platform=platform, kernel=chosen.attention, params=num_params, weights=weights,
            memory=topology.chip.memory,
        )  # fmt: skip
        return cls(chosen, programs, sizing, MeshShape.parse(device.mesh or "1"), topology, num_params, weights)

    @property
    def decoding(self) -> Shape | None:
        """The largest shape of one token a sequence, where there is one."""
        return max((shape for shape in self.sizing.shapes if shape.single), default=None)


def described(topology: Topology, shape: MeshShape) -> Mesh:
    """A replica's mesh of a topology's devices. Raises ConfigError for more devices than there are."""
    return meshes(shape, topology.devices())[0]


def sketched(shape: MeshShape) -> Mesh:
    """A replica's mesh of no devices at all: enough for sizes, not to compile."""
    axes = (AxisType.Auto,) * len(EVERY)
    if shape.per_replica == 1:
        return Mesh(np.array(jax.local_devices(backend="cpu")[:1]).reshape(1, 1), EVERY, axis_types=axes)
    return cast(Mesh, AbstractMesh((shape.expert, shape.model), EVERY, axis_types=axes))


def plan(
    options: EngineOptions,
    path: Path,
    topology: Topology,
    *,
    context: int = CONTEXT,
    mesh: Callable[[Topology, MeshShape], Mesh] = described,
    compile_one: CompileStep = compile_step,
    progress: Progress = lambda message: None,
) -> Report:
    """The plan for the model whose config lies at `path`, see `open_config`. What does not fit is said in the report.

    Raises ConfigError for everything else that a start would refuse.
    """
    hf, checkpoint = open_config(path), open_header(path) if find_gguf(path) is not None else None
    shape = MeshShape.parse(options.device.mesh or "1")
    draft = Draft.of(options, path, hf, topology, mesh(topology, shape), progress, checkpoint)
    sizing, steps = draft.sizing, list[Step]()
    sizes: Sizes | None = None
    problem: str | None = None
    cure: str | None = None

    def compiled(wanted: Shape, at: Sizes) -> Step:
        progress(f"compiling a step of {wanted.tokens} tokens, {wanted.seqs} sequences for {topology}, mesh {shape}")
        steps.append(compile_one(draft.programs, wanted, at))
        return steps[-1]

    try:
        trial = sizing.trial()
        found = sizing.fitted(compiled(sizing.largest, trial).workspace)
        compiled(draft.decoding or sizing.largest, found)
        sizes = found
    except NoRoom as error:
        problem = error.message
        workspace = max((step.workspace for step in steps), default=GUESSED_WORKSPACE)
        cure = smallest_change(options, path, hf, draft, workspace, checkpoint)
    device_bytes = _device_bytes(draft, steps, sizes)
    excess = sum(device_bytes.values()) - topology.chip.memory
    if sizes is not None and excess > 0:
        problem = (
            f"the padding of arrays and the code of {len(sizing.shapes)} steps come on top, and then "
            f"{excess / 2**30:.2f} GiB are missing"
        )
        fewer = sizes.num_pages - -(-excess // sizing.page_bytes)
        cure = f"--num-kv-pages {fewer}" if fewer > 0 else None
    layers = draft.chosen.config.layers
    decode, prefill = _estimates(draft, sizes, context) if sizes is not None else ((), None)
    return Report(
        model=options.model.model or str(path),
        architecture=draft.chosen.model.name,
        num_params=draft.num_params,
        dtype=draft.chosen.dtype.name,
        kv_cache_dtype=draft.programs.dtype.name,
        attention=draft.chosen.attention,
        topology=str(topology),
        devices=shape.devices,
        hosts=topology.hosts,
        mesh=str(shape),
        chip=_facts(topology.chip),
        fits=problem is None,
        problem=problem,
        cure=cure,
        device_bytes=device_bytes,
        memory=topology.chip.memory,
        usable=int(topology.chip.memory * memory_share(options.device, topology.chip.platform)),
        max_model_len=sizes.max_model_len if sizes else None,
        max_num_seqs=sizing.seqs,
        max_num_batched_tokens=sizing.tokens,
        page_size=sizing.page,
        kv_pages=sizes.num_pages if sizes else None,
        kv_tokens=_tokens_held(draft, sizes) if sizes else None,
        steps=tuple(steps),
        messages_per_block=steps[-1].per_block(layers) if steps else None,
        decode=decode,
        prefill=prefill,
        compile_seconds=sum(step.seconds for step in steps),
    )


def every_mesh(topology: Topology) -> list[MeshShape]:
    """Those that use all of its devices, from one replica to as many as there are devices."""
    counts = [n for n in range(1, topology.count + 1) if topology.count % n == 0]
    return [MeshShape(data=n, model=topology.count // n) for n in counts]


def smallest_change(
    options: EngineOptions,
    path: Path,
    hf: dict[str, Any],
    draft: Draft,
    workspace: int,
    checkpoint: Checkpoint | None = None,
) -> str | None:
    """In words the first of some changes, the smallest first, with which the sizes fit; None if none of them helps.

    By arithmetic: a step is taken to need `workspace` bytes everywhere.
    """
    topology, shape, device = draft.topology, draft.shape, options.device

    def fitted(where: Topology, at: MeshShape, changed: EngineOptions) -> Sizes | None:
        changed = replace(changed, device=replace(changed.device, mesh=str(at)))
        try:
            found = Draft.of(changed, path, hf, where, sketched(at), checkpoint=checkpoint)
            return found.sizing.fitted(workspace)
        except ConfigError:
            return None

    if memory_share(device, topology.chip.platform) < MOST_UTILIZATION:
        more = replace(options, device=replace(device, memory_utilization=MOST_UTILIZATION))
        if fitted(topology, shape, more):
            return f"--memory-utilization {MOST_UTILIZATION}"
    if options.model.max_model_len is not None:
        sizes = fitted(topology, shape, replace(options, model=replace(options.model, max_model_len=None)))
        if sizes is not None:
            return f"--max-model-len {sizes.max_model_len}"
    for where, at in _larger(topology, shape):
        if fitted(where, at, options):
            return f"--mesh {at}" if where == topology else f"--topology {where} --mesh {at}"
    return None


def _larger(topology: Topology, shape: MeshShape) -> Iterator[tuple[Topology, MeshShape]]:
    """Where a replica has more memory: more of these devices, a larger slice, then other chips."""
    chip = topology.chip
    slices = [Topology(chip, size) for size in chip.sizes]
    roomier = sorted(
        (c for c in CHIPS.values() if c.platform == chip.platform and c.memory > chip.memory), key=lambda c: c.memory
    )
    wider = [topology, *sorted((s for s in slices if s.count > topology.count), key=lambda s: s.count)]
    others = [Topology(c, size) for c in roomier for size in c.sizes]
    for where in (*wider, *(o for o in others if o.count >= topology.count)):
        for each in range(1, where.count + 1):
            if where.count % each or each % shape.expert:
                continue
            at = replace(shape, data=where.count // each, model=each // shape.expert)
            if where.chip != chip or each > shape.per_replica:
                yield where, at


def _device_bytes(draft: Draft, steps: Sequence[Step], sizes: Sizes | None) -> dict[str, int]:
    found = {
        "weights": draft.weights,
        "kv": sizes.num_pages * draft.sizing.page_bytes if sizes else 0,
        "slots": draft.sizing.slots,
        "workspace": max((step.workspace for step in steps), default=0),
    }
    known = found["weights"] + found["kv"] + found["slots"]
    found["padding"] = max(0, steps[-1].arguments - known) if sizes and steps else 0
    if steps:
        found["code"] = sum(steps[-1 if shape.single else 0].code for shape in draft.sizing.shapes)
    return found


def _tokens_held(draft: Draft, sizes: Sizes) -> int:
    return (
        sizes.num_pages * sizes.max_model_len // pages_held(draft.sizing.windows, sizes.max_model_len, sizes.page_size)
    )


def _estimates(draft: Draft, sizes: Sizes, context: int) -> tuple[tuple[Estimate, ...], Estimate | None]:
    chip, chosen, replicas = draft.topology.chip, draft.chosen, draft.shape.data
    if not chip.estimated:
        return (), None
    groups = draft.programs.groups
    kv_row = draft.sizing.page_bytes / sizes.page_size
    params = draft.programs.params
    work = Work.of(chosen.model, chosen.config, chosen.partition, chosen.dtype, params, groups, kv_row)
    peak = chip.float32 if chosen.dtype.name == "float32" else chip.bf16
    most = sizes.max_num_seqs * replicas
    decode = []
    for users in sorted({n for n in USERS if n < most} | {most}) if chosen.embedding is None else ():
        wanted = min(context, sizes.max_model_len)
        each = fitting_context(groups, sizes.num_pages, sizes.page_size, -(-users // replicas), wanted)
        if each:
            decode.append(work.decode(chip, peak, users, replicas, each))
    tokens = min(sizes.max_num_batched_tokens, sizes.max_model_len)
    return tuple(decode), work.prefill(chip, peak, tokens, replicas)


def _facts(chip: Chip) -> dict[str, Any]:
    return {
        "name": chip.name,
        "memory_bytes": chip.memory,
        "bytes_per_second": chip.bandwidth,
        "bf16_flops": chip.bf16,
        "float32_flops": chip.float32,
        "int8_ops": chip.int8,
        "source": chip.source,
    }
