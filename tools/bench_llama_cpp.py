"""Compares `jaxserve serve` with llama.cpp's llama-server: same GGUF file, same processors, same client, in turn.

python tools/bench_llama_cpp.py --model qwen3-0.6b --types BF16,Q8_0,Q4_0,Q4_K_M --rounds 3

The models have the real shapes and vocabularies and random weights: speed does not depend on what weights say. They
are made with the `gguf` package as BF16, and llama.cpp's own llama-quantize makes the other types of that. For each
case both servers are started, each with as many slots as the case has users, warmed up, measured and stopped, one
after the other; who is first changes from round to round. All prompts differ and prefix caches are off. Tokens are
counted by both servers themselves, not by pieces of text.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import msgspec
import numpy as np
from llamacpp import build, default_folder, free_port, running, server_argv, version, vocabulary

from jaxserve import bench
from jaxserve.errors import JaxserveError
from jaxserve.gguf import GgufFile
from jaxserve.weights.gguf import llama3_divisors

OURS = "jaxserve"


@dataclass(frozen=True)
class Shape:
    """A model's sizes, as its GGUF file has them."""

    architecture: str
    vocabulary: str
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    theta: float
    eps: float
    llama3_factor: float = 0.0

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, outputs first; the embedding gives the logits too."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "token_embd.weight", (self.vocab, self.width)
        yield "output_norm.weight", (self.width,)
        if self.llama3_factor:
            yield "rope_freqs.weight", (self.head_dim // 2,)
        for i in range(self.layers):
            block: dict[str, tuple[int, ...]] = {
                "attn_norm": (self.width,), "attn_q": (q, self.width), "attn_k": (kv, self.width),
                "attn_v": (kv, self.width), "attn_output": (self.width, q), "ffn_norm": (self.width,),
                "ffn_gate": (self.ffn, self.width), "ffn_up": (self.ffn, self.width),
                "ffn_down": (self.width, self.ffn),
            }  # fmt: skip
            if self.architecture == "qwen3":
                block |= {"attn_q_norm": (self.head_dim,), "attn_k_norm": (self.head_dim,)}
            yield from ((f"blk.{i}.{name}.weight", shape) for name, shape in block.items())


SHAPES = {
    "qwen3-0.6b": Shape("qwen3", "qwen2", 28, 1024, 3072, 16, 8, 128, 151936, 40960, 1e6, 1e-6),
    "llama-3.2-1b": Shape("llama", "llama-bpe", 16, 2048, 8192, 32, 8, 64, 128256, 131072, 5e5, 1e-5, 32.0),
}


def write_model(path: Path, shape: Shape, vocab: Path) -> None:
    """A BF16 file of random weights, tensor by tensor."""
    staging = path.with_suffix(".part")
    writer = gguf.GGUFWriter(staging, shape.architecture)
    writer.add_name(path.stem)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocab)
    for key, value in GgufFile(vocab).metadata.items():
        if key.startswith("tokenizer."):
            adders: dict[type, Callable] = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool}
            adders.get(type(value), writer.add_array)(key, value.tolist() if isinstance(value, np.ndarray) else value)
    for name, dims in shape.tensors():
        kind = gguf.GGMLQuantizationType.BF16 if len(dims) > 1 else gguf.GGMLQuantizationType.F32
        size = 2 if len(dims) > 1 else 4
        # With a raw type the writer takes the shape for bytes.
        bytes_shape = (*dims[:-1], dims[-1] * size) if len(dims) > 1 else dims
        dtype = np.dtype(np.uint8 if len(dims) > 1 else np.float32)
        raw = kind if len(dims) > 1 else None
        writer.add_tensor_info(name, bytes_shape, dtype, size * int(np.prod(dims)), raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for name, dims in shape.tensors():
        if len(dims) > 1:
            std = 0.02 if name == "token_embd.weight" else dims[1] ** -0.5
            rows = rng.standard_normal(dims, np.float32) * np.float32(std)
            writer.write_tensor_data(rows.astype(ml_dtypes.bfloat16).view(np.uint8))
        elif name == "rope_freqs.weight":
            scaling = {"factor": shape.llama3_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            scaling["original_max_position_embeddings"] = 8192
            writer.write_tensor_data(llama3_divisors(scaling, shape.theta, shape.head_dim).astype(np.float32))
        else:
            writer.write_tensor_data(np.ones(dims, np.float32))
    writer.close()
    staging.rename(path)


def model_file(folder: Path, programs: Path, name: str, kind: str) -> Path:
    """A model in one type; made if it is not there."""
    (folder / "models").mkdir(exist_ok=True)
    full, wanted = (folder / "models" / f"{name}-{k}.gguf" for k in ("BF16", kind))
    if not full.is_file():
        print(f"making {full.name}", file=sys.stderr, flush=True)
        write_model(full, SHAPES[name], vocabulary(folder, SHAPES[name].vocabulary))
    if not wanted.is_file():
        print(f"making {wanted.name}", file=sys.stderr, flush=True)
        staging = wanted.with_suffix(".part")
        done = subprocess.run([programs / "llama-quantize", full, staging, kind], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"llama-quantize failed:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
        staging.rename(wanted)
    return wanted


@dataclass(frozen=True)
class Case:
    """A load: users that ask at the same time, tokens of each prompt and of each answer."""

    users: int
    input_len: int
    output_len: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        return cls(*(int(n) for n in text.split("x")))

    @property
    def context(self) -> int:
        """Tokens that a user needs, in llama.cpp's steps."""
        return -(-(self.input_len + self.output_len + 1) // 256) * 256

    def __str__(self) -> str:
        return f"{self.users} x {self.input_len} -> {self.output_len}"


@dataclass(frozen=True)
class Figures:
    """One server's measurement in one case. Seconds, bytes and tokens a second."""

    output_tps: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    prefill_tps: float
    """Prompt tokens a second of a user alone, to the first token; of many, all prompts until all have one."""
    start: float
    """From the start of the process to the first token."""
    peak: float
    others: float
    """What other processes took of the processors meanwhile. Servers whose threads wait for each other suffer most."""


COLUMNS: dict[str, tuple[str, float]] = {
    "output_tps": ("output tok/s", 1.0),
    "ttft_p50": ("TTFT p50 ms", 1e3),
    "ttft_p99": ("TTFT p99 ms", 1e3),
    "itl_p50": ("ITL p50 ms", 1e3),
    "itl_p99": ("ITL p99 ms", 1e3),
    "prefill_tps": ("prefill tok/s", 1.0),
    "start": ("start s", 1.0),
    "peak": ("peak MB", 1e-6),
    "others": ("other load %", 100.0),
}
LARGER_IS_BETTER = ("output_tps", "prefill_tps")
QUIET = 0.03
"""Other load up to which a measurement says something. At 50 % llama.cpp, whose threads spin, is times slower."""
COMPARED = [column for column in COLUMNS if column != "others"]


class Target(bench.HttpTarget):
    """Reads the count of tokens that llama-server has made, where a server says it.

    It sends no token ids, and no event for a token that ends within a character.
    """

    async def send(self, sample: bench.Sample) -> AsyncGenerator[int]:
        body = {
            "model": await self.model(),
            "prompt": sample.prompt_token_ids,
            "max_tokens": sample.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "timings_per_token": True,
        }
        made = 0
        async for data in bench._events(self._request("POST", "/v1/completions", msgspec.json.encode(body))):
            if data == b"[DONE]":
                continue
            event = msgspec.json.decode(data)
            if "error" in event:
                raise JaxserveError(str(event["error"]))
            count = sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))
            if timings := event.get("timings"):
                count, made = timings["predicted_n"] - made, timings["predicted_n"]
            if count:
                yield count


def busy_seconds() -> float:
    """What all processors together have computed since the machine started."""
    user, nice, system, _, _, irq, softirq = (int(n) for n in Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


async def first_token(url: str) -> None:
    """Asks until a token comes. Raises JaxserveError if none has come in ten minutes."""
    end = time.perf_counter() + 600
    while True:
        try:
            async with Target(url) as target, aclosing(target.send(bench.Sample((4, 5, 6, 7), 1))) as counts:
                async for _ in counts:
                    return
        except JaxserveError:
            if time.perf_counter() > end:
                raise
        await asyncio.sleep(0.02)


@dataclass(frozen=True)
class Setting:
    """What all measurements of a run share."""

    cores: int
    compile_cache: str
    waves: int
    """Requests of a user, one after the other."""
    jaxserve_args: tuple[str, ...]
    embedded: bool
    vocab: int
    """Ids of prompts are below; so that none is special, not all that there are."""
    theirs: str
    """The other server's name."""
    their_argv: Callable[[Path, Case, int], list[Any]]
    """Its command line for a model, a case and a port."""

    def argv(self, side: str, model: Path, case: Case, port: int) -> list[Any]:
        if side == self.theirs:
            return self.their_argv(model, case, port)
        serve = [sys.executable, "-m", "jaxserve", "serve", *([] if self.embedded else [model]), "--port", port]
        slots = ["--max-num-seqs", case.users, "--max-model-len", case.context, "--no-enable-prefix-caching"]
        return [*serve, "--grpc-port", -1, *slots, "--compile-cache-dir", self.compile_cache, *self.jaxserve_args]


async def start(setting: Setting, side: str, model: Path, case: Case) -> float:
    """Seconds to the first token of a server that is not measured; it ends when it has nothing left to compile."""
    begun, port = time.perf_counter(), free_port()
    async with running(setting.argv(side, model, case, port), port, setting.cores) as server:
        await answered(first_token(server.url), server.process)
        took = time.perf_counter() - begun
        await server.settled()
    return took


async def answered(work: Coroutine[Any, Any, None], process: asyncio.subprocess.Process) -> None:
    """Waits for `work`, and gives up if the server ends."""
    task, end = asyncio.ensure_future(work), asyncio.ensure_future(process.wait())
    await asyncio.wait((task, end), return_when=asyncio.FIRST_COMPLETED)
    end.cancel()
    if not task.done():
        task.cancel()
        raise JaxserveError("the server ended")
    task.result()


async def measure(setting: Setting, side: str, model: Path, case: Case, seed: int) -> Figures:
    """Starts a server, warms it up and measures it."""
    begun, port = time.perf_counter(), free_port()
    work = bench.Workload(
        input_len=case.input_len, output_len=case.output_len, num_prompts=case.users * setting.waves,
        vocab_size=setting.vocab, seed=2 * seed,
    )  # fmt: skip
    warm = replace(work, num_prompts=case.users, output_len=4, seed=2 * seed + 1)
    async with running(setting.argv(side, model, case, port), port, setting.cores) as server:
        await answered(first_token(server.url), server.process)
        started = time.perf_counter() - begun
        async with Target(server.url) as target:
            await bench.measure(target.send, warm.samples(), concurrency=case.users)
        await server.settled()
        async with Target(server.url) as target:  # llama-server ends connections that are idle for seconds
            before = busy_seconds() - time.process_time() - server.cpu_seconds()
            report = await bench.measure(target.send, work.samples(), concurrency=case.users)
            others = busy_seconds() - time.process_time() - server.cpu_seconds() - before
        peak = server.peak_bytes()
    if report.errors() or any(o.tokens != case.output_len for o in report.done):
        tokens = sorted({o.tokens for o in report.done})
        raise SystemExit(f"{side}, {case}: answers of {tokens} tokens instead of {case.output_len}; {report.errors()}")
    ttft = np.array([o.ttft_s for o in report.done])
    itl = np.array([gap for o in report.done for gap in o.itl_s] or [np.nan])
    prompts = case.input_len / float(np.median(ttft))
    if case.users > 1:
        first_wave = ttft[: case.users]  # they start together
        prompts = case.users * case.input_len / float(first_wave.max())
    return Figures(
        output_tps=report.output_throughput,
        ttft_p50=float(np.percentile(ttft, 50)),
        ttft_p99=float(np.percentile(ttft, 99)),
        itl_p50=float(np.percentile(itl, 50)),
        itl_p99=float(np.percentile(itl, 99)),
        prefill_tps=prompts,
        start=started,
        peak=float(peak),
        others=max(others, 0.0) / report.duration_s / (os.cpu_count() or 1),
    )


def table(results: dict[tuple[str, Case], dict[str, list[Figures]]], theirs_name: str) -> str:
    """Medians of both sides, then the ratios of each round: median (smallest to largest)."""
    names = [name for name, _ in COLUMNS.values()]
    lines = [f"| type | case | server | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for (kind, case), sides in results.items():
        for side, rounds in sides.items():
            row = [f"{np.median([getattr(f, c) for f in rounds]) * k:.4g}" for c, (_, k) in COLUMNS.items()]
            lines.append(f"| {kind} | {case} | {side} | {' | '.join(row)} |")
    names = [f"{name.rsplit(' ', 1)[0] if c not in LARGER_IS_BETTER else name} {'↑' if c in LARGER_IS_BETTER else '↓'}"
             for c in COMPARED for name in [COLUMNS[c][0]]]  # fmt: skip
    lines += ["", f"{OURS} / {theirs_name}, median (min to max) over rounds; ↑ more is better, ↓ less is better", ""]
    lines += [f"| type | case | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for (kind, case), sides in results.items():
        row = []
        for column in COMPARED:
            ours, theirs = ([getattr(f, column) for f in sides[side]] for side in (OURS, theirs_name))
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            row.append(f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"| {kind} | {case} | {' | '.join(row)} |")
    return "\n".join(lines)


async def compare(setting: Setting, models: dict[str, Path], cases: list[Case], rounds: int, keep: Path | None) -> None:
    results: dict[tuple[str, Case], dict[str, list[Figures]]] = {}
    for kind, model in models.items():
        for case in cases:
            cold = await start(setting, OURS, model, case)
            print(f"{kind}, {case}: {OURS} starts in {cold:.2f} s with an empty compile cache", flush=True)
            sides: dict[str, list[Figures]] = {OURS: [], setting.theirs: []}
            for r in range(rounds):
                for side in (OURS, setting.theirs) if r % 2 == 0 else (setting.theirs, OURS):
                    figures = await measure(setting, side, model, case, seed=r)
                    sides[side].append(figures)
                    values = ", ".join(f"{n} {getattr(figures, c) * k:.4g}" for c, (n, k) in COLUMNS.items())
                    print(f"{kind}, {case}, round {r + 1}, {side}: {values}", flush=True)
            results[kind, case] = sides
            if keep:
                rows = [
                    {"type": t, "case": str(c), "server": s, "rounds": [asdict(f) for f in fs]}
                    for (t, c), by_side in results.items() for s, fs in by_side.items()
                ]  # fmt: skip
                keep.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n" + table(results, setting.theirs))
    loud = sum(f.others > QUIET for sides in results.values() for fs in sides.values() for f in fs)
    if loud:
        print(f"\n{loud} measurements had more than {QUIET:.0%} other load: they compare nothing, repeat them")


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options of both comparisons."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument(
        "--cases", default="1x128x64,4x128x64,16x128x64,64x128x64,1x2048x16", help="users x prompt x answer, in tokens"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--waves", type=int, default=2, help="requests of each user, one after the other")
    parser.add_argument("--cores", type=int, default=2, help="processors and threads of each server")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="for llama.cpp and models: %(default)s")
    parser.add_argument("--json", type=Path, help="all figures of all rounds go there")
    parser.add_argument("--jaxserve-args", default="", help="more options of `jaxserve serve`, separated by spaces")
    parser.add_argument("--their-args", default="", help="more options of the other server, separated by spaces")
    return parser


def run(
    args: argparse.Namespace,
    models: dict[str, Path],
    theirs: str,
    their_argv: Callable[[Path, Case, int], list[Any]],
    *,
    embedded: bool = False,
) -> None:
    """Compares on all models and cases, and prints the table; `embedded`: ours serves the model in the package."""
    tokens = GgufFile(next(iter(models.values()))).metadata["tokenizer.ggml.tokens"]
    with tempfile.TemporaryDirectory() as cache:
        ours = tuple(args.jaxserve_args.split())
        setting = Setting(args.cores, cache, args.waves, ours, embedded, min(100_000, len(tokens)), theirs, their_argv)
        cases = [Case.parse(text) for text in args.cases.split(",")]
        asyncio.run(compare(setting, models, cases, args.rounds, args.json))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--file", type=Path, help="an existing GGUF file instead of made ones")
    parser.add_argument("--types", default="BF16,Q8_0,Q4_0,Q4_K_M")
    parser.add_argument("--embedded", action="store_true", help="jaxserve serves its embedded model: tries this script")
    parser.add_argument(
        "--without-amx", action="store_true", help="llama.cpp for AVX-512: how processors of before 2023 compare"
    )
    parser.add_argument("--prepare", action="store_true", help="builds and makes the models, and measures nothing")
    args = parser.parse_args()
    programs = build(args.folder, amx=not args.without_amx)
    if args.file:
        models = {args.file.stem: args.file}
    else:
        models = {kind: model_file(args.folder, programs, args.model, kind) for kind in args.types.split(",")}
    if args.prepare:
        return

    def argv(model: Path, case: Case, port: int) -> list[Any]:
        slots = ["-np", case.users, "-c", case.users * case.context, "-fa", "on"]
        threads = ["-t", args.cores, "-tb", args.cores]
        return server_argv(programs, model, port, *slots, *threads, *args.their_args.split())

    print(f"{version(programs)}; {args.cores} of {os.cpu_count()} processors; {args.file or args.model}", flush=True)
    run(args, models, "llama.cpp", argv, embedded=args.embedded)


if __name__ == "__main__":
    main()
