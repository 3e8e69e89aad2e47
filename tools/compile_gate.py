"""Compiles for TPU and GPU ahead of time, with the real compilers and neither, and holds what comes out to limits.

    tools/compile_gate                    every gate, in an environment of its own that has libtpu and JAX's CUDA plugin
    tools/compile_gate --only v5e         those whose name holds "v5e"
    tools/compile_gate --few              those that CI compiles: of each kernel one for TPU and one for GPU, two steps
    tools/compile_gate --jobs 1           one at a time, not two
    tools/compile_gate --update           store what is found as the new limits

A gate is a program that keeps a KV cache, or a product of experts' or of quantised weights. Each must compile, update
its cache in place, make no copy of it or of the weights on the way, and need no more memory, no more instructions (of a
TPU's kernels: VLIW bundles, each one cycle of issue), no more registers (of a GPU's) and no more spills than
tools/compile_gate.json says. That is what can be known without the hardware: not speed, and not that it is right. Those
of the TPU's attention kernel are below, those of GPUs in gates_gpu.py, those of experts in gates_grouped.py, those of
quantised matrices in gates_quantised.py, those of whole steps in gates_step.py.
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import gates_gpu  # noqa: E402
import gates_grouped  # noqa: E402
import gates_quantised  # noqa: E402
import gates_step  # noqa: E402
from gates_attention import TOPOLOGIES, Heads, lowered  # noqa: E402

LIMITS = Path(__file__).with_suffix(".json")
SLACK = 1.03
"""Limits are what was found, and this much more: another version of the compiler schedules a little differently."""

BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
# What moves data without computing. A scatter is not among them: the cache's own is done in place.
COPIES = "copy|copy-start|transpose|dynamic-slice|slice|slice-start|concatenate|pad|convert|gather|async-start"


@dataclass(frozen=True)
class Gate:
    """`lower` gives the program, not yet compiled, and how many bytes of a cache each device updates in place."""

    name: str
    lower: Callable[[], tuple[Any, int]]
    look: Callable[[Any, Iterable[str]], tuple[dict[str, float], list[str]]] | None = None
    """What else is found in the compiled program, by name, and what is wrong with it; it is also given what may copy
    the cache, and says what does. The program's kernels then have gates of their own."""
    weights: int = 0
    """Of a program without a cache: bytes of a weight that it must not copy."""


@dataclass
class Found:
    """What the compiler made of a gate's program."""

    seconds: float
    cpu_seconds: float
    """Of all cores; other work on the machine adds little to it."""
    temp_bytes: int = 0
    code_bytes: int = 0
    bundles: dict[str, int] = field(default_factory=dict)
    """By kernel: all of its instructions."""
    inner: dict[str, list[int]] = field(default_factory=dict)
    """By kernel: its two longest stretches without a branch, which are its computing on whole and on cut kv blocks."""
    registers: dict[str, int] = field(default_factory=dict)
    """By attention kernel for GPU: of each thread."""
    by_machine: list[str] = field(default_factory=list)
    """Kernels of Triton's. Theirs is the ptxas of this machine, so registers, which change with it, have no limit."""
    spills: dict[str, int] = field(default_factory=dict)
    """By kernel: instructions for TPU, bytes of a thread for GPU."""
    others: dict[str, float] = field(default_factory=dict)
    """What else is held to limits, by name."""
    problems: list[str] = field(default_factory=list)

    def limits(self) -> dict[str, float]:
        """The figures that are held to limits, by name."""
        found: dict[str, float] = {"temp_bytes": self.temp_bytes} | self.others
        for kernel in self.bundles:
            found[f"{kernel}.bundles"], found[f"{kernel}.spills"] = self.bundles[kernel], self.spills[kernel]
        for kernel in self.registers:
            found[f"{kernel}.spills"] = self.spills[kernel]
            if kernel not in self.by_machine:
                found[f"{kernel}.registers"] = self.registers[kernel]
        return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="gates whose name holds one of these")
    parser.add_argument("--few", action="store_true", help="of each kernel one for TPU and one for GPU, and two steps")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="so many at a time (default 2)")
    parser.add_argument("--update", action="store_true", help="store what is found as the new limits")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each gate, not a table")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    known = [gate for gate in gates() if not options.few or gate.name in FEW]
    chosen = [gate for gate in known if any(text in gate.name for text in options.only)]
    if not chosen:
        asked = " or ".join(options.only)
        parser.error(f"no gate has {asked} in its name; there are {', '.join(g.name for g in known)}")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: give how many gates to compile at a time, 1 or more")
    failed, names = 0, {gate.name for gate in gates()}
    if not options.json:
        print(
            f"{versions()}\n{'gate':<46} {'s':>5} {'cpu s':>5} {'temp MiB':>8}  kernel: bundles (on whole, cut "
            "blocks), spills"
        )
    for gate, found in measured(chosen, options.jobs):
        stored = known_limits()
        if options.update and not found.problems:
            stored[gate.name] = stored.get(gate.name, {}) | found.limits()
            stored = {name: limits for name, limits in stored.items() if name in names}
            LIMITS.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
        found.problems += over(found.limits(), stored.get(gate.name))
        failed += bool(found.problems)
        print(json.dumps({"gate": gate.name} | asdict(found)) if options.json else line(gate.name, found))
        for problem in found.problems:
            print(f"    {problem}", file=sys.stderr)
        sys.stdout.flush()
    if not options.json:
        print(
            f"{len(chosen)} gates, {failed} of them failed; {time.perf_counter() - start:.0f} s, {cpu():.0f} s of cores"
        )
    return 1 if failed else 0


