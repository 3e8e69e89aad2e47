"""Compiles for TPU and GPU ahead of time, with the real compilers and neither, and holds what comes out to limits.

    tools/compile_gate                    every gate, in an environment of its own that has libtpu and JAX's CUDA plugin
    tools/compile_gate --only v5e         those whose name holds "v5e"
    tools/compile_gate --changed          those whose program is another than the one that passed before
    tools/compile_gate --few              of each kernel one for TPU and one for GPU, and two steps
    tools/compile_gate --few --changed    both, which is what CI compiles: these few, and whatever has changed
    tools/compile_gate --jobs 1           one at a time, not two
    tools/compile_gate --update           store what is found as the new limits, and which programs were compiled

A gate is a program that keeps a KV cache, or a product of experts' or of quantised weights. Each must compile, update
its cache in place, make no copy of it or of the weights on the way, and need no more memory, no more instructions (of a
TPU's kernels: VLIW bundles, each one cycle of issue), no more registers (of a GPU's) and no more spills than
tools/compile_gate.json says. That is what can be known without the hardware: not speed, and not that it is right. Those
of the TPU's attention kernel are below, those of GPUs in gates_gpu.py, those of experts in gates_grouped.py, those of
quantised matrices in gates_quantised.py, those of whole steps in gates_step.py. gates_judged.py judges them.

Of a program that passed, --update stores a digest in tools/compile_gate_programs.json: of its text with all kernels in
it, of the compilers' versions and settings, and of what judges it and its limits (gates_digest.py). The same program
passes again, so --changed lowers each gate, which takes a second or less, and compiles those whose digest is another.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import gates_digest  # noqa: E402
import gates_gpu  # noqa: E402
import gates_grouped  # noqa: E402
import gates_quantised  # noqa: E402
import gates_step  # noqa: E402
from gates_attention import TOPOLOGIES, Heads, lowered  # noqa: E402
from gates_judged import Found, Look, judged  # noqa: E402

LIMITS = Path(__file__).with_suffix(".json")
PROGRAMS = Path(__file__).with_name("compile_gate_programs.json")
"""By gate: of the program that passed, what `gates_digest.passed` says."""
SLACK = 1.03
"""Limits are what was found, and this much more: another version of the compiler schedules a little differently."""


@dataclass(frozen=True)
class Gate:
    """`lower` gives the program, not yet compiled, and how many bytes of a cache each device updates in place."""

    name: str
    lower: Callable[[], tuple[Any, int]]
    look: Look | None = None
    """What else is found in the compiled program, by name, and what is wrong with it; it is also given what may copy
    the cache, and says what does. The program's kernels then have gates of their own. It knows nothing but what it is
    given, and stands in a file of such as it, which is in the gate's digest."""
    weights: int = 0
    """Of a program without a cache: bytes of a weight that it must not copy."""
    facts: Callable[[], dict[str, Any]] = dict
    """What `look` is given besides, by name."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="gates whose name holds one of these")
    parser.add_argument("--few", action="store_true", help="of each kernel one for TPU and one for GPU, and two steps")
    parser.add_argument(
        "--changed", action="store_true", help="those whose program is another than the one that passed; also --few"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="so many at a time (default 2)")
    parser.add_argument("--update", action="store_true", help="store what is found as the new limits, and the programs")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each gate, not a table")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    known = [gate for gate in gates() if gate.name in FEW or options.changed or not options.few]
    chosen = [gate for gate in known if any(text in gate.name for text in options.only)]
    if not chosen:
        asked = " or ".join(options.only)
        parser.error(f"no gate has {asked} in its name; there are {', '.join(g.name for g in known)}")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: give how many gates to compile at a time, 1 or more")
    names = {gate.name for gate in gates()}
    limits, programs = stored(LIMITS), stored(PROGRAMS)
    always = FEW if options.few else set()
    tasks = [
        (name, programs.get(name, "") if options.changed and name not in always else "", limits.get(name, {}))
        for name in (gate.name for gate in chosen)
    ]
    if not options.json:
        versions = ", ".join(f"{name} {version}" for name, version in gates_digest.versions().items() if version)
        print(
            f"{versions}\n{'gate':<46} {'s':>5} {'cpu s':>5} {'temp MiB':>8}  kernel: bundles (on whole, cut "
            "blocks), spills"
        )
    failed = same = unknown = 0
    for gate, found in zip(chosen, measured(tasks, options.jobs), strict=True):
        same += found.same
        limits, programs = stored(LIMITS), stored(PROGRAMS)  # another run may have written meanwhile
        if options.update and not found.problems and not found.same:
            limits[gate.name] = limits.get(gate.name, {}) | found.limits()
            programs[gate.name] = gates_digest.passed(found.program, limits[gate.name])
            store(LIMITS, {name: limits[name] for name in names & set(limits)})
            store(PROGRAMS, {name: programs[name] for name in names & set(programs)})
        if not found.same and not found.problems:
            found.problems += over(found.limits(), limits.get(gate.name))
            unknown += gates_digest.passed(found.program, limits.get(gate.name, {})) != programs.get(gate.name)
        failed += bool(found.problems)
        print(json.dumps({"gate": gate.name} | asdict(found)) if options.json else line(gate.name, found))
        for problem in found.problems:
            print(f"    {problem}", file=sys.stderr)
        sys.stdout.flush()
    if not options.json:
        if unknown:
            print(f"{unknown} of the programs are not those that are stored as passed: --changed --update stores them")
        print(
            f"{len(chosen)} gates, {failed} of them failed, {same} are programs that have passed before; "
            f"{time.perf_counter() - start:.0f} s, {cpu():.0f} s of cores"
        )
    return 1 if failed else 0


def measured(tasks: list[tuple[str, str, dict[str, float]]], jobs: int) -> Iterator[Found]:
    """What came of each (gate, what is stored of a program that need not be compiled again, limits), in their order, by
    so many processes: a compiler uses one core most of the time."""
    with tempfile.TemporaryDirectory() as directory:
        # Not forked: each loads its own compilers, with its own folder to write to.
        pool = ProcessPoolExecutor(min(jobs, len(tasks)), get_context("spawn"), prepare, (Path(directory),))
        with pool:
            try:
                yield from pool.map(_measure_named, tasks)
            except BrokenProcessPool:
                for said in Path(directory).glob("*.stderr"):
                    print(said.read_text(errors="replace")[-4000:], file=sys.stderr)
                raise


def _measure_named(task: tuple[str, str, dict[str, float]]) -> Found:
    """In a process of `measured`."""
    name, spared, limits = task
    gate = next(gate for gate in gates() if gate.name == name)
    dump = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    return measure(gate, dump, _said(dump.parent), spared, limits)


def prepare(directory: Path) -> None:
    """Settings that libtpu reads when it is loaded: no TPU to look for, other processes beside, and listings to a
    folder of this process in `directory`. What compilers say goes there, too: XLA what ptxas does of Triton's kernels,
    that of GPU of each kernel that there is no disassembler, which nobody needs."""
    from jaxserve.planning.topology import environment

    os.dup2(os.open(_said(directory), os.O_CREAT | os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    dump = Path(tempfile.mkdtemp(dir=directory))
    os.environ.update(environment(dump), MOSAIC_GPU_DUMP_TO=str(dump))
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="0", TF_CPP_VMODULE="subprocess_compilation=2")
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
    )


def _said(directory: Path) -> Path:
    """Where what this process' compilers say goes."""
    return directory / f"{os.getpid()}.stderr"


