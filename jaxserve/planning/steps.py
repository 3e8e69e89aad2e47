"""Compiles a step for its devices and reads from the result what can be known without running it."""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator

import jax
import msgspec

from jaxserve.batch import Shape
from jaxserve.errors import NoRoom
from jaxserve.sizing import workspace_of
from jaxserve.step import Programs, Sizes

type CompileStep = Callable[[Programs, Shape, Sizes], "Step"]
"""`compile_step`, or what stands in for it."""

BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
"""Of an element, by its type's name in a compiled program's text."""

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"
_COLLECTIVE = re.compile(rf"= (?P<result>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Collective(msgspec.Struct, frozen=True):
    """Messages between the devices of a replica, all of one kind and in one part of the step."""

    kind: str
    part: str
    """block: in the model's blocks; embed; logits; sample; other."""
    count: int
    """Instructions of the program. Those in branches of which one is taken are counted in each."""
    bytes: int
    """Of all their results together, on one device."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What the compiler made of a step; all bytes are those of one device."""

    tokens: int
    seqs: int
    seconds: float
    """That it took to trace and compile."""
    arguments: int
    """Bytes of weights, state and the step's input, laid out as the device has them."""
    updated: int
    """Of these, bytes that are updated in place."""
    workspace: int
    code: int
    flops: float | None
    """Floating-point operations, and bytes read and written, as XLA counts them: without kernels of our own, and with
    all of a step's branches. None: it does not say."""
    bytes_accessed: float | None
    collectives: tuple[Collective, ...]

    def per_block(self, layers: int) -> float:
        """Messages between the devices in each block."""
        return sum(c.count for c in self.collectives if c.part == "block") / layers


def compile_step(programs: Programs, shape: Shape, sizes: Sizes) -> Step:
    """Compiles the step of a shape for the devices of its Partition, which need not be here. Raises NoRoom for one that
    the compiler finds no memory for."""
    start = time.perf_counter()
    try:
        with programs.partition.tracing():  # which kernels of our own are lowered in, too
            lowered = programs.step(shape, sizes).lower()
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        what = f"a step of {shape.tokens} tokens, {shape.seqs} sequences and {sizes.num_pages} pages of KV cache"
        raise NoRoom(f"{what} does not compile: {str(error).splitlines()[0]}") from error
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return Step(
        tokens=shape.tokens,
        seqs=shape.seqs,
        seconds=seconds,
        arguments=memory.argument_size_in_bytes if memory else 0,
        updated=memory.alias_size_in_bytes if memory else 0,
        workspace=workspace_of(compiled),
        code=memory.generated_code_size_in_bytes if memory else 0,
        flops=cost.get("flops"),
        bytes_accessed=cost.get("bytes accessed"),
        collectives=tuple(collectives(compiled.as_text() or "")),
    )


def collectives(text: str) -> Iterator[Collective]:
    """The messages of a compiled program, most first; `text` is its HLO."""
    count: Counter[tuple[str, str]] = Counter()
    size: Counter[tuple[str, str]] = Counter()
    for line in text.splitlines():
        if not (found := _COLLECTIVE.search(line)):
            continue
        named = _OP_NAME.search(line)
        key = found["kind"], _part(named[1] if named else "")
        arrays = [
            BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
            for kind, dims in _ARRAY.findall(found["result"])
        ]
        # One that is begun and awaited later returns its argument, too, but for all-reduce.
        whole = found["start"] and found["kind"] != "all-reduce"
        count[key] += 1
        size[key] += max(arrays, default=0) if whole else sum(arrays)
    for key, number in count.most_common():
        yield Collective(*key, number, size[key])


def _part(op_name: str) -> str:
    scopes = op_name.split("/")
    if "forward" in scopes:
        return "embed" if "embed" in scopes else "block"
    return next((part for part in ("sample", "logits", "pool") if part in scopes), "other")