def measured(chosen: list[Gate], jobs: int) -> Iterator[tuple["Gate", "Found"]]:
    """Each with what came of it, in their order, by so many processes: a compiler uses one core most of the time."""
    listings = any(gate.look is None for gate in chosen)
    with tempfile.TemporaryDirectory() as directory:
        # Not forked: each loads its own compilers, with its own folder to write to.
        pool = ProcessPoolExecutor(min(jobs, len(chosen)), get_context("spawn"), prepare, (Path(directory), listings))
        with pool:
            try:
                yield from zip(chosen, pool.map(_measure_named, [gate.name for gate in chosen]), strict=True)
            except BrokenProcessPool:
                for said in Path(directory).glob("*.stderr"):
                    print(said.read_text(errors="replace")[-4000:], file=sys.stderr)
                raise


def _measure_named(name: str) -> "Found":
    """In a process of `measured`."""
    gate = next(gate for gate in gates() if gate.name == name)
    dump = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    return measure(gate, dump, _said(dump.parent))


def prepare(directory: Path, listings: bool) -> None:
    """Settings that libtpu reads when it is loaded: no TPU to look for, other processes beside, and if they are wanted
    listings to a folder of this process in `directory`. What compilers say goes there, too: XLA what ptxas does of
    Triton's kernels, that of GPU of each kernel that there is no disassembler, which nobody needs."""
    from jaxserve.planning.topology import environment

    os.dup2(os.open(_said(directory), os.O_CREAT | os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    dump = Path(tempfile.mkdtemp(dir=directory))
    os.environ.update(environment(dump), MOSAIC_GPU_DUMP_TO=str(dump))
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="0", TF_CPP_VMODULE="subprocess_compilation=2")
    if listings:
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
        )


def _said(directory: Path) -> Path:
    """Where what this process' compilers say goes."""
    return directory / f"{os.getpid()}.stderr"


def cpu() -> float:
    """Seconds of all cores that this process and those it has waited for have had so far."""
    return sum(os.times()[:4])


def known_limits() -> dict[str, dict[str, float]]:
    """By gate and figure."""
    found: dict[str, dict[str, float]] = json.loads(LIMITS.read_text()) if LIMITS.exists() else {}
    return found


def versions() -> str:
    from importlib.metadata import version

    return f"jax {version('jax')}, libtpu {version('libtpu')}"


