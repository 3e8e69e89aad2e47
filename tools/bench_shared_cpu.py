"""What `jaxserve serve` and llama.cpp's llama-server do to a process that computes beside them, and it to them.

python tools/bench_shared_cpu.py --type Q4_0 --case 1x16x256 --rounds 3

The neighbour is one thread that hashes, on the same processors. Each server is started, warmed up and left alone, then
answers alone, then the neighbour computes alone, then both at once; who is first changes from round to round. Ratios
are of one round. A thread that spins while it waits shows as processor time a token that grows beside the neighbour,
and as a neighbour that is slower than the processors that it shares would make it.
"""

import argparse
import asyncio
import contextlib
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_llama_cpp import OURS, QUIET, SHAPES, Case, Setting, Target, answered, busy_seconds, first_token, model_file
from llamacpp import Server, build, default_folder, free_port, running, server_argv, version

from jaxserve import bench
from jaxserve.gguf import GgufFile

THEIRS = "llama.cpp"
NEIGHBOUR = """
import hashlib, mmap, struct, sys
counter, block, done = mmap.mmap(int(sys.argv[1]), 8), bytes(65536), 0
while True:
    hashlib.sha256(block).digest()
    done += 1
    counter[:] = struct.pack("<q", done)
"""


class Neighbour:
    """A process that hashes; `units` is how much it has done."""

    def __init__(self, pid: int, counter: mmap.mmap):
        self.pid, self._counter = pid, counter

    def units(self) -> int:
        return int(struct.unpack("<q", self._counter[:])[0])

    def cpu_seconds(self) -> float:
        user, system = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def neighbour(cores: int) -> Iterator[Neighbour]:
    """Runs with the block, on the first `cores` processors, as the servers do."""
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    with tempfile.TemporaryFile() as file:
        file.write(bytes(8))
        file.flush()
        process = subprocess.Popen(
            [sys.executable, "-c", NEIGHBOUR, str(file.fileno())],
            pass_fds=[file.fileno()], preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        )  # fmt: skip
        try:
            with mmap.mmap(file.fileno(), 8) as counter:
                found = Neighbour(process.pid, counter)
                while found.units() == 0:
                    if process.poll() is not None:
                        raise SystemExit("the neighbour ended")
                    time.sleep(0.01)
                yield found
        finally:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Figures:
    """One server in one round."""

    idle: float
    """Processor seconds a second while nobody asks."""
    alone_tps: float
    """Tokens a second without the neighbour."""
    alone_cpu: float
    """Processor seconds a token without the neighbour."""
    beside_tps: float
    beside_cpu: float
    slowdown: float
    """The neighbour's speed alone over that beside the server."""
    neighbour_share: float
    """Of one processor, what the neighbour had beside the server."""
    others: float
    """What other processes took of the processors at the worst time."""


COLUMNS = {
    "idle": ("idle, CPU s/s", 1.0),
    "alone_tps": ("tok/s alone", 1.0),
    "alone_cpu": ("CPU ms/token alone", 1e3),
    "beside_tps": ("tok/s beside", 1.0),
    "beside_cpu": ("CPU ms/token beside", 1e3),
    "slowdown": ("neighbour's slowdown", 1.0),
    "neighbour_share": ("neighbour's CPU s/s", 1.0),
    "others": ("other load %", 100.0),
}


class Window:
    """What was used of the processors from its making on."""

    def __init__(self, server: Server, beside: Neighbour | None):
        self._server, self._beside = server, beside
        self._start, self._used, self._rest = time.perf_counter(), server.cpu_seconds(), self._others()
        self._units, self._theirs = (beside.units(), beside.cpu_seconds()) if beside else (0, 0.0)

    def _others(self) -> float:
        beside = self._beside.cpu_seconds() if self._beside else 0.0
        return busy_seconds() - time.process_time() - self._server.cpu_seconds() - beside

    def end(self) -> None:
        """Fixes `seconds`, the server's `cpu`, the neighbour's `share` and speed, and `others`' share of all."""
        self.seconds = time.perf_counter() - self._start
        self.cpu = self._server.cpu_seconds() - self._used
        self.others = max(self._others() - self._rest, 0.0) / self.seconds / (os.cpu_count() or 1)
        self.speed = (self._beside.units() - self._units) / self.seconds if self._beside else 0.0
        self.share = (self._beside.cpu_seconds() - self._theirs) / self.seconds if self._beside else 0.0


async def answers(server: Server, work: bench.Workload, users: int, beside: Neighbour | None) -> tuple[int, Window]:
    """Tokens that the server gave, and the window in which it did."""
    async with Target(server.url) as target:
        window = Window(server, beside)
        report = await bench.measure(target.send, work.samples(), concurrency=users)
        window.end()
    if report.errors() or any(o.tokens != work.output_len for o in report.done):
        raise SystemExit(f"not all answers have {work.output_len} tokens; {report.errors()}")
    return sum(o.tokens for o in report.done), window