def cpu() -> float:
    """Seconds of all cores that this process and those it has waited for have had so far."""
    return sum(os.times()[:4])


def stored(path: Path) -> dict[str, Any]:
    """By gate: what `store` has written."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def store(path: Path, by_gate: dict[str, Any]) -> None:
    path.write_text(json.dumps(by_gate, indent=1, sort_keys=True) + "\n")


def line(name: str, found: Found) -> str:
    times = f"{name:<46} {found.seconds:5.1f} {found.cpu_seconds:5.1f}"
    if found.same:
        return f"{times}           the same program as passed before"
    kernels = (
        f"{kernel}: {found.bundles[kernel]} ({', '.join(map(str, found.inner[kernel]))}), {found.spills[kernel]}"
        for kernel in sorted(found.bundles)
    )
    registers = (f"{kernel}: {used} registers, {found.spills[kernel]}" for kernel, used in found.registers.items())
    others = (f"{what} {value:.0f}" for what, value in found.others.items())
    what = "; ".join([*kernels, *registers, *others])
    return f"{times} {found.temp_bytes / 2**20:8.2f}  {what}"


def measure(gate: Gate, dump: Path, said: Path, spared: str, limits: dict[str, float]) -> Found:
    """Compiles one gate, unless `spared` is what is stored of its program and limits. Its listings go to `dump`, and
    what compilers say to the end of `said`. What is wrong with it is among the problems; nothing is raised for that."""
    for old in dump.iterdir():
        old.unlink()
    said_before = len(said.read_text(errors="replace"))
    start, start_cpu = time.perf_counter(), cpu()
    program, problems, compiled = "", [], None
    try:
        lowered, cache = gate.lower()
        where = TOPOLOGIES.get(gate.name.partition("/")[0])
        facts = (gate.name, where, cache, gate.weights, gate.facts())
        program = gates_digest.digest(lowered, facts, gate.look)
        same = gates_digest.passed(program, limits) == spared
        compiled = None if same else lowered.compile()
    except Exception as error:  # whatever the compiler refuses it with
        same, problems = False, [f"does not compile: {error}"[:2000]]
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": cpu() - start_cpu}
    if compiled is None:
        return Found(program=program, same=same, problems=problems, **times)
    said_since = said.read_text(errors="replace")[said_before:]
    found = judged(compiled, dump, said_since, cache, gate.weights, gate.look, gate.facts())
    return replace(found, program=program, **times)


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