def line(name: str, found: Found) -> str:
    kernels = (
        f"{kernel}: {found.bundles[kernel]} ({', '.join(map(str, found.inner[kernel]))}), {found.spills[kernel]}"
        for kernel in sorted(found.bundles)
    )
    registers = (f"{kernel}: {used} registers, {found.spills[kernel]}" for kernel, used in found.registers.items())
    others = (f"{what} {value:.0f}" for what, value in found.others.items())
    what = "; ".join([*kernels, *registers, *others])
    return f"{name:<46} {found.seconds:5.1f} {found.cpu_seconds:5.1f} {found.temp_bytes / 2**20:8.2f}  {what}"


def measure(gate: Gate, dump: Path, said: Path) -> Found:
    """Compiles one gate, whose listings go to `dump` and what compilers say to the end of `said`. What is wrong with it
    is among the problems; nothing is raised for that."""
    for old in dump.iterdir():
        old.unlink()
    said_before = len(said.read_text(errors="replace"))
    start, start_cpu = time.perf_counter(), cpu()
    try:
        lowered, cache = gate.lower()
        compiled = lowered.compile()
    except Exception as error:  # whatever the compiler refuses it with
        problems = [f"does not compile: {error}"[:2000]]
        return Found(time.perf_counter() - start, cpu() - start_cpu, problems=problems)
    memory = compiled.memory_analysis()
    found = Found(
        time.perf_counter() - start,
        cpu() - start_cpu,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )
    if memory.alias_size_in_bytes < cache:
        found.problems.append(f"{memory.alias_size_in_bytes} bytes are updated in place; the cache has {cache}")
    copied = copies(compiled.as_text(), (gate.weights or cache) // 8)
    if gate.look is not None:
        found.others, problems = gate.look(compiled, copied)
        found.problems += problems
        return found
    found.problems += [f"copies the {'weight' if gate.weights else 'cache'}: {what}" for what in copied]
    for path in sorted(dump.glob("*-final_bundles.txt")):
        kernel = re.search(r"jaxserve_(\w+)[\w.]*-\d+-final_bundles", path.name)
        if kernel and "schedule-analysis" not in path.name:
            name, listing = kernel[1], path.read_text(errors="replace")
            found.bundles[name], found.inner[name], found.spills[name] = schedule(listing)
    by_mosaic = list(gates_gpu.registers("".join(path.read_text() for path in dump.glob("*.ptxas"))))
    by_triton = list(gates_gpu.registers(said.read_text(errors="replace")[said_before:]))
    for kernel, used, spilled in [*by_mosaic, *by_triton]:
        found.registers[kernel], found.spills[kernel] = used, spilled
    found.by_machine = [kernel for kernel, *_ in by_triton]
    return found


def copies(hlo: str, least: int) -> Iterator[str]:
    """The instructions of a compiled program that move `least` bytes or more without computing anything."""
    for text in hlo.splitlines():
        found = re.search(rf"= \(?(\w+)\[([\d,]*)\].* ({COPIES})\(", text)
        if found and BYTES.get(found[1], 4) * math.prod(int(n) for n in found[2].split(",") if n) >= least:
            yield text.strip()[:160]


def schedule(listing: str) -> tuple[int, list[int], int]:
    """Of a kernel's final listing: its bundles, the two longest stretches without a label, and spills to memory."""
    count, stretch, stretches = 0, 0, []
    for text in listing.splitlines():
        bundle = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+((?:[A-Z]{2}\s?)*):", text)
        if bundle:
            if bundle[1].strip():
                stretches.append(stretch)
                stretch = 0
            count, stretch = count + 1, stretch + 1
    longest = sorted([*stretches, stretch], reverse=True)[:2]
    return count, sorted(longest), sum("_spill]" in text for text in listing.splitlines())


def over(found: dict[str, float], limits: dict[str, float] | None) -> list[str]:
    """What is above its limit, or has none."""
    if limits is None:
        return ["has no limits yet: run with --update"]
    return [
        f"{name} is {value:.0f}; the limit is {limits.get(name, 0) * SLACK:.0f}"
        for name, value in found.items()
        if value > limits.get(name, 0) * SLACK
    ]


HEADS = {
    "llama3-8b": Heads(32, 8, 128, devices=4),  # Mixtral 8x7B has the same
    "qwen3-0.6b": Heads(16, 8, 128, devices=4),
    "gemma2-9b": Heads(16, 8, 256, devices=4, window=4096, soft_cap=50.0),
    "llama3-8b-on-1": Heads(32, 8, 128),
    "phi3-mini-on-1": Heads(32, 32, 96),
    "bge-base-on-1": Heads(12, 12, 64, causal=False),
    "deepseek-v2-lite-on-1": Heads(16, 1, 576, values=512),
    "deepseek-v2": Heads(128, 1, 576, devices=4, values=512),
}

FEW = {
    "v5e/llama3-8b/bfloat16/page64/mixed",
    "v6e/llama3-8b/int8/page128/mixed",
    "v5e/bge-base-on-1/bfloat16/page64/mixed",
    "v6e/deepseek-v2-lite-on-1/bfloat16/page64/mixed",
    "h100/llama3-8b/bfloat16/page64/mixed-512",
    "h100/llama3-8b/int8/page64/mixed-512",
    "a100/llama3-8b/bfloat16/page64/mixed-512",  # Triton, as on all GPUs but Hopper
    "v6e/mixtral-8x7b-on-8/up/bfloat16/64",
    "h100/mixtral-8x7b-on-8/up/bfloat16/64",
    "step/qwen3-0.6b/v5e:2x4/decode",
    "step/llama-3.1-8b/h100:8/decode",
}
"""What CI compiles."""


def gates() -> list[Gate]:
    """Every gate, those of the attention kernel first."""
    found = [partial(attention, chip, model) for chip in TOPOLOGIES for model in ("llama3-8b", "gemma2-9b")]
    found += [partial(attention, chip, "qwen3-0.6b") for chip in ("v5e", "v6e")]
    found += [partial(attention, chip, "llama3-8b-on-1") for chip in ("v4", "v5e")]
    found += [partial(attention, "v4", "phi3-mini-on-1")]
    found += [partial(attention, "v6e", "llama3-8b", page=page) for page in (16, 128)]
    found += [partial(attention, "v6e", "llama3-8b", dtype=dtype) for dtype in ("float8_e4m3fn", "float32")]
    found += [partial(attention, "v5e", "llama3-8b", tokens=64)]  # a step that decodes only
    found += [partial(attention, chip, "llama3-8b", page=128, dtype="int8") for chip in TOPOLOGIES]
    found += [partial(attention, "v6e", "phi3-mini-on-1", page=128, dtype="int8")]
    found += [partial(attention, "v5e", "bge-base-on-1")]
    found += [partial(attention, chip, "deepseek-v2-lite-on-1") for chip in TOPOLOGIES]
    found += [partial(attention, "v6e", "deepseek-v2"), partial(attention, "v6e", "deepseek-v2", dtype="float8_e4m3fn")]
    others = (gates_gpu, gates_grouped, gates_quantised, gates_step)
    return [*(gate() for gate in found), *(Gate(*fields) for module in others for fields in module.gates())]


def attention(
    chip: str, model: str, *, page: int = 64, dtype: str = "bfloat16", tokens: int = 512, seqs: int = 64
) -> Gate:
    """The kernel on a mesh of the chip's whole slice."""
    kind = "decode" if tokens == seqs else "mixed"
    heads = HEADS[model]

    def lower() -> tuple[Any, int]:
        import numpy as np
        from jax.experimental import topologies
        from jax.sharding import Mesh

        from kernels_pallas.ragged_paged_attention.tpu import ragged_paged_attention

        devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
        mesh = Mesh(np.array(devices).reshape(-1, heads.devices), ("data", "model"))
        return lowered(ragged_paged_attention, mesh, heads, page=page, dtype=dtype, tokens=tokens, seqs=seqs)

    return Gate(f"{chip}/{model}/{dtype}/page{page}/{kind}", lower)


if __name__ == "__main__":
    sys.exit(main())