async def waited(server: Server, beside: Neighbour | None, seconds: float) -> Window:
    window = Window(server, beside)
    await asyncio.sleep(seconds)
    window.end()
    return window


async def measure(setting: Setting, side: str, model: Path, case: Case, seed: int, seconds: float) -> Figures:
    """Starts a server, and measures it with and without the neighbour."""
    port = free_port()
    work = bench.Workload(
        input_len=case.input_len, output_len=case.output_len, num_prompts=case.users * setting.waves,
        vocab_size=setting.vocab, seed=3 * seed,
    )  # fmt: skip
    async with running(setting.argv(side, model, case, port), port, setting.cores) as server:
        await answered(first_token(server.url), server.process)
        await server.settled()
        await answers(server, replace(work, num_prompts=case.users, output_len=4, seed=3 * seed + 1), case.users, None)
        await server.settled()
        idle = await waited(server, None, seconds)
        alone_tokens, alone = await answers(server, work, case.users, None)
        with neighbour(setting.cores) as other:
            free = await waited(server, other, seconds)
            beside_tokens, beside = await answers(server, replace(work, seed=3 * seed + 2), case.users, other)
    return Figures(
        idle=idle.cpu / idle.seconds,
        alone_tps=alone_tokens / alone.seconds,
        alone_cpu=alone.cpu / alone_tokens,
        beside_tps=beside_tokens / beside.seconds,
        beside_cpu=beside.cpu / beside_tokens,
        slowdown=free.speed / beside.speed,
        neighbour_share=beside.share,
        others=max(w.others for w in (idle, alone, free, beside)),
    )


def table(results: dict[str, list[Figures]]) -> str:
    """Medians of both servers, then the ratios of each round: median (smallest to largest)."""
    lines = [f"| server | {' | '.join(name for name, _ in COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for side, rounds in results.items():
        row = [f"{np.median([getattr(f, c) for f in rounds]) * k:.3g}" for c, (_, k) in COLUMNS.items()]
        lines.append(f"| {side} | {' | '.join(row)} |")
    row = []
    for column in COLUMNS:
        pairs = [(getattr(a, column), getattr(b, column)) for a, b in zip(*results.values(), strict=True)]
        ratios = [a / b for a, b in pairs if b > 0]  # a server that rests uses no tick of the clock
        compared = column not in ("idle", "others") and ratios
        row.append(f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if compared else "-")
    lines.append(f"| {OURS} / {THEIRS} | {' | '.join(row)} |")
    return "\n".join(lines)


async def compare(setting: Setting, model: Path, case: Case, rounds: int, seconds: float) -> None:
    results: dict[str, list[Figures]] = {OURS: [], THEIRS: []}
    for r in range(rounds):
        for side in (OURS, THEIRS) if r % 2 == 0 else (THEIRS, OURS):
            figures = await measure(setting, side, model, case, r, seconds)
            results[side].append(figures)
            values = ", ".join(f"{COLUMNS[f.name][0]} {getattr(figures, f.name) * COLUMNS[f.name][1]:.3g}"
                               for f in fields(Figures))  # fmt: skip
            print(f"round {r + 1}, {side}: {values}", flush=True)
    print("\n" + table(results))
    if any(f.others > QUIET for rounds_ in results.values() for f in rounds_):
        print(f"\nmore than {QUIET:.0%} other load: the figures say little, repeat them")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--type", default="Q4_0")
    parser.add_argument("--file", type=Path, help="an existing GGUF file instead of a made one")
    parser.add_argument("--case", type=Case.parse, default="1x16x256", help="users x prompt x answer, in tokens")
    parser.add_argument("--waves", type=int, default=1, help="requests of each user, one after the other")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of rest, and of the neighbour alone")
    parser.add_argument("--cores", type=int, default=2, help="processors of servers and neighbour")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="for llama.cpp and models: %(default)s")
    args = parser.parse_args()
    programs = build(args.folder)
    model = args.file or model_file(args.folder, programs, args.model, args.type)
    vocab = min(100_000, len(GgufFile(model).metadata["tokenizer.ggml.tokens"]))

    def argv(model: Path, case: Case, port: int) -> list[Any]:
        slots = ["-np", case.users, "-c", case.users * case.context, "-fa", "on"]
        return server_argv(programs, model, port, *slots, "-t", args.cores, "-tb", args.cores)

    print(f"{version(programs)}; {args.cores} of {os.cpu_count()} processors; {model.name}, {args.case}", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        setting = Setting(args.cores, cache, args.waves, (), False, vocab, THEIRS, argv)
        asyncio.run(compare(setting, model, args.case, args.rounds, args.seconds))


if __name__ == "__main__":
    main()
